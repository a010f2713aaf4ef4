"""What people kept of their chats: judgements with their prompts, completions and clips, in a folder.

The files are those that a pairs stage reads of a sample, an annotate and a corpus stage, so that a recipe can
name the folder as its `completions`, `annotations` and `corpus`:

    dataset.json, clips.jsonl, clips/   the clips, as the policy heard them
    prompts.jsonl, completions.jsonl    conversations up to their last question, and the answers
    comparisons.jsonl                   answers beside each other, in the order in which they were shown
    judgements.jsonl, quality.json      what was said of them

Nothing comes in unless somebody says so; what is deleted is gone, with its clips.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from align.run_folder.artifacts import write_json
from align.serving.prompts import Sound
from preference_data import store
from preference_data.audio.encode import encode
from preference_data.dataset.dataset import RecordWriter, describe
from preference_data.preferences import quality
from preference_data.schema import AudioClip, Comparison, Completion, Judgement, Prompt, Record
from preference_data.store import BadRecord

MIN_HEARD = 0.8
"""Share of the clips that must have been played for a judgement to count, as in an annotate stage."""
_PROMPTS, _COMPLETIONS = "prompts.jsonl", "completions.jsonl"
_COMPARISONS, _JUDGEMENTS = "comparisons.jsonl", "judgements.jsonl"
_LOCK = ".lock"
"""The first file of such a folder, which nothing removes: without it the folder is somebody else's."""
R = TypeVar("R", bound=Record)


class Records(NamedTuple):
    """All that is kept, by id."""

    clips: dict[str, AudioClip]
    prompts: dict[str, Prompt]
    completions: dict[str, Completion]
    comparisons: dict[str, Comparison]
    judgements: dict[str, Judgement]


class KeptJudgements:
    """Judgements in a folder, which is made with the first of them.

    Args:
        folder: where; several servers may use it at a time.

    Raises:
        FileExistsError: something else made the folder, such as a corpus: what nobody judged would be lost.
    """

    def __init__(self, folder: Path) -> None:
        if folder.is_dir() and any(folder.iterdir()) and not (folder / _LOCK).exists():
            raise FileExistsError(
                f"{folder} is not empty, and was made by something else than align chat: keep in another "
                "folder (--keep)"
            )
        self.folder = folder

    def add(
        self,
        judgement: Judgement,
        comparison: Comparison | None,
        completions: Sequence[Completion],
        prompt: Prompt,
        sounds: Mapping[str, Sound],
    ) -> None:
        """Keep a judgement with all that it is about; one with the same id gives way."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked() as records:
            for path, sound in sounds.items():
                if path not in records.clips:
                    records.clips[path] = self._keep_clip(path, sound)
            records.prompts[prompt.id] = prompt
            records.completions.update((item.id, item) for item in completions)
            if comparison:
                records.comparisons[comparison.id] = comparison
            records.judgements[judgement.id] = judgement
            self._write(_referred_to(records))

    def delete(self, judgement: str) -> bool:
        """Delete a judgement, and what no other one is about; returns whether it was there."""
        if not self.folder.is_dir():
            return False
        with self._locked() as records:
            if records.judgements.pop(judgement, None) is None:
                return False
            left = _referred_to(records)
            store.write(self.folder / _JUDGEMENTS, left.judgements.values())  # before what it was about
            self._write(left)
            for path in records.clips.keys() - left.clips.keys():
                (self.folder / path).unlink(missing_ok=True)
            return True

    def read(self) -> Records:
        """What is kept now.

        Raises:
            BadRecord: a file is damaged; naming it and the line, or the record that it lacks.
        """
        if not self.folder.is_dir():
            return Records({}, {}, {}, {}, {})
        with self._locked() as records:
            return records

    def clip(self, path: str) -> bytes | None:
        """The file of a clip that is kept."""
        return (self.folder / path).read_bytes() if path in self.read().clips else None

    def _read(self, name: str, kind: type[R]) -> list[R]:
        path = self.folder / name
        return store.read(path, kind) if path.is_file() else []

    @contextmanager
    def _locked(self) -> Iterator[Records]:
        """The records, while no other thread or process changes them."""
        with (self.folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            records = Records(
                {clip.path: clip for clip in self._read("clips.jsonl", AudioClip)},
                {item.id: item for item in self._read(_PROMPTS, Prompt)},
                {item.id: item for item in self._read(_COMPLETIONS, Completion)},
                {item.id: item for item in self._read(_COMPARISONS, Comparison)},
                {item.id: item for item in self._read(_JUDGEMENTS, Judgement)},
            )
            self._check(records)
            yield records

    def _check(self, records: Records) -> None:
        """Refuse judgements of what is not there."""
        for judgement in records.judgements.values():
            lost = {
                _PROMPTS: {judgement.prompt_id} - records.prompts.keys(),
                _COMPLETIONS: set(judgement.completions) - records.completions.keys(),
            }
            for name, ids in lost.items():
                if ids:
                    raise BadRecord(
                        f"{self.folder / name} lacks {min(ids)}, which judgement {judgement.id} is about"
                    )

    def _keep_clip(self, path: str, sound: Sound) -> AudioClip:
        """Write the samples as the policy got them: every bit of them, and nothing else of the file."""
        content = encode(sound.wave, "WAV", "FLOAT")
        (self.folder / path).parent.mkdir(exist_ok=True)
        (self.folder / path).write_bytes(content)
        return AudioClip(
            id=Path(path).stem,
            path=path,
            split="preference",
            duration_s=sound.duration_s,
            sha256=hashlib.sha256(content).hexdigest(),
            source="chat",
        )

    def _write(self, records: Records) -> None:
        """Write all files; a judgement comes after what it is about, so that no crash leaves it alone."""
        judgements = list(records.judgements.values())
        with RecordWriter(self.folder) as writer:
            for record in (*records.clips.values(), *records.prompts.values()):
                writer.add(record)
        store.write(self.folder / _COMPLETIONS, records.completions.values())
        store.write(self.folder / _COMPARISONS, records.comparisons.values())
        store.write(self.folder / _JUDGEMENTS, judgements)
        assessed = quality.assess(judgements, min_heard=MIN_HEARD, seed=0)
        write_json(self.folder / "quality.json", assessed.model_dump(mode="json"))
        describe(self.folder, {"name": "chat", "root": "."})


def _referred_to(records: Records) -> Records:
    """The judgements with what they are about, and nothing else."""
    judgements = records.judgements.values()
    prompts = {item.prompt_id for item in judgements}
    completions = {name for item in judgements for name in item.completions}
    comparisons = {item.comparison for item in judgements}
    clips = {path for name in prompts for path in records.prompts[name].audios}
    return Records(
        _only(records.clips, clips),
        _only(records.prompts, prompts),
        _only(records.completions, completions),
        _only(records.comparisons, comparisons),
        dict(records.judgements),
    )


def _only(records: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: record for name, record in records.items() if name in names}
