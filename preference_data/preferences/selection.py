"""Which comparisons annotators get where not all can be judged: a share by a stated rule, the rest by lot.

Of two completions of a prompt, dr is the difference of their rewards and dl that of their log-probabilities
per token under the policy that drew them (per token, or the shorter one would always be the likelier).

- `disagreement`: the largest -dr sign(dl): the policy finds likelier what the reward finds much worse. If the
  reward is right with probability 1 / (1 + exp(-k |dr|)), whatever k, these are the pairs whose order the
  policy most probably has wrong, which is what preference training is to change; even trained policies order
  fewer than six in ten pairs as people do (Chen et al., arXiv:2405.19534). Neither unit matters. How large dl
  is does not count: what is far wrong is the hardest to turn (ibid.), a policy that knows something is more
  often right where it is sure, and log-probabilities have long tails. Muldrew et al. (arXiv:2402.08114) take
  DPO's implicit reward, which is 0 before any DPO.
- `uncertainty`: the smallest |dr|, where the reward knows least (Lewis and Gale, arXiv:cmp-lg/9407020). This
  is for training the reward: it finds about as many of the policy's errors as a lot does, in pairs that are
  hard for people too.
- `random`: by lot alone.

Near-ties, |dr| at most `near_tie`, are of no use to either rule. The value of a comparison of more than two
completions is that of its best pair.

A `random_share` is drawn from all candidates, near-ties too, by lots that depend on nothing but the seed and
the candidate, and before the rule has its turn. It is a simple random sample, so that its means (agreement,
how often the policy or a reward is right) hold for all candidates; those of the other comparisons do not.
`tests/benchmarks/selection.py` measures what the rules bring.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from itertools import combinations
from typing import Literal

from preference_data.schema import Completion, CompletionScore, SelectedBy, stable_id

Candidate = tuple[str, ...]
"""Ids of two or more completions of the same prompt."""
Rule = Literal["random", "disagreement", "uncertainty"]


class NothingToRank(ValueError):
    """What a rule needs to know is known of no candidate."""


def select(
    candidates: Collection[Candidate],
    completions: Mapping[str, Completion],
    scores: Mapping[str, CompletionScore],
    *,
    n: int | None,
    rule: Rule,
    random_share: float,
    near_tie: float,
    seed: int,
) -> dict[Candidate, SelectedBy]:
    """Select up to `n` candidates; their order, and that of their completions, makes no difference.

    Args:
        candidates: all that could be asked, each once.
        completions: by id, those of the candidates.
        scores: likewise; completions without one, or without a reward, are only selected by lot.
        n: how many; None for all. Fewer where too few candidates have a value: places of the rule are not
            filled with comparisons that it holds to be useless.
        rule: see above.
        random_share: of the `n`, drawn from all candidates; with the rule `random` it is all of them.
        near_tie: in units of the reward.
        seed: of the lots.

    Returns:
        Why each is selected: first those drawn by lot, then the others by value, the best first.

    Raises:
        NothingToRank: no candidate has rewards, or log-probabilities for `disagreement`.
    """
    values = priorities(candidates, completions, scores, rule=rule, near_tie=near_tie)
    lots = {candidate: _lot(seed, candidate, completions) for candidate in candidates}
    by_lot = sorted(candidates, key=lots.__getitem__)
    n = len(by_lot) if n is None else min(n, len(by_lot))
    n_random = n if rule == "random" else round(random_share * n)
    drawn, others = by_lot[:n_random], by_lot[n_random:]
    # Of equal values the lot decides: sorting keeps the order.
    ranked = sorted((item for item in others if item in values), key=lambda item: -values[item])
    selected: dict[Candidate, SelectedBy] = dict.fromkeys(drawn, "random")
    return selected | dict.fromkeys(ranked[: n - n_random], "active")


def priorities(
    candidates: Collection[Candidate],
    completions: Mapping[str, Completion],
    scores: Mapping[str, CompletionScore],
    *,
    rule: Rule,
    near_tie: float,
) -> dict[Candidate, float]:
    """The value of each candidate to a rule, the highest first to be asked; near-ties have none.

    Raises:
        NothingToRank: see `select`.
    """
    if rule == "random":
        return {}
    compared = {key for candidate in candidates for key in candidate}
    rewards = {key: scores[key].reward for key in compared & scores.keys()}
    known = {key: reward for key, reward in rewards.items() if reward is not None}
    _check_known(candidates, known, "a reward", "score these completions")
    logps = {key: logp for key in known if (logp := completions[key].mean_logp) is not None}
    if rule == "disagreement":
        _check_known(candidates, logps, "a reward and a log-probability", "sample again, or select otherwise")
    values: dict[Candidate, float] = {}
    for candidate in candidates:
        usable = [key for key in candidate if key in (logps if rule == "disagreement" else known)]
        for first, second in combinations(usable, 2):
            margin = known[first] - known[second]
            if abs(margin) <= near_tie:
                continue
            value = -abs(margin)
            if rule == "disagreement":
                policy_prefers = (logps[first] > logps[second]) - (logps[first] < logps[second])
                value = -margin * policy_prefers
            values[candidate] = max(value, values.get(candidate, value))
    return values


def _check_known(
    candidates: Collection[Candidate], known: Mapping[str, float], what: str, next_step: str
) -> None:
    """At least one candidate has two completions to compare."""
    if candidates and all(sum(key in known for key in candidate) < 2 for candidate in candidates):
        raise NothingToRank(
            f"none of {len(candidates):,} candidates for comparison, such as completions "
            f"{', '.join(min(candidates))}, has two completions with {what}: {next_step}"
        )


def _lot(
    seed: int, candidate: Candidate, completions: Mapping[str, Completion]
) -> tuple[str, tuple[str, ...]]:
    """A random order that depends on seed, prompt and texts; of equal texts the ids decide."""
    compared = [completions[key] for key in candidate]
    about = json.dumps([compared[0].prompt_id, *sorted(item.text for item in compared)])
    return stable_id(seed, "select", about), tuple(sorted(candidate))
