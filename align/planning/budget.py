"""What the training stages of a recipe will take: parameters, memory per GPU, disk, hours. For `align check`.

Nothing is loaded: shapes come from the recipe, from config.json files on disk, or are well known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.planning import estimate, tower_outputs
from align.planning.estimate import STRATEGIES, Shape, Strategy, UnknownShape, Workload
from align.recipe.between_stages import train_comes_from
from align.recipe.config.alignment import GRPOConfig
from align.recipe.config.corpus import CLIP_S, CorpusConfig
from align.recipe.config.training import (
    Assemble,
    FurtherTrainingConfig,
    Hardware,
    ModelShape,
    RandomAudio,
    RandomText,
    StepsConfig,
    TrainingConfig,
)
from align.recipe.recipe import Recipe, Step
from align.run_folder.artifacts import MANIFEST, DamagedFile, read_json, read_manifest
from preference_data.dataset.dataset import Dataset
from preference_data.prompts.prompts import all_tags
from preference_data.schema import AudioClip

TEXT_TOKENS = 256
"""Of a sequence, prompt and completion: an assumption."""
SMALL = 1e8
"""Parameters up to which a model trains anywhere: no table for it."""
SMALL_TEXT_TOKENS = 64
"""Of a sequence that a small model learns: an assumption."""
_WORKERS = 8
"""GPUs over which the table spreads what the recipe has in one process."""
_ROWS = 2000
"""Of a table of clips, that are looked at."""
_RANK = 16
"""Of the table's LoRA, where the recipe has none."""
_QWEN2_AUDIO = {"audio_config": {}, "text_config": {"vocab_size": 156_032, "intermediate_size": 11_008}}
_WHISPER = dict(zip(estimate.AUDIO_FIELDS, (128, 1280, 32, 5120, 1500), strict=True))
_PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-Audio-7B": _QWEN2_AUDIO,
    "Qwen/Qwen2-Audio-7B-Instruct": _QWEN2_AUDIO,
    "openai/whisper-large-v2": {**_WHISPER, "num_mel_bins": 80},
    "openai/whisper-large-v3": _WHISPER,
    "Qwen/Qwen1.5-7B": dict(zip(estimate.TEXT_FIELDS, (151_936, 4096, 32, 11_008, 32), strict=True)),
}
"""config.json of models that are named by their Hub id and not downloaded yet."""
_NEW_TOKENS = 3 + sum(map(len, all_tags("tags_released")))
"""At most, around audio and for every task, where a model is assembled."""


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
    try:
        shape = shape_of(step.name, recipe)
    except UnknownShape as error:
        yield f"{step.name}: no estimate: {error}"
        return
    hardware = config.hardware or Hardware()
    corpus = recipe.corpus_of(step)
    hearing_s = shape.positions * 2 * shape.hop_length / estimate.SAMPLE_RATE
    load = _workload(config, shape, min(hearing_s, corpus.max_duration_s) if corpus else hearing_s)
    disk = f"{_size(estimate.checkpoint_bytes(shape, load, hardware.strategy))}, 2 at a time"
    if config.keeps_candidates:
        weights = _size(estimate.weights_bytes(shape, load, hardware.strategy))
        disk += f" and weights of {weights} every {config.save_steps} steps"
    count, learned = estimate.parameters(shape), estimate.trained(shape, load)
    yield (
        f"{step.name}: {_count(count.total)} parameters, {_count(learned)} learn "
        f"({_what_learns(step, recipe)}); up to {config.batch_size * load.clips * load.audio_tokens:,} audio "
        f"tokens a step; a checkpoint takes "
        f"{disk}, none when it is done"
    )
    if count.total > SMALL:
        yield from _table(config, shape, load, hardware.memory_gb or gpu_gb)
    yield from _hours(step.name, config, run, shape, load)
    yield _tower_outputs(config, shape, _clips(config, shape, corpus, run))


def _what_learns(step: Step, recipe: Recipe) -> str:
    """Parts of the model that a training stage trains, and which stage says so where it does not itself."""
    config = step.config
    if isinstance(config, FurtherTrainingConfig) and config.lora is not None:
        return f"LoRA r {config.lora.r}"
    if not isinstance(config, TrainingConfig) or config.train is None:
        return "all parts"
    parts = ", ".join(config.train)
    if "train" in step.source.data or not isinstance(config, FurtherTrainingConfig):
        return parts
    before = train_comes_from(config, {other.name: other for other in recipe.steps})
    return f"{parts}, as in {before.name}" if before else parts


def _hours(name: str, config: TrainingConfig, run: Path, shape: Shape, load: Workload) -> Iterator[str]:
    """At the speed of an earlier run; else, for a large model, at an assumed share of the GPUs' peak."""
    examples, noun = (1000, " per 1,000 pairs") if config.n_examples is None else (config.n_examples, "")
    path = run / name / MANIFEST
    try:
        speed = read_manifest(path.parent).get("metrics", {}).get("examples_per_s")
    except (FileNotFoundError, DamagedFile):
        speed = None
    if speed:
        yield f"  {_duration(examples / speed / 3600)}{noun} at the speed measured in {path}"
    elif estimate.parameters(shape).total <= SMALL:
        yield _on_cpus(config, shape, load, examples, noun)
    else:
        workers = config.hardware.workers if config.hardware else 1
        per_gpu = examples / workers * estimate.flops(shape, load)
        hours = per_gpu / (estimate.MFU * estimate.PEAK_FLOPS) / 3600
        yield (
            f"  {_duration(hours)}{noun} at {estimate.MFU:.0%} of {estimate.PEAK_FLOPS / 1e12:.0f} TFLOP/s "
            f"(H100) on each of {_gpus(workers)}: assumed, not measured"
        )
        if isinstance(config, GRPOConfig):
            yield from _drawing(config, workers, shape)


def _on_cpus(config: TrainingConfig, shape: Shape, load: Workload, examples: int, noun: str) -> str:
    """Memory and time of a small model in this process, a whole batch at once and in float32."""
    short = load._replace(text_tokens=SMALL_TEXT_TOKENS, element_bytes=4, frozen_bytes=4)
    at_once = config.batch_size / config.trl.get("gradient_accumulation_steps", 1)
    needed = sum(estimate.states_of(shape, short, "ddp", 1)) + at_once * estimate.activations(shape, short)
    flops, without = estimate.flops(shape, short), ""
    if _why_not_kept(config, shape) is None:
        longest_s = short.audio_tokens * 4 * shape.hop_length / estimate.SAMPLE_RATE
        flops -= short.clips * tower_outputs.clip_flops(shape, longest_s)
        without = " without encoding clips,"
    hours = examples * flops / estimate.CPU_FLOPS / 3600
    return (
        f"  on a CPU about {_size(needed + estimate.CPU_OVERHEAD)} of memory and {_duration(hours)}{noun},"
        f"{without} at {estimate.CPU_FLOPS / 1e9:g} GFLOP/s, with the longest clips and {SMALL_TEXT_TOKENS} "
        "text tokens a sequence: assumed, not measured"
    )


def _drawing(config: GRPOConfig, workers: int, shape: Shape) -> Iterator[str]:
    """The least that it takes to draw completions: each of their tokens reads all weights once."""
    batches = math.ceil(config.batch_size / workers / config.rollout_batch_size)
    tokens = config.steps // config.iterations * batches * config.max_new_tokens
    weights = 2 * estimate.parameters(shape).total
    hours = _duration(tokens * weights / estimate.PEAK_BYTES / 3600)
    yield (
        f"  drawing completions comes on top: if all are as long as they may be, {tokens:,} times "
        f"{_size(weights)} of weights are read, {hours} at {estimate.PEAK_BYTES / 1e12:g} TB/s (H100)"
    )


# -------------------------------------------------------------------------- outputs of a frozen tower


class _Clips(NamedTuple):
    """That a stage trains on: how many, how long on average, and in words how far that is known."""

    n: int
    mean_s: float
    caveat: str = ""


def _tower_outputs(config: TrainingConfig, shape: Shape, clips: _Clips) -> str:
    """What keeping the audio tower's outputs takes on disk and saves, or why they are not kept."""
    hardware = config.hardware or Hardware()
    if reason := _why_not_kept(config, shape):
        return f"  outputs of the audio tower are not kept on disk: {reason}"
    on_gpus = estimate.parameters(shape).total > SMALL
    speed = estimate.MFU * estimate.PEAK_FLOPS * hardware.workers if on_gpus else estimate.CPU_FLOPS
    size = clips.n * tower_outputs.clip_bytes(shape, clips.mean_s, 2 if on_gpus else 4)
    hours = clips.n * tower_outputs.clip_flops(shape, clips.mean_s) / speed / 3600
    passes = config.passes if config.n_examples is None else config.n_examples / clips.n
    given = hardware.tower_outputs_gb
    if given is not None and size > given * 1e9:
        n_kept = int(clips.n * given * 1e9 / size)
        return (
            f"  outputs of the audio tower are kept on disk for {n_kept:,} of {clips.n:,} clips"
            f"{clips.caveat}, the others are encoded each time: hardware.tower_outputs_gb is {given:g}, "
            f"and all of them take {_size(size)}"
        )
    limit = "a tenth of what is free" if given is None else f"{given:g} GB"
    return (
        f"  outputs of the audio tower are kept on disk: {_size(size)} for {clips.n:,} clips of "
        f"{clips.mean_s:.3g} s{clips.caveat}, at most {limit}. A run takes {_duration(hours)} to encode them "
        f"once, in place of {_duration(passes * hours)} for the {passes:.3g} passes of this stage alone; a "
        f"disk that gives more than {size / hours / 3600 / 1e6:.2g} MB/s is faster"
    )


def _why_not_kept(config: TrainingConfig, shape: Shape) -> str | None:
    hardware = config.hardware or Hardware()
    return tower_outputs.why_not_kept(
        packed=bool(config.packed),
        tower_learns=config.tower_learns,
        augmented=config.augments,
        strategy=hardware.strategy,
        tower_parameters=estimate.parameters(shape).audio_tower,
        limit_gb=hardware.tower_outputs_gb,
    )


def _clips(config: TrainingConfig, shape: Shape, corpus: CorpusConfig | None, run: Path) -> _Clips:
    """By the corpus of an earlier run, by the recipe, or by prepared data sets; else 1,000 of the longest."""
    split: Literal["train", "preference"] = "train" if isinstance(config, StepsConfig) else "preference"
    if measured := _measured_clips([run / config.corpus], split):
        return measured
    if corpus and corpus.clips:
        return _Clips(getattr(corpus.clips, split), CLIP_S)
    if corpus and (measured := _measured_clips([Path(part.folder) for part in corpus.sources], split)):
        return measured
    longest_s = shape.positions * 2 * shape.hop_length / estimate.SAMPLE_RATE
    return _Clips(
        1000,
        min(longest_s, corpus.max_duration_s) if corpus else longest_s,
        " (how many there are is not known yet)",
    )


def _measured_clips(folders: Sequence[Path], split: str) -> _Clips | None:
    """By the tables of prepared data sets, of which some rows are read; None if they are not there."""
    seconds = n = 0.0
    for folder in folders:
        if not folder.is_dir():
            return None
        table = Dataset(folder).records(AudioClip)
        rows = [table[i] for i in range(0, len(table), max(1, len(table) // _ROWS))]
        own = [row.duration_s for row in rows if row.split == split]
        scale = len(table) / max(1, len(rows))
        n, seconds = n + scale * len(own), seconds + scale * sum(own)
    return _Clips(round(n), seconds / n) if n else None


# -------------------------------------------------------------------------- what the recipe says


def shape_of(name: str, recipe: Recipe) -> Shape:
    """Shape of the model that a stage trains, or that a reference names.

    Raises:
        UnknownShape: the model is not on disk yet, or its config.json lacks a field.
    """
    configs = {step.name: step.config for step in recipe.steps if isinstance(step.config, TrainingConfig)}
    if name not in configs:
        return estimate.shape_of_config(_config_json(name), name)
    match configs[name].starts_from:
        case ModelShape() as small:
            return _small(small)
        case Assemble() as parts:
            fields = {**_audio_fields(parts.audio), **_text_fields(parts.text)}
            if parts.clip_s is not None:
                fields["positions"] = parts.clip_s * estimate.POSITIONS_PER_S
            return Shape(**fields)
        case str(policy):
            return shape_of(policy, recipe)


def _audio_fields(audio: RandomAudio | str) -> dict[str, int]:
    """Fields of a shape that the audio tower decides."""
    if isinstance(audio, str):
        return estimate.fields_of(_config_json(audio), estimate.AUDIO_FIELDS, audio)
    return {
        "mel_bins": audio.mel_bins,
        "audio_width": audio.d_model,
        "audio_layers": audio.layers,
        "audio_ffn": 4 * audio.d_model,
        "positions": 30 * estimate.POSITIONS_PER_S,
    }


def _text_fields(text: RandomText | str) -> dict[str, int]:
    """Fields of a shape that the language model decides."""
    if isinstance(text, str):
        fields = estimate.fields_of(_config_json(text), estimate.TEXT_FIELDS, text)
        return {**fields, "vocab": fields["vocab"] + _NEW_TOKENS}  # at most
    d = text.d_model
    return {
        "vocab": text.vocab_size,
        "width": d,
        "layers": text.layers,
        "ffn": 8 * d // 3,
        "heads": text.heads,
        "kv_heads": text.heads,
    }


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


def _config_json(ref: str) -> dict[str, Any]:
    folder = Path(ref).expanduser()
    for path in (folder / "model" / "config.json", folder / "config.json"):
        if path.exists():
            config: dict[str, Any] = read_json(path)
            return config
    for published, config in _PUBLISHED.items():
        if published == ref or published.endswith(f"/{folder.name}"):  # a folder that it is to be fetched to
            return config
    raise UnknownShape(f"the shape of {ref} is unknown until it is on disk")


def _workload(config: TrainingConfig, shape: Shape, seconds: float) -> Workload:
    """One example, or pair, with the longest clip."""
    lora = config.lora if isinstance(config, FurtherTrainingConfig) else None
    packed, n = bool(config.packed), config.sequences_per_example
    return Workload(
        sequences=n,
        clips=1 if packed else n,  # packed, they share a clip
        audio_tokens=shape.audio_tokens(seconds),
        text_tokens=TEXT_TOKENS,
        parts=None if config.train is None else tuple(config.train),
        lora_rank=None if lora is None else lora.r,
        frozen_bytes=0.6 if lora is not None and lora.bits else 2,
        checkpointed=any(config.trl.get(f"{kind}_checkpointing") for kind in ("activation", "gradient")),
        packed=packed,
        with_reference=lora is None and config.has_live_reference,
        completions=n if packed else 1,
    )


# -------------------------------------------------------------------------- in words


def _table(config: TrainingConfig, shape: Shape, load: Workload, gpu_gb: float) -> Iterator[str]:
    """Memory by strategy; what the recipe chose is marked, with a warning if it cannot fit."""
    n = config.hardware.workers if config.hardware else _WORKERS
    noun = {1: "example", 2: "pair"}.get(load.sequences, "group")
    yield (
        f"  GB per GPU on {_gpus(n)}; activations of one {noun} with its longest clip and {TEXT_TOKENS} text "
        f"tokens a sequence (assumed){', layers checkpointed' if load.checkpointed else ''}:"
    )
    columns = ("weights", "gradients", "optimizer", "activations", "sum")
    yield "    " + " " * 12 + "".join(f"{column:>13}" for column in columns)
    options: list[tuple[Strategy, str, Workload]] = [(strategy, strategy, load) for strategy in STRATEGIES]
    if load.lora_rank is None:
        options.append(
            ("ddp", f"LoRA r {_RANK}", load._replace(lora_rank=_RANK, parts=None, with_reference=False))
        )
    for strategy, name, option in options:
        chosen = config.hardware is not None and name == config.hardware.strategy
        offload = config.hardware.offload if chosen and config.hardware else "none"
        states = estimate.states_of(shape, option, strategy, n, offload)
        room = gpu_gb * 1e9 - sum(states) - estimate.OVERHEAD
        kept = estimate.activations(shape, option)
        cells = "".join(
            f"{part / 1e9:>13.1f}" for part in (*states, kept, sum(states) + kept + estimate.OVERHEAD)
        )
        verdict = _verdict(shape, option, room, max(1, config.batch_size // n))
        yield f"    {name:<12}{cells}  {verdict} {gpu_gb:g} GB" + (" <- the recipe's" if chosen else "")
        if chosen and verdict == _NO:
            advice = "more workers, offload: optimizer, or lora"
            if strategy in ("ddp", "zero2"):
                advice = "strategy: zero3, more workers, or lora"
            yield f"    WARNING: the recipe's {name} on {_gpus(n)} cannot fit. Take {advice}"


_NO = "does not fit"


def _verdict(shape: Shape, load: Workload, room: float, examples: int) -> str:
    """How many examples fit at a time; the stage measures it before it trains."""
    at_a_time = min(examples, int(room // estimate.activations(shape, load)))
    if at_a_time >= 1:
        return f"{at_a_time} at a time in"
    thrifty = estimate.activations(shape, load._replace(checkpointed=True)) <= room
    return "1 with layers checkpointed in" if thrifty else _NO


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
