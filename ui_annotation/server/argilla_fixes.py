"""Changes to Argilla 2.8.0 itself: it limits wrong passwords, and leaves out needless work for each record.

For each record or response written it reads the dataset with its workspace, fields, questions, metadata and
vectors to build a webhook event, and only then looks whether any webhook is enabled. And it builds pydantic's
validator anew for each metadata value. Together that is most of the time that logging and answering take.
Nothing else changes: with a webhook enabled, events go out as before.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from argilla_server.contexts import accounts, webhooks
from argilla_server.models import database
from argilla_server.webhooks.v1 import records, responses
from sqlalchemy.ext.asyncio import AsyncSession

from .sign_in import Throttle


class _NoEvent:
    """An event that no webhook waits for."""

    async def notify(self, db: AsyncSession) -> list[Any]:
        return []


def apply() -> None:
    """Change Argilla, once, in the process that serves."""
    accounts.authenticate_user = Throttle(accounts.authenticate_user)
    database.TypeAdapter = functools.cache(database.TypeAdapter)
    records.build_record_event = _only_for_webhooks(records.build_record_event)
    responses.build_response_event = _only_for_webhooks(responses.build_response_event)


def _only_for_webhooks(build: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(build)
    async def build_only_for_webhooks(db: AsyncSession, *event: Any) -> Any:
        return await build(db, *event) if await webhooks.list_enabled_webhooks(db) else _NoEvent()

    return build_only_for_webhooks
