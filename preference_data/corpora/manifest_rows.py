"""The rows of a manifest of your own audio: which files hold them, and what each says about its clip.

A row names one clip and whatever is known about it. Columns go by the names that others use: those of Hugging
Face's audio folders and of NeMo's manifests among them, and lhotse's cuts are read as they are.

    audio       the clip, relative to the audio's root: audio, path, file_name, audio_filepath ...
    question    what a policy is asked about it: question, prompt, query, instruction
    reference   the right answer: reference, answer, response, output
    messages    instead of a question, a conversation about the clip; without a last answer, its end is asked
    transcript  what is said: transcript, text, sentence ...; `language` is that of the speech
    caption     what can be heard: caption, description
    split       train, preference, dev, test; or as Hugging Face has it, validation for dev
    speaker, licence, category (speech, sound, music, mixed), id
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from preference_data.audio.clip_files import ENDINGS, list_files
from preference_data.corpora.published.recording import Content, language
from preference_data.interchange.columns import BadRow, Columns, is_empty
from preference_data.interchange.conversation import read_turns, without_tag
from preference_data.interchange.convert import history_of
from preference_data.interchange.row_files import EMBEDDED, FileRow, path_below, read_rows
from preference_data.prompts.prompts import BadExample, pretraining_prompt, refuse_control
from preference_data.schema import Split, Turn
from preference_data.text_files import BadText

CATEGORIES = {
    "speech": "speech_QA",
    "sound": "sound_QA",
    "music": "music_QA",
    "mixed": "speech_and_sound_QA",
}
"""What a question can be about, as the columns of AIR-Bench's tables, and the task that it counts as."""
_COLUMNS: dict[str, tuple[str, ...]] = {
    "audio": (
        "audio",
        "path",
        "file",
        "file_name",
        "filename",
        "audio_path",
        "audio_filepath",
        "wav",
        "clip",
    ),
    "question": ("question", "prompt", "query", "instruction"),
    "reference": ("reference", "answer", "response", "output", "answer_gt"),
    "messages": ("messages",),
    "transcript": ("transcript", "transcription", "text", "sentence"),
    "caption": ("caption", "description"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "licence": ("licence", "license"),
    "split": ("split",),
    "language": ("language", "lang", "locale"),
    "category": ("category",),
    "id": ("id", "uniq_id"),
}
_MEANING = {column: meaning for meaning, columns in _COLUMNS.items() for column in columns}
_SPLITS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "preference": "preference",
    "dev": "dev",
    "validation": "dev",
    "valid": "dev",
    "val": "dev",
    "test": "test",
}
_TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".jsonl.gz", ".json.gz")
_EMBEDDED_NAME = re.compile(r"[0-9a-f]{64}(\.[A-Za-z0-9]+)?")
"""Of a clip that came within a row, as `row_files` writes it."""
_LONGEST_ID = 150
"""Characters: the ids of records are made of it."""
_WHOLE_S = 0.01
"""A cut that leaves out less than this of its recording is the whole of it."""


class BadManifest(ValueError):
    """A manifest cannot be read, or is not what the recipe says; what, and the next step."""


class Table(NamedTuple):
    """A file of rows, or a folder of audio without one."""

    path: Path
    name: str
    """For messages: its path within the manifest's folder."""
    below: str = ""
    """What its paths are relative to, below the audio's root."""
    split: Split | None = None
    """Of rows that name none."""


class Row(NamedTuple):
    """What a row says about its clip; empty text is what it does not say."""

    audio: str
    """Relative to the audio's root, or `row_files.EMBEDDED` and a name."""
    id: str
    question: str
    reference: str
    known: tuple[Content, ...]
    split: Split | None
    speaker: str
    licence: str
    category: str
    system: str | None = None
    history: tuple[Turn, ...] = ()
    """Turns before the question."""


# -------------------------------------------------------------------------- files


def tables_of(manifest: Path) -> list[Table]:
    """The files of rows that a manifest is made of: itself, or those of a folder.

    A folder is what `datasets` saves or the Hub holds (Arrow or Parquet files), or has a `metadata` file
    beside its audio as Hugging Face's audio folders do, or holds audio alone.

    Raises:
        BadManifest: nothing of that is there.
    """
    if manifest.is_file():
        if not manifest.name.lower().endswith(_TABLES):
            raise BadManifest(f"{manifest}: a manifest's name ends with one of {', '.join(_TABLES)}")
        return [Table(manifest, manifest.name)]
    if not manifest.is_dir():
        raise BadManifest(f"there is no file or folder {manifest}; name the table of your clips")
    for pattern in ("metadata.*", "*.arrow", "*.parquet"):
        files = [path for path in list_files(manifest, f"**/{pattern}") if path.suffix.lower() in _TABLES]
        if files := [path for path in files if not path.name.startswith("cache-")]:
            return [_table_in(manifest, path) for path in files]
    if tables := list_files(manifest, endings=_TABLES):
        raise BadManifest(f"{manifest} is a folder that holds {tables[0].name}; name that file")
    if not list_files(manifest, "**/*", ENDINGS):
        raise BadManifest(f"{manifest} holds no audio and no table of it; name the table of your clips")
    return [Table(manifest, manifest.name)]


def _table_in(folder: Path, path: Path) -> Table:
    """A file of a folder: its place, and the split that its name or its folder's says."""
    place = path.relative_to(folder)
    names = [*place.parent.parts, re.split(r"[-.]", place.name)[0]]
    split = next((_SPLITS[name] for name in reversed(names) if name in _SPLITS), None)
    has_paths = place.name.startswith("metadata.")
    return Table(path, str(place), "".join(f"{part}/" for part in place.parent.parts if has_paths), split)


def rows_of(table: Table, clips: Path) -> Iterator[FileRow]:
    """The rows of a table as they stand; clips within rows are written to `clips`.

    Raises:
        BadManifest: the file cannot be read.
    """
    if table.path.is_dir():
        files = list_files(table.path, "**/*", ENDINGS)
        yield from (FileRow(n, {"audio": str(f.relative_to(table.path))}) for n, f in enumerate(files, 1))
        return
    try:
        yield from read_rows(table.path, clips)
    except BadText as error:
        raise BadManifest(str(error)) from error


# -------------------------------------------------------------------------- rows


def read_row(value: Any, root: Path, table: Table, ignored: Collection[str] = ()) -> Row:
    """What a row says. Columns that are not read here are taken for what no training needs.

    Args:
        value: as it stands in the table.
        root: of the audio.
        table: where it stands.
        ignored: columns that are not to be read.

    Raises:
        BadRow: it says nothing that can be used, or two things at once, or a column is probably misspelt;
            what, and what to do.
    """
    if isinstance(value, BadText):
        raise BadRow(str(value))
    if not isinstance(value, Mapping):
        raise BadRow(f"is a {type(value).__name__}, not an object")
    try:
        row = _columns_of_cut(value) if _is_cut(value) else value
    except (AttributeError, KeyError, TypeError) as error:
        raise BadRow(f"is not a cut as lhotse writes it ({error})") from error
    path = _path(row, root, table)
    text: dict[str, str] = {}
    system, history = None, tuple[Turn, ...]()
    for column, content in row.items():
        if column in ignored or (meaning := _meaning(str(column))) in (None, "audio") or is_empty(content):
            continue
        if meaning == "messages":
            system, history = _conversation(content, path, text)
            continue
        if text.setdefault(meaning, words := _text(meaning, content)) != words:
            raise BadRow(f"says two things about its {meaning}, one in column {column!r}; keep one")
    read = Row(
        audio=path,
        id=text.get("id", ""),
        question=without_tag(text.get("question", ""), "a question"),
        reference=text.get("reference", ""),
        known=tuple(_contents(text)),
        split=_split(text["split"]) if "split" in text else table.split,
        speaker=text.get("speaker", ""),
        licence=text.get("licence", ""),
        category=text.get("category", ""),
        system=system,
        history=history,
    )
    if read.category not in ("", *CATEGORIES):
        raise BadRow(f"category is {read.category[:80]!r}, not one of {', '.join(CATEGORIES)}")
    if len(read.id) > _LONGEST_ID or not read.id.isprintable():
        raise BadRow(
            f"id is {read.id[:80]!r}; it must be text on one line, of at most {_LONGEST_ID} characters"
        )
    try:
        earlier = [words for turn in read.history for words in (turn.question, turn.answer)]
        refuse_control(path, read.system or "", *earlier, read.question, read.reference)
        refuse_control(path, *(content.text for content in read.known))
        for content in read.known:
            languages = {"audio_language": content.audio_language, "text_language": content.text_language}
            pretraining_prompt(content.task, 1, "sentences", **languages)
    except BadExample as error:
        raise BadRow(str(error)) from error
    return read


def _conversation(messages: Any, audio: str, text: dict[str, str]) -> tuple[str | None, tuple[Turn, ...]]:
    """What stands before the last question of a conversation; the question and its answer become `text`."""
    clip = audio.removeprefix(EMBEDDED)
    try:
        turns, _ = read_turns(Columns({"messages": messages, "audios": [clip]}), "trl")
    except BadRow as error:
        raise BadRow(
            f"its messages: {error} (a row is about one clip; `align data import` reads others)"
        ) from error
    *_, question = turns.questions
    if not question:
        raise BadRow("the last question among its messages has no words")
    answer = {} if turns.is_open else {"reference": turns.answers[-1]}
    for meaning, words in {"question": question, **answer}.items():
        if text.setdefault(meaning, words) != words:
            raise BadRow(f"says two things about its {meaning}, one among its messages; keep one")
    return turns.system, history_of(turns)


@lru_cache(maxsize=4096)
def _meaning(column: str) -> str | None:
    """What a column is about; None where it is not read."""
    if column in _MEANING:
        return _MEANING[column]
    if near := get_close_matches(column.lower(), _MEANING, n=1, cutoff=0.85):
        raise BadRow(
            f"has a column {column[:80]!r}, which is not read; did you mean {near[0]!r}? Rename it, or name "
            "it under `ignore`"
        )
    return None


def _text(meaning: str, content: Any) -> str:
    if isinstance(content, bool) or not isinstance(content, str | int | float):
        raise BadRow(f"its {meaning} is {str(content)[:80]!r}, no text")
    return str(content).strip()


def _contents(text: Mapping[str, str]) -> Iterator[Content]:
    """Texts that say what is in the clip, by the pre-training task that they are the target of."""
    code = language(text["language"]) if "language" in text else None
    if words := text.get("transcript"):
        yield Content("transcribe", words, audio_language=code, text_language=code, benchmark="transcribe")
    if caption := text.get("caption"):
        yield Content("caption", caption, benchmark="caption")


def _split(name: str) -> Split:
    if name.lower() not in _SPLITS:
        raise BadRow(f"split is {name[:80]!r}, not one of {', '.join(_SPLITS)}")
    return _SPLITS[name.lower()]


def _path(row: Mapping[str, Any], root: Path, table: Table) -> str:
    """The path of a row's clip below the root: the first column that names one."""
    named = next((row[name] for name in _COLUMNS["audio"] if not is_empty(row.get(name))), None)
    if isinstance(named, list) and len(named) == 1:
        named = named[0]
    if isinstance(named, Mapping):
        named = named.get("path")
    if named is None:
        raise BadRow(f"names no clip; call the column that does {_COLUMNS['audio'][0]!r}")
    if not isinstance(named, str):
        raise BadRow(f"its audio is {str(named)[:80]!r}, not the path of one file")
    if named.startswith(EMBEDDED):
        if not _EMBEDDED_NAME.fullmatch(named.removeprefix(EMBEDDED)):
            raise BadRow(f"audio {named[:80]!r} is no path below the root")
        return named
    try:
        path = path_below(root, named)
    except BadText as error:
        raise BadRow(str(error)) from error
    return path if named.startswith("/") or "://" in path else table.below + path


# -------------------------------------------------------------------------- lhotse


def _is_cut(row: Mapping[str, Any]) -> bool:
    return str(row.get("type", "")).endswith("Cut") and {"id", "start", "duration"} <= row.keys()


def _columns_of_cut(cut: Mapping[str, Any]) -> dict[str, Any]:
    """A cut of lhotse's (`MonoCut.to_dict`) as columns: a whole recording, what is said in it and by whom."""
    recording = cut.get("recording")
    if not isinstance(recording, Mapping):
        raise BadRow(f"is a {cut['type']}, not a cut of a recording; save its audio by lhotse's save_audios")
    sources = recording.get("sources")
    if not isinstance(sources, list) or len(sources) != 1 or sources[0].get("type") != "file":
        raise BadRow("its recording is not one file; save its audio by lhotse's CutSet.save_audios")
    channel, channels = cut.get("channel", 0), sources[0].get("channels", [0])
    start, duration, whole = cut["start"], cut["duration"], recording.get("duration")
    if recording.get("transforms") or sorted(channel if isinstance(channel, list) else [channel]) != channels:
        raise BadRow("is one channel, or a changed copy, of its recording; save it by CutSet.save_audios")
    if start > _WHOLE_S or abs(whole - duration) > _WHOLE_S:
        raise BadRow(
            f"is {start:g} s to {start + duration:g} s of a recording of {whole:g} s; a clip is a file here: "
            "save the cuts by lhotse's CutSet.save_audios, and name the manifest of what it returns"
        )
    spoken = [item for item in cut.get("supervisions") or () if isinstance(item, Mapping)]
    texts = " ".join(item["text"] for item in spoken if isinstance(item.get("text"), str))
    only = {key: {item.get(key) for item in spoken} for key in ("speaker", "language")}
    custom = [cut.get("custom"), *(item.get("custom") for item in spoken)]
    return {
        "audio": sources[0].get("source"),
        "id": cut["id"],
        "text": texts,
        **{key: values.pop() for key, values in only.items() if len(values) == 1},
        **{key: value for more in custom if isinstance(more, Mapping) for key, value in more.items()},
    }
