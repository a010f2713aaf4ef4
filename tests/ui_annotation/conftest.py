"""A real Argilla for all tests of a run, in the environment that users get."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from ui_annotation import accounts, launch
from ui_annotation.environment import ARGILLA


@dataclass(frozen=True)
class Server:
    """A server that serves, with its workspace "audio", annotator-1 and annotator-2."""

    home: Path
    url: str

    @property
    def credentials(self) -> dict[str, Any]:
        return launch.credentials(self.home)

    def api_key(self, name: str) -> str:
        return self.credentials["users"][name]["api_key"]

    def password(self, name: str) -> str:
        return self.credentials["users"][name]["password"]

    def client(self, name: str) -> httpx.Client:
        """Speaks as this user, by API key."""
        headers = {"X-Argilla-Api-Key": self.api_key(name)}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    @property
    def owner(self) -> httpx.Client:
        return self.client("owner")

    @property
    def annotator(self) -> httpx.Client:
        return self.client("annotator-1")

    def add_user(self, name: str | None = None, *, workspace: str = "audio") -> str:
        """One more annotator; the workspace is made when missing. Gives the name."""
        name = name or f"annotator-{secrets.token_hex(4)}"
        accounts.add_user(self.home, name, workspace=workspace)
        return name

    def add_workspace(self, *members: str) -> str:
        """A workspace of its own for a test that must not see the others' datasets. Gives the name."""
        name, owner = f"space-{secrets.token_hex(4)}", self.owner
        made = owner.post("/api/v1/workspaces", json={"name": name}).raise_for_status().json()
        ids = {user["username"]: user["id"] for user in owner.get("/api/v1/users").json()["items"]}
        for member in members:  # a new account would cost a second: its password is hashed
            path = f"/api/v1/workspaces/{made['id']}/users"
            owner.post(path, json={"user_id": ids[member]}).raise_for_status()
        return name


ANNOTATORS = ("annotator-1", "annotator-2")


@pytest.fixture(scope="session")
def argilla_environment(pytestconfig: pytest.Config) -> Path:
    """The server's Python; made when missing, which takes a minute and is therefore told."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    if ARGILLA.is_ready:
        return ARGILLA.python
    with capture.global_and_fixture_disabled():
        return ARGILLA.install(print)


@pytest.fixture(scope="session")
def argilla_server(argilla_environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests, in whatever worker they run: use a workspace or a dataset name of your own.

    Each worker holds a pipe open that the server reads, so the server ends when the last of them does, even
    by a kill. In an orderly end the last worker stops it and waits.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # that of the whole run
    home, pipe = root / "argilla-server", root / "argilla-server.pipe"
    users = os.open(root / "argilla-server.users", os.O_RDWR | os.O_CREAT)
    with _locked(root / "argilla-server.lock"):
        if not pipe.exists():
            os.mkfifo(pipe)
        lifeline = os.open(pipe, os.O_RDWR)
        fcntl.flock(users, fcntl.LOCK_SH)
        server = launch.running(home)
        if server is None:
            reader = os.open(pipe, os.O_RDONLY)
            server = launch.start(home, users=ANNOTATORS, lifeline=reader)
            os.close(reader)
    yield Server(home, server.url)
    with _locked(root / "argilla-server.lock"):
        os.close(lifeline)
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # another worker still uses it
        else:
            launch.stop(home)
        os.close(users)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
