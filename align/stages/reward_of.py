"""From the block `reward:` of a stage's config to the values of `align.rewards`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from align.evaluation.judges.llm_judge import open_judge
from align.recipe.config.rewards import ModelReward, RewardConfig
from align.rewards.judge import JudgeReward
from align.rewards.model import RewardModelReward
from align.rewards.reward import Reward, RewardSum
from align.rewards.rules import (
    FORMS,
    ChoiceReward,
    FactReward,
    FormatReward,
    LengthReward,
    TranscriptReward,
)


def reward_of(config: RewardConfig, corpus: Path, run: Path, inputs: Mapping[str, Path]) -> RewardSum:
    """The sum of all rewards that a config names; a judge's replies are kept in the folder of the `run`.

    `inputs` are the stages that the config names.
    """
    return RewardSum(list(_rewards(config, corpus, run, inputs)))


def _rewards(config: RewardConfig, corpus: Path, run: Path, inputs: Mapping[str, Path]) -> Iterator[Reward]:
    if config.facts:
        yield FactReward(corpus / "phrasebook.yaml", config.facts.model_dump())
    if config.wer:
        yield TranscriptReward(config.wer.language, config.wer.weight)
    if config.choice:
        yield ChoiceReward(config.choice.weight)
    if config.format:
        yield FormatReward(config.format.pattern or FORMS[config.format.form or ""], config.format.weight)
    if config.length:
        yield LengthReward(config.length.max_chars, config.length.weight)
    if config.judge:
        judge = open_judge(cache=run / "judge_replies.jsonl", **config.judge.model_dump(exclude={"weight"}))
        yield JudgeReward(judge, config.judge.weight)
    if config.model:
        model = ModelReward(stage=config.model) if isinstance(config.model, str) else config.model
        yield RewardModelReward(inputs[model.stage] / "model", corpus, model.weight, run)
