"""Many requests through an engine, batch by batch: saved, resumed, over as many workers as there are.

What a completion is depends on its request's number and the seed alone, not on the number of workers, on the
batch size (but for rounding, see `decoding`) or on how often the run was killed.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from align.generation.engine import Completion, Decoding, Engine, Request
from align.models.features import ClipFeatures
from align.run_folder.artifacts import read_kept
from preference_data.audio.clip_files import BadAudio
from preference_data.store import write_text

log = logging.getLogger(__name__)
Completions = list[list[Completion]]
"""The completions of each request, in order."""
MakeEngine = Callable[[], Engine]
"""Loads an engine where it is called: in this process, or in a worker on a machine of its own."""


class RequestSet(NamedTuple):
    """Requests about clips that `clips` finds; a request's number is its place. `name` names a folder."""

    name: str
    clips: ClipFeatures
    requests: Sequence[Request]


class _Batch(NamedTuple):
    set_index: int
    numbered: dict[int, Request]


def complete_all(
    make_engine: MakeEngine,
    sets: Sequence[RequestSet],
    decoding: Decoding,
    *,
    seed: int,
    batch_size: int,
    folder: Path | None = None,
    workers: int = 1,
    on_progress: Callable[[int], object] | None = None,
) -> dict[str, Completions]:
    """Completions of every set's requests, by the set's name; none of one whose clip cannot be read.

    Args:
        make_engine: called only if something is missing; can be pickled where there are several workers.
        sets: with different names.
        decoding: how completions are drawn.
        seed: of the draws.
        batch_size: requests that an engine is given at a time.
        folder: keeps each batch as it is done, and is read first; None keeps nothing.
        workers: processes, each with an engine and, where the cluster has GPUs, a GPU of its own.
        on_progress: told how many requests are done, earlier runs' included.
    """
    results = [_saved(folder / part.name) if folder else {} for part in sets]
    done = sum(map(len, results))
    if on_progress:
        on_progress(done)
    todo = [batch for i, part in enumerate(sets) for batch in _missing(i, part, results[i], batch_size)]
    if todo:
        clips = [part.clips for part in sets]
        run = partial(_in_workers, workers) if workers > 1 else _in_process
        for set_index, completed in run(make_engine, clips, todo, decoding, seed):
            results[set_index] |= completed
            if folder:
                _save(folder / sets[set_index].name, completed)
            done += len(completed)
            if on_progress:
                on_progress(done)
    return {
        part.name: [result[number] for number in range(len(part.requests))]
        for part, result in zip(sets, results, strict=True)
    }


def first_texts(completions: Sequence[Sequence[Completion]]) -> list[str]:
    """The text of each request's first completion; empty where there is none."""
    return [group[0].text if group else "" for group in completions]


# -------------------------------------------------------------------------- batches and what is kept


def _missing(set_index: int, part: RequestSet, known: Mapping[int, Any], batch_size: int) -> Iterator[_Batch]:
    """Batches of the requests that are not done. Their make-up does not depend on how many are."""
    left = (number for number in range(len(part.requests)) if number not in known)
    for _, numbers in groupby(left, key=lambda number: number // batch_size):
        yield _Batch(set_index, {number: part.requests[number] for number in numbers})


def _save(folder: Path, completed: Mapping[int, Sequence[Completion]]) -> None:
    """One file a batch, named by its first request."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {number: [completion._asdict() for completion in group] for number, group in completed.items()}
    write_text(folder / f"{min(completed):08d}.json", json.dumps(rows) + "\n")


def _saved(folder: Path) -> dict[int, list[Completion]]:
    return {
        int(number): [Completion(**completion) for completion in group]
        for path in sorted(folder.glob("*.json"))
        for number, group in (read_kept(path) or {}).items()
    }


# -------------------------------------------------------------------------- where engines run

_Done = Iterator[tuple[int, dict[int, list[Completion]]]]
"""The index of a batch's set, and its completions by number."""


def _completed(
    engine: Engine, numbered: Mapping[int, Request], decoding: Decoding, seed: int
) -> dict[int, list[Completion]]:
    """Completions by number; none of a request with a clip that cannot be read, and the log names it."""
    try:
        return dict(engine.complete(numbered, decoding, seed))
    except BadAudio:
        readable = {}
        for number, request in numbered.items():
            try:
                engine.clips(request.audios)
                readable[number] = request
            except BadAudio as error:
                log.warning("request %d is left out: %s", number, error)
        nothing: dict[int, list[Completion]] = {number: [] for number in numbered}
        return nothing | dict(engine.complete(readable, decoding, seed))


def _in_process(
    make_engine: MakeEngine,
    clips: Sequence[ClipFeatures],
    batches: Sequence[_Batch],
    decoding: Decoding,
    seed: int,
) -> _Done:
    engine = make_engine()
    try:
        for batch in batches:
            engine.clips = clips[batch.set_index]
            yield batch.set_index, _completed(engine, batch.numbered, decoding, seed)
    finally:
        engine.close()


class _Worker:
    """A Ray actor: loads an engine where it runs, so that its own machine decides about the device."""

    def __init__(self, make_engine: MakeEngine, clips: Sequence[ClipFeatures], workers: int) -> None:
        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
        self.engine = make_engine()
        self.clips = clips

    def complete(
        self, batch: _Batch, decoding: Decoding, seed: int
    ) -> tuple[int, dict[int, list[Completion]]]:
        """The batch's set and completions."""
        self.engine.clips = self.clips[batch.set_index]
        return batch.set_index, _completed(self.engine, batch.numbered, decoding, seed)

    def close(self) -> None:
        """End what the engine has started; it dies with a worker that is killed."""
        self.engine.close()


def _in_workers(
    workers: int,
    make_engine: MakeEngine,
    clips: Sequence[ClipFeatures],
    batches: Sequence[_Batch],
    decoding: Decoding,
    seed: int,
) -> _Done:
    """Batches as they are done, in any order, from at most `workers` actors."""
    import ray  # a second of imports, for those who have several workers
    from ray.util import ActorPool

    ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
    try:
        # The cluster is asked, not this process: a driver on a cluster's head has no GPU itself.
        gpus = int(ray.cluster_resources().get("GPU", 0))
        n = min(workers, len(batches), gpus or workers)
        actor = ray.remote(_Worker).options(num_gpus=1 if gpus else 0)
        actors = [actor.remote(make_engine, clips, n) for _ in range(n)]
        yield from ActorPool(actors).map_unordered(
            lambda worker, batch: worker.complete.remote(batch, decoding, seed), batches
        )
        ray.get([actor.close.remote() for actor in actors])
    finally:
        ray.shutdown()
