"""The loss and gradients of our DPO trainer against arithmetic done by hand, row by row, unpadded."""

import math

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig

from align.models.chat import encode_completion, encode_prompt, expand_audio, join, user
from align.models.features import ClipFeatures, stack
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.clips import n_audio_tokens
from align.models.qwen2_audio.flops import cost_of
from align.models.qwen2_audio.packed import PackedQwen2AudioModel, is_packed, pack
from align.training.arguments import arguments
from align.training.collate import PreferenceCollator
from align.training.trainers import AudioDPOTrainer

QUESTION = "Is the tone high or low?"
BETA = 0.3
ROWS = [
    {"question": QUESTION, "chosen": "The tone is high.", "rejected": "low", "audios": ["0.wav"]},
    {"question": QUESTION, "chosen": "The tone is low.", "rejected": "A low tone.", "audios": ["1.wav"]},
    {"question": "high?", "chosen": "low", "rejected": "The tone is high.", "audios": ["2.wav", "1.wav"]},
]


def make_trainer(tiny, tmp_path, weights, loss="sigmoid", packed=False, **passed_on):
    processor = qwen2_audio.load_processor(tiny.policy)
    model = qwen2_audio.load_model(tiny.policy)
    options = arguments(
        tmp_path, steps=2, batch_size=3, learning_rate=1e-3, save_steps=1, seed=0, passed_on=passed_on
    )
    rows = [{**row, "weight": weight} for row, weight in zip(ROWS, weights, strict=True)]
    return AudioDPOTrainer(
        model=pack(model) if packed else model,
        ref_model=qwen2_audio.load_model(tiny.policy),
        args=DPOConfig(**options, loss_type=[loss], beta=BETA),
        train_dataset=Dataset.from_list(rows),
        data_collator=PreferenceCollator(processor, ClipFeatures(processor, tiny.audio), packed),
        processing_class=processor,
    )


def answer_logp(model, processor, features, row, side):
    """log p(answer | clips, question), one row alone, no padding: the slow and obvious way."""
    clips = features(row["audios"])
    audio_id = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    prompt = encode_prompt(processor, [user(row["question"], len(clips))])
    encoded = expand_audio(
        join(prompt, encode_completion(processor, row[side])),
        [n_audio_tokens(c.n_frames) for c in clips],
        audio_id,
    )
    ids = torch.tensor([encoded.ids])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **stack(clips)).logits[0, :-1]
    picked = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return (picked * torch.tensor(encoded.mask[1:])).sum()


def by_hand(policy, reference, processor, features, weights):
    total = torch.tensor(0.0)
    for row, weight in zip(ROWS, weights, strict=True):
        margin = torch.tensor(0.0)
        for side, sign in (("chosen", 1), ("rejected", -1)):
            with torch.no_grad():
                anchor = answer_logp(reference, processor, features, row, side)
            margin = margin + sign * (answer_logp(policy, processor, features, row, side) - anchor)
        total = total - weight * torch.nn.functional.logsigmoid(BETA * margin)
    return total / len(ROWS)


def perturb(model):
    with torch.no_grad():
        draw = torch.Generator().manual_seed(1)
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=draw))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.5, 0.5, 1.0)])
def test_loss_and_gradients_equal_hand_arithmetic(tiny, tmp_path, weights, packed):
    trainer = make_trainer(tiny, tmp_path, weights, packed=packed)
    perturb(trainer.model)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}

    processor = trainer.processing_class
    twin = qwen2_audio.load_model(tiny.policy)
    perturb(twin)
    reference = qwen2_audio.load_model(tiny.policy)
    slow = by_hand(twin, reference, processor, ClipFeatures(processor, tiny.audio), weights)
    slow.backward()
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    assert ours
    for name, p in twin.named_parameters():
        if p.grad is not None and name in ours:
            torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_policy_equal_to_reference_gives_log_two(tiny, tmp_path, packed):
    trainer = make_trainer(tiny, tmp_path, (1.0, 1.0, 1.0), packed=packed)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(math.log(2), abs=1e-6)


WEIGHED = ["sigmoid", "ipo", "robust", "apo_zero", "apo_down", "sppo_hard", "nca_pair"]
WEIGHED += ["bco_pair", "discopop", "sigmoid_norm"]


@pytest.mark.parametrize("loss", WEIGHED)
def test_a_weighted_loss_is_the_weighted_mean_of_single_pair_losses(tiny, tmp_path, loss):
    weights = (1.5, 0.5, 1.0)
    trainer = make_trainer(tiny, tmp_path, weights, loss)
    perturb(trainer.model)
    rows = [trainer.train_dataset[i] for i in range(3)]
    loss_of_all = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss_of_all.backward()
    together = loss_of_all.item()
    trainer.use_weighting = False
    alone = [trainer.compute_loss(trainer.model, trainer.data_collator([row])).item() for row in rows]
    assert together == pytest.approx(sum(w * x for w, x in zip(weights, alone, strict=True)) / 3, rel=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_precomputed_reference_gives_the_same_loss(tiny, tmp_path, packed):
    live = make_trainer(tiny, tmp_path, (1.5, 0.5, 1.0))
    stored = make_trainer(tiny, tmp_path, (1.5, 0.5, 1.0), packed=packed, precompute_ref_log_probs=True)
    for trainer in (live, stored):
        perturb(trainer.model)
    losses = [
        t.compute_loss(t.model, t.data_collator([t.train_dataset[i] for i in range(3)])).item()
        for t in (live, stored)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_other_audio_gives_another_loss(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, (1.0, 1.0, 1.0))
    perturb(trainer.model)
    rows = [trainer.train_dataset[i] for i in range(2)]
    right = trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()
    for row in rows:
        row["audios"] = ["3.wav"]
    wrong = trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()
    assert wrong != pytest.approx(right, abs=1e-6)


def test_training_curves_are_those_of_the_stock_model(tiny, tmp_path, monkeypatch):
    """The reference, which TRL loads by the stock class's name, is packed too."""
    runs = []
    packed_path = PackedQwen2AudioModel._hidden
    monkeypatch.setattr(
        PackedQwen2AudioModel, "_hidden", lambda self, *a: runs.append(1) or packed_path(self, *a)
    )
    curves = []
    for packed in (False, True):
        trainer = make_trainer(
            tiny, tmp_path / str(packed), (1.5, 0.5, 1.0), packed=packed, max_steps=6, logging_steps=1
        )
        assert is_packed(trainer.model) == is_packed(trainer.ref_model) == packed
        trainer.train()
        curves.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(runs) == 12  # policy and reference
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[0][-1] < curves[0][0] - 0.01


def test_both_sides_of_a_pair_share_their_clips(tiny, tmp_path):
    stock, packed = (
        make_trainer(tiny, tmp_path, (1.0, 1.0, 1.0), packed=packed).data_collator(
            [{**row, "weight": 1.0} for row in ROWS]
        )
        for packed in (False, True)
    )
    assert stock["input_features"].shape[0] == 8  # 1 + 1 + 2, for chosen and for rejected
    assert packed["input_features"].shape[0] == 3
    assert packed["input_features"].shape[-1] < stock["input_features"].shape[-1]
    assert torch.equal(stock["input_ids"], packed["input_ids"])
    real = int(stock["attention_mask"].sum())
    assert len(packed["packed"].tokens) < 0.75 * real


def test_useful_work_is_in_every_logged_row(tiny, tmp_path):
    """All three pairs are in every step, so that each costs the same; the stock path counts nothing."""
    packed, stock = (
        make_trainer(tiny, tmp_path / str(p), (1.0, 1.0, 1.0), packed=p, logging_steps=1)
        for p in (True, False)
    )
    batch = packed.data_collator([packed.train_dataset[i] for i in range(3)])
    cost = cost_of(packed.model)
    expected = cost.of(batch["packed"]) + cost.scored * int(batch["completion_mask"].sum())
    for trainer in (packed, stock):
        trainer.train()
    rows = [row for row in packed.state.log_history if "loss" in row]
    assert [row["flops"] for row in rows] == pytest.approx([expected, expected])
    assert not any("flops" in row for row in stock.state.log_history)
