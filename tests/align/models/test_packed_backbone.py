"""The packed backbone against transformers' own: hidden states, log-probs, every gradient, saved files."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import Qwen2AudioForConditionalGeneration
from transformers.models.qwen2 import modeling_qwen2

from align.kernels.attention import Ragged
from align.kernels.prefix_tree import clips_apart
from align.models.qwen2_audio.clips import pack_rows
from align.models.qwen2_audio.packed import is_packed, pack
from tests.align.ragged_batch import (
    AUDIO,
    PAD,
    Rows,
    audio_batch,
    clips,
    gradients,
    pairs,
    small_model,
    worst,
)


@pytest.fixture
def all_float64(monkeypatch):
    """transformers casts to float32 in RMSNorm and RoPE; here everything stays in float64."""

    def norm(self, states):
        return (
            self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    def rotate(self, x, position_ids):
        angles = position_ids[..., None].double() * self.inv_freq.double()
        both = torch.cat([angles, angles], dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)

    monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_qwen2.Qwen2RotaryEmbedding, "forward", rotate)


def logps(model, batch):
    """Log-prob of each answer (2B,) by a plain softmax over the backbone's states, and those states."""
    batch = dict(batch)
    answers = batch.pop("completion_mask")[:, 1:].bool()
    states = model.model(**batch, use_cache=False).last_hidden_state
    targets = batch["input_ids"][:, 1:]
    tokens = -F.cross_entropy(model.lm_head(states[:, :-1]).transpose(1, 2), targets, reduction="none")
    return (tokens * answers).sum(-1), states * batch["attention_mask"][..., None]


def step(model, batch):
    """DPO loss with a made-up reference, backward; logps, states and gradients."""
    sums, states = logps(model, batch)
    chosen, rejected = sums.chunk(2)
    anchor = torch.linspace(-1, 1, len(chosen)).to(sums) + (chosen - rejected).detach()
    loss = -F.logsigmoid(chosen - rejected - anchor).mean()
    model.zero_grad(set_to_none=True)
    loss.backward()
    return sums.detach(), states.detach(), gradients(model)


@pytest.mark.parametrize("min_shared", [1, 4, 10_000], ids="share all of {}".format)
def test_logps_and_every_gradient_are_exact(all_float64, min_shared):
    """Tower, projector, embeddings, language model and head; 10,000: nothing but padding is saved."""
    model = small_model(torch.float64)
    plain = step(model, Rows(None)(pairs()))
    batch = Rows(min_shared)(pairs())
    ours = step(pack(copy.deepcopy(model)), batch)
    assert (ours[0] - plain[0]).abs().max() < 1e-12
    assert (ours[1] - plain[1]).abs().max() < 1e-12
    assert worst(ours[2], plain[2]) < 1e-11
    assert len(ours[2]) == len(list(model.parameters())) - 1  # the tower's positions are frozen
    real = int(batch["attention_mask"].sum())
    assert len(batch["packed"].tokens) < (0.6 if min_shared < 9 else 1.01) * real


@pytest.mark.parametrize("attention", ["dense", "split"])
def test_back_ends_give_the_same(all_float64, attention):
    model = small_model(torch.float64)
    plain = step(model, Rows(None)(pairs()))
    packed = pack(copy.deepcopy(model), attention)
    assert worst(step(packed, Rows()(pairs()))[2], plain[2]) < 1e-11


def test_without_the_tree_mask_everything_is_wrong(all_float64):
    """Negative control: the packed row under a plain causal mask, positions as they should be."""
    model = small_model(torch.float64)
    plain = step(model, Rows(None)(pairs()))
    batch = Rows()(pairs())
    tree = batch["packed"].sees
    one_row = Ragged.of(clips_apart([tree.segments[-1].end]), causal=True)
    batch["packed"] = batch["packed"].__class__(**{**vars(batch["packed"]), "sees": one_row})
    ours = step(pack(copy.deepcopy(model)), batch)
    assert (ours[0] - plain[0]).abs().max() > 1
    assert worst(ours[2], plain[2]) > 0.1


def test_without_the_halo_the_audio_is_wrong(all_float64):
    """Negative control: a clip cut off where it ends."""
    model = small_model(torch.float64)
    plain = step(model, Rows(None)(pairs()[:1]))
    batch = Rows()(pairs()[:1])
    batch["input_features"] = batch["input_features"][..., :-2]
    ours = step(pack(copy.deepcopy(model)), batch)
    assert (ours[0] - plain[0]).abs().max() > 1e-4


def test_text_alone_and_a_single_row(all_float64):
    model = small_model(torch.float64)
    text = [pairs()[2]]
    batch = Rows()(text)
    assert batch["packed"].clips is None
    plain = step(model, Rows(None)(text))
    ours = step(pack(copy.deepcopy(model)), batch)
    heard = {name: gradient for name, gradient in ours[2].items() if name not in plain[2]}
    assert worst({name: ours[2][name] for name in plain[2]}, plain[2]) < 1e-11
    # It listens to silence, times zero, so that every weight has a gradient on every process.
    assert any("audio_tower" in name for name in heard)
    assert all((gradient == 0).all() for gradient in heard.values())


def test_several_pairs_of_a_clip_and_equal_rows_are_shared(all_float64):
    first = pairs()[0]
    other = {**first, "chosen_ids": [11, 12, 13], "rejected_ids": first["chosen_ids"]}
    rows = [first, other, first]
    batch = Rows(1)(rows)
    assert len(batch["packed"].tokens) == len(first["prompt_ids"]) + 12 + 21 + 3
    assert batch["input_features"].shape[0] == 1
    model = small_model(torch.float64)
    plain = step(model, Rows(None)(rows))
    assert worst(step(pack(copy.deepcopy(model)), batch)[2], plain[2]) < 1e-11


def test_other_audio_is_never_shared():
    """Two clips of equal length in the same prompt: same ids, other states."""
    rows = [torch.tensor([1, 2, AUDIO, AUDIO, 3, 4]) for _ in range(2)]
    same = pack_rows(rows, [[0], [0]], [8, 8], AUDIO, 1)
    other = pack_rows(rows, [[0], [1]], [8, 8], AUDIO, 1)
    assert len(same.tokens) == 6
    assert len(other.tokens) == 2 + 2 * 4
    assert other.tokens.tolist() == [1, 2, AUDIO, AUDIO, 3, 4, AUDIO, AUDIO, 3, 4]
    assert sorted(other.audio_from.tolist()) == [0, 1, 2, 3]


def test_clips_that_do_not_fit_a_row_are_an_error():
    with pytest.raises(ValueError, match=r"row 0 has 3 audio tokens but its clips \[0\] give 2"):
        pack_rows([torch.tensor([1, AUDIO, AUDIO, AUDIO])], [[0]], [8], AUDIO)


def test_bfloat16_is_no_noisier_than_two_rows():
    """Against float64 with the same rounded weights, over four models."""
    errors = {"plain": [], "packed": []}
    noise = {"plain": [], "packed": []}
    for seed in range(4):
        rounded = small_model(torch.bfloat16, seed)
        exact = step(copy.deepcopy(rounded).double(), Rows(None)(pairs(seed)))
        found = {
            "plain": step(copy.deepcopy(rounded), Rows(None)(pairs(seed))),
            "packed": step(pack(copy.deepcopy(rounded)), Rows()(pairs(seed))),
        }
        for name, (sums, _, slopes) in found.items():
            errors[name].append((sums.double() - exact[0]).pow(2).mean())
            apart = sum((slopes[k].double() - exact[2][k]).pow(2).sum() for k in slopes)
            noise[name].append((apart / sum(g.pow(2).sum() for g in exact[2].values())).sqrt())
    for found in (errors, noise):
        assert sum(found["packed"]) <= 1.2 * sum(found["plain"])
    assert sum(errors["packed"]) > 0


def left_padded():
    prompts = [torch.tensor(row["prompt_ids"]) for row in pairs()[:2]]
    width = max(map(len, prompts))
    ids = torch.stack([F.pad(row, (width - len(row), 0), value=PAD) for row in prompts])
    mask = torch.stack([F.pad(torch.ones_like(row), (width - len(row), 0)) for row in prompts])
    return {"input_ids": ids, "attention_mask": mask} | audio_batch(prompts, [[0], [1]], clips(), None)


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_generate_takes_the_stock_path(how):
    model = small_model().eval()
    packed = pack(copy.deepcopy(model)).eval()
    tokens = [m.generate(**left_padded(), max_new_tokens=6, do_sample=False, **how) for m in (model, packed)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("wrong", [{"use_cache": True}, {"output_hidden_states": True}], ids=str)
def test_a_packed_batch_is_never_run_slowly_in_silence(wrong):
    packed = pack(small_model())
    batch = Rows()(pairs())
    batch.pop("completion_mask")
    with pytest.raises(ValueError, match=next(iter(wrong))):
        packed.model(**batch, **wrong)


def test_dropout_is_refused():
    model = small_model()
    model.config.audio_config.dropout = 0.1
    with pytest.raises(ValueError, match="set packed: false"):
        pack(model)


def test_saved_files_equal_the_stock_ones(tmp_path):
    model = small_model()
    packed = pack(copy.deepcopy(model))
    model.save_pretrained(tmp_path / "stock")
    packed.save_pretrained(tmp_path / "packed")
    weights = [load_file(tmp_path / kind / "model.safetensors") for kind in ("stock", "packed")]
    assert list(weights[0]) == list(weights[1])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    configs = [json.loads((tmp_path / kind / "config.json").read_text()) for kind in ("stock", "packed")]
    assert configs[0] == configs[1]
    again = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "packed")
    assert not is_packed(again)
    assert is_packed(pack(again))
    for name, value in again.state_dict().items():
        assert torch.equal(value, packed.state_dict()[name]), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same(all_float64, reentrant):
    model = small_model(torch.float64)
    plain = step(model, Rows(None)(pairs()))
    packed = pack(copy.deepcopy(model)).train()
    packed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        packed.enable_input_require_grads()
    assert worst(step(packed, Rows()(pairs()))[2], plain[2]) < 1e-11
