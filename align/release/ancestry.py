"""Where a policy comes from, by the manifests of run folders: its ancestors and its gate's verdict.

Everything is read as far as it is there; `complete_ancestry` is for those who need all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from align.run_folder.artifacts import MANIFEST, read_json

VERDICT = "verdict.json"
_DATA = ("corpus", "annotations", "pairs")
"""Outputs of stages that are data rather than a model or numbers."""


class Gate(NamedTuple):
    """A gate's verdict on a policy. `is_current`: it judged the evaluation that was asked about."""

    stage: str
    verdict: str
    reasons: list[str]
    checks: list[dict[str, Any]]
    is_current: bool


class Ancestor(NamedTuple):
    """A stage, or a model from elsewhere, that went into a policy.

    `name` is its descendant's reference to it, `digests` are those of its content when it was used (several,
    if it was run again between two uses), and `manifest` is the one in its folder now: empty for a model from
    elsewhere, and for a stage whose folder is gone.
    """

    name: str
    folder: Path
    digests: tuple[str, ...]
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        """The digest of its content when it was used; for the policy itself, of its content now."""
        return ",".join(self.digests) or self.manifest.get("output_digest", "")

    @property
    def is_changed(self) -> bool:
        """Whether its folder holds something else now than when it was used."""
        return bool(self.manifest) and bool({*self.digests} - {self.manifest.get("output_digest")})

    @property
    def is_from_elsewhere(self) -> bool:
        """Whether it is a Hub id or a folder without a manifest: its own ancestors are not on disk."""
        return "/" in self.name and not self.manifest


class Ancestry(NamedTuple):
    """A policy and everything behind it, each folder once, the nearest first."""

    ancestors: tuple[Ancestor, ...]

    @property
    def unknown(self) -> list[str]:
        """Models whose making is not on disk."""
        return sorted(ancestor.name for ancestor in self.ancestors if ancestor.is_from_elsewhere)

    @property
    def missing(self) -> list[str]:
        """Stages that a manifest names and whose folders are gone."""
        return [
            ancestor.name for ancestor in self.ancestors if "/" not in ancestor.name and not ancestor.manifest
        ]

    def corpora(self) -> dict[str, Ancestor]:
        """The corpora by name; those of another run by that run's name, too."""
        return dict(self._that_produce("corpus"))

    def datasets(self) -> dict[str, str]:
        """Digest of every dataset behind the policy as it was used, by name; of several uses, all."""
        rows = sorted(self._that_produce(*_DATA))
        return {name: ",".join(sorted(data.digests)) for name, data in rows if data.digests}

    def changed_corpora(self) -> list[str]:
        """Names of corpora that hold something else now than what was used."""
        return [name for name, corpus in self.corpora().items() if corpus.is_changed]

    def _that_produce(self, *kinds: str) -> Iterator[tuple[str, Ancestor]]:
        run = self.ancestors[0].folder.parent
        for ancestor in self.ancestors:
            folder = ancestor.folder
            if ancestor.manifest.get("produces") in kinds:
                yield folder.name if folder.parent == run else f"{folder.parent.name}/{folder.name}", ancestor


def ancestry(policy: Path) -> Ancestry:
    """Follow the inputs of a stage, and theirs, also into other run folders."""
    ancestors: dict[Path, Ancestor] = {}
    waiting = [(policy.name if (policy / MANIFEST).exists() else str(policy), policy.resolve(), "")]
    while waiting:
        name, folder, digest = waiting.pop(0)
        if folder not in ancestors:
            manifest = manifest_of(folder)
            ancestors[folder] = Ancestor(name, folder, (), manifest)
            inputs = manifest.get("inputs", {}).items()
            waiting += [(ref, resolve(folder.parent, ref).resolve(), used) for ref, used in inputs]
        uses = ancestors[folder].digests
        if digest and digest not in uses:
            ancestors[folder] = ancestors[folder]._replace(digests=(*uses, digest))
    return Ancestry(tuple(ancestors.values()))


def complete_ancestry(policy: Path) -> Ancestry:
    """The same where all of it must be known: a decision rests on it.

    Raises:
        FileNotFoundError: a stage that a manifest names is gone.
    """
    history = ancestry(policy)
    if history.missing:
        raise FileNotFoundError(
            f"{policy} was made from {', '.join(history.missing)}, which is not there any more: run the "
            "recipe again from there"
        )
    return history


def resolve(run: Path, ref: str) -> Path:
    """The folder behind a reference: with a slash a path (or a Hub id), else a stage of the run."""
    return Path(ref).expanduser() if "/" in ref else run / ref


def manifest_of(stage: Path) -> dict[str, Any]:
    """A finished stage's manifest; empty where there is none."""
    path = stage / MANIFEST
    manifest: dict[str, Any] = read_json(path) if path.exists() else {}
    return manifest


def newest_first(run: Path, file: str) -> list[Path]:
    """The finished stages of a run that hold a file, the last stage first."""
    folders = [path.parent for path in run.glob(f"[!.]*/{file}")]
    return sorted(folders, key=lambda folder: stage_order(folder.name), reverse=True)


def stage_order(name: str) -> tuple[int, str]:
    """Sorts stage names by their leading number: 2_sft before 10_promote."""
    number = name.partition("_")[0]
    return (int(number) if number.isdecimal() else 10**9, name)


def gate(policy: Path, evaluation: Path) -> Gate | None:
    """The verdict on a policy by the last gate of its run that judged it, if any did.

    Args:
        policy: the policy's folder.
        evaluation: the evaluate stage whose numbers stand beside the verdict.
    """
    for folder in newest_first(policy.parent, VERDICT):
        verdict = read_json(folder / VERDICT)
        if verdict.get("candidate") != policy.name:
            continue
        judged = manifest_of(folder).get("inputs", {}).get(evaluation.name)
        return Gate(
            stage=folder.name,
            verdict=str(verdict.get("verdict", "unknown")),
            reasons=list(verdict.get("reasons", [])),
            checks=list(verdict.get("checks", [])),
            is_current=judged == manifest_of(evaluation).get("output_digest"),
        )
    return None
