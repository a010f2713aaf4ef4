"""Qwen2-Audio with a scalar head at the last token of a completion: what it is worth.

The backbone is the policy's, stock or packed, under the policy's names; the head is `score.weight`, where
transformers' sequence classifiers have theirs. A saved one differs from a policy in that tensor, in having no
language head, and in `architectures` of its config.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2AudioConfig, Qwen2AudioModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioPreTrainedModel

from align.models.qwen2_audio.packed import PackedQwen2AudioModel

HEAD = "score"
"""The head's name as a module."""
# save_pretrained finds the Hub's weight names by class name, and knows no class but transformers' own
register_checkpoint_conversion_mapping(
    "Qwen2AudioForReward", get_checkpoint_conversion_mapping("qwen2_audio"), overwrite=True
)


class RewardHead(nn.Linear):
    """Always float32: in bfloat16 rewards of 8 and 8.03 would be the same."""

    def forward(self, states: Tensor) -> Tensor:
        """Rewards (N, 1) of hidden states (N, D)."""
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), self.weight.float())


class Qwen2AudioForReward(Qwen2AudioPreTrainedModel):
    """The backbone and the head, with the interface of a transformers sequence classifier of one label."""

    _keys_to_ignore_on_load_unexpected = [r"lm_head"]  # a policy's

    def __init__(self, config: Qwen2AudioConfig) -> None:
        config.id2label = {0: "reward"}
        super().__init__(config)
        self.model = Qwen2AudioModel(config)
        self.score = RewardHead(config.text_config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, *, attention_mask: Tensor, **batch: Any) -> SequenceClassifierOutput:
        """Rewards (N, 1) of right-padded rows, as `logits`; further arguments are the backbone's."""
        last = attention_mask.sum(-1) - 1
        rows = torch.arange(len(last), device=last.device)
        if batch.get("packed") is not None and isinstance(self.model, PackedQwen2AudioModel):
            batch["scored"] = rows * attention_mask.shape[1] + last
            states = self.model(attention_mask=attention_mask, **batch).last_hidden_state[0]
        else:
            states = self.model(attention_mask=attention_mask, **batch).last_hidden_state[rows, last]
        return SequenceClassifierOutput(logits=self.score(states))


def load_model(path: Path | str, *, head_seed: int | None = None) -> Qwen2AudioForReward:
    """A saved reward model; with `head_seed` also one made of a policy, with a head drawn from the seed.

    The head's spread is 1 / sqrt(D + 1), so that first rewards are about 1 (arXiv:2009.01325).

    Raises:
        ValueError: something is missing in the folder, such as the head of a reward model.
    """
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model, loading = Qwen2AudioForReward.from_pretrained(
        path, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    missing = set(loading["missing_keys"])
    if head_seed is not None and missing == {f"{HEAD}.weight"}:
        draw = torch.Generator().manual_seed(head_seed)
        width = model.score.in_features
        with torch.no_grad():
            model.score.weight.copy_(torch.randn(1, width, generator=draw) / (width + 1) ** 0.5)
    elif missing:
        raise ValueError(
            f"{path} is no reward model: it lacks {', '.join(sorted(missing)[:3])}. Name what "
            "`stage: reward` has made"
        )
    model.model.audio_tower.embed_positions.requires_grad_(False)
    return model


def is_reward_model(model: nn.Module) -> bool:
    """Whether `model`, however wrapped, gives rewards instead of logits of tokens."""
    return any(isinstance(module, Qwen2AudioForReward) for module in model.modules())
