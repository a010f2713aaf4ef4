"""Completions that are good or bad on their own, of judgements or scores: what KTO trains on.

Reads: completions, annotations or scores. Writes: labels.jsonl, and of annotations
quarantine.jsonl (judgements left out, and why), rules.json and the page rules.html (what each rule left out).
    align run recipes/demo_rl --only 5_labels
"""

from __future__ import annotations

import math
from pathlib import Path

from align.recipe.config.preference import LabelsConfig
from align.release import rules as page
from align.run_folder.artifacts import StageFolder
from align.stages import counted_judgements
from preference_data import store
from preference_data.preferences import labels
from preference_data.schema import Completion, CompletionScore, Prompt


def run(config: LabelsConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Label completions; returns how many are desirable, undesirable and neither."""
    source = inputs[config.completions]
    prompts = {prompt.id: prompt for prompt in store.stream(source / "prompts.jsonl", Prompt)}
    if config.annotations:
        return _of_judgements(config, inputs[config.annotations], prompts, out)
    assert config.scores is not None
    assert config.good_from is not None
    completions = {item.id: item for item in store.stream(source / "completions.jsonl", Completion)}
    bad_to = math.nextafter(config.good_from, -math.inf) if config.bad_to is None else config.bad_to
    built, tally = labels.of_scores(
        store.stream(inputs[config.scores] / "scores.jsonl", CompletionScore),
        prompts,
        completions,
        good_from=config.good_from,
        bad_to=bad_to,
    )
    store.write(out.path / "labels.jsonl", built)
    return {name: float(count) for name, count in tally._asdict().items()}


def _of_judgements(
    config: LabelsConfig, annotated: Path, prompts: dict[str, Prompt], out: StageFolder
) -> dict[str, float]:
    counted, removals, metrics = counted_judgements.count(config, annotated, prompts, out)
    built, tally = labels.of_judgements(
        counted, prompts, axis=config.axis, min_agreement=config.min_agreement
    )
    store.write(out.path / "labels.jsonl", built)
    page.write(removals, counted, out.path / "rules", title="Labels")
    return {**metrics, **{name: float(n) for name, n in tally._asdict().items()}}
