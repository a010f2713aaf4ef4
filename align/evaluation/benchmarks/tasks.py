"""The benchmarks of the Qwen-Audio and Qwen2-Audio reports, scored as their evaluation scripts do.

One function for all kinds: rows {audio, prompt, gt, source} and the policy's texts in, numbers per
`source` out. Every step of the scripts that is left out here is named in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import sacrebleu

from align.evaluation.benchmarks import multiple_choice, spoken_questions, srwt, wer
from align.evaluation.benchmarks.air_bench import LONGEST_S
from align.evaluation.benchmarks.rows import (
    BadBenchmark,
    OddRows,
    Utterance,
    read_utterances,
    readable,
    require_text,
    response_of,
)
from align.evaluation.statistics import paired_bootstrap
from preference_data.audio import decode
from preference_data.audio.clip_files import ClipFile, resolve_inside
from preference_data.audio.decode import Quarantined
from preference_data.prompts.prompts import AUDIO

Kind = Literal[
    "recognition",
    "asr_en",
    "asr_zh",
    "asr_yue",
    "asr_other",
    "translation",
    "emotion",
    "vocal_sound",
    "scene",
    "aqa",
    "choice",
    "mmau",
    "mmar",
    "mmsu",
    "mmau_pro",
    "voicebench",
    "advbench",
    "big_bench_audio",
    "srwt",
]
"""The task. `recognition` is that of a corpus' own rows: exact matches and error rate in any language; of the
reports' recognition, the language decides how texts are normalised. `choice` and the benchmarks after it:
multiple-choice questions, asked in a chat."""


class CannotScore(ValueError):
    """Rows or the installation do not allow the benchmark to be scored as it should be."""


class Rows(NamedTuple):
    """A benchmark's rows. Their `audio` is relative to `root`; rows of unusable clips are apart."""

    root: Path
    usable: list[Utterance]
    missing: list[Quarantined]


def open_rows(path: Path, kind: Kind) -> Rows:
    """Rows {audio, prompt, gt, source} as the Qwen2-Audio evaluation reads them, their clips decoded once.

    Multiple-choice questions are rows as their publishers have them, see `multiple_choice`, and those of a
    file are one source, called as it is; questions that cannot be read are among the missing.

    Raises:
        BadBenchmark: naming file, line and key; or no clip is usable.
    """
    utterances, odd = read_rows(path, kind)
    rows = usable_rows(path.parent, utterances, partial(resolve_inside, path.parent), LONGEST_S)
    if not rows.usable:
        why = rows.missing[0].detail
        raise BadBenchmark(f"{path}: none of {len(utterances)} rows has a usable clip; first: {why}")
    return rows._replace(missing=[*odd, *rows.missing])


def read_rows(path: Path, kind: Kind) -> tuple[list[Utterance], list[Quarantined]]:
    """The rows of a file, their clips not looked at, and the questions that cannot be read, by reason.

    Raises:
        BadBenchmark: see `open_rows`.
    """
    read = _reader(kind)
    if read is None:
        return read_utterances(path), []
    questions, odd = readable(path, lambda row, where: read(row, where, path.stem))
    return questions, [
        Quarantined(f"{n} rows", path.name, reason, first) for reason, (n, first) in odd.items()
    ]


def _reader(kind: Kind) -> Callable[[Any, str, str], Utterance] | None:
    """What reads a row, of its place and source; None for rows {audio, prompt, gt, source}."""
    if kind == "advbench":
        return spoken_questions.read_request
    return partial(multiple_choice.read_question, kind) if multiple_choice.is_choice(kind) else None


def usable_rows(
    root: Path, rows: Sequence[Utterance], find: Callable[[str], ClipFile], longest_s: float
) -> Rows:
    """Rows whose clips below `root` can be decoded, which is done once."""
    clips = sorted({row.audio for row in rows})
    good, missing = decode.audit(find, [(clip, clip) for clip in clips], max_duration_s=longest_s)
    return Rows(root, [row for row in rows if row.audio in good], missing)


def is_chat(kind: Kind) -> bool:
    """Whether rows are put in a chat, with their clips, and not as texts that a policy continues."""
    return kind == "advbench" or multiple_choice.is_choice(kind)


def prompt_of(kind: Kind, row: Utterance) -> str:
    """The prompt that a pre-trained policy continues: the clip, then the row's prompt. Or a chat's question.

    It is empty where the question is in the clip.
    """
    return row.prompt if is_chat(kind) or AUDIO in row.prompt else AUDIO + row.prompt


class Answers(NamedTuple):
    """Rows and responses, and the rows that cannot be scored, by reason."""

    rows: list[Utterance]
    texts: list[str]
    odd_rows: dict[str, OddRows]


def read_answers(path: Path, kind: Kind) -> Answers:
    """Rows and responses: a JSON list, as the Qwen2-Audio evaluation writes, or JSON lines.

    Of multiple choice the rows are questions, see `multiple_choice`, with a response each. A response that is
    null is read as the empty answer.

    Raises:
        BadBenchmark: naming file and row: not JSON, or no row that can be scored.
    """
    read_question = _reader(kind)

    def read(row: Any, where: str) -> tuple[Utterance, str]:
        if read_question is not None:
            return read_question(row, where, path.stem), multiple_choice.response_of(kind, row, where)
        text = require_text(row, ("gt", "source"), where)
        return Utterance("", "", text["gt"], text["source"]), response_of(row, where)

    answers, odd = readable(path, read)
    return Answers([row for row, _ in answers], [text for _, text in answers], odd)


def score(kind: Kind, rows: Sequence[Utterance], texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Numbers per source, with `n` rows each.

    Returns:
        {source: {...}}: recognition has `wer` (per character for zh and yue; None without any reference
        word), `errors`, `length` and `not_reproduced`, a corpus' own `exact` and `wer`, both a `warning`
        where normalisation hides differences; translation `bleu` and its `signature`; srwt `aas_ms` and its
        parts; advbench the share `refused`; the others `accuracy`, multiple choice also the share that names
        no choice, `unparsed`. Error rates and shares are 0..1, BLEU is 0..100.

    Raises:
        CannotScore: a source does not name its target language, or a tokenizer is not installed.
    """
    return {
        source: {**_numbers(kind, source, group, own), "n": len(group)}
        for source, (group, own) in _by_source(rows, texts).items()
    }


def _numbers(kind: Kind, source: str, rows: Sequence[Utterance], texts: Sequence[str]) -> dict[str, Any]:
    references = [row.gt for row in rows]
    if kind == "translation":
        return _bleu(source, references, texts)
    if kind == "srwt":
        return srwt.score(references, texts)
    if kind in _LANGUAGES:
        return wer.score(references, texts, _LANGUAGES[kind])
    by_row = _metrics_by_row(kind, rows, texts)
    numbers: dict[str, Any] = {metric: fmean(values) if values else None for metric, values in by_row.items()}
    if kind == "recognition":
        return {**numbers, **wer.warning(references, texts, "other")}
    if kind == "aqa":
        # ClothoAQA has one row per annotator, so that one answer meets several references
        binary = [
            is_right
            for reference, is_right in zip(references, by_row["accuracy"] or (), strict=True)
            if reference.lower() in ("yes", "no")
        ]
        return {**numbers, "binary_accuracy": fmean(binary) if binary else None, "n_binary": len(binary)}
    return numbers


def compare(
    kind: Kind, rows: Sequence[Utterance], before: Sequence[str], after: Sequence[str], seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
    """{source: {metric: `Interval` as plain values}}: after minus before, by row.

    Error rates and accuracies only: BLEU and SRWT's shift are not means over rows and have no interval here.
    A metric that these rows cannot show has the `reason` in place of an interval.
    """
    if kind in ("translation", "srwt"):
        return {}
    second = _by_source(rows, after)
    differences: dict[str, dict[str, dict[str, Any]]] = {}
    for source, (group, own) in _by_source(rows, before).items():
        first_rows = _metrics_by_row(kind, group, own)
        second_rows = _metrics_by_row(kind, group, second[source][1])
        differences[source] = {
            metric: _difference(first_rows[metric], second_rows[metric], seed) for metric in first_rows
        }
    return differences


def _by_source(
    rows: Sequence[Utterance], texts: Sequence[str]
) -> dict[str, tuple[list[Utterance], list[str]]]:
    groups: dict[str, tuple[list[Utterance], list[str]]] = {}
    for row, text in zip(rows, texts, strict=True):
        group, own = groups.setdefault(row.source, ([], []))
        group.append(row)
        own.append(text)
    return groups


def _metrics_by_row(
    kind: Kind, rows: Sequence[Utterance], texts: Sequence[str]
) -> dict[str, list[float] | None]:
    references = [row.gt for row in rows]
    if multiple_choice.is_choice(kind):
        named = [multiple_choice.answer_of(kind, row, text) for row, text in zip(rows, texts, strict=True)]
        right = [float(choice == gt) for choice, gt in zip(named, references, strict=True)]
        return {"accuracy": right, "unparsed": [float(choice is None) for choice in named]}
    if kind == "advbench":
        return {"refused": [float(spoken_questions.is_refusal(text)) for text in texts]}
    if kind == "recognition":
        exact = wer.exact_matches(references, texts, "other")
        return {"exact": exact, "wer": wer.row_shares(references, texts, "other")}
    if kind in _LANGUAGES:
        return {"wer": wer.row_shares(references, texts, _LANGUAGES[kind])}
    # Exact matches after leading blanks are removed; case and full stops count, as officially
    return {"accuracy": [float(gt == text.lstrip()) for gt, text in zip(references, texts, strict=True)]}


def _difference(before: list[float] | None, after: list[float] | None, seed: int) -> dict[str, Any]:
    if before is None or after is None:
        return {"reason": "no word is left of the references after normalisation"}
    return paired_bootstrap(before, after, seed=seed)._asdict()


def _bleu(source: str, references: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """Corpus BLEU by sacrebleu, tokenized for the language that the source names last but one.

    The reports used sacrebleu 1.5.1; the signature names what was used here.

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
    result = metric.corpus_score(list(texts), [list(references)])
    return {"bleu": result.score, "signature": str(metric.get_signature())}


_LANGUAGES: dict[Kind, wer.Language] = {
    "asr_en": "en",
    "asr_zh": "zh",
    "asr_yue": "yue",
    "asr_other": "other",
}
