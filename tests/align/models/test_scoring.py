"""Log-probs and KL of completions against a plain softmax over padded rows, whatever the chunks."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from align.models.qwen2_audio.packed import pack
from align.models.scoring import batches_within, completion_logps, kl_per_completion, n_tokens
from tests.align.ragged_batch import Rows, pairs, small_model


def plain(model, batch):
    """The twin: log-softmax (B, T - 1, V) over all positions of padded rows, and what is scored."""
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    return logits.double().log_softmax(-1), batch["completion_mask"][:, 1:] == 1


@pytest.fixture(scope="module")
def models():
    """A policy and a reference that differs from it, stock and packed."""
    policy, reference = small_model(seed=0).eval(), small_model(seed=0).eval()
    with torch.no_grad():
        for weight in reference.model.language_model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return {
        "stock": (policy, reference),
        "packed": (pack(copy.deepcopy(policy)), pack(copy.deepcopy(reference))),
    }


@pytest.mark.parametrize("positions", [1, 7, 10_000])
@pytest.mark.parametrize("way", ["stock", "packed"])
def test_logps_equal_a_plain_softmax(models, way, positions):
    logps, scored = plain(models["stock"][0], Rows(None)(pairs()))
    batch = Rows(None if way == "stock" else 4)(pairs())
    expected = logps.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * scored
    found = completion_logps(models[way][0], batch, positions=positions)
    assert (found.double() - expected).abs().max() < 1e-5
    assert torch.equal(found != 0, scored)


def test_sft_batches_say_with_labels_what_is_scored(models):
    batch = Rows()(pairs())
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    sft = {name: value for name, value in batch.items() if name != "completion_mask"} | {"labels": labels}
    policy = models["packed"][0]
    assert torch.equal(completion_logps(policy, sft), completion_logps(policy, batch))


@pytest.mark.parametrize("max_tokens", [1, 300, 10_000])
@pytest.mark.parametrize("way", ["stock", "packed"])
def test_kl_equals_the_sum_over_the_vocabulary(models, way, max_tokens):
    rows = pairs()
    p, scored = plain(models["stock"][0], Rows(None)(rows))
    q, _ = plain(models["stock"][1], Rows(None)(rows))
    expected = ((p.exp() * (p - q)).sum(-1) * scored).sum(-1)[: len(rows)]

    def chosen_only(chunk):  # of the pairs: one row each, as completions have
        batch = Rows(None)(chunk) if way == "stock" else Rows()(chunk)
        batch["completion_mask"][len(chunk) :] = 0
        return batch

    found = kl_per_completion(*models[way], chosen_only, rows, max_tokens=max_tokens, positions=5)
    chosen = [value for value in found.tolist() if value]
    assert chosen == pytest.approx(expected.tolist(), rel=1e-4)
    assert min(chosen) > 1e-3


def test_batches_hold_no_more_tokens_than_allowed_and_keep_the_order():
    rows = pairs() * 3
    whole = [len(batch["input_ids"]) for batch in batches_within(Rows(), rows, 10**6)]
    assert whole == [2 * len(rows)]
    batches = list(batches_within(Rows(None), rows, 700))
    assert all(n_tokens(batch) <= 700 or len(batch["input_ids"]) == 2 for batch in batches)
    assert sum(len(batch["input_ids"]) for batch in batches) == 2 * len(rows)
    first = [batch["input_ids"][0] for batch in batches]
    assert first[0][: len(rows[0]["prompt_ids"])].tolist() == rows[0]["prompt_ids"]


def test_an_adapter_is_scored_too():
    model = pack(small_model())
    batch = Rows()(pairs())
    before = completion_logps(model, batch)
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj", r=2))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.add_(0.5)
    assert (completion_logps(adapted, batch) - before).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert torch.equal(completion_logps(adapted, batch), before)
