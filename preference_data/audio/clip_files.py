"""From a clip's path in a record to where its bytes are, never outside the folder that was named.

A part of a path that is a tar file is a shard, and the rest is the name of one of its members.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Literal

from preference_data.audio import tar_shards
from preference_data.audio.tar_shards import BadShard, Member

_PathReason = Literal["bad_path", "outside_root", "missing", "not_a_file", "empty_file"]
_HeaderReason = Literal["unreadable", "unsupported_format", "bad_sample_rate", "too_many_channels"]
_LengthReason = Literal["unknown_length", "empty_audio", "too_long", "truncated", "too_large"]
_SoundReason = Literal["corrupt", "non_finite", "bad_level", "decoder_crashed", "decoder_hung"]
Reason = Literal[_PathReason, _HeaderReason, _LengthReason, _SoundReason]  # why a clip was refused

_MAX_PATH, _MAX_NAME = 1024, 255  # characters

ClipFile = Path | Member
"""A file of its own, or a member of a tar shard."""


class BadAudio(ValueError):
    """An audio file, or a path to one, that is refused; `code` says why, `detail` what to do."""

    def __init__(self, path: ClipFile | str, code: Reason, detail: str) -> None:
        super().__init__(str(path), code, detail)
        self.path, self.code, self.detail = str(path), code, detail

    def __str__(self) -> str:
        return f"{self.path!r}: {self.code}: {self.detail}"


class BadContent(ValueError):
    """What is wrong with a file's content, before it is known which file it is; as `BadAudio`."""

    def __init__(self, code: Reason, detail: str) -> None:
        super().__init__(detail)
        self.code: Reason = code


def find_below(root: Path, path: str) -> ClipFile:
    """Where the bytes of a clip are that a record names by its path below `root`.

    Raises:
        BadAudio: as `resolve_inside`; `missing`, `unreadable` or `truncated` of a shard or its member.
    """
    before, is_inside, name = path.partition(".tar/")
    if is_inside and (shard := _shard(root, f"{before}.tar")):
        _refuse_unsafe(root, path)
        return _member(shard, name)
    return resolve_inside(root, path)


@lru_cache(maxsize=4096)
def _shard(root: Path, relative: str) -> Path | None:
    """The shard of this path below `root`; None where it is a folder. Remembered: it holds many clips."""
    shard = resolve_inside(root, relative)
    return None if shard.is_dir() else shard


def _member(shard: Path, name: str) -> ClipFile:
    try:
        return tar_shards.find(shard, name)
    except FileNotFoundError:
        raise BadAudio(shard, "missing", "does not exist; check the manifest and the root") from None
    except OSError as error:
        raise BadAudio(shard, "unreadable", f"{error.strerror}; check its rights and the disk") from error
    except BadShard as error:
        code: Reason = "missing" if "no member" in str(error) else "unreadable"
        raise BadAudio(shard, code, str(error)) from error


def resolve_inside(root: Path, relative: str) -> Path:
    """The absolute path of a manifest's `relative` path, which must stay below `root`.

    Raises:
        BadAudio: `bad_path` (empty, a URL, over-long, a NUL, not Unicode, a loop of links) or
            `outside_root` (absolute, "..", a link that leaves the root).
    """
    _refuse_unsafe(root, relative)
    refuse = partial(BadAudio, relative[:_MAX_NAME])
    try:
        resolved = (root / relative).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL, half a surrogate pair
        raise refuse("bad_path", f"is not a path ({error}); mend the manifest") from error
    if not resolved.is_relative_to(_real(root.absolute())):
        raise refuse("outside_root", f"is a link that leaves {root}; copy the file into it")
    return resolved


def _refuse_unsafe(root: Path, relative: str) -> None:
    """Refuse a path that is unsafe whatever lies there."""
    refuse = partial(BadAudio, relative[:_MAX_NAME])
    if not PurePosixPath(relative).parts or "://" in relative:
        raise refuse("bad_path", "is empty or a URL; fetch the file and name it by its path below the root")
    if len(relative) > _MAX_PATH or max(map(len, relative.split("/"))) > _MAX_NAME:
        limits = f"{_MAX_PATH}, {_MAX_NAME} in one name"
        raise refuse("bad_path", f"has {len(relative)} characters, the limit is {limits}; shorten it")
    if relative.startswith("/") or ".." in relative.split("/"):
        raise refuse("outside_root", f"is absolute or holds '..'; make it relative to {root}")


@lru_cache(maxsize=64)
def _real(root: Path) -> Path:
    return root.resolve()
