"""What rules about annotators, and rankings of four, are worth to DPO. For a person to run, after a demo.

    python -m tests.benchmarks.annotator_study runs/demo [--seeds 0 1 2] [--out runs/bench/annotators]

Six simulated annotators who know the facts: four err in 5 % of their answers, one guesses, one always takes
the first place. Their judgements go as a snapshot into the demo's own annotate, pairs and dpo stages; every
comparison costs a listen of its clip. Arms: `honest` (six who err in 5 %); `pairs` (no rules); `rules`
(who fails gold is left out, Dawid-Skene weights); `ranking` and `ranking_rules`, the same with four
completions ranked in place of one pair, at equal listening time. Reported: pairs, the share that the facts
contradict, and the dev score of the checkpoint that DPO publishes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from scipy import stats

from align.cli.annotate import _annotate_stage
from preference_data import store
from preference_data.dataset.dataset import Dataset
from preference_data.schema import (
    CHOICES,
    AudioClip,
    Comparison,
    Judgement,
    PreferencePair,
    Prompt,
    stable_id,
)
from preference_data.toy_world.phrasebook import Phrasebook
from ui_annotation import assignment, simulated
from ui_annotation.assignment import PLACES
from ui_annotation.project import Project

RECIPE = Path("recipes/demo")
EARLIER = ("0_corpus", "1_pretrain", "2_sft", "3_sample")
ERROR_RATE = 0.05
Answers = dict[str, Any]


class Arm(NamedTuple):
    """A setting: who annotates, how many completions are compared, and what the pairs stage does."""

    guesser_and_first: bool
    size: int
    pairs: tuple[str, ...]


_RULES = ("5_pairs.min_gold=0.7", "5_pairs.annotator_weights=dawid_skene")
ARMS = {
    "honest": Arm(False, 2, ()),
    "pairs": Arm(True, 2, ()),
    "rules": Arm(True, 2, _RULES),
    "ranking": Arm(True, 4, ()),
    "ranking_rules": Arm(True, 4, _RULES),
}


def guess(comparison: Comparison, rng: Generator) -> Answers:
    """Answers by chance."""
    n = len(comparison.texts)
    if n == 2:
        return {axis: list(CHOICES)[int(rng.integers(4))] for axis in ("factuality", "behaviour")}
    return {axis: _ranked(rng.permutation(n) + 1) for axis in ("factuality", "behaviour")}


def take_the_first(comparison: Comparison, rng: Generator) -> Answers:
    """Prefers what stands first."""
    n = len(comparison.texts)
    answer = "a" if n == 2 else _ranked(range(1, n + 1))
    return {"factuality": answer, "behaviour": answer}


def _ranked(ranks: Sequence[int]) -> list[Answers]:
    return [{"value": place, "rank": int(rank)} for place, rank in zip(PLACES, ranks, strict=False)]


def annotate(project: Project, arm: Arm, seed: int) -> list[Judgement]:
    """All judgements that the project wants: of every annotator, or of one drawn by the record's id."""
    prompts, book = project.prompts, Phrasebook.load(project.corpus / "phrasebook.yaml")
    clips = {path: path for prompt in prompts.values() for path in prompt.audios}
    informed = simulated.informed(prompts.values(), clips, book, error_rate=ERROR_RATE)

    def honest(comparison: Comparison, rng: Generator) -> Answers:
        prompt = prompts[comparison.prompt_id]
        seconds = (0.0,) * len(prompt.audios)
        task = simulated.Task("", comparison.id, prompt.audios, seconds, prompt.question, comparison.texts)
        return informed(task, rng)

    people: list[Callable[[Comparison, Generator], Answers]] = [honest] * 6
    if arm.guesser_and_first:
        people[4:] = [guess, take_the_first]
    judgements = []
    for item in project.comparisons:
        who = range(6) if item.everyone else [int(stable_id("who", seed, item.id), 16) % 6]
        for number in who:
            rng = np.random.default_rng(int(stable_id(seed, number, item.id), 16))
            answers = people[number](item, rng)
            judgements.append(
                assignment.unblind(item, f"annotator-{number + 1}", answers, kind="simulated", heard=1.0)
            )
    return judgements


def is_wrong(pair: PreferencePair, prompt: Prompt, book: Phrasebook) -> bool:
    """Whether the facts do not say that the chosen completion is better on the pair's axis."""
    facts = json.loads(prompt.meta_info)
    question = book.question(prompt.question, facts)
    chosen, rejected = (book.assess(text, question, facts) for text in (pair.chosen, pair.rejected))
    if pair.axis == "factuality":
        return chosen.factual <= rejected.factual
    return chosen.behaves <= rejected.behaves


def run(name: str, arm: Arm, demo: Path, out: Path, seed: int) -> dict[str, Any]:
    """The demo's stages from annotations to DPO under an arm; its figures."""
    folder = out / f"{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for stage in EARLIER:
        shutil.copytree(demo / stage, folder / stage, copy_function=os.link)
    keys = [
        "4_annotate.annotators=6",
        "4_annotate.gold=0.15",
        "4_annotate.comparisons_per_prompt=1",
        "5_pairs.min_alpha=null",  # the demo's would refuse the arms without rules
        f"4_annotate.completions_per_comparison={arm.size}",
        f"*.seed={seed}" if seed else "4_annotate.seed=0",
        *arm.pairs,
    ]
    keys = [key for key in keys if not key.startswith("*")]  # the first four stages have their own seed
    keys += [f"{stage}.seed={seed}" for stage in ("4_annotate", "5_pairs", "6_dpo") if seed]
    project = _annotate_stage(RECIPE, keys, folder).project
    judgements = annotate(project, arm, seed)
    store.write(folder / "judgements" / "judgements.jsonl", judgements)
    keys.append(f"4_annotate.snapshot={folder / 'judgements'}")
    for stage in ("4_annotate", "5_pairs", "6_dpo"):
        sets = [word for key in keys for word in ("--set", key)]
        command = [sys.executable, "-m", "align", "run", str(RECIPE), "--only", stage, "--out", str(folder)]
        subprocess.run([*command, *sets], check=True, stdout=subprocess.DEVNULL)
    book = Phrasebook.load(project.corpus / "phrasebook.yaml")
    pairs = store.read(folder / "5_pairs" / "pairs.jsonl", PreferencePair)
    wrong = [is_wrong(pair, project.prompts[pair.prompt_id], book) for pair in pairs]
    weight = np.array([pair.evidence for pair in pairs])
    seconds = {clip.path: clip.duration_s for clip in Dataset(project.corpus).table(AudioClip)}
    listened = sum(sum(seconds[p] for p in project.prompts[item.prompt_id].audios) for item in judgements)
    metrics = json.loads((folder / "6_dpo" / "manifest.json").read_text())["metrics"]
    interval = stats.binomtest(sum(wrong), len(wrong)).proportion_ci(method="wilson")
    return {
        "arm": name,
        "seed": seed,
        "hours": listened / 3600,
        "pairs": len(pairs),
        "wrong": sum(wrong) / len(wrong),
        "wrong_low": float(interval.low),
        "wrong_high": float(interval.high),
        "wrong_by_weight": float(weight[np.array(wrong)].sum() / weight.sum()),
        **{key: value for key, value in metrics.items() if key.startswith(("dev", "best", "chosen"))},
    }


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    yield "| " + " | ".join(keys) + " |"
    yield "| " + " | ".join("---" for _ in keys) + " |"
    for row in rows:
        cells = [f"{row[k]:.4g}" if isinstance(row.get(k), float) else str(row.get(k, "")) for k in keys]
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run the arms, print the table, keep it as JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("demo", type=Path, help="run folder with the stages up to 3_sample")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/annotators"))
    chosen = parser.parse_args()
    rows = []
    for seed in chosen.seeds:
        for name in chosen.arms:
            rows.append(run(name, ARMS[name], chosen.demo.resolve(), chosen.out.resolve(), seed))
            (chosen.out / "study.json").write_text(json.dumps(rows, indent=1))
            print("\n".join(table(rows)), flush=True)
    (chosen.out / "study.md").write_text("\n".join(table(rows)) + "\n")


if __name__ == "__main__":
    main()
