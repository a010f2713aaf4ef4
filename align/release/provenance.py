"""What a page tells of where a policy comes from: its ancestors, its training, and what its gate said.

Tolerant where `lineage` is strict: a page shows what there is, a promotion needs everything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from align.release.evaluations import Evaluation, stage_order
from align.run_folder.artifacts import MANIFEST, METRICS, read_json, read_metrics

VERDICT = "verdict.json"


class Gate(NamedTuple):
    """A gate's verdict on a policy. `is_current`: it judged the evaluation that is compared here."""

    stage: str
    verdict: str
    reasons: list[str]
    checks: list[dict[str, Any]]
    is_current: bool


class Ancestor(NamedTuple):
    """A stage that went into a policy; what is unknown is empty.

    `is_changed`: what stands in its folder now is not what went in. Of a model from elsewhere only the
    name and the digest are known.
    """

    stage: str
    kind: str
    digest: str
    commit: str
    seed: int | None
    versions: dict[str, str]
    config: dict[str, Any]
    is_changed: bool


class Training(NamedTuple):
    """`rows`: metrics by optimizer step; `chosen_step`: whose checkpoint is used, if it was chosen."""

    kind: str
    rows: list[dict[str, float]]
    chosen_step: float | None


def gate(policy: Path, evaluation: Evaluation) -> Gate | None:
    """The verdict on a policy by the last gate of its run that judged it, if any did."""
    for path in sorted(
        policy.parent.glob(f"[!.]*/{VERDICT}"), key=lambda path: stage_order(path.parent.name), reverse=True
    ):
        told = read_json(path)
        if told.get("candidate", evaluation.scores.get("after")) != policy.name:
            continue
        judged = _manifest(path.parent).get("inputs", {}).get(evaluation.folder.name)
        return Gate(
            stage=path.parent.name,
            verdict=str(told.get("verdict", "unknown")),
            reasons=list(told.get("reasons", [])),
            checks=list(told.get("checks", [])),
            is_current=judged == _manifest(evaluation.folder).get("output_digest"),
        )
    return None


def ancestors(policy: Path) -> list[Ancestor]:
    """The policy's stage, then everything that went into it, each stage once, the nearest first."""
    found: dict[Path, Ancestor] = {}
    waiting = [(policy.name, policy.resolve(), "")]
    while waiting:
        name, folder, digest = waiting.pop(0)
        if folder in found:
            continue
        manifest = _manifest(folder)
        found[folder] = Ancestor(
            stage=name,
            kind=manifest.get("kind", ""),
            digest=digest or manifest.get("output_digest", ""),
            commit=manifest.get("git_commit", ""),
            seed=manifest.get("seed"),
            versions=manifest.get("versions", {}),
            config=manifest.get("config", {}),
            is_changed=bool(manifest) and digest not in ("", manifest.get("output_digest")),
        )
        waiting += [
            (ref, (Path(ref).expanduser() if "/" in ref else folder.parent / ref).resolve(), went_in)
            for ref, went_in in manifest.get("inputs", {}).items()
        ]
    return list(found.values())


def training(policy: Path) -> Training:
    """What the policy's own stage logged; no rows where it logged nothing."""
    manifest = _manifest(policy)
    return Training(
        manifest.get("kind", ""),
        read_metrics(policy / METRICS),
        manifest.get("metrics", {}).get("chosen_step"),
    )


def _manifest(stage: Path) -> dict[str, Any]:
    path = stage / MANIFEST
    manifest: dict[str, Any] = read_json(path) if path.exists() else {}
    return manifest
