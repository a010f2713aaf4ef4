"""The run folder: one folder per stage, whole or absent, with the hashes of what went in and came out.

A stage works in `<run>/.partial-<stage>/` (kept across restarts, so that it can resume) and is renamed
to `<run>/<stage>/` once its manifest is on disk. A fingerprint over config and inputs tells whether
finished or partial work still belongs to the recipe; what does not is kept in `<run>/.stale-<stage>-N/`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from align.run_folder.progress import PROGRESS
from preference_data.dataset.dataset import is_described
from preference_data.store import write_text

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
REWARD = "reward.json"
"""In the folder of a stage that was trained on rewards: the identity of what gave them."""
_MARK = ".fingerprint"
SECONDS = ".seconds"
"""Time spent on unfinished work so far, over all attempts."""
WORKERS = ".workers"
"""The files by which a stage's driver and workers communicate."""
SETTINGS = ".settings.json"
"""What unfinished work is made from: `kind`, `config`, `inputs` and `data`, as its manifest will say."""
SCRATCH = (_MARK, SECONDS, SETTINGS, PROGRESS, WORKERS, "checkpoints")
"""In a stage's folder until it is finished: what lets killed work be taken up again."""
_VERSIONS_OF = ("audio-align", "torch", "transformers", "trl", "peft", "datasets", "ray", "mlflow", "argilla")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False, default=str) + "\n")


def plain_values(value: Any) -> Any:
    """Named tuples as dicts for JSON, all the way down; without this they would be written as lists."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: plain_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(inner) for inner in value]
    return value


class DamagedFile(ValueError):
    """A file of a run folder cannot be read: empty, cut short, or edited by hand."""


_WORDS = {dict: "an object", list: "a list", int: "a whole number"}


def read_json(path: Path, kind: type[dict[Any, Any] | list[Any] | int] = dict) -> Any:
    """Parse a JSON file that holds a value of this kind.

    Raises:
        FileNotFoundError: it is not there.
        DamagedFile: naming the file, what is wrong with it, and what to do.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        what = "" if type(value) is kind else f"does not hold {_WORDS[kind]}"
    except IsADirectoryError:
        what = "is a folder"
    except (ValueError, RecursionError) as error:
        what = "is empty" if path.stat().st_size == 0 else f"is not whole JSON ({error})"
    if what:
        raise damaged(path, what)
    return value


def damaged(path: Path, what: str) -> DamagedFile:
    """The error that a file of a finished stage is damaged, and in which way."""
    return DamagedFile(
        f"{path} {what}: restore it from a copy; or, to make again what it describes, move "
        f"{path.parent} elsewhere and run again"
    )


def read_kept(path: Path, kind: type[dict[Any, Any] | list[Any]] = dict) -> Any:
    """What an earlier attempt left and could be made again; None if it is not there, or damaged."""
    try:
        return read_json(path, kind)
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        log.warning("%s; it is made again", str(error).partition(": restore")[0])
        return None


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Hashes of files by their paths, several at a time: hashing leaves other threads running."""
    files = list(paths)
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(files, pool.map(sha256_file, files), strict=True))


def sha256_json(value: Any) -> str:
    """Hex sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def fsync_tree(folder: Path) -> None:
    """Make every file below a folder, and the folders themselves, durable."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_symlink():
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def commit_folder(partial: Path, final: Path) -> None:
    """Put a finished folder into place, durable once this returns.

    At no moment does a half-deleted folder bear the final name.
    """
    fsync_tree(partial)
    replaced = final.with_name(f".replaced-{final.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    handle = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    shutil.rmtree(replaced, ignore_errors=True)


def foreign_digest(ref: str) -> str:
    """Stands for the contents of a policy or of data from outside the recipe, without reading gigabytes.

    A stage folder has its digest in the manifest; another folder has that of the names, sizes and times of
    its files (hidden ones are caches), a prepared data set by those of its records, which name each clip's
    hash; a file by its contents; a Hub id, or what is not there, stands for itself.
    """
    folder = Path(ref).expanduser()
    if folder.is_file():
        return sha256_file(folder)
    if not folder.is_dir():
        return f"hub:{ref}"
    if (folder / MANIFEST).exists():
        return str(read_manifest(folder)["output_digest"])
    paths = folder.glob("*") if is_described(folder) else folder.rglob("*")
    files = sorted(path for path in paths if path.is_file() and not path.name.startswith("."))
    stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
    return sha256_json([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def git_commit() -> str:
    """The checkout's commit, "+dirty" if changed, "unknown" outside git."""
    here = Path(__file__).parent
    run = ["git", "-C", str(here), "describe", "--always", "--dirty=+dirty", "--abbrev=12"]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """Installed versions of what shapes results."""
    return {name: metadata.version(name) for name in _VERSIONS_OF}


def set_aside(path: Path, stage: str) -> Path:
    """Rename a folder of a stage's earlier work to the next free `.stale-<stage>-N` beside it."""
    taken = {other.name for other in path.parent.glob(f".stale-{stage}-*")}
    n = next(n for n in range(1, len(taken) + 2) if f".stale-{stage}-{n}" not in taken)
    return path.rename(path.with_name(f".stale-{stage}-{n}"))


class StageFolder:
    """Where one stage writes. `path` is the partial folder until `commit`."""

    def __init__(self, run: Path, name: str, fingerprint: str) -> None:
        self.name = name
        self.final = run / name
        self.path = run / f".partial-{name}"
        self.fingerprint = fingerprint
        self.stale: list[Path] = []
        """Where `open` and `commit` have put earlier work that does not fit."""

    def is_resumable(self) -> bool:
        """Whether earlier work of the same fingerprint is in the partial folder."""
        mark = self.path / _MARK
        return mark.is_file() and mark.read_bytes() == self.fingerprint.encode()

    def open(self) -> bool:
        """Prepare the partial folder; returns whether earlier work of this fingerprint is there.

        Other work that is there is set aside.
        """
        if self.is_resumable():
            _drop_torn_line(self.path / METRICS)
            return True
        if self.path.exists():
            if {path.name for path in self.path.iterdir()} <= {_MARK, SECONDS, SETTINGS, PROGRESS}:
                shutil.rmtree(self.path)  # it had not begun
            else:
                self.stale.append(set_aside(self.path, self.name))
        self.path.mkdir(parents=True)
        write_text(self.path / _MARK, self.fingerprint)
        return False

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append metrics of an optimizer step; the tracker and the report read them from here."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def rewind(self, step: int) -> None:
        """Forget metrics after `step`, the one that training starts from: 0 without a checkpoint."""
        path = self.path / METRICS
        if path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def commit(self, manifest: dict[str, Any]) -> None:
        """Hash the outputs, write the manifest and move the folder into place.

        A finished folder of other settings that is there is set aside.
        """
        files = sorted(
            path
            for path in self.path.rglob("*")
            if path.is_file() and path.relative_to(self.path).parts[0] not in (*SCRATCH, MANIFEST)
        )
        outputs = {str(path.relative_to(self.path)): digest for path, digest in sha256_files(files).items()}
        write_json(
            self.path / MANIFEST,
            {
                "stage": self.name,
                "fingerprint": self.fingerprint,
                **manifest,
                **({"reward": read_json(self.path / REWARD)} if (self.path / REWARD).exists() else {}),
                "output_digest": sha256_json(outputs),
                "outputs": outputs,
                "sizes": {name: (self.path / name).stat().st_size for name in outputs},
            },
        )
        if self.final.exists():
            fsync_tree(self.path)  # before the other is moved: at any moment one of the two is whole
            self.stale.append(set_aside(self.final, self.name))
        commit_folder(self.path, self.final)
        self.remove_scratch()

    def remove_scratch(self) -> None:
        """Remove from a finished folder what only unfinished work needs; a kill may have left it."""
        for path in (self.final / name for name in SCRATCH):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file; lines torn by a kill are left out."""
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def _drop_torn_line(path: Path) -> None:
    """Remove what follows the last line's end, so that the next row does not continue it."""
    if path.exists() and not (text := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)


class _Manifest(BaseModel):
    """What of a manifest others rely on; older ones lack some of it."""

    output_digest: str
    fingerprint: str = ""
    outputs: dict[str, str] = {}
    sizes: dict[str, int] = {}
    inputs: dict[str, str] = {}
    data: dict[str, str] = {}
    config: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    seconds: float = 0.0
    peak_memory_mb: float = 0.0


def read_manifest(stage: Path) -> dict[str, Any]:
    """The manifest of a finished stage folder.

    Raises:
        FileNotFoundError: the stage has not finished there.
        DamagedFile: the manifest is not whole.
    """
    path = stage / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"{stage} is not a finished stage: it has no {MANIFEST}")
    manifest: dict[str, Any] = read_json(path)
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise damaged(path, f"is not a manifest ({where}: {error.errors()[0]['msg'].lower()})") from None
    return manifest


def damage(stage: Path, manifest: dict[str, Any], *, by_hash: bool = False) -> list[str]:
    """Files of a finished stage that are missing or cut short; with `by_hash` all that have changed."""
    wrong = []
    for name, digest in manifest.get("outputs", {}).items():
        path, size = stage / name, manifest.get("sizes", {}).get(name)
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif size is not None and path.stat().st_size != size:
            wrong.append(f"{name} has {path.stat().st_size:,} bytes, not {size:,}")
        elif by_hash and sha256_file(path) != digest:
            wrong.append(f"{name} has other contents than when it was written")
    if by_hash and manifest["output_digest"] != sha256_json(manifest.get("outputs", {})):
        wrong.append(f"{MANIFEST} has other hashes than when it was written")
    return wrong


class FullDisk(RuntimeError):
    """There is no space left; what was saved is kept."""


_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "database or disk is full")


def full_disk(error: BaseException, folder: Path) -> str | None:
    """The line that says which disk is full, if this is the error. Libraries wrap it, so its words tell."""
    if not any(words in str(error) for words in _FULL):
        return None
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists()).resolve()
    mount = next(path for path in (there, *there.parents) if path.is_mount())
    disk = shutil.disk_usage(there)
    free = f"{disk.free / 1e6:,.1f} of {disk.total / 1e6:,.1f} MB are free"
    return (
        f"no space left on the disk of {folder} ({mount}): {free}. What was saved is kept; free some space, "
        "or move the folder to a larger disk, and run again"
    )


class NotThisRun(RuntimeError):
    """The run folder belongs to something else; nothing was run."""


class RunIsBusy(RuntimeError):
    """Another process works in this run folder."""


def holder(run: Path) -> str | None:
    """The id of the process that works in this run folder, if any."""
    if not (run / ".lock").exists():
        return None
    with (run / ".lock").open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "?"
    return None


@contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """Hold the run folder's lock; the system releases it even if this process is killed.

    Raises:
        RunIsBusy: naming the folder and the process that holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunIsBusy(
                f"{run} is in use by process {file.read().strip() or '?'}; wait for it to finish, "
                "stop it, or choose another folder with --out"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class Waiting(Exception):
    """The stage goes on when people have done their part; running it again looks whether they have.

    `done` of `wanted` judgements are there; the message says where and how people work.
    """

    def __init__(self, message: str, *, done: int, wanted: int) -> None:
        super().__init__(message)
        self.done = done
        self.wanted = wanted


class Interrupted(KeyboardInterrupt):
    """The stage stopped on request; what it saved lets it resume."""


stop_requested = threading.Event()
"""Set by the first SIGINT, SIGTERM or SIGHUP. A loop that can save and resume polls it in `heeding_stop`."""
_heeded = threading.Event()


@contextmanager
def heeding_stop() -> Iterator[threading.Event]:
    """Promise to poll `stop_requested`: the first signal then only sets it, the second interrupts.

    On a request: save a checkpoint, then raise `Interrupted`. Outside this block the first signal
    already raises it, wherever the stage is.
    """
    _heeded.set()
    try:
        yield stop_requested
    finally:
        _heeded.clear()


def is_stop_heeded() -> bool:
    """Whether the running code polls `stop_requested`."""
    return _heeded.is_set()
