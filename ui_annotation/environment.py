"""The annotation server's own Python environment: argilla-server cannot live beside our pydantic."""

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ui_annotation import AnnotationError

LOCK_FILE = Path(__file__).parent / "server" / "requirements.lock"
PROGRESS_EVERY_S = 10.0
# argilla-server 2.8 pins libraries that have no builds for later ones.
NEWEST_PYTHON = (3, 13)
# Importing once what the server uses proves the environment and leaves the byte code that a start needs.
FIRST_IMPORT = "import argilla_server, fakeredis, rq, soundfile, uvicorn, aiosqlite, alembic.command"


class InstallFailed(AnnotationError):
    """The environment could not be made; the message holds the end of pip's output and the next step."""


def location() -> Path:
    """Where the environment is, or will be: beside ours, or where ALIGN_ARGILLA_ENV says."""
    named = os.environ.get("ALIGN_ARGILLA_ENV")
    return Path(named).absolute() if named else Path(sys.prefix) / f"argilla-{_digest()[:12]}"


def python() -> Path:
    """The server's Python; exists when `is_ready`."""
    return location() / "bin" / "python"


def is_ready() -> bool:
    """Whether the environment is complete and made from the present requirements.lock."""
    stamp = location() / ".ready"
    return stamp.is_file() and stamp.read_text() == _digest()


def install(say: Callable[[str], None]) -> Path:
    """Make the environment when it is not there; what is there and complete is left alone.

    An interrupted environment is not taken for complete: the next call makes it anew. Of two calls at once,
    the second waits.

    Args:
        say: called with a line about each thing that happens.

    Returns:
        The server's Python.

    Raises:
        InstallFailed: when it could not be made.
    """
    if is_ready():
        return python()
    if sys.version_info[:2] > NEWEST_PYTHON:
        raise InstallFailed(
            f"Argilla's environment needs Python 3.11 to {'.'.join(map(str, NEWEST_PYTHON))}, this is "
            f"{sys.version_info.major}.{sys.version_info.minor}. Make ours with an older one: make clean; "
            "make demo PYTHON=python3.13"
        )
    with _only_one(say) as lock:
        if not is_ready():
            _build(say, lock)
    return python()


def _digest() -> str:
    return hashlib.sha256(LOCK_FILE.read_bytes()).hexdigest()


@contextmanager
def _only_one(say: Callable[[str], None]) -> Iterator[int]:
    """Hold the lock beside the environment. pip inherits it, and so counts when its parent was killed."""
    path = location().with_name(location().name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise InstallFailed(
            f"{path}: {error.strerror}. Name a folder of yours in ALIGN_ARGILLA_ENV"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another install works on {location()}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def _build(say: Callable[[str], None], lock: int) -> None:
    folder = location()
    if folder.exists() and not (folder / "pyvenv.cfg").exists() and any(folder.iterdir()):
        raise InstallFailed(f"{folder}: is not a Python environment. Name another in ALIGN_ARGILLA_ENV")
    say(f"installing the annotation server (Argilla) into {folder}: about a minute, 600 MB")
    started = time.monotonic()
    venv.EnvBuilder(clear=True, symlinks=True, with_pip=True).create(folder)
    pip = [str(python()), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-compile"]
    # Wheels only: nothing is built or run from source while installing.
    locked = ["--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", str(LOCK_FILE)]
    _run([*pip, *locked], say, lock)
    with tempfile.TemporaryDirectory() as scratch:  # Argilla leaves files there when it is imported
        home = {"TMPDIR": scratch, "ARGILLA_HOME_PATH": scratch, "HF_HUB_OFFLINE": "1"}
        _run([str(python()), "-c", FIRST_IMPORT], say, lock, home)
    (folder / ".ready").write_text(_digest())
    say(f"the annotation server is installed ({time.monotonic() - started:.0f} s)")


def _run(
    command: list[str], say: Callable[[str], None], lock: int, variables: dict[str, str] | None = None
) -> None:
    """Run to the end, saying every now and then that it still does.

    Raises:
        InstallFailed: when it ends with an error.
    """
    environ = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            env=environ | (variables or {}),
        )
        started = time.monotonic()
        while True:
            try:
                code = process.wait(PROGRESS_EVERY_S)
                break
            except subprocess.TimeoutExpired:
                say(f"  still installing, {time.monotonic() - started:.0f} s")
        if code != 0:
            output.seek(0)
            tail = "".join(output.readlines()[-15:])
            raise InstallFailed(
                f"Argilla's environment could not be installed into {location()} (exit code {code}):\n{tail}"
                "Check the network or pip's configuration (pip config list), then run: align annotate install"
            )
