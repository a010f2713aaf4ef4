"""Signing in: who sent a request, the cookie for the UI's <audio> elements, and a limit on wrong passwords.

Argilla's UI keeps its token in localStorage, where a media request cannot take it from. So the answer to
`/api/v1/me`, which the UI asks for on every page load, also sets that token as a cookie, for /media only.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import NamedTuple
from urllib.parse import urlsplit

from argilla_server.contexts import accounts
from argilla_server.database import AsyncSessionLocal
from argilla_server.errors import UnauthorizedError
from argilla_server.models import User
from argilla_server.security.authentication.jwt import JWT
from fastapi import HTTPException
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.requests import Request

COOKIE = "argilla_media"
ATTEMPTS = 10
WINDOW_S = 60.0
MAX_SIGN_IN_BYTES = 10_000
_MOST_KEYS = 10_000

Authenticate = Callable[[AsyncSession, str, str], Awaitable[User | None]]

client_address = ContextVar("client_address", default="")
"""Of the request that is being answered."""


class Person(NamedTuple):
    """Someone signed in, and what they may do with media."""

    name: str
    workspaces: frozenset[str]
    """Names of those they are a member of; the owner is of all."""
    is_owner: bool
    may_manage: bool
    """Store clips and read who listened: the owner, and an admin in their own workspaces."""


async def person(request: Request) -> Person | None:
    """Who sent `request`, or None. A credential that is wrong is not made good by another one beside it."""
    async with AsyncSessionLocal() as db:
        if (key := request.headers.get("x-argilla-api-key")) is not None:
            user = await accounts.get_user_by_api_key(db, key)
        else:
            user = await accounts.get_user_by_username(db, _username(_token(request)))
        if user is None:
            return None
        mine = await accounts.list_workspaces(db) if user.is_owner else user.workspaces
        workspaces = frozenset(workspace.name for workspace in mine)
        return Person(user.username, workspaces, user.is_owner, may_manage=user.is_owner or user.is_admin)


def came_by_cookie(request: Request) -> bool:
    """Whether the browser added the credential by itself, which it does for other sites' requests too."""
    return not {"x-argilla-api-key", "authorization"} & set(request.headers.keys())


def is_from_our_pages(request: Request) -> bool:
    """Whether a browser says that one of our own pages made this request.

    No other page may use the cookie to write. A browser that sends neither header is too old to be let.
    """
    if site := request.headers.get("sec-fetch-site"):
        return site == "same-origin"
    origin = request.headers.get("origin", "")
    return bool(origin) and urlsplit(origin).netloc == request.headers.get("host")


def cookie(token: str, *, secure: bool) -> str:
    """A Set-Cookie value that signs `token` in for /media, for as long as the token itself is good."""
    seconds = max(0, int(JWT.decode(token)["exp"] - time.time()))
    return _set_cookie(token, seconds, secure=secure)


def no_cookie(*, secure: bool) -> str:
    """A Set-Cookie value that ends the sign-in for /media."""
    return _set_cookie("", 0, secure=secure)


def bearer(request: Request) -> str | None:
    """The token of an `Authorization: Bearer` header."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" and token else None


def _token(request: Request) -> str | None:
    return bearer(request) if "authorization" in request.headers else request.cookies.get(COOKIE)


def _username(token: str | None) -> str | None:
    try:
        return JWT.decode(token).get("username") if token else None
    except UnauthorizedError:
        return None


def _set_cookie(value: str, max_age_s: int, *, secure: bool) -> str:
    attributes = "Path=/media; HttpOnly; SameSite=Strict"
    return f"{COOKIE}={value}; {attributes}; Max-Age={max_age_s}" + ("; Secure" if secure else "")


class Throttle:
    """Ten wrong passwords a minute for an address and a name, then 429; around Argilla's own check."""

    def __init__(self, authenticate: Authenticate) -> None:
        """Guard `authenticate`, which returns None for a wrong password."""
        self._authenticate = authenticate
        self._attempts: dict[tuple[str, str], deque[float]] = defaultdict(deque)

    async def __call__(self, db: AsyncSession, username: str, password: str) -> User | None:
        """Check a password, or refuse to. Tries count when they begin: many at once are many."""
        key = (client_address.get(), username)
        wait_s = self._wait_s(key)
        if wait_s > 0:
            detail = f"Too many wrong passwords. Try again in {wait_s:.0f} s."
            raise HTTPException(429, detail, {"retry-after": f"{wait_s:.0f}"})
        self._attempts[key].append(time.monotonic())
        user = await self._authenticate(db, username, password)
        if user:
            self._attempts.pop(key, None)
        return user

    def _wait_s(self, key: tuple[str, str]) -> float:
        now = time.monotonic()
        if len(self._attempts) > _MOST_KEYS:  # made-up user names must not fill the memory
            old = [k for k, times in self._attempts.items() if not times or now - times[-1] > WINDOW_S]
            for k in old:
                del self._attempts[k]
        times = self._attempts[key]
        while times and now - times[0] > WINDOW_S:
            times.popleft()
        return 0.0 if len(times) < ATTEMPTS else max(1.0, WINDOW_S - (now - times[0]))
