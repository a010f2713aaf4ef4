"""Judgements to preference pairs, factuality and behaviour kept apart; or scores to pairs by reward.

Reads: completions, annotations or scores. Writes: pairs.jsonl, and of annotations quarantine.jsonl
(judgements left out, and why).
    align run recipes/demo --only 5_pairs
"""

from __future__ import annotations

from pathlib import Path

from align.recipe.config.preference import PairsConfig
from align.run_folder.artifacts import StageFolder, read_json
from preference_data import store
from preference_data.dataset.dataset import QUARANTINE
from preference_data.preferences import pairs
from preference_data.schema import Completion, CompletionScore, Judgement, Prompt


def run(config: PairsConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Build pairs; returns how many comparisons or prompts became pairs, and why others did not.

    Raises:
        LowAgreement: the annotators agree less than `min_alpha` asks for.
    """
    source = inputs[config.completions]
    prompts = {prompt.id: prompt for prompt in store.stream(source / "prompts.jsonl", Prompt)}
    completions = {item.id: item for item in store.stream(source / "completions.jsonl", Completion)}
    if config.scores:
        built, by_reward = pairs.of_scores(
            store.stream(inputs[config.scores] / "scores.jsonl", CompletionScore),
            prompts,
            completions,
            opponents=config.opponents,
            margin=config.margin,
            seed=config.seed,
        )
        metrics = {name: float(count) for name, count in by_reward._asdict().items()}
    else:
        assert config.annotations is not None
        annotated = inputs[config.annotations]
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
        metrics = {
            f"{name}_{axis}": float(count)
            for axis, tally in tallies.items()
            for name, count in tally._asdict().items()
        }
        metrics["control_tokens"] = float(len(refused))
    store.write(out.path / "pairs.jsonl", built)
    return metrics
