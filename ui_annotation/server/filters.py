"""Argilla's filters and sorts as SQL over its own tables, SQLite's dialect (`json_each`).

They cover what our datasets have: a record's own columns, metadata terms, and responses. Values in JSON
columns are scalars or lists; `json_each` makes rows of both, and a filter holds if it does for any of them.
"""

from __future__ import annotations

from typing import Any

from argilla_server.enums import ResponseStatusFilter, SortOrder
from argilla_server.models import Record, Response
from argilla_server.search_engine.base import (
    AndFilter,
    Filter,
    MetadataFilterScope,
    Order,
    RecordFilterScope,
    ResponseFilterScope,
    TermsFilter,
)
from sqlalchemy import ColumnElement, String, and_, cast, exists, func, or_, select, true

Condition = ColumnElement[bool]

USE_ANOTHER = "; set ARGILLA_SEARCH_ENGINE=elasticsearch for it"


def rows_of(column: Any, *path: str) -> Any:
    """The values under a path of a JSON column, as a table with columns `value` and `type`.

    JSON's null is a row, of type "null". Names in `path` are Argilla's: letters, digits, "_" and
    "-", which need no escape.
    """
    under = "$" + "".join(f'."{name}"' for name in path)
    return func.json_each(column, under).table_valued("value", "type")


def condition(wanted: Filter) -> Condition:
    """Whether a record passes a filter.

    Raises:
        ValueError: a filter this engine does not know.
    """
    if isinstance(wanted, AndFilter):
        return and_(true(), *map(condition, wanted.filters))
    scope = wanted.scope
    if isinstance(wanted, TermsFilter):
        values = [str(value) for value in wanted.values]
        if isinstance(scope, RecordFilterScope) and scope.property in ("status", "external_id"):
            return cast(getattr(Record, scope.property), String).in_(values)
        if isinstance(scope, MetadataFilterScope):
            return _any(rows_of(Record.metadata_, scope.metadata_property), values)
        if isinstance(scope, ResponseFilterScope) and scope.question:
            holds = _any(rows_of(Response.values, scope.question, "value"), values)
            return exists().where(*_responses(scope), holds)
        if isinstance(scope, ResponseFilterScope) and str(scope.property) == "status":
            return _status_condition(scope, values)
    kind = f"{type(wanted).__name__} by {type(scope).__name__}"
    raise ValueError(f"the embedded search engine knows no filter {kind}{USE_ANOTHER}")


def order(wanted: Order) -> ColumnElement[Any]:
    """What to sort records by; records without a value come last, as they do in Elasticsearch.

    Raises:
        ValueError: a sort this engine does not know.
    """
    scope = wanted.scope
    value: ColumnElement[Any]
    if isinstance(scope, RecordFilterScope):
        value = getattr(Record, str(scope.property))
    elif isinstance(scope, MetadataFilterScope):
        rows = rows_of(Record.metadata_, scope.metadata_property)
        value = select(func.min(rows.c.value)).select_from(rows).scalar_subquery()
    else:
        raise ValueError(f"the embedded search engine knows no sort by {type(scope).__name__}{USE_ANOTHER}")
    return (value.desc() if wanted.order == SortOrder.desc else value.asc()).nulls_last()


def _any(rows: Any, values: list[str]) -> Condition:
    holds = cast(rows.c.value, String).in_(values)
    return exists().select_from(rows).where(holds, rows.c.type != "null")


def _responses(scope: ResponseFilterScope) -> list[Condition]:
    """Of the annotator who asks, or of anybody."""
    whose = [Response.user_id == scope.user.id] if scope.user else []
    return [Response.record_id == Record.id, *whose]


def _status_condition(scope: ResponseFilterScope, statuses: list[str]) -> Condition:
    """No response has the status "pending": it says that there is none."""
    kept = [status for status in statuses if status != ResponseStatusFilter.pending]
    holds = exists().where(*_responses(scope), cast(Response.status, String).in_(kept))
    return holds if kept == statuses else or_(holds, ~exists().where(*_responses(scope)))
