"""TRL's own trainers, their losses untouched, over the packed backbone against over the stock model."""

import copy

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from align.models.answer_head import answers_only
from align.models.qwen2_audio.packed import PackedQwen2AudioModel, pack
from tests.align.ragged_batch import (
    VOCAB,
    Rows,
    audio_batch,
    clips,
    gradients,
    pairs,
    small_model,
    text_batch,
    worst,
)

disable_progress_bars()
LORA = LoraConfig(
    r=4,
    lora_alpha=8,
    init_lora_weights=False,
    target_modules=r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
)


def tokenizer():
    words = {f"w{i}": i for i in range(VOCAB)}
    plain = Tokenizer(tokenizer_models.WordLevel(words, unk_token="w3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


class Tokenised:
    """TRL 1.16 cannot tokenise audio, so rows come tokenised: the one method that has to give way."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class DPO(Tokenised, DPOTrainer):
    """With what AudioDPOTrainer adds for packed batches; for stock ones that is nothing."""

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(answers_only(model), inputs)

    def _compute_loss(self, model, inputs, return_outputs):
        return super()._compute_loss(answers_only(model), inputs, return_outputs)


class SFT(Tokenised, SFTTrainer):
    """As AudioSFTTrainer."""

    def compute_loss(self, model, *args, **kwargs):
        return super().compute_loss(answers_only(model), *args, **kwargs)


class Gradients(TrainerCallback):
    """Keeps the gradients of each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(gradients(model))


def arguments(folder, **more):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "remove_unused_columns": False,
        "max_length": None,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        **more,
    }


def models(packed, train_tower=True):
    reference = small_model()
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(1)
        for weight in policy.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=draw))
    policy.model.audio_tower.requires_grad_(train_tower)
    policy.model.audio_tower.embed_positions.requires_grad_(False)
    return (pack(policy), pack(reference)) if packed else (policy, reference)


def dpo(packed, folder, *, lora=False, train_tower=True, **more):
    policy, reference = models(packed, train_tower)
    return DPO(
        model=policy,
        ref_model=None if lora else reference,
        args=DPOConfig(**arguments(folder, **{"beta": 0.1, "label_smoothing": 0.1, **more})),
        train_dataset=Dataset.from_list(pairs()),
        processing_class=tokenizer(),
        data_collator=Rows(4 if packed else None),
        callbacks=[Gradients()],
        peft_config=LORA if lora else None,
    )


def kept(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, Gradients)).steps


def compare(stock, packed):
    """Two steps of each: loss within 1e-5, metrics within 1e-4, every gradient tensor within 1e-4."""
    for trainer in (stock, packed):
        trainer.train()
    logs = [[row for row in t.state.log_history if "loss" in row] for t in (stock, packed)]
    assert len(logs[0]) == len(logs[1]) == 2
    for plain, ours in zip(*logs, strict=True):
        assert plain.keys() == ours.keys()
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        for name in plain.keys() - {"loss"}:
            assert ours[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-4), name
    for plain, ours in zip(kept(stock), kept(packed), strict=True):
        assert worst(ours, plain) < 1e-4


@pytest.fixture
def runs(monkeypatch):
    """How often the packed path ran."""
    counted = []
    stock = PackedQwen2AudioModel._hidden

    def counting(self, *args):
        counted.append(1)
        return stock(self, *args)

    monkeypatch.setattr(PackedQwen2AudioModel, "_hidden", counting)
    return counted


CASES = {
    "live reference, tower trained": {},
    "live reference, tower frozen": {"train_tower": False},
    "LoRA, reference by adapter off": {"lora": True, "train_tower": False},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"activation_checkpointing": True},
    "WPO weights": {"use_weighting": True},
    "length desensitisation": {"ld_alpha": 0.5},
    "two losses": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
}


@pytest.mark.parametrize("case", CASES)
def test_dpo_steps_equal_those_of_the_stock_model(tmp_path, runs, case):
    compare(dpo(False, tmp_path / "stock", **CASES[case]), dpo(True, tmp_path / "packed", **CASES[case]))
    assert len(runs) >= 4  # policy and reference, twice


@pytest.mark.parametrize("lora", [False, True])
def test_precomputed_reference(tmp_path, lora):
    more = {"lora": lora, "train_tower": False, "precompute_ref_log_probs": True}
    compare(dpo(False, tmp_path / "stock", **more), dpo(True, tmp_path / "packed", **more))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    return dpo(False, folder / "stock"), dpo(True, folder / "packed")


LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"]
LOSSES += ["aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_of_trl_runs_through_it_unchanged(both, loss):
    found = []
    for trainer in both:
        trainer.loss_types = [loss]
        trainer.model.zero_grad()
        value = trainer.compute_loss(trainer.model, trainer.data_collator(pairs()))
        value.backward()
        found.append((value.item(), gradients(trainer.model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert worst(found[1][1], found[0][1]) < 1e-4


class Answers:
    """SFT rows: several answers on a clip, text alone, two clips."""

    def __init__(self, min_shared):
        self.min_shared = min_shared

    def __call__(self, rows):
        ids = [torch.tensor(row["prompt_ids"] + row["answer"]) for row in rows]
        starts = [len(row["prompt_ids"]) for row in rows]
        labels = [torch.where(torch.arange(len(r)) < s, -100, r) for r, s in zip(ids, starts, strict=True)]
        heard = [row["clips"] for row in rows]
        return (
            text_batch(ids)
            | audio_batch(ids, heard, clips(), self.min_shared)
            | {"labels": pad_sequence(labels, batch_first=True, padding_value=-100)}
        )


def sft(packed, folder, **more):
    rows = [
        {"prompt_ids": pair["prompt_ids"], "answer": pair[side][:n], "clips": pair["clips"]}
        for pair in pairs()
        for side, n in (("chosen_ids", 99), ("rejected_ids", 3))
    ]
    return SFT(
        model=models(packed)[0],
        args=SFTConfig(**arguments(folder, **{"per_device_train_batch_size": 8, **more})),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        data_collator=Answers(4 if packed else None),
        callbacks=[Gradients()],
    )


@pytest.mark.parametrize(
    "more",
    [{}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, {"loss_type": "dft"}],
    ids=str,
)
def test_sft_with_several_answers_per_clip(tmp_path, more):
    compare(sft(False, tmp_path / "stock", **more), sft(True, tmp_path / "packed", **more))


def test_a_batch_without_any_answer_has_a_loss_of_zero_and_gradients(both):
    """As TRL's own head has it: such a micro-batch must not stop the others."""
    packed = both[1]
    batch = packed.data_collator(pairs())
    labels = torch.full_like(batch["input_ids"], -100)
    batch.pop("completion_mask")
    outputs = answers_only(packed.model)(**batch, labels=labels, use_cache=False, fused_lm_head=True)
    assert outputs.log_probs.shape == (8, labels.shape[1] - 1)
    assert outputs.loss.item() == 0
    outputs.loss.backward()


def test_the_head_sees_answers_alone(both, monkeypatch):
    """On a CPU TRL multiplies every position with the vocabulary; here only those that count."""
    from trl.trainer import utils

    seen = []
    stock = utils._ChunkedLogProbFunction.apply

    class Counting:
        @staticmethod
        def apply(states, *args):
            seen.append(states.shape[0])
            return stock(states, *args)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Counting)
    for trainer in both:
        batch = trainer.data_collator(pairs())
        answers, everywhere = int(batch["completion_mask"].sum()), batch["input_ids"][:, 1:].numel()
        trainer.compute_loss(trainer.model, batch)
        trainer.compute_ref_log_probs(trainer.ref_model, batch)
    live = everywhere  # a live reference is TRL's own call
    assert seen == [everywhere, live, everywhere, answers, live, answers]
