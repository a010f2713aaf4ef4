"""Changes to Argilla 2.8.0 itself: limits on wrong passwords, a rule for names, jobs in a thread, less work.

For each record or response written it reads the dataset with its workspace, fields, questions, metadata and
vectors to build a webhook event, and only then looks whether any webhook is enabled. And it builds pydantic's
validator anew for each metadata value. Together that is most of the time that logging and answering take.
Many responses at once are written in one transaction, see `bulk_responses`. Nothing else changes: with a
webhook enabled, events go out as before.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from argilla_server.contexts import accounts, webhooks
from argilla_server.errors.future import UnprocessableEntityError
from argilla_server.jobs.queues import DEFAULT_QUEUE, HIGH_QUEUE, REDIS_CONNECTION
from argilla_server.models import User, Workspace, database
from argilla_server.use_cases.responses import upsert_responses_in_bulk
from argilla_server.webhooks.v1 import records, responses
from rq import SimpleWorker
from rq.timeouts import TimerDeathPenalty
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession

from . import bulk_responses, configuration, home
from .sign_in import Throttle


class _NoEvent:
    """An event that no webhook waits for."""

    async def notify(self, db: AsyncSession) -> list[Any]:
        return []


class ThreadWorker(SimpleWorker):
    """A worker that may run outside the main thread: no signals, neither for timeouts nor for its end."""

    death_penalty_class = TimerDeathPenalty

    def _install_signal_handlers(self) -> None:
        pass


def apply() -> None:
    """Change Argilla, once, in the process that serves."""
    accounts.authenticate_user = Throttle(accounts.authenticate_user)
    event.listen(User.username, "set", functools.partial(_check_name, "user"))
    event.listen(Workspace.name, "set", functools.partial(_check_name, "workspace"))
    database.TypeAdapter = functools.cache(database.TypeAdapter)
    records.build_record_event = _only_for_webhooks(records.build_record_event)
    bulk = upsert_responses_in_bulk.UpsertResponsesInBulkUseCase
    bulk.execute = bulk_responses.in_one_transaction(bulk.execute)
    responses.build_response_event = _only_for_webhooks(responses.build_response_event)
    if not configuration.uses_real_redis():
        worker = ThreadWorker([HIGH_QUEUE, DEFAULT_QUEUE], connection=REDIS_CONNECTION)
        threading.Thread(target=worker.work, args=(False, "WARNING"), daemon=True, name="jobs").start()


def _only_for_webhooks(build: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(build)
    async def build_only_for_webhooks(db: AsyncSession, *event: Any) -> Any:
        return await build(db, *event) if await webhooks.list_enabled_webhooks(db) else _NoEvent()

    return build_only_for_webhooks


def _check_name(kind: str, row: Any, name: str, before: Any, initiator: Any) -> None:
    if name != before:  # who has another name since before there was this rule keeps it
        try:
            home.check_name(kind, name)
        except home.StartRefused as refused:
            raise UnprocessableEntityError(str(refused)) from refused
