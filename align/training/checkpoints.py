"""Checkpoints that are whole or absent, a resume that loads them exactly, and the policy that comes of them.

    checkpoints/frozen/        weights that do not learn, written once (not with low-rank updates)
    checkpoints/checkpoint-8/  the weights that learn, optimizer, schedule, random states: the one to resume
    checkpoints/candidate-4/   the weights of an earlier one, where the best is chosen in the end

The folder goes when its stage is finished (see `StageFolder.commit`). With several processes all write into
one staged folder; when the last is done, each hashes its share of the files, and rank 0 seals and renames. A
checkpoint of DeepSpeed's is pickles: only folders that we sealed are ever loaded, and its `latest` file is
one of the sealed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2AudioProcessor

from align.models import shards
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.model import hub_name
from align.run_folder.artifacts import (
    MANIFEST,
    commit_folder,
    fsync_tree,
    read_json,
    sha256_files,
    sha256_json,
    write_json,
)
from align.training import processes
from align.training.strategies import Strategy
from align.training.tuning import merged, merged_weights

log = logging.getLogger(__name__)
Load = Callable[[Path | str], PreTrainedModel]
"""Loads a policy, or a reward model, from a saved one or from the policy that training starts from."""
STAGING = ".partial-"
"""How names of folders begin that are not sealed yet, or about to be removed."""
FROZEN = "frozen"
TOKENS = "tokens_seen.json"
"""In a checkpoint: TRL's count of tokens, which its resume would start anew."""
_FACTS = {"strategy", "workers", "frozen"}
"""In a checkpoint's manifest beside its files: what decides whether a training can take it up."""
_NAME = re.compile(r"(checkpoint|candidate)-(\d+)")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_WEIGHTS = ("*.safetensors", shards.INDEX, "config.json", "generation_config.json", _ADAPTER[0])
"""What of a checkpoint a candidate keeps."""


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; nothing was stepped with it."""


class CannotResume(RuntimeError):
    """A checkpoint was written in a way that this training cannot take up."""


# -------------------------------------------------------------------------- folders


def seal(partial: Path, final: Path, facts: dict[str, Any]) -> None:
    """List a finished checkpoint's files with their hashes beside `facts`, then move it into place.

    Called by all ranks, each with what it has written durable by the time the folder is renamed.
    """
    processes.barrier()
    fsync_tree(partial)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    hashes = processes.gather(sha256_files(files[processes.rank() :: processes.world_size()]))
    if processes.is_first():
        by_name = {str(path.relative_to(partial)): digest for part in hashes for path, digest in part.items()}
        write_json(partial / MANIFEST, {**facts, "files": dict(sorted(by_name.items()))})
        commit_folder(partial, final)
    processes.barrier()


def manifest_of(checkpoint: Path) -> dict[str, Any] | None:
    """A checkpoint's manifest; None if it is missing or damaged."""
    try:
        manifest: dict[str, Any] = read_json(checkpoint / MANIFEST)
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest.get("files"), dict) else None


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of a sealed checkpoint is there and unchanged."""
    manifest = manifest_of(checkpoint)
    if manifest is None:
        return False
    expected = {checkpoint / name: digest for name, digest in manifest["files"].items()}
    return bool(expected) and all(path.is_file() for path in expected) and sha256_files(expected) == expected


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not named checkpoint-<step> or candidate-<step>")
    return int(match[2])


def checkpoints(folder: Path) -> list[Path]:
    """Sealed checkpoints by step; by name, never by file time (clocks jump)."""
    return _sealed(folder, "checkpoint")


def candidates(folder: Path) -> list[Path]:
    """The checkpoints whose policies can be published, by step: `candidate-` folders and the last one."""
    by_step = {step_of(path): path for kind in ("candidate", "checkpoint") for path in _sealed(folder, kind)}
    return [by_step[step] for step in sorted(by_step)]


def _sealed(folder: Path, kind: str) -> list[Path]:
    paths = [path for path in folder.glob(f"{kind}-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in paths if (path / MANIFEST).exists()), key=step_of)


def newest(folder: Path) -> Path | None:
    """The latest whole checkpoint, passing over damaged ones with a warning."""
    for path in reversed(checkpoints(folder)):
        if is_whole(path) and (manifest_of(path) or {}).keys() >= _FACTS:
            return path
        log.warning("%s is damaged (a file is missing or changed); it is not resumed from", path)
    return None


def resume_point(folder: Path) -> Path | None:
    """The checkpoint to resume from; clears what killed attempts have left. For rank 0, before it trains.

    Later ones, which are damaged, are set aside: what is trained again must not count as older than they.
    """
    for staged in folder.glob(f"{STAGING}*"):
        shutil.rmtree(staged, ignore_errors=True)
    checkpoint = newest(folder)
    for path in checkpoints(folder):
        if checkpoint is None or step_of(path) > step_of(checkpoint):
            path.rename(path.with_name(f"damaged-{path.name}-{uuid4().hex[:8]}"))
    return checkpoint


def check_resumable(checkpoint: Path, strategy: Strategy) -> None:
    """Refuse a checkpoint whose parts do not fit these processes.

    Raises:
        CannotResume: it was written under another strategy, or in parts by another number of processes.
    """
    facts = read_json(checkpoint / MANIFEST)
    before, then, now = facts["strategy"], facts["workers"], processes.world_size()
    if before != strategy:
        raise CannotResume(
            f"{checkpoint} was written under hardware.strategy {before}, which {strategy} cannot read; "
            f"set it back to {before}, or delete {checkpoint.parent} to start this stage anew"
        )
    if before != "ddp" and then != now:
        raise CannotResume(
            f"{checkpoint} holds one part of the optimizer for each of {then} workers, and DeepSpeed cannot "
            f"hand them to {now}; set hardware.workers back to {then}, or delete {checkpoint.parent} to "
            "start this stage anew (ddp resumes with any number of workers)"
        )


def keep_newest(folder: Path, candidates_every: int | None) -> None:
    """Remove all checkpoints but the newest; with `candidates_every` so many steps the weights stay."""
    for old in checkpoints(folder)[:-1]:
        if candidates_every and step_of(old) % candidates_every == 0:  # else: of a stop
            _keep_candidate(old)
        _remove(old)


def _keep_candidate(checkpoint: Path) -> None:
    """Keep a checkpoint's weights as a candidate; where the file system can, without copying them."""
    staged = checkpoint.with_name(f"{STAGING}{checkpoint.name}-{uuid4().hex[:8]}")
    staged.mkdir()
    names = [path.name for pattern in _WEIGHTS for path in checkpoint.glob(pattern)]
    for name in names:
        try:
            os.link(checkpoint / name, staged / name)
        except OSError:
            shutil.copyfile(checkpoint / name, staged / name)
    manifest = read_json(checkpoint / MANIFEST)
    write_json(staged / MANIFEST, {**manifest, "files": {name: manifest["files"][name] for name in names}})
    commit_folder(staged, checkpoint.with_name(f"candidate-{step_of(checkpoint)}"))


def _remove(checkpoint: Path) -> None:
    """Remove a folder; at no moment does half of it bear its name."""
    removed = checkpoint.with_name(f"{STAGING}{checkpoint.name}-{uuid4().hex[:8]}")
    checkpoint.rename(removed)
    shutil.rmtree(removed)


# -------------------------------------------------------------------------- frozen weights


def _learned_names(model: nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """One hash over names, types, shapes and values of tensors; several are hashed at a time."""

    def digest(item: tuple[str, Tensor]) -> tuple[str, str, list[int], str]:
        name, tensor = item
        value = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        return name, str(tensor.dtype), list(tensor.shape), hashlib.sha256(value.data).hexdigest()

    with ThreadPoolExecutor() as pool:
        return sha256_json(sorted(pool.map(digest, tensors)))


def keep_frozen(model: PreTrainedModel | nn.Module, folder: Path, checkpoint: Path | None) -> str:
    """Write the weights that do not learn into `folder/frozen`, once; returns their digest.

    Those below low-rank updates are not written: they are the base policy's. For all ranks, before the model
    is divided. Nothing of them is in a checkpoint: a resumed training takes them from the policy that the
    stage starts from.

    Raises:
        CannotResume: they are not those that `checkpoint` was trained with.
    """
    digest = ""
    if processes.is_first():
        learned = _learned_names(model)
        frozen = [(name, tensor) for name, tensor in model.state_dict().items() if name not in learned]
        digest = digest_of(frozen)
        if not hasattr(model, "peft_config"):
            _write_frozen(frozen, folder / FROZEN, digest)
    digest = processes.broadcast(digest)
    if checkpoint is not None and read_json(checkpoint / MANIFEST).get("frozen") != digest:
        raise CannotResume(
            f"{checkpoint} was trained from other weights than this stage now starts from: those that are "
            f"frozen differ. Put its policy back as it was, or delete {folder} to start this stage anew"
        )
    return digest


def _write_frozen(frozen: Iterable[tuple[str, Tensor]], final: Path, digest: str) -> None:
    manifest = manifest_of(final)
    if manifest is not None and manifest.get("digest") == digest and is_whole(final):
        return
    staged = final.with_name(f"{STAGING}{final.name}-{uuid4().hex[:8]}")
    staged.mkdir(parents=True)
    shards.write(((hub_name(name), tensor) for name, tensor in frozen), staged)
    files = {path.name: value for path, value in sha256_files(staged.iterdir()).items()}
    write_json(staged / MANIFEST, {"digest": digest, "files": files})
    commit_folder(staged, final)


# -------------------------------------------------------------------------- weights that learn


def save_learned(model: PreTrainedModel, folder: Path, gathered: Mapping[str, Tensor] | None = None) -> None:
    """Write the weights that learn under the Hub's names; `gathered` are DeepSpeed's, whole again."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, learned = model.state_dict() if gathered is None else gathered, _learned_names(model)
    shards.write(((hub_name(name), weights[name]) for name in weights if name in learned), folder)
    model.config.save_pretrained(folder)
    if model.can_generate():  # a reward model does not
        model.generation_config.save_pretrained(folder)


def load_learned(model: nn.Module, checkpoint: Path) -> None:
    """Load the weights that learn, each in its own type.

    Raises:
        CannotResume: other weights learned when they were saved.
    """
    saved = shards.SavedTensors(checkpoint)
    learned = {hub_name(name): w for name, w in model.named_parameters() if w.requires_grad}
    if set(saved.names) != learned.keys():
        differing = sorted(set(saved.names) ^ learned.keys())
        raise CannotResume(f"in {checkpoint} other weights learned than now: {', '.join(differing[:3])}")
    with torch.no_grad():
        for name, weight in learned.items():
            weight.copy_(saved[name])


# -------------------------------------------------------------------------- the policy


def publish(
    checkpoint: Path,
    base: Path | str | None,
    processor: Qwen2AudioProcessor,
    out: Path,
    load: Load = qwen2_audio.load_model,
) -> None:
    """Write `out/model`, plain weights under the Hub's names that `load` reads.

    Where low-rank updates were trained on the policy `base`, they are merged in, and `out/adapter` has them
    alone.
    """
    qwen2_audio.save(_load(checkpoint, base, processor, load), processor, out / "model")
    if _is_adapter(checkpoint):
        (out / "adapter").mkdir(exist_ok=True)
        for name in _ADAPTER:
            shutil.copyfile(checkpoint / name, out / "adapter" / name)


@contextmanager
def live_policy(model: Any, checkpoints: Path) -> Iterator[Path]:
    """A folder with the weights of a policy in training as plain ones, for as long as the block runs.

    It lies in the stage's folder of `checkpoints`, so that the next attempt clears what a killed one leaves.
    For each process by itself.
    """
    with tempfile.TemporaryDirectory(dir=checkpoints, prefix=f"{STAGING}live-") as name:
        folder = Path(name)
        shards.write(((hub_name(key), weight) for key, weight in merged_weights(model)), folder)
        model.config.save_pretrained(folder)
        yield folder


@contextmanager
def as_policy(checkpoint: Path, base: Path | str | None, processor: Qwen2AudioProcessor) -> Iterator[Path]:
    """A folder with the checkpoint's policy as plain weights, for as long as the block runs."""
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=f"{STAGING}policy-") as name:
        folder = Path(name)
        if _is_adapter(checkpoint):
            qwen2_audio.save(_load(checkpoint, base, processor, qwen2_audio.load_model), processor, folder)
        else:
            _join(checkpoint, folder)
            processor.save_pretrained(folder)
        yield folder


def _is_adapter(checkpoint: Path) -> bool:
    return (checkpoint / _ADAPTER[0]).exists()


def _load(
    checkpoint: Path, base: Path | str | None, processor: Qwen2AudioProcessor, load: Load
) -> PreTrainedModel:
    if not _is_adapter(checkpoint):
        with as_policy(checkpoint, base, processor) as folder:
            return load(folder)
    if base is None:
        raise ValueError(f"{checkpoint} holds low-rank updates, but not of which policy")
    return merged(load(base), checkpoint)


def _join(checkpoint: Path, folder: Path) -> None:
    """Make `folder` a model of a checkpoint's weights and the frozen ones, which are linked, not copied."""
    weight_map: dict[str, str] = {}
    for part in (checkpoint, checkpoint.parent / FROZEN):
        for file in sorted(part.glob("*.safetensors")):
            link = folder / f"{part.name}-{file.name}"
            link.symlink_to(file.resolve())
            with safe_open(file, framework="pt") as tensors:
                weight_map |= dict.fromkeys(tensors.keys(), link.name)
    write_json(folder / shards.INDEX, {"metadata": {}, "weight_map": weight_map})
    for name in ("config.json", "generation_config.json"):
        if (checkpoint / name).exists():
            shutil.copyfile(checkpoint / name, folder / name)
