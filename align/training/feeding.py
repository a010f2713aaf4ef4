"""Examples -> batches, in worker processes, with clips that turn out to be unusable replaced.

Decoding and mel features take 10 to 50 ms of a core per clip and run beside the training; how many workers
do that is TRL's `dataloader_num_workers`.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from align.training.collate import Row, SFTCollator
from align.training.order import Examples
from preference_data.audio.clip_files import BadAudio

ABOUT = "about"
"""In a batch, not for the model: `tasks` and `sources` per row, and what was wrong with `replaced` clips."""
_TRIES = 100
_WORKERS = 4
CACHE_BYTES = 1 << 30
"""Of features, over all workers of a process."""


@dataclass
class FeedingCollator:
    """Collates examples; one with a clip that cannot be read gives way to the next of its source.

    Which one that is follows from the files alone, so a resumed run replaces it by the same.
    """

    collate: SFTCollator
    examples: Examples

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The batch of `SFTCollator` with `ABOUT` added.

        Raises:
            BadAudio: none of the next 100 examples of a source can be read either.
        """
        replaced: list[str] = []
        try:
            batch = self.collate(rows)
        except BadAudio:
            rows = [self._usable(row, replaced) for row in rows]
            batch = self.collate(rows)
        about = {
            "tasks": [row["task"] for row in rows],
            "sources": [row["source"] for row in rows],
            "replaced": replaced,
        }
        return {**batch, ABOUT: about}

    def _usable(self, row: Row, replaced: list[str]) -> Row:
        further = 0
        while True:
            try:
                self.collate.features(row["audios"])
                return row
            except BadAudio as error:
                further += 1
                if further > _TRIES:
                    raise
                replaced.append(str(error))
                row = self.examples.instead_of(row["draw"], further)


def loader_settings(passed_on: dict[str, Any]) -> dict[str, Any]:
    """Trainer arguments for the workers, from the recipe's `trl:`; without a word there, 4 beside a GPU.

    They start from a clean process, not as copies of this one: a copy of a process with threads (progress
    display, MLflow, OpenMP) can hang on a lock that no thread of it will ever release.
    """
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    default = min(_WORKERS, max(1, cores - 1)) if torch.cuda.is_available() else 0
    workers = int(passed_on.get("dataloader_num_workers", default))
    if not workers:
        return {"dataloader_num_workers": 0}
    multiprocessing.set_forkserver_preload([__name__])
    return {"dataloader_num_workers": workers, "dataloader_multiprocessing_context": "forkserver"}
