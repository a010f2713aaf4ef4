"""DPO and SFT steps: TRL as it comes, TRL at its best, and over the packed backbone. For a person to run.

    make bench-dpo
    python -m tests.benchmarks.dpo [--workload NAME] [--rounds N] [--size prop|7b] [--lora] [--out FILE]

Every contender runs in a process of its own, one after the other, round by round (A B C, A B C), with the
same random weights, the same rows in the same order, the same optimizer and data type. On a CPU, TRL's head
is switched to what it does on a GPU (score answer positions only), because ours does so everywhere.
FLOPs are those torch counts in one forward and backward; it counts none for attention on a CPU, on any side.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # process time per pair, not how well cores are shared

import torch
import trl
from datasets import disable_progress_bars
from torch.utils.flop_counter import FlopCounterMode
from trl.trainer import utils as trl_utils

from align.models.flops import cost_of, gemm_peak
from tests.benchmarks.trl_steps import (
    CONTENDERS,
    SHAPES,
    WORKLOADS,
    Clock,
    Contender,
    make_trainer,
    trainer_arguments,
)


def measure(task: tuple[str, str, argparse.Namespace]) -> dict[str, Any]:
    """One contender on one workload, in this process."""
    name, contender, given = task
    workload, how = WORKLOADS[name], given.contenders[name][contender]
    _be_quiet()
    trl_utils._use_triton = lambda device: True  # answer positions only, as on a GPU
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer_arguments(
            workload, how, size=given.size, steps=given.steps + 1, lora=given.lora, folder=Path(folder)
        )
        before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        started = clock.now()
        trainer = make_trainer(workload, arguments, clock)
        constructed = clock.now()
        trainer.train()
        ended = clock.now()
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before_mb
        if torch.cuda.is_available():
            peak_mb = torch.cuda.max_memory_allocated() / 2**20
        size = trainer.args.per_device_train_batch_size
        rows = [trainer.train_dataset[i] for i in range(size)]
        flops = counted_flops(trainer, rows)
        useful = _useful(trainer, rows) if how.packed else None
    steps = clock.steps[1:]  # the first one warms up
    n_pairs = size * (given.steps + 1)
    return {
        "workload": name,
        "contender": contender,
        "batch_size": size,
        "flops_per_pair": flops / size,
        "useful_flops_per_pair": None if useful is None else useful / size,
        "process_s_per_pair": statistics.median(process for process, _ in steps) / size,
        "wall_s_per_pair": statistics.median(wall for _, wall in steps) / size,
        "end_to_end_process_s_per_pair": (ended[0] - started[0]) / n_pairs,
        "construction_process_s": constructed[0] - started[0],
        "peak_memory": int(peak_mb * 2**20),
        "first_loss": trainer.state.log_history[0]["loss"],
    }


def _be_quiet() -> None:
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"


def counted_flops(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """FLOPs of one forward and backward as torch counts them."""
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    trainer.model.train()
    trainer.model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        trainer.compute_loss(trainer.model, batch).backward()
    return float(counter.get_total_flops())


def _useful(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """FLOPs of the cost model: distinct tokens and clips only, attention included."""
    batch = trainer.data_collator(rows)
    model = trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model
    cost = cost_of(model)
    mask = batch["labels"] != -100 if "labels" in batch else batch["completion_mask"]
    return cost.of(batch["packed"]) + cost.scored * int(mask[:, 1:].sum())


def in_own_process(tasks: Sequence[tuple[str, str, argparse.Namespace]]) -> Iterator[dict[str, Any]]:
    """One after the other, each in a fresh process, so that memory and caches are its own."""
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for row in pool.imap(measure, tasks, chunksize=1):
            print(
                f"  {row['workload']} {row['contender']}, batch {row['batch_size']}: per pair "
                f"{row['flops_per_pair'] / 1e9:.1f} GFLOP, {row['process_s_per_pair']:.3f} s of process time",
                flush=True,
            )
            yield row


def tune(name: str, given: argparse.Namespace) -> None:
    """TRL at its best: the batch size at which a precomputed, unchecked step takes least per pair."""
    if WORKLOADS[name].kind != "dpo":
        return
    sizes = (1, 2, 4)
    trials = argparse.Namespace(**{**vars(given), "steps": 1})
    trials.contenders = {name: {str(n): Contender(precomputed=True, batch_size=n) for n in sizes}}
    found = list(in_own_process([(name, str(n), trials) for n in sizes]))
    best = min(
        found, key=lambda row: row["wall_s_per_pair" if torch.cuda.is_available() else "process_s_per_pair"]
    )
    told = ", ".join(f"{row['batch_size']}: {row['process_s_per_pair']:.2f} s" for row in found)
    print(f"{name}: TRL's batch sizes, process seconds per pair: {told}", flush=True)
    contenders = given.contenders[name]
    tuned = contenders["trl tuned"]._replace(batch_size=best["batch_size"])
    given.contenders[name] = contenders | {"trl tuned": tuned}


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and the spread of the process time."""
    numbers = ("process_s_per_pair", "wall_s_per_pair", "end_to_end_process_s_per_pair", "peak_memory")
    row = dict(runs[0])
    for name in numbers:
        row[name] = statistics.median(run[name] for run in runs)
    seconds = [run["process_s_per_pair"] for run in runs]
    return {**row, "process_s_range": [min(seconds), max(seconds)], "rounds": len(runs)}


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of the printed table; ratios are the contender's over ours."""
    yield (
        f"{'workload':<10} {'contender':<12} {'GFLOP/pair':>11} {'x ours':>7} {'process s':>10} "
        f"{'x ours':>7} {'wall s':>8} {'all in, s':>10} {'x ours':>7} {'peak MB':>8}  required"
    )
    for row in rows:
        ours = next(r for r in rows if (r["workload"], r["contender"]) == (row["workload"], "ours"))
        work = row["flops_per_pair"] / ours["flops_per_pair"]
        took = row["process_s_per_pair"] / ours["process_s_per_pair"]
        whole = row["end_to_end_process_s_per_pair"] / ours["end_to_end_process_s_per_pair"]
        yield (
            f"{row['workload']:<10} {row['contender']:<12} {row['flops_per_pair'] / 1e9:11.1f} {work:7.2f} "
            f"{row['process_s_per_pair']:10.3f} {took:7.2f} {row['wall_s_per_pair']:8.3f} "
            f"{row['end_to_end_process_s_per_pair']:10.3f} {whole:7.2f} {row['peak_memory'] / 2**20:8.0f}  "
            f"{_verdict(WORKLOADS[row['workload']].required.get(row['contender']), work, took)}"
        )


def _verdict(required: tuple[float | None, float | None] | None, work: float, took: float) -> str:
    if required is None:
        return ""
    told = [
        f"{name} >= {least} {'ok' if found >= least else 'MISSED'}"
        for name, least, found in zip(("FLOPs", "time"), required, (work, took), strict=True)
        if least is not None
    ]
    return ", ".join(told)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=sorted(WORKLOADS), action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps per round, after one to warm up")
    parser.add_argument("--size", choices=sorted(SHAPES), default="prop")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/dpo.json"))
    given = parser.parse_args()
    names = given.workload or list(WORKLOADS)
    given.contenders = {name: CONTENDERS[WORKLOADS[name].kind] for name in names}
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    print(f"{hardware}; torch {torch.__version__}, trl {trl.__version__}; load {os.getloadavg()[0]:.1f}\n")
    rows = []
    for name in names:
        tune(name, given)
        tasks = [(name, c, given) for _ in range(given.rounds) for c in given.contenders[name]]
        runs = list(in_own_process(tasks))
        rows += [summarise([r for r in runs if r["contender"] == c]) for c in given.contenders[name]]
    print("\n".join(table(rows)))
    told: dict[str, Any] = {"hardware": hardware, "torch": torch.__version__, "trl": trl.__version__}
    told |= {"size": given.size, "lora": given.lora, "load": os.getloadavg()[0], "rows": rows}
    if torch.cuda.is_available():
        peak = gemm_peak(torch.device("cuda"), torch.bfloat16)
        told["gemm_peak"] = peak
        for row in rows:
            if row["useful_flops_per_pair"]:
                row["mfu"] = row["useful_flops_per_pair"] / row["wall_s_per_pair"] / peak
                print(
                    f"{row['workload']} {row['contender']}: MFU {row['mfu']:.1%} of {peak / 1e12:.0f} TFLOP/s"
                )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(told, indent=1))
    print(f"\nwritten to {given.out}")


if __name__ == "__main__":
    main()
