"""The engine on the encoder of Whisper base: the same completions as stock, a tenth of the work."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from align.generation.engine import Decoding, Request
from align.generation.transformers_engine import TransformersEngine
from align.models.features import ClipFeatures, stack
from align.models.qwen2_audio.assemble import assemble
from align.models.qwen2_audio.clips import PackedClips, stack_unpadded
from align.models.qwen2_audio.model import load_processor
from align.models.tower_outputs import FOLDER
from tests.align.generation.toy_policy import Stock

ENCODER = Path(__file__).parents[4] / "shared" / "data" / "whisper-base-encoder"
pytestmark = pytest.mark.skipif(not ENCODER.is_dir(), reason=f"{ENCODER} is not there")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A policy of the real encoder and a small random Qwen2; a folder with clips of 3.0, 1.2 and 0.4 s."""
    root = tmp_path_factory.mktemp("whisper")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    bpe.train_from_iterator(
        ["What do you hear? A dog barks."],
        trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[0], pad_token=special[0])
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(root / "text")
    tokenizer.save_pretrained(root / "text")
    assemble(ENCODER, root / "text", root / "policy")
    draw = np.random.default_rng(0)
    for i, seconds in enumerate((3.0, 1.2, 0.4)):
        time = np.arange(int(16_000 * seconds)) / 16_000
        wave = 0.3 * np.sin(2 * np.pi * (300 + 400 * i + 900 * time) * time)
        soundfile.write(root / f"{i}.wav", wave + 0.01 * draw.standard_normal(len(time)), 16_000)
    return root / "policy", root


@pytest.fixture(scope="module")
def engine(whisper):
    policy, root = whisper
    return TransformersEngine(policy, ClipFeatures(load_processor(policy), root))


def test_greedy_equals_stock(engine, whisper):
    stock = Stock(*whisper)
    asked = [("0.wav",), ("1.wav",), ("2.wav",), ("2.wav", "1.wav")]
    numbered = {i: Request("What do you hear?", clips) for i, clips in enumerate(asked)}
    found = dict(engine.complete(numbered, Decoding(max_new_tokens=16), 0))
    for number, request in numbered.items():
        theirs = stock.complete(request, 16)
        assert found[number][0].token_ids == theirs.token_ids
        assert found[number][0].logps == pytest.approx(theirs.logps, abs=1e-3)
    assert found[0][0].logps[0] != pytest.approx(found[1][0].logps[0], abs=1e-3)  # it listens


@torch.no_grad()
def tower_flops(compute):
    """FLOPs with attention, which the counter sees as plain products only."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops()


def test_three_seconds_cost_a_tenth_of_thirty(engine):
    backbone = engine.model.model
    clip = engine.clips(["0.wav"])[0]
    packed = PackedClips.of([clip.n_frames])
    ours = tower_flops(lambda: backbone.encode(stack_unpadded([clip])["input_features"], packed))
    features = stack([clip])["input_features"]
    theirs = tower_flops(
        lambda: backbone.multi_modal_projector(backbone.audio_tower(features).last_hidden_state)
    )
    assert theirs / ours > 10


def test_kept_outputs_of_the_tower_give_the_same_completions(engine, whisper, tmp_path):
    """Bit for bit whether they are made or found; without a store, of clips in a batch, but for rounding."""
    policy, root = whisper
    asked = [("0.wav",), ("1.wav", "2.wav"), ("0.wav",)]
    numbered = {i: Request("What do you hear?", clips) for i, clips in enumerate(asked)}
    drawn = Decoding(max_new_tokens=12, temperature=1.0, completions=3)
    plain = dict(engine.complete(numbered, drawn, 0))
    answers = []
    for _ in range(2):
        with_store = TransformersEngine(policy, ClipFeatures(load_processor(policy), root), tmp_path)
        answers.append(dict(with_store.complete(numbered, drawn, 0)))
    assert len(list((tmp_path / FOLDER).glob("*/??/*.safetensors"))) == 3
    assert answers[0] == answers[1]
    for number, group in plain.items():
        for ours, theirs in zip(group, answers[0][number], strict=True):
            assert ours.text == theirs.text
            assert ours.token_ids == theirs.token_ids
            assert ours.logps == pytest.approx(theirs.logps, abs=1e-4)
