"""`align serve` as a process, and a client of it."""

import base64
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
from openai import OpenAI

ALIGN = str(Path(sys.executable).with_name("align"))
KEY = "test-key"


class Served:
    """A started server: `pid`, `url` up to /v1, and what it prints."""

    def __init__(self, policy, *arguments, key=KEY, port=0):
        environ = {name: value for name, value in os.environ.items() if name != "ALIGN_SERVE_API_KEY"}
        self._process = subprocess.Popen(
            [ALIGN, "serve", str(policy), "--port", str(port), *arguments],
            env=environ | ({"ALIGN_SERVE_API_KEY": key} if key else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.pid, self.key, self.lines = self._process.pid, key, []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.expect(r"(http://\S+)/v1")[1] + "/v1"
        self.root = self.url.removesuffix("/v1")

    def _read(self):
        for line in self._process.stdout:
            self.lines.append(line.rstrip())

    def expect(self, pattern, within_s=120):
        """The match in what it has printed, as soon as there is one."""
        deadline = time.monotonic() + within_s
        while not (match := re.search(pattern, "\n".join(self.lines))):
            assert time.monotonic() < deadline, self.lines
            assert self._process.poll() is None, self.lines
            time.sleep(0.05)
        return match

    def client(self, **options):
        return OpenAI(base_url=self.url, api_key=self.key, **{"max_retries": 0, "timeout": 60, **options})

    def post(self, path, **options):
        headers = {"Authorization": f"Bearer {self.key}", **options.pop("headers", {})}
        return httpx.post(self.url + path, headers=headers, timeout=60, **options)

    def metric(self, name):
        """The value of a sample, 0 where there is none."""
        text = httpx.get(f"{self.root}/metrics").text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def settle(self, within_s=30):
        """Wait until no request is being answered."""
        deadline = time.monotonic() + within_s
        while self.metric("align_requests_in_flight"):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def family(self):
        process = psutil.Process(self.pid)
        return [process, *process.children(recursive=True)]

    def wait(self, timeout=60):
        code = self._process.wait(timeout)
        self._reader.join()
        return code

    def kill(self, signum=signal.SIGKILL):
        self._process.send_signal(signum)


@contextmanager
def serving(policy, *arguments, **options):
    """A server that is ready, until the block ends."""
    served = Served(policy, *arguments, **options)
    try:
        served.expect(r"(?m)^ready$", within_s=300)
        yield served
    finally:
        if served._process.poll() is None:
            served.kill(signal.SIGTERM)
        served.wait()


def clip(path):
    """An audio file as a part of a message."""
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def refusal(answer, status=400):
    """The error of an answer with this status."""
    assert answer.status_code == status, answer.text
    return answer.json()["error"]
