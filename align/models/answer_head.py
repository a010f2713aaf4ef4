"""Score answer positions only, through TRL's own fused head, on every device.

TRL's trainers bind a fused head to `model.forward` (`trl.trainer.utils.add_fused_lm_head`): it runs the
backbone and turns hidden states into log-probs in tiles. On a GPU it drops the positions without a label
first; on a CPU it multiplies every position with the vocabulary. It also takes labels that are already
aligned (`shift_labels`). So we hand it one row with nothing but the answers' positions, and put what comes
back where it belongs. Losses and metrics stay TRL's.

What we rely on beyond TRL's documented interface, held by tests/align/test_trl_contract.py: the arguments
`fused_lm_head`, `labels`, `shift_labels` of the bound forward, that others reach the backbone, and the
fields of its output named in `PER_TOKEN`.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor, nn

from align.models.packing import PackedBatch

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""Fields (N, T - 1) of TRL's `FusedCausalLMOutput`."""


def score_answers_only(model: nn.Module) -> None:
    """Wrap the fused head that TRL bound to `model`, for batches that carry `packed`."""
    fused = model.forward

    @functools.wraps(type(model).forward)  # generate() checks its arguments against this signature
    def forward(
        self: nn.Module,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        packed: PackedBatch | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or packed is None or labels is None:
            given = {"labels": labels, "packed": packed, "fused_lm_head": fused_lm_head or None}
            kwargs |= {name: value for name, value in given.items() if value is not None}
            return fused(*args, **kwargs)
        answers = labels[:, 1:] != -100
        rows, columns = answers.nonzero(as_tuple=True)
        outputs = fused(
            *args,
            fused_lm_head=True,
            shift_labels=labels[rows, columns + 1][None],
            packed=packed,
            scored=rows * labels.shape[1] + columns,
            **kwargs,
        )
        for name in PER_TOKEN:
            scores = getattr(outputs, name)
            if scores is not None:
                setattr(outputs, name, scores.new_zeros(answers.shape).masked_scatter(answers, scores))
        outputs.label_mask = answers
        return outputs

    model.forward = types.MethodType(forward, model)
