"""Tags are read as strictly as they are written, in both prompt formats."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_data.prompts.languages import LANGUAGES, UNKNOWN
from preference_data.prompts.prompts import AUDIO, pretraining_prompt
from preference_data.prompts.tags import BadTags, Tags, parse, render
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


@given(st.data(), st.sampled_from(PROMPT_FORMATS))
def test_what_is_written_is_read_back(data, prompt_format):
    tags = data.draw(valid_tags(prompt_format))
    assert parse(render(tags, prompt_format), prompt_format) == tags


@given(st.data(), st.sampled_from(PROMPT_FORMATS))
def test_the_order_is_the_format(data, prompt_format):
    names = render(data.draw(valid_tags(prompt_format)), prompt_format)
    pieces = [piece + "|>" for piece in names.split("|>") if piece]
    at = data.draw(st.integers(0, len(pieces) - 1))
    dropped = "".join(pieces[:at] + pieces[at + 1 :])
    swapped = [*pieces]
    swapped[at], swapped[at - 1] = swapped[at - 1], swapped[at]
    for changed in (dropped, "".join(swapped), names + "x"):
        if changed == names:
            continue  # two equal neighbours swapped
        try:
            found = parse(changed, prompt_format)
        except BadTags:
            continue
        assert render(found, prompt_format) == changed  # another valid prompt, and read as what it says


@given(st.text(alphabet="<|>enot startofanalysiunkw"), st.sampled_from(PROMPT_FORMATS))
def test_any_text_is_read_or_refused(text, prompt_format):
    try:
        assert render(parse(text, prompt_format), prompt_format) == text
    except BadTags:
        pass


@pytest.mark.parametrize("prompt_format", PROMPT_FORMATS)
@pytest.mark.parametrize("task", TASKS)
def test_every_tasks_prompt_is_valid(task, prompt_format):
    question = "What barks?" if TASKS[task].asks else None
    prompt = pretraining_prompt(task, 1, prompt_format, question=question).removeprefix(AUDIO)
    assert render(parse(prompt, prompt_format), prompt_format) == prompt


@pytest.mark.parametrize("prompt_format", PROMPT_FORMATS)
def test_a_dialect_refuses_the_others_spelling(prompt_format):
    other = PROMPT_FORMATS[1 - PROMPT_FORMATS.index(prompt_format)]
    for task in ("transcribe", "scene", "question_answer"):
        prompt = pretraining_prompt(task, 0, other, question="X" if TASKS[task].asks else None)
        with pytest.raises(BadTags):
            parse(prompt, prompt_format)


ASR = "<|startoftranscript|><|en|><|transcribe|><|en|><|notimestamps|><|wo_itn|>"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (ASR.replace("<|en|><|trans", "<|trans"), r"tag 2 is the audio language: .* found '<\|transcribe\|>"),
        (ASR.replace("notimestamps", "timestamps"), "no task of tasks.yaml has 'transcribe', 'timestamps'"),
        (
            ASR.replace("startoftranscript", "startofanalysis"),
            "'analysis' does not begin the task 'transcribe'",
        ),
        (ASR.replace("<|en|>", "<|unknown|>", 1), "'unknown' is no audio language of the task 'transcribe'"),
        (ASR.replace("<|en|><|no", "<|de|><|no"), "a transcript of en in de is a translation"),
        (ASR.replace("wo_itn", "scene"), "the output instruction 'scene'"),
        (ASR + " hello", r"text after the tags: ' hello'"),
        (ASR[:40], "tag 3 is the task"),
        ("", "tag 1 is the transcription tag: .*; found 'the end'"),
        (
            "<|startofanalysis|><|en|><|question|>What?",
            "tag 4 is the end of the question",
        ),
        ("<|startofanalysis|><|en|><|question|><|answer|>", "the question '' is empty"),
    ],
)
def test_what_is_wrong_is_named(text, what):
    with pytest.raises(BadTags, match=what):
        parse(text, "tags_released")
