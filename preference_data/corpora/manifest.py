"""Your own audio with whatever you know about it -> a dataset. No facts, no phrasebook.

The manifest is read three times, as a stream: who is heard and how often, which decides who is held out; the
clips, each looked at once; the rows, which become records. About 200 bytes per clip and row stay in memory.

A clip goes to dev or test by its row's split, by its speaker's name, or by chance; else to train where every
row about it has an answer or says what is in it, but for a share whose questions are for preferences, as all
others are. The audio stays where it is; what came within rows is written to `audio/`. Clips of an evaluation
set are linked to where AIR-Bench would have them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, TextIO

import yaml

from preference_data import store
from preference_data.audio import decode
from preference_data.audio.clip_files import BadAudio, ClipFile, place
from preference_data.audio.decode import AudioInfo
from preference_data.corpora.manifest_rows import (
    CATEGORIES,
    BadManifest,
    Row,
    Table,
    read_row,
    rows_of,
    tables_of,
)
from preference_data.corpora.published.recording import Content
from preference_data.dataset.dataset import (
    EVALUATION_SETS,
    QUARANTINE,
    RECOGNITION,
    TABLES,
    WARNINGS,
    Dataset,
    RecordWriter,
    describe,
    evaluation_item,
)
from preference_data.dataset.fingerprints import fingerprint
from preference_data.dataset.licences import is_allowed
from preference_data.dataset.splits import HELD_OUT, SPLITS
from preference_data.interchange.columns import BadRow
from preference_data.interchange.row_files import EMBEDDED
from preference_data.prompts import prompts
from preference_data.schema import AudioClip, Chat, Prompt, Split, TaskExample, Turn, stable_id
from preference_data.text_files import BadText, open_lines

_REFUSED, _ANSWERED, _UNANSWERED = range(len(SPLITS), len(SPLITS) + 3)
"""What is known of a clip in the place of its split's number: it is not used, or, before it is looked at,
whether every row about it says something to learn from."""
_AUDIO = "audio"
"""Where clips that came within rows are written."""
_EXAMPLES = 3  # of what was left out, in an error

HeldOutClips = Mapping[Literal["dev", "test"], Sequence[str] | float]
"""Speakers, or a share of the clips: whole speakers where rows name them."""


class Rules(NamedTuple):
    """What a recipe says about a manifest."""

    name: str
    """Of the dataset; letters, digits, "_" and "-"."""
    max_duration_s: float
    max_bad_fraction: float
    held_out: HeldOutClips = {}
    preference_share: float = 0.2
    """Of the clips to learn from whose rows have questions: how many are for preferences instead."""
    questions: Sequence[str] = ()
    """Are asked about clips whose rows have no question."""
    questions_per_clip: int = 1
    category: str = "mixed"
    """Of rows that name none; a key of `CATEGORIES`."""
    licence: str | None = None
    """Of clips whose rows name none."""
    licences: Sequence[str] = ()
    """Clips with another licence, or with none, are left out; empty: none is."""
    ignore: Collection[str] = ()
    """Columns that are not read."""
    seed: int = 0


def read_questions(path: Path) -> list[str]:
    """The questions of a YAML file: a list of sentences.

    Raises:
        BadManifest: it is something else.
    """
    try:
        with open_lines(path) as file:
            sentences = yaml.safe_load(file.read().decode())
    except (OSError, BadText, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadManifest(f"{path} cannot be read as YAML: {error}") from error
    if not sentences or not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
        raise BadManifest(f"{path}: expected a list of sentences, each on a line that begins with '- '")
    try:
        prompts.refuse_control(str(path), *sentences)
    except prompts.BadExample as error:
        raise BadManifest(str(error)) from error
    return list(dict.fromkeys(sentence.strip() for sentence in sentences))


def prepare(
    out: Path,
    manifest: Path,
    rules: Rules,
    *,
    audio_root: Path | None = None,
    by: decode.Depth = "samples",
    on_progress: Callable[[int], object] = lambda done: None,
) -> dict[str, float]:
    """Write the dataset into `out`; returns counts.

    Args:
        out: the corpus' folder.
        manifest: a table, or a folder, see `manifest_rows.tables_of`.
        rules: how clips and rows are treated.
        audio_root: what audio paths are relative to, by default the manifest's folder.
        by: how far each file is looked at.
        on_progress: called with the number of clips checked so far.

    Raises:
        BadManifest: the manifest cannot be read, names nobody who is held out, or holds too much that cannot
            be used.
    """
    root = audio_root or (manifest if manifest.is_dir() else manifest.parent)
    if not root.is_dir():
        raise BadManifest(f"there is no folder {root}, which audio paths should be relative to")
    shutil.rmtree(out / _AUDIO, ignore_errors=True)  # of an earlier attempt: half a file might be there
    with RecordWriter(out) as records, ExitStack() as stack:
        evaluation = {
            split: stack.enter_context(_EvaluationSet(out, split, rules.name)) for split in HELD_OUT
        }
        preparation = _Preparation(out, tables_of(manifest), root, rules, records, evaluation)
        preparation.survey()
        preparation.examine(by, on_progress)
        problem = preparation.problem()
        if not problem:
            preparation.write()
            problem = preparation.problem()
    if problem:
        raise BadManifest(f"{manifest}: {problem}")
    describe(out, preparation.description())
    return preparation.metrics()


class _EvaluationSet(ExitStack):
    """Questions about held-out clips in AIR-Bench's layout, written as a stream; no file without any."""

    def __init__(self, out: Path, split: Split, dataset_name: str) -> None:
        super().__init__()
        self._folder, self._dataset_name = out / split / "Chat", dataset_name
        self._file: TextIO | None = None
        self.rows = 0

    def add(self, prompt: Prompt, clip: ClipFile, name: str) -> None:
        """Add a question about a clip, and put the clip where the layout has it, as a file of this name."""
        place(clip, self._folder / f"{prompt.task_name}_{self._dataset_name}" / name)
        if self._file is None:
            self._file = self.enter_context(store.replacing(self._folder / "Chat_meta.json"))
        item = evaluation_item(prompt, name, self._dataset_name)
        self._file.write(("," if self.rows else "[") + "\n" + json.dumps(item, ensure_ascii=False))
        self.rows += 1

    def finish(self) -> None:
        """End the file, when all questions are in it."""
        if self._file:
            self._file.write("\n]\n")


class _Preparation:
    """Goes through the rows, and keeps what must be known of all clips."""

    def __init__(
        self,
        out: Path,
        tables: Sequence[Table],
        root: Path,
        rules: Rules,
        records: RecordWriter,
        evaluation: Mapping[Split, _EvaluationSet],
    ) -> None:
        self._out, self._tables, self._root, self._rules = out, tables, root, rules
        self._records, self._evaluation = records, evaluation
        self._embedded: bool | None = None
        """Whether clips came within rows; None before the first clip."""
        self._clips: dict[int, int] = {}
        """By the fingerprint of its path, what is known of each clip."""
        self._speakers: Counter[str] = Counter()
        self._split_of_speaker: dict[str, Split] = {}
        self._split_of_audio: dict[int, int] = {}
        self._ids: set[int] = set()
        self._n_rows, self._bad_rows = 0, 0
        self._n_bad_clips = 0
        self._bad: list[decode.Quarantined] = []
        self._n: Counter[Split] = Counter()
        self._seconds: defaultdict[Split, float] = defaultdict(float)
        self._codes: Counter[str] = Counter()
        self._odd: Counter[str] = Counter()
        self._licences: Counter[str] = Counter()

    # ---------------------------------------------------------------------- reading

    def _rows(self) -> Iterator[tuple[str, int, Row | BadRow]]:
        """Every row, or why it cannot be used, with the name of its table and its number there."""
        for table in self._tables:
            for number, value in rows_of(table, self._out / _AUDIO):
                try:
                    row = read_row(value, self._root, table, self._rules.ignore)
                    self._check(row)
                    yield table.name, number, row
                except BadRow as error:
                    yield table.name, number, error

    def _good_rows(self) -> Iterator[tuple[str, int, Row]]:
        for name, number, row in self._rows():
            if not isinstance(row, BadRow):
                yield name, number, row

    def _check(self, row: Row) -> None:
        """Refuse what is wrong with a row beside other rows and the recipe."""
        is_embedded = row.audio.startswith(EMBEDDED)
        if self._embedded is None:
            self._embedded = is_embedded
        if is_embedded != self._embedded:
            kinds = "within the row", "by its path"
            raise BadRow(
                f"has its audio {kinds[not is_embedded]}, others {kinds[is_embedded]}: use two manifests"
            )
        if row.audio.startswith(EVALUATION_SETS):
            raise BadRow(f"audio {row.audio[:80]!r}: folders dev/Chat and test/Chat are ours; rename it")
        if not row.question and not self._rules.questions and (row.reference or not row.known):
            what = "an answer" if row.reference else "nothing"
            raise BadRow(
                f"says {what} about its clip, and no question; add one, or name a YAML of sentences by "
                "`questions`"
            )
        if row.split and (held := _named_split(row.speaker, self._rules.held_out)) not in (None, row.split):
            raise BadRow(f"split is {row.split!r}, but speaker {row.speaker!r} is held out for {held}")

    def survey(self) -> None:
        """Who is heard and how often, and which clips have rows without an answer; draws speakers."""
        for name, number, row in self._rows():
            self._n_rows += 1
            if isinstance(row, BadRow):
                self._bad_rows += 1
                self._quarantine(name, number, "", "bad_row", str(row))
                continue
            key = fingerprint(row.audio)
            if row.speaker and key not in self._clips:
                self._speakers[row.speaker] += 1
            answered = _ANSWERED if row.reference or row.known else _UNANSWERED
            self._clips[key] = max(answered, self._clips.get(key, answered))
        self._split_of_speaker = _held_out_speakers(self._speakers, self._rules.held_out, self._rules.seed)

    # ---------------------------------------------------------------------- clips

    def examine(self, by: decode.Depth, on_progress: Callable[[int], object]) -> None:
        """Look at every clip once, and write those that can be used."""
        waiting: deque[tuple[str, int, Row, bool]] = deque()
        paths = self._new_paths(waiting)
        outcomes = decode.examine(self._audio.find, paths, by=by, max_duration_s=self._rules.max_duration_s)
        for done, outcome in enumerate(outcomes, start=1):
            name, number, row, is_answered = waiting.popleft()
            if isinstance(outcome, BadAudio):
                self._n_bad_clips += 1
                self._quarantine(name, number, row.audio, outcome.code, outcome.detail)
            else:
                self._take(name, number, row, is_answered, outcome)
            on_progress(done)

    def _new_paths(self, waiting: deque[tuple[str, int, Row, bool]]) -> Iterator[str]:
        """The path of every clip when it comes first; its row waits for what is found out."""
        for name, number, row in self._good_rows():
            key = fingerprint(row.audio)
            if (known := self._clips[key]) not in (_ANSWERED, _UNANSWERED):
                continue
            self._clips[key] = _REFUSED  # until it is found to be good
            if not is_allowed(licence := self._licence(row), self._rules.licences):
                reason = f"licence is {licence!r}" if licence else "has no licence"
                reason += f"; allowed: {', '.join(self._rules.licences)}"
                self._quarantine(name, number, row.audio, "licence", reason)
                continue
            waiting.append((name, number, row, known == _ANSWERED))
            yield _relative(row)

    def _take(self, name: str, number: int, row: Row, is_answered: bool, info: AudioInfo) -> None:
        split = self._split(row, info.sha256, is_answered)
        here = SPLITS.index(split)
        if (there := self._split_of_audio.setdefault(fingerprint(info.sha256), here)) != here:
            same = f"is the same audio as a clip of {SPLITS[there]}"
            self._quarantine(name, number, row.audio, "held_out", same)
            return
        self._clips[fingerprint(row.audio)] = here
        self._n[split] += 1
        self._seconds[split] += info.duration_s
        clip = AudioClip(
            id=_clip_id(row),
            path=_relative(row),
            split=split,
            duration_s=info.duration_s,
            sha256=info.sha256,
            speaker=row.speaker or None,
            source=self._rules.name,
            licence=self._licence(row),
        )
        self._licences[clip.licence or "unknown"] += 1
        self._records.add(clip)
        for item in decode.odd({clip.id: info}, {clip.id: clip.path}):
            self._odd[item.code] += 1
            self._records.add_row(WARNINGS, item._asdict())

    def _split(self, row: Row, sha256: str, is_answered: bool) -> Split:
        """By the row, the speaker, or chance; drawn by content, so that a copy goes the same way."""
        if row.split in ("dev", "test", "preference"):
            return row.split
        if row.speaker in self._split_of_speaker:
            return self._split_of_speaker[row.speaker]
        if not is_answered:
            return "preference"
        draw = _draw("held out", self._rules.seed, sha256)
        for split, share in self._rules.held_out.items() if not (row.speaker or row.split) else ():
            if isinstance(share, float):
                if draw < share:
                    return split
                draw -= share
        asks = row.question or self._rules.questions
        is_drawn = asks and _draw("preference", self._rules.seed, sha256) < self._rules.preference_share
        return "preference" if is_drawn else "train"

    def _licence(self, row: Row) -> str | None:
        return row.licence or self._rules.licence

    @property
    def _audio(self) -> Dataset:
        """The clips, by their paths in records."""
        return Dataset(self._out / _AUDIO if self._embedded else self._root, {})

    # ---------------------------------------------------------------------- records

    def write(self) -> None:
        """Write what rows say about clips that can be used."""
        audio, refused = self._audio, set[int]()
        for name, number, row in self._good_rows():
            key, place_of = fingerprint(row.audio), self._clips[fingerprint(row.audio)]
            if place_of == _REFUSED:  # the first row about it says why
                if key in refused:
                    self._quarantine(
                        name, number, row.audio, "clip_refused", "its clip was left out, see above"
                    )
                refused.add(key)
                continue
            split = SPLITS[place_of]
            if (row.history or row.system) and split in HELD_OUT:
                reason = "has earlier turns or a system prompt, which no question of an evaluation has"
                self._quarantine(name, number, row.audio, "several_turns", reason)
                continue
            try:
                self._write(row, split, audio)
            except BadRow as error:
                self._bad_rows += 1
                self._quarantine(name, number, row.audio, "bad_row", str(error))
        for evaluation in self._evaluation.values():
            evaluation.finish()
        for file in (self._out / _AUDIO).iterdir() if self._embedded else ():
            if self._clips.get(fingerprint(EMBEDDED + file.name), _REFUSED) == _REFUSED:
                file.unlink()

    def _write(self, row: Row, split: Split, audio: Dataset) -> None:
        if row.split not in (None, split) and (row.split, split) != ("train", "preference"):
            raise BadRow(f"split is {row.split!r}, but an earlier row has put its clip into {split!r}")
        says = row.question, row.reference, row.known, *row.history, *([row.system] if row.system else [])
        key = row.id or f"{_clip_id(row)}-{stable_id(*says)}"
        if (mark := fingerprint(key)) in self._ids:
            reason = (
                f"id {key!r} comes more than once"
                if row.id
                else "says the same about its clip as an earlier row"
            )
            raise BadRow(f"{reason}; the first is taken")
        self._ids.add(mark)
        if split == "train":
            self._write_training(row, key)
        elif split == "preference":
            for prompt in self._prompts(row, key, self._rules.questions_per_clip):
                self._records.add(prompt)
        else:
            self._write_evaluation(row, key, split, audio)

    def _write_training(self, row: Row, key: str) -> None:
        path = (_relative(row),)
        prompts = list(self._prompts(row, key, 1)) if row.reference else []
        # An example for pre-training has nothing before its question
        answers = (
            Content("question_answer", row.reference, question=prompt.question)
            for prompt in prompts
            if len(prompt.messages) == 1
        )
        for content in (*row.known, *answers):
            fields = {name: value for name, value in content._asdict().items() if name != "benchmark"}
            self._records.add(TaskExample(id=f"{key}-{content.task}", audios=path, **fields))
        for prompt in prompts:
            own = prompt.audios_per_turn[-1] if row.history else ()
            last = Turn(question=prompt.question, answer=row.reference, audios=own)
            turns = (*row.history, last)
            self._records.add(Chat(id=f"{key}-chat", system=row.system, audios=path, turns=turns))

    def _write_evaluation(self, row: Row, key: str, split: Split, audio: Dataset) -> None:
        for content in row.known:
            rows = {
                "audio": _relative(row),
                "prompt": content.task,
                "gt": content.text,
                "source": f"{content.task}/{self._rules.name}",
                "audio_language": content.audio_language,
                "text_language": content.text_language,
            }
            known_fields = {name: value for name, value in rows.items() if value is not None}
            self._records.add_row(RECOGNITION[split], known_fields)
        for prompt in self._prompts(row, key, 1) if row.reference else ():
            name = f"{_clip_id(row)}{PurePosixPath(row.audio).suffix.lower()}"
            self._evaluation[split].add(prompt, audio.find(_relative(row)), name)

    def _drawn_questions(self, row: Row) -> list[str]:
        return sorted(self._rules.questions, key=lambda text: stable_id(self._rules.seed, row.audio, text))

    def _prompts(self, row: Row, key: str, n: int) -> Iterator[Prompt]:
        """The row's own question, or `n` drawn ones."""
        questions = [row.question] if row.question else self._drawn_questions(row)[:n]
        for number, question in enumerate(questions):
            known: dict[str, list[str]] = {content.task: [content.text] for content in row.known}
            if row.reference:
                known["question_answer"] = [f"{question} {row.reference}"]
            yield Prompt(
                id=f"{key}-{number}" if len(questions) > 1 else key,
                system=row.system,
                audios=(_relative(row),),
                history=row.history,
                question=question,
                answer_gt=row.reference,
                meta_info=json.dumps(known, ensure_ascii=False),
                task_name=CATEGORIES[row.category or self._rules.category],
            )

    # ---------------------------------------------------------------------- what is left out

    def _quarantine(self, name: str, number: int, path: str, code: str, detail: str) -> None:
        self._codes[code] += 1
        row = decode.Quarantined(f"row-{number}", path[:1000], code, f"{name}:{number}: {detail}")
        self._records.add_row(QUARANTINE, row._asdict())
        if len(self._bad) < _EXAMPLES and code != "licence":
            self._bad.append(row)

    def problem(self) -> str:
        """Why the manifest cannot be used as it is, known when all clips are looked at; empty if it can."""
        where = f"{self._out / QUARANTINE} lists them all"
        examples = "; ".join(
            f"{row.detail}" if row.code == "bad_row" else f"{row.path}: {row.code}: {row.detail}"
            for row in self._bad
        )
        for what, bad, n in (
            ("rows", self._bad_rows, self._n_rows),
            ("clips", self._n_bad_clips, len(self._clips)),
        ):
            if bad > self._rules.max_bad_fraction * n:
                return (
                    f"{bad} of {n} {what} cannot be used ({bad / n:.1%}, allowed max_bad_fraction="
                    f"{self._rules.max_bad_fraction:.1%}): {examples}. Mend them or leave them out, or raise "
                    f"max_bad_fraction; {where}{decode.advice_on_length(self._bad)}"
                )
        if not self._n.total():
            left_out = ", ".join(f"{code} {n}" for code, n in self._codes.items()) or "it has no row"
            return f"no clip is left ({left_out}); {where}"
        for split, held in self._rules.held_out.items():
            if isinstance(held, float) and held and not self._n[split]:
                return (
                    f"held_out: no clip with an answer fell to {split} (share {held:g} of {self._n.total()} "
                    f"clips); raise its share, give a column `split`, or leave {split} out of held_out"
                )
        return ""

    # ---------------------------------------------------------------------- what came of it

    def description(self) -> dict[str, Any]:
        """Of the dataset, but for its digest."""
        names = [licence for licence in self._licences if licence != "unknown"]
        return {
            "name": self._rules.name,
            "root": _AUDIO if self._embedded else str(self._root.resolve()),
            "licence": names[0] if len(self._licences) == len(names) == 1 else None,
            "licences": dict(self._licences.most_common()),
            "clips": dict(sorted(self._n.items())),
            "hours": {split: round(seconds / 3600, 4) for split, seconds in sorted(self._seconds.items())},
            "records": self._written(),
            "quarantined": dict(sorted(self._codes.items())),
            **({"odd": dict(sorted(self._odd.items()))} if self._odd else {}),
            "speakers": len(self._speakers),
        }

    def _written(self) -> dict[str, int]:
        return {
            name: n for name, n in sorted(self._records.rows.items()) if name not in (QUARANTINE, WARNINGS)
        }

    def metrics(self) -> dict[str, float]:
        """Counts."""
        made = self._records.rows
        return {
            **{f"clips_{split}": float(n) for split, n in sorted(self._n.items())},
            "hours": sum(self._seconds.values()) / 3600,
            "rows": float(self._n_rows),
            **{
                f"rows_{TABLES[kind]}": float(made[f"{TABLES[kind]}.jsonl"])
                for kind in (TaskExample, Chat, Prompt)
            },
            **{f"questions_{split}": float(part.rows) for split, part in self._evaluation.items()},
            "quarantined": float(self._codes.total()),
            **{code: float(n) for code, n in sorted(self._odd.items())},
            "speakers": float(len(self._speakers)),
        }


# -------------------------------------------------------------------------- who is held out


def _named_split(speaker: str, held_out: HeldOutClips) -> Split | None:
    """The split that a speaker is held out for by name."""
    named = (split for split, held in held_out.items() if not isinstance(held, float) and speaker in held)
    return next(named, None)


def _held_out_speakers(speakers: Mapping[str, int], held_out: HeldOutClips, seed: int) -> dict[str, Split]:
    """Speakers named for dev and test, and those drawn until they have about the share of the clips.

    `speakers` are how many clips each has. At least one is left to learn from.

    Raises:
        BadManifest: a name is nobody's, or there are too few speakers to draw from.
    """
    chosen: dict[str, Split] = {}
    for split, held in held_out.items():
        for name in () if isinstance(held, float) else held:
            if name not in speakers:
                raise BadManifest(f"held_out: no row has speaker {name!r}, who is held out for {split}")
            chosen[name] = split
    left = sorted(speakers.keys() - chosen, key=lambda name: stable_id("held out", seed, name))
    for split, share in held_out.items():
        wanted = share * sum(speakers.values()) if isinstance(share, float) and speakers else 0.0
        drawn: list[str] = []
        for name in left:
            if sum(map(speakers.__getitem__, drawn)) + speakers[name] / 2 <= wanted:
                drawn.append(name)
        drawn = drawn or ([min(left, key=speakers.__getitem__)] if wanted and left else [])
        left = [name for name in left if name not in drawn]
        if wanted and not (drawn and left):
            raise BadManifest(
                f"held_out: {len(speakers)} speakers are too few to hold any out for {split}; give a column "
                "`split`, or name the column of speakers under `ignore`, then files are drawn"
            )
        chosen |= dict.fromkeys(drawn, split)
    return chosen


def _draw(*parts: object) -> float:
    """A number in [0, 1) that follows from the parts."""
    return int(stable_id(*parts), 16) / 16**16


def _relative(row: Row) -> str:
    """The path of a row's clip in records."""
    return row.audio.removeprefix(EMBEDDED)


def _clip_id(row: Row) -> str:
    path = _relative(row)
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', PurePosixPath(path).stem)[:40]}-{stable_id(path)}"
