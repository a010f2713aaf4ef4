r"""Evidence from one H100 or H200 in at most ten minutes, as a file of figures. For a person to run.

    make gpu-check                                        # writes results/gpu-<date>.json
    python -m tests.benchmarks.gpu_check --part dpo_ours  # or several: --part attention --part sft
    python -m tests.benchmarks.gpu_check --rehearse       # every part at toy size, on a CPU: no evidence

Every part runs in a process of its own, within seconds of its own (`gpu_parts.PARTS`): one that fails, hangs
or runs out of memory is written down as such, with its error, and the next one runs. The file is written
anew after each, so what was measured is there whatever happens later. No model is downloaded: weights are
random and made on the GPU, clips are noise.

Without a network, where Python 3.12 has torch 2.11, transformers, peft and accelerate already, take the rest
along as wheels, about 100 MB; leave out what is there already. They are made where there is a network:

    pip download --no-deps --only-binary :all: --python-version 3.12 -d wheels -c constraints.txt \
        trl datasets pyarrow pandas python-dateutil six dill multiprocess xxhash \
        soundfile cffi pycparser soxr scipy pydantic pydantic-core

and used there, in the Python that has torch:

    pip install --no-index --no-deps wheels/*.whl
    make gpu-check GPU_PYTHON=python3

A module that is missing all the same is named at once, before anything runs.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # we fork

from tests.benchmarks.gpu_parts import ON_GPU, PARTS

TOTAL_S = 580
"""Of all parts: ten minutes with the imports."""
REHEARSAL_S = 600
"""Of each part of a rehearsal: a CPU may be slow, and busy."""


def run_part(context: BaseContext, name: str, size: str, limit_s: float) -> dict[str, Any]:
    """A part's figures with `status` (ok, failed, out of time, skipped) and `seconds`; never raises."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        process = context.Process(target=_write_figures, args=(name, size, file))
        ending: dict[str, Any] = {}
        process.start()
        try:
            process.join(limit_s)
            if process.is_alive():
                ending = {"status": "out of time", "error": f"not done after {limit_s:.0f} s"}
        finally:  # also where a person has had enough
            _kill(process)
        if not ending and process.exitcode:
            ending = {"status": "failed", "error": f"its process ended with {process.exitcode}"}
        figures = json.loads(file.read_text()) if file.exists() else {}
        if figures.get("status") != "failed":
            figures = {"status": "ok", **figures, **ending}
    return {**figures, "seconds": round(time.monotonic() - started, 1)}


def _write_figures(name: str, size: str, file: Path) -> None:
    """In the part's process: its figures so far, or its error, after every one of them."""
    os.setsid()  # so that all it starts can be ended with it
    figures: dict[str, Any] = {}
    try:
        for more in PARTS[name].run(size):
            figures |= more
            _write(file, figures)
    except Exception as error:
        traceback.print_exc()
        kind = f"{type(error).__name__}: {error}"
        _write(file, {**figures, "status": "failed", "error": kind[:2000]})


def _kill(process: multiprocessing.process.BaseProcess) -> None:
    """End a part with all that it started."""
    if process.is_alive() and process.pid is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not become a leader yet
            process.kill()
    process.join()


def _write(file: Path, figures: dict[str, Any]) -> None:
    """Whole or not at all."""
    staged = file.with_suffix(".tmp")
    staged.write_text(json.dumps(figures, indent=1, default=str) + "\n")
    staged.replace(file)


def summary(parts: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The ratios that the project promises, of what was measured."""
    steps = {name: parts.get(f"dpo_{name}", {}).get("best") for name in ("ours", "trl_tuned", "trl_default")}
    told: dict[str, float] = {}
    if ours := steps["ours"]:
        for name in ("trl_tuned", "trl_default"):
            if theirs := steps[name]:
                told[f"{name} / ours, s per pair"] = theirs["wall_s_per_pair"] / ours["wall_s_per_pair"]
        for name, step in steps.items():
            if step and step["gemm_peak"]:  # of the same distinct tokens and clips, whoever computes them
                useful = ours["useful_flops_per_pair"] / step["wall_s_per_pair"]
                told[f"MFU of {name}, of the GEMM peak"] = useful / step["gemm_peak"]
    if (memory := parts.get("memory", {}).get("planned_over_peak")) is not None:
        told["planned / peak memory"] = memory
    drawn = parts.get("rollouts", {})
    if "ours" in drawn and "stock" in drawn:
        told["stock / ours, s per rollout"] = drawn["stock"]["wall_s"] / drawn["ours"]["wall_s"]
    return told


def _context(size: str) -> tuple[BaseContext, dict[str, Any]]:
    """How processes start here, and the card. Forks import nothing again, but no library may have opened the
    GPU before; where one has, every part starts afresh.
    """
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        card = run_part(context, "card", size, PARTS["card"].budget_s)
        if card["status"] == "ok":
            break
    return context, {**card, "processes": method}


def _commit() -> str | None:
    """Of this tree; None in a copy without git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _file(given: Path | None, rehearses: bool) -> Path:
    """Where figures go. A rehearsal's are no evidence, and nobody's evidence is overwritten."""
    if given is not None:
        return given
    if rehearses:
        return Path("runs/bench/gpu-rehearsal.json")
    base = Path("results") / f"gpu-{datetime.date.today().isoformat()}"
    names = itertools.chain([base], (base.with_name(f"{base.name}-{n}") for n in itertools.count(2)))
    return next(file for name in names if not (file := name.with_suffix(".json")).exists())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure part by part, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=[name for name in PARTS if name != "card"], action="append")
    parser.add_argument("--rehearse", action="store_true", help="at toy size, also without a GPU")
    parser.add_argument("--out", type=Path, help="default: results/gpu-<date>.json")
    given = parser.parse_args(argv)
    if not ON_GPU and not given.rehearse:
        print(
            "gpu-check: torch sees no GPU on this machine; nothing was measured and nothing written. Run it "
            "where there is an H100 or H200 (the head of tests/benchmarks/gpu_check.py says how without a "
            "network). `python -m tests.benchmarks.gpu_check --rehearse` tries every part at toy size here.",
            file=sys.stderr,
        )
        return 1
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would spread a batch over several
    began, size, out = time.monotonic(), "toy" if given.rehearse else "7b", _file(given.out, given.rehearse)
    out.parent.mkdir(parents=True, exist_ok=True)
    context, card = _context(size)
    if card["status"] != "ok":
        print(f"gpu-check: the GPU cannot be used: {card['error']}; nothing was measured", file=sys.stderr)
        return 1
    told: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _commit(),
        "size": size,
        "is_evidence": not given.rehearse,
        "parts": {"card": card},
    }
    for name in given.part or [name for name in PARTS if name != "card"]:
        print(f"gpu-check: {name} ...", flush=True)
        limit_s = min(PARTS[name].budget_s, TOTAL_S - (time.monotonic() - began))
        if given.rehearse:
            limit_s = REHEARSAL_S
        if limit_s < 10:
            part = {"status": "out of time", "error": "the parts before it took the ten minutes"}
        else:
            part = run_part(context, name, size, limit_s)
        told["parts"][name] = part
        print(f"gpu-check: {name}: {part['status']} {part.get('error', part.get('reason', ''))}", flush=True)
        told["summary"] = summary(told["parts"])
        _write(out, told)
    for line, value in told["summary"].items():
        print(f"  {line}: {value:.2f}")
    print(f"written to {out}")
    return int(any(part["status"] not in ("ok", "skipped") for part in told["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
