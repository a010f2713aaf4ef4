"""Decide whether the candidate may be promoted. Only wires: `release/verdict.py` decides.

Reads: evaluation, and what its candidate was made from (for contamination, and how far its rewards rose); the
registry, if a model is named: its champion is noted, so that promotion can check whether it still is. Writes:
verdict.json.
    align run recipes/demo --only 8_gate
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.evaluation.benchmarks import air_bench
from align.evaluation.benchmarks import tasks as benchmarks
from align.evaluation.benchmarks.rows import held_out_utterances
from align.models.qwen2_audio.model import located
from align.models.shards import weights_sha256
from align.recipe.config.evaluation import GateConfig
from align.release import verdict
from align.release.ancestry import Ancestor, Ancestry, ancestry, complete_ancestry, resolve
from align.release.registry import Registry
from align.run_folder.artifacts import (
    METRICS,
    StageFolder,
    plain_values,
    read_json,
    read_manifest,
    read_metrics,
    sha256_json,
    write_json,
)
from align.run_folder.progress import Progress
from align.run_folder.tracking import tracking_uri
from preference_data import store
from preference_data.audio import acoustic, contamination
from preference_data.audio.clip_files import BadAudio, ClipFile
from preference_data.audio.contamination import Clip, Contamination
from preference_data.dataset.dataset import Dataset
from preference_data.schema import AudioClip

_OVERLAPS_LISTED = 20
"""Overlaps and unreadable clips named in verdict.json."""
_SENTENCE_ENDS = tuple(".!?…。！？")
_CLOSING = "\"'*)]”’»」』"


def run(config: GateConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Write the verdict; returns how many checks had which outcome.

    Raises:
        RegistryDown: a registered model is named and MLflow does not answer.
    """
    evaluation, folder = inputs[config.evaluation], out.final.parent
    scores = read_json(evaluation / "scores.json")
    holder = (  # first of all: whether MLflow answers
        Registry(tracking_uri(folder), config.model_name).holder(config.alias) if config.model_name else None
    )
    weights = {name: _weights(resolve(folder, name)) for name in (scores["after"], scores["before"])}
    history = complete_ancestry(resolve(folder, scores["after"]))
    changed_corpora = complete_ancestry(evaluation).changed_corpora()
    contaminated = None if changed_corpora else _contamination(evaluation, history, out.name)
    unfinished = {name: _unfinished(evaluation, name) for name in weights}
    champion = holder and verdict.Champion(holder.version, holder.weights, *weights.values())
    thresholds = config.thresholds.model_dump()
    rewards = _rewards(history, with_annotators=config.thresholds.independent_judge)
    rises = _reward_rises(history, ancestry(resolve(folder, scores["before"])))
    checks = verdict.checks(
        scores,
        thresholds,
        unfinished=unfinished,
        contamination=contaminated,
        champion=champion,
        rewards=rewards,
        reward_rises=rises,
    )
    decision = verdict.decide(checks)
    write_json(
        out.path / "verdict.json",
        {
            "verdict": decision.verdict,
            "reasons": decision.reasons,
            "split": scores["split"],
            "candidate": scores["after"],
            "baseline": scores["before"],
            "judge": scores["judge"],
            "checks": [{**check._asdict(), "passed": check.outcome == "pass"} for check in decision.checks],
            "unfinished": unfinished,
            "thresholds_sha256": sha256_json(thresholds),
            "weights": weights,
            "registry": {"model_name": config.model_name, "alias": config.alias},
            "champion": holder._asdict() if holder else None,
            "rewards": rewards,
            "reward_rises": {name: rise and rise._asdict() for name, rise in rises.items()},
            "contamination": _contamination_report(contaminated, history, changed_corpora),
        },
    )
    outcomes = [check.outcome for check in decision.checks]
    return {
        f"checks_{outcome}": float(outcomes.count(outcome)) for outcome in ("pass", "fail", "inconclusive")
    }


def _weights(policy: Path) -> str | None:
    """The hash of a policy's weights; None for one that is only on the Hub."""
    return weights_sha256(located(policy)) if policy.is_dir() else None


def _rewards(history: Ancestry, with_annotators: bool) -> dict[str, dict[str, Any]]:
    """What rewarded the candidate and its ancestors, by stage, a model that judged comparisons among them.

    Simulated annotators are the judge `facts`.
    """
    annotations = {
        ancestor.name: ancestor.manifest.get("config", {})
        for ancestor in history.ancestors
        if ancestor.manifest.get("produces") == "annotations"
    }
    rewards = {
        ancestor.name: ancestor.manifest["reward"]
        for ancestor in history.ancestors
        if "reward" in ancestor.manifest
    }
    rewards |= {
        name: {"kind": "annotating model", "judge": _judge_name(config["judge"])}
        for name, config in annotations.items()
        if config.get("judge")
    }
    if with_annotators:
        rewards |= {
            name: {"kind": "simulated annotators", "judge": verdict.DETERMINISTIC_JUDGE}
            for name, config in annotations.items()
            if config.get("by") == "simulated"
        }
    return rewards


def _judge_name(judge: Mapping[str, Any]) -> str:
    """What a configured judge model calls itself: as its server names it, or its folder's name."""
    return str(judge["model"] if judge.get("url") else Path(judge["model"]).name)


def _reward_rises(history: Ancestry, baseline: Ancestry) -> dict[str, verdict.RewardRise | None]:
    """By stage, what happened to the reward in the trainings on it that only the candidate went through."""
    shared = {ancestor.folder for ancestor in baseline.ancestors}
    return {
        ancestor.name: _reward_rise(ancestor)
        for ancestor in history.ancestors
        if ancestor.folder not in shared
        and "reward" in ancestor.manifest
        and ancestor.manifest.get("produces") == "policy"
    }


def _reward_rise(training: Ancestor) -> verdict.RewardRise | None:
    """By the rows of its metrics; None without two."""
    until = training.manifest["metrics"].get("chosen_step", math.inf)
    rows = read_metrics(training.folder / METRICS)
    rewards = [row["reward"] for row in rows if "reward" in row and row["step"] <= until]
    return verdict.RewardRise(rewards[0], rewards[-1]) if len(rewards) > 1 else None


def _unfinished(evaluation: Path, policy: str) -> float | None:
    """The share of a policy's answers that were cut short; None where the answers are not there."""
    path = evaluation / "answers" / f"{policy.replace('/', '_')}.jsonl"
    return unfinished_share([text for _, text in air_bench.read_answers(path)]) if path.exists() else None


def unfinished_share(responses: Sequence[str]) -> float | None:
    """Share of answers that do not end as a sentence does; None without any.

    So preference optimisation looks when it has cut sentences to pieces. Compare it with another policy's on
    the same questions: some answer without a full stop as a habit.
    """
    cut = [not text.strip().rstrip(_CLOSING).endswith(_SENTENCE_ENDS) for text in responses]
    return sum(cut) / len(cut) if cut else None


# -------------------------------------------------------------------------- contamination


def _contamination(evaluation: Path, history: Ancestry, name: str) -> Contamination:
    """The evaluation's clips against those of every corpus behind the candidate."""
    benchmark, split = _benchmark(evaluation)
    trained = _trained(history, split)
    with Progress(f"{name} contamination", len(benchmark) + len(trained)) as progress:
        return contamination.find(benchmark, trained, on_progress=progress.update)


def _benchmark(evaluation: Path) -> tuple[dict[str, Clip], str]:
    """The clips of an evaluation's questions and rows, by path, or file and path; and their split."""
    config, scores = read_manifest(evaluation)["config"], read_json(evaluation / "scores.json")
    corpus, split = evaluation.parent / config["corpus"], config["split"]
    answers = air_bench.read_answers(evaluation / "answers" / f"{scores['after'].replace('/', '_')}.jsonl")
    prefix = "" if config.get("air_bench") else f"{split}/"
    benchmark = Dataset(evaluation.parent / scores.get("audio_root", config["corpus"]))
    names = sorted({prefix + item.audio for item, _ in answers})
    clips = {name: Clip(_place(benchmark, name)) for name in names}
    spoken, own = held_out_utterances(corpus / split / "recognition.jsonl"), Dataset(corpus)
    clips |= {row.audio: Clip(_place(own, row.audio)) for row in spoken}
    for file, kind in config.get("benchmarks", {}).items():
        path = Path(file).expanduser()
        beside = Dataset(path.parent, {})
        unusable = {row["path"] for row in scores.get("unusable_rows", {}).get(file, [])}
        names = sorted({row.audio for row in benchmarks.read_rows(path, kind)[0]} - unusable)
        clips |= {f"{file}: {name}": Clip(_place(beside, name)) for name in names}
    return clips, split


def _place(root: Dataset, clip: str) -> ClipFile:
    """The clip's file, also where it is missing: then it is reported as unreadable, not raised."""
    try:
        return root.find(clip)
    except BadAudio:
        return root.folder / clip


def _trained(history: Ancestry, split: str) -> dict[str, Clip]:
    """Every clip of a corpus behind the candidate that it was trained, sampled or chosen on."""
    held_out = {split, "test"}
    return {
        f"{name}/{clip.path}": Clip(_place(root, clip.path), clip.sha256, clip.duration_s)
        for name, corpus in history.corpora().items()
        for root in [Dataset(corpus.folder)]
        for clip in store.stream(corpus.folder / "clips.jsonl", AudioClip)
        if clip.split not in held_out
    }


def _contamination_report(
    contaminated: Contamination | None, history: Ancestry, changed_corpora: list[str]
) -> dict[str, Any]:
    report: dict[str, Any] = {}
    if contaminated:
        report = {
            "benchmark_clips": contaminated.n_benchmark,
            "trained_clips": contaminated.n_trained,
            "heard": contaminated.heard,
            "alike": contaminated.alike,
            "cannot_find": acoustic.CANNOT_FIND,
            "overlaps": plain_values(contaminated.overlaps[:_OVERLAPS_LISTED]),
            "unreadable": list(contaminated.unreadable[:_OVERLAPS_LISTED]),
        }
    return {**report, "unknown_training_data": history.unknown, "changed_corpora": changed_corpora}
