"""A published corpus -> a dataset: every recording checked, held-out audio kept out of training.

Written as a stream: one recording is in memory at a time, and a few bytes of each for what must be
distinct.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from preference_data.audio import decode
from preference_data.audio.clip_files import BadAudio
from preference_data.audio.decode import AudioInfo, Depth
from preference_data.corpora.catalog import Card, card_of, read
from preference_data.corpora.published.recording import BadCorpus, Recording
from preference_data.dataset.dataset import (
    QUARANTINE,
    RECOGNITION,
    WARNINGS,
    BadDataset,
    Dataset,
    RecordWriter,
    describe,
    replacing_dataset,
)
from preference_data.dataset.splits import HELD_OUT
from preference_data.prompts import prompts
from preference_data.schema import AudioClip, Chat, Prompt, Split, TaskExample, Turn, stable_id

PREFERENCE_SHARE = 0.05
_EXAMPLES = 3  # refused recordings in an error

OnChecked = Callable[[int, int, float, int], object]
"""Called with how many recordings are checked, of how many, hours of good ones, and how many were refused."""


def prepare(
    name: str,
    folder: Path,
    out: Path,
    *,
    by: Depth = "header",
    preference_share: float = PREFERENCE_SHARE,
    keep_out: Sequence[Path] = (),
    on_checked: OnChecked | None = None,
) -> dict[str, Any]:
    """Read a published corpus, check every recording, and write its dataset.

    Args:
        name: of the corpus, see `catalog.CARDS`.
        folder: what its `download` filled; stays as it is and must not move afterwards.
        out: the dataset; an earlier one is replaced.
        by: how far each file is looked at.
        preference_share: of the training recordings with questions, how many are for preferences instead;
            which of them follows from their bytes.
        keep_out: datasets of benchmarks; what has the bytes of one of their held-out recordings is not
            trained on.
        on_checked: reports progress.

    Returns:
        The description of the dataset.

    Raises:
        BadCorpus: the corpus is unknown, its folder is not as its publisher lays it out, or no recording is
            usable.
        BadDataset: `out` is something else, or a folder of `keep_out` is not a dataset.
    """
    card = card_of(name)
    with replacing_dataset(out, folder) as partial:
        total = sum(1 for _ in read(name, folder))
        kept_out = {digest for benchmark in keep_out for digest in _held_out_digests(benchmark)}
        with RecordWriter(partial) as records:
            preparation = _Preparation(card, records, preference_share, kept_out)
            for recording, outcome in preparation.examined(read(name, folder), folder, by):
                preparation.take(recording, outcome)
                if on_checked:
                    hours = sum(preparation.hours.values())
                    on_checked(preparation.checked, total, hours, preparation.refused.total())
        if not preparation.clips:
            bad = (partial / QUARANTINE).read_text(encoding="utf-8").split("\n")[:_EXAMPLES]
            raise BadCorpus(
                f"none of the {total} recordings of {name} in {folder} can be used: {'; '.join(bad)}"
            )
        return describe(partial, preparation.summary(folder))


def _held_out_digests(folder: Path) -> Iterator[str]:
    """sha256 of every dev and test recording of a dataset."""
    dataset = Dataset(folder)
    if dataset.path_of(AudioClip) is None:
        raise BadDataset(f"{folder} is not a dataset: it has no clips.jsonl; make it by `align data prepare`")
    return (clip.sha256 for clip in dataset.table(AudioClip) if clip.split in HELD_OUT)


class _Preparation:
    """Turns recordings into records, and counts."""

    def __init__(
        self, card: Card, records: RecordWriter, preference_share: float, kept_out: set[str]
    ) -> None:
        self.card, self._records = card, records
        self._preference_share, self._kept_out = preference_share, kept_out
        self._held_out: dict[str, Split] = {}
        self.checked, self._blank = 0, 0
        self.refused: Counter[str] = Counter()
        self.odd: Counter[str] = Counter()
        self.clips: Counter[Split] = Counter()
        self.hours: defaultdict[Split, float] = defaultdict(float)
        self._tasks: Counter[str] = Counter()
        self._speakers: defaultdict[bool, set[str]] = defaultdict(set)

    def examined(
        self, recordings: Iterable[Recording], folder: Path, by: Depth
    ) -> Iterator[tuple[Recording, AudioInfo | BadAudio]]:
        """Every recording with what its file is. A duplicate goes straight to quarantine."""
        waiting: deque[Recording] = deque()
        before: set[int] = set()

        def paths() -> Iterator[str]:
            for recording in recordings:
                key = int(stable_id(recording.path), 16)
                if key in before:
                    self.quarantine(recording, "comes_twice", "is listed more than once; the first is taken")
                else:
                    before.add(key)
                    waiting.append(recording)
                    yield recording.path

        find = Dataset(folder, {}).find
        for outcome in decode.examine(find, paths(), by=by, max_duration_s=self.card.max_duration_s):
            yield waiting.popleft(), outcome

    def take(self, recording: Recording, outcome: AudioInfo | BadAudio) -> None:
        """Write a recording's records, or why there are none."""
        self.checked += 1
        if isinstance(outcome, BadAudio):
            self.quarantine(recording, outcome.code, outcome.detail)
            return
        split = self._split(recording, outcome.sha256)
        is_elsewhere = self._held_out.get(outcome.sha256, split) != split
        if is_elsewhere or (split not in HELD_OUT and outcome.sha256 in self._kept_out):
            self.quarantine(recording, "held_out", "is the same file as a recording held out for dev or test")
        else:
            self._write(recording, split, outcome)
            for item in decode.odd({self._id(recording): outcome}, {self._id(recording): recording.path}):
                self.odd[item.code] += 1
                self._records.add_row(WARNINGS, item._asdict())

    def quarantine(self, recording: Recording, code: str, detail: str) -> None:
        """Leave a recording out, and say why."""
        self.refused[code] += 1
        row = {"id": self._id(recording), "path": recording.path[:1000], "code": code, "detail": detail}
        self._records.add_row(QUARANTINE, row)

    def summary(self, folder: Path) -> dict[str, Any]:
        """The description of the dataset, but for its digest."""
        records = {name: n for name, n in self._records.rows.items() if name not in (QUARANTINE, WARNINGS)}
        if self._blank:
            records["left_out_blank"] = self._blank
        return {
            "name": self.card.name,
            "root": str(folder.resolve()),
            "home": self.card.home,
            "licence": self.card.licence,
            "clips": dict(sorted(self.clips.items())),
            "hours": {split: round(hours, 4) for split, hours in sorted(self.hours.items())},
            "records": dict(sorted(records.items())),
            "tasks": dict(sorted(self._tasks.items())),
            "quarantined": dict(sorted(self.refused.items())),
            **({"odd": dict(sorted(self.odd.items()))} if self.odd else {}),
            "speakers": len(self._speakers[True] | self._speakers[False]),
            "speakers_in_train_and_held_out": len(self._speakers[True] & self._speakers[False]),
        }

    def _id(self, recording: Recording) -> str:
        return f"{self.card.name}-{stable_id(recording.path)}"

    def _split(self, recording: Recording, sha256: str) -> Split:
        """Drawn by content, so that the same recording under two names is on one side."""
        draw = int(stable_id("preference", sha256), 16) / 16**16
        is_drawn = recording.split == "train" and recording.questions and draw < self._preference_share
        return "preference" if is_drawn else recording.split

    def _write(self, recording: Recording, split: Split, info: AudioInfo) -> None:
        clip_id = self._id(recording)
        self.clips[split] += 1
        self.hours[split] += info.duration_s / 3600
        if recording.speaker:
            self._speakers[split in HELD_OUT].add(recording.speaker)
        if split in HELD_OUT:
            self._held_out[info.sha256] = split
            self._write_evaluation(recording, split)
        elif split == "train":
            self._write_training(clip_id, recording, info.duration_s)
        else:
            self._write_prompts(clip_id, recording)
        self._records.add(
            AudioClip(
                id=clip_id,
                path=recording.path,
                split=split,
                duration_s=info.duration_s,
                sha256=info.sha256,
                speaker=recording.speaker,
                source=recording.source,
            )
        )

    def _write_training(self, clip_id: str, recording: Recording, duration_s: float) -> None:
        for number, content in enumerate(recording.contents):
            if not content.text:
                self._blank += 1
                continue
            example = TaskExample(
                id=f"{clip_id}-{content.task}-{number}",
                audios=(recording.path,),
                **{key: value for key, value in content._asdict().items() if key != "benchmark"},
            )
            try:
                prompts.prompt_of(example, "sentences")
                prompts.target_of(example, duration_s)
            except ValueError as error:
                self.quarantine(recording, "bad_example", str(error))
                continue
            self._records.add(example)
            self._tasks[content.task] += 1
        turns = tuple(Turn(question=q.question, answer=q.answer) for q in recording.questions if q.answer)
        if turns:
            self._records.add(Chat(id=f"{clip_id}-chat", audios=(recording.path,), turns=turns))

    def _write_prompts(self, clip_id: str, recording: Recording) -> None:
        known: defaultdict[str, list[str]] = defaultdict(list)
        for content in recording.contents:
            known[content.task].append(
                f"{content.question} {content.text}" if content.question else content.text
            )
        for number, (question, answer) in enumerate(q for q in recording.questions if q.answer):
            self._records.add(
                Prompt(
                    id=f"{clip_id}-prompt-{number}",
                    audios=(recording.path,),
                    question=question,
                    answer_gt=answer,
                    meta_info=json.dumps(known, ensure_ascii=False),
                    task_name=recording.contents[0].task if recording.contents else self.card.name,
                )
            )

    def _write_evaluation(self, recording: Recording, split: Split) -> None:
        for content in recording.contents:
            if content.benchmark and content.text:
                row = {
                    "audio": recording.path,
                    "prompt": content.task,
                    "gt": content.text,
                    "source": content.benchmark,
                    "audio_language": content.audio_language,
                    "text_language": content.text_language,
                    "question": content.question,
                }
                known = {key: value for key, value in row.items() if value is not None}
                self._records.add_row(RECOGNITION[split], known)
