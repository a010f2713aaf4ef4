"""DPO and SFT steps: TRL as it comes, TRL at its best, and over the packed backbone. For a person to run.

    make bench-dpo
    python -m tests.benchmarks.dpo [--workload NAME] [--rounds N] [--size prop|7b] [--lora] [--out FILE]

Every contender runs in a process of its own, one after the other, round by round (A B C, A B C), with the
same random weights, the same rows in the same order, the same optimizer and data type. On a CPU, TRL's head
is switched to what it does on a GPU (score answer positions only), because ours does so everywhere.
FLOPs are those torch counts in one forward and backward; it counts none for attention on a CPU, on any side.
"All in" is the reference's precompute, reading clips, mel features and training, over one epoch, per pair.
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
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not open it: we fork

import torch
import trl
from datasets import disable_progress_bars
from torch.utils.flop_counter import FlopCounterMode
from trl.trainer import utils as trl_utils

from align.models.qwen2_audio.flops import cost_of, gemm_peak
from tests.benchmarks.trl_steps import (
    CONTENDERS,
    SHAPES,
    WORKLOADS,
    Clock,
    make_trainer,
    trainer_arguments,
)

ON_GPU = torch.cuda.is_available()
TIME = "wall_s_per_pair" if ON_GPU else "process_s_per_pair"
"""What counts: a GPU works while the process waits; on a CPU others may have the cores."""


def measure(task: tuple[str, str, argparse.Namespace]) -> dict[str, Any] | None:
    """One contender on one workload, in this process; None where it does not fit the GPU's memory."""
    try:
        return _measured(*task)
    except torch.OutOfMemoryError:
        return None


def _measured(name: str, contender: str, given: argparse.Namespace) -> dict[str, Any]:
    workload, how = WORKLOADS[name], given.contenders[name][contender]
    _be_quiet()
    trl_utils._use_triton = lambda device: True  # answer positions only, as on a GPU
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer_arguments(
            workload, how, size=given.size, steps=given.steps + 1, lora=given.lora, folder=Path(folder)
        )
        before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        trainer = make_trainer(workload, arguments, clock)
        started = clock.now()
        trainer.train()
        ended = clock.now()
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before_mb
        if ON_GPU:
            peak_mb = torch.cuda.max_memory_allocated() / 2**20
        size = trainer.args.per_device_train_batch_size
        n_counted = given.steps + 1 if workload.kind == "sft" else 1  # pairs are all of a size
        batches = [[trainer.train_dataset[i * size + j] for j in range(size)] for i in range(n_counted)]
        flops = sum(counted_flops(trainer, rows) for rows in batches) / n_counted
        useful = sum(_useful(trainer, rows) for rows in batches) / n_counted if how.packed else None
    steps = clock.steps[1:]  # the first one warms up
    n_pairs = size * (given.steps + 1)
    precompute_s = getattr(trainer, "precompute_s", (0.0, 0.0))
    return {
        "workload": name,
        "contender": contender,
        "batch_size": size,
        "flops_per_pair": flops / size,
        "useful_flops_per_pair": None if useful is None else useful / size,
        "process_s_per_pair": statistics.median(process for process, _ in steps) / size,
        "wall_s_per_pair": statistics.median(wall for _, wall in steps) / size,
        "end_to_end_process_s_per_pair": (precompute_s[0] + ended[0] - started[0]) / n_pairs,
        "end_to_end_wall_s_per_pair": (precompute_s[1] + ended[1] - started[1]) / n_pairs,
        "peak_memory": int(peak_mb * 2**20),
        "first_loss": trainer.state.log_history[0]["loss"],
        "hardware": torch.cuda.get_device_name() if ON_GPU else f"{platform.machine()} CPU",
        "gemm_peak": gemm_peak(torch.device("cuda"), torch.bfloat16) if ON_GPU else None,
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
        for row in filter(None, pool.imap(measure, tasks, chunksize=1)):
            print(
                f"  {row['workload']} {row['contender']}, batch {row['batch_size']}: per pair "
                f"{row['flops_per_pair'] / 1e9:.1f} GFLOP, {row['process_s_per_pair']:.3f} s of process time",
                flush=True,
            )
            yield row


def tune(name: str, given: argparse.Namespace) -> None:
    """Every contender at its best batch size: TRL's tuned one, and on a GPU also its default and ours."""
    workload, contenders = WORKLOADS[name], given.contenders[name]
    if workload.kind != "dpo":
        return
    tuned, sizes = ("trl default", "trl tuned", "ours") if ON_GPU else ("trl tuned",), (1, 2, 4, 8, 16)
    for contender in tuned:
        trials = argparse.Namespace(**{**vars(given), "steps": 1})
        trials.contenders = {name: {str(n): contenders[contender]._replace(batch_size=n) for n in sizes}}
        found = list(in_own_process([(name, str(n), trials) for n in sizes[: 5 if ON_GPU else 3]]))
        best = min(found, key=lambda row: row[TIME])["batch_size"]
        contenders = contenders | {contender: contenders[contender]._replace(batch_size=best)}
        print(f"{name}: {contender} takes {best} pairs at once from now on", flush=True)
    given.contenders[name] = contenders


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and the spread of the process time."""
    numbers = [name for name in runs[0] if name.endswith("_s_per_pair") or name == "peak_memory"]
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
        took = row[TIME] / ours[TIME]
        whole = row[f"end_to_end_{TIME}"] / ours[f"end_to_end_{TIME}"]
        yield (
            f"{row['workload']:<10} {row['contender']:<12} {row['flops_per_pair'] / 1e9:11.1f} {work:7.2f} "
            f"{row['process_s_per_pair']:10.3f} {took:7.2f} {row['wall_s_per_pair']:8.3f} "
            f"{row[f'end_to_end_{TIME}']:10.3f} {whole:7.2f} {row['peak_memory'] / 2**20:8.0f}  "
            f"{_verdict(_required(row), work, took)}"
        )


def _required(row: dict[str, Any]) -> tuple[float | None, float | None] | None:
    workload = WORKLOADS[row["workload"]]
    return (workload.required_gpu if ON_GPU else workload.required).get(row["contender"])


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
    rows = []
    for name in names:
        tune(name, given)
        tasks = [(name, c, given) for _ in range(given.rounds) for c in given.contenders[name]]
        runs = list(in_own_process(tasks))
        rows += [summarise([r for r in runs if r["contender"] == c]) for c in given.contenders[name]]
    print(f"\n{rows[0]['hardware']}; torch {torch.__version__}, trl {trl.__version__}\n")
    print("\n".join(table(rows)))
    for row in rows:
        if row["gemm_peak"] and row["useful_flops_per_pair"]:
            row["mfu"] = row["useful_flops_per_pair"] / row["wall_s_per_pair"] / row["gemm_peak"]
            print(
                f"{row['workload']} {row['contender']}: MFU {row['mfu']:.1%} of a large matrix product's rate"
            )
    told = {"torch": torch.__version__, "trl": trl.__version__, "size": given.size, "lora": given.lora}
    told |= {"load": os.getloadavg()[0], "rows": rows}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(told, indent=1))
    print(f"\nwritten to {given.out}")


if __name__ == "__main__":
    main()
