"""Processor time with and without a frozen tower's outputs on disk, on a real encoder. For a person to run.

    python -m tests.benchmarks.tower_outputs ENCODER [--clips N] [--seconds S]

ENCODER is a folder of a Whisper encoder, such as openai/whisper-base. A small Qwen2 of random weights learns
from 16 chats (SFT) or 16 pairs (DPO) a step, and answers prompts four times. `without`: features are in
memory, as after the first epoch, and the tower runs. `made`: outputs are computed and written. `found`: they
are read from disk. `again`: they are in memory. One thread; medians over the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import soundfile
import torch
from trl.trainer.utils import add_fused_lm_head

from align.generation.engine import Decoding, Request
from align.generation.transformers_engine import LiveEngine
from align.models.answer_head import answers_only
from align.models.chat import assistant, user
from align.models.features import ClipFeatures
from align.models.qwen2_audio.assemble import assemble
from align.models.qwen2_audio.model import build_processor, load_model, load_processor
from align.models.qwen2_audio.packed import keep_tower_outputs, pack
from align.models.qwen2_audio.random_parts import write_qwen2
from align.models.tower_outputs import TowerOutputs
from align.training.collate import PreferenceCollator, SFTCollator

RATE, BATCH = 16_000, 16
WORKLOADS = ("sft", "dpo", "complete")
QUESTION, CHOSEN, REJECTED = "Which digits are said?", "The digits are two and six.", "The digit is nine."


def make_policy(encoder: Path, folder: Path) -> Path:
    """The encoder with a Qwen2 of 4 layers of 320."""
    texts = [QUESTION, CHOSEN, REJECTED] * 20
    tokenizer = build_processor(texts, vocab_size=640, mel_bins=80, hop_length=160, clip_s=30).tokenizer
    write_qwen2(folder / "text", tokenizer, d_model=320, heads=5, layers=4, seed=0)
    assemble(encoder, folder / "text", folder / "policy")
    return folder / "policy"


def make_clips(folder: Path, n: int, seconds: float) -> list[str]:
    """Noise."""
    rng = np.random.default_rng(0)
    for i in range(n):
        samples = 0.1 * rng.standard_normal(int(seconds * RATE))
        soundfile.write(folder / f"{i}.wav", samples.astype(np.float32), RATE)
    return [f"{i}.wav" for i in range(n)]


def chats(clips: Sequence[str]) -> list[dict[str, Any]]:
    """A row about each clip."""
    return [
        {"messages": [user(QUESTION, 1), assistant(CHOSEN)], "audios": [clip], "draw": 0} for clip in clips
    ]


def pairs(clips: Sequence[str]) -> list[dict[str, Any]]:
    """A pair about each clip."""
    texts = {"prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED, "weight": 1.0}
    return [{**texts, "audios": [clip]} for clip in clips]


def cpu_s(parts: Sequence[Sequence[str]], work: Callable[[Sequence[str]], object]) -> list[float]:
    """Processor seconds of the work on each part."""
    seconds = []
    for part in parts:
        started = time.process_time()
        work(part)
        seconds.append(time.process_time() - started)
    return seconds


class Bench:
    """The policy with its tower frozen, and the clips in batches."""

    def __init__(self, policy: Path, folder: Path, clips: Sequence[str], run: Path) -> None:
        self.folder, self.run, self.processor = folder, run, load_processor(policy)
        self.model = pack(load_model(policy))
        self.model.model.audio_tower.requires_grad_(False)
        add_fused_lm_head(self.model, outputs=("log_probs", "entropy"))
        self.parts = [clips[i : i + BATCH] for i in range(0, len(clips), BATCH)]

    def times(self, work: Callable[[ClipFeatures, TowerOutputs | None], Callable[[Sequence[str]], object]]):
        """Median seconds of a batch in each case."""
        features, tower_outputs = ClipFeatures(self.processor, self.folder), None
        self.model.model.tower_outputs = None
        cpu_s(self.parts, work(features, None))
        cases = {"without": cpu_s(self.parts, work(features, None))}
        tower_outputs = keep_tower_outputs(self.model, self.run)
        cases["made"] = cpu_s(self.parts, work(ClipFeatures(self.processor, self.folder), tower_outputs))
        features = ClipFeatures(self.processor, self.folder)
        cases["found"] = cpu_s(self.parts, work(features, tower_outputs))
        cases["again"] = cpu_s(self.parts, work(features, tower_outputs))
        return {name: round(statistics.median(seconds), 4) for name, seconds in cases.items()}

    def learn(self, collate: Any, rows: Callable[[Sequence[str]], list[Any]]) -> Callable[..., object]:
        """Forward and backward of a batch, from its rows on."""

        def step(clips: Sequence[str]) -> None:
            batch = {k: v for k, v in collate(rows(clips)).items() if k != "pair_weight"}
            mask = batch.pop("completion_mask", None)
            if mask is not None:
                batch["labels"] = batch["input_ids"].where(mask == 1, -100)
            outputs = answers_only(self.model)(**batch, use_cache=False, fused_lm_head=True)
            (-outputs.log_probs.sum()).backward()
            self.model.zero_grad()

        return step

    def sft(self, features: ClipFeatures, tower_outputs: TowerOutputs | None) -> Callable[..., object]:
        """A step of SFT."""
        return self.learn(
            SFTCollator(self.processor, features, packed=True, tower_outputs=tower_outputs), chats
        )

    def dpo(self, features: ClipFeatures, tower_outputs: TowerOutputs | None) -> Callable[..., object]:
        """A step of DPO whose reference was computed before."""
        return self.learn(
            PreferenceCollator(self.processor, features, packed=True, tower_outputs=tower_outputs), pairs
        )

    def complete(self, features: ClipFeatures, tower_outputs: TowerOutputs | None) -> Callable[..., object]:
        """Four completions of 16 tokens of each prompt."""
        engine = LiveEngine(self.model, self.processor, features, tower_outputs)
        engine.stops = [-1]

        def step(clips: Sequence[str]) -> None:
            numbered = {i: Request(QUESTION, (clip,)) for i, clip in enumerate(clips)}
            list(engine.complete(numbered, Decoding(16, temperature=1.0, completions=4), 0))

        return step


def main() -> None:
    """Print one line of JSON for each workload: seconds of a batch of 16 clips."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("encoder", type=Path)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--workload", choices=WORKLOADS, action="append")
    given = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        clips = make_clips(root, given.clips, given.seconds)
        policy = make_policy(given.encoder, root)
        for workload in given.workload or WORKLOADS:
            bench = Bench(policy, root, clips, root / workload)
            print(json.dumps({"workload": workload, **bench.times(getattr(bench, workload))}), flush=True)
        features, tower_outputs = ClipFeatures(bench.processor, root), bench.model.model.tower_outputs
        names = dict(zip(clips, map(features.name, clips), strict=True))
        each = {
            "name": cpu_s([clips], lambda part: [features.name(clip) for clip in part]),
            "read": cpu_s([clips], lambda part: [tower_outputs.get(names[clip]) for clip in part]),
            "features": cpu_s([clips], lambda part: [features([clip]) for clip in part]),
        }
        print(json.dumps({"ms_per_clip": {k: round(1000 * v[0] / len(clips), 3) for k, v in each.items()}}))


if __name__ == "__main__":
    main()
