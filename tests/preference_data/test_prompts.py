"""Both dialects of the pre-training prompts."""

import pytest

from preference_data.prompts import TASKS, pretraining_prompt

CLIP = "<|audio_bos|><|AUDIO|><|audio_eos|>"


def test_sentences_as_qwen2_audio_asks():
    assert pretraining_prompt("caption", 1, "sentences") == CLIP + "Generate the caption in English:"
    assert pretraining_prompt("transcribe", 2, "sentences").startswith(CLIP + CLIP + "Detect the language")


def test_tags_in_the_papers_order_and_the_released_spelling():
    assert pretraining_prompt("transcribe", 1, "tags") == (
        CLIP + "<|startoftranscript|><|en|><|transcribe|><|en|><|notimestamps|><|wo_itn|>"
    )
    assert pretraining_prompt("caption", 1, "tags") == (
        CLIP + "<|startofanalysis|><|unknown|><|caption|><|en|><|notimestamps|><|caption_plain|>"
    )
    assert all(len(task.tags) == 6 for task in TASKS.values())


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="'sing'; known: caption, transcribe"):
        pretraining_prompt("sing", 1, "tags")
