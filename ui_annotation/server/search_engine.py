"""A search engine for Argilla without a search server: plain SQL over Argilla's own tables.

All that Elasticsearch would hold is in the SQLite file already, and Argilla calls its search engine only
after it has committed. So there is no second copy that could be stale or lost: the methods that would update
an index have nothing to do.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from argilla_server.enums import MetadataPropertyType
from argilla_server.models import Dataset, MetadataProperty, Record, Response, User
from argilla_server.search_engine.base import (
    Filter,
    MetadataMetrics,
    Order,
    SearchEngine,
    SearchResponseItem,
    SearchResponses,
    TermsMetrics,
    TextQuery,
)
from argilla_server.settings import settings
from sqlalchemy import Float, Select, event, func, literal_column, null, select, true
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from . import filters, full_text
from .configuration import EMBEDDED


@functools.cache
def _database() -> AsyncEngine:
    """Connections of our own.

    A request holds a connection of Argilla's while it searches; if all took a second one from the same pool,
    they could wait for each other for ever.
    """
    database = create_async_engine(settings.database_url, **settings.database_engine_args)

    @event.listens_for(database.sync_engine, "connect")
    def add_score(connection: Any, record: object) -> None:
        connection.create_function("score", 3, full_text.score, deterministic=True)

    return database


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
        """Whether the database can be read; Argilla asks when it starts."""
        return len(await _rows(select(1))) == 1

    async def info(self) -> dict[str, Any]:
        """What `/api/v1/status` tells of the search engine."""
        ((version,),) = await _rows(select(func.sqlite_version()))
        return {"name": EMBEDDED, "version": {"number": version, "distribution": "sqlite"}}

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
        query: TextQuery | None = None,
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
            query: What to find in their fields, see `full_text.parse`.
            filter: What else must hold.
            sort: The order; first things first.
            offset: How many to leave out at the start.
            limit: How many at most.
            user_id: The annotator whose queue is read; Argilla passes it, though its base class lacks it.
        """
        score = func.score(Record.fields, query.q, query.field or "", type_=Float) if query else null()
        matching = select(Record.id, score.label("score")).where(Record.dataset_id == dataset.id)
        if filter is not None:
            matching = matching.where(filters.condition(filter))
        as_logged: tuple[Any, ...] = (
            Record.inserted_at,
            literal_column("records.rowid"),
        )  # many are logged at the same moment
        rows = list(await _rows(matching.order_by(*map(filters.order, sort or []), *as_logged)))
        if query:  # here, not in SQL, which would score each record twice
            rows = [row for row in rows if row.score is not None]
        if query and not sort:
            rows.sort(key=lambda row: row.score, reverse=True)
        elif user_id and not sort:
            rows.sort(key=lambda row: _place(user_id, row.id))
        page = rows[offset : offset + limit]
        items = [SearchResponseItem(record_id=record_id, score=score) for record_id, score in page]
        return SearchResponses(items=items, total=len(rows))

    async def similarity_search(self, *args: Any, **kwargs: Any) -> SearchResponses:
        """Refused: records are found by words and filters only.

        Raises:
            ValueError: always; Argilla answers 422.
        """
        raise ValueError(f"the embedded search engine does not search by vectors{filters.USE_ANOTHER}")

    async def compute_metrics_for(self, metadata_property: MetadataProperty) -> MetadataMetrics:
        """The terms of a metadata property with their counts.

        Raises:
            ValueError: it has numbers, as none of ours has.
        """
        if metadata_property.type != MetadataPropertyType.terms:
            raise ValueError(f"the embedded search engine knows no numbers in metadata{filters.USE_ANOTHER}")
        values = filters.rows_of(Record.metadata_, metadata_property.name)
        terms = (
            select(values.c.value, func.count())
            .select_from(Record)
            .join(values, true())
            .where(Record.dataset_id == metadata_property.dataset_id, values.c.type != "null")
            .group_by(values.c.value)
            .order_by(func.count().desc(), values.c.value)
        )
        rows = await _rows(terms)
        counts = [TermsMetrics.TermCount(term=str(term), count=count) for term, count in rows]
        return TermsMetrics(total=sum(count for _, count in rows), values=counts)


def _place(user_id: UUID | str, record_id: UUID) -> bytes:
    """What shuffles records, for each user otherwise: the same on every page and after a restart."""
    return hashlib.blake2b(record_id.bytes, key=UUID(str(user_id)).bytes, digest_size=8).digest()
