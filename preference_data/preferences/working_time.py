"""How long annotators will work: every clip of a judgement is played once, the rest is reading and deciding.

What is measured comes from earlier judgements of people: a median, for times have long tails (a phone rings
within the 15 minutes up to which `Judgement.seconds` counts), so that a sum of real times is somewhat more.
Who knows a clip from an earlier comparison need not play it again; it is counted each time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

from preference_data import store
from preference_data.preferences import snapshots
from preference_data.schema import AudioClip, Comparison, Judgement, Prompt

log = logging.getLogger(__name__)
ENOUGH = 20
"""Judgements whose median is worth more than an assumption."""


class Pace(NamedTuple):
    """Seconds for each completion of a comparison, beside playing the clips."""

    per_completion_s: float
    judgements: int = 0
    """On how many it was measured; 0: assumed."""


ASSUMED = Pace(10.0)
"""A short answer of 20 words takes 5 s at 238 words a minute (Brysbaert 2019, doi:10.1016/j.jml.2019.104047);
that deciding on two axes takes as long again is an assumption."""


class WorkingTime(NamedTuple):
    """What judgements take of all annotators together, in seconds."""

    judgements: int
    listening_s: float
    deciding_s: float
    pace: Pace

    @property
    def hours(self) -> float:
        """All of it."""
        return (self.listening_s + self.deciding_s) / 3600

    def __str__(self) -> str:
        n = self.pace.judgements
        basis = f"median of {n:,} earlier judgements" if n else "assumed, not measured"
        return (
            f"{self.judgements:,} judgements, {_duration(self.hours)} of annotators' time: "
            f"{_duration(self.listening_s / 3600)} of clips, each played once a judgement, and "
            f"{self.pace.per_completion_s:.3g} s per completion to read and decide ({basis})"
        )


def working_time(
    comparisons: Iterable[Comparison],
    prompts: Mapping[str, Prompt],
    durations_s: Mapping[str, float],
    *,
    annotators: int,
    pace: Pace,
) -> WorkingTime:
    """What comparisons take, those for everyone as often as there are annotators.

    Args:
        comparisons: all that are shown, retests and gold too.
        prompts: by id.
        durations_s: of clips, by path.
        annotators: how many judge what everyone judges.
        pace: see `pace_of`.
    """
    judgements, listening, deciding = 0, 0.0, 0.0
    for item in comparisons:
        times = annotators if item.everyone else 1
        judgements += times
        listening += times * _audio_s(prompts[item.prompt_id], durations_s)
        deciding += times * pace.per_completion_s * len(item.completions)
    return WorkingTime(judgements, listening, deciding, pace)


def estimate(
    comparisons: int,
    *,
    overlap: float,
    retests: float,
    gold: float,
    annotators: int,
    audio_s: float,
    completions: int,
    pace: Pace,
) -> WorkingTime:
    """What so many comparisons will take before they are drawn; for shares see `AnnotateConfig`.

    Args:
        comparisons: without retests and gold, which are added.
        overlap: share of them that everyone judges.
        retests: as a share of those that everyone judges, and of the others.
        gold: likewise.
        annotators: how many judge what everyone judges.
        audio_s: how long the clips of a prompt last on average.
        completions: in a comparison.
        pace: see `pace_of`.
    """
    everyone = round(overlap * comparisons)
    judgements = sum(
        times * (n + round(retests * n) + round(gold * n))
        for n, times in ((comparisons - everyone, 1), (everyone, annotators))
    )
    deciding = judgements * completions * pace.per_completion_s
    return WorkingTime(judgements, judgements * audio_s, deciding, pace)


def pace_of(
    judgements: Iterable[Judgement], prompts: Mapping[str, Prompt], durations_s: Mapping[str, float]
) -> Pace:
    """The median of people's judgements whose time and prompt are known, if there are enough."""
    times = [
        max(0.0, item.seconds - _audio_s(prompts[item.prompt_id], durations_s)) / len(item.completions)
        for item in judgements
        if item.annotator_kind == "person" and item.seconds is not None and item.prompt_id in prompts
    ]
    return Pace(median(times), len(times)) if len(times) >= ENOUGH else ASSUMED


def earlier_judgements(folder: Path) -> list[Judgement]:
    """All judgements in a run's snapshots, each as the newest has it; none where there are no snapshots.

    A snapshot of another version of this program, whose records cannot be read, is left out with a warning.
    """
    by_id: dict[str, Judgement] = {}
    for snapshot in snapshots.versions(folder):
        try:
            by_id |= {item.id: item for item in store.stream(snapshot / "judgements.jsonl", Judgement)}
        except store.BadRecord as error:
            log.warning("the working time is estimated without %s: %s", snapshot, error)
    return list(by_id.values())


def clip_durations(corpus: Path, prompts: Iterable[Prompt]) -> dict[str, float]:
    """How long the clips of prompts last, by their paths in a corpus."""
    paths = {path for prompt in prompts for path in prompt.audios}
    clips = store.stream(corpus / "clips.jsonl", AudioClip)
    return {clip.path: clip.duration_s for clip in clips if clip.path in paths}


def _audio_s(prompt: Prompt, durations_s: Mapping[str, float]) -> float:
    return sum(durations_s[path] for path in prompt.audios)


def _duration(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
