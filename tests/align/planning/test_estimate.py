"""Arithmetic on shapes against real models: counts exactly, activations as a bound of what autograd keeps."""

import dataclasses
import json
import re

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
)

from align.models.qwen2_audio.clips import n_audio_tokens, pack_rows
from align.models.qwen2_audio.packed import pack
from align.planning import budget, estimate
from align.planning.estimate import Shape, UnknownShape, Workload
from align.recipe.config.alignment import DPOConfig
from align.recipe.recipe import load
from align.training.recompute import checkpoint_layers
from align.training.tuning import PARTS
from preference_data import store
from preference_data.schema import AudioClip

SMALL = Shape(16, 64, 3, 256, 100, 300, 128, 4, 344, 4, 2, 160)
FULL = Shape()
LORA = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj|model\.multi_modal_projector\.linear"


def build(shape):
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=shape.mel_bins,
        d_model=shape.audio_width,
        encoder_layers=shape.audio_layers,
        encoder_attention_heads=4,
        encoder_ffn_dim=shape.audio_ffn,
        max_source_positions=shape.positions,
    )
    text = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
    )
    return Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=1)
    )


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("shape", [SMALL, FULL], ids=["small", "full"])
def test_parameters_are_those_of_the_model(shape):
    with torch.device("meta"):
        model = build(shape)
    counts = estimate.parameters(shape)
    assert counts.audio_tower == count(model.model.audio_tower)
    assert counts.projector == count(model.model.multi_modal_projector)
    assert counts.language_model == count(model.model.language_model) + count(model.lm_head)
    assert counts.total == count(model)
    if shape == FULL:
        assert counts.total == 8_397_094_912
        config = model.config.to_dict()
        released = {"audio_config": {}, "text_config": {"intermediate_size": 11008, "vocab_size": 156032}}
        assert estimate.shape_of_config(config, "x") == estimate.shape_of_config(released, "x") == FULL


def test_lora_parameters_are_those_of_peft():
    adapted = get_peft_model(build(SMALL), LoraConfig(r=3, target_modules=LORA))
    learn = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert estimate.lora_parameters(SMALL, 3) == learn


def kept_by_autograd(model, batch, autocast=False):
    """Bytes of everything that autograd keeps of a forward pass, weights and casts of them aside.

    Each storage once; with what goes into layers that are computed again, which checkpointing holds itself.
    """
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    maps = {tuple(p.shape) for p in model.parameters() if p.ndim > 1}
    maps |= {(columns, rows) for rows, columns in (shape for shape in maps if len(shape) == 2)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in maps:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def keep_input(_, args):
        keep(args[0])

    again = [module for module in model.modules() if "forward" in module.__dict__]
    hooks = [module.register_forward_pre_hook(keep_input) for module in again]
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        out = model.model(
            **batch, use_cache=False
        )  # held, so that no storage is freed and its address reused
    assert torch.isfinite(out.last_hidden_state).all()
    for hook in hooks:
        hook.remove()
    return sum(kept.values())


def stock_batch(clips, text_tokens):
    """Rows of a whole clip and a text each."""
    ids = torch.full((clips, SMALL.positions // 2 + text_tokens), 5)
    ids[:, : SMALL.positions // 2] = 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": torch.randn(clips, SMALL.mel_bins, 2 * SMALL.positions),
        "feature_attention_mask": torch.ones(clips, 2 * SMALL.positions, dtype=torch.long),
    }


def packed_pairs(pairs, audio_tokens, prompt, answer):
    """Each pair with a clip of its own; prompts and answers of so many tokens."""
    draw = torch.Generator().manual_seed(0)

    def words(n):
        return torch.randint(10, SMALL.vocab, (n,), generator=draw)

    prompts = [torch.cat([torch.full((audio_tokens,), 1), words(prompt)]) for _ in range(pairs)]
    rows = [torch.cat([own, words(answer)]) for _ in range(2) for own in prompts]
    heard = [[pair] for _ in range(2) for pair in range(pairs)]
    return {
        "input_ids": torch.stack(rows),
        "input_features": torch.randn(pairs, SMALL.mel_bins, 4 * audio_tokens + 2),
        "packed": pack_rows(rows, heard, [4 * audio_tokens] * pairs, audio_token_id=1),
    }


def of_pairs(pairs, audio_tokens, prompt, answer, **more):
    """The workload of `packed_pairs`."""
    text = (prompt + 2 * answer) / 2
    return Workload(2 * pairs, pairs, audio_tokens, text, packed=True, completions=2, **more)


def assert_bounds(load, measured):
    """The estimate is at most 1.4 times what is kept, and not a tenth below it."""
    assert measured <= 1.1 * estimate.activations(SMALL, load)
    assert estimate.activations(SMALL, load) <= 1.4 * measured


def learning(parts, dtype=torch.float32):
    """A small model of which these parts learn."""
    model = build(SMALL).to(dtype)
    for part, names in PARTS.items():
        for name in names:
            model.get_submodule(name).requires_grad_(parts is None or part in parts)
    model.model.audio_tower.embed_positions.requires_grad_(False)
    return model.train()


def test_activations_bound_what_autograd_keeps_of_stock_batches():
    load = Workload(sequences=2, clips=2, audio_tokens=50, text_tokens=60, element_bytes=4)
    assert_bounds(load, kept_by_autograd(learning(None), stock_batch(2, 60)))
    frozen = load._replace(parts=("language_model",))
    assert_bounds(frozen, kept_by_autograd(learning(frozen.parts), stock_batch(2, 60)))


@pytest.mark.parametrize(
    ("strategy", "dtype", "parts"),
    [
        ("ddp", torch.float32, None),
        ("ddp", torch.float32, ("projector", "language_model")),
        ("zero3", torch.bfloat16, None),
        ("zero3", torch.bfloat16, ("projector", "language_model")),
        ("zero3", torch.bfloat16, ("audio_tower", "projector")),
    ],
)
def test_activations_bound_what_autograd_keeps_in_mixed_precision(strategy, dtype, parts):
    """DDP casts float32 weights in autocast; under ZeRO everything is bfloat16."""
    model = pack(learning(parts, dtype), "split")
    measured = kept_by_autograd(model, packed_pairs(2, 40, 30, 20), autocast=strategy == "ddp")
    assert_bounds(of_pairs(2, 40, 30, 20, parts=parts), measured)


def test_activations_bound_what_autograd_keeps_with_low_rank_updates():
    model = pack(build(SMALL).to(torch.bfloat16), "split")
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules=LORA)).train()
    measured = kept_by_autograd(adapted.get_base_model(), packed_pairs(2, 40, 30, 20), autocast=True)
    assert_bounds(of_pairs(2, 40, 30, 20, lora_rank=1), measured)


@pytest.mark.parametrize("parts", [None, ("projector", "language_model")])
def test_checkpointed_layers_keep_their_input(parts):
    model = pack(learning(parts), "split")
    checkpoint_layers(model.model.audio_tower.layers if parts is None else [])
    checkpoint_layers(model.model.language_model.layers[:-1])
    load = of_pairs(2, 40, 30, 20, parts=parts, element_bytes=4, checkpointed=True)
    assert_bounds(load, kept_by_autograd(model, packed_pairs(2, 40, 30, 20)))


@pytest.mark.parametrize("seconds", [0.5, 1.0, 10.0, 29.99, 30.0, 45.0])
def test_audio_tokens_are_the_processors(seconds):
    exact = n_audio_tokens(int(min(seconds, 30) * 100))
    assert abs(FULL.audio_tokens(seconds) - exact) <= 1
    assert FULL.audio_tokens(30) == 750


def test_memory_by_hand():
    """Bytes per parameter as in the ZeRO paper's table, over four GPUs, but for float32 gradients."""
    shape = FULL
    n = 8_397_094_912
    load = Workload(sequences=0, clips=0, audio_tokens=0, text_tokens=0)
    assert estimate.states_of(shape, load, "ddp", 4) == (6 * n, 8 * n, 8 * n)
    assert estimate.activations(shape, load) == 0
    assert estimate.states_of(shape, load, "ddp", 1).gradients == 4 * n  # no buckets
    assert estimate.states_of(shape, load._replace(element_bytes=4), "ddp", 1).weights == 4 * n  # no copies
    assert estimate.states_of(shape, load, "zero2", 4) == (2 * n, n, 3 * n)
    assert estimate.states_of(shape, load, "zero3", 4) == (n / 2 + 2e9, n, 3 * n)
    assert estimate.states_of(shape, load, "zero3", 4, "all").weights == 2e9
    assert estimate.states_of(shape, load, "zero2", 4, "optimizer").optimizer == 0
    tower = estimate.states_of(shape, load._replace(parts=("audio_tower",)), "zero2", 4)
    assert tower.optimizer == 3 * 636_968_960
    assert tower.weights == 2 * n
    lora = estimate.states_of(shape, load._replace(lora_rank=16), "ddp", 1)
    assert lora.weights == 2 * n + 6 * estimate.lora_parameters(shape, 16)
    with_reference = estimate.states_of(shape, load._replace(with_reference=True), "zero2", 4)
    assert with_reference.weights == 4 * n


def test_checkpoints_hold_what_learns():
    load, n = Workload(sequences=0, clips=0, audio_tokens=0, text_tokens=0), 8_397_094_912
    assert estimate.checkpoint_bytes(FULL, load, "ddp") == 12 * n  # float32 weights and two moments
    assert estimate.checkpoint_bytes(FULL, load, "zero3") == 14 * n  # float32 weights among DeepSpeed's 12
    assert estimate.checkpoint_bytes(FULL, load, "zero2") == 16 * n
    frozen = load._replace(parts=("audio_tower",))
    assert estimate.checkpoint_bytes(FULL, frozen, "ddp") == 12 * 636_968_960


def test_packed_clips_cost_what_they_last():
    whole = Workload(sequences=2, clips=2, audio_tokens=250, text_tokens=0)
    packed = whole._replace(packed=True)  # 10 s: 500 frames of 1,500
    saved = 2 * 1000 * (32 * estimate.encoder_bytes(FULL, whole) + 5 * 1280 * 2)
    assert estimate.activations(FULL, whole) - estimate.activations(FULL, packed) == saved
    tower = estimate.parameters(FULL).audio_tower
    assert estimate.flops(FULL, whole) - estimate.flops(FULL, packed) == pytest.approx(6 * tower * 2 * 1000)


def test_flops_are_six_per_weight_and_token_and_eight_with_checkpointing():
    shape = FULL._replace(audio_layers=0, positions=0)
    load = Workload(sequences=1, clips=0, audio_tokens=0, text_tokens=64)
    embedding = shape.vocab * shape.width
    maps = estimate.parameters(shape).language_model - embedding
    assert estimate.flops(shape, load) == pytest.approx(6 * maps * 64, rel=0.01)
    assert estimate.flops(shape, load._replace(checkpointed=True)) == pytest.approx(8 * maps * 64, rel=0.01)
    assert estimate.flops(shape, load._replace(lora_rank=8)) == pytest.approx(4 * maps * 64, rel=0.01)


# -------------------------------------------------------------------------- a recipe's


CORPUS = "stage: corpus\ncorpus: folder\ndir: recordings\nmax_duration_s: "
PRETRAIN = (
    "stage: pretrain\ncorpus: 0_corpus\nsteps: 1000\nbatch_size: 64\nlearning_rate: 1e-4\n"
    "trl: {gradient_accumulation_steps: 2, activation_checkpointing: true}\nmodel: "
)


def recipe(folder, model, longest_s=30, **more):
    folder.mkdir(parents=True)
    files = {"0_corpus": f"{CORPUS}{longest_s}\n", "1_pretrain": PRETRAIN + model + "\n", **more}
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return load(folder)


def budget_of(loaded, run, gpu_gb=80.0):
    return "\n".join(line for step in loaded.steps for line in budget.lines(step, loaded, run, gpu_gb))


def test_a_full_size_recipe_gets_a_table_and_hours_at_an_assumed_speed(tmp_path):
    loaded = recipe(tmp_path / "big", "{audio: openai/whisper-large-v3, text: Qwen/Qwen1.5-7B}")
    text = budget_of(loaded, tmp_path / "runs")
    assert "1_pretrain: 8.39 B parameters, 8.39 B learn (all parts); up to 48,000 audio tokens a step" in text
    assert "GB per GPU on 8 GPUs; activations of one example" in text
    assert "layers checkpointed:" in text
    assert "(H100) on each of 1 GPU: assumed" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.endswith("80 GB")}
    assert rows["ddp"].endswith("does not fit 80 GB")
    assert rows["zero3"].endswith("8 at a time in 80 GB")
    assert rows["LoRA"].endswith("8 at a time in 80 GB")
    assert "assumed, not measured" in text
    assert "does not fit 10 GB" in budget_of(loaded, tmp_path / "runs", 10.0).splitlines()[5]


def test_what_the_recipe_chose_is_marked_and_warned_of_where_it_cannot_fit(tmp_path):
    spread = "\nhardware: {workers: 4, strategy: ddp}\ntrain: [audio_tower, projector]"
    loaded = recipe(tmp_path / "a", "Qwen/Qwen2-Audio-7B" + spread)
    text = budget_of(loaded, tmp_path)
    tower = estimate.parameters(FULL)
    assert f"{(tower.audio_tower + tower.projector) / 1e6:.2f} M learn" in text
    assert "on 4 GPUs; activations of one example" in text
    assert [line.split()[0] for line in text.splitlines() if line.endswith("<- the recipe's")] == ["ddp"]
    assert "WARNING" not in text
    tight = budget_of(loaded, tmp_path, 20.0)
    assert "WARNING: the recipe's ddp on 4 GPUs cannot fit. Take strategy: zero3" in tight
    spread = "\nhardware: {workers: 4, strategy: zero3, offload: optimizer}"
    offloaded = budget_of(recipe(tmp_path / "b", "Qwen/Qwen2-Audio-7B" + spread), tmp_path)
    chosen = next(line for line in offloaded.splitlines() if line.endswith("<- the recipe's"))
    assert chosen.split()[3] == "0.0"  # the optimizer is in host memory


FROZEN = "\ntrain: [projector, language_model]\naugment: {gain: 0, time_mask: 0, frequency_mask: 0}"


def test_outputs_of_a_frozen_tower_are_counted_in_bytes_and_time(tmp_path):
    """By hand: 750 vectors of 1280 bfloat16 for 30 s; 637 M weights x 2 x 1500 frames at 346 TFLOP/s."""
    whole = recipe(tmp_path / "a", "{audio: openai/whisper-large-v3, text: Qwen/Qwen1.5-7B}" + FROZEN)
    text = budget_of(whole, tmp_path / "runs")
    assert "are kept on disk: 1.9 GB for 1,000 clips of 30 s (how many there are is not known yet)" in text
    assert "A run takes 5.5 s to encode them once" in text
    own = [
        AudioClip(
            id=f"{i}", path=f"{i}.wav", split="train" if i < 40 else "dev", sha256="0" * 64, duration_s=2.0
        )
        for i in range(50)
    ]
    little = FROZEN + "\nhardware: {tower_outputs_gb: 0.192}"
    text = budget_of(recipe(tmp_path / "little", "Qwen/Qwen2-Audio-7B" + little), tmp_path / "none")
    assert "are kept on disk for 100 of 1,000 clips" in text
    assert "hardware.tower_outputs_gb is 0.192, and all of them take 1.9 GB" in text
    counted = "5.1 MB for 40 clips of 2 s, at most a tenth of what is free"
    for folder in (tmp_path / "runs" / "0_corpus", tmp_path / "ready"):
        folder.mkdir(parents=True)
        store.write(folder / "clips.jsonl", own)
    assert counted in budget_of(whole, tmp_path / "runs")
    sources = f"stage: corpus\ncorpus: mixture\nsources: [{{folder: '{tmp_path / 'ready'}'}}]\n"
    mixed = recipe(
        tmp_path / "b", "Qwen/Qwen2-Audio-7B" + FROZEN, **{"0_corpus": sources + "max_duration_s: 30\n"}
    )
    assert counted in budget_of(mixed, tmp_path / "none")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ("", "the audio tower learns"),
        ("\ntrain: [projector]", "features are augmented"),
        (f"{FROZEN}\npacked: false", "packed: false encodes clips in transformers' own way"),
        (f"{FROZEN}\nhardware: {{workers: 2, strategy: zero3}}", "zero3 divides the tower"),
        (f"{FROZEN}\nhardware: {{tower_outputs_gb: 0}}", "hardware.tower_outputs_gb is 0"),
    ],
)
def test_why_outputs_of_the_tower_are_not_kept_is_said(tmp_path, changed, reason):
    text = budget_of(recipe(tmp_path / "a", "Qwen/Qwen2-Audio-7B" + changed), tmp_path)
    assert f"outputs of the audio tower are not kept on disk: {reason}" in text


def test_drawing_completions_is_not_left_out(tmp_path):
    grpo = "stage: grpo\npolicy: Qwen/Qwen2-Audio-7B\ncorpus: 0_corpus\nreward: {choice: {}}\nsteps: 100\n"
    grpo += "batch_size: 16\nlearning_rate: 1e-6\nbeta: 0.04\nmax_new_tokens: 256\niterations: 2\n"
    spread = "hardware: {workers: 8, strategy: zero2}\n"
    text = budget_of(recipe(tmp_path / "a", "Qwen/Qwen2-Audio-7B", **{"3_grpo": grpo + spread}), tmp_path)
    own = text[text.index("3_grpo:") :]
    assert "12,800 times 16.8 GB of weights are read, 1.1 min at 3.35 TB/s" in own
    rows = {line.split()[0]: line.split() for line in own.splitlines() if " in 80 GB" in line}
    assert rows["zero2"][1] == "33.6"  # with the reference
    assert rows["LoRA"][3] == "17.0"  # which is the policy without its updates


def test_shapes_on_disk_are_read_and_unknown_ones_said_to_be(tmp_path):
    sft = "stage: sft\npolicy: 1_pretrain\ncorpus: 0_corpus\nsteps: 5\nbatch_size: 2\nlearning_rate: 1e-5\n"
    (tmp_path / "policy").mkdir()
    text_config = {"num_hidden_layers": 1, "vocab_size": 156032, "intermediate_size": 11008}
    config = {"audio_config": {"encoder_layers": 2}, "text_config": text_config}
    (tmp_path / "policy" / "config.json").write_text(json.dumps(config))
    loaded = recipe(tmp_path / "a", str(tmp_path / "policy"), **{"2_sft": sft})
    expected = Shape(audio_layers=2, layers=1)
    assert budget.shape_of("2_sft", loaded) == expected
    assert f"2_sft: {estimate.parameters(expected).total / 1e9:.2f} B parameters" in budget_of(
        loaded, tmp_path
    )
    unknown = recipe(tmp_path / "b", "someone/their-model")
    assert budget_of(unknown, tmp_path).startswith(
        "1_pretrain: no estimate: the shape of someone/their-model is unknown until it is on disk"
    )


def test_of_a_packed_pair_the_clip_counts_once(tmp_path):
    dpo = "stage: dpo\npolicy: 1_pretrain\npairs: 2_pairs\ncorpus: 0_corpus\n"
    dpo += "learning_rate: 1.0e-6\nbatch_size: 32\n"
    shape = "{d_model: 64, heads: 2, clip_s: 3, hop_length: 320}"  # 37 tokens in 3 s
    loaded = recipe(tmp_path / "a", shape, longest_s=3)
    for packed, tokens in ((True, 32 * 37), (False, 64 * 37)):
        step = loaded.steps[1]
        config = DPOConfig.model_validate({**yaml.safe_load(dpo), "packed": packed})
        rows = list(budget.lines(dataclasses.replace(step, config=config), loaded, tmp_path, 80.0))
        assert f"up to {tokens:,} audio tokens a step" in rows[0]


@pytest.mark.parametrize(
    ("whisper", "qwen", "missing"),
    [
        ({"encoder_layers": 2}, None, "num_mel_bins"),
        ({"num_mel_bins": 80, "encoder_layers": 2}, None, "d_model"),
        (None, {"hidden_size": 64}, "vocab_size"),
    ],
)
def test_a_config_without_a_field_is_not_taken_for_the_7b(tmp_path, whisper, qwen, missing):
    refs = {"audio": "openai/whisper-large-v3", "text": "Qwen/Qwen1.5-7B"}
    for part, config in (("audio", whisper), ("text", qwen)):
        if config is not None:
            (tmp_path / part).mkdir()
            (tmp_path / part / "config.json").write_text(json.dumps(config))
            refs[part] = str(tmp_path / part)
    loaded = recipe(tmp_path / "a", f"{{audio: '{refs['audio']}', text: '{refs['text']}'}}")
    folder = tmp_path / ("text" if whisper is None else "audio")
    text = budget_of(loaded, tmp_path)
    assert text.startswith(f"1_pretrain: no estimate: the config.json of {folder} has no field {missing}")
    assert "8.39 B" not in text


def test_a_policy_that_is_not_a_qwen2_audio_has_no_shape():
    with pytest.raises(UnknownShape, match="has no field audio_config"):
        estimate.shape_of_config({"model_type": "qwen2", "hidden_size": 64}, "x")
    with pytest.raises(UnknownShape, match="has no field intermediate_size"):
        estimate.shape_of_config({"audio_config": {}, "text_config": {"vocab_size": 156032}}, "x")


def test_how_many_examples_fit_at_a_time(tmp_path):
    """By hand: a token of a pair keeps 32 x 260,096 + 32,768 bytes, in 750 + 2 x 256 tokens: 10.5 GB.

    Over 8 GPUs ZeRO-3 holds 2 + 2 n/8 of weights, 4 n/8 of gradients, 12 n/8 of optimizer and 3: 22.6 GB.
    """
    loaded = recipe(tmp_path / "a", "Qwen/Qwen2-Audio-7B")
    dpo = "stage: dpo\npolicy: 1_pretrain\npairs: 2_pairs\ncorpus: 0_corpus\nlearning_rate: 1.0e-6\n"
    dpo += "batch_size: 64\ntrain: [projector, language_model]\n"

    def row_of(gpu_gb, **more):
        config = {**yaml.safe_load(dpo), "hardware": {"workers": 8, "strategy": "zero3"}, **more}
        step = dataclasses.replace(loaded.steps[1], config=DPOConfig.model_validate(config))
        lines = budget.lines(step, loaded, tmp_path, gpu_gb)
        return next(line for line in lines if line.endswith("<- the recipe's"))

    load = Workload(2, 1, 750, 256, ("projector", "language_model"), packed=True, completions=2)
    assert estimate.activations(FULL, load) == 1262 * (32 * 260_096 + 32_768)
    assert "  5 at a time in 80 GB" in row_of(80.0)
    assert "  8 at a time in 141 GB" in row_of(141.0)
    tight = {"workers": 8, "strategy": "zero3", "memory_gb": 30}
    assert "  1 with layers checkpointed in 30 GB" in row_of(80.0, hardware=tight)
    assert "does not fit 21 GB" in row_of(21.0)


def test_a_small_recipe_gets_a_line_and_the_speed_that_was_measured(tmp_path):
    loaded = recipe(tmp_path / "small", "{d_model: 64, heads: 2}", longest_s=3)
    text = budget_of(loaded, tmp_path / "run")
    assert len(text.splitlines()) == 3
    assert "0." in text.partition(" M parameters")[0]
    assert re.search(r"\n  on a CPU about 1\.\d GB of memory and \d+\.\d min, at 50 GFLOP/s", text)
    (tmp_path / "run" / "1_pretrain").mkdir(parents=True)
    path = tmp_path / "run" / "1_pretrain" / "manifest.json"
    path.write_text("[]")
    assert budget_of(loaded, tmp_path / "run") == text
    path.write_text(json.dumps({"output_digest": "d", "metrics": {"examples_per_s": 8.0}}))
    assert "  2.2 h at the speed measured in" in budget_of(loaded, tmp_path / "run")  # 64,000 examples


def test_of_a_frozen_tower_it_is_said_what_learns_and_who_says_so(tmp_path):
    sft = "stage: sft\npolicy: 1_pretrain\ncorpus: 0_corpus\nsteps: 5\nbatch_size: 2\nlearning_rate: 1e-5\n"
    model = "{audio: {d_model: 64, heads: 2, layers: 1}, text: {d_model: 32, heads: 2, layers: 1}, clip_s: 4}"
    loaded = recipe(
        tmp_path / "a", f"{model}\ntrain: [projector, language_model]", longest_s=3, **{"2_sft": sft}
    )
    shape = budget.shape_of("2_sft", loaded)
    assert (shape.positions, shape.audio_width, shape.width, shape.vocab) == (200, 64, 32, 640)
    text = budget_of(loaded, tmp_path / "run")
    assert "learn (projector, language_model); up to 4,800 audio tokens a step" in text
    assert "learn (projector, language_model, as in 1_pretrain); up to 150 audio tokens a step" in text


def test_the_shape_of_a_small_model_is_that_of_the_one_which_is_built(tmp_path, tiny):
    from align.models.qwen2_audio import model as qwen2_audio

    size = len(qwen2_audio.load_processor(tiny.policy).tokenizer)
    model = "{d_model: 32, heads: 2, audio_layers: 1, text_layers: 1, mel_bins: 32, clip_s: 1}"
    shape = budget.shape_of("1_pretrain", recipe(tmp_path / "a", model, longest_s=1))._replace(vocab=size)
    assert estimate.parameters(shape).total == qwen2_audio.load_model(tiny.policy).num_parameters()
