"""The guard over a socket, before an application that says what reaches it."""

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import uvicorn

from align.serving.guard import Guard
from align.serving.metrics import Metrics
from align.serving.requests import Limits
from tests.align.serving.server_process import refusal

LIMITS = Limits(body_bytes=1000, in_flight=2)
KEY = {"Authorization": "Bearer k"}


@pytest.fixture
def guarded():
    """Its URL, its metrics, and an event for which POST /slow waits."""
    metrics, go_on = Metrics(), threading.Event()

    async def app(scope, receive, send):
        body = (await receive())["body"]
        if scope["path"] == "/slow":
            await asyncio.to_thread(go_on.wait, 20)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(len(body)).encode()})

    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(Guard(app, "k", LIMITS, metrics), lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}", metrics, go_on
    go_on.set()
    server.should_exit = True
    thread.join()
    listening.close()


def chunks(n):
    for _ in range(n):
        yield b"x" * 100


def test_bodies_come_whole_or_not_at_all(guarded):
    url, metrics, _ = guarded
    for content, status in ((b"x" * 1000, 200), (b"x" * 1001, 413), (chunks(10), 200), (chunks(11), 413)):
        answer = httpx.post(url + "/a", content=content, headers=KEY)
        assert answer.status_code == status
        assert answer.text == "1000" or "1,000 bytes" in refusal(answer, 413)["message"]
    assert refusal(httpx.post(url + "/a", content=chunks(2000)), 401)
    text = metrics.render({})
    for status, n in ((200, 2), (413, 2), (401, 1)):
        assert f'align_requests_total{{route="other",status="{status}"}} {n}' in text
    assert httpx.get(url + "/health").text == "0"  # no key


def test_what_is_beyond_the_limit_is_turned_away_until_there_is_room(guarded):
    url, metrics, go_on = guarded
    with ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(httpx.post, url + "/slow", headers=KEY, timeout=30) for _ in range(2)]
        while metrics.in_flight < 2:
            assert not any(answer.done() for answer in slow)
        assert refusal(httpx.post(url + "/a", headers=KEY), 429)["code"] == "rate_limit_exceeded"
        go_on.set()
        assert [answer.result().status_code for answer in slow] == [200, 200]
    assert httpx.post(url + "/a", headers=KEY).status_code == 200
