"""A training stage on several processes: Ray Train starts them, replaces the dead, and stops when told.

Every worker runs the stage's own `run(config, inputs, out)`, as one process would; rank 0 writes what is
written once. A replaced group of workers goes on from the newest whole checkpoint in the stage's folder,
which all of them must see. (Ray Train has checkpoints of its own; a kill right after one was reported
loses it, so they are not used.) The driver and its workers exchange a few small files in `.workers/`.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.execution.attempt import Attempt
from align.recipe.config.base import StageConfig
from align.recipe.config.training import Hardware
from align.run_folder.artifacts import (
    Interrupted,
    StageFolder,
    heeding_stop,
    read_json,
    stop_requested,
    write_json,
)
from align.run_folder.quiet import quieten
from align.stages import STAGES
from preference_data.store import write_text

WORKERS = ".workers"
"""In a stage's unfinished folder: what its driver and workers tell each other."""
_LOOK_EVERY_S = 0.5
_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's smallest: nothing large goes through it
_LOST_PEER = ("connection", "timed out", "gloo", "nccl", "socket", "monitoredbarrier", "heartbeat")
"""In messages of torch.distributed's plain RuntimeErrors: another rank is gone, this one is well."""


class WorkersFailed(RuntimeError):
    """The stage failed on its workers."""


class ClusterTooSmall(RuntimeError):
    """The Ray cluster has not what `hardware` asks for."""


def run_stage(config: StageConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Run a stage in this process or, where its config has `hardware`, on workers.

    Raises:
        Interrupted: a stop was requested; what was saved resumes.
        WorkersFailed, ClusterTooSmall: see there.
    """
    hardware: Hardware | None = getattr(config, "hardware", None)
    if hardware is None:
        module = importlib.import_module(STAGES[config.stage])
        metrics: dict[str, float] = module.run(config, inputs, out)
        return metrics
    out = StageFolder(out.path.parent.resolve(), out.name, out.fingerprint)
    inputs = {name: path.resolve() if path.exists() else path for name, path in inputs.items()}
    return _on_workers(hardware, _Job(config, inputs, out, hardware.timeout_s))


@dataclass(frozen=True)
class _Job:
    """What a worker gets."""

    config: StageConfig
    inputs: dict[str, Path]
    out: StageFolder
    timeout_s: int

    @property
    def board(self) -> _Board:
        return _Board(self.out.path / WORKERS)


class _Board:
    """The files by which driver and workers talk: `stop`, `outcome.json`, a folder per group of workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def stop(self) -> Path:
        """Made by the driver when it is told to stop."""
        return self.folder / "stop"

    @property
    def said(self) -> Path:
        """What rank 0 has printed, and its warnings, for the driver's terminal."""
        return self.folder / "said.txt"

    @property
    def outcome(self) -> dict[str, Any] | None:
        """How the stage ended, once it has: `metrics`, `interrupted` or `error`."""
        path = self.folder / "outcome.json"
        return read_json(path) if path.exists() else None

    def settle(self, **outcome: Any) -> None:
        """Say how the stage ended."""
        write_json(self.folder / "outcome.json", outcome)

    @property
    def groups(self) -> list[Path]:
        """One folder per group of workers that was started, in order."""
        return sorted(self.folder.glob("group-*"))

    def open_group(self) -> Path:
        """A new group's folder."""
        folder = self.folder / f"group-{len(self.groups) + 1:04d}"
        folder.mkdir()
        return folder

    def last_words(self, group: Path, workers: int) -> str:
        """What each rank of a group that failed said last; those first that said nothing."""
        parts = []
        for rank in range(workers):
            place = group / f"rank-{rank}.place"
            name = f"rank {rank} ({place.read_text('utf-8')})" if place.exists() else f"rank {rank}"
            told = group / f"rank-{rank}.txt"
            if told.exists():
                parts.append(f"{name}: {told.read_text('utf-8').splitlines()[-1]}")
            else:
                parts.insert(0, f"{name} said nothing: killed, hung, or out of memory")
        return "; ".join(parts)


# -------------------------------------------------------------------------- the driver


def _on_workers(hardware: Hardware, job: _Job) -> dict[str, float]:
    """Start the workers, follow them, and tell how it ended."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    board = job.board
    _wipe(board.folder)
    with _cluster(hardware):
        on_gpu = _uses_gpus(hardware, ray.cluster_resources().get("GPU", 0))
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": job},
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=hardware.timeout_s),
            scaling_config=ScalingConfig(
                num_workers=hardware.workers,
                use_gpu=on_gpu,
                resources_per_worker={"CPU": hardware.cpus_per_worker, **({"GPU": 1} if on_gpu else {})},
            ),
            run_config=RunConfig(
                name="ray",
                storage_path=str(board.folder),
                failure_config=FailureConfig(max_failures=hardware.max_failures),
            ),
        )
        error = _follow(trainer, job, hardware)
    outcome = board.outcome
    if outcome is None:
        words = board.last_words(board.groups[-1], hardware.workers) if board.groups else ""
        raise WorkersFailed(
            f"{hardware.workers} workers failed, after {max(0, len(board.groups) - 1)} replacements "
            f"(hardware.max_failures is {hardware.max_failures}). {words or error}"
        ) from error
    if "error" in outcome:
        raise WorkersFailed(f"rank {outcome['rank']}: {outcome['error']}\n{outcome['traceback']}")
    if "interrupted" in outcome:
        raise Interrupted
    replaced = len(board.groups) - 1
    _wipe(board.folder)
    board.folder.rmdir()
    return {**outcome["metrics"], "workers": float(hardware.workers), "workers_replaced": float(replaced)}


def _wipe(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


@contextmanager
def _cluster(hardware: Hardware) -> Iterator[None]:
    """Be connected to the Ray cluster that `hardware` names, or to one of this machine alone."""
    import ray

    passed_on = [name for name in ("TOKENIZERS_PARALLELISM", "TQDM_DISABLE") if name in os.environ]
    env = {"env_vars": {name: os.environ[name] for name in passed_on}}
    quietly: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if hardware.address is None:
        ray.init(
            address="local",
            # More logical CPUs than workers: Ray's own tasks need one, or nothing starts
            num_cpus=hardware.workers * hardware.cpus_per_worker + 1,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            runtime_env=env,
            **quietly,
        )
    else:
        ray.init(address=hardware.address, runtime_env=env, **quietly)
    try:
        _wait_for_room(hardware)
        yield
    finally:
        ray.shutdown()


def _wait_for_room(hardware: Hardware) -> None:
    """Ray would wait for ever, without a word, for machines that do not exist.

    Raises:
        ClusterTooSmall: a cluster that others run has not grown large enough in time.
    """
    import ray

    patience = time.monotonic() + (hardware.timeout_s if hardware.address else 0)
    while True:
        has = ray.cluster_resources()
        enough_cpus = has.get("CPU", 0) >= hardware.workers * hardware.cpus_per_worker
        enough_gpus = hardware.device != "gpu" or has.get("GPU", 0) >= hardware.workers
        if enough_cpus and enough_gpus:
            return
        if time.monotonic() > patience:
            raise ClusterTooSmall(
                f"hardware asks for {hardware.workers} workers with {hardware.cpus_per_worker} CPUs each"
                f"{' and a GPU' if hardware.device == 'gpu' else ''}; the Ray cluster at "
                f"{hardware.address or 'this machine'} has {has.get('CPU', 0):g} CPUs and "
                f"{has.get('GPU', 0):g} GPUs"
            )
        time.sleep(_LOOK_EVERY_S)


def _uses_gpus(hardware: Hardware, gpus: float) -> bool:
    if hardware.device == "auto":
        on_gpu = gpus >= hardware.workers
        if hardware.strategy == "fsdp2" and not on_gpu:
            raise ClusterTooSmall(
                f"hardware.strategy fsdp2 needs a GPU for each of {hardware.workers} workers, the cluster "
                f"has {gpus:g}: on CPUs accelerate runs plain DDP without saying so"
            )
        return on_gpu
    return hardware.device == "gpu"


def _follow(trainer: Any, job: _Job, hardware: Hardware) -> BaseException | None:
    """Wait for the workers; pass on what they say and, to them, a request to stop; tell of replaced ones."""
    import ray

    board, seen, heard = job.board, 0, 0
    with ThreadPoolExecutor(1) as pool, heeding_stop() as stop:
        # Not in the main thread: there Ray Train would take SIGINT for itself, and lose the work
        running: Future[Any] = pool.submit(trainer.fit)
        try:
            while True:
                is_over = wait([running], _LOOK_EVERY_S).done
                said = board.said.read_text("utf-8") if board.said.exists() else ""
                print(said[heard:], end="", flush=True)
                heard = len(said)
                if is_over:
                    return running.exception()
                if stop.is_set():
                    board.stop.touch()
                groups = board.groups
                if len(groups) > max(1, seen):
                    words = board.last_words(groups[-2], hardware.workers)
                    told = f"workers replaced ({len(groups) - 1} of {hardware.max_failures})"
                    print(f"{told}: {words}", flush=True)
                seen = len(groups)
        except Interrupted:
            ray.shutdown()  # the second signal: end now, or the thread would wait for the workers
            raise


# -------------------------------------------------------------------------- a worker


def _work(told: dict[str, Any]) -> None:
    """What every worker runs; torch.distributed connects them already."""
    quieten()
    from align.training import processes, strategies

    job: _Job = told["job"]
    if not job.board.folder.is_dir():
        raise FileNotFoundError(
            f"a worker on {os.uname().nodename} does not see {job.out.path}: the run folder must be on a "
            "file system that all machines of the cluster share; choose one with --out"
        )
    if job.board.outcome is not None:
        return  # a replaced group: the stage had ended, its process had not
    processes.set_timeout(job.timeout_s)
    group = processes.broadcast(job.board.open_group() if processes.is_first() else Path())
    write_text(group / f"rank-{processes.rank()}.place", f"process {os.getpid()} on {os.uname().nodename}")
    hardware: Hardware = getattr(job.config, "hardware")  # noqa: B009 - of training stages only
    threading.Thread(target=_heed, args=(job.board.stop,), daemon=True).start()
    metrics: dict[str, float] = {}
    with Attempt() as attempt, _heard(job.board.said, processes.is_first()):
        strategies.begin(hardware.strategy)
        metrics = importlib.import_module(STAGES[job.config.stage]).run(job.config, job.inputs, job.out)
    if isinstance(attempt.error, Interrupted):
        if processes.is_first():
            job.board.settle(interrupted=True)
    elif attempt.error is not None:
        _last_words(attempt.error, job, group / f"rank-{processes.rank()}.txt", processes.rank())
        raise attempt.error
    elif processes.is_first():
        job.board.settle(metrics=metrics)


@contextmanager
def _heard(said: Path, is_first: bool) -> Iterator[None]:
    """Keep what this rank prints and its warnings for the driver, if it is the one that speaks for all."""
    if not is_first:
        yield
        return
    with said.open("a", buffering=1, encoding="utf-8") as file, redirect_stdout(file):
        handler = logging.StreamHandler(file)
        logging.getLogger("align").addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger("align").removeHandler(handler)


def _heed(stop: Path) -> None:
    """Wait for the driver's request to stop and pass it on to the training loop."""
    stop_requested.clear()
    while not stop.exists():
        time.sleep(_LOOK_EVERY_S)
    stop_requested.set()


def _last_words(error: BaseException, job: _Job, path: Path, rank: int) -> None:
    """Tell what ended this rank. A mistake of the stage itself settles it: it would only be made again."""
    lines = "".join(traceback.format_exception(error))
    write_text(path, f"{lines}\n{type(error).__name__}: {' '.join(str(error).split())}\n")
    if not _is_lost_peer(error) and job.board.outcome is None:
        job.board.settle(rank=rank, error=f"{type(error).__name__}: {error}", traceback=lines)


def _is_lost_peer(error: BaseException) -> bool:
    """Whether the error says that another rank is gone."""
    from torch.distributed import DistError

    from align.training.processes import MissingRanks

    if isinstance(error, DistError | MissingRanks | ConnectionError):
        return True
    return type(error) is RuntimeError and any(sign in str(error).lower() for sign in _LOST_PEER)
