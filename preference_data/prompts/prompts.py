"""A pre-training example -> the prompt and the target that a policy sees, in three prompt formats.

`sentences`: natural language, as Qwen2-Audio (arXiv:2407.10759, section 2.1 and figure 2). `tags_paper` and
`tags_released`: Qwen-Audio's hierarchical tags, see `tags`. What the tasks are is data: `tasks.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from preference_data.prompts.languages import LANGUAGES, TEXT_LANGUAGES, UNKNOWN
from preference_data.prompts.tags import TAG, names_of, render
from preference_data.prompts.tasks import TASKS, Task, answer_tags, task_named
from preference_data.prompts.time_stamps import LONGEST_S, render_spans, render_words, stamp, stamps_to
from preference_data.schema import PreferencePair, Prompt, TaskExample

PromptFormat = Literal["sentences", "tags_paper", "tags_released"]

AUDIO = "<|audio_bos|><|AUDIO|><|audio_eos|>"
"""Stands for one clip in a prompt; the processor expands <|AUDIO|> to one token per 40 ms."""


class BadExample(ValueError):
    """An example that its task does not allow."""


def pretraining_prompt(
    task: str,
    n_clips: int,
    prompt_format: PromptFormat,
    *,
    audio_language: str | None = None,
    text_language: str | None = None,
    question: str | None = None,
) -> str:
    """The text before the target: the clips, then what to do with them.

    Languages not given are the task's own; the text of a transcript is in the language of the audio.

    Raises:
        ValueError: the task is unknown, or languages or question do not go with it.
    """
    known = task_named(task)
    if known.asks != (question is not None):
        raise BadExample(f"task {task!r} {'needs a' if known.asks else 'has no'} question; got {question!r}")
    audio, text = _languages(known, audio_language, text_language)
    if prompt_format == "sentences":
        names = {"text_language": TEXT_LANGUAGES[text].name, "audio_code": audio, "question": question}
        return AUDIO * n_clips + known.sentence.format(**names)
    tags = known.tags._replace(audio_language=audio, text_language=text)
    return AUDIO * n_clips + render(tags, question, prompt_format)


def _languages(task: Task, audio_language: str | None, text_language: str | None) -> tuple[str, str]:
    audio = task.tags.audio_language if task.asks_language else audio_language or task.tags.audio_language
    text = text_language or (audio if task.tags.task == "transcribe" else task.tags.text_language)
    if audio not in (*LANGUAGES, UNKNOWN) or text not in TEXT_LANGUAGES:
        bad = text if audio in (*LANGUAGES, UNKNOWN) else audio
        raise BadExample(f"{bad!r} is not a language; known: {', '.join(TEXT_LANGUAGES)}")
    return audio, text


def prompt_of(example: TaskExample, prompt_format: PromptFormat) -> str:
    """The prompt of an example.

    Raises:
        BadExample: naming the example and what its task does not allow.
    """
    task = task_named(example.task)
    if task.clips not in (None, len(example.audios)):
        raise BadExample(
            f"example {example.id!r}: task {example.task!r} is about {task.clips} clips, not "
            f"{len(example.audios)}"
        )
    refuse_control(example.id, example.question or "")
    try:
        return pretraining_prompt(
            example.task,
            len(example.audios),
            prompt_format,
            audio_language=example.audio_language,
            text_language=example.text_language,
            question=example.question,
        )
    except ValueError as error:
        raise BadExample(f"example {example.id!r}: {error}") from error


def target_of(example: TaskExample, duration_s: float | None = None) -> str:
    """The text that follows the prompt: as it stands, or stamped with the times of its words.

    With `duration_s`, stamps must lie within the clip, and words are followed by its last pause.

    Raises:
        BadExample: the words of a task with time stamps are missing or cannot be stamped, or a text holds
            tags that are not of its task.
    """
    task = task_named(example.task)
    if task.stamps is not None and not example.words:
        raise BadExample(f"example {example.id!r}: task {example.task!r} needs words with their times")
    try:
        if task.stamps == "words":  # the prompt ends with the first stamp
            return render_words(example.words, duration_s).removeprefix(stamp(0))
        if task.stamps == "spans":
            return render_spans(example.words, duration_s)
    except ValueError as error:
        raise BadExample(f"example {example.id!r}: {error}") from error
    allowed = answer_tags(task)
    if strange := [name for name in TAG.findall(example.text) if name not in allowed]:
        raise BadExample(f"example {example.id!r}: its text holds <|{strange[0]}|>, no tag of its task")
    return example.text


def control_token(*texts: str) -> str | None:
    """The first token in these texts that would steer the model instead of being read by it.

    Every token that a tokenizer of the Qwen family keeps whole is written <|name|>: ends of turns, clips,
    boxes, Qwen-Audio's tags. Text with such a token would speak in another's name.
    """
    return next((match[0] for text in texts if (match := TAG.search(text))), None)


def refuse_control(where: str, *texts: str) -> None:
    """Refuse texts that hold a token of `control_token`'s kind.

    Raises:
        BadExample: naming the example and the token.
    """
    if token := control_token(*texts):
        raise BadExample(f"example {where!r}: its text holds {token}, which would steer the model")


def texts_of(prompt: Prompt | PreferencePair) -> list[str]:
    """Every text of a conversation that a policy reads before it answers."""
    return [message.text for message in prompt.messages]


def transcript(prompt: Prompt) -> str:
    """The conversation for who reads it and hears nothing, a line or more for each message.

    Where nothing stands before the question, the question alone, as it is.
    """
    if len(prompt.messages) == 1:
        return prompt.question
    lines, heard = [], 0
    for message in prompt.messages:
        numbers = range(heard + 1, heard + 1 + message.n_clips)
        heard += message.n_clips
        clips = f" ({', '.join(f'audio {number}' for number in numbers)})" if numbers else ""
        lines.append(f"{message.role.capitalize()}{clips}: {message.text}")
    return "\n".join(lines)


class Tagset(NamedTuple):
    """Tags a tokenizer must hold, one token each. Those of `answer` are part of completions."""

    prompt: tuple[str, ...]
    answer: tuple[str, ...]


def all_tags(prompt_format: PromptFormat, longest_s: float = LONGEST_S) -> Tagset:
    """Every tag of every task and language: for a model that is to learn them all."""
    prompts = names_of(prompt_format) if prompt_format != "sentences" else [*LANGUAGES, UNKNOWN]
    answers = {name for task in TASKS.values() for name in answer_tags(task)}
    stamps = stamps_to(longest_s)
    return _tagset({f"<|{name}|>" for name in prompts}, answers, stamps)


def one_of_each_kind(examples: Iterable[TaskExample]) -> list[TaskExample]:
    """An example of every task and languages that occur; the tags of one are those of all of its kind."""
    return list({(e.task, e.audio_language, e.text_language): e for e in examples}.values())


def tags_needed(examples: Iterable[TaskExample], prompt_format: PromptFormat, longest_s: float) -> Tagset:
    """The tags of these examples' tasks and languages alone: for a small model's small vocabulary."""
    kinds = one_of_each_kind(examples)
    tasks = [task_named(example.task) for example in kinds]
    names = {name for task in tasks for name in answer_tags(task)}
    stamps = stamps_to(longest_s) if any(task.stamps for task in tasks) else []
    prompts = [prompt_of(example, prompt_format).replace(AUDIO, "") for example in kinds]
    return _tagset({f"<|{name}|>" for text in prompts for name in TAG.findall(text)}, names, stamps)


def _tagset(in_prompts: set[str], answer_names: set[str], stamps: list[str]) -> Tagset:
    in_answers = [*sorted(f"<|{name}|>" for name in answer_names), *stamps]
    return Tagset(tuple(sorted(in_prompts - set(in_answers))), tuple(in_answers))
