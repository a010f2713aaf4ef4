"""How well a reward ranks preference pairs that it has not seen, and whether it listens to do so.

Two ways to be right without judging: not hearing the clip, and counting characters. So pairs are also ranked
with their clips exchanged, and those of about equal lengths by themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit

from align.evaluation.statistics import Difference, Share, macro_bootstrap, wilson
from align.rewards.reward import Reward
from preference_data.schema import Prompt, stable_id

Pair = Mapping[str, Any]
"""`prompt`, `chosen`, `rejected`, `audios`, and what stands before the prompt: `system`, `history`."""
_SHUFFLES = 4
"""Other clips that each pair is ranked with, if there are as many."""
_MATCHED = 0.1
"""Completions whose lengths differ by no more of the longer one are about equally long."""
_BINS = 10


class Bin(NamedTuple):
    """Pairs of about one confidence: its mean, and the share of them that is ranked right."""

    confidence: float
    accuracy: float
    n: int


class PairAccuracy(NamedTuple):
    """Of held-out pairs. Right is only a strictly larger reward of the chosen completion."""

    accuracy: Share
    longer_is_chosen: Share
    """What preferring the longer completion would reach."""
    length_matched: Share
    """Accuracy on pairs of about equal lengths."""
    shuffled: Difference | None
    """Accuracy with the clips exchanged (before) and with the true ones (after), over pairs that have clips
    which can be exchanged; None if there are none. Clips are the units of the interval."""
    calibration_error: float
    """Expected calibration error (arXiv:1706.04599) of sigmoid(difference of the rewards), 0 to 1."""
    reliability: tuple[Bin, ...]

    @property
    def metrics(self) -> dict[str, float]:
        """Of a stage; what cannot be said is left out."""
        values = {
            "accuracy": self.accuracy.share,
            "accuracy_ci_low": self.accuracy.ci_low,
            "accuracy_ci_high": self.accuracy.ci_high,
            "accuracy_length_matched": self.length_matched.share,
            "longer_is_chosen": self.longer_is_chosen.share,
            "calibration_error": self.calibration_error,
        }
        if self.shuffled is not None:
            values |= {
                "accuracy_shuffled": self.shuffled.before,
                "accuracy_over_shuffled": self.shuffled.delta,
                "accuracy_over_shuffled_ci_low": self.shuffled.ci_low,
                "accuracy_over_shuffled_ci_high": self.shuffled.ci_high,
            }
        return {f"held_out/{name}": value for name, value in values.items() if value is not None}

    def shortcomings(self, min_accuracy: float | None, min_over_shuffled: float | None) -> list[str]:
        """What keeps it from being above these for certain (95 %), each with its numbers; see the config."""
        lines = []
        for name, (share, low, high, n) in (
            ("held-out pairs", self.accuracy),
            ("of them of about equal lengths", self.length_matched),
        ):
            if min_accuracy is not None and low is not None and low <= min_accuracy:
                lines.append(
                    f"accuracy on {n} {name} is {share:.3f} [{low:.3f}, {high:.3f}], not above min_accuracy "
                    f"{min_accuracy:g} for certain"
                )
        if min_over_shuffled is None:
            return lines
        if self.shuffled is None:
            lines.append(
                "no two held-out pairs have clips that could be exchanged, so whether it listens is not "
                "known: hold out more, or set min_accuracy_over_shuffled: null"
            )
        elif (s := self.shuffled).ci_low <= min_over_shuffled:
            lines.append(
                f"accuracy is {s.after:.3f} with the clips and {s.before:.3f} with clips shuffled between "
                f"{s.n} pairs; the difference {s.delta:.3f} [{s.ci_low:.3f}, {s.ci_high:.3f}] is not above "
                f"min_accuracy_over_shuffled {min_over_shuffled:g} for certain: it does not listen enough"
            )
        return lines


def pair_accuracy(reward: Reward, pairs: Sequence[Pair], seed: int) -> PairAccuracy:
    """Rank pairs by the only part of a reward, with their own clips and with others'."""
    others = other_clips([tuple(pair["audios"]) for pair in pairs], seed)
    own = [(pair, tuple(pair["audios"])) for pair in pairs]
    exchanged = [(pair, clips) for pair, given in zip(pairs, others, strict=True) for clips in given]
    differences = _differences(reward, own + exchanged)
    right = differences > 0
    true = right[: len(pairs)]
    ends = np.cumsum([0, *map(len, others)]) + len(pairs)
    heard = [n for n, given in enumerate(others) if given]
    lengths = np.array([(len(pair["chosen"]), len(pair["rejected"])) for pair in pairs])
    matched = np.abs(lengths[:, 0] - lengths[:, 1]) <= _MATCHED * lengths.max(axis=1)
    error, reliability = _calibration(differences[: len(pairs)])
    return PairAccuracy(
        wilson(int(true.sum()), len(pairs)),
        wilson(int((lengths[:, 0] > lengths[:, 1]).sum()), len(pairs)),
        wilson(int(true[matched].sum()), int(matched.sum())),
        macro_bootstrap(
            [right[ends[n] : ends[n + 1]].mean() for n in heard],
            true[heard],
            cells=[""] * len(heard),
            strata=[""] * len(heard),
            clusters=["\n".join(pairs[n]["audios"]) for n in heard],
            means={"accuracy": {"": 1.0}},
            seed=seed,
        )["accuracy"]
        if heard
        else None,
        error,
        reliability,
    )


def other_clips(clips: Sequence[tuple[str, ...]], seed: int) -> list[list[tuple[str, ...]]]:
    """For the clips of each pair those of up to four other pairs with as many; none if there are no others.

    Distinct clips lie on a circle in an order drawn from the seed, and all move on by the same number of
    places: pairs about the same clips get the same others, and every clip is heard as often as before.
    """
    circles: dict[int, list[tuple[str, ...]]] = defaultdict(list)
    for own in sorted(set(clips), key=lambda own: stable_id(seed, "shuffled", *own)):
        circles[len(own)].append(own)
    place = {own: number for circle in circles.values() for number, own in enumerate(circle)}
    others = []
    for own in clips:
        circle = circles[len(own)] if own else []
        shifts = range(1, min(_SHUFFLES + 1, len(circle)))
        others.append([circle[(place[own] + shift) % len(circle)] for shift in shifts])
    return others


def _differences(reward: Reward, heard: Sequence[tuple[Pair, tuple[str, ...]]]) -> np.ndarray:
    """Rewards of the chosen minus those of the rejected completions, with the clips given."""
    (part,) = reward.weights
    prompts = [_prompt(pair, clips) for pair, clips in heard]
    texts = [pair[side] for side in ("chosen", "rejected") for pair, _ in heard]
    values = np.array(reward.score(prompts + prompts, texts)[part], dtype=np.float64)
    return values[: len(heard)] - values[len(heard) :]


def _prompt(pair: Pair, clips: tuple[str, ...]) -> Prompt:
    """The conversation of a pair with these clips, as many as it has, in their places."""
    left = iter(clips)
    return Prompt(
        id="pair",
        system=pair.get("system"),
        audios=clips,
        history=tuple(
            turn.model_copy(update={"audios": tuple(islice(left, len(turn.audios)))})
            for turn in pair.get("history", ())
        ),
        question=pair["prompt"],
        answer_gt="",
        meta_info="",
        task_name="",
    )


def _calibration(differences: np.ndarray) -> tuple[float, tuple[Bin, ...]]:
    """Expected calibration error, and accuracy by confidence: of the side that has the larger reward."""
    confidence, right = expit(np.abs(differences)), differences > 0
    number = np.minimum(((confidence - 0.5) * 2 * _BINS).astype(int), _BINS - 1)
    bins = tuple(
        Bin(float(confidence[here].mean()), float(right[here].mean()), int(here.sum()))
        for here in (number == n for n in range(_BINS))
        if here.any()
    )
    return sum(abs(b.confidence - b.accuracy) * b.n for b in bins) / len(differences), bins
