"""The routes below /media: clips for those who may hear them, and who has listened.

They stand in front of Argilla's app, not in it: its static files at "/" answer every unknown path with a
page, and its Brotli middleware would compress audio and so break range requests.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from anyio.to_thread import run_sync
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from . import clips, home, sign_in, ui
from .listening import Listening
from .sign_in import Person

SCRIPTS = {f"/media/{name}": Path(__file__).with_name(name) for name in ui.SCRIPTS}
WORKSPACE = rf"(?P<workspace>{home.NAME})"
_CLIP = re.compile(rf"/media/{WORKSPACE}/(?P<sha256>[0-9a-f]{{64}})\.(?P<type>{'|'.join(clips.TYPES)})")
_CLIP_HEARD = re.compile(_CLIP.pattern + "/heard")
_ALL_HEARD = re.compile(rf"/media/{WORKSPACE}/heard")
_SIGN_OUT = "/media/sign-out"


class Clip(NamedTuple):
    """A clip's address and where its file is, or would be."""

    workspace: str
    sha256: str
    file: Path


class Media:
    """The ASGI app of everything below /media."""

    def __init__(self, root: Path, listening: Listening) -> None:
        """Serve `root`/<workspace>/<sha256>.<type>."""
        self.root = root
        self.listening = listening

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; every answer but the scripts' needs a sign-in."""
        request = Request(scope, receive)
        # Matched as it was sent: none of our paths needs an escape, so a path with an escape is not ours.
        path = scope["raw_path"].decode("latin-1")
        if script := SCRIPTS.get(path):
            response: Response = _script(script)
        elif (who := await sign_in.person(request)) is None:
            response = _say(401, "Sign in to Argilla first, then open this address again.")
        elif _writes(request) and sign_in.came_by_cookie(request) and not sign_in.is_from_our_pages(request):
            response = _say(403, "This came from another site's page.")
        elif (request.method, path) == ("POST", _SIGN_OUT):
            response = _sign_out(request)
        elif match := _CLIP.fullmatch(path):
            return await self._clip(request, who, self._address(match), send)
        elif (match := _CLIP_HEARD.fullmatch(path)) and request.method == "POST":
            response = await self._report(request, who, self._address(match))
        elif (match := _ALL_HEARD.fullmatch(path)) and not _writes(request):
            response = await self._reports(who, match["workspace"])
        else:
            response = _say(404, "No such clip.")
        await response(scope, receive, send)

    def _address(self, match: re.Match[str]) -> Clip:
        file = self.root / match["workspace"] / f"{match['sha256']}.{match['type']}"
        return Clip(match["workspace"], match["sha256"], file)

    async def _clip(self, request: Request, who: Person, clip: Clip, send: Send) -> None:
        if refusal := _refusal(who, clip.workspace):
            response = refusal
        elif request.method == "PUT":
            response = await _put(request, who, clip)
        elif request.method not in ("GET", "HEAD"):
            response = Response(status_code=405, headers={"allow": "GET, HEAD, PUT"})
        elif not clip.file.is_file():
            response = _say(404, "No such clip.")
        else:
            return await self._send(request, who, clip, send)
        await response(request.scope, request.receive, send)

    async def _send(self, request: Request, who: Person, clip: Clip, send: Send) -> None:
        size = clip.file.stat().st_size
        headers = _clip_headers(clip)
        # Only to whom it was sent: another annotator's copy may lie in this browser, or the claim be made up.
        is_known = request.headers.get("if-none-match") == headers["etag"]
        if is_known and await self.listening.has_all((clip.workspace, who.name, clip.sha256), size):
            return await Response(status_code=304, headers=headers)(request.scope, request.receive, send)
        try:
            part = clips.span(_range(request, headers["etag"]), size)
        except clips.Unsatisfiable as beyond:
            headers["content-range"] = str(beyond)
            return await Response(status_code=416, headers=headers)(request.scope, request.receive, send)
        if part:
            headers["content-range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
        whole = part or clips.Span(0, size, size)
        headers["content-length"] = str(whole.stop - whole.start)
        start = Response(status_code=206 if part else 200, headers=headers)
        await send({"type": "http.response.start", "status": start.status_code, "headers": start.raw_headers})
        if request.method == "GET":
            await self._send_body(request, who, clip, whole, send)
        await send({"type": "http.response.body", "body": b""})

    async def _send_body(
        self, request: Request, who: Person, clip: Clip, part: clips.Span, send: Send
    ) -> None:
        transfer = await self.listening.begin((clip.workspace, who.name, clip.sha256), part.start)
        try:
            async for chunk in clips.read(clip.file, part):
                if await request.is_disconnected():  # browsers often stop early; count what they really got
                    break
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                transfer.stop += len(chunk)
        finally:
            await self.listening.end(transfer)

    async def _report(self, request: Request, who: Person, clip: Clip) -> Response:
        if refusal := _refusal(who, clip.workspace):
            return refusal
        if not clip.file.is_file():
            return _say(404, "No such clip.")
        if (part := _part(request)) is None:
            return _say(
                400, "?share= and, if it is there, ?from= must be numbers from 0 to 1, and so their sum."
            )
        await self.listening.played(
            (clip.workspace, who.name, clip.sha256),
            *part,
            size=clip.file.stat().st_size,
            duration_s=await run_sync(clips.duration_s, clip.file),
        )
        return Response(status_code=204)

    async def _reports(self, who: Person, workspace: str) -> Response:
        if refusal := _refusal(who, workspace, manage=True):
            return refusal
        heard = await self.listening.heard(workspace)
        return JSONResponse({"heard": heard}, headers={"cache-control": "no-store"})


async def _put(request: Request, who: Person, clip: Clip) -> Response:
    if refusal := _refusal(who, clip.workspace, manage=True):
        return refusal
    try:
        if int(request.headers.get("content-length", 0)) > clips.MAX_BYTES:
            raise clips.TooLarge(clips.TOO_LARGE)
        is_new = await clips.store(clip.file, request.stream())
    except clips.TooLarge as error:
        return _say(413, str(error))
    except (clips.WrongDigest, ClientDisconnect) as error:
        return _say(400, str(error))
    return Response(status_code=201 if is_new else 200)


def _refusal(who: Person, workspace: str, *, manage: bool = False) -> Response | None:
    if workspace not in who.workspaces:
        # only the owner may learn which workspaces there are
        return _say(404, f"No workspace {workspace!r}.") if who.is_owner else _say(403, "Not your workspace.")
    if manage and not who.may_manage:
        return _say(403, "Only the owner or an admin may do this.")
    return None


def _clip_headers(clip: Clip) -> dict[str, str]:
    return {
        "content-type": clips.TYPES[clip.file.suffix[1:]],  # by name only: what is inside is never guessed at
        "accept-ranges": "bytes",
        "etag": f'"{clip.sha256}"',
        "cache-control": "private, no-cache",  # a copy may be kept, but each time the server is asked
        "vary": "Cookie, Authorization, X-Argilla-Api-Key",
    }


def _range(request: Request, etag: str) -> str | None:
    if request.method != "GET" or request.headers.get("if-range", etag) != etag:
        return None
    return request.headers.get("range")


def _part(request: Request) -> tuple[float, float] | None:
    """Where the part that was played begins and ends, as shares of the clip."""
    query = request.query_params
    try:
        start, share = float(query.get("from", "0")), float(query.get("share", ""))
    except ValueError:
        return None
    is_part = start >= 0 and share >= 0 and start + share <= 1 + 1e-6  # none of it holds for NaN
    return (start, min(1.0, start + share)) if is_part else None


def _writes(request: Request) -> bool:
    return request.method not in ("GET", "HEAD")


def _sign_out(request: Request) -> Response:
    gone = sign_in.no_cookie(request.url.scheme == "https")
    return Response(status_code=204, headers={"set-cookie": gone})


def _script(script: Path) -> Response:
    return Response(script.read_bytes(), media_type="text/javascript", headers={"cache-control": "no-cache"})


def _say(status: int, text: str) -> Response:
    return PlainTextResponse(text, status, headers={"cache-control": "no-store"})
