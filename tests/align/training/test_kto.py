"""KTO: losses and all gradients against arithmetic done by hand, row by row, unpadded; the stage."""

import copy
import inspect

import pytest
import torch
from trl import KTOTrainer

from align.models.chat import encode_completion, encode_prompt, expand_audio, join
from align.models.features import ClipFeatures, stack
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.clips import n_audio_tokens
from align.models.qwen2_audio.packed import PackedQwen2AudioModel, pack
from align.training.collate import LabelCollator, label_row
from align.training.methods import Schedule, kahneman_tversky_optimisation
from align.training.reference import ReferenceStore
from align.training.run import arguments
from align.training.tuning import LoRA, Tuning
from preference_data.prompts.prompts import BadExample
from preference_data.schema import Label

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
