"""A training stage on several processes: Ray Train starts them, replaces the dead, and stops on request.

Every worker runs the stage's own `run(config, inputs, out)`, as one process would; rank 0 writes what is
written once. A replaced group of workers goes on from the newest whole checkpoint in the stage's folder,
which all of them must see. (Ray Train has checkpoints of its own; a kill right after one was reported
loses it, so they are not used.) The driver and its workers exchange a few small files in `.workers/`.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import shutil
import signal
import sys
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
    WORKERS,
    Interrupted,
    StageFolder,
    heeding_stop,
    read_json,
    stop_requested,
    write_json,
)
from align.run_folder.progress import quieten
from preference_data.store import write_text

_LOOK_EVERY_S = 0.5
_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's smallest: nothing large goes through it
_LOST_PEER = ("connection", "timed out", "gloo", "nccl", "socket", "monitoredbarrier", "heartbeat")
"""In messages of torch.distributed's plain RuntimeErrors: another rank is gone, this one is well."""


class WorkersFailed(RuntimeError):
    """The stage failed on its workers."""


class ClusterTooSmall(RuntimeError):
    """The Ray cluster lacks what `hardware` asks for."""


def run_stage(config: StageConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Run a stage in this process or, where its config has `hardware`, on workers.

    Raises:
        Interrupted: a stop was requested; what was saved resumes.
        WorkersFailed, ClusterTooSmall: see there.
    """
    hardware: Hardware | None = getattr(config, "hardware", None)
    if hardware is None:
        metrics: dict[str, float] = _stage(config).run(config, inputs, out)
        _free_gpu_memory()
        return metrics
    out = StageFolder(out.path.parent.resolve(), out.name, out.fingerprint)
    inputs = {name: path.resolve() if path.exists() else path for name, path in inputs.items()}
    return _on_workers(_Job(config, inputs, out, hardware))


def _stage(config: StageConfig) -> Any:
    """The module that runs this kind of stage."""
    return importlib.import_module(f"align.stages.{config.kind()}")


def _free_gpu_memory() -> None:
    """Give cached GPU memory back: the next stage plans with what is free on the card."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Job:
    """The work of one worker."""

    config: StageConfig
    inputs: dict[str, Path]
    out: StageFolder
    hardware: Hardware

    @property
    def board(self) -> _Board:
        return _Board(self.out.path / WORKERS)


class _Board:
    """Files between driver and workers: `stop`, `outcome.json`, a folder per group of workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stop = folder / "stop"
        """Written by the driver on a request to stop."""
        self.output = folder / "output.txt"
        """Output and warnings of rank 0, for the driver's terminal."""

    @property
    def outcome(self) -> dict[str, Any] | None:
        """How the stage ended, once it has: `metrics`, `interrupted` or `error`."""
        path = self.folder / "outcome.json"
        return read_json(path) if path.exists() else None

    def settle(self, **outcome: Any) -> None:
        """Write how the stage ended."""
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

    def errors(self, group: Path, workers: int) -> str:
        """The error of each rank of a group that failed; ranks without one come first."""
        parts = []
        for rank in range(workers):
            place = group / f"rank-{rank}.place"
            name = f"rank {rank} ({place.read_text('utf-8')})" if place.exists() else f"rank {rank}"
            error = group / f"rank-{rank}.txt"
            if error.exists():
                parts.append(f"{name}: {error.read_text('utf-8').splitlines()[-1]}")
            else:
                parts.insert(0, f"{name} reported nothing: killed, hung, or out of memory")
        return "; ".join(parts)


# -------------------------------------------------------------------------- the driver


def _on_workers(job: _Job) -> dict[str, float]:
    """Start the workers, follow them to their end, and return their metrics."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    board, hardware = job.board, job.hardware
    shutil.rmtree(board.folder, ignore_errors=True)
    board.folder.mkdir(parents=True)
    with _cluster(hardware) as on_gpu:
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
        error = _follow(trainer, job)
    outcome = board.outcome
    if outcome is None:
        errors = board.errors(board.groups[-1], hardware.workers) if board.groups else ""
        raise WorkersFailed(
            f"{hardware.workers} workers failed, after {max(0, len(board.groups) - 1)} replacements "
            f"(hardware.max_failures is {hardware.max_failures}). {errors or error}"
        ) from error
    if "error" in outcome:
        raise WorkersFailed(f"rank {outcome['rank']}: {outcome['error']}\n{outcome['traceback']}")
    if "interrupted" in outcome:
        raise Interrupted
    figures = {
        "workers": float(hardware.workers),
        "workers_replaced": float(len(board.groups) - 1),
        "peak_memory_mb": max(float(path.read_text("utf-8")) for path in board.folder.glob("group-*/*.peak")),
    }
    return {**outcome["metrics"], **figures}


@contextmanager
def _cluster(hardware: Hardware) -> Iterator[bool]:
    """Be connected to the Ray cluster that `hardware` names, or to one of this machine alone.

    Yields whether each worker gets a GPU.
    """
    import ray

    passed_on = [name for name in ("TOKENIZERS_PARALLELISM", "TQDM_DISABLE") if name in os.environ]
    # Ray would set one thread, also for the offloaded optimizers, which run on the CPU
    threads = {"OMP_NUM_THREADS": str(hardware.cpus_per_worker)}
    env = {"env_vars": {**{name: os.environ[name] for name in passed_on}, **threads}}
    quietly: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if hardware.address is None:
        # Processes started here survive the closing of the terminal: the driver stops them in good order
        hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            ray.init(
                address="local",
                # More logical CPUs than workers: Ray's own tasks need one, or nothing starts
                num_cpus=hardware.workers * hardware.cpus_per_worker + 1,
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                runtime_env=env,
                **quietly,
            )
        finally:
            signal.signal(signal.SIGHUP, hangup)
    else:
        ray.init(address=hardware.address, runtime_env=env, **quietly)
    try:
        yield _wait_for_room(hardware)
    finally:
        ray.shutdown()


def _wait_for_room(hardware: Hardware) -> bool:
    """Whether each worker gets a GPU. For machines that do not exist Ray would wait for ever, without a word.

    Raises:
        ClusterTooSmall: a cluster that others run has not grown large enough in time.
    """
    import ray

    deadline = time.monotonic() + (hardware.timeout_s if hardware.address else 0)
    while True:
        has = ray.cluster_resources()
        cpus, gpus = has.get("CPU", 0), has.get("GPU", 0)
        # With `auto`, a cluster of others that has some GPUs may still be growing; for fsdp2 on CPUs
        # accelerate would run plain DDP without saying so
        may_grow = hardware.device == "auto" and hardware.address and gpus > 0
        on_gpu = hardware.device == "gpu" or hardware.strategy == "fsdp2" or may_grow
        if cpus >= hardware.workers * hardware.cpus_per_worker and (gpus >= hardware.workers or not on_gpu):
            return hardware.device != "cpu" and bool(gpus >= hardware.workers)
        if time.monotonic() > deadline:
            raise ClusterTooSmall(
                f"hardware asks for {hardware.workers} workers with {hardware.cpus_per_worker} CPUs each"
                f"{' and a GPU' if on_gpu else ''}; the Ray cluster at "
                f"{hardware.address or 'this machine'} has {cpus:g} CPUs and {gpus:g} GPUs"
            )
        time.sleep(_LOOK_EVERY_S)


def _follow(trainer: Any, job: _Job) -> BaseException | None:
    """Wait for the workers; print their output and which were replaced; pass on a request to stop."""
    import ray

    board, n_groups, n_printed = job.board, 0, 0
    with ThreadPoolExecutor(1) as pool, heeding_stop() as stop:
        # Not in the main thread: there Ray Train would take SIGINT for itself, and lose the work
        running: Future[Any] = pool.submit(trainer.fit)
        try:
            while True:
                is_over = wait([running], _LOOK_EVERY_S).done
                output = board.output.read_text("utf-8") if board.output.exists() else ""
                print(output[n_printed:], end="", flush=True)
                n_printed = len(output)
                if is_over:
                    return running.exception()
                if stop.is_set():
                    board.stop.touch()
                groups = board.groups
                if len(groups) > max(1, n_groups):
                    errors = board.errors(groups[-2], job.hardware.workers)
                    count = f"{len(groups) - 1} of {job.hardware.max_failures}"
                    print(f"workers replaced ({count}): {errors}", flush=True)
                n_groups = len(groups)
        except Interrupted:
            ray.shutdown()  # the second signal: end now, or the thread would wait for the workers
            raise


# -------------------------------------------------------------------------- a worker


def _work(loop_config: dict[str, Any]) -> None:
    """Run the stage as one of the workers; torch.distributed connects them already."""
    quieten()
    from align.training import preparation, processes

    job: _Job = loop_config["job"]
    if not job.board.folder.is_dir():
        raise FileNotFoundError(
            f"a worker on {os.uname().nodename} does not see {job.out.path}: the run folder must be on a "
            "file system that all machines of the cluster share; choose one with --out"
        )
    if job.board.outcome is not None:
        return  # a replaced group: the stage had ended, its process had not
    processes.set_timeout(job.hardware.timeout_s)
    group = processes.broadcast(job.board.open_group() if processes.is_first() else Path())
    write_text(group / f"rank-{processes.rank()}.place", f"process {os.getpid()} on {os.uname().nodename}")
    threading.Thread(target=_watch_for_stop, args=(job.board.stop,), daemon=True).start()
    metrics: dict[str, float] = {}
    with Attempt() as attempt, _printing_to(job.board.output, processes.is_first()):
        preparation.prepare_process(job.hardware.strategy)
        metrics = _stage(job.config).run(job.config, job.inputs, job.out)
    if isinstance(attempt.error, Interrupted):
        if processes.is_first():
            job.board.settle(interrupted=True)
    elif attempt.error is not None:
        _report_error(attempt.error, job, group / f"rank-{processes.rank()}.txt", processes.rank())
        raise attempt.error
    else:
        write_text(group / f"rank-{processes.rank()}.peak", f"{attempt.peak_memory_mb}")
        if processes.is_first():
            job.board.settle(metrics=metrics)


@contextmanager
def _printing_to(output: Path, is_first: bool) -> Iterator[None]:
    """Write output and warnings of the first rank to a file; the others print as they are."""
    if not is_first:
        yield
        return
    with output.open("a", buffering=1, encoding="utf-8") as file, redirect_stdout(file):
        handler = logging.StreamHandler(file)
        logging.getLogger("align").addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger("align").removeHandler(handler)


def _watch_for_stop(stop: Path) -> None:
    """Wait for the driver's request to stop and hand it to the training loop."""
    stop_requested.clear()
    while not stop.exists():
        time.sleep(_LOOK_EVERY_S)
    stop_requested.set()


def _report_error(error: BaseException, job: _Job, path: Path, rank: int) -> None:
    """Write what ended this rank. An error of the stage itself ends the stage: it would only come again."""
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
