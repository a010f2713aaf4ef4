"""Judgements to preference pairs, factuality and behaviour kept apart.

Reads: completions, annotations. Writes: pairs.jsonl, quarantine.jsonl (judgements left out, and why).
    align run recipes/demo --only 5_pairs
"""

from __future__ import annotations

from pathlib import Path

from align.recipe.config.preference import PairsConfig
from align.run_folder.artifacts import StageFolder, read_json
from preference_data import store
from preference_data.dataset.dataset import QUARANTINE
from preference_data.preferences import pairs
from preference_data.schema import Completion, Judgement, Prompt


def run(config: PairsConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Build pairs; returns per axis how many comparisons became pairs, ties and disagreements.

    Raises:
        LowAgreement: the annotators agree less than `min_alpha` asks for.
    """
    source, annotated = inputs[config.completions], inputs[config.annotations]
    prompts = {prompt.id: prompt for prompt in store.stream(source / "prompts.jsonl", Prompt)}
    completions = {item.id: item for item in store.stream(source / "completions.jsonl", Completion)}
    judgements, refused = pairs.without_control_tokens(
        store.read(annotated / "judgements.jsonl", Judgement), prompts, completions
    )
    store.write_rows(out.path / QUARANTINE, [item._asdict() for item in refused])
    built, tallies = pairs.build(
        judgements,
        prompts,
        completions,
        min_agreement=config.min_agreement,
        # as in the quality report of those annotators
        min_heard=read_json(annotated / "quality.json")["min_heard"],
        min_alpha=config.min_alpha,
    )
    store.write(out.path / "pairs.jsonl", built)
    counts = {
        f"{name}_{axis}": float(count)
        for axis, tally in tallies.items()
        for name, count in tally._asdict().items()
    }
    return {**counts, "control_tokens": float(len(refused))}
