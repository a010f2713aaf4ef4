"""What a run's policies said last, and about which clips: what is drawn now, or what was judged."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.evaluation import judged_answers
from align.release import clips, page
from align.release.report import Stage
from align.run_folder.artifacts import SETTINGS, read_json
from preference_data import store
from preference_data.dataset.dataset import Dataset
from preference_data.schema import Completion, Prompt

_SAMPLES = 6


class Sample(NamedTuple):
    """A prompt with its completions. `clips` are digests; None stands for a clip that cannot be played."""

    question: str
    reference: str
    clips: tuple[str | None, ...]
    answers: tuple[tuple[str, str], ...]
    """Who says it, and what."""


class Samples(NamedTuple):
    """The last samples of a stage, or why there are none to be seen."""

    stage: str
    cards: tuple[Sample, ...]
    problem: str = ""


class LastSamples:
    """The samples that were written last in a run, and their clips; read again when there are newer ones."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._read: tuple[Path, int] | None = None
        """The file that they are from, and its time."""
        self._samples: Samples | None = None
        self._clips: dict[str, bytes] = {}
        self._clips_before: dict[str, bytes] = {}
        """Those of the samples before: a browser may still play them."""

    def of(self, stages: Sequence[Stage]) -> Samples | None:
        """The samples of the stage that wrote some last; None where none did."""
        sources = [source for stage in stages for source in _sources(stage)]
        if not sources:
            return None
        source = max(sources, key=lambda source: source.path.stat().st_mtime_ns)
        current = source.path, source.path.stat().st_mtime_ns
        if current != self._read:
            self._read, self._samples = current, self._load(source)
        return self._samples

    def clip(self, digest: str) -> bytes | None:
        """The MP3 of a clip of these samples, or of those before."""
        return self._clips.get(digest) or self._clips_before.get(digest)

    def _load(self, source: _Source) -> Samples:
        try:
            root, records = _READERS[source.kind](self._run, source)
            sounds = {name: clips.mp3(root, name) for record in records for name in record.clips}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            return Samples(source.stage.name, (), f"{source.path}: {error}")
        digests = {
            name: None if sound is None else hashlib.sha256(sound).hexdigest()
            for name, sound in sounds.items()
        }
        playable = {digest: sound for name, sound in sounds.items() if sound and (digest := digests[name])}
        self._clips, self._clips_before = playable, self._clips
        cards = [
            Sample(
                record.question,
                record.reference,
                tuple(digests[name] for name in record.clips),
                record.answers,
            )
            for record in records
        ]
        return Samples(source.stage.name, tuple(cards))


# -------------------------------------------------------------------------- where samples are


_Kind = Literal["batch", "completions", "answers"]
"""A batch that was drawn, all completions, or judged answers."""


class _Source(NamedTuple):
    """A file with samples."""

    kind: _Kind
    stage: Stage
    path: Path


class _Record(NamedTuple):
    question: str
    reference: str
    clips: tuple[str, ...]
    answers: tuple[tuple[str, str], ...]


def _sources(stage: Stage) -> list[_Source]:
    """The newest file of samples of each kind that a stage has written."""
    patterns: dict[_Kind, str] = {"answers": "items/*.jsonl", "completions": "completions.jsonl"}
    if not stage.manifest:
        patterns["batch"] = "batches/prompts/*.json"
    newest = []
    for kind, pattern in patterns.items():
        if paths := [path for path in stage.folder.glob(pattern) if path.is_file()]:
            newest.append(_Source(kind, stage, max(paths, key=lambda path: path.stat().st_mtime_ns)))
    return newest


def _config(stage: Stage) -> dict[str, Any]:
    settings: dict[str, Any] = stage.manifest or read_json(stage.folder / SETTINGS)
    return settings["config"] or {}


def _corpus(run: Path, config: Mapping[str, Any]) -> Path:
    """The folder of a stage's corpus: an earlier stage, or a place elsewhere."""
    name = str(config["corpus"])
    return run / name if (run / name).is_dir() else Path(name).expanduser()


def _read_batch(run: Path, source: _Source) -> tuple[Path, list[_Record]]:
    """The last prompts of a batch: a request's number is its prompt's in the corpus."""
    corpus = _corpus(run, _config(source.stage))
    prompts, batch = Dataset(corpus).table(Prompt), read_json(source.path)
    numbers = sorted(map(int, batch))[-_SAMPLES:]
    return corpus, [
        _of_prompt(prompts[number], [drawn["text"] for drawn in batch[str(number)]]) for number in numbers
    ]


def _read_completions(run: Path, source: _Source) -> tuple[Path, list[_Record]]:
    """The last prompts with their completions."""
    prompts = deque(store.stream(source.stage.folder / "prompts.jsonl", Prompt), _SAMPLES)
    texts: dict[str, list[str]] = {prompt.id: [] for prompt in prompts}
    for completion in store.stream(source.path, Completion):
        if completion.prompt_id in texts:
            texts[completion.prompt_id].append(completion.text)
    corpus = _corpus(run, _config(source.stage))
    return corpus, [_of_prompt(prompt, texts[prompt.id]) for prompt in prompts]


def _of_prompt(prompt: Prompt, texts: Sequence[str]) -> _Record:
    answers = tuple((f"Completion {i}", text) for i, text in enumerate(texts, 1))
    return _Record(prompt.question, prompt.answer_gt, prompt.audios, answers)


def _read_answers(run: Path, source: _Source) -> tuple[Path, list[_Record]]:
    """The last judged answers of a policy."""
    config = _config(source.stage)
    root = Path(config["air_bench"]).expanduser() if config.get("air_bench") else _corpus(run, config)
    answers = list(judged_answers.read(source.path).values())[-_SAMPLES:]
    return root, [
        _Record(
            answer.question,
            answer.answer_gt,
            (answer.audio,),
            ((f"{source.path.stem} · score {page.value(answer.score, 'score')}", answer.response),),
        )
        for answer in answers
    ]


_READERS = {"batch": _read_batch, "completions": _read_completions, "answers": _read_answers}
