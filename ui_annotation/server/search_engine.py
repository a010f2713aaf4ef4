"""A search engine for Argilla without a search server: plain SQL over Argilla's own tables.

All that Elasticsearch would hold is in the SQLite file already, and Argilla calls its search engine only
after it has committed. So there is no second copy that could be stale or lost: the methods that would update
an index have nothing to do, and full text is indexed by triggers (`full_text`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from argilla_server.enums import MetadataPropertyType
from argilla_server.errors.future import UnprocessableEntityError
from argilla_server.models import Dataset, MetadataProperty, Record, Response, User
from argilla_server.search_engine.base import (
    Filter,
    FloatMetadataMetrics,
    IntegerMetadataMetrics,
    MetadataMetrics,
    Order,
    SearchEngine,
    SearchResponseItem,
    SearchResponses,
    TermsMetrics,
    TextQuery,
)
from argilla_server.settings import settings
from sqlalchemy import (
    ColumnElement,
    Float,
    Select,
    String,
    desc,
    false,
    func,
    literal_column,
    null,
    select,
    text,
    true,
)
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from . import filters, full_text
from .configuration import EMBEDDED

_HITS = """
    SELECT document.record_id AS record_id, hit.score AS score
    FROM (
        SELECT rowid AS number, -rank AS score FROM search_texts WHERE search_texts MATCH :query LIMIT -1
    ) AS hit
    JOIN search_documents AS document ON document.number = hit.number AND document.field = :field"""
"""Matching records; the higher the score, the better. `rank` works only right beside MATCH, and LIMIT keeps
SQLite from merging the two queries ("unable to use function bm25 in the requested context")."""

_EXCLUDED = """records.id NOT IN (
    SELECT record_id FROM search_documents
    WHERE field = :not_in AND number IN (SELECT rowid FROM search_texts WHERE search_texts MATCH :excluded)
)"""

_ID_DIGITS = 7
"""Of a record's id, what its place in a queue depends on: 28 bits, which times 28 more fit into 63."""


def install_full_text() -> bool:
    """Make the full-text index, where it is not in order already; to be run at each start, after migrations.

    Returns:
        Whether it was built (again).
    """
    return full_text.install(Path(str(make_url(settings.database_url).database)))


@functools.cache
def _database() -> AsyncEngine:
    """Connections of our own.

    A request holds a connection of Argilla's while it searches; if all took a second one from the same pool,
    they could wait for each other for ever.
    """
    return create_async_engine(settings.database_url, **settings.database_engine_args)


async def _rows(statement: Any) -> Sequence[Any]:
    async with _database().connect() as connection:
        return (await connection.execute(statement)).all()


@SearchEngine.register(EMBEDDED)
class EmbeddedSearchEngine(SearchEngine):
    """Searches Argilla's SQLite file. Argilla makes one per request: it has no state."""

    @classmethod
    async def new_instance(cls) -> EmbeddedSearchEngine:
        """An engine; costs nothing."""
        return cls()

    async def close(self) -> None:
        """Nothing is open between two queries."""

    async def ping(self) -> bool:
        """Whether the full-text index is there; Argilla asks when it starts."""
        return len(await _rows(text("SELECT 1 FROM sqlite_schema WHERE name = 'search_texts'"))) == 1

    async def info(self) -> dict[str, Any]:
        """What `/api/v1/status` tells of the search engine."""
        ((version,),) = await _rows(text("SELECT sqlite_version()"))
        return {"name": EMBEDDED, "version": {"number": version, "distribution": "sqlite-fts5"}}

    async def _do_nothing(self, *args: Any, **kwargs: Any) -> None:
        """The tables are the index: there is nothing to keep in step with them."""

    create_index = delete_index = configure_metadata_property = configure_index_vectors = _do_nothing
    index_records = partial_record_update = delete_records = _do_nothing
    update_record_response = delete_record_response = _do_nothing
    update_record_suggestion = delete_record_suggestion = _do_nothing

    async def get_dataset_progress(self, dataset: Dataset) -> dict[str, int]:
        """Records per status and in `total`; nothing for a draft."""
        return await self._counts(dataset, Record.status, select(Record.status, func.count()))

    async def get_dataset_user_progress(self, dataset: Dataset, user: User) -> dict[str, int]:
        """A user's responses per status and in `total`; nothing for a draft."""
        counts = select(Response.status, func.count()).join(Record, Record.id == Response.record_id)
        return await self._counts(dataset, Response.status, counts.where(Response.user_id == user.id))

    async def _counts(self, dataset: Dataset, status: Any, counts: Select[Any]) -> dict[str, int]:
        if dataset.is_draft:
            return {}
        rows = await _rows(counts.where(Record.dataset_id == dataset.id).group_by(status))
        of = {str(status.value): number for status, number in rows}  # Argilla wants names, not enums
        return {"total": sum(of.values()), **of}

    async def search(
        self,
        dataset: Dataset,
        query: TextQuery | str | None = None,
        filter: Filter | None = None,
        sort: list[Order] | None = None,
        offset: int = 0,
        limit: int = 100,
        user_id: UUID | str | None = None,
    ) -> SearchResponses:
        """One page of the records that match.

        Sorted by `sort`; else by relevance to a query; else shuffled, differently for each `user_id` but the
        same at every call; else as they were logged.

        Args:
            dataset: Whose records.
            query: What to find in their fields, see `full_text.match`.
            filter: What else must hold.
            sort: The order; first things first.
            offset: How many to leave out at the start.
            limit: How many at most.
            user_id: The annotator whose queue is read; Argilla passes it, though its base class lacks it.
        """
        matching = _matching(dataset, query, filter)
        order = [filters.order(dataset, wanted) for wanted in sort or []]
        if not order and query is not None:
            order = [desc("score")]
        elif not order and user_id is not None:
            order = [_shuffled(user_id)]
        order += [Record.inserted_at, literal_column("records.rowid")]  # many are logged at the same moment
        page = matching.order_by(*order).offset(offset).limit(limit)
        async with _database().connect() as connection:
            total = (
                await connection.execute(select(func.count()).select_from(matching.subquery()))
            ).scalar_one()
            rows = (await connection.execute(page)).all() if total else []
        items = [SearchResponseItem(record_id=record_id, score=score) for record_id, score in rows]
        return SearchResponses(items=items, total=total)

    async def similarity_search(self, *args: Any, **kwargs: Any) -> SearchResponses:
        """Refused: records are found by words and filters only.

        Raises:
            UnprocessableEntityError: always.
        """
        raise UnprocessableEntityError(
            "The embedded search engine does not search by vectors; set ARGILLA_SEARCH_ENGINE=elasticsearch"
        )

    async def compute_metrics_for(self, metadata_property: MetadataProperty) -> MetadataMetrics:
        """The terms of a metadata property with their counts, or the range of its numbers."""
        values = filters.rows_of(Record.metadata_, metadata_property.name)
        of_dataset = (Record.dataset_id == metadata_property.dataset_id, values.c.type != "null")
        if metadata_property.type == MetadataPropertyType.terms:
            terms = (
                select(values.c.value, func.count())
                .select_from(Record)
                .join(values, true())
                .where(*of_dataset)
            )
            rows = await _rows(terms.group_by(values.c.value).order_by(func.count().desc(), values.c.value))
            counts = [TermsMetrics.TermCount(term=str(term), count=count) for term, count in rows]
            return TermsMetrics(total=sum(count for _, count in rows), values=counts)
        span = (
            select(func.min(values.c.value), func.max(values.c.value))
            .select_from(Record)
            .join(values, true())
        )
        ((least, most),) = await _rows(span.where(*of_dataset))
        integer = metadata_property.type == MetadataPropertyType.integer
        return (IntegerMetadataMetrics if integer else FloatMetadataMetrics)(min=least, max=most)


def _matching(dataset: Dataset, query: TextQuery | str | None, filter: Filter | None) -> Select[Any]:
    """Columns `id` and `score` of the records that match; the score is null without words to find."""
    of_dataset = [Record.dataset_id == dataset.id]
    if filter is not None:
        of_dataset.append(filters.condition(dataset, filter))
    unscored = select(Record.id, null().label("score")).where(*of_dataset)
    if query is None:
        return unscored
    words = query if isinstance(query, TextQuery) else TextQuery(q=query)
    field = words.field or full_text.EVERY_FIELD
    wanted, excluded = full_text.match(words.q)
    if wanted is None and excluded is None:
        return unscored.where(false())
    matching = unscored
    if wanted is not None:
        hits = _hits(wanted, field)
        matching = (
            select(Record.id, hits.c.score).join(hits, hits.c.record_id == Record.id).where(*of_dataset)
        )
    if excluded is not None:
        matching = matching.where(text(_EXCLUDED).bindparams(excluded=excluded, not_in=field))
    return matching


def _hits(query: str, field: str) -> Any:
    hits = text(_HITS).bindparams(query=query, field=field)
    return hits.columns(record_id=Record.id.type, score=Float).subquery()


def _shuffled(user_id: UUID | str) -> ColumnElement[Any]:
    """A sort key that shuffles records, for each user otherwise, without anything to keep.

    Ids are random. The first digits of one, times an odd number of the user's, modulo a power of two, lose
    nothing, and the high bits then depend on all of them. The order is the same on every page, after a
    restart, and after VACUUM (which may change rowids).
    """
    number = sum(
        func.instr("0123456789abcdef", func.substr(Record.id, place, 1, type_=String))
        * 16 ** (_ID_DIGITS - place)
        for place in range(1, _ID_DIGITS + 1)
    )
    bits = 16**_ID_DIGITS - 1
    multiplier = UUID(str(user_id)).int & bits | 1
    return (number * multiplier).op("&")(bits)
