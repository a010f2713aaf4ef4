"""Pre-training on several tasks through the stage itself: a small model learns to stamp words."""

import numpy as np
import pytest
import soundfile

from align.generation.engine import Decoding, Request
from align.generation.transformers_engine import TransformersEngine
from align.models.features import ClipFeatures
from align.models.qwen2_audio.model import load_processor
from align.recipe.config.training import ModelShape, PretrainConfig
from align.run_folder.artifacts import StageFolder
from align.stages import pretrain
from preference_data import store
from preference_data.corpora.catalog import phrasebook_of
from preference_data.prompts.prompts import BadExample, prompt_of, target_of
from preference_data.schema import AudioClip, TaskExample, Word

SHAPE = ModelShape(d_model=32, heads=2, audio_layers=1, text_layers=1, mel_bins=32, clip_s=1, vocab_size=400)
STARTS_S = (0.2, 0.6)
PROMPT_FORMATS = ("sentences", "tags_paper", "tags_released")


def examples(number, start_s):
    path, name = f"{number}.wav", f"c{number}"
    word = Word(text="beep", start_s=start_s, end_s=start_s + 0.2)
    return [
        TaskExample(id=f"{name}w", audios=(path,), task="transcribe_words", text="beep", words=(word,)),
        TaskExample(
            id=f"{name}q",
            audios=(path,),
            task="question_answer",
            text="early" if start_s < 0.5 else "late",
            question="When does it beep?",
        ),
        TaskExample(id=f"{name}e", audios=(path,), task="emotion", text="calm", text_language="de"),
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("stamped")
    clips = []
    for number, start_s in enumerate(STARTS_S):
        wave = np.zeros(16_000, dtype=np.float32)
        at = slice(int(16_000 * start_s), int(16_000 * (start_s + 0.2)))
        wave[at] = 0.5 * np.sin(2 * np.pi * 900 * np.arange(at.stop - at.start) / 16_000)
        soundfile.write(root / f"{number}.wav", wave, 16_000)
        clips.append(
            AudioClip(id=f"c{number}", path=f"{number}.wav", split="train", duration_s=1, sha256="0" * 64)
        )
    store.write(root / "clips.jsonl", clips)
    store.write(root / "pretrain.jsonl", [one for i, s in enumerate(STARTS_S) for one in examples(i, s)])
    (root / "phrasebook.yaml").write_text(phrasebook_of("synthetic", None).read_text())
    return root


def config(prompt_format, steps):
    return PretrainConfig(
        stage="pretrain",
        corpus="0",
        model=SHAPE,
        prompt_format=prompt_format,
        steps=steps,
        batch_size=6,
        learning_rate=1e-2,
        trl={"logging_steps": 1},
    )


def trained(corpus, folder, prompt_format, steps):
    out = StageFolder(folder, "1_pretrain", "x")
    out.open()
    metrics = pretrain.run(config(prompt_format, steps), {"0": corpus}, out)
    return metrics, out.path / "model"


@pytest.mark.parametrize("prompt_format", PROMPT_FORMATS)
def test_every_tag_of_the_corpus_is_one_token_and_no_more_are_added(corpus, tmp_path, prompt_format):
    metrics, policy = trained(corpus, tmp_path, prompt_format, steps=1)
    assert metrics["loss"] > 0
    tokenizer = load_processor(policy).tokenizer
    assert len(tokenizer("<|0.00|><|sil|><|0.54|><|1.00|>")["input_ids"]) == 4
    assert "<|1.01|>" not in tokenizer.get_vocab()
    assert len(tokenizer) < 400 + 101 + 20
    known = {"<|question-answer|>", "<|de|>"} <= set(tokenizer.get_vocab())
    assert known == (prompt_format == "tags_paper")
    assert ("<|keyword|>" in tokenizer.get_vocab()) == (prompt_format == "tags_released")


def test_stamps_are_learned_and_told(corpus, tmp_path):
    _, policy = trained(corpus, tmp_path, "tags_released", steps=80)
    asked = [examples(number, start_s)[0] for number, start_s in enumerate(STARTS_S)]
    requests = [Request(prompt_of(one, "tags_released"), one.audios, plain=True) for one in asked]
    engine = TransformersEngine(policy, ClipFeatures(load_processor(policy), corpus))
    numbered = dict(enumerate(requests))
    said = [[c.text for c in group] for _, group in engine.complete(numbered, Decoding(max_new_tokens=8), 0)]
    for one, (text,) in zip(asked, said, strict=True):
        assert text == target_of(one)


def test_a_bad_example_stops_the_stage_before_it_trains(corpus, tmp_path):
    bad = TaskExample(id="bad", audios=("0.wav",), task="caption", text="x", audio_language="xx")
    root = tmp_path / "corpus"
    root.mkdir()
    for name in ("clips.jsonl", "phrasebook.yaml"):
        (root / name).write_bytes((corpus / name).read_bytes())
    store.write(root / "pretrain.jsonl", [*examples(0, 0.2), bad])
    with pytest.raises(BadExample, match="example 'bad': 'xx' is not a language"):
        trained(root, tmp_path, "tags_paper", steps=1)
