"""A folder from a server that answers as the Hub does, breaks off, refuses, and asks for rest."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from preference_data.corpora import catalog, hub
from preference_data.corpora.fetch import DownloadFailed
from preference_data.corpora.published.recording import BadCorpus
from tests.http_servers import running

REPO = "qyang1021/AIR-Bench-Dataset"
SIZE, N = 200_000, 12
FILES = {f"Chat/speech_QA_cv/{n}.mp3": random.Random(n).randbytes(SIZE) for n in range(N)}
OTHERS = {"Foundation/Foundation_meta.json": b"[]", "README.md": b"# AIR-Bench"}


class Server(ThreadingHTTPServer):
    """The Hub, as far as it is asked here."""

    daemon_threads = True

    def __init__(self, files=None, forged=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {**FILES, **OTHERS} if files is None else files
        self.forged = forged or {}
        """sha256 that the listing gives instead of the right ones."""
        listing = [self.entry(path, content) for path, content in self.files.items()]
        self.listing = json.dumps(listing).encode()
        self.commit = hashlib.sha1(self.listing + str(self.server_port).encode()).hexdigest()
        self.cut = self.busy = 0
        """So many of the next downloads break off; so many of the next requests are answered 429."""
        self.delay_s = 0.0
        self.lock = threading.Lock()
        self.got: list[tuple[str, str | None]] = []
        """Path and Range of every download."""
        self.sent = 0

    def entry(self, path, content):
        sha256 = self.forged.get(path, hashlib.sha256(content).hexdigest())
        lfs = {"oid": sha256, "size": len(content), "pointerSize": 100}
        return {"type": "file", "path": path, "oid": "0" * 40, "size": len(content), "lfs": lfs}

    def take(self, name):
        with self.lock:
            left = getattr(self, name)
            setattr(self, name, max(0, left - 1))
        return left > 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *args):
        """Clients that go away are what the tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(has_body=False)

    def do_GET(self):
        self.answer(has_body=True)

    def answer(self, has_body):
        server, path = self.server, self.path.split("?")[0]
        if path == f"/api/datasets/{REPO}":
            return self.send(json.dumps({"id": REPO, "sha": server.commit, "siblings": []}).encode())
        if path.startswith(f"/api/datasets/{REPO}/tree/{server.commit}"):
            name = path.removeprefix(f"/api/datasets/{REPO}/tree/{server.commit}").lstrip("/")
            rows = [row for row in json.loads(server.listing) if row["path"].startswith(name)]
            return self.send(json.dumps(rows).encode())
        file = path.removeprefix(f"/datasets/{REPO}/resolve/{server.commit}/")
        if file not in server.files:
            return self.send(b"", 404)
        if server.take("busy"):
            return self.send(b"", 429, {"Retry-After": "1"})
        content, first = server.files[file], 0
        if has_body:
            time.sleep(server.delay_s)
            wanted = self.headers.get("Range")
            server.got.append((file, wanted))
            first = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        more = {"ETag": f'"{json.loads(server.listing)[list(server.files).index(file)]["lfs"]["oid"]}"'}
        if first:
            more["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        cut = has_body and server.take("cut")
        self.send(content[first:], 206 if first else 200, more, has_body, cut)

    def send(self, body, status=200, headers=None, has_body=True, cut=False):
        self.send_response(status)
        headers = {"X-Repo-Commit": self.server.commit, "Content-Type": "application/json", **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if has_body:
            sent = body[: len(body) // 2] if cut else body
            self.close_connection = cut
            self.wfile.write(sent)
            with self.server.lock:
                self.server.sent += len(sent)

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def server():
    with running(Server()) as one:
        yield one


def fetch(server, folder, **more):
    hub.fetch_folder(REPO, "Chat", folder, endpoint=server.url, wait_s=0.01, **more)


def check(folder):
    there = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in (folder / "Chat").rglob("*.mp3")
    }
    assert there == FILES


def test_only_the_folder_comes_and_only_once_and_progress_adds_up(server, tmp_path):
    reports = []
    fetch(server, tmp_path, on_bytes=lambda *now: reports.append(now))
    check(tmp_path)
    assert not (tmp_path / "Foundation").exists()
    assert reports[-1] == ("Chat", N * SIZE, N * SIZE)
    assert [done for _, done, _ in reports] == sorted(done for _, done, _ in reports)
    assert len(server.got) == N
    fetch(server, tmp_path)
    assert len(server.got) == N  # what is there is not asked for


def test_a_broken_connection_is_continued_and_a_busy_server_is_left_alone(server, tmp_path):
    server.cut, server.busy = 3, 2
    begun = time.monotonic()
    fetch(server, tmp_path)
    check(tmp_path)
    assert time.monotonic() - begun > 1  # as Retry-After asks
    assert len(server.got) == N + 3


def test_a_large_file_goes_on_where_it_broke(tmp_path):
    large = random.Random(0).randbytes(24 << 20)
    with running(Server(files={"Chat/large.wav": large})) as server:
        server.cut = 1
        fetch(server, tmp_path)
        assert (tmp_path / "Chat/large.wav").read_bytes() == large
        assert [wanted for _, wanted in server.got] == [None, f"bytes={10 << 20}-"]  # in pieces of 10 MB


def test_what_has_another_checksum_is_refused_and_dropped(tmp_path):
    bad = next(iter(FILES))
    with running(Server(forged={bad: "0" * 64})) as server:
        with pytest.raises(
            DownloadFailed, match=r"0\.mp3: its sha256 is [0-9a-f]{64}, its publisher says 000"
        ):
            fetch(server, tmp_path)
    assert not (tmp_path / bad).exists()


def test_a_file_that_was_damaged_later_is_fetched_again(server, tmp_path):
    fetch(server, tmp_path)
    path = tmp_path / next(iter(FILES))
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, (time.time() + 10, time.time() + 10))
    fetch(server, tmp_path)
    check(tmp_path)


def test_a_path_that_leaves_the_folder_is_refused(tmp_path):
    with running(Server(files={"Chat/../../evil": b"sound"})) as server:
        with pytest.raises(DownloadFailed, match="the Hub lists a path that is refused"):
            fetch(server, tmp_path / "chat")
    assert not (tmp_path / "evil").exists()


def test_a_hub_that_refuses_is_named(server, tmp_path):
    with pytest.raises(DownloadFailed, match="the Hub does not list nobody/nothing"):
        hub.fetch_folder("nobody/nothing", "Chat", tmp_path, endpoint=server.url)


def test_air_bench_comes_from_the_hub(server, tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "fetch_folder", partial(hub.fetch_folder, endpoint=server.url))
    card = catalog.CARDS["air_bench"]
    assert catalog.download(card, tmp_path) == ""
    check(tmp_path)
    with pytest.raises(BadCorpus, match="no part 'Music'; there are Chat, Foundation"):
        catalog.download(card, tmp_path, ["Music"])


PROGRAM = """
import sys
from pathlib import Path
from preference_data.corpora import catalog
catalog.download(catalog.CARDS["air_bench"], Path(sys.argv[1]))
"""


def test_a_killed_process_is_gone_on_with(server, tmp_path):
    server.delay_s = 0.1
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "HF_ENDPOINT": server.url}
    fetching = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], stderr=subprocess.DEVNULL, env=environment
    )
    while server.sent < 3 * SIZE:
        time.sleep(0.005)
        assert fetching.poll() is None
    fetching.send_signal(signal.SIGKILL)
    fetching.wait(timeout=5)
    time.sleep(5 * server.delay_s)  # until its last requests are answered
    there = list((tmp_path / "Chat").rglob("*.mp3"))
    assert len(there) < N
    before = len(server.got)
    fetch(server, tmp_path)
    check(tmp_path)
    assert len(server.got) - before <= N - len(there)  # whole ones are not asked for again
