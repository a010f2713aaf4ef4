"""Judgements to preference pairs, factuality and behaviour kept apart; or scores to pairs by reward.

Reads: completions, annotations or scores. Writes: pairs.jsonl, and of annotations quarantine.jsonl
(judgements left out, and why), rules.json and the page rules.html (what each rule left out).
    align run recipes/demo --only 5_pairs
"""

from __future__ import annotations

from pathlib import Path

from align.recipe.config.preference import PairsConfig
from align.release import rules as page
from align.run_folder.artifacts import StageFolder
from align.stages import counted_judgements
from preference_data import store
from preference_data.preferences import pairs
from preference_data.schema import Completion, CompletionScore, Prompt


def run(config: PairsConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Build pairs; returns how many completions or prompts became pairs, and why others did not.

    Raises:
        LowAgreement: the annotators agree less than `min_alpha` asks for.
        ModelDisagrees: a model agrees with people less than `min_model_agreement` asks for.
        UnknownAnnotator: `exclude` names somebody who has judged nothing.
        UnknownWeights: `dawid_skene` has nothing to learn from.
    """
    source = inputs[config.completions]
    prompts = {prompt.id: prompt for prompt in store.stream(source / "prompts.jsonl", Prompt)}
    if config.annotations:
        return _of_judgements(config, inputs[config.annotations], prompts, out)
    assert config.scores is not None
    completions = {item.id: item for item in store.stream(source / "completions.jsonl", Completion)}
    built, by_reward = pairs.of_scores(
        store.stream(inputs[config.scores] / "scores.jsonl", CompletionScore),
        prompts,
        completions,
        opponents=config.opponents,
        margin=config.margin,
        seed=config.seed,
    )
    store.write(out.path / "pairs.jsonl", built)
    return {name: float(count) for name, count in by_reward._asdict().items()}


def _of_judgements(
    config: PairsConfig, annotated: Path, prompts: dict[str, Prompt], out: StageFolder
) -> dict[str, float]:
    counted, removals, metrics = counted_judgements.count(config, annotated, prompts, out)
    built, tallies = pairs.build(
        counted,
        prompts,
        min_agreement=config.min_agreement,
        min_alpha=config.min_alpha,
        correction_weight=config.correction_weight,
    )
    store.write(out.path / "pairs.jsonl", built)
    removals += pairs.removals(tallies)
    page.write(removals, counted, out.path / "rules", title="Preference pairs")
    by_axis = {
        f"{name}_{axis}": float(n) for axis, tally in tallies.items() for name, n in tally._asdict().items()
    }
    return {**metrics, **by_axis}
