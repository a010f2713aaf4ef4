"""KTO: losses and all gradients against arithmetic done by hand, row by row, unpadded; the stage."""

import copy
import inspect
import itertools
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from trl import KTOTrainer

from align.models.chat import encode_completion, encode_prompt, expand_audio, join
from align.models.features import ClipFeatures, stack
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.clips import n_audio_tokens
from align.models.qwen2_audio.packed import PackedQwen2AudioModel, pack
from align.models.scoring import completion_logps
from align.recipe.recipe import RecipeError, load
from align.run_folder.artifacts import Interrupted, StageFolder, read_metrics, stop_requested
from align.stages import kto
from align.stages.kto import balanced_weights
from align.training import run
from align.training.collate import LabelCollator, label_row
from align.training.data_loading import hold_out
from align.training.methods import Schedule, kahneman_tversky_optimisation
from align.training.reference import ReferenceStore
from align.training.run import arguments
from align.training.trainers import AudioTrainer
from align.training.tuning import LoRA, Tuning
from preference_data import store
from preference_data.prompts.prompts import BadExample
from preference_data.schema import Label
from tests.align.training import tiny_training

BETA, DESIRABLE, UNDESIRABLE = 0.3, 1.5, 0.7
LORA = LoRA(4, 8, 0.0, r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj")
CLIP = {"type": "audio"}


def said(role, *parts):
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def label(number, prompt, completion, is_good, *audios, weight=1.0):
    own = {"id": f"l{number}", "prompt_id": f"p{number}", "prompt": prompt, "completion": completion}
    return Label.model_validate({**own, "audios": audios, "label": is_good, "weight": weight})


LABELS = [
    label(0, [said("user", CLIP, "Is the tone high or low?")], "The tone is high.", True, "0.wav"),
    label(1, [said("user", CLIP, "Is the tone high or low?")], "low", False, "0.wav", weight=2.0),
    label(
        2,
        [
            said("system", "Be brief."),
            said("user", CLIP, "high?", CLIP),
            said("assistant", "The tone is low."),
            said("user", "And the tone?"),
        ],
        "A low tone.",
        True,
        "2.wav",
        "1.wav",
        weight=0.5,
    ),
    label(3, [said("user", "Say it.")], "The tone is low.", False),
]


def make_trainer(tiny, folder, *, loss="kto", packed=True, lora=None, labels=LABELS, model=None, **trl):
    """At step 0; the reference is what the model is now."""
    processor, model = qwen2_audio.load_processor(tiny.policy), model or qwen2_audio.load_model(tiny.policy)
    schedule, tuning = Schedule(2, len(labels), 1e-3, 1, 0), Tuning(lora=lora, packed=packed)
    rows = [label_row(item) for item in labels]
    method = kahneman_tversky_optimisation(
        rows,
        schedule,
        loss=loss,
        beta=BETA,
        desirable_weight=DESIRABLE,
        undesirable_weight=UNDESIRABLE,
        reference=ReferenceStore(folder / "reference", {f"{i}.wav": str(i) for i in range(4)}),
    )
    return method.trainer(
        model=pack(model) if packed else model,
        args=method.config(**arguments(folder, schedule, tuning=tuning, trl={**method.trl, **trl})),
        train_dataset=method.examples,
        data_collator=method.collator(processor, ClipFeatures(processor, tiny.audio), packed),
        processing_class=processor,
        peft_config=tuning.peft_config,
    )


def perturbed(tiny):
    """Another policy than the saved one, and a worse one: the ratios to it are not 1."""
    model, draw = qwen2_audio.load_model(tiny.policy), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=draw))
    return model


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def relative(a, b):
    assert a.keys() == b.keys()
    difference = sum(float((a[name] - b[name]).double().pow(2).sum()) for name in b) ** 0.5
    return difference / sum(float(b[name].double().pow(2).sum()) for name in b) ** 0.5


# -------------------------------------------------------------------------- by hand


def log_p(model, processor, features, row, completion):
    """log p(completion | conversation and clips), one row alone, no padding: the slow and obvious way."""
    clips = features(row["audios"])
    encoded = expand_audio(
        join(encode_prompt(processor, row["messages"]), encode_completion(processor, completion)),
        [n_audio_tokens(clip.n_frames) for clip in clips],
        processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    ids = torch.tensor([encoded.ids])
    audio = stack(clips) if clips else {}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **audio).logits[0, :-1]
    picked = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return (picked * torch.tensor(encoded.mask[1:])).sum()


def by_hand(policy, reference, processor, features, rows, loss):
    """Loss and KL term of a micro-batch (arXiv:2402.01306, equations 6 to 8; arXiv:2408.06266)."""

    def log_ratio(row, completion):
        with torch.no_grad():
            anchor = log_p(reference, processor, features, row, completion)
        return log_p(policy, processor, features, row, completion) - anchor

    with torch.no_grad():
        others = [log_ratio(row, rows[i - 1]["completion"]) for i, row in enumerate(rows)]
    kl = max(0.0, float(sum(others)) / len(rows)) if loss == "kto" else 0.0
    losses = []
    for row in rows:
        sign, kind = (1, DESIRABLE) if row["label"] else (-1, UNDESIRABLE)
        value = torch.sigmoid(sign * BETA * (log_ratio(row, row["completion"]) - kl))
        losses.append(kind * row["weight"] * (1 - value))
    return sum(losses) / len(rows), kl


@pytest.mark.parametrize("is_better", [True, False], ids=["kl", "no kl"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "stock"])
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_loss_and_all_gradients_equal_hand_arithmetic(tiny, tmp_path, loss, packed, is_better):
    """A policy that is better than its reference has a KL term; of a worse one it is clamped at 0."""
    policy, reference = perturbed(tiny), qwen2_audio.load_model(tiny.policy)
    if is_better:
        policy, reference = reference, policy
    trainer = make_trainer(tiny, tmp_path, loss=loss, packed=packed, model=copy.deepcopy(reference))
    rows = [trainer.train_dataset[i] for i in range(4)]
    trainer.model.load_state_dict(policy.state_dict())
    trainer.model.train()
    ours = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    ours.backward()

    features = ClipFeatures(trainer.processing_class, tiny.audio)
    slow, kl = by_hand(policy, reference, trainer.processing_class, features, rows, loss)
    slow.backward()
    assert ours.item() == pytest.approx(slow.item(), abs=1e-6)
    assert trainer._metrics["train"]["kl"] == [pytest.approx(kl, abs=1e-4)]
    assert (kl > 0.1) == (is_better and loss == "kto")
    assert relative(gradients(trainer.model), gradients(policy)) < 1e-5


def test_low_rank_updates_are_held_to_the_policy_without_them(tiny, tmp_path):
    whole, packed = (make_trainer(tiny, tmp_path / str(p), packed=p, lora=LORA) for p in (False, True))
    features = ClipFeatures(packed.processing_class, tiny.audio)
    rows = [packed.train_dataset[i] for i in range(4)]
    for trainer in (whole, packed):
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in trainer.model.named_parameters():
                if "lora_B" in name:
                    weight.add_(0.5 * torch.randn(weight.shape, generator=draw))
        trainer.model.train()
    ours = packed.compute_loss(packed.model, packed.data_collator(rows))
    ours.backward()
    reference = qwen2_audio.load_model(tiny.policy)
    slow, _ = by_hand(whole.model, reference, packed.processing_class, features, rows, "kto")
    slow.backward()
    assert ours.item() == pytest.approx(slow.item(), abs=1e-6)
    assert relative(gradients(packed.model), gradients(whole.model)) < 1e-5


def test_one_forward_pass_computes_rows_and_mismatched_rows(tiny, tmp_path, monkeypatch):
    trainer, passes = make_trainer(tiny, tmp_path), []
    hidden = PackedQwen2AudioModel._hidden
    monkeypatch.setattr(PackedQwen2AudioModel, "_hidden", lambda *a: passes.append(1) or hidden(*a))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.compute_loss(trainer.model, batch)
    trainer.compute_ref_log_probs(trainer.model, batch)
    assert len(passes) == 2
    assert batch["input_features"].shape[0] == 3  # of 2 x 4 rows with 2 x 4 clips
    assert len(batch["packed"].tokens) < 0.5 * int(batch["attention_mask"].sum())


def test_mismatched_rows_are_those_of_trl(tiny):
    """(x_1, y_n), (x_2, y_1) ...: what TRL's own `_prepare_dataset` makes of a micro-batch."""
    processor = qwen2_audio.load_processor(tiny.policy)
    batch = LabelCollator(processor, ClipFeatures(processor, tiny.audio))([label_row(one) for one in LABELS])
    texts = [
        processor.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    own = [one.completion for one in LABELS]
    assert texts == [*own, own[-1], *own[:-1]]
    source = inspect.getsource(KTOTrainer._prepare_dataset)
    assert '[examples["completion_ids"][-1]] + examples["completion_ids"][:-1]' in source
    assert "batch_size=args.per_device_train_batch_size" in source


def test_the_reference_is_that_of_each_place_in_the_training(tiny, tmp_path):
    """Neighbours change from epoch to epoch, and with them the mismatched completions."""
    trainer = make_trainer(tiny, tmp_path, per_device_train_batch_size=2)
    reference, features = (
        qwen2_audio.load_model(tiny.policy),
        ClipFeatures(trainer.processing_class, tiny.audio),
    )
    rows = [trainer.train_dataset[place] for place in range(8)]
    with torch.no_grad():
        for place, row in enumerate(rows):
            before = rows[place ^ 1]  # of two, the other one
            for name, text in (("ref_logps", row["completion"]), ("ref_KL_logps", before["completion"])):
                by_hand = log_p(reference, trainer.processing_class, features, row, text).item()
                assert row[name] == pytest.approx(by_hand, abs=1e-3)
    assert len(list((tmp_path / "reference").iterdir())) == 1


def test_text_that_steers_the_model_is_refused():
    with pytest.raises(BadExample, match=r"l9.*<\|AUDIO\|>"):
        label_row(label(9, [said("user", "high <|AUDIO|>?")], "low", True))


# -------------------------------------------------------------------------- weights of the two kinds


@pytest.mark.parametrize(("desirable", "undesirable"), [([1] * 9, [1]), ([1], [1] * 9), ([0.5, 0.5], [3.0])])
@pytest.mark.parametrize("balance", [1.0, 4 / 3])
def test_the_rarer_kind_counts_more_by_the_paper_s_rule(desirable, undesirable, balance):
    kinds = ((True, desirable), (False, undesirable))
    rows = [{"label": kind, "weight": weight} for kind, weights in kinds for weight in weights]
    good, bad = balanced_weights(rows, balance)
    assert good * sum(desirable) / (bad * sum(undesirable)) == pytest.approx(balance)
    assert min(good, bad) == 1


@pytest.mark.parametrize(("kind", "missing"), [(True, "undesirable"), (False, "desirable")])
def test_labels_of_one_kind_are_refused(kind, missing):
    with pytest.raises(ValueError, match=f"none of 2 labels is {missing}.*labels stage"):
        balanced_weights([{"label": kind, "weight": 1.0}] * 2, 1.0)


# -------------------------------------------------------------------------- what the recipe says


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"batch_size": 1}, r"batch_size: 1 leaves a micro-batch one example.*take 2 or more"),
        ({"hardware": {"workers": 2}, "batch_size": 2}, "take 4 or more"),
        ({"batch_size": 2, "trl": {"gradient_accumulation_steps": 2}}, "take 4 or more"),
        ({"trl": {"precompute_ref_log_probs": False}}, "precompute_ref_log_probs cannot be used"),
        ({"trl": {"precompute_ref_batch_size": 8}}, "precompute_ref_batch_size cannot be used"),
        ({"choose": {"by": "held_out_loss"}, "held_out": 0.1}, "take held_out_accuracy"),
        ({"choose": {"by": "held_out_accuracy"}}, "set held_out"),
        ({"batch_size": 1, "loss": "apo_zero_unpaired"}, None),
    ],
)
def test_what_cannot_be_true_together_is_refused(changes, refused):
    if refused is None:
        tiny_training.make_config("kto", **changes)
        return
    with pytest.raises(ValidationError, match=refused):
        tiny_training.make_config("kto", **changes)


def write_recipe(folder, world, labels, more=""):
    folder.mkdir()
    text = f"stage: kto\npolicy: {world}/policy\ncorpus: {world}/corpus\nlabels: {labels}\n"
    (folder / "1_kto.yaml").write_text(text + "learning_rate: 3.0e-2\nbatch_size: 8\nepochs: 2\n" + more)
    return folder


def test_weights_of_the_kinds_are_set_by_balance_alone(world, tmp_path):
    recipe = write_recipe(tmp_path / "r", world, world / "labels", "trl: {desirable_weight: 2.0}\n")
    with pytest.raises(RecipeError, match=r"trl.desirable_weight: set by the stage; use balance instead"):
        load(recipe)


def test_a_folder_without_labels_is_named(world, tmp_path):
    with pytest.raises(RecipeError, match=r"there is no folder '.*/pairs' with labels.jsonl in it"):
        load(write_recipe(tmp_path / "r", world, world / "pairs"))


# -------------------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_training.make_world(tmp_path_factory.mktemp("kto") / "world")


def gains(world, out):
    """By how many nats the policy has become likelier to say each completion, by label."""
    rows = [label_row(one) for one in store.read(world / "labels" / "labels.jsonl", Label)]
    before, after = (qwen2_audio.load_model(path) for path in (world / "policy" / "model", out / "model"))
    processor = qwen2_audio.load_processor(out / "model")
    batch = LabelCollator(processor, ClipFeatures(processor, world / "corpus"), with_kl=False)(rows)
    gained = (completion_logps(after, batch) - completion_logps(before, batch)).sum(-1)
    return gained[batch["label"]], gained[~batch["label"]]


@pytest.mark.parametrize("case", ["kto", "kto-lora"])
def test_desirable_completions_get_likelier_than_undesirable_ones(world, tmp_path, case):
    choose = {"held_out": 0.25, "choose": {"by": "held_out_accuracy"}}
    config = tiny_training.make_config(
        case, save_steps=4, batch_size=8, epochs=1.7, learning_rate=0.02, **choose
    )
    metrics = tiny_training.run_here(config, world, tmp_path)
    out = tmp_path / ".partial-stage"
    desirable, undesirable = gains(world, out)
    assert desirable.mean() > undesirable.mean() + 2
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "held_out/accuracy" in row]
    assert metrics["held_out/accuracy"] == max(row["held_out/accuracy"] for row in rows) > 0.5
    assert metrics["chosen_step"] in {row["step"] for row in rows}
    assert metrics["desirable_weight"] == metrics["undesirable_weight"] == 1
    assert metrics["labels"] + metrics["held_out_labels"] == 48


def test_the_held_out_figures_are_those_of_the_published_policy_by_hand(world, tmp_path):
    config = tiny_training.make_config("kto", steps=4, held_out=0.25, learning_rate=0.02, trl={})
    metrics = tiny_training.run_here(config, world, tmp_path)
    logged = read_metrics(tmp_path / ".partial-stage" / "metrics.jsonl")[-1]
    rows = [label_row(one) for one in store.read(world / "labels" / "labels.jsonl", Label)]
    held_out = hold_out(rows, config.held_out, config.seed)[1]
    after, before = (
        qwen2_audio.load_model(path)
        for path in (tmp_path / ".partial-stage" / "model", world / "policy" / "model")
    )
    processor = qwen2_audio.load_processor(world / "policy" / "model")
    features = ClipFeatures(processor, world / "corpus")
    with torch.no_grad():
        ratios = [
            log_p(after, processor, features, row, row["completion"])
            - log_p(before, processor, features, row, row["completion"])
            for row in held_out
        ]
    rewards = {
        kind: [r for r, row in zip(ratios, held_out, strict=True) if row["label"] == kind]
        for kind in (True, False)
    }
    margins = [
        config.beta * float(good - bad) for good, bad in itertools.product(rewards[True], rewards[False])
    ]
    assert logged["held_out/margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    assert logged["held_out/accuracy"] == pytest.approx(sum(m > 0 for m in margins) / len(margins), abs=0.01)
    assert metrics["held_out_labels"] == len(held_out) > 0


@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2}], ids=["whole", "micro-batches"])
def test_a_stopped_run_goes_on_to_the_same_weights(world, tmp_path, monkeypatch, more):
    """Across the end of an epoch; what shares a micro-batch, and so the KL term, is the same."""
    trl = {"logging_steps": 1, **more}
    config = tiny_training.make_config("kto", batch_size=8, epochs=1.3, trl=trl)
    tiny_training.run_here(config, world, tmp_path / "whole")
    step, stock = itertools.count(), AudioTrainer.training_step

    def stopped(*args, **kwargs):
        if next(step) == 3:
            stop_requested.set()
        return stock(*args, **kwargs)

    monkeypatch.setattr(AudioTrainer, "training_step", stopped)
    with pytest.raises(Interrupted):
        tiny_training.run_here(config, world, tmp_path / "stopped")
    stop_requested.clear()
    tiny_training.run_here(config, world, tmp_path / "stopped")
    runs = [tmp_path / name / ".partial-stage" for name in ("whole", "stopped")]
    weights = [load_file(run / "model" / "model.safetensors") for run in runs]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    logs = [
        [(row["step"], row["loss"], row["kl"]) for row in read_metrics(run / "metrics.jsonl")] for run in runs
    ]
    assert logs[0] == logs[1]
    assert [step for step, _, _ in logs[0]] == list(range(1, 9))
    assert any(kl > 0 for _, _, kl in logs[0])


def test_lengths_do_not_decide_who_shares_a_micro_batch(world, tmp_path, monkeypatch):
    """They would make the KL term one of alike completions; without a KL term they may."""
    balanced = []
    monkeypatch.setattr(run, "balanced", lambda examples, *_: balanced.append(1) or examples)
    for loss, times in (("kto", 0), ("apo_zero_unpaired", 1)):
        trl = {"gradient_accumulation_steps": 2}
        config = tiny_training.make_config("kto", steps=1, batch_size=8, epochs=0.1, loss=loss, trl=trl)
        tiny_training.run_here(config, world, tmp_path / loss)
        assert len(balanced) == times


def test_labels_from_outside_pass_through_a_recipe(world, tmp_path):
    """As `align data import` leaves them: several turns and clips, weights, more bad ones than good ones."""
    clips = [f"audio/{i}.wav" for i in range(3)]
    turns = [said("user", CLIP, "high?", CLIP), said("assistant", "low"), said("user", "And this?", CLIP)]
    labels = [
        label(i, turns, text, is_good, *clips, weight=1 + i / 4)
        for i, (text, is_good) in enumerate(
            [("The tone is high.", True), ("low", False), ("low 2", False), ("Say", False)]
        )
    ]
    imported = tmp_path / "imported"
    imported.mkdir()
    store.write(imported / "labels.jsonl", labels)
    step = load(write_recipe(tmp_path / "recipe", world, imported, "seed: 3\n")).steps[0]
    assert str(imported) in step.foreign
    out = StageFolder(tmp_path / "run", "1_kto", "fingerprint")
    out.path.mkdir(parents=True)
    metrics = kto.run(step.config, {ref: Path(ref) for ref in step.foreign}, out)
    assert (metrics["labels"], metrics["desirable"]) == (4, 1)
    assert metrics["desirable_weight"] == pytest.approx((1.25 + 1.5 + 1.75) / 1)
    assert (out.path / "model" / "model.safetensors").is_file()
