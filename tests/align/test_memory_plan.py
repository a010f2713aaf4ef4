"""How a step is divided into passes: by hand, against what autograd keeps, and in real training stages."""

import copy

import pytest
import torch
from peft import get_peft_model

from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.clips import n_audio_tokens
from align.models.qwen2_audio.packed import pack
from align.planning import estimate, memory_plan
from align.planning.estimate import Job, Shape
from align.planning.memory_plan import MARGIN, plan
from align.run_folder.artifacts import read_metrics
from align.stages.tuning import tuning_of
from align.training.collate import PreferenceCollator
from align.training.lengths import ClipTokens, Lengths
from align.training.lora import LoRA
from align.training.memory import job_of
from align.training.order import Examples, Part
from align.training.recompute import compute_again
from align.training.rows import chat_row
from align.training.tuning import Tuning
from preference_data import store
from preference_data.dataset.dataset import Dataset
from preference_data.schema import AudioClip, Chat, PreferencePair
from tests.align import tiny_training
from tests.align.ragged_batch import Rows, gradients, pairs, small_model, worst
from tests.align.test_estimate import SMALL, kept_by_autograd, learning, of_pairs, packed_pairs

HAND = Shape(width=10, heads=1, kv_heads=1, ffn=20, layers=3, vocab=50, audio_width=8, audio_layers=2)
TEXT = Job(1, 0, 0, text_tokens=100, parts=("language_model",), element_bytes=4)
"""Per token and layer 2 norms x 2 x 10 x 4 bytes, 2 inputs, 2 + 2 of attention (x 10) and 4 x 20 of the MLP,
x 4 bytes: 160 + 560 = 720. Into a layer go 40, of the last norm stay 80."""
WHOLE, ONE_AGAIN, TWO_AGAIN = 100 * (3 * 720 + 80), 100 * (40 + 2 * 720 + 80), 100 * (2 * 40 + 720 + 80)


def planned(room, example=TEXT, shape=HAND, examples=8, strategy="ddp"):
    standing = estimate.memory(shape, example, strategy, 1).standing
    return plan(shape, example, strategy, 1, "none", examples=examples, available=standing + MARGIN * room)


@pytest.mark.parametrize(
    ("room", "passes", "examples", "again"),
    [
        (8 * WHOLE + 1, 1, 8, 0),
        (8 * WHOLE - 1, 2, 4, 0),
        (3.9 * WHOLE, 4, 2, 0),
        (WHOLE + 1, 8, 1, 0),
        (WHOLE - 1, 8, 1, 1),
        (ONE_AGAIN + 1, 8, 1, 1),
        (ONE_AGAIN - 1, 8, 1, 2),
        (TWO_AGAIN + 1, 8, 1, 2),
    ],
)
def test_plans_by_hand(room, passes, examples, again):
    made = planned(room)
    assert (made.passes, made.examples, made.recomputed) == (passes, examples, again)
    assert made.fits
    assert made.memory.activations <= made.room == pytest.approx(room)


def test_what_does_not_fit_is_said_to_be_so_with_advice_and_tried():
    made = planned(TWO_AGAIN - 1)
    assert not made.fits
    assert (made.passes, made.examples, made.recomputed) == (8, 1, 2)
    assert made.why.startswith("does not fit 3.0 GB")
    assert "2 of 3 layers are computed again. Take strategy: zero3, more workers, or lora." in made.why


def test_a_plan_says_why():
    pair = TEXT._replace(sequences=2)
    assert planned(5 * WHOLE, pair).why == (
        "4 passes of 2 pairs: 4 would keep 1.79 MB of activations, 1.12 MB may be used for them; "
        "nothing is computed again"
    )
    assert planned(ONE_AGAIN + 1).why == (
        "8 passes of 1 example, 1 of 3 layers are computed again: all activations of one example take "
        "0.22 MB, 0.16 MB may be used for them"
    )
    assert "activations of 1.79 MB" in planned(9 * WHOLE).why


def test_the_towers_layers_are_computed_again_first_and_only_if_it_learns():
    job = Job(1, 1, 50, 100, element_bytes=4)
    assert estimate.layers(HAND, job) == 5
    assert [estimate.recomputed(HAND, job._replace(recomputed=n)) for n in (1, 2, 4)] == [
        (1, 0),
        (2, 0),
        (2, 2),
    ]
    frozen = job._replace(parts=("language_model",))
    assert estimate.layers(HAND, frozen) == 3
    assert estimate.recomputed(HAND, frozen._replace(recomputed=2)) == (0, 2)


def test_more_memory_never_means_smaller_passes_or_more_computed_again():
    example = Job(2, 1, 750, 200, packed=True, answers=2)
    for strategy in ("ddp", "zero3"):
        memories = [gb * 1e9 for gb in range(20, 600, 2)]
        made = [
            plan(Shape(), example, strategy, 8, "none", examples=24, available=memory) for memory in memories
        ]
        assert [one.examples for one in made] == sorted(one.examples for one in made)
        assert [-one.recomputed for one in made] == sorted(-one.recomputed for one in made)
        assert {one.examples for one in made} == {1, 2, 3, 4, 6, 8, 12, 24}
        assert {0, 63} < {one.recomputed for one in made}  # all of 32 + 32 but one
        assert all(one.passes * one.examples == 24 for one in made)
        assert all(one.memory.total <= memory for one, memory in zip(made, memories, strict=True) if one.fits)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.55, 0.75, 0.99, 1.01, 2.1, 4.1])
def test_what_autograd_keeps_of_the_chosen_pass_stays_within_the_memory(share):
    """Room for so many times what one of four pairs keeps: nothing fits, then fewer layers, then pairs."""
    example = of_pairs(1, 40, 30, 20, element_bytes=4)
    room = share * estimate.activations(SMALL, example)
    made = planned(room, example, SMALL, examples=4)
    model = pack(learning(None), "split")
    of_tower, of_language = estimate.recomputed(SMALL, example._replace(recomputed=made.recomputed))
    compute_again(model.model.audio_tower.layers[:of_tower])
    compute_again(model.model.language_model.layers[:of_language])
    assert made.fits == (share > 0.3)
    assert (made.recomputed > 0) == (share < 1)
    assert made.examples == {2.1: 2, 4.1: 4}.get(share, 1)
    kept = kept_by_autograd(model, packed_pairs(made.examples, 40, 30, 20))
    assert (kept <= MARGIN * room) == made.fits


# -------------------------------------------------------------------------- the same step


def step(model, batches):
    """A DPO-like loss over pairs, in as many passes as there are batches; loss and gradients."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        batch = dict(batch)
        answers = batch.pop("completion_mask")[:, 1:].bool()
        inner = model.get_base_model() if hasattr(model, "peft_config") else model
        logits = inner.lm_head(inner.model(**batch, use_cache=False).last_hidden_state[:, :-1])
        logps = torch.log_softmax(logits, -1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        chosen, rejected = (logps * answers).sum(-1).chunk(2)
        loss = torch.nn.functional.softplus(rejected - chosen).mean() / len(batches)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_losses_and_gradients_are_the_same_whatever_the_plan(packed, lora):
    collate = Rows(4 if packed else None)
    model = small_model(layers=3)
    if packed:
        pack(model)
    again = copy.deepcopy(model)
    compute_again(again.model.audio_tower.layers)
    compute_again(again.model.language_model.layers[:2])
    if lora:
        how = LoRA(4, 8, 0.0, r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj")
        model, again = (get_peft_model(one, how.config()) for one in (model, again))
        again.load_state_dict(model.state_dict())
    whole, in_passes = collate(pairs()), [collate([pair]) for pair in pairs()]
    loss, expected = step(model.train(), [whole])
    for batches in ([whole], in_passes):
        found, ours = step(again.train(), batches)
        assert found == pytest.approx(loss, rel=1e-6)
        assert worst(ours, expected) < 1e-5  # sums of float32 in another order


def test_only_chosen_layers_run_twice_and_a_copy_has_its_own():
    model = small_model(layers=3).train()
    compute_again(model.model.language_model.layers[:2])
    copied = copy.deepcopy(model)
    runs = {}
    for name, one in (("original", model), ("copy", copied)):
        for n, layer in enumerate(one.model.language_model.layers):
            layer.mlp.register_forward_pre_hook(
                lambda *_, key=(name, n): runs.__setitem__(key, runs.get(key, 0) + 1)
            )
    copied.model(input_ids=torch.arange(10, 20)[None], use_cache=False).last_hidden_state.sum().backward()
    assert runs == {("copy", 0): 2, ("copy", 1): 2, ("copy", 2): 1}


# -------------------------------------------------------------------------- lengths


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_training.make_world(tmp_path_factory.mktemp("plan") / "world")


def test_tokens_of_clips_are_those_of_their_features(world):
    processor = qwen2_audio.load_processor(world / "policy" / "model")
    clips = list(Dataset(world / "corpus").table(AudioClip))
    tokens = ClipTokens(clips, processor)
    features = ClipFeatures(processor, world / "corpus")([clip.path for clip in clips])
    assert [tokens[clip.path] for clip in clips] == [n_audio_tokens(found.n_frames) for found in features]
    assert tokens.longest == max(n_audio_tokens(found.n_frames) for found in features)
    assert tokens["unknown.wav"] == 12  # as long as the model hears: 1 s at a hop of 20 ms


def rows_of(world):
    """Of the pairs, as the stage makes them."""
    return [
        {
            "question": pair.question,
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "audios": list(pair.audios),
            "weight": 1.0,
        }
        for pair in store.read(world / "pairs" / "pairs.jsonl", PreferencePair)
    ]


@pytest.mark.parametrize("packed", [True, False])
def test_the_longest_pair_is_that_of_the_collator(world, packed):
    processor = qwen2_audio.load_processor(world / "policy" / "model")
    rows = rows_of(world)
    collate = PreferenceCollator(processor, ClipFeatures(processor, world / "corpus"), packed=True)
    stock = PreferenceCollator(processor, ClipFeatures(processor, world / "corpus"), packed=False)
    shape = estimate.shape_of_config(qwen2_audio.load_model(world / "policy" / "model").config.to_dict())
    job = job_of(Tuning(packed=packed), pairs=True)
    found = Lengths(world / "corpus", processor).longest_pair(rows, job, shape, "ddp")
    tokens = found.sequences * found.text_tokens + found.clips * found.audio_tokens
    if packed:
        longest = max(len(collate([row])["packed"].tokens) for row in rows)
        assert longest <= tokens <= longest + 6  # what answers begin with in common is packed as well
    else:
        n_clip = 8  # of the stock row, text counted here with a placeholder for its clip
        longest = max(2 * stock([row])["input_ids"].shape[1] for row in rows)
        assert longest <= tokens <= longest + n_clip


# -------------------------------------------------------------------------- in stages


@pytest.fixture(scope="module")
def alone(world):
    """Curves of runs in one pass, by kind."""
    curves = {}

    def of(kind, **trl):
        if kind not in curves:
            config = config_of(kind, None, **trl)
            metrics = tiny_training.run_here(config, world, world.parent / kind)
            assert "passes" not in metrics  # on a CPU nothing is planned unless the memory is told
            curves[kind] = curve(world.parent / kind)
        return curves[kind]

    return of


def config_of(kind, memory_gb, **trl):
    hardware = {"workers": 1, "memory_gb": memory_gb} if memory_gb else None
    config = tiny_training.make_config(kind, steps=6, save_steps=6, hardware=hardware)
    return config.model_copy(update={"trl": {**config.trl, **trl}})


def curve(folder):
    return read_metrics(folder / ".partial-stage" / "metrics.jsonl")


def memory_gb_for(world, kind, share):
    """So much that one process has room for `share` of what the longest example keeps."""
    policy = world / "policy" / "model"
    processor, model = qwen2_audio.load_processor(policy), qwen2_audio.load_model(policy)
    shape = estimate.shape_of_config(model.config.to_dict())
    config = config_of(kind, 1.0)
    tuning, lengths = tuning_of(config), Lengths(world / "corpus", processor)
    job = job_of(tuning, pairs=config.stage == "dpo")
    if config.stage == "dpo":
        job = lengths.longest_pair(rows_of(world), job, shape, "ddp")
    else:
        chats = [
            Part(name, records, share_, chat_row)
            for name, records, share_ in Dataset(world / "corpus").parts(Chat)
        ]
        job = lengths.longest_example(Examples(chats, 24, 0), job)
    standing = estimate.memory(shape, job, "ddp", 1).standing
    return (standing + MARGIN * share * estimate.activations(shape, job)) / 1e9


@pytest.mark.parametrize(
    ("kind", "trl"),
    [
        ("sft", {}),
        ("dpo-lora", {"precompute_ref_log_probs": False}),
        pytest.param("sft-stock", {}, marks=pytest.mark.slow),
        pytest.param("dpo", {}, marks=pytest.mark.slow),
    ],
    ids=["sft", "dpo-lora-live", "sft-stock", "dpo"],
)
def test_a_stage_in_little_memory_takes_the_same_steps_in_more_passes(world, alone, capsys, kind, trl):
    whole, folder = alone(kind, **trl), world.parent / f"{kind}-planned"
    memory_gb = memory_gb_for(world, kind, 0.8)
    metrics = tiny_training.run_here(config_of(kind, memory_gb, **trl), world, folder)
    assert metrics["passes"] == tiny_training.BATCH
    assert metrics["recomputed_layers"] >= 1
    assert metrics["planned_gb"] <= memory_gb
    noun = "pair" if "dpo" in kind else "example"
    assert f"stage: 4 passes of 1 {noun}, {metrics['recomputed_layers']:.0f} of" in capsys.readouterr().out
    planned_curve = curve(folder)
    assert len(planned_curve) == len(whole) == 6
    for one, other in zip(planned_curve, whole, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_what_the_recipe_has_planned_is_left_alone(world):
    config = config_of("sft", 0.001, gradient_accumulation_steps=2)
    metrics = tiny_training.run_here(config, world, world.parent / "by-hand")
    assert "passes" not in metrics
    assert memory_plan.by_hand({"activation_checkpointing": False})
    assert not memory_plan.by_hand({"logging_steps": 1})


def test_a_frozen_tower_is_left_out_as_it_is_not_by_transformers_own_switch():
    """Why `recompute` does not use it: the tower's first convolution counts as an embedding there."""
    seen = {}
    for name in ("ours", "theirs"):
        model = pack(small_model()).train()
        model.model.audio_tower.requires_grad_(False)
        if name == "ours":
            compute_again(model.model.language_model.layers)
        else:
            model.activation_checkpointing_enable()
        model.model.audio_tower.layer_norm.register_forward_hook(
            lambda _, args, out, name=name: seen.__setitem__(name, out.requires_grad)
        )
        batch = Rows()(pairs())
        del batch["completion_mask"]
        model.model(**batch, use_cache=False)
    assert seen == {"ours": False, "theirs": True}
