"""Tags keep the order and the spelling of either prompt format, and nothing else is written."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_data.prompts.languages import LANGUAGES, UNKNOWN
from preference_data.prompts.prompts import AUDIO, pretraining_prompt
from preference_data.prompts.tags import names_of, render
from preference_data.prompts.tasks import TASKS, Task, TaskTags

PROMPT_FORMATS = ("tags_paper", "tags_released")
LANGUAGE = st.sampled_from(sorted(LANGUAGES))
QUESTION = st.text(max_size=40).filter(lambda q: q.strip() and "<|" not in q and "|>" not in q)


@st.composite
def valid_tags(draw):
    task = TASKS[draw(st.sampled_from(sorted(TASKS)))]
    start, kind = task.tags.start, task.tags.task
    audio = draw(LANGUAGE if start == "transcript" else st.one_of(LANGUAGE, st.just(UNKNOWN)))
    text = draw(LANGUAGE)
    if kind == "transcribe":
        text = draw(st.sampled_from([audio, "zh_tr"])) if audio == "zh" else audio
    if kind == "translate" and text == audio:
        text = "zh" if audio == "en" else "en"
    question = draw(QUESTION) if task.asks else None
    return task.tags._replace(audio_language=audio, text_language=text), question


def pieces(text):
    """Tags, and the text between them."""
    return [piece for piece in re.split(r"(<\|[^<>|\s]+\|>)", text) if piece]


@given(valid_tags(), st.sampled_from(PROMPT_FORMATS))
def test_the_order_is_the_formats(tags_and_question, prompt_format):
    tags, question = tags_and_question
    released = prompt_format == "tags_released"
    start = {"transcript": "startoftranscript" + "s" * (not released), "analysis": "startofanalysis"}
    task = {"analysis": "keyword", "question-answer": "question"} if released else {}
    expected = [
        f"<|{start[tags.start]}|>",
        f"<|{tags.audio_language}|>",
        f"<|{task.get(tags.task, tags.task)}|>",
    ]
    if question is not None:
        expected += [question, *(["<|answer|>"] if released else [])]
    if question is None or not released or tags.instruction:
        expected += [f"<|{name}|>" for name in (tags.text_language, tags.timestamps, *tags.instruction)]
    assert pieces(render(tags, question, prompt_format)) == expected


@pytest.mark.parametrize("prompt_format", PROMPT_FORMATS)
@pytest.mark.parametrize("task", TASKS)
def test_every_tasks_prompt_is_of_the_formats_tags(task, prompt_format):
    question = "What barks?" if TASKS[task].asks else None
    prompt = pretraining_prompt(task, 1, prompt_format, question=question).removeprefix(AUDIO)
    names = [piece[2:-2] for piece in pieces(prompt) if piece != question]
    assert set(names) <= set(names_of(prompt_format))
    other = PROMPT_FORMATS[1 - PROMPT_FORMATS.index(prompt_format)]
    if task in ("transcribe", "scene", "question_answer"):
        assert not set(names) <= set(names_of(other))


ASR = TaskTags("transcript", "en", "transcribe", "en", "notimestamps", ("wo_itn",))
ANSWER = TaskTags("analysis", "en", "question-answer", "en", "notimestamps", ())


@pytest.mark.parametrize(
    ("tags", "question", "what"),
    [
        (ASR._replace(audio_language="unknown"), None, "'unknown' is not an audio language of the task 'tr"),
        (ASR._replace(text_language="de"), None, "a transcript of en in de is a translation"),
        (ASR._replace(text_language="zh_tr"), None, "a transcript of en in zh_tr is a translation"),
        (ASR._replace(task="translate"), None, "a translation of en into en is a transcript"),
        (ANSWER, " ", "the question ' ' is empty"),
        (ANSWER, "a<|en|>", "is empty or holds marks of a tag"),
    ],
)
def test_what_is_wrong_is_named(tags, question, what):
    with pytest.raises(ValueError, match=what):
        render(tags, question, "tags_released")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"start": "analysis"}, "'analysis' does not begin the task 'transcribe'"),
        ({"task": "question-answer", "start": "analysis"}, "has {question} in its sentence"),
        ({"timestamps": "timestamps"}, "stamps goes with the tag timestamps"),
        ({"audio_language": "xx"}, "'xx' is not a language"),
    ],
)
def test_a_task_whose_tags_do_not_hang_together_is_refused(change, what):
    with pytest.raises(ValueError, match=what):
        Task(family="speech", sentence="Recognize the speech:", tags=ASR._replace(**change))
