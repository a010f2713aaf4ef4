"""Micro-batches: the choice by hand, the measurement against a twin, the same steps in real stages."""

import copy
import json

import pytest
import torch
from peft import get_peft_model

from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.clips import n_audio_tokens
from align.models.qwen2_audio.packed import pack
from align.planning import estimate
from align.run_folder.artifacts import read_metrics
from align.stages.tuning import tuning_of
from align.training.collate import PreferenceCollator, chat_row
from align.training.data_loading import Examples, Part
from align.training.lengths import ClipTokens, Lengths, Longest
from align.training.memory import (
    BY_HAND,
    MARGIN,
    PLAN,
    Choice,
    choose,
    kept_by_autograd,
    plan_micro_batches,
)
from align.training.preparation import prepare_model
from align.training.recompute import checkpoint_layers, restore_layers
from align.training.tuning import LoRA, Tuning
from preference_data import store
from preference_data.dataset.dataset import Dataset
from preference_data.schema import AudioClip, Chat, PreferencePair
from tests.align.planning.test_estimate import kept_by_autograd as slow_twin
from tests.align.planning.test_estimate import learning, packed_pairs
from tests.align.ragged_batch import Rows, gradients, pairs, small_model, worst
from tests.align.training import tiny_training

LAYERS, WHOLE = 5, 100.0


class Allocator:
    """Bytes of the longest example, 15 fewer for each checkpointed layer; beyond `limit` memory runs out."""

    def __init__(self, limit=float("inf")):
        self.limit = limit
        self.calls = []

    def __call__(self, checkpointed):
        self.calls.append(checkpointed)
        needed = WHOLE - 15 * checkpointed
        return needed if needed <= self.limit else float("inf")


@pytest.mark.parametrize(
    ("room", "micro_batch", "checkpointed"),
    [
        (800, 8, 0),
        (799, 4, 0),
        (399, 2, 0),
        (100, 1, 0),
        (99, 1, 1),
        (85, 1, 1),
        (84, 1, 2),
        (40, 1, 4),
    ],
)
def test_choices_by_hand(room, micro_batch, checkpointed):
    choice = choose(Allocator(), examples=8, room=room, layers=LAYERS)
    needed = micro_batch * (WHOLE - 15 * checkpointed)
    assert choice == Choice(micro_batch, checkpointed, needed, WHOLE)
    assert choice.activations <= room


def test_what_runs_out_of_memory_is_measured_again_with_more_layers_checkpointed():
    """The allocator gives out 60 where 1,000 should be: 100, 85 and 70 fail, 55 does not."""
    allocator = Allocator(limit=60)
    assert choose(allocator, examples=8, room=1000, layers=LAYERS) == Choice(1, 3, 55.0, float("inf"))
    assert len(allocator.calls) == len(set(allocator.calls))  # nothing is measured twice
    assert LAYERS not in allocator.calls  # the last layer saves nothing


def test_what_does_not_fit_is_tried_as_thriftily_as_possible():
    assert choose(Allocator(), examples=4, room=10, layers=LAYERS) == Choice(1, 4, 40.0, WHOLE)
    assert choose(Allocator(limit=10), examples=4, room=10, layers=LAYERS).activations == float("inf")
    assert choose(Allocator(), examples=4, room=10, layers=1) == Choice(1, 0, WHOLE, WHOLE)


@pytest.mark.parametrize(("examples", "fewest"), [(8, 2), (9, 3), (1, 1)])
def test_micro_batches_have_as_many_examples_as_the_loss_needs(examples, fewest):
    choice = choose(Allocator(), examples=examples, room=fewest * 90, layers=LAYERS, least=2)
    assert choice == Choice(fewest, 1, fewest * 85.0, WHOLE)


def test_more_memory_never_means_smaller_micro_batches_or_more_checkpointing():
    choices = [choose(Allocator(), examples=24, room=room, layers=LAYERS) for room in range(30, 2500, 10)]
    assert [choice.micro_batch for choice in choices] == sorted(choice.micro_batch for choice in choices)
    assert [-choice.checkpointed for choice in choices] == sorted(-choice.checkpointed for choice in choices)
    assert {choice.micro_batch for choice in choices} == {1, 2, 3, 4, 6, 8, 12, 24}


@pytest.mark.parametrize("checkpointed", [0, 2, 5])
def test_what_is_measured_on_a_cpu_is_what_autograd_keeps(checkpointed):
    model, batch = pack(learning(None), "split"), packed_pairs(2, 40, 30, 20)
    layers = [*model.model.audio_tower.layers, *model.model.language_model.layers][:checkpointed]
    checkpoint_layers(layers)

    def forward():
        return model.model(**batch, use_cache=False).last_hidden_state

    measured = kept_by_autograd(model, forward, layers)
    # The twin leaves out everything that has the shape of a weight
    assert measured == pytest.approx(slow_twin(model, batch), rel=0.01)
    restore_layers(layers)
    assert kept_by_autograd(model, forward) == pytest.approx(slow_twin(model, batch), rel=0.01)
    assert not any("forward" in module.__dict__ for module in model.modules())


# -------------------------------------------------------------------------- the same step


def step(model, batches):
    """A DPO-like loss over pairs, in as many micro-batches as there are; loss and gradients."""
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
    checkpoint_layers(again.model.audio_tower.layers)
    checkpoint_layers(again.model.language_model.layers[:2])
    if lora:
        how = LoRA(4, 8, 0.0, r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj")
        model, again = (get_peft_model(base, how.config()) for base in (model, again))
        again.load_state_dict(model.state_dict())
    whole, in_micro_batches = collate(pairs()), [collate([pair]) for pair in pairs()]
    loss, expected = step(model.train(), [whole])
    for batches in ([whole], in_micro_batches):
        ours_loss, ours = step(again.train(), batches)
        assert ours_loss == pytest.approx(loss, rel=1e-6)
        assert worst(ours, expected) < 1e-5  # sums of float32 in another order


def test_only_chosen_layers_run_twice_and_a_copy_has_its_own():
    model = small_model(layers=3).train()
    checkpoint_layers(model.model.language_model.layers[:2])
    copied = copy.deepcopy(model)
    runs = {}
    for name, subject in (("original", model), ("copy", copied)):
        for n, layer in enumerate(subject.model.language_model.layers):
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
    assert [tokens[clip.path] for clip in clips] == [n_audio_tokens(clip.n_frames) for clip in features]
    assert tokens.longest == max(n_audio_tokens(clip.n_frames) for clip in features)
    assert tokens["unknown.wav"] == 12  # as long as the model hears: 1 s at a hop of 20 ms


def rows_of(world):
    """Of the pairs, as the stage makes them."""
    return [
        {
            "prompt": pair.question,
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
    collate = PreferenceCollator(processor, ClipFeatures(processor, world / "corpus"), packed=packed)

    def tokens(row):
        batch = collate([row])
        return len(batch["packed"].tokens) if packed else 2 * batch["input_ids"].shape[1]

    longest = Lengths(world / "corpus", processor).longest_pair(rows, packed=packed)
    assert longest.factor == 1
    # What completions begin with in common is packed as well
    assert tokens(longest.row) >= max(map(tokens, rows)) - 6 * packed


def test_the_longest_example_may_have_the_longest_clip_and_the_longest_text(world):
    processor = qwen2_audio.load_processor(world / "policy" / "model")
    lengths, examples = Lengths(world / "corpus", processor), chats_of(world, 24)
    rows = [examples[n] for n in range(24)]
    longest = lengths.longest_example(examples)
    assert lengths.tokens(longest.row) == max(map(lengths.tokens, rows))
    text = max(lengths.tokens({**row, "audios": []}) for row in rows)
    assert longest.factor * lengths.tokens(longest.row) == pytest.approx(text + lengths.clips.longest)
    far = lengths.longest_example(chats_of(world, 24 * 2048))
    assert far.factor * lengths.tokens(far.row) == pytest.approx(1.25 * text + lengths.clips.longest)


def chats_of(world, n):
    parts = [
        Part(name, records, share, chat_row) for name, records, share in Dataset(world / "corpus").parts(Chat)
    ]
    return Examples(parts, n, 0)


# -------------------------------------------------------------------------- in stages


@pytest.fixture(scope="module")
def alone(world):
    """Curves of runs whose steps are one micro-batch, by kind."""
    curves = {}

    def of(kind, **trl):
        if kind not in curves:
            config = config_of(kind, None, **trl)
            metrics = tiny_training.run_here(config, world, world.parent / kind)
            assert (
                "micro_batch" not in metrics
            )  # on a CPU nothing is planned unless the recipe says the memory
            curves[kind] = curve(world.parent / kind)
        return curves[kind]

    return of


def config_of(kind, memory_gb, **trl):
    hardware = {"workers": 1, "memory_gb": memory_gb} if memory_gb else None
    config = tiny_training.make_config(kind, steps=6, save_steps=6, hardware=hardware)
    return config.model_copy(update={"trl": {**config.trl, **trl}})


def curve(folder):
    rows = read_metrics(folder / ".partial-stage" / "metrics.jsonl")
    return [row for row in rows if "loss" in row]


class Planner:
    """Plans for a DPO stage, as the stage does."""

    def __init__(self, world, kind, folder):
        self.policy = world / "policy" / "model"
        self.tuning = tuning_of(config_of(kind, 1000.0))
        self.model = self.tuning.load(self.policy)
        prepare_model(self.model, self.tuning)
        self.processor = qwen2_audio.load_processor(self.policy)
        features = ClipFeatures(self.processor, world / "corpus")
        self.collate = PreferenceCollator(self.processor, features, self.tuning.packed)
        lengths = Lengths(world / "corpus", self.processor)
        self.longest = lengths.longest_pair(rows_of(world), packed=self.tuning.packed)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def plan(self, memory_gb, **more):
        tuning = Tuning(**{**vars(self.tuning), "memory_gb": memory_gb})
        arguments = {"trl": {}, "name": "stage", "folder": self.folder, "batch_size": 4, **more}
        return plan_micro_batches(
            self.model, tuning, longest=lambda: self.longest, collate=self.collate, **arguments
        )


@pytest.mark.parametrize("kind", ["dpo", "dpo-lora", "dpo-stock"])
def test_planning_leaves_the_model_and_the_random_numbers_as_they_were(world, tmp_path, kind):
    planner = Planner(world, kind, tmp_path)
    model = planner.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    state, training = torch.get_rng_state(), model.training
    plan = planner.plan(estimate.OVERHEAD / 1e9)
    assert plan.text_layers + plan.audio_layers > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == training
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == flags
    assert all(weight.grad is None for weight in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.model.language_model.layers)
    assert not hasattr(model, "peft_config")


def test_low_rank_updates_leave_the_tower_without_activations(world, tmp_path):
    whole = Planner(world, "dpo", tmp_path / "whole").plan(1000.0)
    low_rank = Planner(world, "dpo-lora", tmp_path / "lora").plan(1000.0)
    assert low_rank.gb < whole.gb
    thrifty = Planner(world, "dpo-lora", tmp_path / "thrifty").plan(3.0001)
    assert (thrifty.audio_layers, thrifty.text_layers) == (0, 1)


def test_a_resumed_stage_keeps_its_plan_unless_its_processes_change(world, tmp_path):
    planner = Planner(world, "dpo", tmp_path)
    plan = planner.plan(1000.0)
    planner.longest = None  # nothing is measured again
    assert planner.plan(1000.0) == plan
    saved = json.loads((tmp_path / PLAN).read_text())
    assert saved["plan"]["micro_batch"] == plan.micro_batch == 4
    planner.longest = Longest(rows_of(world)[0])
    assert planner.plan(3.0001).micro_batch == 1
    assert planner.plan(1000.0, batch_size=2).micro_batch == 2


def test_what_does_not_fit_says_so_with_advice(world, tmp_path, capsys):
    plan = Planner(world, "dpo", tmp_path).plan(3.0)
    assert (plan.micro_batch, plan.accumulation_steps) == (1, 4)
    line = capsys.readouterr().out
    assert line.startswith(
        "stage: does not fit 3.0 GB: weights, gradients, optimizer and overhead take 3.0 GB"
    )
    assert "2 of 3 layers checkpointed. Take strategy: zero3, more workers" in line


def memory_gb_for(world, kind, share, **trl):
    """So much that one process has room for `share` of what the longest example keeps."""
    config = config_of(kind, 1000.0, **trl).model_copy(update={"batch_size": 1})
    folder = world.parent / f"{kind}-roomy"
    metrics = tiny_training.run_here(config, world, folder)
    reason = json.loads((folder / ".partial-stage" / PLAN).read_text())["plan"]["reason"]
    activations = float(reason.partition("activations of ")[2].partition(" MB")[0]) / 1e3
    return metrics["planned_gb"] - activations + MARGIN * share * activations


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
def test_a_stage_in_little_memory_takes_the_same_steps_in_more_micro_batches(world, alone, capsys, kind, trl):
    whole, folder = alone(kind, **trl), world.parent / f"{kind}-planned"
    memory_gb = memory_gb_for(world, kind, 0.8, **trl)
    metrics = tiny_training.run_here(config_of(kind, memory_gb, **trl), world, folder)
    assert metrics["accumulation_steps"] == tiny_training.BATCH
    assert metrics["micro_batch"] == 1
    assert metrics["checkpointed_layers"] >= 1
    assert metrics["planned_gb"] <= memory_gb
    noun = "pair" if "dpo" in kind else "example"
    line = f"stage: 4 micro-batches of 1 {noun}, {metrics['checkpointed_layers']:.0f} of"
    assert line in capsys.readouterr().out
    planned_curve = curve(folder)
    assert len(planned_curve) == len(whole) == 6
    for row, other in zip(planned_curve, whole, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_what_the_recipe_has_planned_is_left_alone(world):
    config = config_of("sft", 0.001, gradient_accumulation_steps=2)
    metrics = tiny_training.run_here(config, world, world.parent / "by-hand")
    assert "micro_batch" not in metrics
    assert "activation_checkpointing" in BY_HAND


def test_a_frozen_tower_is_left_out_as_it_is_not_by_transformers_own_switch():
    """Why `recompute` does not use it: the tower's first convolution counts as an embedding there."""
    needs_gradients = {}
    for name in ("ours", "theirs"):
        model = pack(small_model()).train()
        model.model.audio_tower.requires_grad_(False)
        if name == "ours":
            checkpoint_layers(model.model.language_model.layers)
        else:
            model.activation_checkpointing_enable()
        model.model.audio_tower.layer_norm.register_forward_hook(
            lambda _, args, out, name=name: needs_gradients.__setitem__(name, out.requires_grad)
        )
        batch = Rows()(pairs())
        del batch["completion_mask"]
        model.model(**batch, use_cache=False)
    assert needs_gradients == {"ours": False, "theirs": True}
