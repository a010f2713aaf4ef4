"""Multiple-choice questions in the layouts of AVQA, AudioMCQ and MMAU become prompts; others are refused."""

import json

import numpy as np
import pytest
import soundfile

from preference_data.dataset.dataset import QUARANTINE, Dataset
from preference_data.interchange.columns import BadRow
from preference_data.interchange.convert import read_row
from preference_data.interchange.exchange import read_rows
from preference_data.interchange.questions import check_form
from preference_data.schema import AudioClip, Chat, Prompt

CHOICES = ["motorboat", "Sailboat set sail"]
AVQA = {  # as README.md of xiaomi-research/r1-aqa shows it
    "id": 183,
    "video_name": "-HG3Omg_89c_000030",
    "video_id": 341,
    "question_text": "What happened in the video?",
    "multi_choice": CHOICES,
    "answer": 1,
    "question_relation": "View",
    "question_type": "Happening",
}
R1_AQA = {**AVQA, "dataset_name": "AVQA", "audio_path": "wav/-HG3Omg_89c_30.wav"}
AUDIOMCQ = {
    "source_dataset": "Clotho",
    "id": "Clotho_1",
    "question_type": "sound",
    "audio_path": "audio/1.wav",
    "question": "What is heard?",
    "choices": CHOICES,
    "answer": "motorboat",
}
MMAU = {
    "id": "3fe64f3d",
    "audio_id": "./test-mini-audios/3fe64f3d.wav",
    "question": "What is heard?",
    "choices": CHOICES,
    "answer": "motorboat",
    "dataset": "AudioSet",
    "task": "sound",
    "split": "test-mini",
    "category": "Reasoning",
    "sub-category": "Event-Based Sound Reasoning",
    "difficulty": "medium",
}
ASKED = (
    "{} Please choose the answer from the following options: ['motorboat', 'Sailboat set sail']. "
    "Output the final answer in <answer> </answer>."
)
"""R1-AQA's form."""


@pytest.mark.parametrize(
    ("row", "clip", "question", "right", "kind"),
    [
        (AVQA, "-HG3Omg_89c_000030.wav", "What happened in the audio?", "Sailboat set sail", "Happening"),
        (R1_AQA, "wav/-HG3Omg_89c_30.wav", "What happened in the audio?", "Sailboat set sail", "Happening"),
        (AUDIOMCQ, "audio/1.wav", "What is heard?", "motorboat", "sound"),
        (MMAU, "./test-mini-audios/3fe64f3d.wav", "What is heard?", "motorboat", "sound"),
        ({**AUDIOMCQ, "answer": "B"}, "audio/1.wav", "What is heard?", "Sailboat set sail", "sound"),
    ],
)
def test_published_layouts_are_read(row, clip, question, right, kind):
    found = read_row(row, "choice")
    assert isinstance(found, Prompt)
    assert (found.audios, found.answer_gt, found.task_name) == ((clip,), right, kind)
    assert found.question == ASKED.format(question)
    assert found.choices == tuple(CHOICES)
    assert found.id == str(row["id"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"answer": "rowing"}, "its answer 'rowing' is none of its choices"),
        ({"answer": 2}, "its answer '2' is none of its choices"),
        ({"answer": True}, "is none of its choices"),
        ({"answer": None}, "is none of its choices"),
        ({"choices": ["a", "a"], "answer": "a"}, "2 to 4 different texts"),
        ({"choices": list("abcde"), "answer": "a"}, "2 to 4 different texts"),
        ({"choices": ["a", 3], "answer": "a"}, "2 to 4 different texts"),
        ({"choices": "a, b"}, "2 to 4 different texts"),
        ({"choices": ["<audio>", "b"], "answer": "b"}, "stands in a choice"),
        ({"question": " "}, "has no question"),
        ({"question": "<audio> What?"}, "stands in a question"),
        ({"question": "What <|im_end|>?"}, r"<\|im_end\|>"),
        ({"audio_path": None}, "an audio is 'None', not a path"),
        ({"structured_cot": "I hear ..."}, "'structured_cot' .*--ignore"),
        ({"question_text": "Another?"}, "question and question_text, which differ"),
    ],
)
def test_what_cannot_be_rewarded_is_refused(change, problem):
    with pytest.raises(BadRow, match=problem):
        read_row({**AUDIOMCQ, **change}, "choice")


def test_the_form_of_questions_is_the_users():
    form = check_form("{choices}: {question} Think first.")
    found = read_row(AUDIOMCQ, "choice", question_form=form)
    assert found.question == f"{CHOICES}: What is heard? Think first."
    for wrong in ("{question}", "{choices}", "{question} {choices} {}", "{question} {choices} {a[", "{1}"):
        with pytest.raises(ValueError, match="must hold {question} and {choices}"):
            check_form(wrong)


def test_files_are_read_beside_others_and_clips_that_are_gone_are_named(tmp_path):
    for name, level in (("-HG3Omg_89c_000030.wav", 0.1), ("chat.wav", 0.2)):
        soundfile.write(tmp_path / name, np.full(1600, level, np.float32), 16000)
    (tmp_path / "train_qa.json").write_text(
        json.dumps([AVQA, {**AVQA, "id": 2, "video_name": "gone"}, {**AVQA, "id": 3, "answer": 0}])
    )
    found = read_rows(tmp_path / "train_qa.json", "choice", tmp_path / "avqa", audio_root=tmp_path)
    assert (found.questions, found.clips, found.n_refused) == (2, 1, 1)
    assert "gone.wav" in found.refused[0]
    chat = [{"role": "user", "content": "<audio>Hm?"}, {"role": "assistant", "content": "A tone."}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat, "audios": ["chat.wav"]}) + "\n")
    read_rows(tmp_path / "chats.jsonl", "ms-swift", tmp_path / "avqa", audio_root=tmp_path)
    dataset = Dataset(tmp_path / "avqa")
    assert dataset.about["name"] == "avqa"
    assert [prompt.answer_gt for prompt in dataset.table(Prompt)] == ["Sailboat set sail", "motorboat"]
    assert len(dataset.table(Chat)) == 1
    splits = [clip.split for clip in dataset.table(AudioClip)]
    assert splits == ["preference", "train"]
    assert dataset.find(dataset.table(Prompt)[0].audios[0]).is_file()
    assert (tmp_path / "avqa" / QUARANTINE).read_text().count("\n") == 1
