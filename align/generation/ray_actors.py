"""The same batches over several processes: Ray Data actors, each with its own copy of the policy."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.data import ActorPoolStrategy

from align.generation.generate import Decoding, Request, Sampler, batch_seed


class _Completer:
    """One actor: loads the policy once, completes one numbered batch per call."""

    def __init__(self, policy: str, audio_root: str, how: Decoding, seed: int) -> None:
        self.sampler = Sampler(policy, Path(audio_root))
        self.how = how
        self.seed = seed

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        requests = [
            Request(text, tuple(audios), plain)
            for text, audios, plain in zip(row["texts"], row["audios"], row["plain"], strict=True)
        ]
        texts = self.sampler.complete(requests, self.how, batch_seed(self.seed, row["number"]))
        return {"number": row["number"], "completions": texts}


def complete(
    policy: Path | str,
    audio_root: Path,
    numbered: Mapping[int, Sequence[Request]],
    how: Decoding,
    *,
    seed: int,
    workers: int,
) -> Iterator[tuple[int, list[list[str]]]]:
    """Yield batches' numbers and completions as they are done, in any order.

    Each actor has a GPU to itself where there are any. What a batch's completions are depends on its number
    and `seed` alone, not on how many workers there are.
    """
    # Ray would print a progress bar per operator and copy the working folder to every worker.
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.init(
        ignore_reinit_error=True,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}},
    )
    rows = [
        {
            "number": number,
            "texts": [request.text for request in batch],
            "audios": [list(request.audios) for request in batch],
            "plain": [request.plain for request in batch],
        }
        for number, batch in numbered.items()
    ]
    try:
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Completer,
            fn_constructor_args=(str(policy), str(audio_root.resolve()), how, seed),
            compute=ActorPoolStrategy(size=workers),
            num_cpus=0.5,  # whole CPUs would leave none for Ray's own read tasks: it then hangs
            num_gpus=1 if torch.cuda.is_available() else 0,
        )
        for row in done.iter_rows():
            yield int(row["number"]), [list(texts) for texts in row["completions"]]
    finally:
        ray.shutdown()
