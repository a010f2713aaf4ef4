"""Arithmetic on shapes against real models: counts exactly, activations against what autograd keeps."""

import dataclasses
import json

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
from align.planning.estimate import Job, Shape
from align.recipe.config.training import DPOConfig
from align.recipe.recipe import load
from align.training.freeze import PARTS
from align.training.recompute import compute_again

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
    found = estimate.parameters(shape)
    assert found.audio_tower == count(model.model.audio_tower)
    assert found.projector == count(model.model.multi_modal_projector)
    assert found.language_model == count(model.model.language_model) + count(model.lm_head)
    assert found.total == count(model)
    if shape == FULL:
        assert found.total == 8_397_094_912
        config = model.config.to_dict()
        released = {"audio_config": {}, "text_config": {"intermediate_size": 11008, "vocab_size": 156032}}
        assert estimate.shape_of_config(config) == estimate.shape_of_config(released) == FULL


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
    """The job of `packed_pairs`."""
    job = Job(2 * pairs, pairs, audio_tokens, (prompt + 2 * answer) / 2, packed=True, answers=2)
    return job._replace(**more)


def learning(parts, dtype=torch.float32):
    """A small model of which these parts learn."""
    model = build(SMALL).to(dtype)
    for part, names in PARTS.items():
        for name in names:
            model.get_submodule(name).requires_grad_(parts is None or part in parts)
    model.model.audio_tower.embed_positions.requires_grad_(False)
    return model.train()


def test_activations_are_what_autograd_keeps_of_stock_batches():
    job = Job(sequences=2, clips=2, audio_tokens=50, text_tokens=60, element_bytes=4)
    measured = kept_by_autograd(learning(None), stock_batch(2, 60))
    assert measured == pytest.approx(estimate.activations(SMALL, job), rel=0.1)
    frozen = job._replace(parts=("language_model",))
    measured = kept_by_autograd(learning(frozen.parts), stock_batch(2, 60))
    assert measured == pytest.approx(estimate.activations(SMALL, frozen), rel=0.1)


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
def test_activations_are_what_autograd_keeps_in_mixed_precision(strategy, dtype, parts):
    """DDP casts float32 weights in autocast; under ZeRO everything is bfloat16."""
    model = pack(learning(parts, dtype), "split")
    job = of_pairs(2, 40, 30, 20, parts=parts)
    measured = kept_by_autograd(model, packed_pairs(2, 40, 30, 20), autocast=strategy == "ddp")
    assert measured == pytest.approx(estimate.activations(SMALL, job, strategy), rel=0.1)


def test_activations_are_what_autograd_keeps_with_low_rank_updates():
    model = pack(build(SMALL).to(torch.bfloat16), "split")
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules=LORA)).train()
    job = of_pairs(2, 40, 30, 20, lora_rank=1)
    measured = kept_by_autograd(adapted.get_base_model(), packed_pairs(2, 40, 30, 20), autocast=True)
    assert measured == pytest.approx(estimate.activations(SMALL, job, "ddp"), rel=0.1)


@pytest.mark.parametrize("parts", [None, ("projector", "language_model")])
def test_layers_computed_again_keep_what_goes_into_them(parts):
    full = of_pairs(2, 40, 30, 20, parts=parts, element_bytes=4)
    last = float("inf")
    for n in range(estimate.layers(SMALL, full)):
        job = full._replace(recomputed=n)
        model = pack(learning(parts), "split")
        of_tower, of_language = estimate.recomputed(SMALL, job)
        assert of_tower + of_language == n
        compute_again(model.model.audio_tower.layers[:of_tower])
        compute_again(model.model.language_model.layers[:of_language])
        measured = kept_by_autograd(model, packed_pairs(2, 40, 30, 20))
        assert measured == pytest.approx(estimate.activations(SMALL, job), rel=0.1), n
        assert measured < last
        last = measured
    everything = full._replace(recomputed=estimate.layers(SMALL, full))
    assert estimate.activations(SMALL, everything) > estimate.activations(SMALL, job)  # not worth it


@pytest.mark.parametrize("seconds", [0.5, 1.0, 10.0, 29.99, 30.0, 45.0])
def test_audio_tokens_are_the_processors(seconds):
    exact = n_audio_tokens(int(min(seconds, 30) * 100))
    assert abs(FULL.audio_tokens(seconds) - exact) <= 1
    assert FULL.audio_tokens(30) == 750


def test_memory_by_hand():
    """Bytes per parameter as in the ZeRO paper's table, over four GPUs."""
    shape = FULL
    n = 8_397_094_912
    job = Job(sequences=0, clips=0, audio_tokens=0, text_tokens=0)
    ddp = estimate.memory(shape, job, "ddp", 4)
    assert (ddp.weights, ddp.gradients, ddp.optimizer, ddp.activations) == (6 * n, 8 * n, 8 * n, 0)
    assert estimate.memory(shape, job, "ddp", 1).gradients == 4 * n  # no buckets
    assert estimate.memory(shape, job._replace(element_bytes=4), "ddp", 1).weights == 4 * n  # no copies
    zero2 = estimate.memory(shape, job, "zero2", 4)
    assert (zero2.weights, zero2.gradients, zero2.optimizer) == (2 * n, n / 2, 3 * n)
    zero3 = estimate.memory(shape, job, "zero3", 4)
    assert (zero3.weights, zero3.gradients, zero3.optimizer) == (n / 2 + 2e9, n / 2, 3 * n)
    assert estimate.memory(shape, job, "zero3", 4, "all").weights == 2e9
    assert estimate.memory(shape, job, "zero2", 4, "optimizer").optimizer == 0
    tower = estimate.memory(shape, job._replace(parts=("audio_tower",)), "zero2", 4)
    assert tower.optimizer == 3 * 636_968_960
    assert tower.weights == 2 * n
    lora = estimate.memory(shape, job._replace(lora_rank=16), "ddp", 1)
    assert lora.weights == 2 * n + 6 * estimate.lora_parameters(shape, 16)
    with_reference = estimate.memory(shape, job._replace(with_reference=True), "zero2", 4)
    assert with_reference.weights == 4 * n
    assert estimate.checkpoint_bytes(shape, job, "zero3") == 14 * n  # float32 weights among the 12
    assert estimate.checkpoint_bytes(shape, job, "ddp") == 12 * n


def test_packed_clips_cost_what_they_last():
    whole = Job(sequences=2, clips=2, audio_tokens=250, text_tokens=0)
    packed = whole._replace(packed=True)  # 10 s: 500 frames of 1,500
    saved = 2 * 1000 * (32 * estimate.encoder_bytes(FULL, whole) + 5 * 1280 * 2)
    assert estimate.activations(FULL, whole) - estimate.activations(FULL, packed) == saved
    tower = estimate.parameters(FULL).audio_tower
    assert estimate.flops(FULL, whole) - estimate.flops(FULL, packed) == pytest.approx(6 * tower * 2 * 1000)


def test_flops_are_six_per_weight_and_token_and_eight_with_recomputing():
    shape = FULL._replace(audio_layers=0, positions=0)
    job = Job(sequences=1, clips=0, audio_tokens=0, text_tokens=64)
    embedding = shape.vocab * shape.width
    maps = estimate.parameters(shape).language_model - embedding
    assert estimate.flops(shape, job) == pytest.approx(6 * maps * 64, rel=0.01)
    assert estimate.flops(shape, job._replace(recomputed=shape.layers)) == pytest.approx(
        8 * maps * 64, rel=0.01
    )
    assert estimate.flops(shape, job._replace(lora_rank=8)) == pytest.approx(4 * maps * 64, rel=0.01)


# -------------------------------------------------------------------------- a recipe's


CORPUS = "stage: corpus\ncorpus: folder\ndir: recordings\nmax_duration_s: 30\n"
PRETRAIN = (
    "stage: pretrain\ncorpus: 0_corpus\nsteps: 1000\nbatch_size: 64\nlearning_rate: 1e-4\n"
    "trl: {gradient_accumulation_steps: 2, activation_checkpointing: true}\nmodel: "
)


def recipe(folder, model, **more):
    folder.mkdir(parents=True)
    files = {"0_corpus": CORPUS, "1_pretrain": PRETRAIN + model + "\n", **more}
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return load(folder)


def told(loaded, run, gpu_gb=80.0):
    return "\n".join(line for step in loaded.steps for line in budget.lines(step, loaded, run, gpu_gb))


def test_a_full_size_recipe_gets_a_table_and_hours_at_an_assumed_speed(tmp_path):
    loaded = recipe(tmp_path / "big", "{audio: openai/whisper-large-v3, text: Qwen/Qwen1.5-7B}")
    text = told(loaded, tmp_path / "runs")
    assert "1_pretrain: 8.39 B parameters, 8.39 B learn; up to 48,000 audio tokens a step" in text
    assert "8 GPUs; sequences at a time: 32," in text  # 64 in 2 passes of the one process there is
    assert "(H100) on each of 1 GPU: assumed" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.endswith("80 GB")}
    assert rows["ddp"].endswith("does not fit 80 GB")
    assert rows["zero3"].endswith("  fits 80 GB")
    assert rows["LoRA"].endswith("  fits 80 GB")
    assert "assumed, not measured" in text
    assert "does not fit 10 GB" in told(loaded, tmp_path / "runs", 10.0).splitlines()[5]


def test_what_the_recipe_chose_is_marked_and_warned_of_where_it_cannot_fit(tmp_path):
    spread = "\nhardware: {workers: 4, strategy: ddp}\ntrain: [audio_tower, projector]"
    loaded = recipe(tmp_path / "a", "Qwen/Qwen2-Audio-7B" + spread)
    text = told(loaded, tmp_path)
    tower = estimate.parameters(FULL)
    assert f"{(tower.audio_tower + tower.projector) / 1e6:.2f} M learn" in text
    assert "on 4 GPUs; sequences at a time: 8," in text
    assert [line.split()[0] for line in text.splitlines() if line.endswith("<- the recipe's")] == ["ddp"]
    assert "WARNING" not in text
    tight = told(loaded, tmp_path, 20.0)
    assert "WARNING: the recipe's ddp on 4 GPUs cannot fit. Take strategy: zero3" in tight
    spread = "\nhardware: {workers: 4, strategy: zero3, offload: optimizer}"
    offloaded = told(recipe(tmp_path / "b", "Qwen/Qwen2-Audio-7B" + spread), tmp_path)
    chosen = next(line for line in offloaded.splitlines() if line.endswith("<- the recipe's"))
    assert chosen.split()[3] == "0.0"  # the optimizer is in host memory


def test_shapes_on_disk_are_read_and_unknown_ones_said_to_be(tmp_path):
    sft = "stage: sft\npolicy: 1_pretrain\ncorpus: 0_corpus\nsteps: 5\nbatch_size: 2\nlearning_rate: 1e-5\n"
    (tmp_path / "policy").mkdir()
    config = {"audio_config": {"encoder_layers": 2}, "text_config": {"num_hidden_layers": 1}}
    (tmp_path / "policy" / "config.json").write_text(json.dumps(config))
    loaded = recipe(tmp_path / "a", str(tmp_path / "policy"), **{"2_sft": sft})
    expected = Shape(audio_layers=2, layers=1)
    assert budget.shape_of("2_sft", loaded) == expected
    assert f"2_sft: {estimate.parameters(expected).total / 1e9:.2f} B parameters" in told(loaded, tmp_path)
    unknown = recipe(tmp_path / "b", "someone/their-model")
    assert told(unknown, tmp_path).startswith("1_pretrain: the shape of its model is unknown")


def test_of_a_packed_pair_the_clip_counts_once(tmp_path):
    dpo = "stage: dpo\npolicy: 1_pretrain\npairs: 2_pairs\ncorpus: 0_corpus\n"
    dpo += "learning_rate: 1e-6\nbatch_size: 32\n"
    shape = "{d_model: 64, heads: 2, clip_s: 3, hop_length: 320}"  # 37 tokens in 3 s
    loaded = recipe(tmp_path / "a", shape)
    for packed, tokens in ((True, 32 * 37), (False, 64 * 37)):
        step = loaded.steps[1]
        config = DPOConfig.model_validate({**yaml.safe_load(dpo), "packed": packed})
        told_ = list(budget.lines(dataclasses.replace(step, config=config), loaded, tmp_path, 80.0))
        assert f"up to {tokens:,} audio tokens a step" in told_[0]


def test_a_recipe_that_does_not_plan_is_planned_for_its_memory(tmp_path):
    """By hand: a token keeps 32 x 219,136 + 24,576 bytes; a pair has 750 + 2 x 256 tokens: 8.88 GB."""
    loaded = recipe(tmp_path / "a", "Qwen/Qwen2-Audio-7B")
    dpo = "stage: dpo\npolicy: 1_pretrain\npairs: 2_pairs\ncorpus: 0_corpus\nlearning_rate: 1e-6\n"
    dpo += "batch_size: 64\ntrain: [projector, language_model]\n"

    def lines(gpu_gb, **more):
        config = {**yaml.safe_load(dpo), "hardware": {"workers": 8, "strategy": "zero3"}, **more}
        step = dataclasses.replace(loaded.steps[1], config=DPOConfig.model_validate(config))
        return "\n".join(budget.lines(step, loaded, tmp_path, gpu_gb))

    plan = (
        "plan for zero3 on 8 GPUs: {} of {}: 8 would keep 71.0 GB of activations, {} GB may be used for them"
    )
    assert plan.format("2 passes", "4 pairs", "49.4") in lines(80.0)
    assert "sequences at a time: 8," in lines(80.0)
    assert "1 pass of 8 pairs" in lines(141.0)
    tight = lines(80.0, hardware={"workers": 8, "strategy": "zero3", "memory_gb": 30})
    assert "8 passes of 1 pair, 5 of 32 layers are computed again" in tight
    assert "of 5 layers computed again" in tight
    assert "does not fit 21.0 GB: weights" in lines(21.0)
    assert "plan for" not in lines(80.0, trl={"gradient_accumulation_steps": 2})


def test_a_small_recipe_gets_a_line_and_the_speed_that_was_measured(tmp_path):
    loaded = recipe(tmp_path / "small", "{d_model: 64, heads: 2}")
    text = told(loaded, tmp_path / "run")
    assert len(text.splitlines()) == 1
    assert "0." in text.partition(" M parameters")[0]
    (tmp_path / "run" / "1_pretrain").mkdir(parents=True)
    manifest = {"metrics": {"examples_per_s": 8.0}}
    (tmp_path / "run" / "1_pretrain" / "manifest.json").write_text(json.dumps(manifest))
    assert "  2.2 h at the speed measured in" in told(loaded, tmp_path / "run")  # 64,000 examples


def test_the_shape_of_a_small_model_is_that_of_the_one_which_is_built(tmp_path, tiny):
    from align.models.qwen2_audio import model as qwen2_audio

    size = len(qwen2_audio.load_processor(tiny.policy).tokenizer)
    model = "{d_model: 32, heads: 2, audio_layers: 1, text_layers: 1, mel_bins: 32, clip_s: 1}"
    shape = budget.shape_of("1_pretrain", recipe(tmp_path / "a", model))._replace(vocab=size)
    assert estimate.parameters(shape).total == qwen2_audio.load_model(tiny.policy).num_parameters()
