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
from pathlib import Path
from tempfile import TemporaryDirectory

from preference_data.audio.clip_files import list_files

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


class _Bounds:
    """Limits for the members of an archive."""

    def __init__(self, archive: Path) -> None:
        self.archive = archive
        self.files = 0
        self._left = archive.stat().st_size * _MAX_GROWTH + _SPARE_BYTES

    def take(self, name: str, size: int, is_plain: bool) -> None:
        """Count a file, or raise `BadArchive`; `is_plain`: it is neither a link nor a device."""
        if not is_plain:
            raise BadArchive(f"{self.archive}: {name[:200]!r} is a link or a device; do not use it")
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or len(name) > _MAX_PATH:
            raise BadArchive(f"{self.archive}: {name[:200]!r} lies outside the folder; do not use it")
        self.files, self._left = self.files + 1, self._left - size
        if self.files > _MAX_FILES or self._left < 0:
            raise BadArchive(f"{self.archive}: unpacks to far more than it should; do not use it")


def unpack(archive: Path, folder: Path) -> int:
    """Unpack a .tar.gz, .tgz or .zip into `folder`, over what is there; returns how many files.

    Raises:
        BadArchive: it is damaged, or a member is a link or a device, lies outside, or all are too large;
            nothing was unpacked.
    """
    bounds = _Bounds(archive)
    with TemporaryDirectory(prefix=".unpacking-", dir=folder) as hidden:
        try:
            (_unzip if archive.suffix == ".zip" else _untar)(archive, Path(hidden), bounds)
        except _DAMAGE as error:
            raise BadArchive(f"{archive}: is damaged ({error}); delete it and fetch it again") from error
        _merge(Path(hidden), folder)
    return bounds.files


def unpack_inner(folder: Path, pattern: str) -> None:
    """Unpack every archive in `folder` that `pattern` matches where it lies, and delete it.

    Raises:
        BadArchive: see `unpack`.
    """
    for inner in list_files(folder, pattern):
        unpack(inner, inner.parent)
        inner.unlink()


def _untar(archive: Path, hidden: Path, bounds: _Bounds) -> None:
    def only_files(member: tarfile.TarInfo, to: str) -> tarfile.TarInfo | None:
        if member.isdir():
            return None
        bounds.take(member.name, member.size, member.isreg())
        return tarfile.data_filter(member, to)

    with gzip.open(archive) as unzipped:
        with tarfile.open(fileobj=unzipped, mode="r|") as tar:
            tar.extractall(hidden, filter=only_files)
        while unzipped.read(1 << 20):  # to the end, where the checksum is (tarfile's own gzip ignores it)
            pass


def _unzip(archive: Path, hidden: Path, bounds: _Bounds) -> None:
    with zipfile.ZipFile(archive) as zipped:
        for info in zipped.infolist():
            if not info.is_dir():
                kind = stat.S_IFMT(info.external_attr >> 16)
                bounds.take(info.filename, info.file_size, kind in (0, stat.S_IFREG))
                if info.flag_bits & 1:
                    raise BadArchive(f"{archive}: {info.filename!r} is encrypted; unpack it yourself")
        zipped.extractall(hidden)


def _merge(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            final = target / path.relative_to(source)
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, final)
