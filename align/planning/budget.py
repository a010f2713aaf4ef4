"""What the training stages of a recipe will take: parameters, memory per GPU, disk, hours. For `align check`.

Nothing is loaded: shapes come from the recipe, from config.json files on disk, or are well known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from align.planning import estimate, memory_plan
from align.planning.estimate import STRATEGIES, Job, Shape, Strategy
from align.planning.memory_plan import Plan, by_hand
from align.recipe.config.corpus import CorpusConfig
from align.recipe.config.training import (
    Assemble,
    DPOConfig,
    ModelShape,
    PretrainConfig,
    SFTConfig,
    TrainingConfig,
)
from align.recipe.recipe import Recipe, Step
from align.run_folder.artifacts import MANIFEST, read_json
from preference_data.prompts.prompts import all_tags

TEXT_TOKENS = 256
"""Of a sequence, prompt and answer: an assumption."""
SMALL = 1e8
"""Parameters up to which a model trains anywhere: no table for it."""
_WORKERS = 8
"""GPUs over which the table spreads what the recipe has in one process."""
_RANK = 16
"""Of the table's LoRA, where the recipe has none."""
_QWEN2_AUDIO_7B = Shape()
_PUBLISHED: dict[str, Shape] = {
    "Qwen/Qwen2-Audio-7B": _QWEN2_AUDIO_7B,
    "Qwen/Qwen2-Audio-7B-Instruct": _QWEN2_AUDIO_7B,
    "openai/whisper-large-v2": Shape(mel_bins=80),
    "openai/whisper-large-v3": Shape(),
    "Qwen/Qwen1.5-7B": Shape(vocab=151_936),
}
"""Of models that are named by their Hub id and not downloaded yet."""
_NEW_TOKENS = 3 + sum(map(len, all_tags("tags_released")))
"""At most, around audio and for every task, where a model is assembled."""
_TEXT_FIELDS = ("vocab", "width", "layers", "ffn", "heads", "kv_heads")


class Spread(NamedTuple):
    """Over what a stage is spread, and what of it learns."""

    workers: int
    strategy: Strategy | None
    offload: str
    parts: tuple[str, ...] | None
    lora_rank: int | None
    frozen_bytes: float


def lines(step: Step, recipe: Recipe, run: Path, gpu_gb: float) -> Iterator[str]:
    """What a training stage takes; nothing for other stages.

    Args:
        step: of the recipe.
        recipe: gives corpus and policy.
        run: an earlier run's folder, whose measured speed is used.
        gpu_gb: memory of a GPU, 10^9 bytes, where the recipe does not say it.
    """
    config = step.config
    if not isinstance(config, TrainingConfig):
        return
    shape = shape_of(step.name, recipe)
    if shape is None:
        yield f"{step.name}: the shape of its model is unknown until it is on disk; no estimate"
        return
    if config.hardware and config.hardware.memory_gb:
        gpu_gb = config.hardware.memory_gb
    spread = _spread(config)
    example = _example(config, shape, spread, _seconds(config, recipe, shape))
    plan = _plan(config, shape, spread, example, gpu_gb)
    job, passes = _job(config, shape, spread, example, plan)
    count, learn = estimate.parameters(shape), estimate.trained(shape, job)
    kind = spread.strategy or "ddp"
    disk = estimate.checkpoint_bytes(shape, job, kind)
    tokens = passes * spread.workers * job.clips * job.audio_tokens
    yield (
        f"{step.name}: {_count(count.total)} parameters, {_count(learn)} learn; up to {tokens:,} audio "
        f"tokens a step; a checkpoint takes {_size(disk)}, {_kept(config)}"
    )
    if count.total > SMALL:
        yield from _table(shape, job, spread, gpu_gb)
    if plan is not None and (count.total > SMALL or (config.hardware and config.hardware.memory_gb)):
        yield f"  plan for {kind} on {_gpus(spread.workers)}: {plan.why}"
    measured = _measured(step, run)
    if measured:
        yield f"  {measured}"
    elif count.total > SMALL:
        yield f"  {_assumed(step, spread.workers, shape, job, passes)}"


# -------------------------------------------------------------------------- what the recipe says


def shape_of(name: str, recipe: Recipe) -> Shape | None:
    """Of the model that a stage trains, or that a reference names; None if that cannot be known yet."""
    step = next((step for step in recipe.steps if step.name == name), None)
    if step is None:
        return _outside(name)
    config = step.config
    if isinstance(config, SFTConfig | DPOConfig):
        return shape_of(config.policy, recipe)
    if not isinstance(config, PretrainConfig):
        return None
    match config.model:
        case ModelShape() as small:
            return _small(small)
        case Assemble(audio=audio, text=text):
            return _assembled(audio, text)
        case policy:
            return shape_of(policy, recipe)


def _small(model: ModelShape) -> Shape:
    d = model.d_model
    return Shape(
        mel_bins=model.mel_bins,
        audio_width=d,
        audio_layers=model.audio_layers,
        audio_ffn=4 * d,
        positions=model.clip_s * estimate.SAMPLE_RATE // model.hop_length // 2,
        vocab=model.vocab_size,
        width=d,
        layers=model.text_layers,
        ffn=8 * d // 3,
        heads=model.heads,
        kv_heads=model.heads,
        hop_length=model.hop_length,
    )


def _outside(ref: str) -> Shape | None:
    config = _config(ref)
    return _PUBLISHED.get(ref) if config is None else estimate.shape_of_config(config)


def _assembled(audio: str, text: str) -> Shape | None:
    """Of a Whisper and a Qwen2; the embeddings at most as large as all new tokens make them."""
    whisper, qwen = _config(audio), _config(text)
    shapes = (
        estimate.joined(whisper, {}) if whisper else _PUBLISHED.get(audio),
        estimate.joined({}, qwen) if qwen else _PUBLISHED.get(text),
    )
    if shapes[0] is None or shapes[1] is None:
        return None
    language = {name: getattr(shapes[1], name) for name in _TEXT_FIELDS}
    return shapes[0]._replace(**{**language, "vocab": language["vocab"] + _NEW_TOKENS})


def _config(ref: str) -> dict[str, Any] | None:
    folder = Path(ref).expanduser()
    for path in (folder / "model" / "config.json", folder / "config.json"):
        if path.exists():
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return config
    return None


def _spread(config: TrainingConfig) -> Spread:
    """As the recipe has it."""
    hardware = config.hardware
    lora = config.lora if isinstance(config, SFTConfig | DPOConfig) else None
    return Spread(
        workers=hardware.workers if hardware else 1,
        strategy=hardware.strategy if hardware else None,
        offload=hardware.offload if hardware else "none",
        parts=None if config.train is None else tuple(config.train),
        lora_rank=None if lora is None else lora.r,
        frozen_bytes=0.6 if lora is not None and lora.bits else 2,
    )


def _seconds(config: TrainingConfig, recipe: Recipe, shape: Shape) -> float:
    """The longest clip: as the corpus allows, and as the model hears."""
    heard = shape.positions * 2 * shape.hop_length / estimate.SAMPLE_RATE
    corpora = [other.config for other in recipe.steps if other.name == config.corpus]
    return min([heard, *(corpus.max_duration_s for corpus in corpora if isinstance(corpus, CorpusConfig))])


def _example(config: TrainingConfig, shape: Shape, spread: Spread, seconds: float) -> Job:
    """A pass of one example, or pair, with the longest clip."""
    is_dpo, live = isinstance(config, DPOConfig), not config.trl.get("precompute_ref_log_probs", True)
    example = Job(
        sequences=1,
        clips=1,
        audio_tokens=shape.audio_tokens(seconds),
        text_tokens=TEXT_TOKENS,
        parts=spread.parts,
        lora_rank=spread.lora_rank,
        frozen_bytes=spread.frozen_bytes,
        with_reference=is_dpo and spread.lora_rank is None and live,
        packed=bool(config.packed),
    )
    return example.as_pair() if is_dpo else example


def _plan(config: TrainingConfig, shape: Shape, spread: Spread, example: Job, gpu_gb: float) -> Plan | None:
    """What the stage will choose by itself, on one GPU unless told more; None where the recipe has chosen."""
    if by_hand(config.trl):
        return None
    return memory_plan.plan(
        shape,
        example,
        spread.strategy or "ddp",
        spread.workers,
        spread.offload,
        examples=max(1, config.batch_size // spread.workers),
        available=gpu_gb * 1e9,
    )


def _job(
    config: TrainingConfig, shape: Shape, spread: Spread, example: Job, plan: Plan | None
) -> tuple[Job, int]:
    """One GPU's pass, and how many of them make an optimizer step."""
    if plan is not None:
        rows, passes, again = plan.examples, plan.passes, plan.recomputed
    else:
        passes = int(config.trl.get("gradient_accumulation_steps", 1))
        rows = max(1, config.batch_size // (spread.workers * passes))
        asked = any(config.trl.get(f"{kind}_checkpointing") for kind in ("activation", "gradient"))
        again = estimate.layers(shape, example) if asked else 0
    return example.times(rows)._replace(recomputed=again), passes


# -------------------------------------------------------------------------- in words


def _table(shape: Shape, job: Job, spread: Spread, gpu_gb: float) -> Iterator[str]:
    """Memory by strategy; what the recipe chose is marked, and told if it cannot fit."""
    n = spread.workers if spread.strategy else _WORKERS
    again = f"of {job.recomputed} layers computed again" if job.recomputed else "kept"
    yield (
        f"  GB per GPU on {n} GPUs; sequences at a time: {job.sequences}, with {TEXT_TOKENS} text tokens "
        f"each (assumed); activations {again}:"
    )
    columns = ("weights", "gradients", "optimizer", "activations", "sum")
    yield "    " + " " * 12 + "".join(f"{column:>13}" for column in columns)
    options = [(strategy, job) for strategy in STRATEGIES]
    if job.lora_rank is None:
        fewer = min(job.recomputed, shape.layers)  # the tower does not learn then
        options.append(("ddp", job._replace(lora_rank=_RANK, parts=None, recomputed=fewer)))
    for strategy, job_ in options:
        chosen = strategy == spread.strategy and job_ is job
        found = estimate.memory(shape, job_, strategy, n, spread.offload if chosen else "none")
        name = strategy if job_ is job else f"LoRA r {_RANK}"
        cells = "".join(f"{part / 1e9:>13.1f}" for part in (*found, found.total))
        fits = found.total <= gpu_gb * 1e9
        yield (
            f"    {name:<12}{cells}  {'fits' if fits else 'does not fit'} {gpu_gb:g} GB"
            + (" <- the recipe's" if chosen else "")
        )
        if chosen and not fits:
            advice = memory_plan.advice(found, strategy)
            yield f"    WARNING: the recipe's {name} on {n} GPUs cannot fit. {advice}"


def _measured(step: Step, run: Path) -> str:
    """Hours at the speed of the same stage of an earlier run, if there is one."""
    path = run / step.name / MANIFEST
    speed = read_json(path).get("metrics", {}).get("examples_per_s") if path.exists() else None
    if not speed:
        return ""
    config = step.config
    if isinstance(config, PretrainConfig | SFTConfig):
        return f"{_duration(config.steps * config.batch_size / speed / 3600)} at the speed measured in {path}"
    return f"{_duration(1000 / speed / 3600)} per 1,000 pairs at the speed measured in {path}"


def _assumed(step: Step, workers: int, shape: Shape, job: Job, passes: int) -> str:
    """Hours at an assumed share of the GPUs' peak."""
    config = step.config
    speed = (
        f"at {estimate.MFU:.0%} of {estimate.PEAK_FLOPS / 1e12:.0f} TFLOP/s (H100) on each of "
        f"{_gpus(workers)}: assumed, not measured"
    )
    if isinstance(config, PretrainConfig | SFTConfig):
        return f"{_duration(estimate.hours(config.steps, passes, shape, job))} {speed}"
    pairs = workers * job.sequences / 2
    return f"{_duration(estimate.hours(1, 1, shape, job) * 1000 / pairs)} per 1,000 pairs {speed}"


def _kept(config: TrainingConfig) -> str:
    if isinstance(config, DPOConfig) and config.choose:
        return f"one every {config.save_steps} steps, all kept"
    return "3 at a time"  # two, and the new one until it is whole


def _gpus(n: int) -> str:
    return "1 GPU" if n == 1 else f"{n} GPUs"


def _count(n: float) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"


def _size(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"
