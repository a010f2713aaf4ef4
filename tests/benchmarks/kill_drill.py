"""Kill training with SIGKILL at random moments and see that nothing but time is lost.

    python -m tests.benchmarks.kill_drill --kills 20 --seed 0 --out results.json

Each drill starts a real training (a tiny Qwen2-Audio), kills it, takes it up again, and compares with an
undisturbed run: weights bit-equal (close, where two processes become one), every step trained on the same
rows in the same order, at most one save interval repeated, and never a half checkpoint chosen.

Kinds: `process` anywhere; `grpo` the same of a training on rewards; `save` while a checkpoint is being
written; `rank` one of two; `rank-save` one of two while they write; `two-to-one` one of two, then resumed
alone; `ray` a worker that Ray Train replaces.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from align.run_folder.artifacts import read_metrics
from align.training.checkpoints import checkpoints, is_whole, step_of
from tests.align.training import tiny_training

SAVE_STEPS = 3
KINDS = ("process", "grpo", "save", "rank", "rank-save", "two-to-one", "ray")
PATIENCE_S = 300


class Drill:
    """A place with a world and its undisturbed runs; `run` does one drill."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.world = tiny_training.make_world(root / "world")
        self.undisturbed: dict[str, Path] = {}

    def run(self, kind: str, rng: random.Random) -> dict[str, object]:
        """One kill and what came of it."""
        case = {"process": "sft", "save": "sft", "grpo": "grpo"}.get(kind, "sft-ddp")
        whole = self._whole("sft" if kind == "two-to-one" else case)
        out = self.root / f"{kind}-{rng.getrandbits(32):08x}"
        at = rng.randint(2, tiny_training.STEPS - 1)
        delay = rng.uniform(0, 0.05)
        if kind == "ray":
            return self._ray(out, whole, at, delay)
        process = self._start(case, out)
        killed_in = self._kill(process, out / case, rng, at, delay, in_save="save" in kind)
        chosen, halves = _newest_whole(out / case)
        done_before = {rank: _steps(out / case, rank) for rank in range(2 if case == "sft-ddp" else 1)}
        if kind == "two-to-one":
            shutil.move(out / case, out / "sft")
            (out / "sft" / "trace-1.jsonl").unlink()
            case = "sft"
        _finish(self._start(case, out))
        return self._compare(kind, whole, out / case, killed_in, chosen, halves, done_before)

    def _whole(self, case: str) -> Path:
        if case not in self.undisturbed:
            _finish(self._start(case, self.root / "whole"))
            self.undisturbed[case] = self.root / "whole" / case
        return self.undisturbed[case]

    def _start(self, case: str, out: Path) -> subprocess.Popen[bytes]:
        """A training of one process or, for `sft-ddp`, of two."""
        spread = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        program = [sys.executable, *(spread if case == "sft-ddp" else [])]
        command = [*program, tiny_training.__file__, str(self.world), str(out), case]
        out.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "SAVE_STEPS": str(SAVE_STEPS)}
        with (out / "log.txt").open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=env)

    def _kill(
        self,
        process: subprocess.Popen[bytes],
        folder: Path,
        rng: random.Random,
        at: int,
        delay: float,
        *,
        in_save: bool,
    ) -> int:
        """Kill one process of the training at step `at`, or in the next save; returns the step it was in."""
        _wait(lambda: len(_steps(folder, 0)) >= at, process)
        if in_save:
            saved = folder / ".partial-stage" / "checkpoints"
            _wait(lambda: any(saved.glob(".partial-checkpoint*")), process)
            time.sleep(delay / 10)
        else:
            time.sleep(delay)
        parts = [
            p for p in psutil.Process(process.pid).children(recursive=True) if "tiny" in str(p.cmdline())
        ]
        victim = rng.choice(parts).pid if parts else process.pid
        os.kill(victim, signal.SIGKILL)
        process.wait(PATIENCE_S)
        return max(_steps(folder, 0))

    def _compare(
        self,
        kind: str,
        whole: Path,
        folder: Path,
        killed_in: int,
        chosen: int,
        halves: int,
        before: dict[int, list[int]],
    ) -> dict[str, object]:
        after = _steps(folder, 0)[len(before[0]) :]
        ranks = 2 if (folder / "trace-1.jsonl").exists() else 1
        ranks_whole = 2 if (whole / "trace-1.jsonl").exists() else 1
        mine, theirs = tiny_training.read_trace(folder, ranks), tiny_training.read_trace(whole, ranks_whole)
        resumed = [step for step in theirs if step > chosen]
        wrong = sum(a != b for step in resumed for a, b in zip(mine[step][0], theirs[step][0], strict=True))
        difference = _difference(folder, whole)
        repeated = max(_steps(folder, 0)[: len(before[0])]) - chosen
        fine = after[0] == chosen + 1 and repeated <= SAVE_STEPS and wrong == 0
        return {
            "kind": kind,
            "killed_in_step": killed_in,
            "resumed_from": chosen,
            "repeated_steps": repeated,
            "half_written_found": halves,
            "half_written_chosen": int(after[0] != chosen + 1),
            "hamming": wrong,
            "weights_max_difference": difference,
            "passed": fine and difference <= (2e-5 if kind == "two-to-one" else 0.0),
        }

    def _ray(self, out: Path, whole: Path, at: int, delay: float) -> dict[str, object]:
        """Kill a worker of Ray Train's; the same driver goes on."""
        command = [sys.executable, "-m", "tests.benchmarks.kill_drill", "--drive", str(self.world), str(out)]
        out.mkdir(parents=True)
        env = {**os.environ, "SAVE_STEPS": str(SAVE_STEPS)}
        folder = out / "sft-ddp"
        metrics = folder / ".partial-stage" / "metrics.jsonl"
        with (out / "log.txt").open("w") as log:
            driver = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        _wait(lambda: metrics.exists() and len(read_metrics(metrics)) >= at, driver)
        time.sleep(delay)
        workers = [
            child
            for child in psutil.Process(driver.pid).children(recursive=True)
            if "RayTrainWorker" in " ".join(child.cmdline())
        ]
        workers[at % len(workers)].kill()
        killed_in = len(read_metrics(metrics))
        _finish(driver)
        rows, same = read_metrics(metrics), read_metrics(whole / ".partial-stage" / "metrics.jsonl")
        keep = ("step", "loss", "grad_norm", "num_tokens")
        wrong = sum(any(a[k] != b[k] for k in keep) for a, b in zip(rows, same, strict=True))
        done = json.loads((out / "done.json").read_text())
        difference = _difference(folder, whole)
        return {
            "kind": "ray",
            "killed_in_step": killed_in,
            "workers_replaced": done["workers_replaced"],
            "steps_with_other_metrics": wrong,
            "weights_max_difference": difference,
            "passed": wrong == 0 and difference == 0.0 and done["workers_replaced"] == 1,
        }


def _steps(folder: Path, rank: int) -> list[int]:
    """Steps a rank has begun, over all attempts."""
    path = folder / f"trace-{rank}.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def _newest_whole(folder: Path) -> tuple[int, int]:
    """The step of the newest checkpoint that is whole, 0 without one; and how many are not."""
    saved = folder / ".partial-stage" / "checkpoints"
    good = [step_of(path) for path in checkpoints(saved) if is_whole(path)]
    return max(good, default=0), len(list(saved.glob(".partial-*"))) + len(checkpoints(saved)) - len(good)


def _difference(folder: Path, whole: Path) -> float:
    mine, theirs = (load_file(f / ".partial-stage" / "model" / "model.safetensors") for f in (folder, whole))
    return max((mine[name] - theirs[name]).abs().max().item() for name in theirs)


def _wait(until, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not until():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the training ended or hung before it was killed: {process.args}")
        time.sleep(0.001)


def _finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait(PATIENCE_S):
        raise RuntimeError(f"the training failed: {process.args}")


def drive(world: str, out: str) -> None:
    """A driver with two Ray workers, in a process of its own."""
    from align.execution.attempt import handling_signals, interruptible
    from align.execution.workers import run_stage
    from align.run_folder.artifacts import Interrupted, StageFolder, write_json

    folder = StageFolder(Path(out) / "sft-ddp", "stage", "fingerprint")
    folder.path.mkdir(parents=True, exist_ok=True)
    inputs = {name: Path(world) / name for name in ("corpus", "policy", "pairs")}
    hardware = {"workers": 2, "strategy": "ddp", "timeout_s": int(os.environ.get("TIMEOUT_S", "300"))}
    config = tiny_training.make_config("sft", hardware=hardware)
    try:
        with handling_signals(), interruptible():
            write_json(Path(out) / "done.json", run_stage(config, inputs, folder))
    except Interrupted:
        sys.exit(75)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--drive", nargs=2, metavar=("WORLD", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.drive:
        drive(*given.drive)
        return
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as root:
        drill, results = Drill(Path(root)), []
        for number in range(given.kills):
            results.append(drill.run(given.kinds[number % len(given.kinds)], rng))
            print(json.dumps(results[-1]), flush=True)
    passed = sum(bool(result["passed"]) for result in results)
    print(f"{passed} of {len(results)} passed")
    if given.out:
        where = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
        report = {"date": time.strftime("%Y-%m-%d"), "command": sys.argv[1:], **where, "results": results}
        given.out.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(passed != len(results))


if __name__ == "__main__":
    main()
