"""ClothoAQA: six questions about each of 1,991 sounds, each answered by three people.

Home: https://zenodo.org/records/6473207. Licence: MIT for the questions, Creative Commons of various kinds
for the audio. 12.5 h, 3.7 GB of WAV at 44.1 kHz.
Layout: `clotho_aqa_{train,val,test}.csv` (file_name, QuestionText, answer, confidence), audio in
`audio_files/`. The tables are its splits. One row is one person's answer, so a question comes three times:
for training, the answer that at least two gave is taken and questions without one are left out; held-out
recordings keep every answer, as the benchmark is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from preference_data.corpora.published.recording import (
    Content,
    QuestionAnswer,
    Recording,
    grouped,
    rows,
    tables,
)
from preference_data.schema import Split

_SPLITS: dict[str, Split] = {"test": "test", "val": "dev", "train": "train"}
_COLUMNS = ("file_name", "QuestionText", "answer")
_AGREEING = 2


def read(folder: Path) -> Iterator[Recording]:
    """Every recording with its questions."""
    for _, split, table in tables(folder, "clotho_aqa_{}.csv", _SPLITS, "clothoaqa"):
        for (name,), answers in grouped(rows(table, _COLUMNS), "file_name").items():
            agreed = list(_agreed(answers))
            everything = [QuestionAnswer(row["QuestionText"], row["answer"]) for row in answers]
            yield Recording(
                f"audio_files/{name}",
                split,
                "clothoaqa",
                tuple(map(_content, agreed if split == "train" else everything)),
                tuple(agreed),
            )


def _agreed(given: Sequence[Mapping[str, str]]) -> Iterator[QuestionAnswer]:
    """Questions with the answer that most people gave."""
    for (question,), answers in grouped(given, "QuestionText").items():
        answer, votes = Counter(row["answer"].lower() for row in answers).most_common(1)[0]
        if votes >= _AGREEING:
            yield QuestionAnswer(question, answer)


def _content(given: QuestionAnswer) -> Content:
    question, answer = given
    return Content("question_answer", answer, text_language="en", question=question, benchmark="clothoaqa")
