"""Recognition as the Qwen2-Audio evaluation runs it: jsonl rows {audio, prompt, gt, source}, greedy text.

`exact` is the share of references met word for word, `wer` corpus-level word error rate, both after
Whisper's basic normalisation; results stand per `source`. The reports' own benchmarks are scored by
`benchmarks.score`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jiwer
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from align.evaluation.benchmarks.wer import distance
from align.evaluation.statistics import paired_bootstrap


class Utterance(NamedTuple):
    """One clip (path relative to the corpus), the task asked of it, the reference, its group.

    Languages and question are ours, for prompts that say them: see `TaskExample`.
    """

    audio: str
    prompt: str
    gt: str
    source: str
    audio_language: str | None = None
    text_language: str | None = None
    question: str | None = None


class BadRows(ValueError):
    """A file of rows to recognise is not as the Qwen2-Audio evaluation has it."""


def read(path: Path) -> list[Utterance]:
    """The rows of a recognition file; blank lines are skipped.

    Raises:
        BadRows: naming file, line and key.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    return [_utterance(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def score(utterances: Sequence[Utterance], texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """{source: {exact, wer, n}}."""
    return {
        source: {
            "exact": sum(gt == text for gt, text in pairs) / len(pairs),
            "wer": float(jiwer.wer([gt for gt, _ in pairs], [text for _, text in pairs])),
            "n": len(pairs),
        }
        for source, pairs in _normalised(utterances, texts).items()
    }


def compare(
    utterances: Sequence[Utterance], before: Sequence[str], after: Sequence[str], seed: int = 0
) -> dict[str, dict[str, dict[str, float]]]:
    """{source: {exact, wer: `Interval` as plain values}}: after minus before, paired by utterance.

    An utterance's share of the error rate is its errors times utterances over words, so that their mean is
    the corpus-level rate; the number of words counts as known.
    """
    first, second = _normalised(utterances, before), _normalised(utterances, after)
    return {
        source: {
            metric: paired_bootstrap(of(first[source]), of(second[source]), seed=seed)._asdict()
            for metric, of in (("exact", _exact), ("wer", _shares_of_wer))
        }
        for source in first
    }


def _normalised(utterances: Sequence[Utterance], texts: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """(reference, text) by source."""
    normal = BasicTextNormalizer()
    groups: dict[str, list[tuple[str, str]]] = {}
    for utterance, text in zip(utterances, texts, strict=True):
        pair = (normal(utterance.gt).strip(), normal(text).strip())
        groups.setdefault(utterance.source, []).append(pair)
    return groups


def _exact(pairs: Sequence[tuple[str, str]]) -> list[float]:
    return [float(gt == text) for gt, text in pairs]


def _shares_of_wer(pairs: Sequence[tuple[str, str]]) -> list[float]:
    words = sum(len(gt.split()) for gt, _ in pairs)
    return [distance([gt.split()], [text.split()]) * len(pairs) / words for gt, text in pairs]


def _utterance(line: str, where: str) -> Utterance:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise BadRows(f"{where}: is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise BadRows(f"{where}: is a {type(row).__name__}, not an object")
    ours = {key: row[key] for key in Utterance._field_defaults if row.get(key) is not None}
    needed = [*(key for key in Utterance._fields if key not in Utterance._field_defaults), *ours]
    if wrong := [key for key in needed if not isinstance(row.get(key), str)]:
        raise BadRows(f"{where}: no text under {', '.join(wrong)}")
    return Utterance(row["audio"], row["prompt"], row["gt"], row["source"], **ours)
