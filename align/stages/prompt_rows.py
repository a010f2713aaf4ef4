"""The prompts that a training stage's config names, as rows with their references."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from align.recipe.config.prompts import PromptSource, Questions, Targets
from align.training.collate import Row, prompt_row, target_row
from preference_data.dataset.dataset import Dataset
from preference_data.schema import AudioClip, Prompt, TaskExample
from preference_data.toy_world.examples import prompts
from preference_data.toy_world.phrasebook import Phrasebook


def prompt_rows(source: PromptSource, corpus: Path, seed: int) -> Iterator[Row]:
    """Rows in the order of their source; what is asked about a clip depends on `seed` and the clip alone.

    Raises:
        BadExample: a text holds a token that steers the model.
    """
    match source:
        case Questions(splits=splits, per_clip=per_clip, kinds=kinds):
            book = Phrasebook.load(corpus / "phrasebook.yaml")
            clips = [clip for clip in Dataset(corpus).table(AudioClip) if clip.split in splits]
            for prompt in prompts(clips, book, seed, per_clip):
                kind = book.question(prompt.question, json.loads(prompt.meta_info)).kind
                if kinds is None or kind in kinds:
                    yield prompt_row(prompt, kind)
        case Targets(tasks=tasks, prompt_format=prompt_format):
            for example in Dataset(corpus).table(TaskExample):
                if example.task in tasks:
                    yield target_row(example, prompt_format)
        case _:
            for prompt in Dataset(corpus).table(Prompt):
                yield prompt_row(prompt, prompt.task_name)
