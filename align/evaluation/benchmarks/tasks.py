"""The benchmarks of the Qwen-Audio and Qwen2-Audio reports, scored as their evaluation scripts do.

One function for all kinds: rows {audio, prompt, gt, source} and the policy's texts in, numbers per
`source` out. Everything that the scripts do and this does not is named in the result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import sacrebleu

from align.evaluation.benchmarks import recognition, srwt, wer
from align.evaluation.benchmarks.air_bench import LONGEST_S
from align.evaluation.benchmarks.recognition import BadRows, Utterance
from align.evaluation.statistics import paired_bootstrap
from preference_data.audio import decode
from preference_data.audio.clip_files import resolve_inside
from preference_data.audio.decode import Quarantined
from preference_data.prompts.prompts import AUDIO

Kind = Literal[
    "asr_en",
    "asr_zh",
    "asr_yue",
    "asr_other",
    "translation",
    "emotion",
    "vocal_sound",
    "scene",
    "aqa",
    "srwt",
]
"""What is asked; of recognition, the language decides how texts are normalised."""


class CannotScore(ValueError):
    """Rows or the installation do not allow the benchmark to be scored as it should be."""


class Rows(NamedTuple):
    """A benchmark's rows. Their `audio` is relative to `root`; rows of unusable clips are apart."""

    root: Path
    usable: list[Utterance]
    missing: list[Quarantined]


def open_rows(path: Path) -> Rows:
    """Rows {audio, prompt, gt, source} as the Qwen2-Audio evaluation reads them, their clips decoded once.

    Raises:
        BadRows: naming file, line and key; or no clip is usable.
    """
    rows = recognition.read(path)
    clips = sorted({row.audio for row in rows})
    good, missing = decode.audit(
        partial(resolve_inside, path.parent), [(clip, clip) for clip in clips], max_duration_s=LONGEST_S
    )
    usable = [row for row in rows if row.audio in good]
    if not usable:
        raise BadRows(f"{path}: none of {len(rows)} rows has a usable clip; first: {missing[0].detail}")
    return Rows(path.parent, usable, missing)


def prompt_of(row: Utterance) -> str:
    """What a pre-trained policy is to continue: the clip, then the row's prompt."""
    return row.prompt if AUDIO in row.prompt else AUDIO + row.prompt


def read_answers(path: Path) -> tuple[list[Utterance], list[str]]:
    """Rows and responses: a JSON list, as the Qwen2-Audio evaluation writes, or JSON lines.

    Raises:
        BadRows: naming file, row and key.
    """
    text = path.read_text(encoding="utf-8")
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else list(map(json.loads, text.splitlines()))
    except ValueError as error:
        raise BadRows(f"{path}: is neither a JSON list nor JSON lines ({error})") from error
    for number, row in enumerate(rows, 1):
        keys = ("gt", "response", "source")
        wrong = keys if not isinstance(row, dict) else [k for k in keys if not isinstance(row.get(k), str)]
        if wrong:
            raise BadRows(f"{path}: row {number}: no text under {', '.join(wrong)}")
    asked = [Utterance(row.get("audio", ""), row.get("prompt", ""), row["gt"], row["source"]) for row in rows]
    return asked, [row["response"] for row in rows]


def score(kind: Kind, rows: Sequence[Utterance], texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Numbers per source, with `n` rows each.

    Returns:
        {source: {...}}: recognition has `wer` (per character for zh and yue), `errors`, `length` and
        `not_reproduced`; translation `bleu` and its `signature`; srwt `aas_ms` and what it rests on; the
        others `accuracy`. Error rates and accuracies are 0..1, BLEU is 0..100.

    Raises:
        CannotScore: a source does not name its target language, or a tokenizer is not installed.
    """
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for row, text in zip(rows, texts, strict=True):
        references, answers = groups.setdefault(row.source, ([], []))
        references.append(row.gt)
        answers.append(text)
    scorer = _SCORERS[kind]
    return {
        source: {**scorer(source, references, answers), "n": len(references)}
        for source, (references, answers) in groups.items()
    }


def compare(
    kind: Kind, rows: Sequence[Utterance], before: Sequence[str], after: Sequence[str], seed: int = 0
) -> dict[str, dict[str, dict[str, float]]]:
    """{source: {metric: `Interval` as plain values}}: after minus before, paired by row.

    Error rates and accuracies only: BLEU and SRWT's shift are no means over rows and have no interval here.
    An utterance's share of the error rate is its errors times utterances over words.
    """
    if kind in ("translation", "srwt"):
        return {}
    found = {}
    for source in dict.fromkeys(row.source for row in rows):
        own = [i for i, row in enumerate(rows) if row.source == source]
        references = [rows[i].gt for i in own]
        sides = [_by_row(kind, references, [texts[i] for i in own]) for texts in (before, after)]
        metric = "wer" if kind in _LANGUAGES else "accuracy"
        found[source] = {metric: paired_bootstrap(*sides, seed=seed)._asdict()}
    return found


def _by_row(kind: Kind, references: Sequence[str], texts: Sequence[str]) -> list[float]:
    if kind not in _LANGUAGES:
        return [float(gt == text.lstrip()) for gt, text in zip(references, texts, strict=True)]
    language = _LANGUAGES[kind]
    pairs = [
        (wer.tokens(gt, language), wer.tokens(text, language))
        for gt, text in zip(references, texts, strict=True)
    ]
    length = sum(len(gt) for gt, _ in pairs)
    return [wer.distance([gt], [text]) * len(pairs) / length for gt, text in pairs]


def accuracy(source: str, references: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """Exact matches after leading blanks are removed; case and full stops count, as officially."""
    hits = [reference == text.lstrip() for reference, text in zip(references, texts, strict=True)]
    return {"accuracy": sum(hits) / len(hits)}


def aqa(source: str, references: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """Accuracy over all questions and over those whose reference is yes or no.

    ClothoAQA has one row per annotator, so that one answer meets several references.
    """
    binary = [
        (reference, text)
        for reference, text in zip(references, texts, strict=True)
        if reference.lower() in ("yes", "no")
    ]
    pairs = list(zip(*binary, strict=True))
    return {
        **accuracy(source, references, texts),
        "binary_accuracy": accuracy(source, *pairs)["accuracy"] if pairs else None,
        "n_binary": len(binary),
    }


def bleu(source: str, references: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """Corpus BLEU by sacrebleu, tokenized for the language that the source names last but one.

    The reports used sacrebleu 1.5.1; the signature says what was used here.

    Raises:
        CannotScore: the source has no such name, or its language's tokenizer is not installed.
    """
    parts = source.split("_")
    if len(parts) < 2:
        raise CannotScore(
            f"source {source!r} names no target language; CoVoST2's rows read like 'covost2_en_zh_test'"
        )
    tokenizer = {"ja": "ja-mecab", "zh": "zh"}.get(parts[-2], "13a")
    try:
        metric = sacrebleu.metrics.BLEU(tokenize=tokenizer)
    except RuntimeError as error:
        raise CannotScore(
            f"source {source!r}: the tokenizer {tokenizer} is not installed; pip install 'sacrebleu[ja]'"
        ) from error
    found = metric.corpus_score(list(texts), [list(references)])
    return {"bleu": found.score, "signature": str(metric.get_signature())}


def _recognised(language: wer.Language) -> Callable[[str, Sequence[str], Sequence[str]], dict[str, Any]]:
    return lambda source, references, texts: wer.score(references, texts, language)


_LANGUAGES: dict[Kind, wer.Language] = {
    "asr_en": "en",
    "asr_zh": "zh",
    "asr_yue": "yue",
    "asr_other": "other",
}
_SCORERS: dict[Kind, Callable[[str, Sequence[str], Sequence[str]], dict[str, Any]]] = {
    **{kind: _recognised(language) for kind, language in _LANGUAGES.items()},
    "translation": bleu,
    "emotion": accuracy,
    "vocal_sound": accuracy,
    "scene": accuracy,
    "aqa": aqa,
    "srwt": lambda source, references, texts: srwt.score(references, texts),
}
