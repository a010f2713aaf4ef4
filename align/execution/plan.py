"""What of a recipe is finished in a run folder, what is not, and how one tells."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.recipe.config.corpus import ClipCounts, CorpusConfig
from align.recipe.config.evaluation import EvaluateConfig
from align.recipe.config.preference import SampleConfig
from align.recipe.config.training import DPOConfig, PretrainConfig, SFTConfig
from align.recipe.recipe import Recipe, Step
from align.run_folder.artifacts import MANIFEST, foreign_digest, read_json, sha256_json

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
