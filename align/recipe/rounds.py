"""`stage: rounds`: on-policy DPO, written once and run as the stages that it stands for.

    5_rounds.yaml              5_rounds_1_sample  5_rounds_1_score  5_rounds_1_pairs  5_rounds_1_dpo
    stage: rounds         ->   5_rounds_2_sample  5_rounds_2_score  5_rounds_2_pairs  5_rounds
    rounds: 2

Each of them resumes, is shown and is kept like any other. The last policy has the file's own name, so later
stages refer to it as to every policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from align.recipe.config.preference import RoundsConfig
from align.recipe.stage_file import Loc, StageFile


def expand(files: list[StageFile]) -> list[StageFile]:
    """The stages of a recipe. Rounds with mistakes stay as they are written, for these to be reported."""
    return [stage for file in files for stage in _stages(file)]


def _stages(file: StageFile) -> Iterator[StageFile]:
    if file.data.get("stage") != RoundsConfig.kind():
        yield file
        return
    try:
        config = RoundsConfig.model_validate(file.data)
    except ValidationError:
        yield file
        return
    policy = config.policy
    for round_ in range(1, config.rounds + 1):
        name = f"{file.name}_{round_}"
        trained = file.name if round_ == config.rounds else f"{name}_dpo"
        own = {"seed": config.seed + round_ - 1, "corpus": config.corpus}
        completions = {"completions": f"{name}_sample"}
        parts: list[tuple[str, str, dict[str, Any]]] = [
            ("sample", f"{name}_sample", {**own, "policy": policy}),
            ("score", f"{name}_score", {**own, **completions}),
            ("pairs", f"{name}_pairs", {"seed": own["seed"], **completions, "scores": f"{name}_score"}),
            ("dpo", trained, {**own, "policy": policy, "pairs": f"{name}_pairs"}),
        ]
        for place, (kind, stage, keys) in enumerate(parts):
            number = (*file.number, round_, place)
            data = {"stage": kind, **getattr(config, kind), **keys}
            yield StageFile(file.path, stage, number, data, _places(file, kind, keys), [], kind, keys)
        policy = trained


def _places(file: StageFile, kind: str, keys: Mapping[str, Any]) -> dict[Loc, str]:
    """Where a stage's values are written: under its kind, or beside it."""
    inner = {loc[1:]: place for loc, place in file.places.items() if loc[0] == kind and loc[1:]}
    beside: dict[Loc, str] = {(key,): file.place((key,)) for key in keys}
    return {(): file.place((kind,)), **beside, **inner}
