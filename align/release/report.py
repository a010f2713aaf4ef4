"""`report.html` of a run: what was decided and why, by how much it got better, and how it was made.

Reads the run folder and nothing else. A stage that is missing or has failed leaves its section out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from align.evaluation.benchmarks import published
from align.evaluation.statistics import Interval
from align.release import charts, clips, evaluations, page
from align.release.evaluations import Evaluation, Item
from align.run_folder.artifacts import MANIFEST, METRICS, read_json, read_metrics
from preference_data.store import write_text

_TRAINING_KINDS = ("pretrain", "sft", "dpo")
_SAMPLES = 12
_OUTCOMES = ("improved", "regressed", "unchanged")
_ANNOTATION_KINDS = ("sample", "annotate", "pairs")


class Stage(NamedTuple):
    """One stage of the run as its folder and the summary tell it; anything unknown is empty."""

    name: str
    kind: str
    status: str
    error: str
    folder: Path
    """The finished folder, or the partial one of a stage that has not finished."""
    manifest: dict[str, Any]
    seconds: float | None
    peak_memory_mb: float | None
    metrics: dict[str, Any]


def write(run: Path) -> Path:
    """Write `<run>/report.html` from what the run folder holds and return its path.

    Raises:
        FileNotFoundError: there is no run folder.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is not a run folder; `align run RECIPE --out {run}` makes one")
    summary = read_json(run / "summary.json") if (run / "summary.json").exists() else {}
    stages = _stages(run, summary)
    path = run / "report.html"
    write_text(
        path,
        page.render(
            "report.html",
            name=summary.get("recipe", run.resolve().name),
            summary=summary,
            stages=stages,
            verdict=_verdict(stages, summary),
            orientation=published.warnings()[0],
            evaluations=[_evaluation_view(found, stages) for found in evaluations.find(run)],
            training=[view for stage in stages if (view := _training_view(stage))],
            corpora=[stage for stage in stages if stage.kind == "corpus" and stage.metrics],
            annotation=[
                (stage, _headlines(stage.metrics), stage.folder / "quality.html")
                for stage in stages
                if stage.kind in _ANNOTATION_KINDS and stage.metrics
            ],
            costs=_costs(stages),
        ),
    )
    return path


def _stages(run: Path, summary: Mapping[str, Any]) -> list[Stage]:
    told = summary.get("stages") or {}
    on_disk = {path.parent.name for path in run.glob(f"[!.]*/{MANIFEST}")}
    partial = {path.name.removeprefix(".partial-") for path in run.glob(".partial-*") if path.is_dir()}
    names = sorted(on_disk | partial | set(told), key=evaluations.stage_order)
    return [_stage(run, name, told.get(name) or {}) for name in names]


def _stage(run: Path, name: str, told: Mapping[str, Any]) -> Stage:
    folder = run / name
    finished = (folder / MANIFEST).exists()
    manifest = read_json(folder / MANIFEST) if finished else {}
    return Stage(
        name=name,
        kind=manifest.get("kind") or name.partition("_")[2],
        status=told.get("status") or ("done" if finished else "unfinished"),
        error=told.get("error") or "",
        folder=folder if finished else run / f".partial-{name}",
        manifest=manifest,
        seconds=manifest.get("seconds", told.get("seconds")),
        peak_memory_mb=manifest.get("peak_memory_mb", told.get("peak_memory_mb")),
        metrics=manifest.get("metrics") or told.get("metrics") or {},
    )


def _verdict(stages: Sequence[Stage], summary: Mapping[str, Any]) -> dict[str, Any]:
    """The gate's verdict, else the summary's; `tone` is a class of the style sheet."""
    written = [stage.folder / "verdict.json" for stage in stages if stage.kind == "gate"]
    verdict: dict[str, Any] = next((read_json(path) for path in written if path.exists()), {})
    word = verdict.get("verdict") or summary.get("verdict")
    title, tone = page.VERDICTS.get(str(word), ("No verdict" if word is None else str(word), "open"))
    return {
        "decided": word is not None,
        "title": title,
        "tone": tone,
        "reasons": verdict.get("reasons") or summary.get("verdict_reasons") or [],
        "checks": verdict.get("checks") or [],
    }


def _evaluation_view(evaluation: Evaluation, stages: Sequence[Stage]) -> dict[str, Any]:
    """Everything the page says about one evaluation, numbers as in its `scores.json`."""
    scores = evaluation.scores
    by_category = {
        category: {metric: Interval(**values) for metric, values in metrics.items()}
        for category, metrics in scores.get("by_category", {}).items()
    }
    shares = {metric: page.LABELS[metric] for metric in ("factuality", "behaviour")}
    return {
        "stage": evaluation.folder.name,
        "scores": scores,
        "comparison": scores.get("comparison", {}),
        "chart": charts.category_bars(by_category, shares) if by_category else None,
        "by_category": by_category,
        "controls": _controls(scores, stages),
        "recognition": _recognition(scores),
        "samples": _samples(evaluation),
    }


def _controls(scores: Mapping[str, Any], stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """What the `after` policy must beat, per control and metric: level, difference, interval if paired."""
    after = scores["after"]
    own = scores["policies"][after]["overall"]
    rows: list[dict[str, Any]] = []
    if shuffled := scores["policies"][after].get("shuffled_audio"):
        rows.append(_unpaired("Shuffled audio", f"{after}, each question with another clip", shuffled, own))
    if constant := scores.get("constant_answer"):
        rows.append(_unpaired("Constant answer", f"always “{constant['text']}”", constant, own))
    losses = {stage.name: stage.manifest.get("config", {}).get("loss") for stage in stages}
    for name, metrics in scores.get("against", {}).items():
        chosen_only = losses.get(name) == "sft"
        label = "Chosen-only training" if chosen_only else "Other policy"
        what = f"{name}: trained on the chosen answers alone" if chosen_only else name
        rows.append({"label": label, "what": what, "metrics": metrics, "unpaired": False})
    return rows


def _unpaired(label: str, what: str, control: Mapping[str, Any], own: Mapping[str, float]) -> dict[str, Any]:
    metrics = {
        metric: {"before": control[metric], "after": own[metric], "delta": own[metric] - control[metric]}
        for metric in ("factuality", "behaviour", "score")
        if metric in control
    }
    return {"label": label, "what": what, "metrics": metrics, "unpaired": True}


def _recognition(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Recognition sets with the score of every policy that was tried on them."""
    policies = scores["policies"]
    sets = sorted({name for policy in policies.values() for name in policy.get("recognition", {})})
    rows = []
    for name in sets:
        found = {key: policy.get("recognition", {}).get(name) for key, policy in policies.items()}
        measured = next(numbers for numbers in found.values() if numbers)
        # A corpus' own rows are of one split; a benchmark's file is not, and its rows say no more than test
        split = scores["split"] if "/" in name else "test"
        rows.append({"set": name, "by_policy": found, "published": published.beside(name, measured, split)})
    return rows


def _samples(evaluation: Evaluation) -> dict[str, Any] | None:
    """A dozen questions over all categories and outcomes, and how common each outcome is.

    Which question stands for its category and outcome is decided by a hash of its id: neither by chance,
    nor by what looks good.
    """
    scores = evaluation.scores
    paths = [evaluations.items_path(evaluation, scores[which]) for which in ("before", "after")]
    if not all(path.exists() for path in paths):
        return None
    before, after = (evaluations.read_items(evaluation, scores[which]) for which in ("before", "after"))
    groups: dict[tuple[str, str], list[tuple[Item, Item]]] = {}
    counts = dict.fromkeys(_OUTCOMES, 0)
    for key in sorted(before.keys() & after.keys(), key=_lot):
        outcome = _outcome(before[key].score, after[key].score)
        if outcome is None:
            continue
        counts[outcome] += 1
        groups.setdefault((outcome, before[key].category), []).append((before[key], after[key]))
    chosen = _round_robin([(key[0], pairs) for key, pairs in sorted(groups.items())], _SAMPLES)
    cards = [
        {
            "outcome": outcome,
            "first": a,
            "answers": [a, b],
            "audio": clips.audio_url(evaluation.corpus, a.audio),
        }
        for outcome, (a, b) in sorted(chosen, key=lambda pick: _OUTCOMES.index(pick[0]))
    ]
    return {"counts": counts, "cards": cards}


def _lot(uniq_id: str | int) -> str:
    return hashlib.sha256(str(uniq_id).encode()).hexdigest()


def _outcome(before: float | None, after: float | None) -> str | None:
    """What became of a question by its scores; None where one has none."""
    if before is None or after is None:
        return None
    if before == after:
        return "unchanged"
    return "improved" if after > before else "regressed"


def _round_robin(
    groups: Sequence[tuple[str, list[tuple[Item, Item]]]], n: int
) -> list[tuple[str, tuple[Item, Item]]]:
    """The first of every group, then the second of every group, ... until n are taken."""
    longest = max((len(pairs) for _, pairs in groups), default=0)
    taken = [(label, pairs[turn]) for turn in range(longest) for label, pairs in groups if turn < len(pairs)]
    return taken[:n]


def _training_view(stage: Stage) -> dict[str, Any] | None:
    """Curves of a training stage, also of one that has not finished."""
    rows = read_metrics(stage.folder / METRICS)
    if stage.kind not in _TRAINING_KINDS or not rows:
        return None
    panels = charts.PREFERENCE_PANELS if stage.kind == "dpo" else charts.TRAINING_PANELS
    used = stage.metrics.get("chosen_step")
    return {
        "stage": stage,
        "steps": max(row["step"] for row in rows),
        "curves": charts.curves(rows, panels),
        "quality": charts.curves(rows, charts.OVEROPTIMISATION_PANELS, mark_step=used),
    }


def _headlines(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics without those that detail another one: `alpha_factuality`, not `alpha_factuality_low`."""
    return {
        name: value
        for name, value in metrics.items()
        if not any(name.startswith(f"{other}_") for other in metrics)
    }


def _costs(stages: Sequence[Stage]) -> Markup | None:
    measured = [stage for stage in stages if stage.seconds is not None]
    if not measured:
        return None
    return charts.stage_costs(
        [stage.name for stage in measured],
        [stage.seconds or 0.0 for stage in measured],
        [stage.peak_memory_mb or 0.0 for stage in measured],
    )
