"""A judge model behind an OpenAI-compatible chat endpoint: a paid service, or an open model under vLLM.

The key comes from ALIGN_JUDGE_API_KEY, or OPENAI_API_KEY for openai.com alone: that key is not sent to
other hosts. A server that wants none gets none.

Attempts are repeated here and not by the client's own retries: those know a response's status alone, so
that they repeat an account without credit, take an error that comes with 200 or a reply that was cut off for
an answer, and go on for every prompt of a server that is down.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, DefaultAsyncHttpxClient

from align.evaluation.judges.chat_model import (
    FILTERED,
    NO_REPLY,
    PARAMETERS,
    TOO_LONG,
    JudgeFailed,
    JudgeMisconfigured,
    JudgeUnavailable,
    Message,
    Reply,
    parameter_advice,
    request_parameters,
)
from align.evaluation.judges.chat_response import ServerError, read_response
from align.evaluation.judges.prompt import encodable, visible

_PROBE: Message = {"role": "user", "content": "Reply with the word yes."}
_PROBES = 3
_LONGEST_BACKOFF_S = 60.0
_FIRST_ATTEMPTS = 3
"""To connect where nothing has ever answered: the URL is wrong, or the server has not started."""
_UNREADABLE_ATTEMPTS = 3
"""Unreadable responses to a prompt until it is given up, if others are answered meanwhile."""
_NEXT_STEPS = {
    300: "give the URL that serves the API itself: redirects are not followed",
    401: "set ALIGN_JUDGE_API_KEY (OPENAI_API_KEY counts for openai.com alone)",
    403: "ask for access to this model, or set another ALIGN_JUDGE_API_KEY",
    404: "check that the URL ends as the API's does, mostly in /v1, and that it serves this model (GET "
    "{url}/models lists what it does)",
}


class Endpoint:
    """Sends many prompts at once, repeats transient failures, and stops at those that will not heal.

    Args:
        url: of the API, up to and with "/v1".
        model: as the server names it.
        parameters: changes to `chat_model.PARAMETERS`, None leaves one out; sent with every request as they
            are, so also those that only your server knows.
        concurrency: requests in flight at most; one that waits for its next attempt counts.
        timeout_s: for one attempt.
        attempts: per prompt, before it is given up.
        backoff_s: the first pause; it doubles, up to a minute, half of it at random.
        max_wait_s: the longest Retry-After that is waited for.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        parameters: Mapping[str, Any] = PARAMETERS,
        concurrency: int = 8,
        timeout_s: float = 120.0,
        attempts: int = 8,
        backoff_s: float = 0.5,
        max_wait_s: float = 300.0,
    ) -> None:
        try:
            parts = urlsplit(url)
            is_usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port beyond 65535, half a bracket
            raise ValueError("judge URL: expected one like https://api.openai.com/v1") from None
        self._public_url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # no secrets
        if not is_usable or parts.query or parts.fragment or not url.isascii() or " " in url:
            raise ValueError(f"judge URL {self._public_url!r}: expected one like https://api.openai.com/v1")
        self.url = url
        self.name = model
        self.parameters = request_parameters(parameters)
        self.identity = {"model": model, "parameters": self.parameters}
        self.calls = 0
        """Requests sent so far, failed ones included."""
        self._concurrency, self._timeout_s = concurrency, timeout_s
        self._attempts, self._backoff_s, self._max_wait_s = attempts, backoff_s, max_wait_s
        self._key = _key_for(parts.hostname or "")
        self._failures: list[JudgeFailed] = []
        self._stopping = asyncio.Event()
        self._has_answered = False
        """Whether a server has ever answered there, if only with an error."""
        self._completions = 0
        """Prompts answered so far: there, with this model, key and parameters."""
        self._probing = asyncio.Lock()

    def reply(self, prompts: Sequence[Sequence[Message]], on_reply: Callable[[int, Reply], None]) -> None:
        """Send every prompt; `on_reply(index, reply)` is called as each is answered or given up.

        Raises:
            JudgeMisconfigured: naming URL, model and next step, at the first refusal to serve us. A refusal
                that nothing is known of is the prompt's own where others have been answered.
            JudgeUnavailable: a prompt failed every time, and so did a harmless one. Where that is answered,
                the prompt is to blame: it alone gets a reply with finish reason "no_reply".
        """
        asyncio.run(self._reply_to_all(prompts, on_reply))

    async def _reply_to_all(
        self, prompts: Sequence[Sequence[Message]], on_reply: Callable[[int, Reply], None]
    ) -> None:
        waiting = iter(enumerate(prompts))
        self._failures, self._stopping, self._probing = [], asyncio.Event(), asyncio.Lock()
        client = AsyncOpenAI(
            base_url=self.url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=self._timeout_s,
            http_client=DefaultAsyncHttpxClient(follow_redirects=False),  # each would be a call of its own
        )
        async with client, asyncio.TaskGroup() as workers:
            for _ in range(min(self._concurrency, len(prompts))):
                workers.create_task(self._work(client, waiting, on_reply))
        if self._failures:
            raise self._failures[0]

    async def _work(
        self,
        client: AsyncOpenAI,
        waiting: Iterator[tuple[int, Sequence[Message]]],
        on_reply: Callable[[int, Reply], None],
    ) -> None:
        """Take prompts until there are none. A failure lets calls in flight, which are paid for, end."""
        try:
            while not self._stopping.is_set() and (entry := next(waiting, None)):
                index, prompt = entry
                on_reply(index, await self._reply_to(client, prompt))
        except JudgeFailed as failure:
            self._failures.append(failure)
            self._stopping.set()

    async def _reply_to(self, client: AsyncOpenAI, prompt: Sequence[Message]) -> Reply:
        problem, unreadable, completions = "", 0, self._completions
        for attempt in range(self._attempts):
            retry_after = None
            try:
                return await self._call(client, prompt)
            except ServerError as error:
                problem, retry_after = self._redact(error.words), error.retry_after_s
                if error.meaning not in ("busy", "unreadable"):
                    return await self._turned_away(client, error)
                unreadable += error.meaning == "unreadable"
                if unreadable >= _UNREADABLE_ATTEMPTS and self._completions > completions:
                    return Reply(problem, NO_REPLY)
                completions = self._completions
            except (APITimeoutError, TimeoutError):
                problem = f"no reply within {self._timeout_s:g} s"
            except APIConnectionError as error:
                problem = f"no connection: {self._redact(str(error.__cause__ or error))}"
                if not self._has_answered and attempt + 1 == _FIRST_ATTEMPTS:
                    raise self._unavailable(attempt + 1, problem) from None
            if attempt + 1 < self._attempts:
                await self._wait(self._pause_s(attempt, retry_after))
        if not await self._is_up(client):
            raise self._unavailable(self._attempts, problem)
        return Reply(f"no reply after {self._attempts} attempts; last: {problem}", NO_REPLY)

    async def _turned_away(self, client: AsyncOpenAI, error: ServerError) -> Reply:
        """The reply to a prompt that is refused for itself; any other refusal stops everything."""
        words = self._redact(error.words)
        if error.meaning in ("too_long", "filtered"):
            return Reply(words, TOO_LONG if error.meaning == "too_long" else FILTERED)
        if error.meaning == "no_credit":
            raise self._refused(words, "the account is out of credit: add some or use another key")
        if error.meaning == "no_access":
            status = 300 if error.status < 400 else error.status
            raise self._refused(words, _NEXT_STEPS.get(status, _NEXT_STEPS[401]))
        async with self._probing:
            if not self._completions:
                if advice := self._parameter_advice(error.words):
                    raise self._refused(words, advice)
                if not await self._is_up(client):
                    raise self._refused(words, "mend it as the server says, then run the same command again")
        return Reply(words, NO_REPLY)

    def _parameter_advice(self, words: str) -> str:
        """How to change the first of our parameters that a refusal names, "" where it names none."""
        named = [name for name in self.parameters if re.search(rf"\b{re.escape(name)}\b", words)]
        if not named:
            return ""
        other = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}.get(named[0])
        if other and re.search(rf"\b{other}\b", words):
            value = self.parameters[named[0]]
            return f"rename {named[0]}: {parameter_advice({named[0]: None, other: value})}"
        return f"leave {named[0]} out, or give it another value: {parameter_advice({named[0]: None})}"

    async def _call(self, client: AsyncOpenAI, prompt: Sequence[Message]) -> Reply:
        self.calls += 1
        messages: Any = list(prompt)
        try:
            async with asyncio.timeout(self._timeout_s):  # the client's own begins anew with every byte
                raw = await client.chat.completions.with_raw_response.create(
                    model=self.name, messages=messages, extra_body=self.parameters
                )
            response = raw.http_response
        except APIStatusError as error:
            response = error.response
        self._has_answered = True
        reply = read_response(response.status_code, response.headers, response.content)
        self._completions += 1
        return reply

    async def _wait(self, seconds: float) -> None:
        """Sleep, unless another call meets a failure that stops everything."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
            raise self._failures[0]

    async def _is_up(self, client: AsyncOpenAI) -> bool:
        """Send a harmless prompt: where it is answered, the failed prompt is to blame."""
        for attempt in range(_PROBES):
            await self._wait(self._pause_s(attempt, None))
            try:
                await self._call(client, [_PROBE])
                return True
            except ServerError as error:
                if error.meaning not in ("busy", "unreadable"):
                    return False
            except (APIConnectionError, TimeoutError):
                pass
        return False

    def _pause_s(self, attempt: int, retry_after: float | None) -> float:
        """Seconds until the next attempt; never less than the server requests."""
        if retry_after is None:
            return min(_LONGEST_BACKOFF_S, self._backoff_s * 2**attempt) * random.uniform(0.5, 1.0)
        if retry_after > self._max_wait_s:
            raise JudgeUnavailable(
                f"{self} asks to wait {retry_after:.0f} s. Run the same command again then: replies so far "
                "are kept"
            )
        return retry_after + random.uniform(0.0, self._backoff_s)

    def _refused(self, words: str, step: str) -> JudgeMisconfigured:
        step = step.replace("{url}", self._public_url)
        return JudgeMisconfigured(f"{self} refused: {words.rstrip('.')}. Next: {step}")

    def _unavailable(self, attempts: int, problem: str) -> JudgeUnavailable:
        return JudgeUnavailable(
            f"{self} does not answer ({attempts} attempts; last: {problem}). Check that it is up, then run "
            "the same command again: replies so far are kept"
        )

    def __str__(self) -> str:
        return f"judge model {self.name!r} at {self._public_url}"

    def _redact(self, text: str) -> str:
        """Foreign text fit for messages and logs: short, visible, and without our key."""
        if self._key:
            text = text.replace(self._key, "<key>")
        return visible(encodable(" ".join(text.split())))[:300]


def _key_for(host: str) -> str:
    """The key to send to a host, "" for none."""
    own = os.environ.get("ALIGN_JUDGE_API_KEY", "")
    if not own and (host == "openai.com" or host.endswith(".openai.com")):
        return os.environ.get("OPENAI_API_KEY", "")
    return own
