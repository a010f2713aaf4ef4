"""Clips in tar files, as WebDataset lays them out: members `key.flac`, `key.json` that share a key.

Each shard is indexed once, by its headers; the index is kept beside it. Reading a member is then one look-up
and one read. Names of members are only ever compared, never used as paths, and nothing is unpacked.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tarfile
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from preference_data.schema import stable_id

log = logging.getLogger(__name__)
_LARGEST = 1 << 29
"""Bytes of one member; audio is read into memory whole."""
_INDEX = np.dtype([("name", "<u8"), ("offset", "<u8"), ("size", "<u8")])
_OPEN = 512
"""Indices kept mapped."""


class BadShard(ValueError):
    """A tar file that cannot be read from, or a member that is not in it."""


class Member(NamedTuple):
    """`size` bytes at `offset` of the file `shard`. `name` serves messages only."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    def read(self) -> bytes:
        """The member's bytes.

        Raises:
            OSError: the shard cannot be read.
            BadShard: it has become shorter since it was indexed.
        """
        with self.shard.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), self.size, self.offset)
        if len(data) < self.size:
            raise BadShard(f"has {len(data)} of the {self.size} bytes of {self.name!r}; fetch it again")
        return data


def find(shard: Path, name: str) -> Member:
    """Where a member of a shard is.

    Raises:
        OSError: the shard cannot be read.
        BadShard: it is not a tar file, is a damaged one, or has no such member.
    """
    stat = shard.stat()
    index = _index_of(shard, stat.st_size, stat.st_mtime_ns)
    key = _fingerprint(name)
    row = int(np.searchsorted(index["name"], np.uint64(key)))
    if row == len(index) or int(index["name"][row]) != key:
        raise BadShard(f"has no member {name!r}; check the manifest")
    return Member(shard, name, int(index["offset"][row]), int(index["size"][row]))


@lru_cache(maxsize=_OPEN)
def _index_of(shard: Path, size: int, mtime_ns: int) -> np.ndarray:
    """The index of a shard, sorted by name: from beside it, else read from the shard and kept there."""
    kept = shard.with_name(f".{shard.name}.{stable_id(size, mtime_ns)}.npy")
    if not kept.exists():
        index = _indexed(shard)
        try:
            _save(index, kept)
        except OSError as error:  # a read-only data set
            log.warning("%s cannot be written (%s): every process indexes %s anew", kept, error, shard)
            return index
    return np.load(kept, mmap_mode="r", allow_pickle=False)


def _save(index: np.ndarray, path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        np.save(file, index)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)
    path.chmod(0o644)


def _indexed(shard: Path) -> np.ndarray:
    """One pass over the headers."""
    names, offsets, sizes = array("Q"), array("Q"), array("Q")
    for member in _files(shard):
        names.append(_fingerprint(member.name))
        offsets.append(member.offset_data)
        sizes.append(member.size)
    index = np.empty(len(names), dtype=_INDEX)
    index["name"], index["offset"], index["size"] = names, offsets, sizes
    index.sort(order="name")
    if (index["name"][1:] == index["name"][:-1]).any():
        raise BadShard("holds two members of the same name; write it again")
    return index


def _files(shard: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar in their order; links, devices and folders are not clips."""
    total, end = shard.stat().st_size, 0
    try:
        with tarfile.open(shard, "r:") as tar:  # "r:" takes no compressed ones, which have no random access
            while (member := tar.next()) is not None:
                if member.size < 0 or member.offset < end:  # tarfile would go round in circles
                    raise BadShard(f"has a damaged header at byte {member.offset}; fetch it again")
                end = member.offset_data
                vars(tar)["members"].clear()  # it would keep them all
                if not member.isreg() or member.issparse():
                    continue
                if member.size > _LARGEST:
                    raise BadShard(f"{member.name!r} has {member.size} bytes, the limit is {_LARGEST}")
                if member.offset_data + member.size > total:
                    raise BadShard(f"stops in the middle of {member.name!r}; fetch it again")
                yield member
    except BadShard:
        raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:  # by damaged numbers
        raise BadShard(f"is not a plain tar file, or is damaged ({error}); fetch it or unpack .gz") from error


def _fingerprint(name: str) -> int:
    """64 bits for a name; `_indexed` refuses the (improbable) shard where two names share them."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "little")


def write_shards(
    folder: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]], *, max_bytes: int = 1 << 28
) -> Iterator[tuple[str, str]]:
    """Write samples into `folder/shard-00000.tar` and so on, each whole or absent.

    Args:
        folder: Where the shards go.
        samples: (key, {"flac": bytes, "json": bytes, ...}); keys are distinct and hold no "." or "/".
        max_bytes: A shard that has reached this size is closed.

    Yields:
        (key, shard's name) of every sample, once its shard is in place.

    Raises:
        ValueError: a key is empty or holds a mark that separates names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys: list[str] = []
    number, waiting = 0, iter(samples)
    sample = next(waiting, None)
    while sample is not None:
        name = f"shard-{number:05d}.tar"
        partial = folder / f".{name}.partial"
        keys = []
        with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
            while sample is not None and tar.offset < max_bytes:
                _add(tar, *sample)
                keys.append(sample[0])
                sample = next(waiting, None)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(folder / name)
        yield from ((key, name) for key in keys)
        number += 1


def _add(tar: tarfile.TarFile, key: str, parts: Mapping[str, bytes]) -> None:
    if not key or any(mark in key for mark in "./\\\0"):
        raise ValueError(f"key {key!r} is empty or holds '.', '/' or a NUL; WebDataset splits names there")
    for ending, data in sorted(parts.items()):
        member = tarfile.TarInfo(f"{key}.{ending}")  # no time, no owner: the same samples, the same bytes
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
