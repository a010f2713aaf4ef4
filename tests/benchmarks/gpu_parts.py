"""What `gpu_check` measures, part by part: each yields figures as it has them, in a process of its own.

Sizes are names of `trl_steps.SHAPES`: `7b` on a GPU, `toy` for a rehearsal. Times are of the wall, after all
work given to a GPU; peaks are those of torch's allocator.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not open it: we fork

import numpy as np
import peft
import torch
import transformers
import trl
from torch import Tensor

from align.generation.engine import Decoding, Request
from align.generation.transformers_engine import TransformersEngine
from align.kernels.attention import BACKENDS, Ragged
from align.kernels.choice import choose
from align.kernels.prefix_tree import prefix_tree
from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.flops import gemm_peak
from align.planning import estimate
from align.training.lengths import Longest
from align.training.memory import MicroBatchPlan, plan_micro_batches
from align.training.preparation import prepare_model
from align.training.tuning import LoRA, Tuning
from tests.benchmarks import dpo as steps
from tests.benchmarks import rl
from tests.benchmarks.trl_steps import (
    CONTENDERS,
    LORA_TARGETS,
    SHAPES,
    WORKLOADS,
    Clock,
    Collator,
    Contender,
    build_model,
    make_rows,
    make_trainer,
    trainer_arguments,
)

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
PAIRS = {"7b": "30s/128", "toy": "5s/32"}
"""By size, the workload of pairs: seconds of their clips, tokens of their completions."""
Figures = Iterator[dict[str, Any]]


def card(size: str) -> Figures:
    """What the figures are of; opens the GPU, so that one that cannot be used fails here."""
    yield {
        "device": torch.cuda.get_device_name() if ON_GPU else f"{platform.machine()} CPU",
        "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if ON_GPU else None,
        "python": platform.python_version(),
        **{library.__name__: library.__version__ for library in (torch, transformers, peft, trl)},
        "cuda": torch.version.cuda,
    }
    if ON_GPU:
        yield {"gemm_peak": gemm_peak(DEVICE, torch.bfloat16)}


# -------------------------------------------------------------------------- attention


def attention(size: str) -> Figures:
    """Outputs, gradients and times of every back end on packed pairs, against `dense` in float32."""
    heads, width, pairs, prompt, answer = (32, 128, 4, 800, 128) if size == "7b" else (2, 16, 2, 24, 8)
    texts = [(pair, side) for pair in range(pairs) for side in (pairs, pairs + 1)]
    tree = prefix_tree([np.repeat(text, (prompt, answer)) for text in texts])
    sees = Ragged.of(tree.segments, causal=True).to(DEVICE)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    torch.manual_seed(0)
    states = [
        torch.randn(1, heads, sees.segments[-1].end, width, device=DEVICE, dtype=dtype) for _ in range(3)
    ]

    def computed(backend: str, given: Sequence[Tensor]) -> list[Tensor]:
        leaves = [state.detach().requires_grad_() for state in given]
        output = BACKENDS[backend](*leaves, sees, None)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]

    exact = computed("dense", [state.float() for state in states])
    yield {"chosen": choose(DEVICE, dtype, heads, width), "tokens": states[0].shape[2], "type": str(dtype)}
    for name in BACKENDS:
        try:
            own = computed(name, states)
            errors = [
                float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(own, exact, strict=True)
            ]
            told = dict(zip(("output", "d_query", "d_key", "d_value"), errors, strict=True))
            seconds = _median_s(lambda name=name: computed(name, states), times=10)
            yield {name: {"largest_error": told, "agrees": max(errors) < 0.05, "wall_s": seconds}}
        except (NotImplementedError, RuntimeError, TypeError) as error:
            yield {name: {"error": f"{type(error).__name__}: {error}"[:500]}}


def _median_s(work: Callable[[], object], times: int) -> float:
    took = []
    for _ in range(times):
        before = Clock.now()[1]
        work()
        took.append(Clock.now()[1] - before)
    return statistics.median(took)


# -------------------------------------------------------------------------- steps of TRL and ours


def dpo_trl_default(size: str) -> Figures:
    """TRL as it comes: a live reference, activation checkpointing."""
    yield from _best_batch("trl default", size)


def dpo_trl_tuned(size: str) -> Figures:
    """TRL with the reference's log-probs computed before, no checkpointing."""
    yield from _best_batch("trl tuned", size)


def dpo_ours(size: str) -> Figures:
    """The same pairs through the packed backbone."""
    yield from _best_batch("ours", size)


_TRIES_S = 45
"""No larger batch is tried after so many seconds: it takes about twice as long as the one before."""


def _best_batch(contender: str, size: str) -> Figures:
    """A LoRA-DPO step with more and more pairs at once, until memory is out or a pair takes no less time."""
    started = time.monotonic()
    best: dict[str, Any] | None = None
    tried: dict[str, Any] = {}
    for n in (1, 2, 4, 8, 16) if size == "7b" else (1,):
        row = _measured(PAIRS[size], contender, size, CONTENDERS["dpo"][contender]._replace(batch_size=n))
        tried[str(n)] = row["wall_s_per_pair"] if row else "out of memory"
        if row and (best is None or row["wall_s_per_pair"] < best["wall_s_per_pair"]):
            best = row
        yield {"wall_s_per_pair_by_batch_size": tried, "best": best}
        if row is not best or time.monotonic() - started > _TRIES_S:
            return


def sft(size: str) -> Figures:
    """A LoRA-SFT step on clips of mixed lengths: ours, then TRL's without checkpointing.

    Of 16 examples, or of half as many until they fit.
    """
    for contender in ("ours", "trl"):
        how = CONTENDERS["sft"][contender]
        tried = (
            _measured("sft mixed", contender, size, how._replace(batch_size=n))
            for n in ((16, 8, 4, 2) if size == "7b" else (2,))
        )
        yield {contender: next(filter(None, tried), "out of memory")}


def _measured(workload: str, contender: str, size: str, how: Contender) -> dict[str, Any] | None:
    """As `tests.benchmarks.dpo` measures, one warm-up step and one that counts; None: out of memory."""
    _forget()
    given = Namespace(size=size, steps=1, lora=True, contenders={workload: {contender: how}})
    return steps.measure((workload, contender, given))


def _forget() -> None:
    """Give the GPU's memory back, and count its peak anew."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# -------------------------------------------------------------------------- memory


def memory(size: str) -> Figures:
    """The planned memory of LoRA-DPO, measured before the run and by arithmetic, and a step's peak."""
    workload, rank = WORKLOADS[PAIRS[size]], 16
    tuning = Tuning(lora=LoRA(rank, 32, 0.0, LORA_TARGETS), memory_gb=None if ON_GPU else 8.0, packed=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = _plan(size, tuning, folder)
        n = plan.micro_batch
        yield {"plan": plan._asdict(), "planned_gb": plan.gb, "arithmetic_gb": _arithmetic_gb(size, n, rank)}
        _forget()
        how = Contender(packed=True, precomputed=True, batch_size=n)
        given = trainer_arguments(
            workload, how, size=size, steps=2, lora=True, folder=folder, trl={"bf16": ON_GPU}
        )
        make_trainer(workload, given, Clock()).train()
        if ON_GPU:
            peak, reserved = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
            yield {"peak_gb": peak, "reserved_gb": reserved, "planned_over_peak": plan.gb / peak}


def _plan(size: str, tuning: Tuning, folder: Path) -> MicroBatchPlan:
    """As a stage plans the micro-batches of a step of 16 pairs."""
    workload, model = WORKLOADS[PAIRS[size]], build_model(SHAPES[size], DEVICE.type)
    [row] = make_rows(workload, 1, SHAPES[size].vocabulary, folder)
    plan = prepare_model(
        model,
        tuning,
        lambda: plan_micro_batches(
            model,
            tuning,
            {},
            name="gpu-check",
            folder=folder,
            batch_size=16 if size == "7b" else 2,
            longest=lambda: Longest(row),
            collate=Collator(folder, workload.kind, packed=True),
        ),
    )
    assert plan is not None, "no plan without a limit of memory"
    return plan


def _arithmetic_gb(size: str, pairs: int, rank: int) -> float:
    """What `align check` would print for these pairs."""
    s, workload = SHAPES[size], WORKLOADS[PAIRS[size]]
    shape = estimate.Shape(
        audio_width=s.audio_width,
        audio_layers=s.audio_layers,
        audio_ffn=4 * s.audio_width,
        vocab=s.vocabulary,
        width=s.text_width,
        layers=s.text_layers,
        ffn=s.feed_forward,
        heads=s.text_heads,
        kv_heads=s.text_heads,
    )
    load = estimate.Workload(
        sequences=2,
        clips=1,
        audio_tokens=shape.audio_tokens(workload.seconds[0]),
        text_tokens=(50 + 2 * workload.answer[1]) / 2,
        lora_rank=rank,
        element_bytes=2 if ON_GPU else 4,
        packed=True,
        completions=2,
    )
    standing = sum(estimate.states_of(shape, load, "ddp", gpus=1)) + estimate.OVERHEAD
    return (standing + pairs * estimate.activations(shape, load)) / 1e9


# -------------------------------------------------------------------------- resume


def resume(size: str) -> Figures:
    """SFT with a frozen tower: an unbroken run, the same again, and one that stops and resumes.

    Where the second differs from the first, the GPU's own kernels do not repeat themselves.
    """
    from tests.benchmarks.gpu_world import World  # here, because it needs more libraries than other parts

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = World(folder, d_model=1024 if size == "7b" else 32)
        unbroken = world.trained("unbroken")
        again = world.trained("again")
        yield {"losses": unbroken.losses, "again": again.compared_with(unbroken)}
        resumed = world.trained("resumed", stop_at=world.STEPS // 2)
        yield {"resumed": resumed.compared_with(unbroken), "frozen_tower": resumed.tower == world.tower}


# -------------------------------------------------------------------------- rollouts


def rollouts(size: str) -> Figures:
    """One group of GRPO, 8 completions of 128 tokens: our engine, then transformers' generate."""
    for contender in ("ours", "stock"):
        _forget()
        row = rl.measure(("rollout", contender, size, 2 if size == "7b" else 1))
        peak = torch.cuda.max_memory_allocated() / 1e9 if ON_GPU else None
        yield {contender: {**row, "tokens_per_s": rl.G * rl.A / row["wall_s"], "peak_gb": peak}}


def vllm(size: str) -> Figures:
    """Greedy completions of the vLLM engine beside the transformers engine's, of a small policy."""
    try:  # here, because it needs more libraries than other parts
        from align.generation.vllm.engine import VllmEngine
        from align.generation.vllm.server import missing
        from tests.benchmarks.gpu_world import World
    except ImportError as error:
        reason: str | None = str(error)
    else:
        reason = missing()
    if reason is not None:
        yield {"status": "skipped", "reason": reason}
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = World(folder, d_model=1024 if size == "7b" else 64)
        qwen2_audio.save(world.policy(), world.processor, folder / "policy")
        clips = ClipFeatures(world.processor, folder)
        requests = {i: Request("Is the tone high or low?", (f"{i % 2}.wav",)) for i in range(16)}
        texts = {}
        for engine_class in (TransformersEngine, VllmEngine):
            started = time.perf_counter()
            engine = engine_class(folder / "policy", clips)
            try:
                ready = time.perf_counter()
                groups = dict(engine.complete(requests, Decoding(64, 0.0), seed=0))
                took = time.perf_counter() - ready
            finally:
                engine.close()
            texts[engine_class] = [groups[i][0].token_ids for i in requests]
            n_tokens = sum(map(len, texts[engine_class]))
            yield {engine_class.__name__: {"starts_in_s": ready - started, "tokens_per_s": n_tokens / took}}
        ours, theirs = texts.values()
        yield {"equal_completions": sum(a == b for a, b in zip(ours, theirs, strict=True)), "of": len(ours)}


class Part(NamedTuple):
    """A measurement and the seconds that it may take."""

    run: Callable[[str], Figures]
    budget_s: int


PARTS = {
    "card": Part(card, 40),
    "attention": Part(attention, 40),
    "dpo_ours": Part(dpo_ours, 90),
    "dpo_trl_tuned": Part(dpo_trl_tuned, 90),
    "dpo_trl_default": Part(dpo_trl_default, 90),
    "memory": Part(memory, 60),
    "resume": Part(resume, 50),
    "sft": Part(sft, 80),
    "rollouts": Part(rollouts, 80),
    "vllm": Part(vllm, 90),
}
"""In the order in which they run: what matters most comes first, should the time run out."""
