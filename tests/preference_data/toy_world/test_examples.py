"""From clips to chats, transcripts, prompts and an evaluation set."""

import json
from collections import Counter
from pathlib import Path

import pytest

from preference_data.corpora.catalog import phrasebook_of
from preference_data.schema import AudioClip
from preference_data.toy_world import examples
from preference_data.toy_world.phrasebook import Phrasebook

WORLD = Phrasebook.load(phrasebook_of("synthetic", None))
DIGITS = Phrasebook.load(phrasebook_of("spoken_digits", None))
FACTS = [
    {"word": "seven", "gender": "woman"},
    {"event": "bell", "count": "three"},
    {"first": "clap", "last": "beep", "count": "two"},
    {"instrument": "flute", "direction": "rising", "tempo": "slow"},
    {"word": "stop", "gender": "man", "background": "music"},
]
TASKS = ["speech_QA", "sound_QA", "sound_QA", "music_QA", "speech_and_music_QA"]


def clip(number: int, split: str = "train", folder: str = "audio/train") -> AudioClip:
    return AudioClip(
        id=f"c{number}",
        path=f"{folder}/c{number}.wav",
        split=split,
        duration_s=3,
        sha256="0" * 64,
        facts=FACTS[number % len(FACTS)],
    )


def chats(clips: list[AudioClip], **changes):
    options = {"chats_per_clip": 2, "turns": 3, "defect_rate": 0.5, "seed": 0}
    return examples.chats(clips, WORLD, **{**options, **changes})


def test_chats_have_different_questions_and_declare_their_defects():
    clips = [clip(number) for number in range(1000)]
    made = chats(clips)
    assert len(made) == 2000
    assert len({chat.id for chat in made}) == 2000
    marked = 0
    for chat, owner in zip(made, (c for c in clips for _ in range(2)), strict=True):
        assert chat.audios == (owner.path,)
        assert len({turn.question for turn in chat.turns}) == len(chat.turns) == 3
        for turn in chat.turns:
            question = WORLD.question(turn.question, owner.facts)
            perfect = WORLD.assess(turn.answer, question, owner.facts).score == 10
            assert perfect == (turn.defect is None)
            marked += turn.defect is not None
    assert marked / 6000 == pytest.approx(0.5, abs=0.03)  # 4.6 standard errors


def test_the_defect_rate_is_met_at_its_ends():
    clips = [clip(number) for number in range(50)]
    assert all(turn.defect is None for chat in chats(clips, defect_rate=0) for turn in chat.turns)
    assert all(turn.defect for chat in chats(clips, defect_rate=1) for turn in chat.turns)


def test_a_clip_gets_the_same_chat_whatever_stands_beside_it():
    assert chats([clip(0), clip(1), clip(2)])[4:] == chats([clip(2)])
    assert chats([clip(2)], seed=1) != chats([clip(2)])


def test_a_clip_with_little_to_ask_gets_a_shorter_chat():
    little = WORLD.model_copy(update={"kinds": {"describe": 1.0}})
    made = examples.chats([clip(0)], little, chats_per_clip=1, turns=5, defect_rate=0, seed=0)
    assert {turn.question for turn in made[0].turns} == set(WORLD.describe_questions)


def test_transcripts_are_the_targets_of_the_phrasebook():
    made = examples.transcripts([clip(1), clip(4)], WORLD)
    assert [(t.task, t.text) for t in made] == [
        ("caption", " A bell sounds, three in all."),
        ("caption", " A man says stop. There is music in the background."),
    ]
    spoken = clip(0).model_copy(update={"facts": {"first": "two", "last": "two", "digits": "two"}})
    assert [(t.task, t.text) for t in examples.transcripts([spoken], DIGITS)] == [("transcribe", " two")]


def test_prompts_ask_kinds_by_their_weights_and_carry_what_a_judge_needs():
    clips = [clip(number) for number in range(2000)]
    kinds = Counter()
    for prompt, owner, task in zip(examples.prompts(clips, WORLD, seed=0), clips, TASKS * 400, strict=True):
        assert prompt.task_name == task
        facts = json.loads(prompt.meta_info)
        assert facts == owner.facts
        question = WORLD.question(prompt.question, facts)
        assert prompt.answer_gt == question.reference
        kinds[question.kind] += 1
    # over music nothing is absent, so a fifth of the absent questions are closed ones instead
    expected = {**WORLD.kinds, "absent": 0.8 * 0.20, "closed": 0.42 + 0.2 * 0.20}
    for kind, share in expected.items():
        assert kinds[kind] / 2000 == pytest.approx(share, abs=0.04)


def test_several_prompts_about_a_clip_ask_different_things():
    """The first is the one that would be asked alone; of a clip with little to ask there are fewer."""
    clips = [clip(i) for i in range(20)]
    alone, several = examples.prompts(clips, WORLD, 0), examples.prompts(clips, WORLD, 0, per_clip=3)
    by_clip = {c.path: [prompt for prompt in several if prompt.audios == (c.path,)] for c in clips}
    assert [own[0] for own in by_clip.values()] == alone
    assert {len(own) for own in by_clip.values()} == {3}
    assert all(len({prompt.question for prompt in own}) == len(own) for own in by_clip.values())
    assert len({prompt.id for prompt in several}) == len(several)
    everything = examples.prompts(clips[:1], WORLD, 0, per_clip=1000)
    assert 3 < len(everything) < 1000


def test_the_evaluation_set_is_laid_out_as_air_bench(tmp_path: Path):
    clips = [clip(n, "dev", f"dev/Chat/{TASKS[n]}_synthetic") for n in range(5)]
    examples.write_air_bench(tmp_path / "dev", clips, WORLD, "synthetic", 0)
    rows = json.loads((tmp_path / "dev" / "Chat" / "Chat_meta.json").read_text())
    keys = {"path", "question", "answer_gt", "meta_info", "task_name", "dataset_name", "uniq_id"}
    assert all(set(row) == keys for row in rows)
    found = [f"dev/Chat/{row['task_name']}_{row['dataset_name']}/{row['path']}" for row in rows]
    assert found == [c.path for c in clips]
    assert len({row["uniq_id"] for row in rows}) == 5


def test_recognition_rows_are_those_of_the_qwen2_audio_evaluation():
    clips = [clip(1, "test").model_copy(update={"source": "recording"})]
    assert examples.recognition_rows(clips, WORLD) == [
        {
            "audio": "audio/train/c1.wav",
            "prompt": "caption",
            "gt": "A bell sounds, three in all.",
            "source": "caption/recording",
        }
    ]
