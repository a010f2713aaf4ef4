"""Stages that do next to nothing, for tests of what runs them. As a script: `align` with these stages.

They leave real files in the real folders; only the work is missing. `sft` takes its pace from the
`weight_decay` of its `trl:` mapping, in seconds a step.
"""

import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from align.run_folder.artifacts import Interrupted, heeding_stop, read_metrics, write_json

RECIPE = {
    "1_corpus": "stage: corpus\ncorpus: folder\ndir: recordings\n",
    "2_sft": "stage: sft\ncorpus: 1_corpus\npolicy: owner/base\nsteps: 6\nbatch_size: 2\n"
    "learning_rate: 1e-3\n",
    "7_evaluate": "stage: evaluate\ncorpus: 1_corpus\npolicies: [2_sft]\nbefore: 2_sft\nafter: 2_sft\n",
    "8_gate": "stage: gate\nevaluation: 7_evaluate\n",
}
PROMOTE = "stage: promote\npolicy: 2_sft\nverdict: 8_gate\nmodel_name: toy\n"
MARKS = {"factuality": 0.75, "behaviour": 0.5, "score": 6.0}


def write_recipe(folder, **changed):
    """The toy recipe as files; `changed` replaces or adds stage files, e.g. `s2_sft="..."`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {**RECIPE, **{key.removeprefix("s"): text for key, text in changed.items()}}.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def run(config, inputs, out):
    return globals()[f"_{config.stage}"](config, inputs, out)


def _corpus(config, inputs, out):
    with (out.path / "attempts.txt").open("a") as file:
        file.write("x")
    (out.path / "clips.txt").write_text(f"{config.dir} {config.chats_per_clip}")
    return {"clips": 3.0}


def _sft(config, inputs, out):
    done = len(read_metrics(out.path / "metrics.jsonl"))
    (out.path / "resumed_from.txt").write_text(str(done))
    with heeding_stop() as stop:
        for step in range(done + 1, config.steps + 1):
            time.sleep(config.trl.get("weight_decay", 0))
            out.log(step, {"loss": 1 / step})
            if stop.is_set():
                raise Interrupted
    (out.path / "model").mkdir(exist_ok=True)
    save_file({"a": np.full(3, config.steps, np.float32)}, out.path / "model" / "model.safetensors")
    return {"loss": 1 / config.steps}


def _evaluate(config, inputs, out):
    (inputs[config.after] / "model" / "model.safetensors").stat()
    interval = {"delta": 0.0, "ci_low": -0.1, "ci_high": 0.1, "n": 4}
    scores = {
        "split": config.split,
        "n": 4,
        "judge": {"name": "facts", "shares_ground_truth": True},
        "before": config.before,
        "after": config.after,
        "policies": {name: {"overall": {**MARKS, "n": 4}} for name in config.policies},
        "comparison": {name: {"before": mark, "after": mark, **interval} for name, mark in MARKS.items()},
    }
    write_json(out.path / "scores.json", scores)
    return {"factuality": MARKS["factuality"]}


def _gate(config, inputs, out):
    """`min_questions` decides: 1 passes, 2 fails, more is inconclusive."""
    verdict = {1: "pass", 2: "fail"}.get(config.thresholds.min_questions, "inconclusive")
    reasons = [f"min_questions is {config.thresholds.min_questions}"]
    write_json(out.path / "verdict.json", {"verdict": verdict, "reasons": reasons, "candidate": "2_sft"})
    return {}


def replace_stages():
    """Put these stages in the place of the real ones, in this process."""
    module = sys.modules[__name__]
    sys.modules.update({f"align.stages.{kind}": module for kind in ("corpus", "sft", "evaluate", "gate")})


if __name__ == "__main__":
    from align.cli import main

    replace_stages()
    sys.path.insert(0, str(Path(__file__).parent))
    main.main()
