"""SFT through the stage itself: voice chat, analysis, later clips and plain text at once, no mode prompt."""

import hashlib
import json

import pytest
from pydantic import ValidationError

from align.generation.engine import Decoding, Request
from align.generation.transformers_engine import TransformersEngine
from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.recipe.config.training import SFTConfig
from align.run_folder.artifacts import StageFolder
from align.stages import sft
from preference_data import store
from preference_data.schema import AudioClip, Chat, Prompt, TaskExample, Turn

CHATS = [
    Chat(
        id="voice",
        audios=("0.wav", "3.wav"),
        turns=(
            Turn(question="", answer="tone", audios=("0.wav",)),
            Turn(question="", answer="system", audios=("3.wav",)),
        ),
    ),
    Chat(id="voice1", audios=("1.wav",), turns=(Turn(question="", answer="low"),)),
    Chat(
        id="analysis",
        audios=("1.wav", "2.wav"),
        turns=(Turn(question="Is the tone high or low?", answer="The tone is low."),),
    ),
    Chat(id="text", audios=(), turns=(Turn(question="user?", answer="assistant"),)),
]


@pytest.fixture
def corpus(tiny, tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    clips = []
    for clip in sorted(tiny.audio.iterdir()):
        (root / clip.name).write_bytes(clip.read_bytes())
        sha = hashlib.sha256(clip.read_bytes()).hexdigest()
        clips.append(AudioClip(id=clip.stem, path=clip.name, split="train", duration_s=1.0, sha256=sha))
    store.write(root / "clips.jsonl", clips)
    store.write(root / "sft.jsonl", [*CHATS, CHATS[0].model_copy(update={"id": "again"})])
    target = TaskExample(id="t", audios=("2.wav",), task="caption", text=" A low tone.")
    store.write(root / "pretrain.jsonl", [target])
    return root


def run(tiny, corpus, folder, **more):
    settings = {
        "steps": 60,
        "batch_size": 5,
        "learning_rate": 1e-2,
        "replay": 0.2,
        "trl": {"logging_steps": 1},
    }
    out = StageFolder(folder, "2_sft", "x")
    out.open()
    told = SFTConfig(stage="sft", corpus="0", policy="1", **(settings | more))
    return sft.run(told, {"0": corpus, "1": tiny.policy}, out), out.path


def test_every_mode_is_learned_at_once(tiny, corpus, tmp_path):
    metrics, out = run(tiny, corpus, tmp_path / "run")
    assert metrics["loss"] < 0.1
    assert not {"chats", "chats_kept"} & set(metrics)  # nothing is filtered unless asked for
    requests = [
        Request("", ("0.wav",)),
        Request("", ("1.wav",)),
        Request("Is the tone high or low?", ("1.wav", "2.wav")),
        Request("user?", ()),
    ]
    processor = qwen2_audio.load_processor(out / "model")
    engine = TransformersEngine(out / "model", ClipFeatures(processor, corpus))
    completed = dict(engine.complete(dict(enumerate(requests)), Decoding(max_new_tokens=12), seed=0))
    assert [[completion.text for completion in completed[n]] for n in range(4)] == [
        ["tone"],
        ["low"],
        ["The tone is low."],
        ["assistant"],
    ]


def test_text_alone_trains(tiny, corpus, tmp_path):
    store.write(corpus / "sft.jsonl", [CHATS[3]])
    metrics, _ = run(tiny, corpus, tmp_path / "run", steps=2, replay=0.0, batch_size=2)
    assert metrics["loss"] > 0


def test_references_of_prompts_are_learned_in_place_of_chats(tiny, corpus, tmp_path):
    prompt = Prompt(
        id="p", audios=("1.wav",), question="How?", answer_gt="low", meta_info="", task_name="sound_QA"
    )
    store.write(corpus / "prompts.jsonl", [prompt])
    metrics, out = run(tiny, corpus, tmp_path / "run", replay=0.0, prompts="corpus", batch_size=1)
    assert metrics["loss"] < 0.1
    processor = qwen2_audio.load_processor(out / "model")
    engine = TransformersEngine(out / "model", ClipFeatures(processor, corpus))
    requests = {0: Request("How?", ("1.wav",))}
    [(_, [completion])] = engine.complete(requests, Decoding(max_new_tokens=4), seed=0)
    assert completion.text == "low"
    store.write(corpus / "prompts.jsonl", [prompt, prompt.model_copy(update={"id": "q", "answer_gt": " "})])
    with pytest.raises(ValueError, match="1 prompts without a reference in answer_gt, such as 'q'"):
        run(tiny, corpus, tmp_path / "again", replay=0.0, prompts="corpus")
    with pytest.raises(ValidationError, match="filters"):
        run(tiny, corpus, tmp_path / "both", prompts="corpus", filters={"max_similarity": 1})


def test_filters_count_in_the_metrics_and_do_not_touch_what_stays(tiny, corpus, tmp_path):
    metrics, out = run(
        tiny, corpus, tmp_path / "run", steps=1, filters={"max_similarity": 1, "min_audio_effect": -100.0}
    )
    assert metrics["chats"] == 5
    assert metrics["chats_kept"] == 4
    assert metrics["left_out_repetition"] == 1
    assert [json.loads(line) for line in (out / "left_out.jsonl").read_text().splitlines()] == [
        {"id": "again", "reason": "repetition"}
    ]
    assert len(json.loads((out / "audio_effect" / "000000.json").read_text())) == 3  # of the chats with clips
