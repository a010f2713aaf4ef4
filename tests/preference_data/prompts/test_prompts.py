"""Golden prompts of both papers and what examples are refused for."""

import pytest

from preference_data.prompts.prompts import (
    AUDIO,
    BadExample,
    all_tags,
    pretraining_prompt,
    prompt_of,
    tags_needed,
    target_of,
    texts_of,
    transcript,
)
from preference_data.prompts.tasks import TASKS
from preference_data.schema import Prompt, TaskExample, Turn, Word

DEMO = {
    "transcribe": "Detect the language and recognize the speech: <|en|>",
    "caption": "Generate the caption in English:",
}
"""What the demo and the spoken digits train on: another wording trains another model."""

RELEASED = {  # as the release's evaluation scripts ask; X is the question
    ("transcribe", "en", None): "<|startoftranscript|><|en|><|transcribe|><|en|><|notimestamps|><|wo_itn|>",
    ("transcribe", "zh", None): "<|startoftranscript|><|zh|><|transcribe|><|zh|><|notimestamps|><|wo_itn|>",
    ("translate_speech", "en", "zh"): "<|startoftranscript|><|en|><|translate|><|zh|><|notimestamps|><|itn|>",
    ("transcribe_words", "zh", None): "<|startoftranscript|><|zh|><|transcribe|><|zh|><|timestamps|><|0.00|>",
    ("caption_clotho", None, None): "<|startofanalysis|><|unknown|><|caption|><|en|><|notimestamps|>"
    "<|caption_clotho|>",
    ("scene", None, None): "<|startofanalysis|><|unknown|><|keyword|><|en|><|notimestamps|><|scene|>",
    ("emotion", None, None): "<|startofanalysis|><|en|><|keyword|><|en|><|notimestamps|>"
    "<|emotion_recognition|>",
    ("vocal_sound", None, None): "<|startofanalysis|><|en|><|keyword|><|en|><|notimestamps|>"
    "<|vocal_classification|>",
    ("note_analysis", None, None): "<|startofanalysis|><|unknown|><|keyword|><|en|><|notimestamps|>"
    "<|note_analysis|>",
    ("question_answer", None, None): "<|startofanalysis|><|en|><|question|>X<|answer|>",
}


def question_of(task):
    return "X" if TASKS[task].asks else None


def example(task, text="x", **more):
    clips = TASKS[task].clips or 1
    return TaskExample(
        **{
            "id": "e1",
            "audios": ("a.wav",) * clips,
            "task": task,
            "text": text,
            "question": question_of(task),
            "words": (Word(text="x", start_s=0, end_s=1),) if TASKS[task].stamps else (),
            **more,
        }
    )


@pytest.mark.parametrize("task", DEMO)
def test_the_demos_prompts_never_change(task):
    assert pretraining_prompt(task, 1, "sentences") == ("<|audio_bos|><|AUDIO|><|audio_eos|>" + DEMO[task])
    assert prompt_of(example(task), "sentences") == AUDIO + DEMO[task]
    assert target_of(example(task, text=" seven")) == " seven"


def test_sentences_as_qwen2_audios_evaluation_asks():
    def ask(task, **languages):
        return pretraining_prompt(task, 1, "sentences", **languages).removeprefix(AUDIO)

    assert ask("translate_speech", audio_language="en", text_language="de") == (
        "Detect the language and translate the speech into German: <|en|>"
    )
    assert ask("emotion") == "Recognize the emotion with keywords in English:"
    assert ask("vocal_sound") == "Classify the human vocal sound to VocalSound in English:"
    assert ask("transcribe", audio_language="yue") == "Detect the language and recognize the speech: <|yue|>"


@pytest.mark.parametrize(("asked", "tags"), RELEASED.items(), ids=lambda value: str(value)[:30])
def test_released_tags_as_its_evaluation_asks(asked, tags):
    task, audio_language, text_language = asked
    found = pretraining_prompt(
        task,
        1,
        "tags_released",
        audio_language=audio_language,
        text_language=text_language,
        question=question_of(task),
    )
    assert found == AUDIO + tags


def test_the_papers_spelling():
    def ask(task, **more):
        return pretraining_prompt(task, 2, "tags_paper", **more).removeprefix(AUDIO + AUDIO)

    assert ask("transcribe") == ("<|startoftranscripts|><|en|><|transcribe|><|en|><|notimestamps|><|wo_itn|>")
    assert ask("scene") == "<|startofanalysis|><|unknown|><|analysis|><|en|><|notimestamps|><|scene|>"
    assert ask("question_answer", question="What barks?", text_language="de") == (
        "<|startofanalysis|><|en|><|question-answer|>What barks?<|de|><|notimestamps|>"
    )


def test_there_are_thirty_tasks_in_three_families_and_no_two_are_asked_alike():
    assert len(TASKS) >= 30
    assert {task.family for task in TASKS.values()} == {"speech", "sound", "music", "any"}
    for prompt_format in ("sentences", "tags_paper", "tags_released"):
        prompts = {
            name: pretraining_prompt(name, 1, prompt_format, question=question_of(name))
            for name in TASKS
            if name != "music_question_answer"  # asked as any question is, in sentences
        }
        assert len(set(prompts.values())) == len(prompts), prompt_format


def test_the_tag_never_says_the_language_that_is_asked_for():
    one = example("language_id", text="German", audio_language="de")
    for prompt_format in ("sentences", "tags_paper", "tags_released"):
        assert "de" not in prompt_of(one, prompt_format).replace("Identify", "").split("|")
    assert "<|unknown|>" in prompt_of(one, "tags_paper")


def test_words_are_stamped_after_the_prompts_first_stamp():
    words = (Word(text="X", start_s=0.54, end_s=0.86), Word(text="Y", start_s=0.86, end_s=1.17))
    one = example("transcribe_words", audio_language="zh", words=words)
    whole = prompt_of(one, "tags_released") + target_of(one, duration_s=2.01)
    assert whole.endswith("<|timestamps|><|0.00|><|sil|><|0.54|>X<|0.86|>Y<|1.17|><|sil|><|2.01|>")
    assert target_of(one) == "<|sil|><|0.54|>X<|0.86|>Y<|1.17|>"


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (TaskExample(id="e1", audios=(), task="sing", text="x"), "'sing'; known: age, "),
        (example("transcribe_words", words=()), "'transcribe_words' needs words with their times"),
        (example("question_answer", question=None), "needs a question"),
        (example("caption", question="What?"), "has no question"),
        (example("question_answer", question="What?<|im_end|>"), "holds <|im_end|>"),
        (example("question_answer", question="What?<|answer|>yes"), "holds <|answer|>"),
        (example("speaker_verification", audios=("a.wav",)), "is about 2 clips, not 1"),
        (example("transcribe", audio_language="xx"), "'xx' is not a language"),
        (example("transcribe", audio_language="de", text_language="en"), "is a translation"),
        (example("translate_speech", audio_language="en", text_language="en"), "is a transcript"),
        (
            example("transcribe", text="hi<|im_end|>system"),
            "holds <|im_end|>, no tag of its task",
        ),
        (example("caption", text="<|0.10|>"), "holds <|0.10|>, no tag of its task"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_examples_are_refused_and_named(bad, what):
    with pytest.raises(ValueError, match=what.replace("|", r"\|").replace("?", r"\?")):  # noqa: PT012
        prompt_of(bad, "tags_released")
        target_of(bad)


def test_a_bad_example_is_told_by_its_id():
    with pytest.raises(BadExample, match="example 'e1': 'xx' is not a language"):
        prompt_of(example("transcribe", audio_language="xx"), "sentences")


def test_a_note_may_be_told_in_the_releases_tags():
    text = "<|pitch|><|midi_pitch_60|><|velocity|><|midi_velocity_127|><|instrument|>flute<|sonic|>bright"
    assert target_of(example("note_analysis", text=text)) == text


def test_a_whole_tagset_has_3001_stamps_and_a_small_one_what_is_needed():
    whole = all_tags("tags_released")
    assert len([tag for tag in whole.answer if tag[2].isdigit()]) == 3001
    assert {"<|0.00|>", "<|30.00|>", "<|sil|>", "<|midi_pitch_127|>"} <= set(whole.answer)
    assert {"<|startoftranscript|>", "<|zh_tr|>", "<|keyword|>", "<|answer|>"} <= set(whole.prompt)
    assert not set(whole.prompt) & set(whole.answer)
    small = tags_needed([example("caption"), example("caption")], "tags_released", longest_s=3)
    assert small.answer == ()
    assert len(small.prompt) == 6
    timed = tags_needed([example("transcribe_words")], "tags_released", longest_s=3)
    assert len(timed.answer) == 301 + 1  # and silence
    assert "<|0.00|>" not in timed.prompt


@pytest.mark.parametrize("prompt_format", ["sentences", "tags_paper", "tags_released"])
def test_every_tag_of_every_prompt_is_in_the_whole_tagset(prompt_format):
    whole = all_tags(prompt_format)
    everything = [example(name) for name in TASKS]
    needed = tags_needed(everything, prompt_format, longest_s=30)
    assert set(needed.prompt) <= set(whole.prompt)
    assert set(needed.answer) == set(whole.answer)


def test_a_conversation_is_read_whole_and_a_single_question_as_it_is():
    about = {"id": "p", "question": "And these?", "answer_gt": "", "meta_info": "", "task_name": "chat"}
    single = Prompt(audios=("a.wav", "b.wav"), **about)
    assert (transcript(single), texts_of(single)) == ("And these?", ["And these?"])
    history = (Turn(question="", answer="Rain.", audios=("a.wav",)), Turn(question="Loud?", answer="No."))
    whole = Prompt(audios=("a.wav", "b.wav", "a.wav"), history=history, system="Be brief.", **about)
    assert transcript(whole) == (
        "System: Be brief.\nUser (audio 1): \nAssistant: Rain.\nUser: Loud?\nAssistant: No.\n"
        "User (audio 2, audio 3): And these?"
    )
    assert texts_of(whole) == ["Be brief.", "", "Rain.", "Loud?", "No.", "And these?"]
