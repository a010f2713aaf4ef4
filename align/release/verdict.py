"""May this candidate be promoted? A pure function from measurements to a verdict with reasons.

Fail-closed: what was not measured does not pass. INCONCLUSIVE means that nothing measured is bad but an
interval still contains "no gain": more questions or a better candidate may settle it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Outcome = Literal["pass", "fail", "inconclusive"]


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


def gain(name: str, low: float | None, high: float | None, threshold: float) -> Check:
    """Pass when the whole 95 % interval of the difference lies above `threshold`."""
    if low is None or high is None:
        return Check(name, None, threshold, "fail", f"{name}: not measured")
    said = f"{name}: 95 % interval of the difference [{low:+.3f}, {high:+.3f}]"
    if low > threshold:
        return Check(name, low, threshold, "pass", f"{said} lies above {threshold:+.3f}")
    if high < threshold:
        return Check(name, low, threshold, "fail", f"{said} lies below {threshold:+.3f}")
    return Check(name, low, threshold, "inconclusive", f"{said} contains {threshold:+.3f}")


def at_most(name: str, value: float | None, limit: float) -> Check:
    """Pass when `value` does not exceed `limit`."""
    if value is None:
        return Check(name, None, limit, "fail", f"{name}: not measured")
    outcome: Outcome = "pass" if value <= limit else "fail"
    return Check(name, value, limit, outcome, f"{name}: {value:.3f}, allowed at most {limit:.3f}")


def at_least(name: str, value: float | None, limit: float) -> Check:
    """Pass when `value` is not below `limit`."""
    if value is None:
        return Check(name, None, limit, "fail", f"{name}: not measured")
    outcome: Outcome = "pass" if value >= limit else "fail"
    return Check(name, value, limit, outcome, f"{name}: {value:.3f}, needed at least {limit:.3f}")


def decide(checks: Sequence[Check]) -> Verdict:
    """Fail if any check fails, else inconclusive if any is, else pass. No checks is a fail."""
    if not checks:
        return Verdict("fail", ["nothing was measured"], [])
    outcomes = {check.outcome for check in checks}
    worst: Outcome = (
        "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"
    )
    reasons = [check.reason for check in checks if check.outcome == worst]
    return Verdict(worst, reasons, list(checks))


def checks(scores: Mapping, thresholds: Mapping[str, float]) -> list[Check]:
    """The checks of an evaluation's `scores.json` under named thresholds (see `config.Thresholds`)."""
    comparison = scores.get("comparison", {})
    after = scores["policies"].get(scores["after"], {})
    before = scores["policies"].get(scores["before"], {})
    new, old = after.get("overall", {}), before.get("overall", {})
    factuality, behaviour = comparison.get("factuality", {}), comparison.get("behaviour", {})
    shuffled = after.get("shuffled_audio", {}).get("factuality")
    return [
        at_least("questions", new.get("n"), thresholds["min_questions"]),
        gain(
            "factuality", factuality.get("ci_low"), factuality.get("ci_high"), thresholds["factuality_gain"]
        ),
        gain("behaviour", behaviour.get("ci_low"), behaviour.get("ci_high"), thresholds["behaviour_gain"]),
        at_most("over-abstention", new.get("over_abstention"), thresholds["max_over_abstention"]),
        at_least(
            "asked-fact change", _minus(new.get("asked"), old.get("asked")), -thresholds["max_asked_loss"]
        ),
        at_least("audio effect", _minus(new.get("factuality"), shuffled), thresholds["min_audio_effect"]),
        at_most("length ratio", _ratio(new.get("words"), old.get("words")), thresholds["max_length_ratio"]),
        at_least(
            "distinct answers",
            _ratio(new.get("distinct"), old.get("distinct")),
            thresholds["min_distinct_ratio"],
        ),
    ]


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b
