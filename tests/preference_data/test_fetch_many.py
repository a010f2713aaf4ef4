"""Many files at once from a real server on this machine that breaks off, refuses, and asks for rest."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from preference_data.corpora.fetch import DownloadFailed, RemoteFile
from preference_data.corpora.fetch_many import fetch_many
from tests.http_servers import running

N, SIZE, AT_ONCE = 40, 100_000, 4
FILES = {f"/{n}.bin": random.Random(n).randbytes(SIZE) for n in range(N)}


class Server(ThreadingHTTPServer):
    """Keeps connections open; what it does wrong is drawn by `luck`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.luck = random.Random(0)
        self.broken = 0.0
        """Share of the answers that break off in the middle."""
        self.busy = 0.0
        """Share of the requests that are answered 503."""
        self.closed_until = 0.0
        self.delay_s = 0.0
        self.lock = threading.Lock()
        self.now = self.most = self.connections = self.early = self.sent = 0
        self.asked: list[str] = []

    def get_request(self):
        self.connections += 1
        return super().get_request()

    def handle_error(self, *args):
        """Clients that go away are what the tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        with server.lock:
            server.now += 1
            server.most = max(server.most, server.now)
            server.asked.append(self.path)
            draw = server.luck.random()
        try:
            time.sleep(server.delay_s)
            self.answer(draw)
        finally:
            with server.lock:
                server.now -= 1

    def answer(self, draw):
        server = self.server
        if time.monotonic() < server.closed_until:
            server.early += 1
            return self.empty(429, "Retry-After", "1")
        if self.path not in FILES:
            return self.empty(404)
        if draw < server.busy:
            return self.empty(503)
        body, first = FILES[self.path], 0
        if wanted := self.headers.get("Range"):
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{SIZE - 1}/{SIZE}")
        self.send_header("ETag", f'"{self.path}"')
        self.send_header("Content-Length", str(SIZE - first))
        self.end_headers()
        rest = body[first:]
        if server.busy <= draw < server.busy + server.broken:
            rest = rest[: len(rest) // 2]
            self.close_connection = True
        self.wfile.write(rest)
        with server.lock:
            server.sent += len(rest)

    def empty(self, status, *header):
        self.send_response(status)
        if header:
            self.send_header(*header)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def server():
    with running(Server()) as one:
        yield one


def remote(server, names=FILES, **more):
    address = f"http://127.0.0.1:{server.server_port}"
    return [
        RemoteFile(
            f"{address}{name}",
            f"part{name}",
            1e-3,
            f"sha256:{hashlib.sha256(FILES.get(name, b'')).hexdigest()}",
            size=SIZE,
            **more,
        )
        for name in names
    ]


def check(folder):
    names = sorted(path.name for path in folder.rglob("*.bin"))
    assert names == sorted(name[1:] for name in FILES)
    assert all((folder / f"part{name}").read_bytes() == body for name, body in FILES.items())


def test_several_come_at_once_over_few_connections_and_progress_adds_up(server, tmp_path):
    server.delay_s, told = 0.02, []
    fetch_many(remote(server), tmp_path, "part", lambda *now: told.append(now), at_once=AT_ONCE)
    check(tmp_path)
    assert server.most == AT_ONCE  # and never more
    assert server.connections == AT_ONCE
    assert len(server.asked) == N
    assert told[-1] == ("part", N * SIZE, N * SIZE)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    fetch_many(remote(server), tmp_path, "part", lambda *now: told.append(now), at_once=AT_ONCE)
    assert len(server.asked) == N  # what is there is not asked for
    assert told[-1] == ("part", N * SIZE, N * SIZE)


def test_faults_are_mended_file_by_file(server, tmp_path):
    server.broken, server.busy = 0.3, 0.2
    fetch_many(remote(server), tmp_path, "part", at_once=AT_ONCE, wait_s=0.01)
    check(tmp_path)
    assert len(server.asked) > N
    assert server.sent == N * SIZE  # what broke off was continued, not begun anew


def test_a_server_that_asks_for_rest_gets_it_from_all(server, tmp_path):
    server.closed_until = time.monotonic() + 0.8
    fetch_many(remote(server), tmp_path, "part", at_once=AT_ONCE, wait_s=0.01)
    check(tmp_path)
    assert server.early <= AT_ONCE  # each had asked already; then nobody did for a second


def test_the_first_failure_ends_the_others_and_what_came_stays(server, tmp_path):
    server.delay_s = 0.02
    files = remote(server, [*list(FILES)[:10], "/gone.bin", *list(FILES)[10:]])
    with pytest.raises(DownloadFailed, match=r"gone\.bin: the server answers 404"):
        fetch_many(files, tmp_path, "part", at_once=AT_ONCE)
    assert 10 <= len(server.asked) < 20
    fetch_many(remote(server), tmp_path, "part", at_once=AT_ONCE)
    check(tmp_path)
    assert not list(tmp_path.rglob(".[0-9]*"))  # no parts of files that are whole


def test_a_wrong_checksum_among_many_is_refused(server, tmp_path):
    files = remote(server)
    files[7] = files[7]._replace(checksum="sha256:00")
    with pytest.raises(DownloadFailed, match=r"7\.bin: sha256 is [0-9a-f]{64}, its publisher says 00"):
        fetch_many(files, tmp_path, "part", at_once=AT_ONCE)
    assert not (tmp_path / "part/7.bin").exists()


PROGRAM = """
import sys
from pathlib import Path
from tests.preference_data.test_fetch_many import *
class At: server_port = int(sys.argv[1])
fetch_many(remote(At), Path(sys.argv[2]), "part", at_once=AT_ONCE, wait_s=0.01)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_an_ended_process_is_gone_on_with(server, tmp_path, how):
    server.delay_s, server.broken = 0.3, 0.5  # slow enough to be ended in time on a busy machine
    command = [sys.executable, "-c", PROGRAM, str(server.server_port), str(tmp_path)]
    fetching = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    while server.sent < 5 * SIZE:
        time.sleep(0.005)
        assert fetching.poll() is None
    fetching.send_signal(how)
    fetching.wait(timeout=5)
    there = len(list(tmp_path.rglob("[0-9]*.bin")))
    assert there < N
    before = len(server.asked)
    server.delay_s, server.broken = 0.0, 0.0
    fetch_many(remote(server), tmp_path, "part", at_once=AT_ONCE, wait_s=0.01)
    check(tmp_path)
    assert len(server.asked) - before == N - there  # whole ones are not asked for again
