"""Requests in OpenAI's form -> a conversation, its clips and how to draw the answer, or why not.

Clients are strangers: nothing that they name is fetched or opened, and no text of theirs may hold a token
that steers the model. A parameter that would change the answer and that we do not have is refused; one that
would not (`user`, `metadata` ...) is taken and ignored.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from io import BytesIO
from types import MappingProxyType
from typing import IO, Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from werkzeug.exceptions import HTTPException
from werkzeug.formparser import FormDataParser
from werkzeug.http import parse_options_header

from align.models.chat import Message
from align.serving.errors import ApiError
from preference_data.audio.clip_files import ClipBytes
from preference_data.prompts.prompts import control_token

MODEL = "policy"
"""The name under which clients ask for the policy."""
_IGNORED = frozenset(
    "metadata parallel_tool_calls prompt_cache_key prompt_cache_retention safety_identifier service_tier "
    "store user".split()
)
"""Parameters that do not shape an answer here."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "audio": (),
        "frequency_penalty": (0,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "logit_bias": ({},),
        "logprobs": (False,),
        "modalities": (["text"],),
        "n": (1,),
        "prediction": (),
        "presence_penalty": (0,),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
)
"""Parameters that we do not have, and the values, beside null, that change nothing."""
_FORM_IGNORED = ("stream_options", "chunking_strategy", "include[]", "include")
_FORM_PARTS = 32

R = TypeVar("R", bound=BaseModel)


class Limits(NamedTuple):
    """What a request may hold. A clip may also not be longer than the model hears."""

    body_bytes: int = 64 << 20
    """Of a request: eight clips of 30 s at 48 kHz, stereo, in base64, are 61 MB."""
    clips: int = 8
    """Of a conversation, all its turns together."""
    clip_s: float = 30.0
    max_tokens: int = 2048
    """Of an answer; also where the client sets no limit."""
    text_chars: int = 1_000_000
    """Of a conversation, before it is tokenised."""
    in_flight: int = 64
    """Requests at a time; the next get 429."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class InputAudio(_Strict):
    """A clip in base64. What it is shows in its bytes; `format` is not believed."""

    data: str
    format: str | None = Field(default=None, max_length=40)


class Part(_Strict):
    """A piece of a message: a text or a clip."""

    type: Literal["text", "input_audio"]
    text: str | None = None
    input_audio: InputAudio | None = None


def _parts(content: Any) -> Any:
    """A bare text is a message of a single part."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [] if content is None else content


class ChatMessage(_Strict):
    """A turn. What OpenAI's client sends back of an answer (`refusal`, ...) is taken where it is empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_parts)] = []
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class StreamOptions(_Strict):
    """`include_usage`: the last event counts tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Strict):
    """The body of a chat completion, without what is neutral or ignored."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer before they are said."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(filter(None, stops))


class TranscriptionRequest(_Strict):
    """The fields of a transcription's form."""

    model: str
    language: str | None = None
    prompt: str | None = None
    response_format: Literal["json", "text", "verbose_json"] = "json"
    timestamp_granularities: Literal["word"] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    stream: bool = False

    @property
    def wants_words(self) -> bool:
        """Whether words are to have their times."""
        return self.response_format == "verbose_json" and self.timestamp_granularities == "word"


class Conversation(NamedTuple):
    """Messages as training has them, and their clips in the order of their places; `name` says where."""

    messages: list[Message]
    clips: list[ClipBytes]


def read_chat(body: bytes) -> ChatRequest:
    """The request of a chat.

    Raises:
        ApiError: it is not JSON, holds what we do not know or do not have, or asks for another model.
    """
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"The body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ApiError("The body must be a JSON object")
    for name, neutral in _NEUTRAL.items():
        value = data.get(name)
        if value is not None and value not in neutral:
            values = " or ".join(["null", *map(str, neutral)])
            raise ApiError(f"{name}: this server has {values} only; leave it out", param=name)
    known = {name: value for name, value in data.items() if name not in _NEUTRAL and name not in _IGNORED}
    return _checked(ChatRequest, known)


def read_conversation(request: ChatRequest, limits: Limits) -> Conversation:
    """The messages of a chat and its clips.

    Raises:
        ApiError: naming the message and the part.
    """
    messages: list[Message] = []
    clips: list[ClipBytes] = []
    n_chars = 0
    for i, message in enumerate(request.messages):
        content: list[Message] = []
        for j, part in enumerate(message.content):
            where = f"messages[{i}].content[{j}]"
            if part.type == "text":
                n_chars += len(part.text or "")
                content.append({"type": "text", "text": _text(part, where)})
            else:
                _check_place(message, len(clips), limits, where)
                clips.append(_clip(part, where))
                content.append({"type": "audio", "text": None})
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": content})
    if request.messages[-1].role != "user":
        where = f"messages[{len(messages) - 1}].role"
        raise ApiError(f"{where}: the last message must be the user's, for the model to answer", param=where)
    if n_chars > limits.text_chars:
        raise too_long(f"{n_chars:,} characters, the limit is {limits.text_chars:,}")
    return Conversation(messages, clips)


def read_form(body: bytes, content_type: str) -> tuple[TranscriptionRequest, ClipBytes]:
    """The request of a transcription and its clip, from a multipart form.

    Raises:
        ApiError: it is not such a form, or a field is missing, twice, unknown or wrong.
    """
    fields, file = _form(body, content_type)
    if file is None:
        raise ApiError("file: the form has no file; send the clip as the field file", param="file")
    data: dict[str, Any] = {
        name.removesuffix("[]"): text for name, text in fields.items() if name not in _FORM_IGNORED
    }
    for name in ("temperature", "seed"):
        if name in data:
            data[name] = _number(name, data[name])
    if "stream" in data:
        data["stream"] = data["stream"].lower() == "true"
    return _checked(TranscriptionRequest, data), ClipBytes("file", file)


def check_text(text: str, where: str) -> str:
    """The text, if it holds no token that would steer the model."""
    if token := control_token(text):
        raise ApiError(
            f"{where}: holds {token}, a token that would steer the model; leave it out or break it with a "
            "space",
            param=where,
        )
    return text


def too_long(numbers: str) -> ApiError:
    """The conversation does not fit; `numbers` say by how much."""
    return ApiError(
        f"The conversation is too long: {numbers}", param="messages", code="context_length_exceeded"
    )


def _checked(kind: type[R], data: Mapping[str, Any]) -> R:
    """`data` as `kind`, asking for the model that we serve."""
    try:
        request = kind.model_validate(data)
    except ValidationError as error:
        raise _refusal(error) from None
    if (name := getattr(request, "model", MODEL)) != MODEL:
        message = f"The model {name[:100]!r} does not exist; this server has {MODEL!r}"
        raise ApiError(message, 404, param="model", code="model_not_found")
    return request


def _refusal(error: ValidationError) -> ApiError:
    """The first mistake, at its place."""
    first = error.errors(include_url=False)[0]
    where = ""
    for step in first["loc"]:
        where += f"[{step}]" if isinstance(step, int) else f".{step}"
    where = where.lstrip(".")
    if first["type"] == "extra_forbidden":
        return ApiError(f"Unrecognized request argument supplied: {where[:200]}", param=where[:200])
    if where.endswith("].type"):
        kind = str(first["input"])[:40]
        message = f"{where}: {kind!r} is not taken: send text or input_audio; this server fetches nothing"
        return ApiError(message, param=where)
    return ApiError(f"{where}: {first['msg']}", param=where)


def _text(part: Part, where: str) -> str:
    if part.text is None or part.input_audio is not None:
        raise ApiError(f"{where}: a text part has a text and nothing else", param=where)
    return check_text(part.text, where)


def _check_place(message: ChatMessage, n_before: int, limits: Limits, where: str) -> None:
    if message.role != "user":
        raise ApiError(f"{where}: clips stand in the user's messages only", param=where)
    if n_before == limits.clips:
        raise ApiError(f"{where}: is clip {n_before + 1}, the limit is {limits.clips}", param=where)


def _clip(part: Part, where: str) -> ClipBytes:
    if part.input_audio is None or part.text is not None:
        raise ApiError(f"{where}: an input_audio part has input_audio and nothing else", param=where)
    try:
        content = base64.b64decode(part.input_audio.data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(f"{where}: input_audio.data is not base64: {error}", param=where) from None
    return ClipBytes(where, content)


def _number(name: str, text: str) -> int | float:
    try:
        return int(text) if name == "seed" else float(text)
    except ValueError:
        raise ApiError(f"{name}: {text[:40]!r} is not a number", param=name) from None


def _form(body: bytes, content_type: str) -> tuple[dict[str, str], bytes | None]:
    """The texts of a multipart form by name, and the content of the field `file`."""
    kind, options = parse_options_header(content_type)
    if kind != "multipart/form-data":
        raise ApiError("A transcription is a form: Content-Type multipart/form-data with its boundary")
    parser = FormDataParser(
        stream_factory=_in_memory,
        max_form_memory_size=None,
        max_form_parts=_FORM_PARTS,
        silent=False,
    )
    try:
        _, texts, files = parser.parse(BytesIO(body), kind, len(body), options)
    except (ValueError, HTTPException) as error:
        raise ApiError(f"The form cannot be read: {error}") from None
    names = [name for name, _ in [*texts.items(multi=True), *files.items(multi=True)]]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ApiError(f"{twice[:100]}: stands in the form more than once", param=twice[:100])
    if other := next((name for name in files if name != "file"), None):
        raise ApiError(f"Unrecognized file supplied: {other[:100]}", param=other[:100])
    return texts.to_dict(), files["file"].read() if files else None


def _in_memory(
    total_content_length: int | None,
    content_type: str | None,
    filename: str | None,
    content_length: int | None = None,
) -> IO[bytes]:
    """Where a file of a form is kept: not on disk."""
    return BytesIO()
