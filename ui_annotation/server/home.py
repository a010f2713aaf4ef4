"""The server's state folder: its lock, credentials, scratch space and the address it serves at."""

import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OWNER = "owner"
NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}"
"""Of an account or a workspace: it stands in URLs, in reports and in comma-separated settings."""
FIRST_ANNOTATORS = ("annotator-1", "annotator-2")
# A process that only checks whether the lock is held takes it for an instant.
LOCK_PATIENCE_S = 1.0


class StartRefused(Exception):
    """The server cannot start here or so; the message says why and what to do, without a password."""


@dataclass(frozen=True)
class Credentials:
    """Sign-ins of a home, as in its credentials.json.

    Attributes:
        auth_secret: signs the sign-in tokens; kept, so that they survive a restart.
        users: name -> {"role", "password", "api_key"}.
        added: the names that are new.
    """

    auth_secret: str
    users: dict[str, dict[str, str]]
    added: tuple[str, ...]


def check_name(kind: str, name: str) -> None:
    """Raises StartRefused, with the rule, for what is no `NAME`."""
    if not re.fullmatch(NAME, name):
        rule = "letters (a to z, A to Z), digits, '-' and '_', at most 100, the first a letter or a digit"
        raise StartRefused(f"{kind} {name[:200]!r}: a name has {rule}")


def prepare(home: Path) -> None:
    """Make the folder, or refuse it if others can look into it.

    Raises:
        StartRefused: when group or others have any right on it, or it is not ours.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = home.stat()
    if state.st_uid != os.getuid():
        raise StartRefused(
            f"{home}: belongs to user {state.st_uid}, not to us ({os.getuid()}). Name another --home"
        )
    if stat.S_IMODE(state.st_mode) & 0o077:
        mode = stat.S_IMODE(state.st_mode)
        raise StartRefused(f"{home}: has mode {mode:o}, others can read its passwords. Run: chmod 700 {home}")
    if "?" in str(home):
        raise StartRefused(f"{home}: a '?' cannot stand in the database's URL. Name another --home")


def lock(home: Path) -> int:
    """Hold the home until this process ends, however it ends.

    Returns:
        The descriptor that holds the lock.

    Raises:
        StartRefused: when another server holds it; names its pid.
    """
    held = os.open(home / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            pid = os.read(held, 32).decode().strip() or "unknown"
            os.close(held)
            raise StartRefused(
                f"{home}: a server (pid {pid}) runs on it already. "
                f"Use that server, or end it with: align annotate down --home {home}"
            ) from None
    os.truncate(held, 0)
    os.pwrite(held, f"{os.getpid()}\n".encode(), 0)
    return held


def empty_scratch(home: Path) -> None:
    """Point the temporary folder into the home, empty: Argilla leaves 14 MB there at each start."""
    scratch = home / "tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    os.environ["TMPDIR"] = str(scratch)
    tempfile.tempdir = None


def credentials(home: Path, annotators: Iterable[str] | None) -> Credentials:
    """Read the sign-ins; make what is missing, at random.

    Args:
        home: the state folder.
        annotators: who must have one. None: a new home gets two annotators, an existing home keeps its own.
    """
    path = home / "credentials.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    users: dict[str, dict[str, str]] = dict(kept.get("users", {}))
    wanted = annotators if annotators is not None else (() if kept else FIRST_ANNOTATORS)
    added = []
    for name in (OWNER, *wanted):
        if name not in users:
            check_name("user", name)
            users[name] = _sign_in("owner" if name == OWNER else "annotator")
            added.append(name)
    secret = kept.get("auth_secret") or secrets.token_hex(32)
    if added:
        write_json(path, {"auth_secret": secret, "users": users})
    return Credentials(secret, users, tuple(added))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write all of it or nothing, readable by us only."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as out:
        json.dump(content, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    scratch.replace(path)


def _sign_in(role: str) -> dict[str, str]:
    return {"role": role, "password": secrets.token_urlsafe(12), "api_key": secrets.token_urlsafe(32)}
