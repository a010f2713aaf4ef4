"""A Qwen2-Audio of a Whisper and a Qwen2 on disk: what went where, and that both still compute the same."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.modeling_whisper import sinusoids

from align.models import shards
from align.models.features import mel_features, stack
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio import random_parts
from align.models.qwen2_audio.assemble import CannotAssemble, assemble, expected_tensors
from align.models.qwen2_audio.clips import n_audio_tokens
from preference_data.audio.decode import SAMPLE_RATE
from preference_data.prompts.prompts import Tagset

MELS, POSITIONS, VOCAB = 16, 50, 300
POSITIONS_NAME = "model.encoder.embed_positions.weight"


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whisper")
    config = WhisperConfig(
        num_mel_bins=MELS,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        max_source_positions=POSITIONS,
        max_target_positions=20,
        vocab_size=60,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        init_std=0.2,
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=MELS, chunk_length=1, hop_length=160).save_pretrained(folder)
    return folder


def make_qwen(folder, *, tied=False, rows=VOCAB, n_tokens=270):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        ["the tone is high or low"] * 5,
        trainers.BpeTrainer(
            vocab_size=n_tokens,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return make_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def made(whisper, qwen, tmp_path_factory):
    to = tmp_path_factory.mktemp("made") / "qwen2-audio"
    return to, assemble(whisper, qwen, to, seed=0)


def test_every_source_tensor_is_used_or_named_and_every_target_filled(whisper, qwen, made):
    to, assembly = made
    sources = {f"audio:{name}" for name in load_file(whisper / "model.safetensors")}
    sources |= {f"text:{name}" for name in load_file(qwen / "model.safetensors")}
    assert {*assembly.used.values(), *assembly.unused} == sources
    assert not {*assembly.used.values()} & {*assembly.unused}
    assert all(re.match(r"audio:(model\.decoder\.|proj_out)", name) for name in assembly.unused)
    assert assembly.unused
    assert sorted(load_file(to / "model.safetensors")) == sorted([*assembly.used, *assembly.new])
    assert assembly.new == ["multi_modal_projector.linear.weight", "multi_modal_projector.linear.bias"]
    assert json.loads((to / "assembly.json").read_text())["used"] == assembly.used
    assert assembly.used["audio_tower.conv1.weight"] == "audio:model.encoder.conv1.weight"
    assert assembly.used["language_model.lm_head.weight"] == "text:lm_head.weight"


def test_the_tower_is_whispers_encoder_but_for_the_pooling(whisper, made):
    """Whisper: norm(h). Here: norm(mean of each two of h)."""
    encoder = WhisperForConditionalGeneration.from_pretrained(whisper).model.encoder.eval()
    tower = qwen2_audio.load_model(made[0]).model.audio_tower.eval()
    mel = torch.randn(2, MELS, 2 * POSITIONS, generator=torch.Generator().manual_seed(2))
    before_norm = []
    encoder.layer_norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
    with torch.no_grad():
        whole = encoder(mel).last_hidden_state
        pooled = (before_norm[0][:, 0::2] + before_norm[0][:, 1::2]) / 2
        theirs = encoder.layer_norm(pooled)
        ours = tower(mel).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, whole[:, 0::2], atol=1e-2)  # the pooling is real


def text_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("tied", [False, True])
def test_text_alone_has_the_language_models_logits(whisper, tmp_path, tied):
    source = make_qwen(tmp_path / "qwen", tied=tied)
    assembly = assemble(whisper, source, tmp_path / "made")
    model = qwen2_audio.load_model(tmp_path / "made").eval()
    theirs = Qwen2ForCausalLM.from_pretrained(source).eval()
    ids = torch.tensor([[5, 40, 99, 7, 260, 31]])
    ours, old = text_logits(model, ids), text_logits(theirs, ids)
    added = [*assembly.new_tokens.values()]
    kept = [i for i in range(VOCAB) if i not in added]
    torch.testing.assert_close(ours[..., kept], old[..., kept], rtol=1e-5, atol=1e-5)
    assert old[..., kept].std() > 0.1
    mean_row = old[..., : min(added)].mean(-1)  # a mean row's logit is the mean of the logits
    for token in added:
        torch.testing.assert_close(ours[..., token], mean_row, rtol=1e-4, atol=1e-5)
    assert assembly.used["language_model.lm_head.weight"].endswith("embed_tokens.weight") == tied
    head, embeddings = model.lm_head.weight, model.model.language_model.embed_tokens.weight
    assert head.data_ptr() != embeddings.data_ptr()
    assert torch.equal(head, embeddings) == tied
    assert model.config.text_config.rope_parameters["rope_theta"] == 1e6


def test_embeddings_grow_to_a_multiple_of_64_only_when_the_new_tokens_need_it(whisper, tmp_path):
    roomy = assemble(whisper, make_qwen(tmp_path / "a", rows=512), tmp_path / "roomy")
    assert roomy.rows == (512, 512)
    # 270 tokens and 4 new ones do not fit in 272 rows
    source = make_qwen(tmp_path / "b", rows=272)
    tags = Tagset(("<|im_end|>",), ("<|tone|>",))
    tight = assemble(whisper, source, tmp_path / "tight", tags=tags)
    assert tight.new_tokens == {"<|AUDIO|>": 270, "<|audio_bos|>": 271, "<|audio_eos|>": 272, "<|tone|>": 273}
    assert tight.rows == (272, 320)
    old = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    new = load_file(tmp_path / "tight" / "model.safetensors")["language_model.model.embed_tokens.weight"]
    assert new.shape == (320, 24)
    assert torch.equal(new[:270], old[:270])
    mean = old[:270].mean(0)
    torch.testing.assert_close(new[270:273], mean.expand(3, -1))
    torch.testing.assert_close(new[274:], mean.expand(46, -1))
    tokenizer = qwen2_audio.load_processor(tmp_path / "tight").tokenizer
    spelled = tokenizer("tone")["input_ids"]
    weights = torch.tensor([1 / n for n in range(1, len(spelled) + 1)])
    torch.testing.assert_close(new[273], weights @ old[spelled] / weights.sum())
    assert tokenizer.decode([271, 273], skip_special_tokens=True) == "<|tone|>"  # part of what is said


def test_the_processor_hears_and_speaks(made):
    to, assembly = made
    processor = qwen2_audio.load_processor(to)
    tokenizer = processor.tokenizer
    model = qwen2_audio.load_model(to)
    assert model.config.audio_token_id == tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    assert tokenizer("high<|AUDIO|>low")["input_ids"].count(model.config.audio_token_id) == 1
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert processor.chat_template == qwen2_audio.CHAT_TEMPLATE
    assert set(qwen2_audio.SPECIAL_TOKENS) <= set(tokenizer.get_vocab())
    wave = torch.randn(16_000).numpy()
    text = "<|audio_bos|><|AUDIO|><|audio_eos|>the tone is"
    inputs = processor(text=text, audio=wave, sampling_rate=16_000, return_tensors="pt")
    assert inputs["input_features"].shape == (1, MELS, 2 * POSITIONS)
    assert (inputs["input_ids"] == model.config.audio_token_id).sum() == POSITIONS // 2
    assert torch.isfinite(model(**inputs).logits).all()


def test_the_same_seed_makes_the_same_and_a_large_model_several_files(
    whisper, qwen, made, tmp_path, monkeypatch
):
    monkeypatch.setattr(shards.write, "__defaults__", (20_000,))
    assemble(whisper, qwen, tmp_path / "again", seed=0)
    assert len(list((tmp_path / "again").glob("model-0*-of-0*.safetensors"))) > 3
    again = shards.SavedTensors(tmp_path / "again")
    for name, tensor in load_file(made[0] / "model.safetensors").items():
        assert torch.equal(again[name], tensor), name
    loaded = qwen2_audio.load_model(tmp_path / "again").state_dict()
    for name, tensor in qwen2_audio.load_model(made[0]).state_dict().items():
        assert torch.equal(loaded[name], tensor), name


# -------------------------------------------------------------------------- refusals


def copy(folder, to):
    import shutil

    return shutil.copytree(folder, to)


def edit(folder, **changed):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))


def test_models_of_another_family_are_refused(whisper, qwen, tmp_path):
    with pytest.raises(CannotAssemble, match="type 'qwen2'; needed is a Whisper model"):
        assemble(qwen, qwen, tmp_path / "to")
    with pytest.raises(CannotAssemble, match="type 'whisper'; needed is a Qwen2-family"):
        assemble(whisper, whisper, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_feature_extractor_of_another_whisper_is_refused(whisper, qwen, tmp_path):
    wrong = copy(whisper, tmp_path / "wrong")
    WhisperFeatureExtractor(feature_size=80, chunk_length=1).save_pretrained(wrong)
    with pytest.raises(CannotAssemble, match="80 mel bins x 100 frames, its encoder takes 16 x 100"):
        assemble(wrong, qwen, tmp_path / "to")
    longer = copy(whisper, tmp_path / "longer")
    WhisperFeatureExtractor(feature_size=MELS, chunk_length=2).save_pretrained(longer)
    with pytest.raises(CannotAssemble, match="16 mel bins x 200 frames, its encoder takes 16 x 100"):
        assemble(longer, qwen, tmp_path / "to")


def test_a_window_is_cut_to_the_clips_and_hears_the_same(whisper, qwen, tmp_path):
    """Silence behind a clip changes nothing once it is masked: positions beyond the window are not missed."""
    longer = copy(whisper, tmp_path / "longer")
    weights = load_file(whisper / "model.safetensors")
    extended = torch.cat([weights[POSITIONS_NAME], torch.randn(POSITIONS, 32)])
    save_file({**weights, POSITIONS_NAME: extended}, longer / "model.safetensors", {"format": "pt"})
    edit(longer, max_source_positions=2 * POSITIONS)
    WhisperFeatureExtractor(feature_size=MELS, chunk_length=2).save_pretrained(longer)
    assembly = assemble(longer, qwen, tmp_path / "whole")
    cut = assemble(longer, qwen, tmp_path / "cut", clip_s=1)
    assert cut == assembly
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    differing = [name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])]
    assert differing == ["audio_tower.embed_positions.weight"]
    assert torch.equal(tensors[1][differing[0]], weights[POSITIONS_NAME])
    wave = 0.1 * torch.randn(int(0.7 * SAMPLE_RATE), generator=torch.Generator().manual_seed(0)).numpy()
    logits = []
    for name in ("whole", "cut"):
        processor = qwen2_audio.load_processor(tmp_path / name)
        assert processor.feature_extractor.chunk_length == (2 if name == "whole" else 1)
        clips = mel_features(processor.feature_extractor, [wave])
        audio_id = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
        ids = torch.tensor([[audio_id] * n_audio_tokens(clips[0].n_frames) + [5, 40]])
        model = qwen2_audio.load_model(tmp_path / name).eval()
        with torch.no_grad():
            mask = torch.ones_like(ids)
            logits.append(model(input_ids=ids, attention_mask=mask, **stack(clips)).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_a_window_beyond_the_positions_is_refused(whisper, qwen, tmp_path):
    with pytest.raises(CannotAssemble, match="clip_s is 2, but .* has positions for 1 s alone"):
        assemble(whisper, qwen, tmp_path / "to", clip_s=2)


def test_a_language_model_that_cannot_take_a_clip_or_has_no_tokenizer_is_refused(whisper, qwen, tmp_path):
    short = copy(qwen, tmp_path / "short")
    edit(short, max_position_embeddings=25)
    with pytest.raises(CannotAssemble, match="knows 25 positions .* the longest clip alone takes 25"):
        assemble(whisper, short, tmp_path / "to")
    mute = copy(qwen, tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    with pytest.raises(CannotAssemble, match="mute holds no tokenizer"):
        assemble(whisper, mute, tmp_path / "to")


def test_parts_of_random_weights_are_put_together_as_released_ones_are(tmp_path):
    tokenizer = qwen2_audio.build_tokenizer(["the tone is high or low"] * 5, 300)
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        random_parts.write_whisper(
            folder / "audio", d_model=32, heads=2, layers=2, mel_bins=MELS, clip_s=1, seed=seed
        )
        random_parts.write_qwen2(folder / "text", tokenizer, d_model=24, heads=2, layers=1, seed=seed)
        assembly = assemble(folder / "audio", folder / "text", folder / "made", seed=0)
        assert assembly.unused == []
        assert assembly.new_tokens == {}
    models = [qwen2_audio.load_model(tmp_path / seed / "made") for seed in "01"]
    tower = models[0].model.audio_tower
    whispers = sinusoids(*tower.embed_positions.weight.shape)
    ratio = tower.embed_positions.weight[1:] / whispers[1:]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.3))
    mel = torch.randn(1, MELS, 2 * POSITIONS, generator=torch.Generator().manual_seed(0))
    heard = [model.eval().model.audio_tower(mel).last_hidden_state for model in models]
    assert not torch.allclose(*heard, atol=0.1)
    louder = tower(3 * mel).last_hidden_state
    assert (louder - heard[0]).abs().mean() > 0.1  # the audio does not drown in biases and positions


def test_a_tensor_too_few_too_many_or_of_another_shape_is_refused(whisper, qwen, tmp_path):
    weights = load_file(qwen / "model.safetensors")
    broken = copy(qwen, tmp_path / "broken")
    gone = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    save_file({**gone, "model.extra": torch.zeros(1)}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CannotAssemble, match=r"text:model.extra; found in neither.*language_model.model.norm"
    ):
        assemble(whisper, broken, tmp_path / "to")
    save_file({**weights, "model.norm.weight": torch.ones(9)}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CannotAssemble, match=r"text:model.norm.weight is \(9,\), its config says \(24,\)"):
        assemble(whisper, broken, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_pickled_weights_are_refused(whisper, qwen, tmp_path):
    pickled = copy(qwen, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"does not hold model.safetensors.*pickled weights"):
        assemble(whisper, pickled, tmp_path / "to")


# -------------------------------------------------------------------------- the real size, by name and shape


def released_layout(audio_layers=32, text_layers=32):
    """Names of the released checkpoints' tensors, as their model.safetensors.index.json lists them."""
    tower = ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "embed_positions.weight"]
    tower += ["layer_norm.weight", "layer_norm.bias"]
    for layer in range(audio_layers):
        attention = ["k_proj.weight", "v_proj.weight", "v_proj.bias", "q_proj.weight", "q_proj.bias"]
        inside = [f"self_attn.{name}" for name in [*attention, "out_proj.weight", "out_proj.bias"]]
        for module in ("self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"):
            inside += [f"{module}.weight", f"{module}.bias"]
        tower += [f"layers.{layer}.{name}" for name in inside]
    text = ["embed_tokens.weight", "norm.weight"]
    for layer in range(text_layers):
        inside = [f"self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")]
        inside += ["self_attn.o_proj.weight", *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down"))]
        inside += ["input_layernorm.weight", "post_attention_layernorm.weight"]
        text += [f"layers.{layer}.{name}" for name in inside]
    return {
        *(f"audio_tower.{name}" for name in tower),
        *(f"language_model.model.{name}" for name in text),
        "language_model.lm_head.weight",
        "multi_modal_projector.linear.weight",
        "multi_modal_projector.linear.bias",
    }


def full_config():
    return Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(),
        text_config=Qwen2Config(
            vocab_size=156032,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
        ),
    )


def test_the_full_size_has_the_released_names_and_8_40_billion_parameters():
    tensors = expected_tensors(full_config())
    assert set(tensors) == released_layout()
    assert len(tensors) == 876
    total = sum(torch.Size(shape).numel() for shape in tensors.values())
    assert total == 8_397_094_912
    assert tensors["audio_tower.embed_positions.weight"] == (1500, 1280)
    assert tensors["language_model.lm_head.weight"] == (156032, 4096)
    assert tensors["multi_modal_projector.linear.weight"] == (4096, 1280)


def test_what_transformers_itself_writes_has_these_names(made, tmp_path):
    Qwen2AudioForConditionalGeneration.from_pretrained(made[0]).save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == released_layout(2, 2)
