"""From a clip's path in a record to where its bytes are, never outside the folder that was named.

A part of a path that is a tar file is a shard, and the rest is the name of one of its members.
"""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections.abc import Collection
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from preference_data.audio import tar_shards
from preference_data.audio.tar_shards import BadShard, Member

_PathReason = Literal["bad_path", "outside_root", "missing", "not_a_file", "empty_file"]
_HeaderReason = Literal["unreadable", "unsupported_format", "bad_sample_rate", "too_many_channels"]
_LengthReason = Literal["unknown_length", "empty_audio", "too_long", "truncated", "too_large"]
_SoundReason = Literal["corrupt", "non_finite", "bad_level", "decoder_crashed", "decoder_hung"]
Reason = Literal[_PathReason, _HeaderReason, _LengthReason, _SoundReason]  # why a clip was refused

ENDINGS = frozenset(
    ".wav .rf64 .w64 .aiff .aif .aifc .au .caf .flac .ogg .oga .opus .mp3 "
    ".m4a .mp4 .mov .3gp .aac .webm .mka .mkv .wma .amr".split()
)
"""Of audio files, in small letters."""
_MAX_PATH, _MAX_NAME = 1024, 255  # characters
_HUB_STORE = re.compile(r"(datasets|models|spaces)--.+")


class ClipBytes(NamedTuple):
    """A clip that came over a network and never was a file. `name` serves messages only."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """Its bytes."""
        return self.content


ClipFile = Path | Member | ClipBytes
"""A file of its own, a member of a tar shard, or bytes."""


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
        raise missing(shard) from None
    except OSError as error:
        raise BadAudio(shard, "unreadable", f"{error.strerror}; check its rights and the disk") from error
    except BadShard as error:
        code: Reason = "missing" if "no member" in str(error) else "unreadable"
        raise BadAudio(shard, code, str(error)) from error


def resolve_inside(root: Path, relative: str) -> Path:
    """The absolute path of a manifest's `relative` path, which must stay below `root`.

    Raises:
        BadAudio: `bad_path` (empty, a URL, over-long, a NUL, not Unicode, a loop of links) or
            `outside_root` (absolute, "..", a link that leaves the root and the Hub snapshot that it is in).
    """
    _refuse_unsafe(root, relative)
    refuse = partial(BadAudio, relative[:_MAX_NAME])
    try:
        resolved = (root / relative).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL, half a surrogate pair
        raise refuse("bad_path", f"is not a path ({error}); mend the manifest") from error
    real = _real(root.absolute())
    if resolved.is_relative_to(real):
        return resolved
    link = (root / relative).parent.resolve() / PurePosixPath(relative).name
    if link.is_relative_to(real) and resolved.parent == _hub_blobs(real):
        return link
    advice = "copy the file into it"
    if resolved.parent.name == "blobs":
        advice = "fetch the data set again by `hf download --local-dir`, which writes files"
    raise refuse("outside_root", f"is a link that leaves {root}; {advice}")


def place(clip: ClipFile, target: Path) -> None:
    """Put the bytes of a clip at `target`, if nothing is there: a link where that can be, else a copy.

    Raises:
        FileNotFoundError: the clip is not there.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(clip, Path):
        target.write_bytes(clip.read())
        return
    try:
        os.link(clip.resolve(), target)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, a file system without hard links, or too many of them
        partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        shutil.copyfile(clip, partial)
        partial.replace(target)


@lru_cache(maxsize=64)
def _hub_blobs(root: Path) -> Path | None:
    """Where the files are that a snapshot in the Hub's cache, `datasets--NAME/snapshots/COMMIT`, links to."""
    for store in root.parents:
        if _HUB_STORE.fullmatch(store.name) and root.is_relative_to(store / "snapshots"):
            return store / "blobs"
    return None


def _refuse_unsafe(root: Path, relative: str) -> None:
    """Refuse a path that is unsafe whatever lies there."""
    refuse = partial(BadAudio, relative[:_MAX_NAME])
    if not PurePosixPath(relative).parts or "://" in relative:
        raise refuse("bad_path", "is empty or a URL; fetch the file and name it by its path below the root")
    if len(relative) > _MAX_PATH or max(map(len, relative.split("/"))) > _MAX_NAME:
        limits = f"{_MAX_PATH}, {_MAX_NAME} in one name"
        raise refuse("bad_path", f"has {len(relative)} characters, the limit is {limits}; shorten it")
    if relative.startswith("/") or re.match(r"[A-Za-z]:[\\/]", relative) or ".." in relative.split("/"):
        raise refuse("outside_root", f"is absolute or holds '..'; make it relative to {root}")


@lru_cache(maxsize=64)
def _real(root: Path) -> Path:
    return root.resolve()


def missing(clip: ClipFile) -> BadAudio:
    """The error for a file that is not there; says which one is whose name differs in letters only."""
    return BadAudio(clip, "missing", f"does not exist; {_alike(Path(str(clip)))}")


def _alike(path: Path) -> str:
    if "\\" in str(path) and Path(str(path).replace("\\", "/")).exists():
        return "it does with '/' for '\\'; mend the manifest"
    for folder, name in reversed([(part.parent, part.name) for part in (path, *path.parents) if part.name]):
        if not (folder / name).exists():
            break
    try:
        names = _names(folder, folder.stat().st_mtime_ns)
    except OSError:
        names = {}
    there = names.get(_letters(name), name)
    if there == name:
        return "check the manifest and the root"
    is_form = unicodedata.normalize("NFC", there) == unicodedata.normalize("NFC", name)
    how = "another Unicode form (NFC or NFD) of its name" if is_form else "capital and small letters"
    return f"{there!r} does, which differs in {how}; mend the manifest or rename it"


@lru_cache(maxsize=16)
def _names(folder: Path, mtime_ns: int) -> dict[str, str]:
    """The names in a folder by their letters, so that many missing files cost one look."""
    return {_letters(entry.name): entry.name for entry in folder.iterdir()}


def _letters(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def list_files(folder: Path, pattern: str = "*", endings: Collection[str] | None = None) -> list[Path]:
    """Files of a folder that a pattern matches, sorted; `endings` are in small letters and match any.

    What systems leave behind is no file: `._a.wav`, `.ipynb_checkpoints/`, `__MACOSX/`.
    """
    return sorted(
        path
        for path in folder.glob(pattern)
        if (endings is None or path.suffix.lower() in endings)
        and not any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)
    )
