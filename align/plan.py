"""What of a recipe is finished in a run folder, what is not, and how one tells."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.artifacts import MANIFEST, read_json, read_manifest, sha256_file, sha256_json
from align.config import (
    ClipCounts,
    CorpusConfig,
    DPOConfig,
    EvaluateConfig,
    PretrainConfig,
    SampleConfig,
    SFTConfig,
)
from align.recipe import Recipe, Step
from preference_data.clip_paths import SOURCE

State = Literal["done", "outdated", "partial", "pending"]


class Standing(NamedTuple):
    """How far one step is. `manifest` is that of its finished folder, outdated or not."""

    step: Step
    state: State
    manifest: dict[str, Any] | None


class Reads(NamedTuple):
    """Digests of everything a step reads.

    `inputs`: stages of the run, and policies, pairs and corpora from elsewhere, whose making a manifest
    tells; `data`: folders and files that no stage made.
    """

    inputs: dict[str, str]
    data: dict[str, str]


def reads(step: Step, digests: dict[str, str]) -> Reads:
    """What a step reads, given the digests of the recipe's finished steps."""
    made = {name: digests[name] for name in step.needs}
    foreign = {ref: foreign_digest(ref) for ref in step.foreign}
    return Reads(inputs=made | foreign, data={path: foreign_digest(path) for path in step.folders})


def fingerprint(step: Step, read: Reads) -> str:
    """What decides whether finished work still belongs: config, contents of what it read, our version."""
    version = metadata.version("audio-align")
    config = step.config.model_dump(mode="json", exclude={"hardware"})  # where work is done is not what it is
    return sha256_json({"config": config, **read._asdict(), "version": version})


def foreign_digest(ref: str) -> str:
    """Stands for the contents of a policy or of data from outside the recipe, without reading gigabytes.

    A stage folder has its digest in the manifest; another folder is told by names, sizes and times of
    its files (hidden ones are caches), a prepared data set by those of its records, which name each clip's
    hash; a file by its contents; a Hub id, or what is not there, stands for itself.
    """
    folder = Path(ref).expanduser()
    if folder.is_file():
        return sha256_file(folder)
    if not folder.is_dir():
        return f"hub:{ref}"
    if (folder / MANIFEST).exists():
        return str(read_manifest(folder)["output_digest"])
    found = folder.glob("*") if (folder / SOURCE).exists() else folder.rglob("*")
    files = sorted(path for path in found if path.is_file() and not path.name.startswith("."))
    stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
    return sha256_json([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def survey(recipe: Recipe, run: Path) -> list[Standing]:
    """Where every step stands. A step is done only if everything it was made from is, unchanged."""
    digests: dict[str, str] = {}
    standings = []
    for step in recipe.steps:
        path = run / step.name / MANIFEST
        manifest = read_json(path) if path.exists() else None
        state: State = "pending"
        is_fed = all(name in digests for name in step.needs)
        if manifest and is_fed and manifest["fingerprint"] == fingerprint(step, reads(step, digests)):
            state = "done"
            digests[step.name] = manifest["output_digest"]
        elif (run / f".partial-{step.name}").exists():
            state = "partial"
        elif manifest:
            state = "outdated"
        standings.append(Standing(step, state, manifest))
    return standings


def arithmetic(step: Step, recipe: Recipe) -> str:
    """How much work a step is, as far as the recipe tells; empty if it does not."""
    config: Any = step.config
    corpora = {other.name: other.config for other in recipe.steps if isinstance(other.config, CorpusConfig)}
    corpus = corpora.get(getattr(config, "corpus", ""))
    clips = corpus.clips if corpus else None
    match config:
        case CorpusConfig(clips=ClipCounts() as counts):
            per_split = counts.model_dump()
            shown = ", ".join(f"{split} {n:,}" for split, n in per_split.items())
            return f"{sum(per_split.values()):,} clips ({shown})"
        case PretrainConfig() | SFTConfig():
            n = config.steps * config.batch_size
            epochs = f", {n / clips.train:.1f} per training clip" if clips else ""
            return f"{config.steps:,} steps x {config.batch_size} = {n:,} examples{epochs}"
        case DPOConfig():
            return f"{config.epochs:g} epochs, {config.batch_size} pairs a step"
        case SampleConfig():
            per_prompt = f"{config.completions_per_prompt} completions per prompt"
            return f"{clips.preference:,} clips, {per_prompt}" if clips else per_prompt
        case EvaluateConfig():
            asked = f" x {getattr(clips, config.split):,} clips" if clips else ""
            return f"{len(config.policies)} policies{asked}"
    return ""
