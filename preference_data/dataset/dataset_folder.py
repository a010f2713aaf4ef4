"""A corpus as training reads it: a folder of records that refer to the audio where it lies.

clips.jsonl       AudioClip      every usable recording, all splits
pretrain.jsonl    TaskExample    of train: what the publisher says about a recording, one task each
sft.jsonl         Chat           of train: its questions and answers
prompts.jsonl     Prompt         of preference: questions to sample answers to
dev/, test/recognition.jsonl     held-out rows {audio, prompt, gt, source} as the evaluation reads them, and
                                 languages and question where the task needs them
quarantine.jsonl                 recordings that were left out, or (bad_example) something said about one that
                                 cannot be put to a model: id, path, code, detail
source.json                      name, root (audio paths are relative to it), licence, counts, hours, digest

Written as a stream: one recording is in memory at a time, and a few bytes of each for what must be
distinct. The folder is whole, or not there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from preference_data import store
from preference_data.audio import decode
from preference_data.audio.clip_paths import SOURCE as SOURCE
from preference_data.audio.decode import AudioInfo, BadAudio, Depth
from preference_data.corpora.published import published_corpus
from preference_data.corpora.published.found import HELD_OUT, BadCorpus, Card, Found
from preference_data.prompts import prompts
from preference_data.schema import AudioClip, Chat, Prompt, Record, Split, TaskExample, Turn, stable_id

RECORDS = (
    "clips.jsonl",
    "pretrain.jsonl",
    "sft.jsonl",
    "prompts.jsonl",
    "dev/recognition.jsonl",
    "test/recognition.jsonl",
    "quarantine.jsonl",
)
PREFERENCE_SHARE = 0.05
_SHOWN = 3  # refused recordings in an error

OnChecked = Callable[[int, int, float, int], object]
"""Told how many recordings are checked, of how many, hours of those usable, and how many were refused."""


def prepare(
    name: str,
    source: Path,
    out: Path,
    *,
    by: Depth = "header",
    preference_share: float = PREFERENCE_SHARE,
    keep_out: Sequence[Path] = (),
    on_checked: OnChecked | None = None,
) -> dict[str, Any]:
    """Read a published corpus, check every recording, and write its dataset folder.

    Args:
        name: of the corpus, see `published.PUBLISHED`.
        source: folder that its `download` filled; stays as it is and must not move afterwards.
        out: the dataset folder; an earlier one is replaced.
        by: how far each file is looked at.
        preference_share: of the training recordings with questions, how many are for preferences instead;
            which ones follows from their bytes.
        keep_out: dataset folders of benchmarks; what has the bytes of one of their held-out recordings is
            not trained on.
        on_checked: told how far it is.

    Returns:
        What `source.json` holds.

    Raises:
        BadCorpus: the corpus is unknown, its folder is not as its publisher lays it out, no recording is
            usable, or `out` is something else.
    """
    corpus = published_corpus(name)
    check_out(out, source)
    total = sum(1 for _ in corpus.prepare(source))
    kept_out = {digest for folder in keep_out for digest in held_out_digests(folder)}
    with writing(out) as partial:
        with ExitStack() as files:
            writer = _Writer(corpus.CARD, partial, files, preference_share, kept_out)
            for found, outcome in _examined(corpus.prepare(source), source, writer, by, corpus.CARD):
                writer.take(found, outcome)
                if on_checked:
                    on_checked(writer.checked, total, writer.seconds / 3600, writer.refused.total())
        if not writer.clips:
            bad = (partial / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()[:_SHOWN]
            raise BadCorpus(
                f"none of the {total} recordings of {name} in {source} can be used: {'; '.join(bad)}"
            )
        told = writer.summary(source)
        store.write_text(partial / SOURCE, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    return told


def check_out(out: Path, source: Path) -> None:
    """Refuse to replace what is no dataset folder, or holds the recordings.

    Raises:
        BadCorpus: it would.
    """
    if source.resolve().is_relative_to(out.resolve()):
        raise BadCorpus(f"{out} holds the recordings ({source}); name another folder for the records")
    if out.exists() and not (out.is_dir() and ((out / SOURCE).is_file() or not any(out.iterdir()))):
        raise BadCorpus(f"{out} is there and is no dataset folder (it has no {SOURCE}); name another one")


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its place at the end, and vanishes after an error."""
    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        replaced = out.with_name(f".replaced-{out.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def held_out_digests(folder: Path) -> Iterator[str]:
    """sha256 of every dev and test recording of a dataset folder.

    Raises:
        BadCorpus: it is none.
    """
    if not (folder / "clips.jsonl").is_file():
        raise BadCorpus(
            f"{folder} is no dataset folder: it has no clips.jsonl; make it by `align data prepare`"
        )
    clips = store.stream(folder / "clips.jsonl", AudioClip)
    return (clip.sha256 for clip in clips if clip.split in HELD_OUT)


def digest_of(folder: Path, names: Iterable[str] = RECORDS) -> str:
    """Hex sha256 over the contents of the record files that are there."""
    digest = hashlib.sha256()
    for name in names:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _examined(
    found: Iterable[Found], source: Path, writer: _Writer, by: Depth, card: Card
) -> Iterator[tuple[Found, AudioInfo | BadAudio]]:
    """Every recording with what its file is. One that comes again goes straight to quarantine."""
    waiting: deque[Found] = deque()
    seen: set[int] = set()

    def paths() -> Iterator[str]:
        for one in found:
            key = int(stable_id(one.path), 16)
            if key in seen:
                writer.quarantine(one, "comes_twice", "is listed more than once; the first is taken")
            else:
                seen.add(key)
                waiting.append(one)
                yield one.path

    for outcome in decode.examine(source, paths(), by=by, max_duration_s=card.max_duration_s):
        yield waiting.popleft(), outcome


class _Writer:
    """Turns recordings into records, and counts."""

    def __init__(
        self,
        card: Card,
        folder: Path,
        files: ExitStack,
        preference_share: float,
        kept_out: set[str],
    ) -> None:
        self.card, self.folder = card, folder
        self._preference_share = preference_share
        self._kept_out = kept_out
        self._held_out: dict[str, Split] = {}
        self._files = {name: files.enter_context(store.replacing(folder / name)) for name in RECORDS}
        self.checked = 0
        self.seconds = 0.0
        self.refused: Counter[str] = Counter()
        self.clips: Counter[Split] = Counter()
        self._hours: defaultdict[Split, float] = defaultdict(float)
        self._records: Counter[str] = Counter()
        self._tasks: Counter[str] = Counter()
        self._speakers: defaultdict[bool, set[str]] = defaultdict(set)

    def take(self, found: Found, outcome: AudioInfo | BadAudio) -> None:
        """Write a recording's records, or why there are none."""
        self.checked += 1
        if isinstance(outcome, BadAudio):
            self.quarantine(found, outcome.code, outcome.detail)
            return
        split = self._split(found, outcome.sha256)
        is_elsewhere = self._held_out.get(outcome.sha256, split) != split
        if is_elsewhere or (split not in HELD_OUT and outcome.sha256 in self._kept_out):
            self.quarantine(found, "held_out", "is the same file as one that is held out for dev or test")
        else:
            self._write(found, split, outcome)

    def quarantine(self, found: Found, code: str, detail: str) -> None:
        """Leave a recording out, and say why."""
        self.refused[code] += 1
        row = {"id": self._id(found), "path": found.path[:1000], "code": code, "detail": detail}
        self._files["quarantine.jsonl"].write(json.dumps(row, ensure_ascii=False) + "\n")

    def summary(self, source: Path) -> dict[str, Any]:
        """What `source.json` says."""
        shared = self._speakers[True] & self._speakers[False]
        return {
            "name": self.card.name,
            "root": str(source.resolve()),
            "home": self.card.home,
            "licence": self.card.licence,
            "clips": dict(sorted(self.clips.items())),
            "hours": {split: round(hours, 4) for split, hours in sorted(self._hours.items())},
            "records": dict(sorted(self._records.items())),
            "tasks": dict(sorted(self._tasks.items())),
            "quarantined": dict(sorted(self.refused.items())),
            "speakers": len(self._speakers[True] | self._speakers[False]),
            "speakers_in_train_and_held_out": len(shared),
            "digest": digest_of(self.folder),
        }

    def _id(self, found: Found) -> str:
        return f"{self.card.name}-{stable_id(found.path)}"

    def _split(self, found: Found, sha256: str) -> Split:
        """Drawn by content, so that the same recording under two names is on one side."""
        draw = int(stable_id("preference", sha256), 16) / 16**16
        is_drawn = found.split == "train" and found.asked and draw < self._preference_share
        return "preference" if is_drawn else found.split

    def _write(self, found: Found, split: Split, info: AudioInfo) -> None:
        clip_id = self._id(found)
        self.clips[split] += 1
        self._hours[split] += info.duration_s / 3600
        self.seconds += info.duration_s
        if found.speaker:
            self._speakers[split in HELD_OUT].add(found.speaker)
        if split in HELD_OUT:
            self._held_out[info.sha256] = split
            self._write_evaluation(found, split)
        elif split == "train":
            self._write_training(clip_id, found, info.duration_s)
        else:
            self._write_prompts(clip_id, found)
        clip = AudioClip(
            id=clip_id,
            path=found.path,
            split=split,
            duration_s=info.duration_s,
            sha256=info.sha256,
            speaker=found.speaker,
            source=found.source,
        )
        self._add("clips.jsonl", clip)

    def _write_training(self, clip_id: str, found: Found, duration_s: float) -> None:
        for number, content in enumerate(found.contents):
            if not content.text:
                self._records["left_out_blank"] += 1
                continue
            example = TaskExample(
                id=f"{clip_id}-{content.task}-{number}",
                audios=(found.path,),
                task=content.task,
                text=content.text,
                audio_language=content.audio_language,
                text_language=content.text_language,
                question=content.question,
                words=content.words,
            )
            try:
                prompts.prompt_of(example, "sentences")
                prompts.target_of(example, duration_s)
                prompts.refuse_control(example.id, example.text)
            except ValueError as error:
                self.quarantine(found, "bad_example", str(error))
                continue
            self._add("pretrain.jsonl", example)
            self._tasks[content.task] += 1
        turns = tuple(Turn(question=one.question, answer=one.answer) for one in found.asked if one.answer)
        if turns:
            self._add("sft.jsonl", Chat(id=f"{clip_id}-chat", audios=(found.path,), turns=turns))

    def _write_prompts(self, clip_id: str, found: Found) -> None:
        known: defaultdict[str, list[str]] = defaultdict(list)
        for content in found.contents:
            known[content.task].append(
                f"{content.question} {content.text}" if content.question else content.text
            )
        for number, asked in enumerate(one for one in found.asked if one.answer):
            prompt = Prompt(
                id=f"{clip_id}-prompt-{number}",
                audios=(found.path,),
                question=asked.question,
                answer_gt=asked.answer,
                meta_info=json.dumps(known, ensure_ascii=False),
                task_name=found.contents[0].task if found.contents else self.card.name,
            )
            self._add("prompts.jsonl", prompt)

    def _write_evaluation(self, found: Found, split: Split) -> None:
        for content in found.contents:
            if content.benchmark and content.text:
                row = {
                    "audio": found.path,
                    "prompt": content.task,
                    "gt": content.text,
                    "source": content.benchmark,
                    "audio_language": content.audio_language,
                    "text_language": content.text_language,
                    "question": content.question,
                }
                row = {key: value for key, value in row.items() if value is not None}
                name = f"{split}/recognition.jsonl"
                self._files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
                self._records[name] += 1

    def _add(self, name: str, record: Record) -> None:
        self._files[name].write(record.model_dump_json() + "\n")
        self._records[name] += 1
