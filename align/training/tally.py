"""Loss per task and per source, and how many clips had to be replaced, between two lines of the log."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

log = logging.getLogger(__name__)
_AT_LEAST = 1000
"""Examples. Until so many were seen, as many bad clips are let through as of this number would be."""
_TOLD = 5


class TooManyBadClips(ValueError):
    """More of the clips cannot be read than the recipe allows."""


class Tally:
    """Sums over this process' batches; `take` adds up those of all processes."""

    max_bad_fraction = 0.01

    def __init__(self) -> None:
        self._seen = self._bad = 0
        self._batches: list[tuple[Mapping[str, Sequence[str]], Tensor, Tensor]] = []

    def add(self, about: Mapping[str, Sequence[str]], log_probs: Tensor, mask: Tensor) -> None:
        """Note a batch: `log_probs` (B, T) of its targets, 0 and `mask` 0 elsewhere. Waits for no device."""
        self._batches.append((about, log_probs.detach().float().sum(-1), mask.sum(-1)))

    def take(self) -> dict[str, float]:
        """Mean loss per token since the last call, by task and, of several sources, by source.

        Must be called by all processes at once.

        Raises:
            TooManyBadClips: on all of them.
        """
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        replaced: list[str] = []
        n = 0
        for about, log_probs, tokens in self._batches:
            both = torch.stack([-log_probs.double(), tokens.double()], dim=-1).cpu()
            for task, source, row in zip(about["tasks"], about["sources"], both, strict=True):
                sums[f"loss/task/{task}"] += row
                if source:
                    sums[f"loss/source/{source}"] += row
            replaced += about["replaced"]
            n += len(about["tasks"])
        self._batches.clear()
        mine = {"sums": {name: pair.tolist() for name, pair in sums.items()}, "replaced": replaced, "n": n}
        return self._over_all(gather_object([mine]))

    def _over_all(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        replaced = [text for part in parts for text in part["replaced"]]
        self._seen += sum(part["n"] for part in parts)
        self._bad += len(replaced)
        if replaced:
            log.warning("%d clips could not be read and were replaced: %s", len(replaced), replaced[:_TOLD])
        if self._bad > self.max_bad_fraction * max(self._seen, _AT_LEAST):
            raise TooManyBadClips(
                f"{self._bad} clips of {self._seen} examples could not be read (allowed max_bad_fraction="
                f"{self.max_bad_fraction:.1%} since this process began), the last ones: {replaced[:_TOLD]}; "
                "mend the corpus, or raise max_bad_fraction"
            )
        losses = {}
        for name in sorted({name for part in parts for name in part["sums"]}):
            pairs = [part["sums"][name] for part in parts if name in part["sums"]]
            losses[name] = sum(loss for loss, _ in pairs) / max(1.0, sum(tokens for _, tokens in pairs))
        return {**losses, "replaced_clips": float(self._bad)} if self._bad else losses
