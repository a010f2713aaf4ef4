"""The /media routes of a real server: who may store and hear clips, odd paths, ranges, who has listened."""

import hashlib
import json
import os
import socket
import stat
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

CLIP = bytes(range(256)) * 400  # 102,400 bytes: more than one chunk; the front never looks inside
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
    assert {"private", "immutable"} <= set(headers["cache-control"].split(", "))
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


def heard(server: Any, place: str) -> list[dict[str, Any]]:
    return server.owner.get(f"/media/{place}/heard").json()["heard"]


def test_every_greater_share_is_kept_with_the_time_it_was_reached(argilla_server: Any, place: str) -> None:
    name = argilla_server.add_user(workspace=place)
    argilla_server.owner.put(f"/media/{place}/{NAME}", content=CLIP)
    annotator, address = argilla_server.client(name), f"/media/{place}/{NAME}/heard"
    annotator.get(f"/media/{place}/{NAME}")

    assert annotator.post(address, params={"share": 0.5}).status_code == 204
    first = heard(argilla_server, place)
    assert [(one["annotator"], one["clip"], one["share"]) for one in first] == [(name, NAME[:64], 0.5)]
    for share in (0.25, 0.5):
        annotator.post(address, params={"share": share})
    assert heard(argilla_server, place) == first  # neither more nor later
    annotator.post(address, params={"share": 0.75})
    kept, last = heard(argilla_server, place)
    assert kept == first[0]
    assert last["share"] == 0.75
    assert last["at"] > first[0]["at"]
    assert last["at"].endswith("+00:00")


@pytest.mark.parametrize(
    "query", ["", "share=", "share=one", "share=NaN", "share=inf", "share=1.01", "share=-0.1"]
)
def test_a_report_that_is_no_share_is_refused(argilla_server: Any, clip: str, query: str) -> None:
    before = heard(argilla_server, "audio")
    assert argilla_server.annotator.post(f"{clip}/heard?{query}").status_code == 400
    assert heard(argilla_server, "audio") == before


def test_only_clips_that_are_there_are_heard(argilla_server: Any) -> None:
    address = f"/media/audio/{'0' * 64}.wav/heard"
    assert argilla_server.annotator.post(address, params={"share": 1}).status_code == 404


def test_no_more_counts_as_heard_than_was_sent(argilla_server: Any, place: str) -> None:
    name = argilla_server.add_user(workspace=place)
    argilla_server.owner.put(f"/media/{place}/{NAME}", content=CLIP)
    annotator, address = argilla_server.client(name), f"/media/{place}/{NAME}"

    def shares(*parts: str) -> list[float]:
        for part in parts:
            annotator.get(address, headers={"Range": part})
        assert annotator.post(f"{address}/heard", params={"share": 1.0}).status_code == 204
        return [row["share"] for row in heard(argilla_server, place)]

    annotator.head(address)
    assert shares() == [0]
    assert shares("bytes=0-25599", "bytes=10-9999", "bytes=0-25599") == [0, 0.25]  # each byte counts once
    assert shares("bytes=51200-102399") == [0, 0.25, 0.75]
    assert shares("bytes=25600-51199")[-1] == 1


def test_a_clip_counts_as_sent_while_it_is_being_sent(argilla_server: Any, place: str) -> None:
    """A browser leaves the answer open and reads on as it plays."""
    name, content = argilla_server.add_user(workspace=place), bytes(64_000_000)
    address = f"/media/{place}/{hashlib.sha256(content).hexdigest()}.wav"
    argilla_server.owner.put(address, content=content)
    annotator = argilla_server.client(name)
    with annotator.stream("GET", address) as answer:
        next(answer.iter_bytes(1_000_000))
        assert annotator.post(f"{address}/heard", params={"share": 1.0}).status_code == 204
    (row,) = heard(argilla_server, place)
    assert 1 / 64 <= row["share"] < 1


def test_when_a_clip_was_first_sent_is_kept(argilla_server: Any, place: str) -> None:
    name = argilla_server.add_user(workspace=place)
    argilla_server.owner.put(f"/media/{place}/{NAME}", content=CLIP)
    annotator, address = argilla_server.client(name), f"/media/{place}/{NAME}"
    annotator.head(address)
    annotator.post(f"{address}/heard", params={"share": 1.0})
    began = datetime.now(UTC)
    annotator.get(address, headers={"Range": "bytes=0-51199"})
    annotator.post(f"{address}/heard", params={"share": 1.0})
    between = datetime.now(UTC)
    annotator.get(address)
    annotator.post(f"{address}/heard", params={"share": 1.0})
    rows = heard(argilla_server, place)
    assert [(row["annotator"], row["clip"], row["share"]) for row in rows] == [
        (name, NAME[:64], share) for share in (0, 0.5, 1)
    ]
    (since,) = {datetime.fromisoformat(row["since"]) for row in rows}
    assert began - timedelta(milliseconds=1) <= since <= between
    assert annotator.get(f"/media/{place}/heard").status_code == 403


def test_the_audit_holds_no_credential_and_is_ours_alone(argilla_server: Any, clip: str) -> None:
    argilla_server.annotator.get(clip)
    kept = json.dumps(argilla_server.credentials["users"]["annotator-1"]["api_key"]).strip('"').encode()
    for file in argilla_server.home.glob("listening.db*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert kept not in file.read_bytes()
