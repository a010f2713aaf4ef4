"""Checkpoints as folders of safetensors files: read and written tensor by tensor, never as a whole.

A 7B checkpoint of 17 GB is so copied with the memory of one file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from align.run_folder.artifacts import read_json, write_json

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
"""As on the Hub."""


class SavedTensors:
    """The tensors in a folder, by name. Pickled weights (.bin) are not looked at: reading them runs code."""

    def __init__(self, folder: Path) -> None:
        """Read the names.

        Raises:
            FileNotFoundError: the folder has no model.safetensors, or not all files that its index names.
        """
        self._files: dict[str, Any] = {}
        for file in _weight_files(folder):
            opened = safe_open(file, framework="pt")
            self._files |= {name: opened for name in opened.keys()}

    @property
    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _weight_files(folder: Path) -> list[Path]:
    """The files of the model itself; a folder may hold others beside them, as Whisper's has fp32 weights."""
    names = ["model.safetensors"]
    if (folder / INDEX).exists():
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    files = [folder / Path(name).name for name in names]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} does not hold {', '.join(missing)}. Download the model's safetensors to it; pickled "
            "weights (*.bin, *.pt) are not read, because reading them runs what is in them"
        )
    return files


def write(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors in the order they come: one file, or numbered ones with an index, as the Hub has them.

    Takes the memory of one file of `shard_bytes` at most (or of one tensor that is larger).
    """
    weight_map: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    n_shards = total = 0

    def flush() -> None:
        nonlocal n_shards
        n_shards += 1
        save_file(shard, folder / f"part-{n_shards}.safetensors", metadata={"format": "pt"})
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor.detach().to("cpu").contiguous()
        weight_map[name] = n_shards + 1
        total += tensor.nbytes
    flush()
    if n_shards == 1:
        (folder / "part-1.safetensors").rename(folder / "model.safetensors")
        return
    names = {i: f"model-{i:05d}-of-{n_shards:05d}.safetensors" for i in range(1, n_shards + 1)}
    for i, name in names.items():
        (folder / f"part-{i}.safetensors").rename(folder / name)
    listed = {name: names[i] for name, i in sorted(weight_map.items())}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": listed})


def weights_sha256(path: Path | str) -> str:
    """One hash over all weight files of a saved model.

    Raises:
        FileNotFoundError: there are none; a model that is only on the Hub must be downloaded first.
    """
    digest = hashlib.sha256()
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{path} holds no *.safetensors. If it is on the Hub, download it to a folder and name that: "
            "what is sampled from must be identified by its weights"
        )
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:  # in blocks: a shard has 5 GB
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
