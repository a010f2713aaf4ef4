"""Clips and their phrasebook -> what a policy learns from, is sampled on, and is tested with.

Everything drawn follows from the seed and the clip's id, so a clip gets the same questions whatever
other clips there are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.random import Generator

from preference_data.dataset.dataset import evaluation_item
from preference_data.schema import AudioClip, Chat, Prompt, TaskExample, Turn, stable_id
from preference_data.store import write_text
from preference_data.toy_world.phrasebook import Phrasebook, Question

_DRAWS_PER_TURN = 20
"""A clip about which little can be asked gets fewer questions, not the same one again."""


def _rng(seed: int, purpose: str, clip: AudioClip, *parts: int) -> Generator:
    return np.random.default_rng(int(stable_id(seed, purpose, clip.id, *parts), 16))


def chats(
    clips: Iterable[AudioClip],
    phrasebook: Phrasebook,
    *,
    chats_per_clip: int,
    turns: int,
    defect_rate: float,
    seed: int,
) -> list[Chat]:
    """SFT chats of up to `turns` different questions each.

    A share `defect_rate` of the answers is spoiled on purpose, each marked with its defect.
    """
    return [
        _chat(clip, phrasebook, number, turns, defect_rate, _rng(seed, "chat", clip, number))
        for clip in clips
        for number in range(chats_per_clip)
    ]


def _chat(
    clip: AudioClip, phrasebook: Phrasebook, number: int, turns: int, defect_rate: float, rng: Generator
) -> Chat:
    drawn = []
    for question in _different(clip, phrasebook, turns, rng):
        answer, defect = question.reference, None
        if rng.random() < defect_rate:
            answer, defect = phrasebook.spoil(question, clip.facts, rng)
        drawn.append(Turn(question=question.text, answer=answer, defect=defect))
    return Chat(id=f"{clip.id}-chat{number}", audios=(clip.path,), turns=tuple(drawn))


def transcripts(clips: Iterable[AudioClip], phrasebook: Phrasebook) -> list[TaskExample]:
    """Every pre-training target of every clip."""
    return [
        TaskExample(id=f"{clip.id}-{task}", audios=(clip.path,), task=task, text=text)
        for clip in clips
        for task, text in phrasebook.targets_of(clip.facts)
    ]


def prompts(clips: Iterable[AudioClip], phrasebook: Phrasebook, seed: int, per_clip: int = 1) -> list[Prompt]:
    """Up to `per_clip` different questions about each clip; kinds as often as the phrasebook weighs them."""
    questions = (
        (clip, number, question)
        for clip in clips
        for number, question in enumerate(_different(clip, phrasebook, per_clip, _rng(seed, "prompt", clip)))
    )
    return [
        Prompt(
            id=f"{clip.id}-prompt{number or ''}",
            audios=(clip.path,),
            question=question.text,
            answer_gt=question.reference,
            meta_info=json.dumps(clip.facts, ensure_ascii=False, sort_keys=True),
            task_name=phrasebook.task_of(clip.facts),
        )
        for clip, number, question in questions
    ]


def _different(clip: AudioClip, phrasebook: Phrasebook, n: int, rng: Generator) -> Iterable[Question]:
    """Up to `n` different questions, in the order in which they were drawn."""
    questions: dict[str, Question] = {}
    for _ in range(n * _DRAWS_PER_TURN):
        question = phrasebook.ask(clip.facts, rng)
        questions.setdefault(question.text, question)
        if len(questions) == n:
            break
    return questions.values()


def write_air_bench(
    root: Path, clips: Sequence[AudioClip], phrasebook: Phrasebook, dataset_name: str, seed: int
) -> None:
    """Write `root/Chat/Chat_meta.json` as AIR-Bench ships it, one question per clip.

    The audio lies in `<root's name>/Chat/{task_name}_{dataset_name}/` of the corpus, see `ClipWriter`.
    """
    rows = [
        evaluation_item(prompt, PurePosixPath(clip.path).name, dataset_name)
        for clip, prompt in zip(clips, prompts(clips, phrasebook, seed), strict=True)
    ]
    write_text(root / "Chat" / "Chat_meta.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def recognition_rows(clips: Iterable[AudioClip], phrasebook: Phrasebook) -> list[dict[str, str]]:
    """Rows as the Qwen2-Audio evaluation reads them: {audio, prompt, gt, source}.

    `prompt` is a key of `tasks.TASKS`; `source` groups the results, e.g. "transcribe/recording".
    """
    return [
        {"audio": clip.path, "prompt": task, "gt": text.strip(), "source": f"{task}/{clip.source}"}
        for clip in clips
        for task, text in phrasebook.targets_of(clip.facts)
    ]
