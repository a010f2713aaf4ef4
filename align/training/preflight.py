"""Checks before the first step of what would otherwise spoil a run of days without an error.

The audio reaches the model and changes its predictions; the loss is on the assistant's words and on all of
them; exactly what should learn does; two checkpoints fit on the disk; the packed path computes what
transformers' own does. They cost a few forward passes and draw no random number, so that the run itself stays
the same.
"""

from __future__ import annotations

import logging
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

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

from align.models.answer_head import answers_only, is_completion
from align.models.qwen2_audio.model import END_OF_TURN
from align.models.qwen2_audio.packed import is_packed
from align.models.qwen2_audio.reward_model import is_reward_model
from align.models.scoring import MODEL_INPUTS
from align.training import processes
from align.training.collate import Row, mismatched
from align.training.data_loading import ABOUT, ReplacingCollator
from align.training.lengths import Lengths
from align.training.processes import eval_mode
from preference_data import store
from preference_data.audio import decode
from preference_data.audio.clip_files import BadAudio
from preference_data.audio.decode import SAMPLE_RATE
from preference_data.dataset.dataset import Dataset
from preference_data.schema import AudioClip

log = logging.getLogger(__name__)

_ROWS = 8
"""Examples whose labels are checked."""
_SEARCHED = 64
"""Examples among which one with audio is searched."""
_ADAM_BYTES = {False: 8, True: 12}
"""Per trained parameter in a checkpoint: two moments in float32; DeepSpeed's also holds float32 weights."""
_NEVER_TRAINED = "audio_tower.embed_positions"
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Mean difference of log-probs in nats that rounding explains; a wrong mask makes more than one nat."""


Collator = Callable[[Sequence[Row]], dict[str, Any]]
"""A dataclass of `collate` or `data_loading`; with `packed` it makes packed batches."""


class NotReady(ValueError):
    """Training would not do what the recipe says; nothing was trained. The message says what to mend."""


class Preflight(TrainerCallback):
    """Runs all checks when training begins, with the model as the trainer has prepared it.

    `trained` are the modules that learn, as `model.multi_modal_projector`; empty text is the whole model.
    `stage` is named in what is printed. `collate` makes the batches, by default the trainer's collator.
    """

    def __init__(
        self,
        trainer: Trainer,
        trained: Sequence[str],
        stage: str,
        collate: Collator | None = None,
    ) -> None:
        self.trainer = trainer
        self.trained = trained
        self.stage = stage
        self.collate: Collator = collate or trainer.data_collator

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise NotReady where something is wrong."""
        model, dataset = self.trainer.model, self.trainer.train_dataset
        collate, processor = self.collate, self.trainer.processing_class
        check_frozen(model, self.trained)
        needed = checkpoint_bytes(model, in_deepspeed=self.trainer.is_deepspeed_enabled)
        check_disk(Path(args.output_dir), needed)
        for row in map(dataset.__getitem__, range(min(_ROWS, len(dataset)))):
            batch = collate([row])
            if not batch.get(ABOUT, {}).get("replaced"):  # else the batch is of another row
                check_labels(batch, [row], processor)
        first = map(dataset.__getitem__, range(min(_SEARCHED, len(dataset))))
        with_audio = next((row for row in first if row["audios"]), None)
        if with_audio is None:
            return
        check_audio(model, collate([with_audio]))
        if is_packed(model):
            n_rows = args.per_device_train_batch_size // getattr(args, "num_generations", 1)
            rows = [dataset[i] for i in range(min(n_rows, len(dataset)))]
            precision = torch.bfloat16 if args.bf16 else next(model.parameters()).dtype
            comparison = compare_packing(model, collate, rows, precision)
            if state.is_world_process_zero:
                print(f"{self.stage}  {comparison}", flush=True)


# -------------------------------------------------------------------------- audio


def check_audio(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Check that predictions of the completions change with the clip: for silence, and for it upside down.

    Raises:
        NotReady: they do not, or no more than they do between two equal passes.
    """
    inputs = send_to_device(dict(batch), next(model.parameters()).device)
    if "input_features" not in inputs:
        raise NotReady(
            "an example names clips, but its batch holds no input_features: the audio is lost between the "
            "data and the model. Look at what the collator makes of `audios`"
        )
    mel = inputs["input_features"]
    as_it_is = _logits(model, inputs)
    noise = (as_it_is - _logits(model, inputs)).abs().max().item()
    for other, name in ((torch.full_like(mel, mel.min().item()), "silence"), (mel.flip(-2), "another sound")):
        change = (as_it_is - _logits(model, {**inputs, "input_features": other})).abs().max().item()
        if not change > 2 * noise:
            raise NotReady(
                f"the audio does not reach the model: with {name} instead of the clip, what it predicts "
                f"of the completion changes by {change:.3g} (two equal passes: {noise:.3g}). Look at "
                "<|AUDIO|> in the prompt and at the policy's audio_token_index and weights"
            )


@torch.no_grad()
def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Logits that predict the completions (S, V), or their rewards (B, 1), without dropout."""
    inputs = {name: value for name, value in batch.items() if name in MODEL_INPUTS}
    with eval_mode(model, batch["input_ids"].device):
        logits: Tensor = model(**inputs, use_cache=False).logits.float()
    return logits if is_reward_model(model) else logits[:, :-1][is_completion(batch)[:, 1:]]


# -------------------------------------------------------------------------- labels


def check_labels(batch: Mapping[str, Any], rows: Sequence[Row], processor: Qwen2AudioProcessor) -> None:
    """Check that the loss is on the assistant's words with their ends of turn, by reading it as text.

    Raises:
        NotReady: naming the row, what is learned and what should be.
    """
    for number, (ids, mask, expected) in enumerate(
        zip(batch["input_ids"], is_completion(batch), _expected(rows, len(batch["input_ids"])), strict=True)
    ):
        row = rows[number % len(rows)]
        if not mask.any():
            raise NotReady(
                f"example {number} has no label at all: nothing would be learned from it. Its row: {row}"
            )
        learned = processor.tokenizer.decode(ids[mask], skip_special_tokens=False)
        if unicodedata.normalize("NFC", learned) != unicodedata.normalize("NFC", expected):
            raise NotReady(
                f"example {number}: the loss is on {learned!r}, the assistant's words are {expected!r}. The "
                "chat template's generation marks or the collator's mask do not fit this tokenizer"
            )


def _expected(rows: Sequence[Row], n: int) -> list[str]:
    """The text that each of the batch's `n` sequences should learn; of pairs, all chosen, then all rejected.

    Of labels all completions, then all mismatched ones.
    """
    if "chosen" in rows[0]:
        return [row[side] + END_OF_TURN for side in ("chosen", "rejected") for row in rows]
    own = ["".join(f"{text}{END_OF_TURN}" for text in _completions(row)) for row in rows]
    return own if n == len(own) else [*own, *mismatched(own)]


def _completions(row: Row) -> list[str]:
    if row.get("completion") is not None:
        return [row["completion"]]
    turns = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    return ["".join(part["text"] for part in parts) for parts in turns]


# -------------------------------------------------------------------------- weights, clips, disk


def check_frozen(model: nn.Module, trained: Sequence[str]) -> None:
    """Check that exactly the parameters below the modules `trained` learn; with adapters, exactly theirs.

    The audio tower's positions are sinusoids and never learn: `from_pretrained` un-freezes them, and so
    they would be trained under DDP and ZeRO-2 but not under ZeRO-3.

    Raises:
        NotReady: naming parameters that should be frozen and are not, and the other way round.
    """
    expected = {
        name
        for name, _ in model.named_parameters()
        if (
            "lora_" in name or "modules_to_save" in name
            if isinstance(model, PeftModel)
            else _below(name, trained)
        )
        and _NEVER_TRAINED not in name
    }
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if learns != expected:
        raise NotReady(
            f"what is frozen is not what the recipe says. Would be trained but should be frozen: "
            f"{_some(learns - expected)}; would stay frozen but should be trained: {_some(expected - learns)}"
        )


def _below(name: str, modules: Sequence[str]) -> bool:
    return any(module == "" or name.startswith(f"{module}.") for module in modules)


def _some(names: set[str]) -> str:
    listed = ", ".join(sorted(names)[:3]) or "nothing"
    return f"{listed} and {len(names) - 3} more" if len(names) > 3 else listed


def check_clip_lengths(
    clips: Iterable[AudioClip],
    processor: Qwen2AudioProcessor,
    max_bad_fraction: float,
    silence_s: float = 0.0,
) -> None:
    """Check that at most this share of the clips is longer than the model can hear: they are not cut.

    `silence_s` of what the model hears must be free behind every clip.

    Raises:
        NotReady: with their number and the longest.
    """
    longest_s = processor.feature_extractor.n_samples / SAMPLE_RATE - silence_s
    n = n_longer = 0
    longest = (0.0, "")
    for clip in clips:
        if clip.split in ("train", "preference"):
            n += 1
            n_longer += clip.duration_s > longest_s
            longest = max(longest, (clip.duration_s, clip.path))
    if n_longer > max_bad_fraction * n:
        raise NotReady(
            f"{n_longer} of {n} clips are longer than the {longest_s:g} s that the model hears, such as "
            f"{longest[1]} with {decode.beyond(longest[0], longest_s)}. Set the corpus' max_duration_s to "
            f"{longest_s:g}, or start from a model that hears more (clip_s of one from random weights)"
        )


def readable(rows: Sequence[Row], corpus: Path, longest_s: float, out: Path) -> list[Row]:
    """The rows whose clips can all be decoded; the others are listed in `left_out.jsonl` of `out`.

    Each clip is decoded once, in processes that may crash, by rank 0; all ranks get the same rows.

    Raises:
        NotReady: none is left.
    """
    clips = sorted({path for row in rows for path in row["audios"]})
    bad: dict[str, str] = {}
    if processes.is_first():
        find = Dataset(corpus).find
        outcomes = decode.examine(find, clips, by="samples", max_duration_s=longest_s)
        bad = {path: str(it) for path, it in zip(clips, outcomes, strict=True) if isinstance(it, BadAudio)}
        left_out = [
            {"id": row["id"], "audios": row["audios"], "reason": bad[path]}
            for row in rows
            if (path := next((path for path in row["audios"] if path in bad), ""))
        ]
        store.write_rows(out / "left_out.jsonl", left_out)
        if left_out:
            log.warning("%d rows are left out, see left_out.jsonl, the first: %s", len(left_out), left_out[0])
    bad = processes.broadcast(bad)
    kept = [row for row in rows if not any(path in bad for path in row["audios"])]
    if not kept:
        raise NotReady(f"no clip of {len(rows)} rows can be read, e.g. {next(iter(bad.values()), None)}")
    return kept


def describe_beyond(rows: Iterable[Row], lengths: Lengths, context: int) -> str | None:
    """What is said of examples that do not fit the positions that the language model knows: nothing is cut.

    Names the longest. None if all fit.
    """
    beyond = list(lengths.rows_beyond(context, rows))
    if not beyond:
        return None
    tokens, row = max(beyond, key=lambda each: each[0])
    noun = "pair" if "chosen" in row else "example"
    others = f". {len(beyond) - 1} more are too long" if len(beyond) > 1 else ""
    return (
        f"{noun} {row['id']!r} has {tokens} tokens, with its {len(row['audios'])} clips, but the language "
        f"model knows positions up to {context}. Shorten it, or leave it out{others}"
    )


def checkpoint_bytes(model: nn.Module, *, in_deepspeed: bool) -> int:
    """About how large a checkpoint is: of the weights that learn their values and Adam's state.

    With what DeepSpeed holds of them in float32.
    """
    total = 0
    for weight in model.parameters():
        n = int(getattr(weight, "ds_numel", weight.numel()))  # under ZeRO-3 a parameter holds its share only
        total += weight.requires_grad * n * (weight.element_size() + _ADAM_BYTES[in_deepspeed])
    return total


def check_disk(folder: Path, checkpoint: int) -> None:
    """Check that two checkpoints fit: the old one stays until the new one is whole.

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


# -------------------------------------------------------------------------- packing


class PackingComparison(NamedTuple):
    """`packed_s`, `padded_s`: seconds of a forward pass; `difference`: mean absolute, of log-probs in nats.

    Of a reward model it is of rewards.
    """

    packed_s: float
    padded_s: float
    difference: float

    def __str__(self) -> str:
        ratio = self.padded_s / self.packed_s
        return (
            f"a forward pass takes {self.packed_s:.3g} s packed, {self.padded_s:.3g} s as padded rows "
            f"({ratio:.1f} x); predictions differ by {self.difference:.1g}"
        )


class PackingIsWrong(NotReady):
    """The packed path gives other numbers than transformers' own; nothing was trained."""


def compare_packing(
    model: nn.Module,
    collate: Collator,
    rows: Sequence[Row],
    precision: torch.dtype,
) -> PackingComparison:
    """Compare the log-probs of the completions in `rows`, computed packed and as transformers' padded rows.

    That packing changes nothing is proved by tests; that it holds for this model, these data, this device
    and its kernels is checked here. Two forward passes of each kind, no gradients.

    Args:
        model: packed, with TRL's fused head, as a trainer has prepared it.
        collate: gives packed batches.
        rows: of one batch.
        precision: in which the model computes.

    Raises:
        PackingIsWrong: they differ by more than rounding does.
    """
    device = next(model.parameters()).device
    packed, packed_s = _timed(model, send_to_device(collate(rows), device))
    padded, padded_s = _timed(model, send_to_device(changed(collate, packed=False)(rows), device))
    difference = (packed - padded).abs().mean().item()
    if not difference <= _TOLERANCE[precision]:
        raise PackingIsWrong(
            f"packed and padded rows disagree on the first batch: predictions differ by {difference:.3g} "
            f"on average, in {precision} on {device}. Set packed: false, or another back end (packed: split)"
        )
    return PackingComparison(packed_s, padded_s, difference)


def changed(collate: Any, **fields: Any) -> Collator:
    """A collator with other fields, also within `ReplacingCollator`."""
    if isinstance(collate, ReplacingCollator):
        return replace(collate, collate=replace(collate.collate, **fields))
    other: Collator = replace(collate, **fields)
    return other


@torch.no_grad()
def _timed(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Log-probs of all completions' tokens (S,), without dropout, and the seconds of a second pass.

    Of a reward model rewards (B,).
    """
    inputs = {name: value for name, value in batch.items() if name in MODEL_INPUTS}
    ids, completions = batch["input_ids"], is_completion(batch)
    labels = ids.masked_fill(~completions, -100)
    with eval_mode(model, ids.device):
        for _ in range(2):
            _wait_for(ids.device)
            started = time.perf_counter()
            if is_reward_model(model):
                scores: Tensor = model(**inputs, use_cache=False).logits[:, 0]
            else:
                outputs = answers_only(model)(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
                scores = outputs.log_probs[completions[:, 1:]].float()
            _wait_for(ids.device)
            seconds = time.perf_counter() - started
    return scores, seconds


def _wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
