"""The connection to an Argilla server. What goes wrong on the way names the address and the next command."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import argilla as rg
import httpx
from argilla._exceptions import ArgillaError

from ui_annotation import AnnotationError

_TIMEOUT_S = 120  # a batch of records while others write may wait for SQLite for a while

_PAGE = 1000  # records; the most that Argilla gives at once


class Unreachable(AnnotationError):
    """The server does not answer, or not to us."""


class Refused(AnnotationError):
    """The server answered with an error."""


def connect(url: str, api_key: str) -> rg.Argilla:
    """A client that is signed in.

    Raises:
        Unreachable: nothing answers at `url`, it is not Argilla, or Argilla does not know the key.
    """
    try:
        # a transport of its own, like the SDK's: it ignores proxies that the environment names
        with httpx.Client(transport=httpx.HTTPTransport(), timeout=30) as probe:
            me = probe.get(f"{url.rstrip('/')}/api/v1/me", headers={"X-Argilla-Api-Key": api_key})
        if me.status_code in (401, 403):
            raise Unreachable(
                f"{url}: wrong key: the server does not know it; keys of an own server are in its "
                "credentials.json, `align annotate users list` names its users"
            )
        if me.status_code != 200 or "username" not in _object(me):
            raise Unreachable(
                f"{url}: is not Argilla: /api/v1/me answered {me.status_code}; check the address, or start "
                "an own server: `align annotate up`"
            )
        return rg.Argilla(api_url=url, api_key=api_key, timeout=_TIMEOUT_S, retries=1)
    except (httpx.HTTPError, httpx.InvalidURL, ArgillaError) as error:
        raise unreachable(url, error) from None


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        content = response.json()
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def unreachable(url: str, error: Exception) -> Unreachable:
    """The error for a request that failed on its way, without the request, whose headers hold a key."""
    why = "timed out" if isinstance(error, httpx.TimeoutException) else str(error) or type(error).__name__
    return Unreachable(f"{url}: no answer from Argilla ({why}); start it: `align annotate up`, then go on")


def request(
    client: rg.Argilla, method: str, path: str, *, or_status: int = 200, **more: Any
) -> httpx.Response:
    """Send a request that may be repeated; for what the SDK cannot do.

    Args:
        client: Signed in.
        method: E.g. "GET".
        path: From the root of the server.
        or_status: A status that is no error either.
        **more: As for `httpx.Client.request`.

    Raises:
        Unreachable: no answer came.
        Refused: the answer was an error.
    """
    try:
        try:
            answer = client.http_client.request(method, path, **more)
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            # mostly an idle connection that the server closed just then; nothing of ours does harm twice
            answer = client.http_client.request(method, path, **more)
    except httpx.HTTPError as error:
        raise unreachable(client.api_url, error) from None
    if answer.is_success or answer.status_code == or_status:
        return answer
    detail = " ".join(str(_object(answer).get("detail", answer.text))[:600].split())
    raise Refused(f"{client.api_url}: {method} {path}: {answer.status_code}: {detail}")


def call(client: rg.Argilla, method: str, path: str, **more: Any) -> dict[str, Any]:
    """The JSON object that answers a request; arguments and errors as of `request`."""
    answer: dict[str, Any] = request(client, method, path, **more).json()
    return answer


def datasets(client: rg.Argilla, workspace: str) -> dict[str, dict[str, Any]]:
    """The datasets of a workspace as Argilla describes them (id, status, distribution ...), by name.

    Raises:
        Refused: there is no such workspace for this user.
    """
    items = call(client, "GET", "/api/v1/me/workspaces")["items"]
    ids = {item["name"]: item["id"] for item in items}
    if workspace not in ids:
        raise Refused(
            f"{client.api_url}: no workspace {workspace!r} here; there are: {', '.join(ids)}. Next: its "
            "owner makes it there and lets in who is to judge, or the recipe's `workspace` names another"
        )
    datasets = call(client, "GET", "/api/v1/me/datasets")["items"]
    return {item["name"]: item for item in datasets if item["workspace_id"] == ids[workspace]}


def items(client: rg.Argilla, method: str, path: str, **more: Any) -> Iterator[dict[str, Any]]:
    """All of what Argilla lists a page at a time; `more` as for `request`."""
    params = {"limit": _PAGE, "offset": 0, **more.pop("params", {})}
    while True:
        page = call(client, method, path, params=params, **more)
        yield from page["items"]
        params["offset"] += _PAGE
        if params["offset"] >= page["total"]:
            return


def records(client: rg.Argilla, dataset_id: str, *, include: str = "") -> Iterator[dict[str, Any]]:
    """Every record of a dataset, oldest first, as Argilla describes them; signed in as owner."""
    params = {"include": include} if include else {}
    return items(client, "GET", f"/api/v1/datasets/{dataset_id}/records", params=params)
