"""Downloads from a real server on this machine, with its failures; archives of friends and of strangers."""

import fcntl
import hashlib
import io
import json
import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from preference_data.corpora import fetch
from preference_data.corpora.catalog import CARDS, download
from preference_data.corpora.fetch import DownloadFailed, RemoteFile
from preference_data.corpora.published import audiocaps
from preference_data.corpora.published.recording import BadCorpus
from preference_data.corpora.unpack import BadArchive, unpack, unpack_inner
from tests.http_servers import running

CONTENT = bytes(range(256)) * 8_000  # 2 MB


class Server(ThreadingHTTPServer):
    """Serves `files` with Range and ETag, and misbehaves as told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {"/a.bin": CONTENT}
        self.cut_after: list[int] = []
        """Bytes after which the next responses break off."""
        self.failing = 0
        """How many of the next requests are answered 503."""
        self.retry_after: str | None = None
        self.etag: str | None = '"one"'
        self.kind = "application/octet-stream"
        self.seen: list[tuple[str, str | None, int]] = []
        """Path, Range and status of every request."""

    def handle_error(self, *args: object) -> None:
        """Clients that go away are what the tests are about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, path = self.server, self.path.split("?")[0]
        wanted = self.headers.get("Range")
        if path.startswith("/redirected"):
            self.send_response(302)
            self.send_header("Location", path.removeprefix("/redirected"))
            self.end_headers()
            return
        body = server.files.get(path)
        status = 404 if body is None else 200
        if server.failing:
            server.failing, status, body = server.failing - 1, 503, None
        first = 0
        if body is not None and wanted and self.headers.get("If-Range") in (None, server.etag):
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
            status = 206 if first < len(body) else 416
        server.seen.append((path, wanted, status))
        self.send_response(status)
        if body is not None:
            rest = body[first:] if status != 416 else b""
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            if status == 416:
                self.send_header("Content-Range", f"bytes */{len(body)}")
            if server.etag:
                self.send_header("ETag", server.etag)
            self.send_header("Content-Type", server.kind)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            if server.cut_after:
                rest = rest[: server.cut_after.pop(0)]
            self.wfile.write(rest)
        else:
            if server.retry_after:
                self.send_header("Retry-After", server.retry_after)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    with running(Server()) as one:
        yield one


def remote(server: Server, **more: object) -> RemoteFile:
    return RemoteFile(**{"url": f"{server.url}/a.bin", "max_gb": 0.01, **more})  # type: ignore[arg-type]


def get(file: RemoteFile, folder: Path) -> Path:
    return fetch.fetch(file, folder, wait_s=0.01)


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_file_comes_whole_once_through_a_redirect_and_is_told_of(server, tmp_path):
    told: list[tuple[str, int, int]] = []
    file = remote(
        server, url=f"{server.url}/redirected/a.bin", checksum=f"md5:{hashlib.md5(CONTENT).hexdigest()}"
    )
    path = fetch.fetch(file, tmp_path / "new", on_bytes=lambda *now: told.append(now))
    assert path.read_bytes() == CONTENT
    assert told[-1] == ("a.bin", len(CONTENT), len(CONTENT))
    assert left_behind(path.parent) == []
    requests = len(server.seen)
    assert get(file, path.parent) == path
    assert len(server.seen) == requests  # nothing is asked for twice


def test_a_broken_connection_is_resumed_where_it_broke(server, tmp_path):
    server.cut_after = [700_000, 500_000]
    assert get(remote(server), tmp_path).read_bytes() == CONTENT
    assert [(wanted, status) for _, wanted, status in server.seen] == [
        (None, 200),
        ("bytes=700000-", 206),
        ("bytes=1200000-", 206),
    ]


def test_a_killed_download_goes_on_in_the_next_process_but_not_with_another_file(server, tmp_path):
    server.cut_after = [700_000] + [0] * 20
    with pytest.raises(DownloadFailed, match=r"gave up after 6 attempts. What came is kept"):
        get(remote(server), tmp_path)
    assert (tmp_path / ".a.bin.part").stat().st_size == 700_000
    assert not (tmp_path / "a.bin").exists()
    server.cut_after = []
    server.files["/a.bin"] = changed = CONTENT[::-1]
    server.etag = '"two"'
    assert get(remote(server), tmp_path).read_bytes() == changed  # and no mixture of both
    assert server.seen[-1][1:] == ("bytes=700000-", 200)


def test_without_etag_or_checksum_nothing_is_continued(server, tmp_path):
    server.etag, server.cut_after = None, [700_000]
    assert get(remote(server), tmp_path).read_bytes() == CONTENT
    assert [wanted for _, wanted, _ in server.seen] == [None, None]
    server.cut_after = [700_000]
    (tmp_path / "a.bin").unlink()
    checked = remote(server, checksum=f"sha256:{hashlib.sha256(CONTENT).hexdigest()}")
    assert get(checked, tmp_path).read_bytes() == CONTENT
    assert server.seen[-1][1:] == ("bytes=700000-", 206)


def test_a_part_that_is_whole_already_is_taken(server, tmp_path):
    (tmp_path / ".a.bin.part").write_bytes(CONTENT)
    state = {"url": f"{server.url}/a.bin", "validator": '"one"'}
    (tmp_path / ".a.bin.part.json").write_text(json.dumps(state))
    assert get(remote(server), tmp_path).read_bytes() == CONTENT
    assert [status for _, _, status in server.seen] == [416]


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.failing = 3
    assert get(remote(server), tmp_path).read_bytes() == CONTENT
    assert [status for _, _, status in server.seen] == [503, 503, 503, 200]


def test_a_server_that_asks_to_wait_is_left_alone_for_as_long(server, tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(fetch, "time", SimpleNamespace(sleep=waits.append))
    server.failing, server.retry_after = 2, "7"
    assert get(remote(server), tmp_path).read_bytes() == CONTENT
    assert waits == [7, 7]


def test_what_is_there_is_checked_too(server, tmp_path):
    (tmp_path / "a.bin").write_bytes(CONTENT[:-1])
    file = remote(server, checksum=f"sha256:{hashlib.sha256(CONTENT).hexdigest()}")
    with pytest.raises(DownloadFailed, match=r"a\.bin: is there, but its sha256 is [0-9a-f]{64}.*Remove it"):
        get(file, tmp_path)
    assert server.seen == []
    (tmp_path / "a.bin").unlink()
    assert get(file, tmp_path).read_bytes() == CONTENT


def test_a_file_that_another_process_finishes_in_between_is_left_whole(server, tmp_path, monkeypatch):
    """Between opening the part and locking it, the other process puts it in place and lets the lock go."""
    lock = fcntl.flock

    def slow(file, how):
        if not (tmp_path / "a.bin").exists():
            (tmp_path / ".a.bin.part").write_bytes(CONTENT[:1000])
            (tmp_path / ".a.bin.part").rename(tmp_path / "a.bin")
        return lock(file, how)

    monkeypatch.setattr(fetch.fcntl, "flock", slow)
    assert get(remote(server), tmp_path).read_bytes() == CONTENT[:1000]
    assert server.seen == []
    assert left_behind(tmp_path) == []


def test_another_checksum_is_refused_and_nothing_is_kept(server, tmp_path):
    with pytest.raises(DownloadFailed, match=r"md5 is [0-9a-f]{32}, its publisher says 00"):
        get(remote(server, checksum="md5:00"), tmp_path)
    assert list(tmp_path.glob("*a.bin*")) == []


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"max_gb": 0.001}, "application/zip", "has 0.0 GB, more than the 0.001 expected"),
        ({}, "text/html; charset=utf-8", "is a web page, not a.bin; open it in a browser"),
        (
            {"url": "/gone"},
            "application/zip",
            "the server answers 404 Not Found; look at the corpus' home page",
        ),
    ],
)
def test_what_is_not_the_file_is_refused_at_once(server, tmp_path, more, kind, message):
    server.kind = kind
    more = {name: server.url + value if name == "url" else value for name, value in more.items()}
    with pytest.raises(DownloadFailed, match=message):
        get(remote(server, **more), tmp_path)
    assert len(server.seen) == 1
    assert not (tmp_path / "a.bin").exists()


def test_a_second_process_does_not_fetch_the_same_file(server, tmp_path):
    with (tmp_path / ".a.bin.part").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DownloadFailed, match="another process is fetching it"):
            get(remote(server), tmp_path)


# ------------------------------------------------------------------- archives


def tar_bytes(*members: tuple[str, bytes | tarfile.TarInfo]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tuple[str, tarfile.TarInfo]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def zip_bytes(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in members:
            zipped.writestr(name, content)
    return file.getvalue()


def test_parts_are_fetched_unpacked_and_not_fetched_again(server, tmp_path):
    server.files |= {
        "/x.tar.gz": tar_bytes(("x/1.wav", b"one"), ("x/deep/2.wav", b"two")),
        "/y.zip": zip_bytes(("x/3.wav", b"three")),
        "/z.csv": b"a,b\n",
    }
    names = ("x.tar.gz", "y.zip", "z.csv")
    files = {name: (RemoteFile(f"{server.url}/{name}", 0.01),) for name in names}
    card = CARDS["clothoaqa"].model_copy(update={"files": files})
    assert download(card, tmp_path, ["x.tar.gz"]) == ""
    assert (tmp_path / "x/deep/2.wav").read_bytes() == b"two"
    assert not (tmp_path / "x/3.wav").exists()
    download(card, tmp_path)
    assert (tmp_path / "x/3.wav").read_bytes() == b"three"
    assert (tmp_path / "z.csv").read_bytes() == b"a,b\n"
    download(card, tmp_path)
    assert [path for path, _, _ in server.seen] == ["/x.tar.gz", "/y.zip", "/z.csv"]
    assert left_behind(tmp_path) == [".fetched"]
    with pytest.raises(BadCorpus, match="no part 'w'; there are x.tar.gz, y.zip, z.csv"):
        download(card, tmp_path, ["w"])


def link_in_zip(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return (
        content[:middle]
        + bytes(255 - byte for byte in content[middle : middle + 40])
        + content[middle + 40 :]
    )


HOSTILE = {
    "above.tar.gz": (tar_bytes(("ok", b"1"), ("../evil", b"2")), "'../evil' lies outside"),
    "deep.tar.gz": (tar_bytes(("ok", b"1"), ("a/../../evil", b"2")), "lies outside"),
    "absolute.tar.gz": (tar_bytes(("ok", b"1"), ("/tmp/evil", b"2")), "lies outside"),
    "symlink.tar.gz": (tar_bytes(("ok", b"1"), special("l", tarfile.SYMTYPE, "/etc")), "'l' is a link"),
    "hardlink.tar.gz": (tar_bytes(("ok", b"1"), special("l", tarfile.LNKTYPE, "ok")), "'l' is a link"),
    "device.tar.gz": (tar_bytes(("ok", b"1"), special("d", tarfile.CHRTYPE)), "'d' is a link or a device"),
    "fifo.tar.gz": (tar_bytes(("ok", b"1"), special("p", tarfile.FIFOTYPE)), "is a link or a device"),
    "above.zip": (zip_bytes(("ok", b"1"), ("../evil", b"2")), "lies outside"),
    "windows.zip": (zip_bytes(("ok", b"1"), ("..\\evil", b"2")), "lies outside"),
    "symlink.zip": (zip_bytes(("ok", b"1"), (link_in_zip("l"), b"/etc/passwd")), "'l' is a link"),
    "file-as-folder.tar.gz": (tar_bytes(("ok", b"1"), ("ok/evil", b"2")), "is damaged"),
    "cut.tar.gz": (tar_bytes(("ok", b"1"), ("more", os.urandom(50_000)))[:20_000], "is damaged"),
    "flipped.tar.gz": (flipped(tar_bytes(("ok", b"1"), ("more", os.urandom(50_000)))), "is damaged"),
    "flipped.zip": (flipped(zip_bytes(("ok", b"1"), ("more", bytes(range(256)) * 200))), "is damaged"),
    "no.zip": (b"<html>", "is damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_leaves_nothing_behind(name, tmp_path):
    content, message = HOSTILE[name]
    folder = tmp_path / "corpus"
    folder.mkdir()
    archive = folder / name
    archive.write_bytes(content)
    with pytest.raises(BadArchive, match=message):
        unpack(archive, folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["corpus", name]


def test_an_archive_that_grows_too_much_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("preference_data.corpora.unpack._SPARE_BYTES", 1000)
    archive = tmp_path / "bomb.tar.gz"
    archive.write_bytes(tar_bytes(*((f"{n}.wav", bytes(100_000)) for n in range(10))))
    with pytest.raises(BadArchive, match="unpacks to far more than it should"):
        unpack(archive, tmp_path)
    assert os.listdir(tmp_path) == ["bomb.tar.gz"]


def test_archives_inside_an_archive_are_unpacked_where_they_lie(tmp_path):
    inner = tar_bytes(("train/S0002/a.wav", b"sound"))
    archive = tmp_path / "outer.tgz"
    archive.write_bytes(tar_bytes(("data_aishell/wav/S0002.tar.gz", inner)))
    assert unpack(archive, tmp_path) == 1
    unpack_inner(tmp_path, "data_aishell/wav/*.tar.gz")
    assert (tmp_path / "data_aishell/wav/train/S0002/a.wav").read_bytes() == b"sound"
    assert not (tmp_path / "data_aishell/wav/S0002.tar.gz").exists()


# ----------------------------------------------------------- whole downloads


def test_every_card_has_a_bound_for_each_file_and_names_that_are_distinct():
    for card in CARDS.values():
        names = [file.name for files in card.files.values() for file in files]
        assert len(set(names)) == len(names)
        assert all(file.max_gb > 0 for files in card.files.values() for file in files)
        assert all(file.url.startswith("https://") for files in card.files.values() for file in files)


def test_where_only_the_user_can_fetch_the_audio_it_says_how(server, tmp_path):
    parts = ("train", "val", "test")
    server.files |= {f"/{part}.csv": b"audiocap_id,youtube_id,start_time,caption\n" for part in parts}
    files = {part: (RemoteFile(f"{server.url}/{part}.csv", 0.1),) for part in parts}
    told = download(CARDS["audiocaps"].model_copy(update={"files": files}), tmp_path)
    assert f"{tmp_path}/audio/{{youtube_id}}.wav" in told
    assert f"align data prepare audiocaps --from {tmp_path}" in told
    assert list(audiocaps.read(tmp_path)) == []


def test_what_is_packed_by_seven_zip_is_named_until_it_is_unpacked(tmp_path):
    clotho = CARDS["clotho"].model_copy(update={"files": {"validation": (), "evaluation": ()}})
    (tmp_path / "validation").mkdir()
    told = download(clotho, tmp_path)
    assert told.split("\n")[1:] == [f"  7z x -o{tmp_path} {tmp_path}/clotho_audio_evaluation.7z"]
    (tmp_path / "evaluation").mkdir()
    assert download(clotho, tmp_path) == ""
