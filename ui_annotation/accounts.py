"""Who may sign in to an own annotation server: list them, add somebody."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from pathlib import Path
from typing import NamedTuple

import argilla as rg

from preference_data import store
from ui_annotation import client
from ui_annotation.launch import ServerFailed, credentials, running


class User(NamedTuple):
    """Someone who may sign in: name, role ("owner", "admin" or "annotator"), names of their workspaces."""

    name: str
    role: str
    workspaces: tuple[str, ...]


def list_users(home: Path) -> list[User]:
    """Everybody who may sign in to the server of this home.

    Raises:
        ServerFailed: when it does not run.
    """
    owner = _owner(home)
    users = []
    for user in client.call(owner, "GET", "/api/v1/users")["items"]:
        workspaces = client.call(owner, "GET", f"/api/v1/users/{user['id']}/workspaces")["items"]
        users.append(User(user["username"], user["role"], tuple(item["name"] for item in workspaces)))
    return users


def add_user(home: Path, name: str, *, workspace: str = "audio") -> dict[str, str]:
    """Make an annotator with a random password, kept in credentials.json.

    Args:
        home: of a server that runs.
        name: letters (a to z, A to Z), digits, '-' and '_', at most 100, the first a letter or a digit.
        workspace: created if missing, named likewise; the annotator sees no other.

    Returns:
        Their {"role", "password", "api_key"}.

    Raises:
        ServerFailed: when no server runs.
        client.Refused: when the name is taken or not allowed.
    """
    owner = _owner(home)
    workspace_id = _workspace(owner, workspace)
    password = secrets.token_urlsafe(12)
    account = {"username": name, "first_name": name, "role": "annotator", "password": password}
    user = client.call(owner, "POST", "/api/v1/users", json=account)
    sign_in = {"role": "annotator", "password": password, "api_key": user["api_key"]}
    _save_sign_in(home, name, sign_in)
    client.call(owner, "POST", f"/api/v1/workspaces/{workspace_id}/users", json={"user_id": user["id"]})
    return sign_in


def admit(home: Path, name: str, *, workspace: str) -> None:
    """Let somebody see a workspace; who has no account gets one, see `add_user`."""
    owner = _owner(home)
    known = {user["username"]: user["id"] for user in client.call(owner, "GET", "/api/v1/users")["items"]}
    if name not in known:
        add_user(home, name, workspace=workspace)
        return
    of_user = client.call(owner, "GET", f"/api/v1/users/{known[name]}/workspaces")["items"]
    if workspace not in {item["name"] for item in of_user}:
        path = f"/api/v1/workspaces/{_workspace(owner, workspace)}/users"
        client.call(owner, "POST", path, json={"user_id": known[name]})


def _workspace(owner: rg.Argilla, name: str) -> str:
    """The id of a workspace; made if it is not there."""
    ids = {item["name"]: item["id"] for item in client.call(owner, "GET", "/api/v1/me/workspaces")["items"]}
    if name not in ids:
        ids[name] = client.call(owner, "POST", "/api/v1/workspaces", json={"name": name})["id"]
    return str(ids[name])


def _owner(home: Path) -> rg.Argilla:
    server = running(home)
    if server is None:
        raise ServerFailed(f"no annotation server runs on {home}. Start it: align annotate up --home {home}")
    return client.connect(server.url, credentials(home)["users"]["owner"]["api_key"])


def _save_sign_in(home: Path, name: str, sign_in: dict[str, str]) -> None:
    """Add a sign-in to credentials.json; two processes that do so at once do not lose each other's."""
    folder = os.open(home, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        content = credentials(home)
        content["users"][name] = sign_in
        with store.replacing(home / "credentials.json") as file:
            os.fchmod(file.fileno(), 0o600)
            json.dump(content, file, indent=1)
    finally:
        os.close(folder)
