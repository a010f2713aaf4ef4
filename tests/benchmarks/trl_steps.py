"""What the benchmarks train: a Qwen2-Audio of random weights, made rows, TRL's trainers over them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from align.models.answer_head import answers_only
from align.models.features import ClipFeatures, stack
from align.models.qwen2_audio.clips import n_audio_tokens, pack_rows, stack_unpadded
from align.models.qwen2_audio.model import build_processor
from align.models.qwen2_audio.packed import pack

AUDIO, RATE = 7, 16_000


class Shape(NamedTuple):
    """Sizes of a Qwen2-Audio. `prop` has the released model's proportions of FLOPs."""

    audio_layers: int
    audio_width: int
    audio_heads: int
    text_layers: int
    text_width: int
    text_heads: int
    feed_forward: int
    vocabulary: int


SHAPES = {
    "prop": Shape(4, 192, 3, 8, 640, 10, 1720, 6144),
    "7b": Shape(32, 1280, 20, 32, 4096, 32, 11008, 156032),
    "toy": Shape(1, 32, 2, 1, 32, 2, 64, 256),
}


@dataclass(frozen=True)
class Workload:
    """Rows with clips of `seconds` and answers of `answer` tokens; several seconds: drawn per row."""

    kind: str
    seconds: tuple[float, ...]
    answer: tuple[int, int]
    batch_size: int = 1
    answers_per_clip: int = 1
    """Rows in a row that ask the same of the same clip, such as the captions that several people wrote."""
    required: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Contender -> least ratios of its FLOPs and of its process time to ours, on a CPU."""
    required_gpu: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """The same of wall time, LoRA at the released model's size on one H200."""


def _mixed(n: int) -> tuple[float, ...]:
    """Durations of mixed pre-training data: half short speech, a quarter read speech, a quarter sounds."""
    rng = np.random.default_rng(0)
    short, read, sounds = (
        rng.lognormal(math.log(4.8), 0.35, n),
        rng.normal(12.3, 3.8, n),
        rng.uniform(15, 30, n),
    )
    which = rng.random(n)
    drawn = np.where(which < 0.5, short, np.where(which < 0.75, read, sounds))
    return tuple(np.clip(drawn, 0.5, 30).round(2).tolist())


WORKLOADS = {
    "30s/128": Workload(
        "dpo",
        (30,),
        (128, 128),
        required={"trl live": (2.35, 2.2), "trl tuned": (1.7, None)},
        required_gpu={"trl default": (None, 4.0), "trl tuned": (None, 2.3)},
    ),
    "5s/32": Workload(
        "dpo",
        (5,),
        (32, 32),
        required={"trl live": (2.6, 2.8), "trl tuned": (1.85, None)},
        required_gpu={"trl default": (None, 5.0), "trl tuned": (None, 3.0)},
    ),
    "5s/512": Workload("dpo", (5,), (512, 512)),
    "sft captions": Workload(
        "sft", (15, 22, 30, 18), (8, 20), 10, answers_per_clip=5, required={"trl": (2.5, None)}
    ),
    "sft mixed": Workload("sft", _mixed(256), (8, 80), 16, required={"trl": (2.5, None)}),
}


class Contender(NamedTuple):
    """How a trainer is set up."""

    packed: bool = False
    precomputed: bool = False
    checkpointing: bool = False
    batch_size: int | None = None


CONTENDERS = {
    "dpo": {
        "trl default": Contender(checkpointing=True),
        "trl live": Contender(),
        "trl tuned": Contender(precomputed=True),
        "ours live": Contender(packed=True),
        "ours": Contender(packed=True, precomputed=True),
    },
    "sft": {
        "trl default": Contender(checkpointing=True),
        "trl": Contender(),
        "ours": Contender(packed=True),
    },
}


def build_model(shape: Shape, device: str) -> Qwen2AudioForConditionalGeneration:
    """Random weights of order 1, so that attention is not uniform; the tower frozen."""
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "d_model": shape.audio_width,
            "encoder_attention_heads": shape.audio_heads,
            "encoder_ffn_dim": 4 * shape.audio_width,
            "encoder_layers": shape.audio_layers,
            "num_mel_bins": 128,
            "max_source_positions": 1500,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": shape.text_width,
            "num_hidden_layers": shape.text_layers,
            "num_attention_heads": shape.text_heads,
            "num_key_value_heads": shape.text_heads,
            "intermediate_size": shape.feed_forward,
            "vocab_size": shape.vocabulary,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        audio_token_index=AUDIO,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = Qwen2AudioForConditionalGeneration(config)
    torch.set_default_dtype(before)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1 / math.sqrt(weight[0].numel()))
    model.model.audio_tower.requires_grad_(False)
    return model


class Collator:
    """Rows to batches: [chosen; rejected] for DPO, labels for SFT; packed, or as the stock model wants it."""

    def __init__(self, folder: Path, kind: str, packed: bool) -> None:
        processor = build_processor(["a b"] * 20, vocab_size=300, mel_bins=128, hop_length=160, clip_s=30)
        self.features = ClipFeatures(processor, folder)
        self.kind = kind
        self.packed = packed

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate."""
        sides = ("chosen_ids", "rejected_ids") if self.kind == "dpo" else ("answer_ids",)
        ids = [torch.tensor(row["prompt_ids"] + row[side]) for side in sides for row in rows]
        starts = [len(row["prompt_ids"]) for _ in sides for row in rows]
        answers = [torch.arange(len(r)) >= start for r, start in zip(ids, starts, strict=True)]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            **self._audio(ids, [row["audio"] for _ in sides for row in rows]),
        }
        mask = pad_sequence(answers, batch_first=True)
        if self.kind == "dpo":
            batch["completion_mask"] = mask.long()
        else:
            batch["labels"] = batch["input_ids"].masked_fill(~mask, -100)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch

    def _audio(self, ids: Sequence[torch.Tensor], paths: Sequence[str]) -> dict[str, Any]:
        if not self.packed:
            return dict(stack(self.features(paths)))
        distinct = list(dict.fromkeys(paths))
        clips = self.features(distinct)
        uses = [[distinct.index(path)] for path in paths]
        packed = pack_rows(ids, uses, [clip.n_frames for clip in clips], AUDIO)
        return {**stack_unpadded(clips), "packed": packed}


def make_rows(workload: Workload, n: int, vocabulary: int, folder: Path) -> list[dict[str, Any]]:
    """Rows with 50 tokens of text around each clip's 25 per second, and the clips as files."""
    rng = np.random.default_rng(1)

    def words(count: int) -> list[int]:
        return [int(token) for token in rng.integers(10, vocabulary, count)]

    rows: list[dict[str, Any]] = []
    for index in range(n):
        clip = index // workload.answers_per_clip
        if index % workload.answers_per_clip == 0:
            seconds = workload.seconds[clip % len(workload.seconds)]
            samples = 0.1 * rng.standard_normal(int(seconds * RATE))
            soundfile.write(folder / f"{clip}.wav", samples.astype(np.float32), RATE, subtype="FLOAT")
            audio = [AUDIO] * n_audio_tokens(-(-len(samples) // 160))
            prompt = words(25) + audio + words(25)
        lengths = rng.integers(workload.answer[0], workload.answer[1] + 1, 2)
        sides = ("chosen_ids", "rejected_ids") if workload.kind == "dpo" else ("answer_ids",)
        answers = {side: words(int(length)) for side, length in zip(sides, lengths, strict=False)}
        rows.append({"prompt_ids": prompt, "audio": f"{clip}.wav", **answers})
    return rows


class Clock(TrainerCallback):
    """Process and wall time of each optimizer step, from forward to the weights' update."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """A batch is there."""
        self.started = self.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The weights are updated."""
        process, wall = self.now()
        self.steps.append((process - self.started[0], wall - self.started[1]))

    @staticmethod
    def now() -> tuple[float, float]:
        """Process and wall seconds, after all work given to a GPU."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.process_time(), time.perf_counter()


class DPO(DPOTrainer):
    """TRL's, over rows that are tokenised; for packed batches with what AudioDPOTrainer adds."""

    precompute_s = (0.0, 0.0)
    """Process and wall time that the reference's log-probs took."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *args: Any) -> Dataset:
        process, wall = Clock.now()
        dataset = super()._precompute_ref_logps(*args)
        process_after, wall_after = Clock.now()
        self.precompute_s = (process_after - process, wall_after - wall)
        return dataset

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Answers only."""
        return super().compute_ref_log_probs(answers_only(model), inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        return super()._compute_loss(answers_only(model), inputs, return_outputs)


class SFT(SFTTrainer):
    """As above."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Answers only."""
        return super().compute_loss(answers_only(model), *args, **kwargs)


LORA_TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"


def trainer_arguments(
    workload: Workload,
    how: Contender,
    *,
    size: str,
    steps: int,
    lora: bool,
    folder: Path,
    trl: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """All that a trainer of `steps` steps is made of: models, rows as files and tokens, settings.

    `trl` are further arguments of its config class; they win.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, batch_size = SHAPES[size], how.batch_size or workload.batch_size
    needs_reference = workload.kind == "dpo" and not lora
    models = [build_model(shape, device) for _ in range(1 + needs_reference)]
    if how.packed:
        models = [pack(model) for model in models]
    settings = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": batch_size,
        "max_steps": steps,
        "learning_rate": 1e-6,
        "activation_checkpointing": how.checkpointing,
        "bf16": False,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device != "cpu",
        "remove_unused_columns": False,
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": [],
        **trl,
    }
    arguments = {
        "model": models[0],
        "train_dataset": Dataset.from_list(make_rows(workload, batch_size * steps, shape.vocabulary, folder)),
        "processing_class": _tokenizer(shape.vocabulary),
        "data_collator": Collator(folder, workload.kind, how.packed),
        "peft_config": LoraConfig(r=16, lora_alpha=32, target_modules=LORA_TARGETS) if lora else None,
    }
    if workload.kind == "sft":
        return arguments | {"args": SFTConfig(**settings)}
    settings["precompute_ref_log_probs"] = how.precomputed
    reference = models[1].requires_grad_(False) if needs_reference else None
    return arguments | {"args": DPOConfig(**settings), "ref_model": reference}


def make_trainer(workload: Workload, arguments: dict[str, Any], clock: Clock) -> Any:
    """A trainer about to train; the reference's log-probs are computed here, if they are precomputed."""
    trainer = (DPO if workload.kind == "dpo" else SFT)(**arguments, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    return trainer


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(tokenizer_models.WordLevel(words, unk_token="w3")),
        pad_token="w0",
        bos_token="w1",
        eos_token="w2",
        unk_token="w3",
    )
