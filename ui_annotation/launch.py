"""The annotation server as a process: start it, find it, stop it."""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ui_annotation import AnnotationError
from ui_annotation.environment import ARGILLA

SERVES_WITHIN_S = 60.0
STOPS_WITHIN_S = 10.0
POLL_S = 0.05
LOG_TAIL_LINES = 20


class ServerFailed(AnnotationError):
    """The server did not start, or is not there; the message says why and the next command."""


class Running(NamedTuple):
    """A server that serves."""

    pid: int
    url: str
    """Without a slash at the end."""


def running(home: Path) -> Running | None:
    """The server of this home, when it serves. What a killed server left behind does not count."""
    try:
        address = Running(**json.loads((home / "server.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # the server writes it anew when it starts
        return None
    return address if _held_by(home) == address.pid else None


def start(
    home: Path,
    *,
    users: Sequence[str] | None = None,
    workspace: str = "audio",
    lifeline: int | None = None,
) -> Running:
    """Start a server in the background and wait until it serves. It outlives this process.

    Args:
        home: state folder, created if missing; nobody else may have rights on it.
        users: annotators who must be there. None: a new home gets annotator-1 and annotator-2, an
            existing home stays as it is.
        workspace: created if missing; the users become members.
        lifeline: a pipe's end to read from; the server ends when no process holds the other end any more.

    Raises:
        ServerFailed: with the end of its log.
    """
    command = _command(home, 0, users, workspace) + (["--while-stdin"] if lifeline is not None else [])
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    # An own server keeps everything in its home, whatever Argilla this shell is set up for.
    own = {name: value for name, value in os.environ.items() if not name.startswith("ARGILLA_")}
    log = os.open(home / "server.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    log_start = os.fstat(log).st_size
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if lifeline is None else lifeline,
            stdout=log,
            stderr=log,
            cwd=home,
            env=_environ(own),
            start_new_session=True,
        )
    finally:
        os.close(log)
    # Reaps it whenever it ends, so that no zombie is left of a server that we outlive.
    threading.Thread(target=process.wait, daemon=True).start()
    deadline = time.monotonic() + SERVES_WITHIN_S
    while process.poll() is None and time.monotonic() < deadline:
        if (server := running(home)) and server.pid == process.pid:
            return server
        time.sleep(POLL_S)
    took = ""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        took = f" within {SERVES_WITHIN_S:.0f} s"
    raise ServerFailed(f"the annotation server did not start on {home}{took}:\n{_tail(home, log_start)}")


@contextmanager
def serving(home: Path, *, users: Sequence[str] | None = None, workspace: str = "audio") -> Iterator[Running]:
    """A server on a free port for as long as the block runs; it ends even if this process is killed.

    Args and errors are those of `start`.
    """
    read, write = os.pipe()  # children do not inherit `write`
    try:
        yield start(home, users=users, workspace=workspace, lifeline=read)
    finally:
        os.close(read)
        os.close(write)
        stop(home)


def serve(home: Path, *, port: int = 0) -> NoReturn:
    """Become the server, in the foreground: Ctrl-C ends it. It prints its address itself.

    ARGILLA_REDIS_URL and the like are respected here; port 0 is any free one.
    """
    command = _command(home, port, None, "audio")
    os.execve(command[0], command, _environ(os.environ))


def stop(home: Path) -> bool:
    """End the server of this home, in order if it can, else by force.

    Returns:
        Whether a server ran.
    """
    pid = _held_by(home)
    if pid is None:
        return False
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            return True
        deadline = time.monotonic() + STOPS_WITHIN_S
        while time.monotonic() < deadline:
            if _held_by(home) != pid:
                return True
            time.sleep(POLL_S)
    raise ServerFailed(f"process {pid} on {home} survived SIGKILL; look at it with: ps -p {pid}")


def credentials(home: Path) -> dict[str, Any]:
    """What credentials.json holds: {"auth_secret", "users": {name: {"role", "password", "api_key"}}}.

    Raises:
        ServerFailed: when the home has none yet.
    """
    try:
        content: dict[str, Any] = json.loads((home / "credentials.json").read_text())
    except FileNotFoundError:
        raise ServerFailed(
            f"{home}: no credentials there. Start the server: "
            f"align annotate up --home {shlex.quote(str(home))}"
        ) from None
    except ValueError as error:
        raise ServerFailed(
            f"{home / 'credentials.json'} is not whole JSON ({error}); restore it from a copy"
        ) from None
    return content


def _command(home: Path, port: int, users: Sequence[str] | None, workspace: str) -> list[str]:
    if not ARGILLA.is_ready:
        raise ServerFailed(f"Argilla's environment is not in {ARGILLA.location}. Run: align annotate install")
    # -P: the current folder is no place to import from
    command = [str(ARGILLA.python), "-P", "-m", "server", "--home", str(home.absolute())]
    command += ["--port", str(port), "--workspace", workspace]
    return command + (["--annotators", ",".join(users)] if users else [])


def _environ(variables: Mapping[str, str]) -> dict[str, str]:
    return {**variables, "PYTHONPATH": str(Path(__file__).parent)}


def _held_by(home: Path) -> int | None:
    """The process that holds the home's lock; None when nobody does."""
    try:
        lock = os.open(home / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        written = os.read(lock, 32).strip()
        return int(written) if written else None
    finally:
        os.close(lock)
    return None


def _tail(home: Path, start_at: int) -> str:
    with (home / "server.log").open("rb") as log:
        log.seek(start_at)
        lines = log.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:])
