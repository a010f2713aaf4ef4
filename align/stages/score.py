"""What every completion is worth to a reward.

Pairs and labels are made of it, so that a policy can learn from its own completions without people: the best
against the worst for on-policy DPO, the best alone (`loss: sft`) for best-of-n fine-tuning. Reads:
completions, corpus. Writes: scores.jsonl, reward.json (what decided).
    align run recipes/demo_rl --only 4_score
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean

from align.recipe.config.preference import ScoreConfig
from align.rewards.reward import RewardSum
from align.run_folder.artifacts import StageFolder, write_json
from align.run_folder.progress import Progress
from align.stages.reward_of import reward_of
from preference_data import store
from preference_data.prompts.prompts import control_token
from preference_data.schema import Completion, CompletionScore, Prompt

_AT_A_TIME = 256
"""Completions between two lines of progress. A judge's replies are kept one by one, whatever gets killed."""


def run(config: ScoreConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Score all completions; returns the means of each part, of all, and of each prompt's best."""
    source = inputs[config.completions]
    prompts = {prompt.id: prompt for prompt in store.stream(source / "prompts.jsonl", Prompt)}
    completions = store.read(source / "completions.jsonl", Completion)
    reward = reward_of(config.reward, inputs[config.corpus], out.final.parent, inputs)
    reward.check(list(prompts.values()))
    scores: list[CompletionScore] = []
    with Progress(out.name, len(completions), out.path) as progress:
        for start in range(0, len(completions), _AT_A_TIME):
            scores += _scores(reward, prompts, completions[start : start + _AT_A_TIME])
            progress.update(len(scores))
    store.write(out.path / "scores.jsonl", scores)
    write_json(out.path / "reward.json", reward.identity())
    return _metrics(scores, reward)


def _scores(
    reward: RewardSum, prompts: dict[str, Prompt], completions: list[Completion]
) -> list[CompletionScore]:
    parts = reward.score(
        [prompts[item.prompt_id] for item in completions], [item.text for item in completions]
    )
    rows = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
    return [
        CompletionScore(
            id=item.id,
            prompt_id=item.prompt_id,
            reward=None if control_token(item.text) else reward.total(row),
            parts=row,
        )
        for item, row in zip(completions, rows, strict=True)
    ]


def _metrics(scores: list[CompletionScore], reward: RewardSum) -> dict[str, float]:
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for score in scores:
        if score.reward is not None:
            by_prompt[score.prompt_id].append(score.reward)
    parts = {
        f"reward/{name}": [value for score in scores if (value := score.parts[name]) is not None]
        for name in reward.weights
    }
    groups = by_prompt.values()
    return {
        "completions": float(len(scores)),
        "unscored": float(len(scores) - sum(map(len, groups))),
        **{name: fmean(values) for name, values in parts.items() if values},
        **(
            {
                "reward": fmean(fmean(group) for group in groups),
                "best_reward": fmean(max(group) for group in groups),
                "same_reward": fmean(float(max(group) == min(group)) for group in groups),
            }
            if groups
            else {}
        ),
    }
