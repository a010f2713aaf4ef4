"""`report.html` of a run: the verdict with its reasons, the differences, and how the policy was made.

Reads the run folder and nothing else. A stage that is missing or has failed leaves its section out.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align.evaluation import judged_answers
from align.evaluation.benchmarks import published
from align.release import charts, clips, evaluations, page
from align.release.ancestry import VERDICT, manifest_of, stage_order
from align.release.comparison import ComparedQuestion, Outcome, compare_answers
from align.release.evaluations import Evaluation
from align.run_folder.artifacts import MANIFEST, METRICS, read_json, read_metrics
from preference_data.store import write_text

_SAMPLES = 12
_OUTCOMES: tuple[Outcome, ...] = ("improved", "regressed", "unchanged")
_METHODS = {"pretrain": "Pre-training", "sft": "SFT", "dpo": "DPO", "kto": "KTO", "grpo": "GRPO"}
_CONTROLS = {"sft": "Chosen-only training", "best_of": "Best-of-n fine-tuning"}
"""Losses that make a control of a stage."""
_COLUMNS = (
    *("factuality", "behaviour", "score", "fact_accuracy", "absent_accuracy", "over_abstention"),
    *("words", "entropy"),
)
"""Of the policies side by side; captions and time stand beside them."""
OWN_PAGES = {"Per annotator": "quality.html", "What each rule left out": "rules.html"}
"""Pages that stages write beside their records, which the report links to."""
_ANNOTATION = ("completions", "annotations", "pairs")
"""Outputs of the stages whose numbers stand under annotation."""


class Stage(NamedTuple):
    """One stage of the run, from its folder and the summary; anything unknown is empty."""

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

    @property
    def produces(self) -> str:
        """The kind of its output; unknown until it has finished."""
        return str(self.manifest.get("produces", ""))


def write(run: Path) -> Path:
    """Write `<run>/report.html` from what the run folder holds and return its path.

    Raises:
        FileNotFoundError: there is no run folder.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is not a run folder; `align run RECIPE --out {run}` makes one")
    summary = read_json(run / "summary.json") if (run / "summary.json").exists() else {}
    stages = stages_of(run, summary)
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
            evaluations=[_evaluation_view(evaluation, stages) for evaluation in evaluations.find(run)],
            training=[view for stage in stages if (view := _training_view(stage))],
            corpora=[stage for stage in stages if stage.produces == "corpus" and stage.metrics],
            annotation=[
                (stage, _headlines(stage.metrics), _own_pages(stage))
                for stage in stages
                if stage.produces in _ANNOTATION and stage.metrics
            ],
        ),
    )
    return path


def _own_pages(stage: Stage) -> dict[str, str]:
    """Pages that a stage has written beside its records: what they show -> their place in the run."""
    return {
        what: f"{stage.name}/{name}" for what, name in OWN_PAGES.items() if (stage.folder / name).exists()
    }


def stages_of(run: Path, summary: Mapping[str, Any]) -> list[Stage]:
    """The stages that a run folder holds, or its summary names, in their order."""
    summaries = summary.get("stages") or {}
    on_disk = {path.parent.name for path in run.glob(f"[!.]*/{MANIFEST}")}
    partial = {path.name.removeprefix(".partial-") for path in run.glob(".partial-*") if path.is_dir()}
    names = sorted(on_disk | partial | set(summaries), key=stage_order)
    return [_stage(run, name, summaries.get(name) or {}) for name in names]


def _stage(run: Path, name: str, summary: Mapping[str, Any]) -> Stage:
    folder = run / name
    manifest = manifest_of(folder)
    return Stage(
        name=name,
        kind=manifest.get("kind") or name.partition("_")[2],
        status=summary.get("status") or ("done" if manifest else "unfinished"),
        error=summary.get("error") or "",
        folder=folder if manifest else run / f".partial-{name}",
        manifest=manifest,
        seconds=manifest.get("seconds", summary.get("seconds")),
        peak_memory_mb=manifest.get("peak_memory_mb", summary.get("peak_memory_mb")),
        metrics=manifest.get("metrics") or summary.get("metrics") or {},
    )


def _verdict(stages: Sequence[Stage], summary: Mapping[str, Any]) -> dict[str, Any]:
    """The gate's verdict, else the summary's; `tone` is a class of the style sheet."""
    written = [stage.folder / VERDICT for stage in stages if stage.manifest]
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
    """One evaluation's part of the page, numbers as in its `scores.json`."""
    scores, methods = evaluation.scores, {stage.name: _method(stage) for stage in stages}
    return {
        "stage": evaluation.folder.name,
        "scores": scores,
        "comparison": scores.get("comparison", {}),
        "by_category": scores.get("by_category", {}),
        "by_kind": scores.get("by_kind", {}),
        "controls": _controls(scores, methods),
        "columns": _COLUMNS,
        "methods": methods,
        "seconds": {stage.name: stage.seconds for stage in stages},
        "captions": {name: _captions(policy) for name, policy in scores["policies"].items()},
        "recognition": _recognition(scores),
        "published_choices": {
            source: published.multiple_choice(numbers["kind"])
            for source, numbers in scores["policies"][scores["after"]].get("multiple_choice", {}).items()
        },
        "samples": _samples(evaluation),
    }


def _controls(scores: Mapping[str, Any], methods: Mapping[str, str]) -> list[dict[str, Any]]:
    """The controls that the `after` policy must beat: level, difference, interval where there is one."""
    after = scores["after"]
    own = scores["policies"][after]["overall"]
    rows: list[dict[str, Any]] = []
    if shuffled := scores["policies"][after].get("shuffled_audio"):
        rows.append(_control("Shuffled audio", f"{after}, each question with another clip", shuffled, own))
    if constant := scores.get("constant_answer"):
        rows.append(_control("Constant answer", f"always “{constant['text']}”", constant, own))
    for name, metrics in scores.get("against", {}).items():
        label = methods.get(name) or "Other policy"
        rows.append({"label": label, "note": name, "metrics": metrics, "has_interval": True})
    return rows


def _method(stage: Stage) -> str:
    """How a stage trains, in the words of its config; empty for stages that train nothing."""
    config = stage.manifest.get("config") or {}
    if stage.kind not in _METHODS:
        return ""
    if stage.kind == "sft" and config.get("prompts"):
        return "SFT on references"
    if (loss := config.get("loss")) in _CONTROLS:
        return _CONTROLS[loss]
    rewards = [name for name, value in (config.get("reward") or {}).items() if value]
    own_loss = loss if loss != stage.kind else None
    return ", ".join(filter(None, [_METHODS[stage.kind], own_loss, " + ".join(rewards)]))


def _captions(policy: Mapping[str, Any]) -> float | None:
    """Exact matches over the corpus' own captions."""
    sets = [numbers for name, numbers in policy.get("recognition", {}).items() if name.startswith("caption/")]
    return sets[0].get("exact") if sets else None


def _control(label: str, note: str, control: Mapping[str, Any], own: Mapping[str, float]) -> dict[str, Any]:
    metrics = {
        metric: {"before": control[metric], "after": own[metric], "delta": own[metric] - control[metric]}
        for metric in ("factuality", "behaviour", "score")
        if metric in control
    }
    return {"label": label, "note": note, "metrics": metrics, "has_interval": False}


def _recognition(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Recognition sets with the score of every policy that was tried on them."""
    policies = scores["policies"]
    sets = sorted({name for policy in policies.values() for name in policy.get("recognition", {})})
    rows = []
    for name in sets:
        by_policy = {key: policy.get("recognition", {}).get(name) for key, policy in policies.items()}
        measured = next(numbers for numbers in by_policy.values() if numbers)
        # A corpus' own rows are of one split; a benchmark's file is not, and its rows say no more than test
        split = scores["split"] if "/" in name else "test"
        reference = published.beside(name, measured, split)
        rows.append({"set": name, "by_policy": by_policy, "published": reference})
    return rows


def _samples(evaluation: Evaluation) -> dict[str, Any] | None:
    """A dozen questions over all categories and outcomes, and how common each outcome is.

    Which question stands for its category and outcome is decided by a hash of its id: neither by chance,
    nor by what looks good.
    """
    scores = evaluation.scores
    paths = [evaluations.answers_path(evaluation, scores[which]) for which in ("before", "after")]
    if not all(path.exists() for path in paths):
        return None
    before, after = map(judged_answers.read, paths)
    margin = float(scores.get("judge", {}).get("tie_margin", 0.0))
    ids = sorted(before.keys() & after.keys(), key=lambda key: hashlib.sha256(str(key).encode()).hexdigest())
    questions = [compare_answers([before[key], after[key]], margin) for key in ids]
    questions = [question for question in questions if question.outcome != "unscored"]
    groups: dict[tuple[str, str], list[ComparedQuestion]] = {}
    for question in questions:
        groups.setdefault((question.outcome, question.answers[0].category), []).append(question)
    # The first of every group, then the second of every group, and so on
    rounds = itertools.zip_longest(*(groups[key] for key in sorted(groups)))
    samples = [question for turn in rounds for question in turn if question][:_SAMPLES]
    cards = [
        {"question": question, "audio": clips.audio_url(evaluation.corpus, question.answers[0].audio)}
        for question in sorted(samples, key=lambda question: _OUTCOMES.index(question.outcome))
    ]
    counts = Counter(question.outcome for question in questions)
    return {"counts": {outcome: counts[outcome] for outcome in _OUTCOMES}, "cards": cards}


def _training_view(stage: Stage) -> dict[str, Any] | None:
    """Curves of a training stage, also of one that has not finished."""
    view = charts.training(read_metrics(stage.folder / METRICS), stage.metrics)
    return view and {"stage": stage, **view}


def _headlines(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics without those that detail another one: `alpha_factuality`, not `alpha_factuality_low`."""
    return {
        name: value
        for name, value in metrics.items()
        if not any(name.startswith(f"{other}_") for other in metrics)
    }
