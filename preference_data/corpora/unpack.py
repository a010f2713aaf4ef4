"""Unpack archives of strangers: nothing outside the folder, no links, no devices, bounded size.

Files are written below a hidden folder first. An archive with one bad member leaves nothing behind.
"""

from __future__ import annotations

import gzip
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import IO, NamedTuple

_MAX_FILES = 5_000_000
_MAX_GROWTH, _SPARE_BYTES = 20, 1 << 30  # an archive may become so many times larger, plus this
_MAX_PATH = 1024  # characters
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    NotImplementedError,  # a compression that Python does not know
    FileExistsError,  # a name that is a file and a folder
    NotADirectoryError,
    IsADirectoryError,
)


class BadArchive(ValueError):
    """An archive is damaged, or holds what an archive of audio does not."""


class _Member(NamedTuple):
    """A file in an archive; `content` can be read until the next one is asked for."""

    name: str
    size: int
    content: IO[bytes]


def unpack(archive: Path, folder: Path) -> int:
    """Unpack a .tar.gz, .tgz or .zip into `folder`, over what is there; returns how many files.

    Raises:
        BadArchive: it is damaged, or a member is a link or a device, lies outside, or all are too large;
            nothing was unpacked.
    """
    hidden = folder / f".unpacking-{archive.name}"
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    read = _zipped if archive.suffix == ".zip" else _tarred
    left = archive.stat().st_size * _MAX_GROWTH + _SPARE_BYTES
    count = 0
    try:
        with closing(read(archive)) as members:
            for member in members:
                count, left = count + 1, left - member.size
                if count > _MAX_FILES or left < 0:
                    raise BadArchive(f"{archive}: unpacks to far more than it should; do not use it")
                _write(archive, member, hidden)
        _merge(hidden, folder)
    except _DAMAGE as error:
        raise BadArchive(f"{archive}: is damaged ({error}); delete it and fetch it again") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return count


def unpack_inner(folder: Path, pattern: str) -> None:
    """Unpack every archive in `folder` that `pattern` matches where it lies, and delete it.

    Raises:
        BadArchive: see `unpack`.
    """
    for inner in sorted(folder.glob(pattern)):
        unpack(inner, inner.parent)
        inner.unlink()


def _tarred(archive: Path) -> Generator[_Member, None, None]:
    with gzip.open(archive) as unzipped, tarfile.open(fileobj=unzipped, mode="r|") as tar:
        for member in tar:
            if member.isdir():
                continue
            content = tar.extractfile(member) if member.isreg() else None
            if content is None:
                raise BadArchive(f"{archive}: {member.name!r} is a link or a device; do not use it")
            yield _Member(member.name, member.size, content)
        while unzipped.read(1 << 20):  # to the end, where the checksum is (tarfile's own gzip ignores it)
            pass


def _zipped(archive: Path) -> Generator[_Member, None, None]:
    with zipfile.ZipFile(archive) as zipped:
        for info in zipped.infolist():
            if info.is_dir():
                continue
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                raise BadArchive(f"{archive}: {info.filename!r} is a link or a device; do not use it")
            if info.flag_bits & 1:
                raise BadArchive(f"{archive}: {info.filename!r} is encrypted; unpack it yourself")
            with zipped.open(info) as content:
                yield _Member(info.filename, info.file_size, content)


def _write(archive: Path, member: _Member, folder: Path) -> None:
    parts = member.name.split("/")
    outside = member.name.startswith("/") or ".." in parts or "\\" in member.name or "\0" in member.name
    if outside or not parts[-1] or len(member.name) > _MAX_PATH:
        raise BadArchive(f"{archive}: {member.name[:200]!r} lies outside the folder; do not use it")
    path = folder / member.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        shutil.copyfileobj(member.content, file, 1 << 20)


def _merge(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            final = target / path.relative_to(source)
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, final)
