"""Pre-training prompts in two dialects.

`sentences`: natural language, as Qwen2-Audio (arXiv:2407.10759, section 2.1 and figure 2).
`tags`: Qwen-Audio's hierarchical tags (arXiv:2311.07919, section 3.2) in the order transcription tag,
audio language, task, text language, timestamps, output instruction, spelled as the released
tokenizer spells them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Dialect = Literal["sentences", "tags"]

AUDIO = "<|audio_bos|><|AUDIO|><|audio_eos|>"
"""Stands for one clip in a prompt; the processor expands <|AUDIO|> to one token per 40 ms."""


class Task(NamedTuple):
    """One pre-training task, said in both dialects."""

    sentence: str
    tags: tuple[str, ...]


TASKS: dict[str, Task] = {
    "transcribe": Task(
        "Detect the language and recognize the speech: <|en|>",
        (
            "<|startoftranscript|>",
            "<|en|>",
            "<|transcribe|>",
            "<|en|>",
            "<|notimestamps|>",
            "<|wo_itn|>",
        ),
    ),
    "caption": Task(
        "Generate the caption in English:",
        (
            "<|startofanalysis|>",
            "<|unknown|>",
            "<|caption|>",
            "<|en|>",
            "<|notimestamps|>",
            "<|caption_plain|>",
        ),
    ),
}

TAGS: tuple[str, ...] = tuple(sorted({tag for task in TASKS.values() for tag in task.tags}))
"""Every tag a tokenizer must hold as one token."""


def pretraining_prompt(task: str, n_clips: int, dialect: Dialect) -> str:
    """The text before the target: the clips, then what to do with them."""
    if task not in TASKS:
        raise ValueError(f"unknown pre-training task {task!r}; known: {', '.join(sorted(TASKS))}")
    wording = TASKS[task].sentence if dialect == "sentences" else "".join(TASKS[task].tags)
    return AUDIO * n_clips + wording
