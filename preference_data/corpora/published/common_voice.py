"""Common Voice: sentences read by volunteers in their own voice, in more than 100 languages.

Home: https://commonvoice.mozilla.org/datasets (from 2025 on https://datacollective.mozillafoundation.org).
Licence: CC0; whoever downloads it promises not to identify the speakers. Version 15: 19,160 h validated,
MP3 at 32 or 48 kHz; English 3,300 h, 77 GB.
Layout: `[cv-corpus-VERSION/]{locale}/{train,dev,test}.tsv` with client_id, path, sentence, age, gender …,
audio in `{locale}/clips/`. The three tables are its splits; no client_id is in two of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from preference_data.audio.clip_files import list_files
from preference_data.corpora.published.recording import Content, Recording, language, not_a_corpus, rows
from preference_data.prompts.languages import LANGUAGES
from preference_data.schema import Split, stable_id

_SPLITS: tuple[Split, ...] = ("test", "dev", "train")
_COLUMNS = ("client_id", "path", "sentence", "age", "gender")
_VERSION = re.compile(r"cv-corpus-(\d+)")


def read(folder: Path) -> Iterator[Recording]:
    """Every validated sentence of the locales that are there."""
    locales = sorted(
        path.parent
        for pattern in ("test.tsv", "*/test.tsv", "*/*/test.tsv")
        for path in list_files(folder, pattern)
        if (path.parent / "clips").is_dir()
    )
    if not locales:
        raise not_a_corpus(folder, "{locale}/test.tsv with {locale}/clips/", "common_voice")
    for split in _SPLITS:
        for locale in locales:
            table = locale / f"{split}.tsv"
            for row in rows(table, _COLUMNS) if table.is_file() else ():
                yield _recording(folder, locale, split, row)


def _recording(folder: Path, locale: Path, split: Split, row: Mapping[str, str]) -> Recording:
    spoken = language(row.get("locale") or locale.name)
    version = _VERSION.search(str(locale.resolve()))
    contents = [
        Content(
            "transcribe",
            row["sentence"],
            spoken,
            spoken,
            benchmark=f"common_voice_{version[1]}_{spoken}" if version else f"common_voice_{spoken}",
        ),
        Content("language_id", LANGUAGES[spoken].name if spoken in LANGUAGES else spoken, spoken, "en"),
    ]
    gender = row["gender"].split("_")[0]
    if gender in ("male", "female"):
        contents.append(Content("gender", gender, spoken, "en"))
    if row["age"]:
        contents.append(Content("age", row["age"], spoken, "en"))
    return Recording(
        (locale / "clips" / row["path"]).relative_to(folder).as_posix(),
        split,
        locale.name,
        tuple(contents),
        speaker=stable_id(row["client_id"]),
    )
