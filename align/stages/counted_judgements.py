"""The judgements of an annotate stage that count, for the stages that learn from them: pairs and labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from align.recipe.config.preference import FromJudgementsOrScores
from align.run_folder.artifacts import StageFolder, read_json
from preference_data import store
from preference_data.dataset.dataset import QUARANTINE
from preference_data.preferences import model_agreement, rules
from preference_data.preferences.pairs import without_control_tokens
from preference_data.preferences.rules import CountedJudgements, Removal
from preference_data.schema import Judgement, Prompt
from preference_data.store import BadRecord


class Outcome(NamedTuple):
    """The judgements that count, what each rule left out of all, and the numbers of both for MLflow."""

    counted: CountedJudgements
    removals: list[Removal]
    metrics: dict[str, float]


def count(
    config: FromJudgementsOrScores, annotated: Path, prompts: Mapping[str, Prompt], out: StageFolder
) -> Outcome:
    """Apply the recipe's rules to the judgements in the folder `annotated`; writes quarantine.jsonl.

    Raises:
        BadRecord: a judgement is about a prompt that is not among those of the completions.
        ModelDisagrees: a model agrees with people less than `min_model_agreement` asks for.
        UnknownAnnotator: `exclude` names somebody who has judged nothing.
        UnknownWeights: `dawid_skene` has nothing to learn from.
    """
    given = store.read(annotated / "judgements.jsonl", Judgement)
    for item in given:
        if item.purpose != "gold" and item.prompt_id not in prompts:
            raise BadRecord(
                f"{annotated / 'judgements.jsonl'}: judgement {item.id} is about prompt {item.prompt_id}, "
                "which `completions` lacks: name the completions that were judged"
            )
    judgements, refused = without_control_tokens(given, prompts)
    store.write_rows(out.path / QUARANTINE, [item._asdict() for item in refused])
    values = rules.Rules(
        min_heard=read_json(annotated / "quality.json")["min_heard"],  # as in the report on these annotators
        exclude=tuple(config.exclude),
        min_gold=config.min_gold,
        annotator_weights=config.annotator_weights,
    )
    used = model_agreement.usable(
        judgements, bound=config.min_model_agreement, min_heard=values.min_heard, exclude=values.exclude
    )
    counted = rules.count(used.judgements, values)
    return Outcome(
        counted,
        [
            *rules.removals(counted, values, control_tokens=len(given) - len(judgements)),
            *model_agreement.removals(used),
        ],
        {
            **{name: float(n) for name, n in counted.tally._asdict().items()},
            **{f"model_unused_{axis}": float(n) for axis, n in used.left_out.items()},
            "control_tokens": float(len(refused)),
        },
    )
