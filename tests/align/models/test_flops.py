"""The cost model against torch's FLOP counter on real steps, and against arithmetic by hand."""

import pytest
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from align.models.answer_head import answers_only
from align.models.qwen2_audio.flops import cost_of
from align.models.qwen2_audio.packed import pack
from tests.align.ragged_batch import VOCAB, Rows, pairs, small_model


def counted(model, batch):
    """FLOPs of forward and backward as torch counts them; it counts none for attention on a CPU."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model.get_base_model() if hasattr(model, "peft_config") else model)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    with FlopCounterMode(display=False) as counter:
        outputs = answers_only(model)(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
        outputs.log_probs.sum().backward()
    return counter.get_total_flops()


def without_attention(cost, batch):
    scored = int(batch["completion_mask"][:, 1:].sum())
    return cost._replace(pair=0, frame_pair=0).of(batch["packed"]) + cost.scored * scored


def test_a_decoder_layer_by_hand():
    """Per token: q and o 32 x 32, k and v 32 x 16 (two of four heads), three products of 32 x 48."""
    cost = cost_of(small_model(layers=1))
    assert cost.token == 3 * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert cost.scored == 3 * 2 * 32 * VOCAB
    assert cost.pair == 3 * 4 * 32
    assert cost.frame_pair == 3 * 4 * 24
    assert cost.vector == 3 * 2 * 24 * 32


@pytest.mark.parametrize("kind", ["everything learns", "tower frozen", "LoRA"])
def test_the_cost_model_equals_the_counter(kind):
    """The fused head computes its logits twice. The rest of the difference: short clips are padded in the
    convolutions, and with LoRA the first layer (of two, here) needs no gradient of its input."""
    model = pack(small_model())
    model.model.audio_tower.requires_grad_(kind == "everything learns")
    model.model.audio_tower.embed_positions.requires_grad_(False)
    if kind == "LoRA":
        targets = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    batch = Rows()(pairs())
    cost = cost_of(model.get_base_model() if kind == "LoRA" else model)
    scored = int(batch["completion_mask"][:, 1:].sum())
    recomputed = scored * 2 * 32 * VOCAB
    ours = without_attention(cost, batch) + recomputed
    assert counted(model, batch) == pytest.approx(ours, rel=0.06 if kind == "LoRA" else 0.03)


def test_a_frozen_model_needs_no_backward():
    frozen, learning = small_model(layers=1).requires_grad_(False), small_model(layers=1)
    assert cost_of(frozen).token * 3 == cost_of(learning).token
    assert cost_of(frozen).pair * 3 == cost_of(learning).pair
