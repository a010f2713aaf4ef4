"""What the server has done, in Prometheus' text format (version 0.0.4). Names and numbers, no content."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Final

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper bounds of the buckets of a histogram."""


class _Counter:
    def __init__(self, name: str, about: str) -> None:
        self.name, self.about = name, about
        self._values: dict[tuple[tuple[str, str], ...], float] = {}

    def add(self, amount: float = 1, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        self._values[key] = self._values.get(key, 0) + amount

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self.about, "counter")
        for key, value in sorted((self._values or {(): 0.0}).items()):
            yield _sample(self.name, dict(key), value)


class _Histogram:
    def __init__(self, name: str, about: str) -> None:
        self.name, self.about = name, about
        self._counts, self._sum = [0] * (len(_SECONDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self.about, "histogram")
        total = 0
        for bound, count in zip((*_SECONDS, math.inf), self._counts, strict=True):
            total += count
            text = "+Inf" if bound == math.inf else f"{bound:g}"
            yield _sample(f"{self.name}_bucket", {"le": text}, total)
        yield _sample(f"{self.name}_sum", {}, self._sum)
        yield _sample(f"{self.name}_count", {}, total)


class Metrics:
    """Counted in the event loop's thread alone."""

    def __init__(self) -> None:
        self.requests = _Counter("align_requests_total", "Requests that were answered, by route and status.")
        self.prompt_tokens = _Counter("align_prompt_tokens_total", "Tokens of prompts, clips' included.")
        self.completion_tokens = _Counter("align_completion_tokens_total", "Tokens of answers.")
        self.audio_seconds = _Counter("align_audio_seconds_total", "Seconds of clips in prompts.")
        self.failures = _Counter(
            "align_answer_failures_total", "Answers that the engine did not complete, streamed ones included."
        )
        self.first_token = _Histogram(
            "align_time_to_first_token_seconds", "From a prompt that is ready to its first token."
        )
        self.answer = _Histogram("align_answer_seconds", "From a prompt that is ready to its last token.")
        self.in_flight = 0
        """Requests under /v1 that are being answered."""

    def render(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All of it, and `gauges`: by name, what they are and their value."""
        lines = [
            line
            for metric in (
                self.requests,
                self.prompt_tokens,
                self.completion_tokens,
                self.audio_seconds,
                self.failures,
                self.first_token,
                self.answer,
            )
            for line in metric.lines()
        ]
        for name, (about, value) in gauges.items():
            lines += [*_head(name, about, "gauge"), _sample(name, {}, value)]
        return "\n".join(lines) + "\n"


def _head(name: str, about: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {about}"
    yield f"# TYPE {name} {kind}"


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    inner = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return f"{name}{{{inner}}} {value:.17g}" if inner else f"{name} {value:.17g}"
