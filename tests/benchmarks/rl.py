"""One group of GRPO at Qwen2-Audio's proportions: stock transformers and TRL, and ours. For a person to run.

    make bench-rl
    python -m tests.benchmarks.rl [--workload NAME] [--rounds N] [--size prop|7b|toy] [--out FILE]

A prompt of 800 tokens, 750 of them a clip of 30 s, and 8 completions of 128. Workloads: `loss`, forward and
backward of the policy, its tower frozen; `no_grad`, the same pass of the old policy or the reference;
`prefill`, up to the first token of each completion; `rollout`, all of them. Stock is TRL's rows, each with
its clip, and `generate(num_return_sequences=8)`. The head scores answer positions only on both sides, as TRL
does on a GPU. Each contender has a process of its own; FLOPs are those torch counts in the first pass (none
for attention on a CPU, on either side), seconds the median of the passes after it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # process time, not how well cores are shared
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not open it: we fork

import numpy as np
import soundfile
import torch
import trl
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from trl.trainer import utils as trl_utils

from align.generation.engine import Decoding, Request
from align.generation.transformers_engine import LiveEngine
from align.models.answer_head import answers_only
from align.models.features import ClipFeatures, stack
from align.models.qwen2_audio.model import build_processor
from align.models.qwen2_audio.packed import pack
from align.training.clip_ids import ClipIds
from align.training.collate import SFTCollator
from tests.benchmarks.trl_steps import RATE, SHAPES, Clock, build_model

G, P, A, SECONDS = 8, 800, 128, 30
CLIP = "0.wav"
WORKLOADS = ("loss", "no_grad", "prefill", "rollout")
REQUIRED = {"loss": (3.9, 3.5), "prefill": (7.0, None)}
"""Workload -> least ratios of the stock's FLOPs and process time to ours."""


class Group:
    """The group that both contenders work on, and a model of its own."""

    def __init__(self, size: str, folder: Path, packed: bool) -> None:
        rng = np.random.default_rng(0)
        samples = 0.1 * rng.standard_normal(SECONDS * RATE)
        soundfile.write(folder / CLIP, samples.astype(np.float32), RATE)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor = build_processor(
            ["a b"] * 20, vocab_size=300, mel_bins=128, hop_length=160, clip_s=30
        )
        self.audio_id = self.processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
        model = build_model(SHAPES[size], self.device)
        model.config.audio_token_id = model.model.config.audio_token_id = self.audio_id
        self.model = pack(model) if packed else model
        self.features = ClipFeatures(self.processor, folder)
        self.engine = LiveEngine(self.model, self.processor, self.features)
        self.engine.stops = [-1]  # every completion is as long as the others
        self.request = self._request()
        prompt = torch.tensor(self.engine.encode(self.request, self.features([CLIP])).ids)
        words = torch.from_numpy(rng.integers(self.audio_id + 1, SHAPES[size].vocabulary, (G, A)))
        self.rows = torch.cat([prompt.expand(G, -1), words], 1).to(self.device)
        self.labels = self.rows.clone()
        self.labels[:, : len(prompt)] = -100
        self.prompt = prompt[None].to(self.device)

    def _request(self) -> Request:
        """A prompt of P tokens."""
        for n in range(P):
            request = Request("a b " * n, (CLIP,))
            if len(self.engine.encode(request, self.features([CLIP])).ids) >= P:
                return request
        raise ValueError(f"no prompt has {P} tokens")


def stock(group: Group) -> dict[str, Callable[[], Any]]:
    """TRL's rows through the stock model, and transformers' generate."""
    trl_utils.add_fused_lm_head(group.model, outputs=("log_probs", "entropy"))
    [clip] = group.features([CLIP])
    audio = {name: value.to(group.device) for name, value in stack([clip] * G).items()}
    own = {name: value[:1] for name, value in audio.items()}

    def log_probs() -> Tensor:
        mask = torch.ones_like(group.rows)
        return group.model(
            input_ids=group.rows, attention_mask=mask, labels=group.labels, fused_lm_head=True, **audio
        ).log_probs

    @torch.no_grad()
    def generate(n: int) -> None:
        group.model.eval()
        group.model.generate(
            input_ids=group.prompt,
            attention_mask=torch.ones_like(group.prompt),
            **own,
            do_sample=True,
            top_k=0,
            num_return_sequences=G,
            max_new_tokens=n,
            min_new_tokens=n,
            pad_token_id=0,
        )

    return _workloads(group, log_probs, generate)


def ours(group: Group) -> dict[str, Callable[[], Any]]:
    """Ids that name their clip through the packed backbone, and our engine on the same weights."""
    trl_utils.add_fused_lm_head(group.model, outputs=("log_probs", "entropy"))
    collator = SFTCollator(group.processor, group.features, packed=True)
    clip_ids = ClipIds(collator, [CLIP], group.model.get_input_embeddings().num_embeddings)
    prompt = clip_ids.name(group.prompt[0].tolist(), [CLIP])
    rows = group.rows.clone()
    rows[:, : len(prompt)] = torch.tensor(prompt, device=group.device)

    def log_probs() -> Tensor:
        batch = clip_ids.batch(rows, torch.ones_like(rows))
        return answers_only(group.model)(**batch, labels=group.labels, fused_lm_head=True).log_probs

    def generate(n: int) -> None:
        group.model.eval()
        decoding = Decoding(n, 1.0, completions=G, suppress=(group.audio_id,))
        [(_, completions)] = group.engine.complete({0: group.request}, decoding, seed=0)
        assert [len(completion.token_ids) for completion in completions] == [n] * G

    return _workloads(group, log_probs, generate)


def _workloads(
    group: Group, log_probs: Callable[[], Tensor], generate: Callable[[int], None]
) -> dict[str, Callable[[], Any]]:
    def loss() -> None:
        group.model.zero_grad()
        log_probs().sum().backward()

    return {
        "loss": loss,
        "no_grad": torch.no_grad()(log_probs),
        "prefill": lambda: generate(1),
        "rollout": lambda: generate(A),
    }


CONTENDERS = {"stock": stock, "ours": ours}


def measure(task: tuple[str, str, str, int]) -> dict[str, Any]:
    """One contender on one workload, in this process."""
    workload, contender, size, rounds = task
    trl_utils._use_triton = lambda device: True  # answer positions only, as on a GPU
    with tempfile.TemporaryDirectory() as folder:
        group = Group(size, Path(folder), packed=contender == "ours")
        run = CONTENDERS[contender](group)[workload]
        with FlopCounterMode(display=False) as counter:
            run()
        took = []
        for _ in range(rounds):
            before = Clock.now()
            run()
            took.append([after - start for after, start in zip(Clock.now(), before, strict=True)])
    process_s, wall_s = (statistics.median(times) for times in zip(*took, strict=True))
    flops = float(counter.get_total_flops())
    row = {
        "workload": workload,
        "contender": contender,
        "flops": flops,
        "process_s": process_s,
        "wall_s": wall_s,
    }
    print(f"  {workload:<8} {contender:<6} {flops / 1e9:8.1f} GFLOP {process_s:8.2f} s", flush=True)
    return row


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the ratios of stock to ours."""
    lines = []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        theirs, own = (
            next(r for r in rows if (r["workload"], r["contender"]) == (workload, contender))
            for contender in CONTENDERS
        )
        told = []
        needed = REQUIRED.get(workload, (None, None))
        for key, least in zip(("flops", "process_s"), needed, strict=True):
            ratio = theirs[key] / own[key]
            required = "" if least is None else f" (>= {least} {'ok' if ratio >= least else 'MISSED'})"
            told.append(f"{key} {ratio:.2f} x{required}")
        lines.append(f"{workload:<8} stock / ours: {', '.join(told)}")
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="timed passes")
    parser.add_argument("--size", choices=sorted(SHAPES), default="prop")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/rl.json"))
    given = parser.parse_args()
    tasks = [(w, c, given.size, given.rounds) for w in given.workload or WORKLOADS for c in CONTENDERS]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        rows = list(pool.imap(measure, tasks, chunksize=1))
    print("\n".join(["", *verdict(rows)]))
    about = {"torch": torch.__version__, "trl": trl.__version__, "size": given.size, "prompt": P, "answer": A}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, "group": G, "load": os.getloadavg()[0], "rows": rows}, indent=1)
    given.out.write_text(text)
    print(f"\nwritten to {given.out}")


if __name__ == "__main__":
    main()
