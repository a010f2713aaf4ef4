"""A local server that speaks OpenAI's chat-completions protocol over a real socket, faults included.

What it answers is a function from `Request` to `Answer`; `judge` makes one that scores both answers of our
prompts, `faulty` wraps one with faults.
"""

import base64
import hashlib
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from tests.http_servers import running


class Request(NamedTuple):
    """`attempt` counts requests with this very body, from 0; `at` is in seconds."""

    number: int
    attempt: int
    at: float
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def text(self) -> str:
        contents = [message["content"] for message in self.body["messages"]]
        parts = [[{"text": content}] if isinstance(content, str) else content for content in contents]
        return "\n".join(part["text"] for content in parts for part in content if "text" in part)

    @property
    def wavs(self) -> list[bytes]:
        """The clips, decoded from the content parts that hold them."""
        contents = [message["content"] for message in self.body["messages"]]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        audio = [part["input_audio"] for part in parts if part["type"] == "input_audio"]
        assert all(clip["format"] == "wav" for clip in audio)
        return [base64.b64decode(clip["data"], validate=True) for clip in audio]


class Answer(NamedTuple):
    """`cut` sends half of the JSON as if it were whole; `dropped` closes the connection without a word,
    `drips` sends a byte every 0.2 s."""

    text: str | None = ""
    finish_reason: str = "stop"
    status: int = 200
    headers: Mapping[str, str] = {}
    error: Mapping[str, Any] = {}
    delay_s: float = 0.0
    cut: bool = False
    dropped: bool = False
    drips: bool = False
    body: bytes | None = None
    refusal: str | None = None


Behaviour = Callable[[Request], Answer]


class Served(NamedTuple):
    url: str
    requests: list[Request]
    answered: list[Request]
    """Those that got a whole reply with status 200."""


class Quoted(NamedTuple):
    first: str
    second: str
    mark: str


def quoted(text: str) -> Quoted:
    """The two answers that a prompt of ours shows, and the mark of a strict one."""
    mark = re.search(r"^SCORES ([0-9a-f]{16}): <score", text, re.MULTILINE)
    if mark:
        found = re.findall(
            rf"<<{mark[1]}\n(.*?)\n{mark[1]}>>", text.split("[System]\nRate both")[0], re.DOTALL
        )
        return Quoted(found[-2], found[-1], mark[1])
    found = re.findall(r"\[The Start of Assistant \d's Answer]\n(.*?)\n\[The End of", text, re.DOTALL)
    return Quoted(found[0], found[1], "")


def judge(score: Callable[[str], float], *, first_gains: float = 0.0) -> Behaviour:
    """Scores each answer by its text; whichever stands first gains `first_gains` points."""

    def behave(request: Request) -> Answer:
        shown = quoted(request.text)
        scores = f"{score(shown.first) + first_gains:g} {score(shown.second):g}"
        return Answer(f"Both were read.\nSCORES {shown.mark}: {scores}" if shown.mark else scores)

    return behave


def faulty(inner: Behaviour, faults: list[tuple[float, Answer]]) -> Behaviour:
    """Meets shares of the requests with an answer that is a fault; the others reach `inner`.

    A fault with nothing but a delay lets the request through after it. Drawn by body and attempt: equal
    runs meet equal faults, whatever the timing.
    """

    def behave(request: Request) -> Answer:
        key = json.dumps(request.body, sort_keys=True).encode() + bytes([request.attempt])
        drawn = random.Random(hashlib.sha256(key).digest()).random()
        for share, fault in faults:
            if drawn < share:
                slow = fault == Answer(delay_s=fault.delay_s)
                return inner(request)._replace(delay_s=fault.delay_s) if slow else fault
            drawn -= share
        return inner(request)

    return behave


def _handler(behave: Behaviour, served: Served, attempts: Counter[str], lock: threading.Lock) -> type:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            if len(sent) < int(self.headers["Content-Length"]):  # killed while it asked
                self.close_connection = True
                return
            body = json.loads(sent)
            key = json.dumps(body, sort_keys=True)
            headers = {name.lower(): value for name, value in self.headers.items()}
            with lock:
                request = Request(len(served.requests), attempts[key], time.monotonic(), body, headers)
                attempts[key] += 1
                served.requests.append(request)
            if self.path != "/v1/chat/completions":
                answer = Answer(status=404, error={"message": f"no {self.path} here"})
            else:
                answer = behave(request)
            time.sleep(answer.delay_s)
            if answer.dropped:
                self.close_connection = True
                return
            payload = _payload(answer, body)
            if answer.status == 200 and not answer.cut and answer.body is None:
                with lock:
                    served.answered.append(request)
            self._send(answer, payload[: len(payload) // 2] if answer.cut else payload)

        def _send(self, answer: Answer, payload: bytes) -> None:
            try:
                self.send_response(answer.status)
                for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                for start in range(len(payload)) if answer.drips else ():
                    self.wfile.write(payload[start : start + 1])
                    time.sleep(0.2)
                self.wfile.write(b"" if answer.drips else payload)
            except OSError:  # the client was killed or gave up
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def _payload(answer: Answer, body: dict[str, Any]) -> bytes:
    if answer.body is not None:
        return answer.body
    if answer.status != 200:
        return json.dumps({"error": {"message": f"status {answer.status}", **answer.error}}).encode()
    message = {"role": "assistant", "content": answer.text, "refusal": answer.refusal}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    whole = {"id": "c", "object": "chat.completion", "created": 0, "model": body["model"], "usage": usage}
    return json.dumps({**whole, "choices": [choice]}).encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a killed client is part of the game
            super().handle_error(request, client_address)


@contextmanager
def serving(behave: Behaviour) -> Iterator[Served]:
    """The server, on a free port of this machine, until the block ends."""
    served = Served("", [], [])
    attempts: Counter[str] = Counter()
    server = _Server(("127.0.0.1", 0), _handler(behave, served, attempts, threading.Lock()))
    with running(server):
        yield served._replace(url=f"http://127.0.0.1:{server.server_address[1]}/v1")
