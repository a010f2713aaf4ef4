"""May this candidate be promoted? A pure function from measurements to a verdict with reasons.

Fail-closed: a value that a threshold needs and that was not measured does not pass; a threshold of None needs
nothing, openly. INCONCLUSIVE means that nothing measured is bad but an interval still contains "no gain" or
"too large a loss": more questions or a better candidate may settle it. How well the training separates its
preference pairs is not evidence here: runs that collapsed did that best (accuracy .88 to .94).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from align.rewards.reward import same_judge
from preference_data.audio.contamination import Contamination, Overlap

Outcome = Literal["pass", "fail", "inconclusive"]
Scores = Mapping[str, Any]
Thresholds = Mapping[str, Any]
"""`config.Thresholds` as plain values."""

GAINS = ("factuality", "behaviour", "score")
DETERMINISTIC_JUDGE = "facts"
"""The one judge without prompt or replies: it marks every answer and nothing can sway it."""
_LOWER_IS_BETTER = frozenset({"wer", "cer", "aas_ms", "unparsed"})
_STATES = ("invalid", "refused", "inconsistent", "missing")


class Check(NamedTuple):
    """One measured thing against its limit. `value` is None when it was not measured."""

    name: str
    value: float | None
    threshold: float
    outcome: Outcome
    reason: str


class Verdict(NamedTuple):
    """The worst outcome of all checks, and why."""

    verdict: Outcome
    reasons: list[str]
    checks: list[Check]


class Champion(NamedTuple):
    """The holder of the alias that the candidate is to take, by weights (sha256), and the compared policies.

    `version` is None while nobody holds it.
    """

    version: int | None
    weights: str | None
    candidate: str | None
    baseline: str | None


class RewardRise(NamedTuple):
    """Mean reward of completions in training: as first logged, and last up to the published checkpoint."""

    first: float
    last: float


# -------------------------------------------------------------------------- one check


def gain(name: str, low: float | None, high: float | None, threshold: float) -> Check:
    """Pass when the whole 95 % interval of the difference lies above `threshold`.

    With a threshold below 0 this is a test of non-inferiority, whose margin is minus the threshold.
    """
    if low is None or high is None:
        return _not_measured(name, threshold)
    reason = f"{name}: 95 % interval of the difference [{low:+.3f}, {high:+.3f}]"
    if low > threshold:
        return Check(name, low, threshold, "pass", f"{reason} lies above {threshold:+.3f}")
    if high < threshold:
        return Check(name, low, threshold, "fail", f"{reason} lies below {threshold:+.3f}")
    return Check(name, low, threshold, "inconclusive", f"{reason} contains {threshold:+.3f}")


def at_most(name: str, value: float | None, limit: float) -> Check:
    """Pass when `value` does not exceed `limit`."""
    if value is None:
        return _not_measured(name, limit)
    outcome: Outcome = "pass" if value <= limit else "fail"
    return Check(name, value, limit, outcome, f"{name}: {value:.4g}, allowed at most {limit:.4g}")


def at_least(name: str, value: float | None, limit: float) -> Check:
    """Pass when `value` is not below `limit`."""
    if value is None:
        return _not_measured(name, limit)
    outcome: Outcome = "pass" if value >= limit else "fail"
    return Check(name, value, limit, outcome, f"{name}: {value:.4g}, needed at least {limit:.4g}")


def holds(name: str, is_true: bool, reason: str) -> Check:
    """Pass when a condition is true; `reason` is the evidence."""
    return Check(name, float(is_true), 1.0, "pass" if is_true else "fail", f"{name}: {reason}")


def _not_measured(name: str, threshold: float, why: str = "") -> Check:
    return Check(name, None, threshold, "fail", f"{name}: not measured{why}")


# -------------------------------------------------------------------------- all of them


def decide(checks: Sequence[Check]) -> Verdict:
    """Fail if any check fails, else inconclusive if any is, else pass. No checks is a fail."""
    if not checks:
        return Verdict("fail", ["nothing was measured"], [])
    outcomes = {check.outcome for check in checks}
    severity: tuple[Outcome, ...] = ("fail", "inconclusive", "pass")
    worst = next(outcome for outcome in severity if outcome in outcomes)
    reasons = [check.reason for check in checks if check.outcome == worst]
    return Verdict(worst, reasons, list(checks))


def checks(
    scores: Scores,
    thresholds: Thresholds,
    *,
    unfinished: Mapping[str, float | None],
    contamination: Contamination | None,
    champion: Champion | None,
    rewards: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    reward_rises: Mapping[str, RewardRise | None] = MappingProxyType({}),
) -> list[Check]:
    """Every check that the thresholds ask for.

    Args:
        scores: an evaluation's `scores.json`.
        thresholds: `config.Thresholds` as plain values.
        unfinished: the share of answers cut short by policy; None: not measured.
        contamination: that of the benchmark by what the candidate was trained on; None: not measured.
        champion: None where no registered model is named to the gate.
        rewards: by stage, the identity of what the candidate was rewarded by, see `rewards.Reward`.
        reward_rises: by stage, of the rewarded trainings between baseline and candidate; None: not measured.
    """
    rows = [
        *_quality(scores, thresholds),
        *_collapse(scores, thresholds),
        *_fragments(scores, unfinished, thresholds["max_unfinished_rise"]),
        *_recognition(scores, thresholds["recognition_gains"], 1),
        *_recognition(scores, thresholds["recognition_margins"], -1),
        *_above_silence(scores, thresholds["above_silence"]),
        *_judge(scores, thresholds["judge"]),
        *_contamination(contamination, thresholds["max_contaminated"], thresholds["max_alike"]),
        *_independence(scores.get("judge") or {}, rewards, thresholds["independent_judge"]),
        *_proxy_gap(scores, reward_rises, thresholds["rewarded_score_gain"]),
    ]
    if champion is not None and not thresholds["replaces_any_champion"]:
        rows.append(_champion(champion))
    return rows


def _quality(scores: Scores, thresholds: Thresholds) -> Iterator[Check]:
    """Enough questions, gains overall, and no category and no kind of question left behind."""
    yield at_least("questions", _of(scores, "after", "overall", "n"), thresholds["min_questions"])
    for metric in GAINS:
        if (threshold := thresholds[f"{metric}_gain"]) is not None:
            yield gain(metric, *_interval(scores, "comparison", metric), threshold)
    yield from _parts(scores, "category", "categories", thresholds["category_margins"])
    yield from _parts(scores, "kind", "kinds", thresholds["kind_margins"])


def _parts(scores: Scores, part: str, levels: str, margins: Mapping[str, float]) -> Iterator[Check]:
    """Non-inferiority within each part of the questions."""
    for metric, margin in margins.items():
        names = {
            **(_value_at(scores, "policies", scores.get("after"), levels) or {}),
            **(scores.get(f"by_{part}") or {}),
        }
        if not names:
            yield _not_measured(f"{metric} per {part}", -margin)
        for name in names:
            low, high = _interval(scores, f"by_{part}", name, metric)
            yield gain(f"{metric} on {name}", low, high, -margin)


def _collapse(scores: Scores, thresholds: Thresholds) -> Iterator[Check]:
    """The ways in which preference optimisation is known to go wrong while its pairs look well separated."""

    def after(key: str) -> float | None:
        return _of(scores, "after", "overall", key)

    def before(key: str) -> float | None:
        return _of(scores, "before", "overall", key)

    def audio_effect(key: str) -> float | None:
        return _minus(after(key), _of(scores, "after", "shuffled_audio", key))

    length = _ratio(after("words"), before("words"))
    if (limit := thresholds["max_over_abstention"]) is not None:
        yield at_most("over-abstention", after("over_abstention"), limit)
    if (limit := thresholds["max_under_abstention_rise"]) is not None:
        yield _under_abstention(scores, limit)
    if (limit := thresholds["max_fact_accuracy_loss"]) is not None:
        change = _minus(after("fact_accuracy"), before("fact_accuracy"))
        yield at_least("fact accuracy change", change, -limit)
    if (limit := thresholds["min_audio_effect"]) is not None:
        yield at_least("audio effect", audio_effect("factuality"), limit)
    if (limit := thresholds["min_audio_effect_on_score"]) is not None:
        yield at_least("audio effect on score", audio_effect("score"), limit)
    yield at_most("length ratio", length, thresholds["max_length_ratio"])
    yield at_least("shortest length ratio", length, thresholds["min_length_ratio"])
    if (limit := thresholds["max_kind_length_ratio"]) is not None:
        yield from _lengths_by_kind(scores, limit)
    distinct = _ratio(after("distinct"), before("distinct"))
    yield at_least("distinct answers", distinct, thresholds["min_distinct_ratio"])
    if (limit := thresholds["min_entropy_ratio"]) is not None:
        yield at_least("entropy ratio", _ratio(after("entropy"), before("entropy")), limit)
    if (limit := thresholds["max_foreign_rise"]) is not None:
        yield at_most("rise of foreign answers", _minus(after("foreign"), before("foreign")), limit)


def _under_abstention(scores: Scores, margin: float) -> Check:
    """Non-inferiority on the questions about what is not in the clip."""
    name = "under-abstention"
    before, after, low, high = (
        _number(_value_at(scores, "comparison", "absent_accuracy", key))
        for key in ("before", "after", "ci_low", "ci_high")
    )
    if before is None or after is None:
        return _not_measured(name, -margin)
    check = gain("accuracy on absent things", low, high, -margin)
    return check._replace(name=name, reason=f"{name}: {before:.3f} -> {after:.3f}; {check.reason}")


def _lengths_by_kind(scores: Scores, limit: float) -> Iterator[Check]:
    """What a policy says to one kind of question: its mean length over all may stay the same."""
    kinds = _value_at(scores, "policies", scores.get("after"), "kinds")
    if not kinds:
        yield _not_measured("length ratio per kind", limit)
        return
    for kind in kinds:
        after, before = (_of(scores, side, "kinds", kind, "words") for side in ("after", "before"))
        yield at_most(f"length ratio on {kind}", _ratio(after, before), limit)


def _fragments(
    scores: Scores, unfinished: Mapping[str, float | None], limit: float | None
) -> Iterator[Check]:
    """Sentences cut to pieces: the mean length hides them where other answers became longer."""
    if limit is not None:
        after, before = (_number(unfinished.get(scores.get(side, ""))) for side in ("after", "before"))
        yield at_most("rise of unfinished answers", _minus(after, before), limit)


def _recognition(
    scores: Scores, limits: Mapping[str, Mapping[str, float]], direction: Literal[1, -1]
) -> Iterator[Check]:
    """Gains (1) or non-inferiority (-1) on named benchmarks: by the interval, else by the numbers alone."""
    for source, of_metric in limits.items():
        for metric, size in of_metric.items():
            least = direction * size
            name = f"{source} {metric}"
            after, before = (_of(scores, side, "recognition", source, metric) for side in ("after", "before"))
            low, high = _interval(scores, "recognition_comparison", source, metric)
            if after is None or before is None:
                yield _not_measured(name, least)
                continue
            sign = -1.0 if metric in _LOWER_IS_BETTER else 1.0
            if low is None or high is None:
                check = at_least("improvement, without interval", sign * (after - before), least)
            else:
                worst, best = sorted((sign * low, sign * high))
                check = gain("improvement", worst, best, least)
            yield check._replace(name=name, reason=f"{name}: {before:.3f} -> {after:.3f}; {check.reason}")


def _above_silence(scores: Scores, limits: Mapping[str, float]) -> Iterator[Check]:
    """Multiple choice that the candidate answers by what it hears."""
    for source, least in limits.items():
        name = f"{source} accuracy above silence"
        path = ("policies", scores.get("after", ""), "multiple_choice", source, "above_silence")
        yield gain(name, *_interval(scores, *path), least)


def _judge(scores: Scores, limits: Thresholds | None) -> Iterator[Check]:
    """One known judge for both policies, that rated every answer and cannot be talked round."""
    judge = scores.get("judge") or {}
    name = judge.get("name")
    is_deterministic = name == DETERMINISTIC_JUDGE and judge.get("shares_ground_truth") is True
    if limits is None:
        reason = f"{name!r} marks by rule" if is_deterministic else f"no limits are set for {name!r}"
        yield holds("judge", is_deterministic, reason)
        return
    yield _known_judge(scores, limits)
    for state in _STATES:
        shares = [_share(scores, side, state) for side in ("before", "after")]
        yield at_most(f"{state} ratings", _of_all(max, shares), limits[f"max_{state}"])
    missing = [
        _value_at(scores, "policies", scores.get(side), "ratings", "tasks_missing")
        for side in ("before", "after")
    ]
    n_missing = [float(len(tasks)) if isinstance(tasks, list) else None for tasks in missing]
    yield at_most("missing tasks", _of_all(max, n_missing), limits["max_missing_tasks"])
    if (limit := limits["min_agreement"]) is not None:
        axes = scores.get("judge_agreement", {}).values()
        shares = [_number(_value_at(axis, "agreement", "share")) for axis in axes]
        yield at_least("judge agrees with people", _of_all(min, shares), limit)
    yield at_most("canary uplift", _number(judge.get("canary_uplift")), limits["max_canary_uplift"])
    trick, points = (_value_at(judge, "canary_worst", key) for key in ("trick", "points"))
    check = at_most("worst canary trick", _number(points), limits["max_canary_trick"])
    yield check._replace(reason=f"{check.reason}: {trick!r}") if trick else check


def _known_judge(scores: Scores, limits: Thresholds) -> Check:
    """Model, prompt and protocol are known, and they are those that the gate's file names."""
    judge = scores.get("judge") or {}
    identity = {key: judge.get(key) for key in ("name", "model", "prompt_sha256", "protocol")}
    if unknown := [key for key, value in identity.items() if not value]:
        return _not_measured("judge", 1.0, f": {', '.join(unknown)} unknown")
    for key in ("model", "prompt_sha256"):
        if limits[key] is not None and identity[key] != limits[key]:
            return holds("judge", False, f"{key} is {identity[key]!r}, asked for is {limits[key]!r}")
    return holds(
        "judge", True, f"{identity['model']}, prompt {str(identity['prompt_sha256'])[:12]}, for both"
    )


def _independence(
    judge: Scores, rewards: Mapping[str, Mapping[str, Any]], is_required: bool
) -> Iterator[Check]:
    """Whether the judge is one that the candidate was not trained to please. Always said where it was."""
    name, same = (
        "independent judge",
        [stage for stage, reward in rewards.items() if same_judge(reward, judge)],
    )
    if same:
        reason = f"{judge.get('name')} also gave the rewards of {', '.join(same)}"
        reason += "" if is_required else "; allowed, because independent_judge is false"
        yield holds(name, not is_required, reason)
    elif rewards or is_required:
        yield holds(
            name, True, f"{judge.get('name')} gave no rewards in training ({', '.join(rewards) or 'none'})"
        )


def _proxy_gap(
    scores: Scores, rises: Mapping[str, RewardRise | None], threshold: float | None
) -> Iterator[Check]:
    """Whether the judge saw what the reward saw: a reward that rises alone is optimised for its flaws.

    Over-optimisation of a proxy: Gao et al. (arXiv:2210.10760).
    """
    name = "proxy gap"
    if threshold is None:
        return
    for stage, rise in rises.items():
        first, last = map(_number, rise or (None, None))
        if first is None or last is None:
            why = f": {stage} logged its reward less than twice up to its checkpoint; log it more often"
            yield _not_measured(name, threshold, f"{why} (trl: {{logging_steps: ...}})")
            continue
        change = f"reward of {stage} {first:.3f} -> {last:.3f}"
        if last <= first:
            yield holds(name, True, f"{change} did not rise")
            continue
        check = gain("score", *_interval(scores, "comparison", "score"), threshold)
        yield check._replace(name=name, reason=f"{name}: {change}; {check.reason}")


def _share(scores: Scores, side: str, state: str) -> float | None:
    """The share of a policy's answers that ended in a state."""
    return _ratio(_of(scores, side, "ratings", "states", state), _of(scores, side, "ratings", "n"))


def _contamination(shared: Contamination | None, limit: int, limit_alike: int) -> Iterator[Check]:
    """Copies of the benchmark among the clips trained on: exact ones, and those that only sound the same."""
    if shared is None or (why := _incomparable(shared)):
        why = why if shared else ": a corpus has changed since it was used"
        yield _not_measured("contamination", limit, why)
        return
    exact = [overlap for overlap in shared.overlaps if overlap.by != "sound"]
    certain = {overlap.benchmark for overlap in exact}
    by_sound = [overlap for overlap in shared.overlaps if overlap.benchmark not in certain]
    yield _shared_clips("contamination", shared, shared.heard, exact, limit)
    yield _shared_clips("contamination by sound", shared, shared.alike, by_sound, limit_alike)


def _incomparable(shared: Contamination) -> str:
    """Why nothing can be said; empty where something can."""
    if not shared.n_benchmark or not shared.n_trained:
        return ": no clips to compare"
    if shared.unreadable:
        return f": {len(shared.unreadable)} clips cannot be read, e.g. {shared.unreadable[0]}"
    return ""


def _shared_clips(name: str, shared: Contamination, n: int, overlaps: Sequence[Overlap], limit: int) -> Check:
    reason = f"{n} of {shared.n_benchmark} benchmark clips are among {shared.n_trained} clips trained on"
    if overlaps:
        reason += f", e.g. {overlaps[0].benchmark} is {overlaps[0].trained} (same {overlaps[0].by})"
    return at_most(name, float(n), float(limit))._replace(reason=f"{name}: {reason}")


def _champion(champion: Champion) -> Check:
    if champion.version is None:
        return holds("champion", True, "there is none yet")
    if champion.weights is not None and champion.weights in (champion.candidate, champion.baseline):
        who = "the candidate itself" if champion.weights == champion.candidate else "the baseline"
        return holds("champion", True, f"version {champion.version}, {who}")
    return holds(
        "champion",
        False,
        f"version {champion.version} was not compared with: evaluate it as `before`, or set "
        "replaces_any_champion",
    )


# -------------------------------------------------------------------------- reading scores


def _value_at(scores: Scores, *path: Any) -> Any:
    """The value at a path; None where any part of it is absent."""
    node: Any = scores
    for key in path:
        if not isinstance(node, Mapping):
            return None
        node = node.get(key)
    return node


def _of(scores: Scores, side: str, *path: str) -> float | None:
    """A number of the policy `before` or `after`."""
    return _number(_value_at(scores, "policies", scores.get(side), *path))


def _interval(scores: Scores, *path: str) -> tuple[float | None, float | None]:
    return _number(_value_at(scores, *path, "ci_low")), _number(_value_at(scores, *path, "ci_high"))


def _number(value: Any) -> float | None:
    """A finite number, else None: NaN measures nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _of_all(worst: Callable[[list[float]], float], values: Sequence[float | None]) -> float | None:
    """The worst of the values; None where one of them, or all, were not measured."""
    known = [value for value in values if value is not None]
    return worst(known) if known and len(known) == len(values) else None


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b
