"""Prepares Argilla's database: schema, workspace, users. Every step may be repeated."""

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import argilla_server
from alembic import command
from alembic.config import Config
from argilla_server.contexts import accounts
from argilla_server.database import AsyncSessionLocal, async_engine, sync_engine
from argilla_server.models import User, UserRole, Workspace, WorkspaceUser
from argilla_server.settings import settings

from .home import OWNER


class _Alembic(Config):
    """Argilla hands its database URL to alembic as it is; alembic takes a '%' in it for a reference."""

    def set_main_option(self, name: str, value: str) -> None:
        super().set_main_option(name, value.replace("%", "%%"))


def migrate() -> None:
    """Bring the database to the schema of this Argilla; makes it when there is none."""
    if settings.database_is_sqlite:
        # Readers and the writer do not wait for each other. Kept in the file.
        with sync_engine.connect() as database:
            database.exec_driver_sql("PRAGMA journal_mode = WAL")
    alembic = _Alembic()  # without alembic.ini: its logging section would silence every logger so far
    alembic.set_main_option("script_location", str(Path(argilla_server.__file__).parent / "alembic"))
    command.upgrade(alembic, "head")


async def seed(workspace: str, users: Mapping[str, Mapping[str, str]], members: Collection[str]) -> None:
    """Make the workspace, the users who are missing, and the memberships.

    A missing user is created if named in `members`, or if the whole database is new: a user whom the owner
    deleted must not come back with the next start.

    Args:
        workspace: created if missing.
        users: name -> {"role", "password", "api_key"}.
        members: names who belong to the workspace; others keep what they have.
    """
    async with AsyncSessionLocal() as db:
        is_new = await accounts.get_user_by_username(db, OWNER) is None
        present = {user.username for user in await accounts.list_users(db)}
        missing = {
            name: user for name, user in users.items() if name not in present and (is_new or name in members)
        }
        with ThreadPoolExecutor() as threads:  # bcrypt takes a quarter of a second each
            hashes = list(
                threads.map(accounts.hash_password, [user["password"] for user in missing.values()])
            )
        for (name, user), password_hash in zip(missing.items(), hashes, strict=True):
            await User.create(
                db,
                first_name=name,
                username=name,
                role=UserRole(user["role"]),
                api_key=user["api_key"],
                password_hash=password_hash,
                autocommit=False,
            )
        place = await Workspace.get_by(db, name=workspace)
        place = place or await Workspace.create(db, name=workspace, autocommit=False)
        for name in members:
            user = await User.get_by(db, username=name)
            if not await WorkspaceUser.get_by(db, workspace_id=place.id, user_id=user.id):
                await WorkspaceUser.create(db, workspace_id=place.id, user_id=user.id, autocommit=False)
        await db.commit()
    await async_engine.dispose()  # its connections belong to this event loop; the server has another
