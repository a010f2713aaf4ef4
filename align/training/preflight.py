"""Looked at before the first step: what would otherwise spoil a run of days without an error.

That the audio reaches the model and changes its answers; that the loss is on the assistant's words and on
all of them; that what should be frozen is, and nothing else; that two checkpoints fit on the disk; that the
packed path computes what transformers' own does. Costs a few forward passes and draws no random number, so
that the run itself stays what it was.
"""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    Qwen2AudioProcessor,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from align.models.qwen2_audio.model import END_OF_TURN
from align.models.qwen2_audio.packed import is_packed
from align.training.both_ways import compare
from align.training.collate import MODEL_INPUTS, Row, labelled
from align.training.device import listening
from align.training.feeding import ABOUT
from preference_data.audio.decode import SAMPLE_RATE
from preference_data.schema import AudioClip

_ROWS = 8
"""Examples whose labels are read."""
_LOOKED_THROUGH = 64
"""Examples among which one with audio is sought."""
_ADAM_BYTES = {False: 8, True: 12}
"""Per trained parameter in a checkpoint: two moments in float32; DeepSpeed's also holds float32 weights."""
_NEVER_TRAINED = "audio_tower.embed_positions"


Predictions = Callable[[nn.Module, Mapping[str, Any]], Tensor]


class NotReady(ValueError):
    """Training would not do what the recipe says; nothing was trained. The message says what to mend."""


class Preflight(TrainerCallback):
    """Runs all checks when training begins, with the model as the trainer has prepared it.

    `trained` are the modules that learn, as `model.multi_modal_projector`; empty text is the whole model.
    `stage` is named where something is told.
    """

    def __init__(self, trainer: Trainer, trained: Sequence[str], stage: str) -> None:
        self.trainer = trainer
        self.trained = trained
        self.stage = stage

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise NotReady where something is wrong."""
        model, dataset = self.trainer.model, self.trainer.train_dataset
        collate, processor = self.trainer.data_collator, self.trainer.processing_class
        check_frozen(model, self.trained)
        needed = checkpoint_bytes(model, in_deepspeed=self.trainer.is_deepspeed_enabled)
        check_disk(Path(args.output_dir), needed)
        for row in map(dataset.__getitem__, range(min(_ROWS, len(dataset)))):
            batch = collate([row])
            if not batch.get(ABOUT, {}).get("replaced"):  # else the batch is of another row
                check_labels(batch, [row], processor)
        heard = next((row for row in map(dataset.__getitem__, _first(dataset)) if row["audios"]), None)
        if heard is not None:
            check_audio(model, collate([heard]))
            if is_packed(model):
                rows = [dataset[i] for i in range(min(args.per_device_train_batch_size, len(dataset)))]
                precision = torch.bfloat16 if args.bf16 else next(model.parameters()).dtype
                found = compare(model, collate, rows, precision)
                if state.is_world_process_zero:
                    print(f"{self.stage}  {found}", flush=True)


def _first(dataset: Any) -> range:
    return range(min(_LOOKED_THROUGH, len(dataset)))


# -------------------------------------------------------------------------- audio


def check_audio(model: nn.Module, batch: Mapping[str, Any], predictions: Predictions | None = None) -> None:
    """What is predicted of answers must change when the clip does: for silence, and for it upside down.

    Args:
        model: what is trained.
        batch: of a collator.
        predictions: numbers that depend on what the model predicts; by default the answers' logits.

    Raises:
        NotReady: they do not, or no more than they do between two equal passes.
    """
    predict = predictions or _logits
    inputs = send_to_device(dict(batch), next(model.parameters()).device)
    if "input_features" not in inputs:
        raise NotReady(
            "an example names clips, but its batch holds no input_features: the audio is lost between the "
            "data and the model. Look at what the collator makes of `audios`"
        )
    mel = inputs["input_features"]
    as_it_is = predict(model, inputs)
    noise = (as_it_is - predict(model, inputs)).abs().max().item()
    for other, name in ((torch.full_like(mel, mel.min().item()), "silence"), (mel.flip(-2), "another sound")):
        change = (as_it_is - predict(model, {**inputs, "input_features": other})).abs().max().item()
        if not change > 2 * noise:
            raise NotReady(
                f"the audio does not reach the model: with {name} instead of the clip, what it predicts "
                f"of the answer changes by {change:.3g} (two equal passes: {noise:.3g}). Look at <|AUDIO|> "
                "in the prompt and at the policy's audio_token_index and weights"
            )


@torch.no_grad()
def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Logits that predict the answers (S, V), without dropout."""
    inputs = {name: value for name, value in batch.items() if name in MODEL_INPUTS}
    with listening(model, batch["input_ids"].device):
        logits: Tensor = model(**inputs, use_cache=False).logits[:, :-1][labelled(batch)[:, 1:]].float()
    return logits


# -------------------------------------------------------------------------- labels


def check_labels(batch: Mapping[str, Any], rows: Sequence[Row], processor: Qwen2AudioProcessor) -> None:
    """What the loss is on, read as text, must be the assistant's words with their ends of turn.

    Raises:
        NotReady: naming the row, what is learned and what should be.
    """
    for number, (ids, mask, wanted) in enumerate(
        zip(batch["input_ids"], labelled(batch), _wanted(rows), strict=True)
    ):
        row = rows[number % len(rows)]
        if not mask.any():
            raise NotReady(
                f"example {number} has no label at all: nothing would be learned from it. Its row: {row}"
            )
        learned = processor.tokenizer.decode(ids[mask], skip_special_tokens=False)
        if unicodedata.normalize("NFC", learned) != unicodedata.normalize("NFC", wanted):
            raise NotReady(
                f"example {number}: the loss is on {learned!r}, the assistant's words are {wanted!r}. The "
                "chat template's generation marks or the collator's mask do not fit this tokenizer"
            )


def _wanted(rows: Sequence[Row]) -> list[str]:
    """The text that each sequence of the batch should learn; of pairs, all chosen, then all rejected."""
    if "chosen" in rows[0]:
        return [row[side] + END_OF_TURN for side in ("chosen", "rejected") for row in rows]
    return ["".join(f"{text}{END_OF_TURN}" for text in _answers(row)) for row in rows]


def _answers(row: Row) -> list[str]:
    if row.get("messages") is None:
        return [row["completion"]]
    turns = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    return ["".join(part["text"] for part in parts) for parts in turns]


# -------------------------------------------------------------------------- weights, clips, disk


def check_frozen(model: nn.Module, trained: Sequence[str]) -> None:
    """Exactly the parameters below the modules `trained` may learn; with adapters, exactly the adapters'.

    The audio tower's positions are sinusoids and never learn: `from_pretrained` un-freezes them, and so
    they would be trained under DDP and ZeRO-2 but not under ZeRO-3.

    Raises:
        NotReady: naming parameters that should be frozen and are not, and the other way round.
    """
    wanted = {
        name
        for name, _ in model.named_parameters()
        if (
            "lora_" in name or "modules_to_save" in name
            if isinstance(model, PeftModel)
            else _below(name, trained)
        )
        and _NEVER_TRAINED not in name
    }
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if found != wanted:
        raise NotReady(
            f"what is frozen is not what was asked for. Would be trained but should be frozen: "
            f"{_some(found - wanted)}; would stay frozen but should be trained: {_some(wanted - found)}"
        )


def _below(name: str, modules: Sequence[str]) -> bool:
    return any(module == "" or name.startswith(f"{module}.") for module in modules)


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3]) or "nothing"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def check_heard(clips: Iterable[AudioClip], processor: Qwen2AudioProcessor, max_bad_fraction: float) -> None:
    """Of the clips to train on, at most this share may be longer than the model hears: they are not cut.

    Raises:
        NotReady: with their number and the longest.
    """
    heard_s = processor.feature_extractor.n_samples / SAMPLE_RATE
    n = n_longer = 0
    longest = (0.0, "")
    for clip in clips:
        if clip.split in ("train", "preference"):
            n += 1
            n_longer += clip.duration_s > heard_s
            longest = max(longest, (clip.duration_s, clip.path))
    if n_longer > max_bad_fraction * n:
        raise NotReady(
            f"{n_longer} of {n} clips are longer than the {heard_s:g} s that the model hears, such as "
            f"{longest[1]} with {longest[0]:.1f} s. Set the corpus' max_duration_s to {heard_s:g}, or start "
            "from a model that hears more"
        )


def checkpoint_bytes(model: nn.Module, *, in_deepspeed: bool) -> int:
    """About how large a checkpoint is: weights as they are, and Adam's state of those that learn."""
    total = 0
    for weight in model.parameters():
        n = int(getattr(weight, "ds_numel", weight.numel()))  # under ZeRO-3 a parameter holds its share only
        total += n * weight.element_size() + n * _ADAM_BYTES[in_deepspeed] * weight.requires_grad
    return total


def check_disk(folder: Path, checkpoint: int) -> None:
    """The old checkpoint stays until the new one is whole, so two must fit.

    Raises:
        NotReady: with what is free and what is needed.
    """
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < 2 * checkpoint:
        raise NotReady(
            f"{folder} has {free / 1e9:.1f} GB free; two checkpoints of {checkpoint / 1e9:.1f} GB do not "
            f"fit. Free {(2 * checkpoint - free) / 1e9:.1f} GB, or put the run elsewhere with --out"
        )
