"""Score answer positions only, through TRL's own fused head, on every device.

TRL gives a model a fused head (`trl.trainer.utils.add_fused_lm_head`): it runs the backbone and turns
hidden states into log-probs in tiles, without the logits of all positions at once. On a GPU it drops the
positions without a label first; on a CPU it multiplies every position with the vocabulary. It also takes
labels that are already aligned (`shift_labels`). So it is handed one row with nothing but the answers'
positions, and what comes back is put where it belongs. Losses and metrics stay TRL's.

What this relies on beyond TRL's documented interface, held by test_packed_trl.py: that its
trainers call the model they are given with `fused_lm_head` and `labels`, that the fused forward takes
`shift_labels` and passes other arguments on to the backbone, and the fields of its output in `PER_TOKEN`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from align.models.packing import PackedBatch

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""Fields (N, T - 1) of TRL's `FusedCausalLMOutput`."""


def is_completion(batch: Mapping[str, Any]) -> Tensor:
    """Which tokens (B, T) of a batch are completions': `labels` in SFT, `completion_mask` in pairs."""
    mask: Tensor = batch["labels"] != -100 if "labels" in batch else batch["completion_mask"] == 1
    return mask


def answers_only(model: Callable[..., Any]) -> Callable[..., Any]:
    """`model`, but of batches that carry `packed` only positions with a label reach the head."""

    def forward(*, packed: PackedBatch | None = None, labels: Tensor | None = None, **batch: Any) -> Any:
        if packed is None or labels is None:
            given = {"packed": packed, "labels": labels}
            return model(**batch, **{name: value for name, value in given.items() if value is not None})
        answers = labels[:, 1:] != -100
        rows, columns = answers.nonzero(as_tuple=True)
        outputs = model(
            shift_labels=labels[rows, columns + 1][None],
            packed=packed,
            scored=rows * labels.shape[1] + columns,
            **batch,
        )
        for name in PER_TOKEN:
            scores = getattr(outputs, name)
            if scores is not None:
                setattr(outputs, name, scores.new_zeros(answers.shape).masked_scatter(answers, scores))
        outputs.label_mask = answers
        return outputs

    return forward
