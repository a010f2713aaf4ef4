"""Judge pairs of completions for factuality and behaviour.

Here by annotators in this process that know the facts. Completions in, annotations out.
Reads: completions, corpus. Writes: annotations.jsonl.
    align run recipes/demo --only 4_annotate
"""

from __future__ import annotations

from pathlib import Path

from align.artifacts import StageFolder
from align.config import AnnotateConfig
from preference_data import agreement, store
from preference_data.phrasebook import Phrasebook
from preference_data.schema import AXES, Completion, Prompt
from ui_annotation import simulated


def run(config: AnnotateConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Annotate; returns counts and Krippendorff's alpha per axis."""
    source = inputs[config.completions]
    prompts = {prompt.id: prompt for prompt in store.stream(source / "prompts.jsonl", Prompt)}
    shown = simulated.comparisons(
        store.read(source / "completions.jsonl", Completion),
        per_prompt=config.comparisons_per_prompt,
        seed=config.seed,
    )
    annotations = simulated.annotate(
        shown,
        prompts,
        Phrasebook.load(inputs[config.corpus] / "phrasebook.yaml"),
        annotators=config.annotators,
        overlap=config.overlap,
        error_rate=config.error_rate,
        seed=config.seed,
    )
    store.write(out.path / "annotations.jsonl", annotations)
    alphas = {axis: agreement.alpha(annotations, axis) for axis in AXES}
    leans = {
        f"share_of_a_{axis}_{rater}": share
        for axis in AXES
        for rater, share in agreement.share_of_a(annotations, axis).items()
    }
    return {
        "comparisons": float(len(shown)),
        "annotations": float(len(annotations)),
        "error_rate_declared": config.error_rate,
        **{f"alpha_{axis}": value for axis, value in alphas.items() if value is not None},
        **leans,
    }
