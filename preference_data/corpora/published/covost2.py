"""CoVoST 2: translations of Common Voice 4, from 21 languages into English and from English into 15.

Home: https://github.com/facebookresearch/covost. Licence: CC BY-NC 4.0 (the audio: CC0). 2,880 h.
Layout: `covost_v2.{source}_{target}.tsv` (path, translation, split) at the top, and Common Voice's
`{source}/validated.tsv` (client_id, path, sentence) with `{source}/clips/` beside them. Splits are those
of the tables (train_covost counts as train). A recording comes once, with all its translations; the
tables of one source language are held in memory, about 0.1 GB each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from preference_data.corpora.published.recording import (
    BadCorpus,
    Content,
    Recording,
    language,
    not_a_corpus,
    rows,
)
from preference_data.schema import Split, stable_id

_SPLITS: dict[str, Split] = {"test": "test", "dev": "dev", "train": "train", "train_covost": "train"}


_Translations = dict[str, dict[str, tuple[Split, str]]]
"""File name -> target locale -> split and translation."""


def read(folder: Path) -> Iterator[Recording]:
    """Every translated recording of the language pairs that are there."""
    tables = sorted(folder.glob("covost_v2.*_*.tsv"))
    if not tables:
        raise not_a_corpus(folder, "covost_v2.{source}_{target}.tsv", "covost2")
    sources = sorted({_pair(table)[0] for table in tables})
    for split in ("test", "dev", "train"):
        for source in sources:
            translated = _translations([table for table in tables if _pair(table)[0] == source])
            validated = folder / source / "validated.tsv"
            for row in rows(validated, ("client_id", "path", "sentence"), escape="\\"):
                recording = _recording(source, row, translated.get(row["path"], {}))
                if recording and recording.split == split:
                    yield recording


def _pair(table: Path) -> tuple[str, str]:
    source, _, target = table.name.removeprefix("covost_v2.").removesuffix(".tsv").partition("_")
    return source, target


def _translations(tables: Sequence[Path]) -> _Translations:
    translations: _Translations = {}
    for table in tables:
        target = _pair(table)[1]
        for row in rows(table, ("path", "translation", "split"), escape="\\"):
            if row["split"] not in _SPLITS:
                raise BadCorpus(f"{table}: split {row['split']!r} is none of {', '.join(_SPLITS)}")
            translations.setdefault(row["path"], {})[target] = (_SPLITS[row["split"]], row["translation"])
    return translations


def _recording(
    source: str, row: Mapping[str, str], translated: Mapping[str, tuple[Split, str]]
) -> Recording | None:
    """A recording is held out from training if any of its language pairs holds it out."""
    splits = {split for split, _ in translated.values()}
    split = next((name for name in _SPLITS.values() if name in splits), None)
    if split is None:
        return None
    spoken = language(source)
    contents = [Content("transcribe", row["sentence"], spoken, spoken)]
    for target, (_, text) in translated.items():
        name = f"covost2_{spoken}_{language(target)}_{split}"
        contents.append(Content("translate_speech", text, spoken, language(target), benchmark=name))
    return Recording(
        f"{source}/clips/{row['path']}",
        split,
        f"covost2_{spoken}",
        tuple(contents),
        speaker=stable_id(row["client_id"]),
    )
