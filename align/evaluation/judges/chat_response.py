"""A chat server's response: a reply, or an error and what it means, in whatever provider's words."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from align.evaluation.judges.chat_model import Reply
from align.evaluation.judges.prompt import encodable

Meaning = Literal["too_long", "filtered", "no_credit", "no_access", "busy", "rejected", "unreadable"]
"""`too_long`, `filtered`: this prompt alone is turned away. `no_credit`, `no_access`: nothing will be served.
`busy`: another attempt may do. `rejected`: this prompt, or every one like it. `unreadable`: says nothing."""

MEANINGS: tuple[tuple[Meaning, str], ...] = (
    # First what concerns the account, since a locked one, too, "violates a policy".
    ("no_credit", r"insufficient[ _]?(quota|balance|credit|fund)|exceeded_current_quota|spending limit"),
    ("no_credit", r"credit (balance|limit)|(more|enough|out of) credits?\b|billing_(hard|not_active)"),
    ("no_credit", r"exceeded your current quota(?!.*(resource_exhausted|retry in))"),  # Gemini's is a rate
    ("no_credit", r"arrearage|余额不足|欠费"),
    ("no_access", r"account.{0,40}(deactivated|suspended|disabled|terminated|locked)|账[户号].{0,20}锁定"),
    ("no_access", r"(invalid|incorrect)[ _]?api[ _-]?key|api[ _]key not valid|unauthori[sz]ed|login fail"),
    # Groq and OpenAI call a prompt that no minute has room for a rate limit; Azure's requests exceed one.
    ("too_long", r"request (body |is )?too large|request_too_large|tokens_limit_reached"),
    ("busy", r"rate.?limit|too many requests|throttl|overloaded|over capacity|resource.{0,12}exhausted"),
    # OpenAI, DeepSeek, Mistral, SGLang, llama.cpp, LM Studio, Cerebras; vLLM, xAI, Baidu
    ("too_long", r"context[ _-]?(length|window|size|limit)|context_exceeded|max_model_len|max_seq_len"),
    ("too_long", r"max(imum)? (model|prompt|input|message|sequence)[ _](length|size|len|tokens|char)"),
    # Anthropic, Bedrock, Fireworks; Cohere, Groq
    ("too_long", r"(prompt|input|message|string|text|content)s?\b(?:(?!max_).){0,40}\btoo (long|large)"),
    ("too_long", r"above_max_length|too many tokens: |reduce (the|your) (length|size|message|prompt|input)"),
    # Gemini, Volcengine, watsonx, LMDeploy; Moonshot, MiniMax; DashScope
    ("too_long", r"(prompt|inputs?|input_ids'?|messages?|text)\b(?:(?!max_).){0,60}\b(exceed|longer than)"),
    ("too_long", r"exceeded model token limit|max length exceeded|^token limit\b"),
    ("too_long", r"input (length|tokens?).{0,30}(should|must) be"),
    # text-generation-inference, Together; Zhipu and other Chinese services
    ("too_long", r"`?inputs`? (tokens \+|must have less than)|超长|过长|长度超|超过.{0,12}(长度|token)"),
    # OpenAI, Azure, Mistral, Anthropic; xAI, OpenRouter
    ("filtered", r"content[ _-]?filter|content[ _](management )?polic|responsible ?ai|invalid_prompt"),
    ("filtered", r"usage (polic|guideline)|moderation|\bflagged\b|safety[ _](check|system|filter|setting)"),
    # Gemini and Vertex, Bedrock; DashScope, DeepSeek, Moonshot
    ("filtered", r"prohibited[_ ]content|\brecitation\b|: safety\b|due to safety|block_?reason|guardrail"),
    ("filtered", r"(prompt|content|input|output|response|candidate)\b.{0,60}\bblocked|safety polic"),
    ("filtered", r"data_?inspection_?failed|inappropriate content|exists risk|high risk"),
    # Volcengine, MiniMax, gateways; Zhipu, Tencent
    ("filtered", r"_sensitive\b|is sensitive|sensitive[ _]?(content|information|word|text)"),
    ("filtered", r"敏感|不安全|违规|内容安全|审核"),
    ("busy", r"temporar|unavailable|timed? ?out|(retry|try again) (later|in|after)|too many tokens"),
    ("busy", r"network_error|system_resource|upstream|并发|频率|稍后"),
)
"""Which words mean what, without regard to case, the first that is found. To teach it another provider's, add
them here and the body to `tests/align/evaluation/provider_errors.yaml`."""

_PATTERNS = tuple((meaning, re.compile(words, re.IGNORECASE | re.DOTALL)) for meaning, words in MEANINGS)
_SURE: tuple[Meaning, ...] = ("too_long", "filtered", "no_credit", "no_access")
"""What words decide whatever the status: there are 500s, 403s and 429s that mean these."""
_BUSY = {408, 409, 425, 429}
"""Client errors that another attempt may cure; so may every server error."""
_NOISE = {"id", "request_id", "requestid", "trace_id", "created", "object", "model", "usage", "choices"} | {
    # What some servers send back of the request: no words of theirs.
    *("input", "inputs", "messages", "prompt", "body", "url", "ctx", "headers")
}
_WORDS_KEPT = 4000


class ServerError(Exception):
    """A response that is not a reply.

    Args:
        status: of HTTP.
        headers: with names in lower case.
        body: of any kind: JSON of some provider's form, a web page, nothing.
    """

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        try:
            data = _json(body)
            words = ", ".join(dict.fromkeys(_words(data)))[:_WORDS_KEPT]
            self.status = status if status >= 300 else _status_of(data)
            if 300 <= status < 400:
                words = f"it redirects to {headers.get('location', 'nowhere')}"
        except RecursionError:
            words, self.status = "JSON nested too deeply", status if status >= 300 else 0
        self.words = f"HTTP {status}{', ' if words else ' without a word'}{words}"
        self.meaning = _meaning(self.status, words)
        self.retry_after_s = _retry_after_s(headers.get("retry-after", ""), words)
        super().__init__(self.words)


def read_response(status: int, headers: Mapping[str, str], body: bytes) -> Reply:
    """The reply in a response.

    Raises:
        ServerError: there is none; also where the status is 200.
    """
    data = _json(body)
    choices = data.get("choices") if isinstance(data, dict) else None
    choice: Any = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if status >= 300 or not isinstance(message, dict):
        raise ServerError(status, headers, body)
    tokens = [_count(data.get("usage"), name) for name in ("prompt_tokens", "completion_tokens")]
    finish = _finish_reason(choice)
    if refusal := _text(message.get("refusal")):
        return Reply(encodable(refusal), "refusal", *tokens)
    text = _text(message.get("content"))
    thought = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
    failed = finish == "error" or (not text and (data.get("error") or choice.get("error")))
    if failed or not (text or thought or tokens[1] or finish in ("length", "content_filter")):
        raise ServerError(status, headers, _without_message(data))
    if not text and thought:
        text = f"<think>{thought}"  # as a reply that never came to its answer
    return Reply(encodable(text), finish, *tokens)


def _finish_reason(choice: Mapping[str, Any]) -> str | None:
    """The server's word; those of other providers for a limit, a filter or a fault as the usual one."""
    word = choice.get("finish_reason")
    if word is None:
        return None
    known = {
        "length": r"length|max_?(output_)?tokens|context_window|token_limit",
        "content_filter": r"filter|safety|recitation|prohibited|blocklist|spii|sensitive|guardrail",
        "error": r"error|insufficient_system_resource",
    }
    lower = str(word).lower()
    return next((usual for usual, words in known.items() if re.search(words, lower)), lower)


def _text(content: Any) -> str:
    """A message's text, which some servers send in chunks; those of thought and of other media left out."""
    chunks = content if isinstance(content, list) else [content]
    texts = [chunk.get("text") if _is_text(chunk) else chunk for chunk in chunks]
    return "".join(text for text in texts if isinstance(text, str))


def _is_text(chunk: Any) -> bool:
    return isinstance(chunk, dict) and "text" in str(chunk.get("type", "text"))


def _count(usage: Any, name: str) -> int:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count > 0 else 0


def _meaning(status: int, words: str) -> Meaning:
    spoken = next((meaning for meaning, pattern in _PATTERNS if pattern.search(words)), None)
    if spoken in _SURE:
        return spoken
    if status == 413:
        return "too_long"
    if status == 451:
        return "filtered"
    if status == 402:
        return "no_credit"
    if status in (401, 403, 404, 405) or 300 <= status < 400:
        return "no_access"
    if spoken == "busy" or status in _BUSY or status >= 500:
        return "busy"
    return "rejected" if status >= 400 else "unreadable"


def _json(body: bytes) -> Any:
    """The body's JSON, else its text: of a web page, what a reader sees of it."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        text = body[:100_000].decode("utf-8", "replace")
    if "<html" in text.lower() or "<!doctype" in text.lower():
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        text = f"a web page: {title[1] if title else re.sub('<[^>]*>', ' ', text)}"
    return " ".join(text.split())


def _words(data: Any, name: str = "message") -> Iterator[str]:
    """What a body says, its messages first, its codes with their names: providers have many forms."""
    if isinstance(data, dict):
        keys = [key for key in data if key.lower() not in _NOISE]
        for key in sorted(keys, key=lambda key: not _is_message(key)):
            yield from _words(data[key], key)
    elif isinstance(data, list):
        for part in data:
            yield from _words(part, name)
    elif data:
        yield str(data) if _is_message(name) else f"{name}: {data}"


def _is_message(name: str) -> bool:
    return bool(re.search("message|msg|detail|error$|raw$|description", name, re.IGNORECASE))


def _status_of(data: Any) -> int:
    """A status of HTTP in a body that came with 200; 0 where there is none."""
    parts = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for name, value in parts:
        if re.search("code|status", str(name).lower()) and re.fullmatch("[45][0-9][0-9]", str(value)):
            return int(value)
        if isinstance(value, dict | list) and (status := _status_of(value)):
            return status
    return 0


def _without_message(data: Mapping[str, Any]) -> bytes:
    """A completion's errors alone: what its model wrote is not the server's words."""
    choice = data["choices"][0]
    reason = choice.get("finish_reason")
    errors = {"error": data.get("error"), "choice": choice.get("error"), "base_resp": data.get("base_resp")}
    return json.dumps(errors if any(errors.values()) else f"an empty reply, finish_reason {reason}").encode()


def _retry_after_s(header: str, words: str) -> float | None:
    """Seconds the server asks us to wait, if it says so in a way we can read."""
    spoken = re.search(r"(?:retry|try again) (?:in|after) ([0-9]+(?:\.[0-9]+)?) ?s", words, re.IGNORECASE)
    try:
        seconds = float(header or (spoken[1] if spoken else ""))
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
