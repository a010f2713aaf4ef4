"""Tags keep the order and the spelling of either prompt format, and nothing else is written."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_data.prompts.languages import LANGUAGES, UNKNOWN
from preference_data.prompts.prompts import AUDIO, pretraining_prompt
from preference_data.prompts.tags import BadTags, Tags, names_of, render
from preference_data.prompts.tasks import TASKS

PROMPT_FORMATS = ("tags_paper", "tags_released")
LANGUAGE = st.sampled_from(sorted(LANGUAGES))
QUESTION = st.text(max_size=40).filter(lambda q: q.strip() and "<|" not in q and "|>" not in q)


@st.composite
def valid_tags(draw, prompt_format):
    task = TASKS[draw(st.sampled_from(sorted(TASKS)))]
    start, _, kind, _, timestamps, instruction = task.tags
    audio = draw(LANGUAGE if start == "transcript" else st.one_of(LANGUAGE, st.just(UNKNOWN)))
    text = draw(LANGUAGE)
    if kind == "transcribe":
        text = draw(st.sampled_from([audio, "zh_tr"])) if audio == "zh" else audio
    if kind == "translate" and text == audio:
        text = "zh" if audio == "en" else "en"
    question = draw(QUESTION) if task.asks else None
    if question is not None and prompt_format == "tags_released" and not instruction:
        return Tags(start, audio, kind, None, None, (), question)
    return Tags(start, audio, kind, text, timestamps, instruction, question)


def pieces(text):
    """Tags, and the text between them."""
    return [piece for piece in re.split(r"(<\|[^<>|\s]+\|>)", text) if piece]


@given(st.data(), st.sampled_from(PROMPT_FORMATS))
def test_the_order_is_the_formats(data, prompt_format):
    tags = data.draw(valid_tags(prompt_format))
    released = prompt_format == "tags_released"
    start = {"transcript": "startoftranscript" + "s" * (not released), "analysis": "startofanalysis"}
    task = {"analysis": "keyword", "question-answer": "question"} if released else {}
    expected = [
        f"<|{start[tags.start]}|>",
        f"<|{tags.audio_language}|>",
        f"<|{task.get(tags.task, tags.task)}|>",
    ]
    if tags.question is not None:
        expected += [tags.question, *(["<|answer|>"] if released else [])]
    if tags.text_language is not None:
        expected += [f"<|{name}|>" for name in (tags.text_language, tags.timestamps, *tags.instruction)]
    assert pieces(render(tags, prompt_format)) == expected


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


ASR = Tags("transcript", "en", "transcribe", "en", "notimestamps", ("wo_itn",))
ANSWER = Tags("analysis", "en", "question-answer", None, None, (), "What?")


@pytest.mark.parametrize(
    ("tags", "what"),
    [
        (ASR._replace(timestamps="timestamps"), "no task of tasks.yaml has 'transcribe', 'timestamps'"),
        (ASR._replace(start="analysis"), "'analysis' does not begin the task 'transcribe'"),
        (
            ASR._replace(audio_language="unknown"),
            "'unknown' is not an audio language of the task 'tr",
        ),
        (ASR._replace(audio_language="transcribe"), "'transcribe' is not an audio language"),
        (ASR._replace(text_language="de"), "a transcript of en in de is a translation"),
        (ASR._replace(task="translate"), "a translation of en into en is a transcript"),
        (ASR._replace(text_language="xx"), "text language 'xx'"),
        (ASR._replace(text_language=None, timestamps=None), "text language None"),
        (ASR._replace(instruction=("scene",)), "the output instruction 'scene'"),
        (ASR._replace(question="What?"), "the task 'transcribe' with the question 'What"),
        (ANSWER._replace(question=None), "the task 'question-answer' with the question None"),
        (ANSWER._replace(question=" "), "the question ' ' is empty"),
        (ANSWER._replace(question="a<|en|>"), "is empty or holds marks of a tag"),
        (ANSWER._replace(text_language="en", timestamps="notimestamps"), "in tags_released"),
    ],
)
def test_what_is_wrong_is_named(tags, what):
    with pytest.raises(BadTags, match=what):
        render(tags, "tags_released")
