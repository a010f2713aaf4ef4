"""The /media routes of a real server: who may store and hear clips, odd paths, ranges, who has listened."""

import asyncio
import hashlib
import io
import itertools
import json
import os
import secrets
import socket
import sqlite3
import stat
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from ui_annotation.server import listening

_SEEDS = itertools.count()  # not of the clock: all workers collect the same tests


def wave(duration_s: float, rate_hz: int = 16_000, channels: int = 1) -> bytes:
    """A clip of noise that no other test has."""
    file = io.BytesIO()
    samples = np.random.default_rng(next(_SEEDS)).uniform(-0.1, 0.1, (round(duration_s * rate_hz), channels))
    soundfile.write(file, samples, rate_hz, format="WAV", subtype="PCM_16")
    return file.getvalue()


CLIP = wave(25_589 / 192_000, 192_000, 2)  # 102,400 bytes, more than one chunk, which take 0.13 s to hear
NAME = f"{hashlib.sha256(CLIP).hexdigest()}.wav"


@pytest.fixture(scope="module")
def clip(argilla_server: Any) -> str:
    """The address of a stored clip in workspace "audio"."""
    answer = argilla_server.owner.put(f"/media/audio/{NAME}", content=CLIP)
    assert answer.status_code in (200, 201)
    return f"/media/audio/{NAME}"


@pytest.fixture
def place(argilla_server: Any) -> str:
    """An empty workspace, of which only the owner is a member."""
    return argilla_server.add_workspace()


def raw(url: str, target: bytes, *, key: str = "", method: bytes = b"GET") -> bytes:
    """The answer to a request line sent as it is: clients would tidy the path."""
    host, port = url.removeprefix("http://").split(":")
    head = [method + b" " + target + b" HTTP/1.1", b"Host: " + host.encode(), b"Connection: close"]
    if key:
        head.append(b"X-Argilla-Api-Key: " + key.encode())
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"\r\n".join(head) + b"\r\n\r\n")
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


# --- storing


def test_a_clip_is_stored_once_and_only_as_what_it_is(argilla_server: Any, place: str) -> None:
    owner, address = argilla_server.owner, f"/media/{place}/{NAME}"
    assert owner.put(address, content=CLIP[:-1]).status_code == 400
    assert owner.get(address).status_code == 404
    assert owner.put(address, content=CLIP).status_code == 201
    assert owner.put(address, content=CLIP).status_code == 200
    assert owner.get(address).content == CLIP

    folder = argilla_server.home / "media" / place
    assert [one.name for one in folder.iterdir()] == [NAME]  # no half of the refused one
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / NAME).stat().st_mode) == 0o600


def test_only_those_who_manage_a_workspace_store_clips_there(argilla_server: Any) -> None:
    assert argilla_server.annotator.put(f"/media/audio/{NAME}", content=CLIP).status_code == 403
    assert argilla_server.owner.put(f"/media/no-such-workspace/{NAME}", content=CLIP).status_code == 404
    assert httpx.put(f"{argilla_server.url}/media/audio/{NAME}", content=CLIP).status_code == 401
    assert not (argilla_server.home / "media" / "no-such-workspace").exists()


def test_an_admin_manages_the_own_workspaces_only(argilla_server: Any, place: str) -> None:
    owner = argilla_server.owner
    admin = {"username": f"admin-{place}", "first_name": "A", "password": "a-long-password", "role": "admin"}
    made = owner.post("/api/v1/users", json=admin).raise_for_status().json()
    spaces = owner.get("/api/v1/me/workspaces").json()["items"]
    space = next(one["id"] for one in spaces if one["name"] == place)
    owner.post(f"/api/v1/workspaces/{space}/users", json={"user_id": made["id"]}).raise_for_status()

    headers = {"X-Argilla-Api-Key": made["api_key"]}
    with httpx.Client(base_url=argilla_server.url, headers=headers) as as_admin:
        assert as_admin.put(f"/media/{place}/{NAME}", content=CLIP).status_code == 201
        assert as_admin.get(f"/media/{place}/heard").status_code == 200
        assert as_admin.put(f"/media/audio/{NAME}", content=CLIP).status_code == 403
        assert as_admin.get("/media/audio/heard").status_code == 403


def test_a_clip_over_the_limit_is_refused_before_it_is_sent(argilla_server: Any) -> None:
    host, port = argilla_server.url.removeprefix("http://").split(":")
    key = argilla_server.api_key("owner")
    head = f"PUT /media/audio/{NAME} HTTP/1.1\r\nHost: {host}\r\nX-Argilla-Api-Key: {key}\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"{head}Content-Length: 200000001\r\n\r\n".encode())
        assert status(connection.recv(4096)) == 413


# --- who may hear


def test_nobody_unknown_gets_anything_but_the_script(argilla_server: Any, clip: str) -> None:
    url = argilla_server.url
    for path in (clip, clip + "/heard", "/media/audio/heard", "/media", "/media/", "/media/x/../y"):
        assert status(raw(url, path.encode())) == 401, path
    for headers in (
        {"X-Argilla-Api-Key": "wrong"},
        {"X-Argilla-Api-Key": ""},
        {"Authorization": "Bearer not.a.token"},
        {"Authorization": "Basic b3duZXI6b3duZXI="},
        {"Cookie": "argilla_media=not.a.token"},
        {"Cookie": "argilla_media="},
    ):
        assert httpx.get(url + clip, headers=headers).status_code == 401, headers
    script = httpx.get(f"{url}/media/listening.js")
    assert script.status_code == 200
    assert script.headers["content-type"].startswith("text/javascript")


def test_an_annotator_hears_the_own_workspace_only(argilla_server: Any, clip: str, place: str) -> None:
    argilla_server.owner.put(f"/media/{place}/{NAME}", content=CLIP)
    stranger = argilla_server.client(argilla_server.add_user(workspace=place))
    assert argilla_server.annotator.get(clip).content == CLIP
    assert stranger.get(f"/media/{place}/{NAME}").content == CLIP
    assert stranger.get(clip).status_code == 403
    assert stranger.post(f"{clip}/heard", params={"share": 1}).status_code == 403
    assert stranger.get("/media/audio/heard").status_code == 403
    # whether a workspace exists is not told
    assert stranger.get(f"/media/no-such-workspace/{NAME}").status_code == 403


def test_what_changes_for_a_user_holds_with_the_next_request(argilla_server: Any, place: str) -> None:
    argilla_server.owner.put(f"/media/{place}/{NAME}", content=CLIP)
    owner, url = argilla_server.owner, f"/media/{place}/{NAME}"
    name = argilla_server.add_user(workspace=argilla_server.add_workspace())
    with argilla_server.client(name) as user:
        assert user.get(url).status_code == 403
        spaces = {item["name"]: item["id"] for item in owner.get("/api/v1/me/workspaces").json()["items"]}
        me = user.get("/api/v1/me").json()["id"]
        path = f"/api/v1/workspaces/{spaces[place]}/users"
        owner.post(path, json={"user_id": me}).raise_for_status()
        assert [user.get(url).status_code for _ in range(3)] == [200] * 3
        owner.delete(f"{path}/{me}").raise_for_status()
        assert user.get(url).status_code == 403
        owner.post(path, json={"user_id": me}).raise_for_status()
        assert user.get(url).status_code == 200
        owner.delete(f"/api/v1/users/{me}").raise_for_status()
        assert user.get(url).status_code == 401


@pytest.mark.parametrize(
    "target",
    [
        b"/media/audio/../../argilla.db",
        b"/media/audio/..%2f..%2fargilla.db",
        b"/media/audio/%2e%2e/%2e%2e/credentials.json",
        b"/media/%2e%2e%2fcredentials.json",
        b"/media/%252e%252e%252fcredentials.json",
        b"/media/..\\credentials.json",
        b"/media/..%5ccredentials.json",
        b"/media//etc/passwd",
        b"/media/%2fetc%2fpasswd",
        b"/media/audio/" + NAME.encode() + b"%00.wav",
        b"/media/audio/" + NAME.encode() + b"/../" + NAME.encode(),
        b"/media/audio/" + NAME.upper().encode(),
        b"/media/audio/" + NAME.replace("wav", "exe").encode(),
        b"/media/%61udio/" + NAME.encode(),
        b"/media/%c0%ae%c0%ae/credentials.json",
        b"/media/%ef%bc%8e%ef%bc%8e/credentials.json",
        b"/%6dedia/../credentials.json",
        b"http://127.0.0.1/media/../credentials.json",
        b"/../credentials.json",
        b"/..%2fcredentials.json",
        b"/%00",
        b"//media/audio/" + NAME.encode(),
    ],
)
def test_an_odd_path_leads_nowhere(argilla_server: Any, clip: str, target: bytes) -> None:
    answer = raw(argilla_server.url, target, key=argilla_server.api_key("owner"))
    assert status(answer) == 404
    assert len(answer) < 1000


def test_bytes_that_no_path_may_have_are_refused(argilla_server: Any) -> None:
    key = argilla_server.api_key("owner")
    assert status(raw(argilla_server.url, b"/media/\xc0\xae\xc0\xae/x", key=key)) == 400


def test_a_link_placed_in_the_folder_of_clips_has_no_address(argilla_server: Any, clip: str) -> None:
    link = argilla_server.home / "media" / "audio" / "credentials.json"
    os.symlink(argilla_server.home / "credentials.json", link)
    try:
        assert argilla_server.owner.get("/media/audio/credentials.json").status_code == 404
    finally:
        link.unlink()


# --- sending


@pytest.mark.parametrize(
    ("asked", "code", "start", "stop"),
    [
        ("bytes=0-99", 206, 0, 100),
        ("bytes=102300-", 206, 102_300, 102_400),
        ("bytes=-10", 206, 102_390, 102_400),
        ("bytes=-999999", 206, 0, 102_400),  # a suffix longer than the clip is all of it
        ("bytes=100-999999", 206, 100, 102_400),
        ("bytes=5-4", 200, 0, 102_400),  # malformed: ignored
        ("bytes=-", 200, 0, 102_400),
        ("lines=0-5", 200, 0, 102_400),
        ("bytes=0-1,5-6", 200, 0, 102_400),  # several: allowed to be ignored
    ],
)
def test_a_range_gives_that_part(
    argilla_server: Any, clip: str, asked: str, code: int, start: int, stop: int
) -> None:
    answer = argilla_server.annotator.get(clip, headers={"Range": asked})
    assert answer.status_code == code
    assert answer.content == CLIP[start:stop]
    assert answer.headers["content-length"] == str(stop - start)
    if code == 206:
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/102400"


def test_a_range_behind_the_end_is_416(argilla_server: Any, clip: str) -> None:
    for asked in ("bytes=102400-", "bytes=-0"):
        answer = argilla_server.annotator.get(clip, headers={"Range": asked})
        assert (answer.status_code, answer.content) == (416, b"")
        assert answer.headers["content-range"] == "bytes */102400"


def test_a_clip_is_cached_privately_and_never_sniffed(argilla_server: Any, clip: str) -> None:
    answer = argilla_server.annotator.get(clip, headers={"Accept-Encoding": "br, gzip"})
    headers = answer.headers
    assert headers["content-type"] == "audio/wav"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["accept-ranges"] == "bytes"
    assert set(headers["cache-control"].split(", ")) == {"private", "no-cache"}
    assert "content-encoding" not in headers  # compressed audio has no byte ranges

    same = argilla_server.annotator.get(clip, headers={"If-None-Match": headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")
    other = argilla_server.annotator.get(clip, headers={"Range": "bytes=0-9", "If-Range": '"another"'})
    assert other.status_code == 200


def test_head_says_the_length_and_sends_nothing(argilla_server: Any, clip: str) -> None:
    answer = argilla_server.annotator.head(clip)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == "102400"
    assert argilla_server.annotator.delete(clip).status_code == 405


# --- listening


class Listener:
    """An annotator of a workspace of their own, with a clip."""

    def __init__(self, server: Any, content: bytes = CLIP) -> None:
        self.server, self.place = server, server.add_workspace()
        self.name = server.add_user(workspace=self.place)
        self.address = f"/media/{self.place}/{hashlib.sha256(content).hexdigest()}.wav"
        server.owner.put(self.address, content=content).raise_for_status()
        self.client = server.client(self.name)

    def load(self, part: str = "", **headers: str) -> httpx.Response:
        return self.client.get(self.address, headers=({"Range": f"bytes={part}"} if part else {}) | headers)

    def report(self, share: float, start: float | None = None) -> float:
        """Say that a part was played; gives how much counts as heard."""
        where = {} if start is None else {"from": start}
        answer = self.client.post(f"{self.address}/heard", params={"share": share, **where})
        assert answer.status_code == 204
        return self.heard()[-1]["share"]

    def heard(self) -> list[dict[str, Any]]:
        rows = self.server.owner.get(f"/media/{self.place}/heard").json()["heard"]
        assert {(row["annotator"], row["clip"]) for row in rows} <= {(self.name, self.address[-68:-4])}
        return rows


TIME_TO_HEAR = 0.07
"""`CLIP`, at twice its speed."""


def test_every_greater_share_is_kept_with_the_time_it_was_reached(argilla_server: Any) -> None:
    listener = Listener(argilla_server)
    listener.load()
    time.sleep(TIME_TO_HEAR)
    assert listener.report(0.5) == 0.5
    first = listener.heard()
    for share in (0.25, 0.5):
        listener.report(share)
    assert listener.heard() == first  # neither more nor later
    listener.report(0.75)
    kept, last = listener.heard()
    assert kept == first[0]
    assert last["share"] == 0.75
    assert last["at"] > first[0]["at"]
    assert last["at"].endswith("+00:00")


@pytest.mark.parametrize(
    "query",
    [
        *(
            "",
            "share=",
            "share=one",
            "share=NaN",
            "share=inf",
            "share=1.01",
            "share=-0.1",
            "share=1&from=0.1",
        ),
        *("share=1&from=0.1", "share=0.5&from=NaN", "share=0.5&from=-0.1", "share=0.1&from=", "from=0.5"),
    ],
)
def test_a_report_that_is_no_share_is_refused(argilla_server: Any, clip: str, query: str) -> None:
    def heard() -> list[dict[str, Any]]:
        rows = argilla_server.owner.get("/media/audio/heard").json()["heard"]
        return [row for row in rows if row["clip"] in clip]  # other tests' pages may still report theirs

    before = heard()
    assert argilla_server.annotator.post(f"{clip}/heard?{query}").status_code == 400
    assert heard() == before


def test_only_clips_that_are_there_are_heard(argilla_server: Any) -> None:
    address = f"/media/audio/{'0' * 64}.wav/heard"
    assert argilla_server.annotator.post(address, params={"share": 1}).status_code == 404


def test_no_more_counts_as_heard_than_was_sent(argilla_server: Any) -> None:
    listener = Listener(argilla_server)
    assert listener.report(1.0) == 0  # nothing was loaded
    listener.client.head(listener.address)
    assert listener.load("102400-").status_code == 416
    etag = f'"{listener.address[-68:-4]}"'
    other = argilla_server.client(argilla_server.add_user(workspace=listener.place))
    assert other.get(listener.address).status_code == 200  # to somebody else
    assert listener.report(1.0) == 0
    for part in ("0-25599", "10-9999", "0-25599"):
        listener.load(part)
    time.sleep(TIME_TO_HEAR)
    assert listener.report(1.0) == 0.25  # each byte counts once
    listener.load("51200-102399")
    time.sleep(TIME_TO_HEAR)
    assert listener.report(1.0) == 0.75
    # who claims to have the clip already gets it all the same, until it was sent
    assert len(listener.load(**{"If-None-Match": etag}).content) == len(CLIP)
    assert listener.load(**{"If-None-Match": etag}).status_code == 304
    time.sleep(TIME_TO_HEAR)
    assert listener.report(1.0) == 1


def test_no_more_counts_as_heard_than_there_was_time_for(argilla_server: Any) -> None:
    listener, began = Listener(argilla_server, wave(3.0)), time.monotonic()
    listener.load()
    shares = []
    for _ in range(3):
        shares.append((listener.report(1.0), 2 * (time.monotonic() - began) / 3.0))
        time.sleep(0.3)
    assert all(0 < share <= possible for share, possible in shares)
    assert shares[2][0] >= shares[0][0] + 0.4  # what two pauses of 0.3 s allow
    listener.load()  # once more: what was there is not taken away
    time.sleep(max(0.0, began + 1.6 - time.monotonic()))
    assert listener.report(1.0) == 1


def test_bytes_that_came_late_do_not_profit_from_the_time_before(argilla_server: Any) -> None:
    listener = Listener(argilla_server, wave(1.0))
    listener.load("0-0")
    time.sleep(0.6)
    listener.load()
    assert listener.report(1.0) < 0.5


def test_parts_from_several_tabs_are_joined_and_none_counts_twice(argilla_server: Any) -> None:
    listener = Listener(argilla_server)
    listener.load()
    time.sleep(TIME_TO_HEAR)
    assert listener.report(0.3, 0.2) == pytest.approx(0.3)
    assert listener.report(0.3, 0.2) == pytest.approx(0.3)  # a replay, or the other tab
    assert listener.report(0.2, 0.0) == pytest.approx(0.5)
    assert listener.report(0.4, 0.4) == pytest.approx(0.8)
    assert listener.report(0.1, 0.9) == pytest.approx(0.9)
    assert listener.report(1.0) == 1


def test_a_clip_counts_as_sent_while_it_is_being_sent(argilla_server: Any) -> None:
    """A browser leaves the answer open and reads on as it plays."""
    listener = Listener(argilla_server, wave(0.1) + bytes(64_000_000))
    with listener.client.stream("GET", listener.address) as answer:
        next(answer.iter_bytes(1_000_000))
        time.sleep(0.1)
        assert 1 / 64 <= listener.report(1.0) < 1


def test_what_is_no_audio_is_limited_by_what_was_sent_alone(argilla_server: Any) -> None:
    listener = Listener(argilla_server, secrets.token_bytes(1000))
    listener.load("0-499")
    assert listener.report(1.0) == 0.5


# --- the arithmetic of it


NOW = datetime(2026, 11, 29, tzinfo=UTC)


def sent(*parts: tuple[int, int, float]) -> list[listening.Sent]:
    """Parts of a clip of 100 bytes: first byte, the one behind the last, how many seconds ago."""
    return [(start, stop, (NOW - timedelta(seconds=ago)).isoformat()) for start, stop, ago in parts]


@pytest.mark.parametrize(
    ("parts", "share"),
    [
        ([], 0),
        ([(0, 100, 10)], 1),
        ([(0, 100, 5)], 1),
        ([(0, 100, 1)], 0.2),
        ([(0, 100, 0)], 0),
        ([(0, 50, 10)], 0.5),
        ([(0, 50, 10), (50, 100, 1)], 0.7),  # the first half, and what a second allows of the other
        ([(50, 100, 10), (0, 50, 1)], 0.7),
        ([(0, 100, 10), (20, 60, 0), (90, 100, 0)], 1),  # seeking back, or a replay
        ([(0, 1, 60), (0, 100, 1)], 0.21),
        ([(0, 1, 60), (1, 2, 60), (2, 100, 1)], 0.22),
        ([(0, 30, 3), (60, 100, 2.5)], 0.6),
    ],
)
def test_how_much_of_ten_seconds_can_have_been_played(parts: list[Any], share: float) -> None:
    assert listening.playable(sent(*parts), 100, 10.0, NOW) == pytest.approx(share)


def test_a_clock_that_was_set_back_while_no_server_ran_starts_the_time_anew(tmp_path: Path) -> None:
    key = ("space", "ann", "clip")

    async def run(*shares: float) -> list[float]:
        store = listening.Listening(tmp_path / "listening.db")
        for share in shares:
            await store.played(key, 0.0, share, size=100, duration_s=0.1)
            await asyncio.sleep(0.06)
        return [row["share"] for row in await store.heard("space")]

    async def send() -> None:
        store = listening.Listening(tmp_path / "listening.db")
        transfer = await store.begin(key, 0)
        transfer.stop = 100
        await store.end(transfer)

    asyncio.run(send())
    with sqlite3.connect(tmp_path / "listening.db") as db:
        db.execute("UPDATE sent SET at = ?", ((datetime.now(UTC) + timedelta(hours=1)).isoformat(),))
    first, last = asyncio.run(run(1.0, 1.0))
    assert 0 <= first < 0.5
    assert last == 1.0


def test_the_audit_holds_no_credential_and_is_ours_alone(argilla_server: Any, clip: str) -> None:
    argilla_server.annotator.get(clip)
    kept = json.dumps(argilla_server.credentials["users"]["annotator-1"]["api_key"]).strip('"').encode()
    for file in argilla_server.home.glob("listening.db*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert kept not in file.read_bytes()
