"""A judge model's score as a reward: an OpenAI-compatible endpoint, or a chat model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.evaluation.benchmarks.air_bench import item_of
from align.evaluation.judges.llm_judge import LLMJudge
from align.rewards.reward import BadReward, Parts
from preference_data.schema import Prompt

_BEST, _WORST = 10.0, 1.0


class JudgeReward:
    """The judge's score of 1 to 10, in both orders beside the reference, as 0 to 1.

    None where a reply gave no usable score: such a completion moves nothing. Replies are kept in the judge's
    cache, so that a resumed training pays for none twice.
    """

    def __init__(self, judge: LLMJudge, weight: float = 1.0) -> None:
        self.judge, self.weights = judge, {"judge": weight}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a prompt without a reference answer, which the judge compares with."""
        if missing := [prompt.id for prompt in prompts if not prompt.answer_gt.strip()]:
            raise BadReward(
                f"reward.judge: prompt {missing[0]!r} has no reference in answer_gt ({len(missing)} of "
                f"{len(prompts)} prompts), and a judge that cannot hear compares with one. Give the corpus "
                "answers (a column `reference` of a manifest), or let people judge: 4_annotate"
            )

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Parts:
        """0 to 1, or None; equal completions of a prompt are judged once."""
        distinct = list(dict.fromkeys(zip(prompts, completions, strict=True)))
        items = [item_of(prompt, number) for number, (prompt, _) in enumerate(distinct)]
        answers = self.judge.judge(items, [text for _, text in distinct], label=None)
        values = {
            key: None if answer.score is None else (answer.score - _WORST) / (_BEST - _WORST)
            for key, answer in zip(distinct, answers, strict=True)
        }
        return {"judge": [values[key] for key in zip(prompts, completions, strict=True)]}

    def identity(self) -> dict[str, Any]:
        """With the model, all that shapes its replies, and the prompt's digest."""
        return {
            "kind": "judge",
            "judge": self.judge.model.name,
            "model": dict(self.judge.model.identity),
            "protocol": self.judge.protocol.name,
            "prompt_sha256": self.judge.protocol.prompt_sha256,
            "weights": dict(self.weights),
        }
