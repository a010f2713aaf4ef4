"""Decide whether the candidate may be promoted. Only wires: `release/verdict.py` decides.

Reads: evaluation, and what its candidate was made from (for contamination); the registry, if a model is
named: its champion is noted, so that promotion can tell whether it still is. Writes: verdict.json.
    align run recipes/demo --only 8_gate
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.evaluation.benchmarks import air_bench, recognition
from align.evaluation.fragments import unfinished
from align.models.qwen2_audio.model import located
from align.models.shards import weights_sha256
from align.recipe.config.evaluation import GateConfig
from align.release import verdict
from align.release.lineage import Lineage, lineage
from align.release.registry import Holder, Registry
from align.run_folder.artifacts import StageFolder, read_json, read_manifest, sha256_json, write_json
from align.run_folder.progress import Progress
from align.run_folder.tracking import tracking_uri
from preference_data import store
from preference_data.audio import contamination
from preference_data.audio.clip_files import BadAudio, ClipFile
from preference_data.audio.contamination import Clip, Contamination
from preference_data.dataset.dataset import Dataset
from preference_data.schema import AudioClip

_TOLD = 20
"""Overlaps named in verdict.json."""


def run(config: GateConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Write the verdict; returns how many checks had which outcome.

    Raises:
        RegistryDown: a registered model is named and MLflow does not answer.
    """
    evaluation, folder = inputs[config.evaluation], out.final.parent
    scores = read_json(evaluation / "scores.json")
    candidate = _stage(folder, scores["after"])
    holder = (
        Registry(tracking_uri(folder), config.model_name).holder(config.alias) if config.model_name else None
    )
    weights = {name: _weights(_stage(folder, name)) for name in (scores["after"], scores["before"])}
    history = lineage(candidate)
    heard = _contamination(evaluation, history, out.name)
    cut_short = {name: _unfinished(evaluation, name) for name in weights}
    champion = _champion(holder, scores, weights)
    thresholds = config.thresholds.model_dump()
    evidence = verdict.Evidence(scores, cut_short, heard, champion)
    decided = verdict.decide(verdict.checks(evidence, thresholds))
    write_json(
        out.path / "verdict.json",
        {
            "verdict": decided.verdict,
            "reasons": decided.reasons,
            "split": scores["split"],
            "candidate": scores["after"],
            "baseline": scores["before"],
            "judge": scores["judge"],
            "checks": [{**check._asdict(), "passed": check.outcome == "pass"} for check in decided.checks],
            "unfinished": cut_short,
            "thresholds_sha256": sha256_json(thresholds),
            "weights": weights,
            "registry": {"model_name": config.model_name, "alias": config.alias},
            "champion": holder._asdict() if holder else None,
            "contamination": _told(heard, history, lineage(evaluation).changed("corpus")),
        },
    )
    outcomes = [check.outcome for check in decided.checks]
    return {
        f"checks_{outcome}": float(outcomes.count(outcome)) for outcome in ("pass", "fail", "inconclusive")
    }


def _stage(run: Path, ref: str) -> Path:
    """A policy's folder: a stage of this run, or a path as the recipe has it."""
    return Path(ref).expanduser() if "/" in ref else run / ref


def _weights(policy: Path) -> str | None:
    """The hash of a policy's weights; None for one that is only on the Hub."""
    return weights_sha256(located(policy)) if policy.is_dir() else None


def _unfinished(evaluation: Path, policy: str) -> float | None:
    """The share of a policy's answers that were cut short; None where the answers are not there."""
    path = evaluation / "answers" / f"{policy.replace('/', '_')}.jsonl"
    return unfinished([text for _, text in air_bench.read_answers(path)]) if path.exists() else None


def _champion(
    holder: Holder | None, scores: dict[str, Any], weights: dict[str, str | None]
) -> verdict.Champion | None:
    if holder is None:
        return None
    return verdict.Champion(
        holder.version, holder.weights, weights[scores["after"]], weights[scores["before"]]
    )


# -------------------------------------------------------------------------- contamination


def _contamination(evaluation: Path, history: Lineage, name: str) -> Contamination | None:
    """The evaluation's clips against those of every corpus behind the candidate; None: they are gone."""
    if lineage(evaluation).changed("corpus"):
        return None
    benchmark, split = _benchmark(evaluation)
    trained = _trained(history, split)
    with Progress(f"{name} contamination", len(benchmark) + len(trained)) as progress:
        return contamination.find(benchmark, trained, on_progress=progress.update)


def _benchmark(evaluation: Path) -> tuple[dict[str, Clip], str]:
    """The clips that an evaluation asked about, by their path in its corpus, and their split."""
    asked, scores = read_manifest(evaluation)["config"], read_json(evaluation / "scores.json")
    corpus, split = evaluation.parent / asked["corpus"], asked["split"]
    answered = air_bench.read_answers(evaluation / "answers" / f"{scores['after'].replace('/', '_')}.jsonl")
    prefix = "" if asked.get("air_bench") else f"{split}/"
    root = evaluation.parent / scores.get("audio_root", asked["corpus"])
    rows = corpus / split / "recognition.jsonl"
    asked_about, own = Dataset(root), Dataset(corpus)
    found = {
        clip: Clip(_place(asked_about, clip))
        for clip in sorted({prefix + item.audio for item, _ in answered})
    }
    if rows.exists():
        found |= {row.audio: Clip(_place(own, row.audio)) for row in recognition.read(rows)}
    return found, split


def _place(root: Dataset, clip: str) -> ClipFile:
    """Where a clip is, or should be: what is not there is told as unreadable, not raised."""
    try:
        return root.find(clip)
    except BadAudio:
        return root.folder / clip


def _trained(history: Lineage, split: str) -> dict[str, Clip]:
    """Every clip of a corpus behind the candidate that it was trained, sampled or chosen on."""
    held_out = {split, "test"}
    return {
        f"{name}/{clip.path}": Clip(_place(root, clip.path), clip.sha256, clip.duration_s)
        for name, corpus in history.of_kind("corpus").items()
        for root in [Dataset(corpus)]
        for clip in store.stream(corpus / "clips.jsonl", AudioClip)
        if clip.split not in held_out
    }


def _told(found: Contamination | None, history: Lineage, changed: list[str]) -> dict[str, Any]:
    told = {"unknown_training_data": list(history.unknown), "changed_corpora": changed}
    if found is None:
        return told
    return {
        "benchmark_clips": found.n_benchmark,
        "trained_clips": found.n_trained,
        "heard": found.heard,
        "overlaps": [overlap._asdict() for overlap in found.overlaps[:_TOLD]],
        "unreadable": list(found.unreadable[:_TOLD]),
        **told,
    }
