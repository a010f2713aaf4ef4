"""Rendering for all pages: one file without network, untrusted text escaped, numbers written alike."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from align.evaluation.statistics import Difference, Interval
from preference_data.schema import LETTERS, Ranking

_GIGABYTE_MB = 1024.0

LABELS = {
    "factuality": "Factuality",
    "behaviour": "Behaviour",
    "score": "Score",
    "fact_accuracy": "Fact accuracy",
    "absent_accuracy": "Absent accuracy",
    "over_abstention": "Over-abstention",
    "words": "Words",
    "distinct": "Distinct answers",
    "entropy": "Entropy",
    "foreign": "Foreign answers",
}
MEANINGS = {
    "factuality": "share of answers without a false statement about the clip",
    "behaviour": "share of answers that do what the question asks, in the form it asks for",
    "score": "judge's mark, 1 to 10",
    "fact_accuracy": "share of answerable questions whose fact is answered rightly",
    "absent_accuracy": "share of questions about what is not there answered with “there is no …”",
    "over_abstention": "share of answerable questions answered with “there is no …”",
    "words": "mean words per answer",
    "distinct": "different answers given",
    "entropy": "nats per token of its own answers; low where the policy is sure",
    "foreign": "share of answers in another script than their question and reference",
}
VERDICTS = {
    "pass": ("The gate passed", "good"),
    "fail": ("The gate refused", "bad"),
    "inconclusive": ("The gate is inconclusive", "open"),
}
"""A gate's verdict -> what to say, and a class of the style sheet."""
_SHARES = (
    *("factuality", "behaviour", "fact_accuracy", "absent_accuracy", "over_abstention", "foreign"),
    *("exact", "wer", "accuracy", "refused", "rate"),
)


def render(template: str, **values: Any) -> str:
    """A page from a template of this package.

    Everything in `values` is escaped unless it is `Markup`. The page's policy allows no network at all, and
    no script but those that carry the page's own nonce.
    """
    return _environment().get_template(template).render(**values, nonce=secrets.token_urlsafe(16))


@cache
def _environment() -> Environment:
    """The templates of this package, each parsed once, with the filters that they use."""
    environment = Environment(
        loader=PackageLoader("align.release", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "value": value,
        "difference": difference,
        "duration": duration,
        "memory": memory,
        "pretty": _pretty,
        "plain": plain,
        "ranking": ranking,
    }
    environment.globals |= {
        "labels": LABELS,
        "meanings": MEANINGS,
        "bounds": bounds,
        "verdicts": VERDICTS,
        "reaches": reaches,
    }
    return environment


def as_data(value: Any) -> Markup:
    """JSON to stand inside a `<script type="application/json">`: no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", r"\u003c"))


def value(number: float | None, metric: str) -> str:
    """A level of a metric: shares as percentages, scores with two digits; a dash where there is none."""
    if number is None:
        return "–"
    if metric in _SHARES:
        return f"{100 * number:.1f} %"
    return f"{number:.0f}" if metric in ("distinct", "n") else f"{number:.{3 if metric == 'entropy' else 2}f}"


def difference(number: float | None, metric: str) -> str:
    """A signed difference: percentage points for shares, the metric's own unit otherwise."""
    if number is None:
        return "–"
    text = f"{100 * number:+.1f}" if metric in _SHARES else f"{number:+.2f}"
    return text.replace("-", "−")


class Bounds(NamedTuple):
    """Positions of an interval graphic's marks in percent of its width."""

    low: float
    delta: float
    high: float
    zero: float


def bounds(low: float, delta: float, high: float, start: float, end: float, zero: float = 0.0) -> Bounds:
    """Positions on an axis from `start` to `end`; what lies beyond is drawn at its end."""

    def position(number: float) -> float:
        return round(100 * min(1.0, max(0.0, (number - start) / (end - start))), 2)

    return Bounds(*map(position, (low, delta, high, zero)))


def reaches(tables: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """How far from zero the intervals of one table reach, per metric; shares have one axis in common."""
    ends: dict[str, float] = {}
    for table in tables:
        for metric, row in table.items():
            low, high = (
                row[end] if isinstance(row, Mapping) else getattr(row, end) for end in Interval._fields[3:5]
            )
            ends[metric] = max(abs(low), abs(high), ends.get(metric, 0.0))
    widest = max((end for metric, end in ends.items() if metric in _SHARES), default=0.0)
    return {metric: max(widest, 0.05) if metric in _SHARES else max(end, 0.5) for metric, end in ends.items()}


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 8.4 s, 3 min 20 s, 2 h 05 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def memory(megabytes: float | None) -> str:
    """Megabytes, as GB from one GB on."""
    if megabytes is None:
        return "–"
    return f"{megabytes:.0f} MB" if megabytes < _GIGABYTE_MB else f"{megabytes / _GIGABYTE_MB:.2f} GB"


def plain(value: Any) -> str:
    """A metric or setting of unknown kind as short text."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() else f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def ranking(given: Ranking | None) -> str:
    """A ranking as people read it: "B > A = C", "A = B (all bad)"."""
    if given is None:
        return "not ranked"
    places = sorted(zip(given.ranks, LETTERS, strict=False))
    order = " > ".join(
        " = ".join(letter for _, letter in group) for _, group in groupby(places, key=lambda place: place[0])
    )
    return f"{order} (all bad)" if given.all_bad else order


def interval(row: Interval | Difference | None, metric: str) -> str:
    """A difference with its 95 % interval on one line; nothing where there is none."""
    if row is None:
        return ""
    low, delta, high = (difference(number, metric) for number in (row.ci_low, row.delta, row.ci_high))
    return f"{delta} [{low}, {high}]"


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, default=str, ensure_ascii=False)
