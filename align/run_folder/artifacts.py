"""The run folder: one folder per stage, whole or absent, with the hashes of what went in and came out.

A stage works in `<run>/.partial-<stage>/` (kept across restarts, so that it can resume) and is renamed
to `<run>/<stage>/` once its manifest is on disk. A fingerprint over config and inputs tells whether
finished or partial work still belongs to the recipe.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from preference_data.dataset.dataset import is_described
from preference_data.store import write_text

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
SECONDS = ".seconds"
"""Time spent on unfinished work so far, over all attempts."""
_VERSIONS_OF = ("audio-align", "torch", "transformers", "trl", "peft", "datasets", "ray", "mlflow", "argilla")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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

    A stage folder has its digest in the manifest; another folder is told by names, sizes and times of
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
    found = folder.glob("*") if is_described(folder) else folder.rglob("*")
    files = sorted(path for path in found if path.is_file() and not path.name.startswith("."))
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


class StageFolder:
    """Where one stage writes. `path` is the partial folder until `commit`."""

    def __init__(self, run: Path, name: str, fingerprint: str) -> None:
        self.name = name
        self.final = run / name
        self.path = run / f".partial-{name}"
        self.fingerprint = fingerprint

    def is_done(self) -> bool:
        """Whether a finished folder of the same fingerprint is in place."""
        manifest = self.final / MANIFEST
        return manifest.exists() and read_json(manifest)["fingerprint"] == self.fingerprint

    def open(self) -> bool:
        """Prepare the partial folder; returns whether earlier work of this fingerprint is there."""
        mark = self.path / ".fingerprint"
        if mark.exists() and mark.read_text(encoding="utf-8") == self.fingerprint:
            return True
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        write_text(mark, self.fingerprint)
        return False

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append metrics of an optimizer step; the tracker and the report read them from here."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def rewind(self, step: int) -> None:
        """Forget metrics after `step`, the one a resumed training starts from."""
        path = self.path / METRICS
        if path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def commit(self, manifest: dict[str, Any]) -> None:
        """Hash the outputs, write the manifest and move the folder into place."""
        ours = {self.path / name for name in (".fingerprint", SECONDS, MANIFEST)}
        outputs = {
            str(path.relative_to(self.path)): sha256_file(path)
            for path in sorted(self.path.rglob("*"))
            if path.is_file() and path not in ours
        }
        write_json(
            self.path / MANIFEST,
            {
                "stage": self.name,
                "fingerprint": self.fingerprint,
                **manifest,
                "output_digest": sha256_json(outputs),
                "outputs": outputs,
            },
        )
        commit_folder(self.path, self.final)
        for name in (".fingerprint", SECONDS):  # until now they let a killed commit be taken up again
            (self.final / name).unlink(missing_ok=True)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file; a torn last line (killed while writing) is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_manifest(stage: Path) -> dict[str, Any]:
    """The manifest of a finished stage folder.

    Raises:
        FileNotFoundError: the stage has not finished there.
    """
    path = stage / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"{stage} is not a finished stage: it has no {MANIFEST}")
    manifest: dict[str, Any] = read_json(path)
    return manifest


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
    """The stage stopped because it was asked to; what it saved lets it resume."""


stop_requested = threading.Event()
"""Set by the first SIGINT or SIGTERM. Loops that can save and resume poll it inside `heeding_stop`."""
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
