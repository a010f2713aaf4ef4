"""How often selected comparisons bring a pair whose order the policy has wrong. Simulated.

    python -m tests.benchmarks.selection [--worlds 40]

A world has prompts with four completions each, of normal quality. Rewards, and the policy's log-probabilities
per token, are quality plus normal noise, as much as gives them their accuracy: the share of pairs that they
order as quality does. `corr` is the correlation of the two noises: above 0 as when both like long answers,
below 0 as when the reward likes what the policy finds unlikely. Annotators get equal numbers of comparisons
under every rule, of which nothing is drawn by lot, and prefer the better one with probability
1 / (1 + exp(-k difference)), k such that they are right in 85 % of random pairs. `product` is no rule of ours
but one that was tried: the largest -dr dl, by which the policy's margin counts as much as the reward's.

wrong    of the selected pairs: the policy has their order wrong
learned  annotators have also judged them rightly: what DPO can turn
size     mean of the policy's margin where it has the order wrong, in standard deviations of margins
right    of the selected pairs: annotators are right, whatever the policy says

Intervals are 95 % over worlds, and of differences paired by world.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from preference_data.preferences.selection import Candidate, Rule, select
from preference_data.schema import Completion, CompletionScore

PROMPTS, COMPLETIONS, ASKED = 300, 4, 180
"""1,800 pairs; one in ten is asked about."""
SHARPNESS = 2.366
"""k: the mean of 1 / (1 + exp(-k |d|)) over d of deviation sqrt(2) is 0.85."""
MEASURES = ("wrong", "learned", "size", "right")
Floats = npt.NDArray[np.float64]


class World(NamedTuple):
    """Completions with scores, all pairs, and the true and the policy's margin of each pair."""

    completions: dict[str, Completion]
    scores: dict[str, CompletionScore]
    true_margin: dict[Candidate, float]
    policy_margin: dict[Candidate, float]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--worlds", type=int, default=40)
    n = parser.parse_args().worlds
    print(f"{n} worlds of {PROMPTS} prompts with {COMPLETIONS} completions, {ASKED} pairs selected")
    print(
        "policy  reward  corr    rule          " + "".join(f"{name:<17}" for name in MEASURES) + "wrong - lot"
    )
    for policy, reward, corr in (
        *((0.6, accuracy, 0.0) for accuracy in (0.7, 0.8, 0.9)),
        *((accuracy, 0.8, 0.0) for accuracy in (0.5, 0.7)),
        *((0.6, 0.7, corr) for corr in (0.5, -0.5)),
        (0.6, 0.5, 0.0),
    ):
        worlds = [_world(seed, policy, reward, corr) for seed in range(n)]
        by_rule = {
            rule: np.array(
                [_measure(world, _selected(world, rule, seed), seed) for seed, world in enumerate(worlds)]
            )
            for rule in ("random", "disagreement", "uncertainty", "product")
        }
        for rule, values in by_rule.items():
            cells = "".join(f"{_interval(column):<17}" for column in values.T)
            more = "" if rule == "random" else _interval(values[:, 0] - by_rule["random"][:, 0])
            print(f"{policy:<8g}{reward:<8g}{corr:<8g}{rule:<14}{cells}{more}")


def noise(accuracy: float) -> float:
    """Standard deviation of the noise with which quality of deviation 1 orders pairs so accurately.

    Of two normal margins with correlation rho, P(same sign) = 1/2 + arcsin(rho) / pi (Sheppard, 1899).
    """
    rho = np.sin((accuracy - 0.5) * np.pi)
    return float(np.sqrt(1 / rho**2 - 1)) if rho > 0 else 1e6


def _world(seed: int, policy: float, reward: float, corr: float) -> World:
    rng = np.random.default_rng(seed)
    quality, of_policy, other = rng.normal(size=(3, PROMPTS, COMPLETIONS))
    of_reward = corr * of_policy + np.sqrt(1 - corr**2) * other
    logps = quality + noise(policy) * of_policy
    rewards = quality + noise(reward) * of_reward
    completions, scores, true, of_margin = {}, {}, {}, {}
    for p in range(PROMPTS):
        prompt = f"p{p}"
        for i in range(COMPLETIONS):
            key = f"{prompt}c{i}"
            completions[key] = Completion(
                id=key, prompt_id=prompt, index=i, text=str(i), policy="x", logp=logps[p, i], n_tokens=1
            )
            scores[key] = CompletionScore(id=key, prompt_id=prompt, reward=rewards[p, i], parts={})
        for i, j in combinations(range(COMPLETIONS), 2):
            pair = (f"{prompt}c{i}", f"{prompt}c{j}")
            true[pair] = quality[p, i] - quality[p, j]
            of_margin[pair] = logps[p, i] - logps[p, j]
    return World(completions, scores, true, of_margin)


def _selected(world: World, rule: Rule | Literal["product"], seed: int) -> list[Candidate]:
    if rule == "product":
        scores, margins = world.scores, world.policy_margin
        value = {(i, j): (scores[j].reward - scores[i].reward) * dl for (i, j), dl in margins.items()}
        return sorted(value, key=lambda pair: -value[pair])[:ASKED]
    more = {"n": ASKED, "random_share": 0.0, "near_tie": 0.0}
    return list(
        select(list(world.true_margin), world.completions, world.scores, rule=rule, seed=seed, **more)
    )


def _measure(world: World, selected: Sequence[Candidate], seed: int) -> Floats:
    """The four measures of what is selected."""
    true = np.array([world.true_margin[pair] for pair in selected])
    margin = np.array([world.policy_margin[pair] for pair in selected])
    wrong = true * margin < 0
    right = np.random.default_rng([seed, 1]).random(len(selected)) < 1 / (1 + np.exp(-SHARPNESS * abs(true)))
    size = abs(margin) * wrong / np.std(list(world.policy_margin.values()))
    return np.array([wrong.mean(), (wrong & right).mean(), size.mean(), right.mean()])


def _interval(values: Floats) -> str:
    """Mean and 95 % interval."""
    error = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()
