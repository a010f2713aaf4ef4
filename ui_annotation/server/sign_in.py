"""Signing in: who sent a request, the cookie for the UI's <audio> elements, and a limit on wrong passwords.

Argilla's UI keeps its token in localStorage, where a media request cannot take it from. So the answer to
`/api/v1/me`, which the UI asks for on every page load, also sets that token as a cookie, for /media only.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import re
import secrets
import sqlite3
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from argilla_server.contexts import accounts
from argilla_server.database import AsyncSessionLocal
from argilla_server.errors import UnauthorizedError
from argilla_server.models import User
from argilla_server.security.authentication.jwt import JWT
from argilla_server.settings import settings
from fastapi import HTTPException
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.requests import Request

COOKIE = "argilla_media"
BROWSER_COOKIE = "argilla_browser"
MAX_SIGN_IN_BYTES = 10_000

PER_ACCOUNT, WINDOW_S = 10, 60.0
"""Wrong passwords for one account in that time, then the rest of it is a wait."""
PER_SOURCE, REMEMBERED_S, LONGEST_WAIT_S = 20, 3600.0, 900.0
"""Wrong passwords for all accounts in that time, then one more after 1 s, 2 s, 4 s ... at most 15 minutes."""
_MOST_SOURCES = 10_000
_BROWSER_KNOWN_S = 90 * 86_400

Authenticate = Callable[[AsyncSession, str, str], Awaitable[User | None]]


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
    key = request.headers.get("x-argilla-api-key")
    username = _content(_token(request)).get("username") if key is None else None
    known = _cache.people()
    if who := known.get((key, username)):
        return who
    async with AsyncSessionLocal() as db:
        if key is not None:
            user = await accounts.get_user_by_api_key(db, key)
        else:
            user = await accounts.get_user_by_username(db, username)
        if user is None:
            return None
        mine = await accounts.list_workspaces(db) if user.is_owner else user.workspaces
        workspaces = frozenset(workspace.name for workspace in mine)
        who = Person(user.username, workspaces, user.is_owner, may_manage=user.is_owner or user.is_admin)
    known[key, username] = who
    return who


class _PeopleCache:
    """Who has which key or name, until anything changes in Argilla's database.

    A listener asks for many clips, and browsers for many parts of one; most of the time of such a request
    would go into reading Argilla's tables.
    """

    def __init__(self) -> None:
        self._db: sqlite3.Connection | None = None
        self._version = -1
        self._people: dict[tuple[str | None, str | None], Person] = {}

    def people(self) -> dict[tuple[str | None, str | None], Person]:
        """Empty after a change, and always with PostgreSQL, which does not tell."""
        if not settings.database_is_sqlite:
            return {}
        if self._db is None:
            self._db = sqlite3.connect(make_url(settings.database_url).database or "")
        ((version,),) = self._db.execute("PRAGMA data_version")  # another one after each commit of others
        if version != self._version:
            self._version, self._people = version, {}
        return self._people


_cache = _PeopleCache()


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


def media_cookie(token: str, secure: bool) -> str:
    """A Set-Cookie value that signs `token` in for /media, for as long as the token itself is good."""
    seconds = int(_content(token).get("exp", 0) - time.time())
    return _set_cookie(COOKIE, token, "/media", seconds, secure) if seconds > 0 else no_cookie(secure)


def no_cookie(secure: bool) -> str:
    """A Set-Cookie value that ends the sign-in for /media."""
    return _set_cookie(COOKIE, "", "/media", 0, secure)


def bearer(request: Request) -> str | None:
    """The token of an `Authorization: Bearer` header."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" and token else None


def _token(request: Request) -> str | None:
    return bearer(request) if "authorization" in request.headers else request.cookies.get(COOKIE)


def _content(token: str | None) -> dict[str, Any]:
    """What a token says that we signed; nothing if it is none, or expired."""
    try:
        return JWT.decode(token) if token else {}
    except UnauthorizedError:
        return {}


def _set_cookie(name: str, value: str, path: str, max_age_s: int, secure: bool) -> str:
    attributes = f"Path={path}; HttpOnly; SameSite=Strict; Max-Age={max_age_s}"
    return f"{name}={value}; {attributes}" + ("; Secure" if secure else "")


@dataclass
class Attempt:
    """A sign-in that is being answered: where it comes from, and who it signed in."""

    address: str
    browser: str = ""
    """Its cookie, if it sent one."""
    signed_in: str | None = None

    @classmethod
    def of(cls, request: Request) -> Attempt:
        """The attempt that a request would be."""
        host = request.client.host if request.client else ""
        return cls(network(host), request.cookies.get(BROWSER_COOKIE, ""))

    def source(self, username: str) -> str:
        """Whose wrong passwords it adds to.

        A browser that signed in to this account before has a count of its own. So nobody who shares its
        address, or guesses at its account, can keep it out.
        """
        known = _content(self.browser)
        return str(known["browser"]) if known.get("of") == username else self.address


attempt: ContextVar[Attempt] = ContextVar("attempt")
"""The one that the present request is."""


def network(host: str) -> str:
    """The address that one client has: without a port, and of IPv6 the /64 that a client may choose from."""
    with_port = re.fullmatch(r"\[(.+)\](?::\d+)?|([\d.]+):\d+", host)
    try:
        address = ipaddress.ip_address((with_port[1] or with_port[2]) if with_port else host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((address, 64), strict=False))
        address = address.ipv4_mapped
    return str(address)


def browser_cookie(username: str, secure: bool) -> str:
    """A Set-Cookie value by which a browser is known to have signed in to an account; it signs nobody in."""
    token = JWT.encode(
        {"of": username, "browser": secrets.token_hex(16), "exp": int(time.time()) + _BROWSER_KNOWN_S}
    )
    return _set_cookie(BROWSER_COOKIE, token, "/api/v1/token", _BROWSER_KNOWN_S, secure)


class Throttle:
    """Limits wrong passwords, around Argilla's own check; see `PER_ACCOUNT` and `PER_SOURCE`.

    They count for where they come from, an address or a browser that is known, never for an account as such:
    whoever guesses at an account keeps nobody out of it who is elsewhere.
    """

    def __init__(self, authenticate: Authenticate) -> None:
        """Guard `authenticate`, which returns None for a wrong password."""
        self._authenticate = authenticate
        self._one_at_a_time = asyncio.Lock()  # many at once are many; a check blocks the event loop anyway
        self._failures: dict[str, list[tuple[float, int]]] = {}
        """By source: when, and the hash of the account's name, whether or not there is such an account."""

    async def __call__(self, db: AsyncSession, username: str, password: str) -> User | None:
        """Check a password.

        Raises:
            HTTPException: 429, without a check: too many were wrong.
        """
        mine, account = attempt.get(), hash(username)
        source = mine.source(username)
        async with self._one_at_a_time:
            failures = self._failures.get(source, [])
            if (wait_s := math.ceil(_wait_s(failures, account))) > 0:
                detail = f"Too many wrong passwords. Try again in {wait_s} s."
                raise HTTPException(429, detail, {"retry-after": str(wait_s)})
            user = await self._authenticate(db, username, password)
            now = time.monotonic()
            failures = [item for item in failures if now - item[0] <= REMEMBERED_S]
            if user:
                mine.signed_in = username
                failures = [item for item in failures if item[1] != account]  # its owner had erred
            else:
                failures.append((now, account))
            self._failures.pop(source, None)
            if failures:
                self._failures[source] = failures  # behind those of all other sources
            if len(self._failures) > _MOST_SOURCES:  # made-up addresses must not fill the memory
                del self._failures[next(iter(self._failures))]
        return user


def _wait_s(failures: list[tuple[float, int]], account: int) -> float:
    now = time.monotonic()
    recent = [at for at, whose in failures if whose == account and now - at <= WINDOW_S]
    until = [recent[-PER_ACCOUNT] + WINDOW_S] if len(recent) >= PER_ACCOUNT else []
    remembered = [at for at, _ in failures if now - at <= REMEMBERED_S]
    if len(remembered) >= PER_SOURCE:
        until.append(remembered[-1] + min(2.0 ** (len(remembered) - PER_SOURCE), LONGEST_WAIT_S))
    return max(until, default=now) - now
