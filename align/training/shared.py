"""One dataset for several processes."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, load_from_disk

from align.training import ranks


def shared(dataset: Dataset, folder: Path) -> Dataset:
    """The same rows, for several processes from a folder that rank 0 writes.

    TRL caches the reference's log-probs beside the dataset's file and reads them on every rank; rows in
    memory have a temporary folder per process for that, and rank 1 would look in vain in its own.
    """
    if ranks.world_size() == 1:
        return dataset
    if ranks.is_first() and not (folder / "state.json").exists():  # the last file that is written
        dataset.save_to_disk(folder)
    ranks.barrier()
    return load_from_disk(folder)
