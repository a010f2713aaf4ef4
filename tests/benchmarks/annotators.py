"""What rules about annotators, and rankings of four, are worth: simulated annotators. For a person to run.

    python -m tests.benchmarks.annotators [--seeds N]

Completions have a known quality, a linear function of 20 features. An annotator perceives it with noise, so
that they are wrong on 5 % of two completions drawn by lot: more often on near ones, never on distant ones.
Somebody else guesses, somebody always takes what is shown first. All judge 30 % of the comparisons, a single
one the others; everybody judges 20 gold ones too. Judgements go through the same rules as in a recipe.

Wrong: share of pairs whose chosen completion is the worse one, in number and by evidence, which is how
training weighs them. Learnt: how often a Bradley-Terry model (ridge logistic regression on the features,
weighed by evidence) is right on 5,000 other pairs: a small stand-in for training. Intervals are 95 % over
seeds (Student). That four are judged as well as two is an assumption; with twice the noise they are not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from preference_data.preferences import pairs
from preference_data.preferences.rules import Rules, count
from preference_data.schema import Judgement, PreferencePair, Prompt, Ranking

Array = npt.NDArray[np.float64]
Manner = Callable[[np.random.Generator, Array], Array]
"""Qualities, in the order shown -> what an annotator makes of them; the highest is ranked first."""

FEATURES = 20
NOISE = float(np.tan(0.05 * np.pi))
"""Of qualities with variance 1: the order of two is wrong in arctan(noise) / pi of cases."""
OVERLAP, GOLD, HELD_OUT = 0.3, 20, 5000
CLIP_S, COMPLETION_S = 10.0, 5.0
"""To hear the clip once, and to read and place a completion."""


def careful(rng: np.random.Generator, quality: Array) -> Array:
    """Sees the quality, and a little noise."""
    return quality + rng.normal(0, NOISE, len(quality))


def strained(rng: np.random.Generator, quality: Array) -> Array:
    """Sees the quality with twice the noise."""
    return quality + rng.normal(0, 2 * NOISE, len(quality))


def guessing(rng: np.random.Generator, quality: Array) -> Array:
    """Sees nothing."""
    return rng.random(len(quality))


def first(rng: np.random.Generator, quality: Array) -> Array:
    """Sees the place."""
    return -np.arange(len(quality), dtype=np.float64)


HONEST: dict[str, Manner] = {f"careful-{i}": careful for i in range(4)}
STRAINED: dict[str, Manner] = {f"strained-{i}": strained for i in range(4)}
CROWD: dict[str, Manner] = {**HONEST, "guessing": guessing, "first": first}
RULES = {
    "off": Rules(min_heard=0),
    "min_gold 0.8": Rules(min_heard=0, min_gold=0.8),
    "dawid_skene": Rules(min_heard=0, annotator_weights="dawid_skene"),
    "both": Rules(min_heard=0, min_gold=0.8, annotator_weights="dawid_skene"),
}


class World(NamedTuple):
    """Completions of prompts: features of shape (prompts, completions, features) and their quality."""

    features: Array
    quality: Array

    @classmethod
    def draw(cls, rng: np.random.Generator, prompts: int) -> World:
        """Four completions for each prompt; quality has variance 1."""
        weight = rng.normal(size=FEATURES)
        features = rng.normal(size=(prompts, 4, FEATURES))
        return cls(features, features @ weight / np.linalg.norm(weight))


class Outcome(NamedTuple):
    """Figures of one seed."""

    pairs: float
    wrong: float
    wrong_by_evidence: float
    learnt: float


def judge(
    world: World, people: Mapping[str, Manner], n: int, k: int, rng: np.random.Generator
) -> Iterator[Judgement]:
    """Judgements of `k` completions of each of `n` prompts, and of gold prompts after these."""
    names = list(people)
    for prompt in range(n + GOLD):
        shown = rng.permutation(4)[:k]
        quality = world.quality[prompt, shown]
        is_gold = prompt >= n
        everyone = is_gold or rng.random() < OVERLAP
        for name in names if everyone else [names[rng.integers(len(names))]]:
            ranking = _ranked(people[name](rng, quality))
            yield Judgement(
                id=f"{prompt} {name}",
                comparison=f"{prompt}",
                prompt_id="p",
                completions=tuple(f"{prompt}:{place}" for place in shown),
                texts=tuple(f"{prompt}:{place}" for place in shown),
                kind="choice" if k == 2 else "ranking",
                annotator=name,
                annotator_kind="simulated",
                factuality=ranking,
                purpose="gold" if is_gold else "comparison",
                expected=_gold(quality) if is_gold else None,
            )


def _ranked(seen: Array) -> Ranking:
    return Ranking(ranks=tuple(int(rank) for rank in stats.rankdata(-seen, method="dense")))


def _gold(quality: Array) -> Ranking:
    """What is known: the best of all is the right answer."""
    return Ranking(ranks=tuple(1 if value == quality.max() else 2 for value in quality))


def outcome(world: World, judgements: Sequence[Judgement], rules: Rules, rng: np.random.Generator) -> Outcome:
    """Pairs by rules, how many are wrong, and what a model learns of them."""
    prompt = Prompt(id="p", audios=(), question="", answer_gt="", meta_info="", task_name="")
    built, _ = pairs.build(count(judgements, rules), {"p": prompt}, min_agreement=0.75)
    chosen, rejected = (_places(built, side) for side in ("chosen", "rejected"))
    wrong = world.quality[chosen] < world.quality[rejected]
    evidence = np.array([pair.evidence for pair in built])
    weight = _fit(world.features[chosen] - world.features[rejected], evidence / evidence.mean())
    features = rng.normal(size=(HELD_OUT, FEATURES))
    truth = features @ np.linalg.lstsq(world.features.reshape(-1, FEATURES), world.quality.ravel())[0]
    learnt = ((features @ weight > 0) == (truth > 0)).mean()
    return Outcome(len(built), wrong.mean(), (wrong * evidence).sum() / evidence.sum(), float(learnt))


def _places(built: Sequence[PreferencePair], side: str) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Prompt and completion of a side of each pair."""
    names = [getattr(pair, side).split(":") for pair in built]
    return np.array([int(name[0]) for name in names]), np.array([int(name[1]) for name in names])


def _fit(differences: Array, weights: Array) -> Array:
    """Ridge logistic regression by Newton's method: the better side of each pair is known."""
    weight = np.zeros(FEATURES)
    for _ in range(12):
        right = 1 / (1 + np.exp(-differences @ weight))
        gradient = differences.T @ (weights * (1 - right)) - weight
        curvature = (differences * (weights * right * (1 - right))[:, None]).T @ differences + np.eye(
            FEATURES
        )
        weight = weight + np.linalg.solve(curvature, gradient)
    return weight


def _line(name: str, outcomes: Sequence[Outcome]) -> str:
    cells = [f"{np.mean([item.pairs for item in outcomes]):8.0f}"]
    for field in ("wrong", "wrong_by_evidence", "learnt"):
        values = 100 * np.array([getattr(item, field) for item in outcomes])
        reach = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
        cells.append(f"{values.mean():6.1f} +-{reach:4.1f}")
    return f"{name:42}" + "  ".join(cells)


def _difference(name: str, after: Sequence[Outcome], before: Sequence[Outcome]) -> str:
    """Paired over seeds: the same judgements by other rules, or another world's with the same seed."""
    return _line(name, [Outcome(*np.subtract(a, b)) for a, b in zip(after, before, strict=True)])


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    seeds = range(parser.parse_args().seeds)
    head = f"{'':42}{'pairs':>8}  {'wrong %':>12}  {'by evidence':>12}  {'learnt %':>12}"

    print(f"Rules about annotators: 300 comparisons of two, six annotators\n{head}")
    by_rule: dict[str, list[Outcome]] = {name: [] for name in RULES}
    for seed in seeds:
        world = World.draw(np.random.default_rng(seed), 300 + GOLD)
        given = list(judge(world, CROWD, 300, 2, np.random.default_rng([seed, 1])))
        for name, rules in RULES.items():
            by_rule[name].append(outcome(world, given, rules, np.random.default_rng([seed, 2])))
    for name, outcomes in by_rule.items():
        print(_line(name, outcomes))
    for name in list(RULES)[1:]:
        print(_difference(f"  {name} less off", by_rule[name], by_rule["off"]))

    seconds = {k: CLIP_S + k * COMPLETION_S for k in (2, 4)}
    same_time = round(100 * seconds[4] / seconds[2])
    designs = {
        "100 rankings of four": (HONEST, 100, 4),
        "100 rankings of four: twice the noise": (STRAINED, 100, 4),
        "100 comparisons of two: equal listening": (HONEST, 100, 2),
        f"{same_time} comparisons of two: equal time": (HONEST, same_time, 2),
        "600 comparisons of two: as many pairs": (HONEST, 600, 2),
    }
    print(
        f"\nRankings of four against comparisons of two, four careful annotators; a clip takes {CLIP_S:g} s, "
        f"a completion {COMPLETION_S:g} s: {seconds[2]:g} s for two, {seconds[4]:g} s for four\n{head}"
    )
    by_design: dict[str, list[Outcome]] = {name: [] for name in designs}
    for seed in seeds:
        world = World.draw(np.random.default_rng(seed), 600 + GOLD)
        for name, (people, n, k) in designs.items():
            given = list(judge(world, people, n, k, np.random.default_rng([seed, 1])))
            by_design[name].append(outcome(world, given, RULES["off"], np.random.default_rng([seed, 2])))
    for name, outcomes in by_design.items():
        print(_line(name, outcomes))
    four, noisy, *two = list(designs)
    for name in two:
        print(_difference(f"  four less {name.split(':')[0]}", by_design[four], by_design[name]))
        print(_difference("    with twice the noise", by_design[noisy], by_design[name]))


if __name__ == "__main__":
    main()
