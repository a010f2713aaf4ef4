"""The interface of rewards, and several of them as one.

A reward reads a prompt's record and a completion's text, never the audio. Completions are data: whatever they
say, no reward executes, fetches or formats it.

A further kind is a class with this interface, a block in `align/recipe/config/rewards.py`, and its line in
`align/stages/reward_of.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from preference_data.schema import Prompt

Parts = dict[str, list[float | None]]
"""Name of a part -> its value for each completion; None where the part says nothing about it."""


class BadReward(ValueError):
    """A reward that these prompts cannot be scored by; nothing was trained."""


class Reward(Protocol):
    """Scores completions by named parts. The reward is the sum of the parts times their weights."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Name of each part -> its weight."""
        ...

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that this cannot score, before anything is trained.

        Raises:
            BadReward: naming a prompt, what it lacks, and the next step.
        """
        ...

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Parts:
        """Every part's value for each completion, of the prompt at its place."""
        ...

    def identity(self) -> dict[str, Any]:
        """Everything that decides a value: `kind`, `judge` where there is one, digests, weights.

        `judge` is what an evaluation's judge with the same marks would say of itself, see `same_judge`.
        """
        ...


class RewardSum:
    """Several rewards as one: all their parts, which have different names."""

    def __init__(self, rewards: Sequence[Reward]) -> None:
        self.rewards = list(rewards)
        self.weights = {name: weight for reward in rewards for name, weight in reward.weights.items()}
        if len(self.weights) < sum(len(reward.weights) for reward in rewards):
            raise BadReward(f"two rewards have a part of the same name: {[list(r.weights) for r in rewards]}")

    def check(self, prompts: Sequence[Prompt]) -> None:
        """See `Reward.check`."""
        for reward in self.rewards:
            reward.check(prompts)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Parts:
        """See `Reward.score`."""
        return {
            name: values
            for reward in self.rewards
            for name, values in reward.score(prompts, completions).items()
        }

    def total(self, parts: Mapping[str, float | None]) -> float | None:
        """A completion's parts times their weights; None where no part says anything, as TRL has it."""
        weighted = [self.weights[name] * value for name, value in parts.items() if value is not None]
        return sum(weighted) if weighted else None

    def identity(self) -> dict[str, Any]:
        """Those of the rewards, as `rewards`."""
        return {"rewards": [reward.identity() for reward in self.rewards]}


def same_judge(reward: Mapping[str, Any], judge: Mapping[str, Any]) -> bool:
    """Whether a reward's identity is, or contains, the judge of an evaluation as `Judge.describe` gives it.

    A judge model is the same whatever it is asked in whichever protocol; so are marks by known facts.
    """
    kinds = reward.get("rewards", [reward])
    return any(
        kind.get("judge") in (judge.get("model"), judge.get("name")) for kind in kinds if kind.get("judge")
    )
