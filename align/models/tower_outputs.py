"""What a frozen audio tower gives for each clip, on disk: computed once for all steps, stages and policies.

    RUN/.tower_outputs/TOWER/ab/abcd....safetensors    outputs (V, d) in the tower's dtype, frames, checksum

TOWER is a digest of the tower's weights and of the kind of device, the file's name one of the clip's bytes
and of how features are made of them (`ClipFeatures.name`). A file appears whole or not at all, and is
believed only if its checksum holds; any other is made again. Beyond the limit nothing is stored; folders of
other towers give way first. Nothing here is part of a stage's result: the folder may be removed at any time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from align.planning.tower_outputs import SMALLEST

log = logging.getLogger(__name__)

FOLDER = ".tower_outputs"
"""In a run folder."""
LIMIT_BYTES = 100_000_000_000
"""Of all towers' outputs of a run, however much room there is."""
SHARE_OF_DISK = 0.1
"""Of what is free that they may take."""
_EPOCH = 1
"""Raise it when a tower computes something else of the same weights and features."""
_STEPS = 100
"""Shares of the limit; a process looks how full the folder is whenever it has written one."""
_ABANDONED_S = 3600
"""Age of a partial file whose writer is taken for dead."""


class Outputs(NamedTuple):
    """`vectors` (V, d): what the tower gives before the projector, for a clip of `n_frames` mel frames."""

    vectors: Tensor
    n_frames: int


class TowerOutputs:
    """The outputs of one tower; several processes may read and write them at once.

    Args:
        folder: of this tower, beside those of others; its name stands for the weights.
        limit: bytes of all towers' outputs together; with W writers they may be W hundredths over it.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._room = 0
        self._is_writing = True

    @classmethod
    def of_run(
        cls, run: Path | None, tower: nn.Module, device: torch.device, limit_gb: float | None = None
    ) -> TowerOutputs | None:
        """Those of a run's `tower`, computed on such a `device`; None without a run, or of a small tower."""
        if run is None or sum(weight.numel() for weight in tower.parameters()) < SMALLEST:
            return None
        limit = _limit_of(run) if limit_gb is None else int(limit_gb * 1e9)
        outputs = cls(run / FOLDER / digest(tower, device), limit)
        outputs.clean()
        return outputs

    def get(self, clip: str) -> Outputs | None:
        """The outputs for a clip by its name; None if they are not there, or damaged."""
        path = self._path(clip)
        try:
            saved = load(path.read_bytes())
            outputs = Outputs(saved["outputs"], int(saved["n_frames"]))
            if torch.equal(saved["sha256"], _checksum(clip, outputs)):
                return outputs
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            log.debug("%s: %r", path, error)
        log.warning("%s is damaged; it is made again", path)
        return None

    def put(self, clip: str, outputs: Outputs) -> None:
        """Store them. A full disk or folder is said once; then nothing more is stored by this process."""
        if not self._is_writing:
            return
        n_frames = torch.tensor(outputs.n_frames)
        vectors = outputs.vectors.contiguous()
        data = save({"outputs": vectors, "n_frames": n_frames, "sha256": _checksum(clip, outputs)})
        try:
            if len(data) > self._room:
                self._room = self._claim(len(data))
            if len(data) > self._room:
                self._stop(f"{self.limit / 1e9:.3g} GB are full")
                return
            self._write(self._path(clip), data)
            self._room -= len(data)
        except OSError as error:
            self._stop(str(error))

    def clean(self) -> None:
        """Mark the folder as used, and remove what killed writers have left."""
        if not self.folder.is_dir():
            return
        with suppress(OSError):  # another user's, which can be read all the same
            os.utime(self.folder)
        for path in self._partial.glob("*"):
            with suppress(OSError):  # or another process was faster
                if time.time() - path.stat().st_mtime > _ABANDONED_S:
                    path.unlink()

    @property
    def _partial(self) -> Path:
        return self.folder / "partial"

    def _path(self, clip: str) -> Path:
        return self.folder / clip[:2] / f"{clip}.safetensors"

    def _write(self, path: Path, data: bytes) -> None:
        """In one step. Not forced to the disk: after a power cut the checksum tells."""
        for folder in (self._partial, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._partial)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _claim(self, needed: int) -> int:
        """Bytes to write until the folder is looked at again.

        Other towers give way, the longest unused first, each once: what cannot be removed stays.
        """
        others = [path for path in self.folder.parent.glob("*") if path != self.folder]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        while (used := _bytes_below(self.folder.parent)) + needed > self.limit:
            if not others:
                return 0
            shutil.rmtree(others.pop(), ignore_errors=True)
        return max(needed, min(self.limit - used, self.limit // _STEPS))

    def _stop(self, why: str) -> None:
        self._is_writing = False
        log.warning(
            "no more outputs of the audio tower are kept in %s: %s. Clips that are not there are encoded "
            "each time; results are the same",
            self.folder,
            why,
        )


def digest(tower: nn.Module, device: torch.device) -> str:
    """Stands for the tower's outputs: all its weights and buffers, their dtypes, and the kind of device."""
    sha = hashlib.sha256(f"{_EPOCH} {device.type}".encode())
    for name, weight in tower.state_dict().items():
        sha.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        sha.update(_as_bytes(weight))
    return sha.hexdigest()[:32]


def _limit_of(run: Path) -> int:
    """Bytes that a run's tower outputs may take: a tenth of what is free or theirs, at most `LIMIT_BYTES`."""
    there = next(path for path in (run, *run.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free + _bytes_below(run / FOLDER)
    return min(LIMIT_BYTES, int(SHARE_OF_DISK * free))


def _bytes_below(folder: Path) -> int:
    """Sizes of all files below a folder, 0 if it is not there; files may come and go meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _checksum(clip: str, outputs: Outputs) -> Tensor:
    """Of the contents, and of whose they are."""
    vectors = outputs.vectors
    sha = hashlib.sha256(f"{clip} {outputs.n_frames} {vectors.dtype} {tuple(vectors.shape)}".encode())
    sha.update(_as_bytes(vectors))
    return torch.frombuffer(bytearray(sha.digest()), dtype=torch.uint8)


def _as_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
