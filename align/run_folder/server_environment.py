"""Python environments of servers that cannot share ours: their libraries contradict our own's versions."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PROGRESS_EVERY_S = 10.0


class InstallFailed(RuntimeError):
    """An environment could not be made; the message holds the end of pip's output and the next step."""


LOCKED = ("--require-hashes", "--no-deps", "--only-binary", ":all:")
"""Options for a lock file with the hash of every wheel: nothing is built or run from source."""
_OURS = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")


def own_variables() -> dict[str, str]:
    """This process' variables but for those that change what another Python imports, or how fast."""
    return {name: value for name, value in os.environ.items() if name not in _OURS}


@dataclass(frozen=True)
class ServerEnvironment:
    """An environment beside ours, made once from what its lock file says.

    An interrupted one is not taken for complete: the next `install` makes it anew.
    """

    name: str
    """Begins the name of its folder."""
    server: str
    """What runs in it, in words."""
    install_command: str
    """The command that makes it."""
    costs: str
    """Time and disk that making it takes, in words."""
    variable: str
    """Of the process' environment: names another folder for it."""
    lock_file: Path
    pip_options: tuple[str, ...]
    """Of `pip install -r lock_file`."""
    proof: str
    """Python code that imports what the server uses: proves the environment, and leaves byte code."""
    pythons: tuple[tuple[int, int], tuple[int, int]]
    """First and last version of Python for which every package has a build."""
    borrows: tuple[Path, ...] = ()
    """Folders of packages that it takes from elsewhere where it has none of its own."""
    proof_variables: Mapping[str, str] = field(default_factory=dict)
    """Variables for `proof`; `{scratch}` in a value stands for a folder that is removed afterwards."""

    @property
    def location(self) -> Path:
        """Where it is, or will be: beside ours, or where `variable` says."""
        named = os.environ.get(self.variable)
        return Path(named).absolute() if named else Path(sys.prefix) / f"{self.name}-{self._digest[:12]}"

    @property
    def python(self) -> Path:
        """Its Python; exists when `is_ready`."""
        return self.location / "bin" / "python"

    @property
    def is_ready(self) -> bool:
        """Whether it is complete and made from the present lock file."""
        stamp = self.location / ".ready"
        return stamp.is_file() and stamp.read_text() == self._digest

    def install(self, say: Callable[[str], None]) -> Path:
        """Make it when it is not there; what is there and complete is left alone.

        Of two calls at once, the second waits.

        Args:
            say: called with a line about each thing that happens.

        Returns:
            Its Python.

        Raises:
            InstallFailed: when it could not be made.
        """
        if self.is_ready:
            return self.python
        first, last = (".".join(map(str, version)) for version in self.pythons)
        if not self.pythons[0] <= sys.version_info[:2] <= self.pythons[1]:
            versions = first if first == last else f"{first} to {last}"
            raise InstallFailed(
                f"{self.server} needs Python {versions}, this is {sys.version_info.major}."
                f"{sys.version_info.minor}. Make our environment anew with it: make clean; "
                f"make demo PYTHON=python{last}"
            )
        with self._lock(say) as lock:
            if not self.is_ready:
                self._build(say, lock)
        return self.python

    @property
    def _digest(self) -> str:
        return hashlib.sha256(self.lock_file.read_bytes()).hexdigest()

    @contextmanager
    def _lock(self, say: Callable[[str], None]) -> Iterator[int]:
        """Hold the lock beside it. pip inherits it, and so counts when its parent was killed."""
        path = self.location.with_name(self.location.name + ".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise InstallFailed(
                f"{path}: {error.strerror}. Name a folder of yours in {self.variable}"
            ) from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another install works on {self.location}: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            os.close(lock)

    def _build(self, say: Callable[[str], None], lock: int) -> None:
        folder = self.location
        if folder.exists() and not (folder / "pyvenv.cfg").exists() and any(folder.iterdir()):
            raise InstallFailed(f"{folder}: is not a Python environment. Name another in {self.variable}")
        say(f"installing {self.server} into {folder}: {self.costs}")
        started = time.monotonic()
        venv.EnvBuilder(clear=True, symlinks=True, with_pip=True).create(folder)
        if self.borrows:  # read last, so that its own packages win
            own = (
                folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
            )
            (own / "zz_borrowed.pth").write_text("".join(f"{path}\n" for path in self.borrows))
        pip = ["-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-compile"]
        self._run([*pip, *self.pip_options, "-r", str(self.lock_file)], say, lock)
        with tempfile.TemporaryDirectory() as scratch:
            variables = {name: value.format(scratch=scratch) for name, value in self.proof_variables.items()}
            self._run(["-c", self.proof], say, lock, variables)
        (folder / ".ready").write_text(self._digest)
        say(f"{self.server} is installed ({time.monotonic() - started:.0f} s)")

    def _run(
        self,
        arguments: list[str],
        say: Callable[[str], None],
        lock: int,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Run its Python to the end, saying every now and then that it still does.

        Raises:
            InstallFailed: when it ends with an error.
        """
        environ = own_variables()
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                [str(self.python), *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),
                env=environ | dict(variables or {}),
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
                    f"{self.server} could not be installed into {self.location} (exit code {code}):\n{tail}"
                    "Check the network or pip's configuration (pip config list), then run: "
                    f"{self.install_command}"
                )
