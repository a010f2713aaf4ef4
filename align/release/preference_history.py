"""Where preferences come from, for the card of a published dataset: judges, their agreement, the rules.

Everything is read from the run that made them; of other files nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.release.ancestry import manifest_of, resolve
from align.run_folder.artifacts import MANIFEST, read_json, read_manifest

_OF_ANNOTATIONS = (
    *("exclude", "min_gold", "annotator_weights", "min_model_agreement", "min_agreement", "min_alpha"),
    *("correction_weight", "axis"),
)
_OF_SCORES = ("opponents", "margin", "good_from", "bad_to")
"""Keys of the stages that make pairs and labels."""


def history_of(records: Path) -> list[str]:
    """Paragraphs of Markdown about pairs or labels in a finished stage's folder; none of other files."""
    if not (records.parent / MANIFEST).exists():
        return []
    return list(_paragraphs(records.parent, read_manifest(records.parent)["config"]))


def _paragraphs(stage: Path, config: Mapping[str, Any]) -> Iterator[str]:
    run = stage.parent
    rules = _OF_ANNOTATIONS if config.get("annotations") else _OF_SCORES
    values = ", ".join(f"{key} {config[key]}" for key in rules if config.get(key) is not None)
    yield f"Rules: {values or 'none'}."
    if (stage / "rules.json").exists():
        yield _left_out(read_json(stage / "rules.json"))
    if name := config.get("annotations"):
        annotated = resolve(run, name)
        if (annotated / "quality.json").exists():
            yield from _of_annotators(annotated)
        if (annotated / "model.json").exists():
            yield _of_model(read_json(annotated / "model.json"))
    if (name := config.get("scores")) and (run / name / "reward.json").exists():
        kinds = read_json(run / name / "reward.json").get("rewards", [])
        named = ", ".join(f"{kind['kind']} {kind.get('judge') or ''}".strip() for kind in kinds)
        yield f"No person judged: a reward scored the completions ({named})."


def _left_out(rules: Mapping[str, Any]) -> str:
    rows = [row for row in rules["rules"] if row["of"] == "judgements" and row["left_out"]]
    removed = ", ".join(f"{row['rule']} {row['left_out']:,}" for row in rows)
    return f"{rules['counted']:,} judgements count; left out: {removed or 'none'}."


def _of_annotators(stage: Path) -> Iterator[str]:
    config = manifest_of(stage).get("config", {})  # of judgements from outside the run there is none
    quality = read_json(stage / "quality.json")
    who = "simulated annotators, who know the facts" if config.get("by") == "simulated" else "annotators"
    n = sum(quality["overall"]["answers"].values())
    if not n:
        return
    yield (
        f"{len(quality['annotators'])} {who}, {n:,} judgements; one counts where at least "
        f"{quality['min_heard']:.0%} of the clip was played."
    )
    lines = []
    for axis, alpha in quality["alpha"].items():
        value, low, high = alpha["value"], alpha["low"], alpha["high"]
        known = "undefined" if value is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"
        lines.append(f"| {axis} | {known} | {alpha['comparisons']:,} |")
    head = "| axis | Krippendorff's alpha [95 %] | comparisons judged by two or more |"
    yield "\n".join([head, "| --- | --- | --- |", *lines])


def _of_model(model: Mapping[str, Any]) -> str:
    """What model.json of an annotate stage says, in a sentence."""
    share = model["agreement"]["overall"]["share"]
    hears = "hears the clips" if model["hears"] else "cannot hear and reads references"
    figure = "how far it agrees with people is not known, for nobody else judged these"
    if share:
        interval = f"[{share['low']:.0%}, {share['high']:.0%}], n {share['n']:,}"
        figure = f"it agrees with {share['value']:.0%} {interval} of people's preferences and gold"
    return f"The model {model['judge']} ({hears}) judged {model['judged']:,} comparisons; {figure}."
