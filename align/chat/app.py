"""The page and its routes.

The page has no secrets: the key comes in its address, behind #, and stays in the browser. Every other route
needs the key. Names other than this machine's (DNS rebinding) and requests of other pages are refused. No
text is ever put into HTML: the page reads JSON and writes text nodes; its content policy forbids the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from importlib.resources import files
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from align.chat.judgements import KeptJudgements, Records
from align.chat.turns import Policy, TurnOfPolicies, Turns, Vote
from align.serving.errors import ApiError
from align.serving.guard import Guard
from align.serving.metrics import Metrics
from align.serving.requests import Limits
from align.serving.responses import event, event_stream, timed_words
from align.serving.service import ClientLeft, Piece
from preference_data.schema import Judgement, Prompt
from preference_data.store import BadRecord

HOST: Final = "127.0.0.1"
_NAMES: Final = (HOST, "localhost")
_PAGE: Final = {
    "/": ("index.html", "text/html"),
    "/chat.css": ("chat.css", "text/css"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript")
        for name in ("chat", "clips", "elements", "kept", "microphone", "server", "waveform")
    },
}
"""Files of the page by route: they need no key."""
_HEADERS: Final = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def make_app(
    policies: list[Policy], key: str, limits: Limits, judgements: KeptJudgements | None, annotator: str
) -> ASGIApp:
    """The application for one policy or two.

    Args:
        policies: what is talked to.
        key: what the page must send.
        limits: of requests.
        judgements: where those go that are kept; None: nowhere.
        annotator: who judges.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    _serve_page(app)
    _serve_chat(app, Turns(policies), limits, judgements, annotator)
    if judgements:
        _serve_kept(app, judgements, {policy.sha256: policy.name for policy in policies})
    _explain_errors(app)
    guarded = Guard(app, key, limits, Metrics(), open_routes=_PAGE.keys())
    return TrustedHostMiddleware(_OwnPageOnly(guarded), allowed_hosts=_NAMES)


def _serve_page(app: FastAPI) -> None:
    folder = files("align.chat") / "page"
    for route, (name, kind) in _PAGE.items():
        content = (folder / name).read_bytes()

        def page(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind)

        app.add_api_route(route, page, methods=["GET"])


def _serve_chat(
    app: FastAPI, turns: Turns, limits: Limits, judgements: KeptJudgements | None, annotator: str
) -> None:
    @app.get("/api/about")
    async def about() -> dict[str, Any]:
        healths = [await policy.service.backend.health() for policy in turns.policies]
        states = [health.state for health in healths]
        state = next((state for state in ("died", "loading") if state in states), "ready")
        return {
            "state": state,
            "reason": "; ".join(health.reason[-500:] for health in healths if health.reason),
            "policies": [policy.name for policy in turns.policies],
            "keeps_in": str(judgements.folder) if judgements else None,
            "annotator": annotator,
            "most_tokens": limits.max_tokens,
            "longest_s": min(policy.service.longest_clip_s for policy in turns.policies),
        }

    @app.post("/api/turns")
    async def begin(http: Request) -> dict[str, Any]:
        for policy in turns.policies:
            policy.service.check_loaded()
        turn = await asyncio.to_thread(turns.begin, await http.body())
        return {"id": turn.id}

    @app.post("/api/turns/{name}/answers/{place}")
    async def answer(name: str, place: int) -> Response:
        turn = turns.find(name)
        if not 0 <= place < len(turn.answers):
            raise ApiError(f"There is no answer {place}", 404)
        return await event_stream(turn.answers[place].pieces(), _events)

    @app.get("/api/turns/{name}/names")
    async def names(name: str) -> dict[str, Any]:
        turn = turns.find(name)
        return {"names": turn.names if turn.is_open else None, "same": turn.is_open and turn.is_same}

    @app.put("/api/turns/{name}/vote")
    async def vote(name: str, http: Request) -> dict[str, Any]:
        turn, given = turns.find(name), _vote(await http.body())
        turn.vote(given)
        id_kept = await asyncio.to_thread(_keep, judgements, turn, given, annotator) if given.keep else None
        return {"names": turn.names if turn.is_open else None, "kept": id_kept}

    @app.post("/api/words")
    async def words(http: Request) -> dict[str, Any]:
        body, kind = await http.body(), http.headers.get("content-type", "")
        for policy in turns.policies:
            policy.service.check_loaded()
            _, pending = await asyncio.to_thread(policy.service.read_transcription, body, kind)
            text, _ = await policy.service.whole(pending, http.is_disconnected)
            if (timed := timed_words(text)) is not None:
                return {"words": timed}
        return {"words": None}


def _serve_kept(app: FastAPI, judgements: KeptJudgements, names: dict[str, str]) -> None:
    @app.get("/api/kept")
    def all_kept() -> dict[str, Any]:
        records = judgements.read()
        newest = sorted(records.judgements.values(), key=lambda item: item.submitted_at or "", reverse=True)
        return {"kept": [_row(item, records, names) for item in newest]}

    @app.delete("/api/kept/{judgement}")
    def delete(judgement: str) -> dict[str, Any]:
        if not judgements.delete(judgement):
            raise ApiError(f"There is no judgement {judgement[:40]!r}", 404)
        return {"deleted": judgement}

    @app.get("/api/kept/clips/{name}")
    def clip(name: str) -> Response:
        content = judgements.clip(f"clips/{name}")
        if content is None:
            raise ApiError("There is no such clip", 404)
        return Response(content, media_type="audio/wav")


def _explain_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, error.status)

    @app.exception_handler(ClientLeft)
    async def left(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    @app.exception_handler(BadRecord)
    @app.exception_handler(OSError)
    async def damaged(_: Request, error: Exception) -> Response:
        message = f"A file cannot be read or written: {error}. Mend it, or keep in another folder (--keep)"
        return JSONResponse(ApiError(message, 500).body, 500)

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        return JSONResponse(ApiError("The server failed; its terminal says why", 500).body, 500)

    @app.exception_handler(HTTPException)
    async def no_route(http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {http.method} {http.url.path[:200]}"
        return JSONResponse(ApiError(message, error.status_code).body, error.status_code, error.headers)


async def _events(pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[str, None]:
    async for piece in pieces:
        if piece.text:
            yield event({"text": piece.text})
        if piece.finish:
            yield event({"finish": piece.finish, "tokens": piece.n_tokens})


def _vote(body: bytes) -> Vote:
    try:
        return Vote.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise ApiError(f"{where}: {first['msg']}", param=where) from None


def _keep(judgements: KeptJudgements | None, turn: TurnOfPolicies, vote: Vote, annotator: str) -> str:
    """Keep a vote; returns the judgement's id."""
    if judgements is None:
        raise ApiError("keep: there is no run folder to keep it in; start with --keep FOLDER", param="keep")
    judgement = turn.judgement(vote, annotator)
    judgements.add(judgement, turn.comparison(), turn.completions(), turn.prompt, turn.sounds)
    return judgement.id


def _row(judgement: Judgement, records: Records, names: dict[str, str]) -> dict[str, Any]:
    """What the page shows of a judgement that is kept."""
    prompt: Prompt = records.prompts[judgement.prompt_id]
    policies = [records.completions[name].policy for name in judgement.completions]
    return {
        "id": judgement.id,
        "at": judgement.submitted_at,
        "annotator": judgement.annotator,
        "question": prompt.question,
        "earlier_turns": len(prompt.history),
        "clips": prompt.audios,
        "texts": judgement.texts,
        "names": [names.get(sha, sha[:12]) for sha in policies],
        **{axis: _as_dict(judgement.ranking(axis)) for axis in ("factuality", "behaviour")},
        "thumbs": judgement.thumbs,
        "heard": judgement.heard,
    }


def _as_dict(ranking: Any) -> dict[str, Any] | None:
    return ranking.model_dump() if ranking else None


class _OwnPageOnly:
    """Refuses requests that another page makes, and puts our headers on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*_without(message["headers"], _HEADERS), *own]}
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif _is_of_another_page(dict(scope["headers"])):
            await JSONResponse(ApiError("Another page asks; open this one", 403).body, 403)(
                scope, receive, with_headers
            )
        else:
            await self._app(scope, receive, with_headers)


def _is_of_another_page(headers: dict[bytes, bytes]) -> bool:
    """Whether a browser says that a request comes from a page of another origin."""
    origin, host = headers.get(b"origin"), headers.get(b"host", b"")
    if origin is not None and origin != b"http://" + host:
        return True
    return headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin")


def _without(headers: list[tuple[bytes, bytes]], names: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.decode() not in names]
