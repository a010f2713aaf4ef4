"""How long people of an annotate stage will work, for `align check`: from counts and earlier judgements."""

from __future__ import annotations

from collections.abc import Iterator
from math import comb
from pathlib import Path
from typing import NamedTuple

from align.recipe.config.corpus import CLIP_S, CorpusConfig
from align.recipe.config.preference import AnnotateConfig, SampleConfig
from align.recipe.recipe import Recipe, Step
from align.run_folder.artifacts import MANIFEST
from preference_data import store
from preference_data.preferences import working_time
from preference_data.preferences.working_time import ASSUMED, Pace
from preference_data.schema import Prompt


class _Basis(NamedTuple):
    """What the hours follow from: prompts, seconds of their clips, and in words how far that is known."""

    prompts: int
    audio_s: float
    pace: Pace
    caveat: str = ""


def lines(step: Step, recipe: Recipe, run: Path) -> Iterator[str]:
    """What a stage takes of people; nothing where none are asked.

    Args:
        step: of the recipe.
        recipe: gives the corpus and what is sampled.
        run: an earlier run's folder: its prompts, clips and judgements are used where they are finished.
    """
    config = step.config
    if not isinstance(config, AnnotateConfig) or config.by != "people":
        return
    basis = _measured(config, run) or _assumed(recipe.corpus_of(step))
    per_prompt, size = config.comparisons_per_prompt, config.completions_per_comparison
    for sampled in (other.config for other in recipe.steps if other.name == config.completions):
        if isinstance(sampled, SampleConfig):
            per_prompt = min(per_prompt, comb(sampled.completions_per_prompt, size))
    comparisons = per_prompt * basis.prompts
    time = working_time.estimate(
        round(config.people_share * min(comparisons, config.max_comparisons or comparisons)),
        overlap=config.overlap,
        retests=config.retests,
        gold=config.gold,
        annotators=config.annotators,
        audio_s=basis.audio_s,
        completions=size,
        pace=basis.pace,
    )
    yield f"{step.name}: up to {time}{basis.caveat}"


def _measured(config: AnnotateConfig, run: Path) -> _Basis | None:
    """What the earlier stages of a run have left, if they are finished."""
    sampled, corpus = run / config.completions, run / config.corpus
    if not ((sampled / MANIFEST).exists() and (corpus / MANIFEST).exists()):
        return None
    prompts = {item.id: item for item in store.stream(sampled / "prompts.jsonl", Prompt)}
    durations_s = working_time.clip_durations(corpus, prompts.values())
    pace = working_time.pace_of(working_time.earlier_judgements(run / "snapshots"), prompts, durations_s)
    audio_s = sum(durations_s[path] for item in prompts.values() for path in item.audios)
    return _Basis(len(prompts), audio_s / max(1, len(prompts)), pace)


def _assumed(corpus: CorpusConfig | None) -> _Basis:
    """What is known before anything has run: corpora that are made ask once about each clip."""
    if corpus and corpus.clips:
        return _Basis(corpus.clips.preference, CLIP_S, ASSUMED)
    longest_s = corpus.max_duration_s if corpus else 0.0
    clips = f"clips are taken to last {longest_s:g} s" if corpus else "the clips come on top"
    return _Basis(1000, longest_s, ASSUMED, f"; of 1,000 prompts, for their number is not known yet; {clips}")
