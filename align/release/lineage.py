"""What a finished stage was made from, by the manifests of the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from align.run_folder.artifacts import MANIFEST, read_manifest

_DATASETS = ("corpus", "annotate", "pairs")
"""Kinds of stages that leave data rather than a model or numbers."""


class Lineage(NamedTuple):
    """Everything behind a stage, by folder, the stage itself first.

    `manifests` are those in the folders now; `used` are the digests of what was read when it was read.
    `unknown` are models whose making is not on disk: Hub ids, and folders without a manifest.
    """

    manifests: dict[Path, dict[str, Any]]
    used: dict[Path, set[str]]
    unknown: tuple[str, ...]

    def of_kind(self, *kinds: str) -> dict[str, Path]:
        """The folders of these kinds by name; of another run's by that run's name, too."""
        run = next(iter(self.manifests)).parent
        return {
            folder.name if folder.parent == run else f"{folder.parent.name}/{folder.name}": folder
            for folder, manifest in self.manifests.items()
            if manifest["kind"] in kinds
        }

    def datasets(self) -> dict[str, str]:
        """Digest of every dataset behind the stage as it was used, by name; of several uses, all."""
        found = sorted(self.of_kind(*_DATASETS).items())
        return {name: ",".join(sorted(self.used[folder])) for name, folder in found if folder in self.used}

    def changed(self, *kinds: str) -> list[str]:
        """Names of the folders of these kinds that hold something else now than what was used."""
        return [
            name
            for name, folder in self.of_kind(*kinds).items()
            if self.used.get(folder, set()) - {self.manifests[folder]["output_digest"]}
        ]


def lineage(stage: Path) -> Lineage:
    """Follow a stage's inputs, and theirs, also into other run folders.

    Raises:
        FileNotFoundError: a stage of the run that the manifests name is not there any more.
    """
    manifests: dict[Path, dict[str, Any]] = {}
    used: dict[Path, set[str]] = {}
    unknown: set[str] = set()
    waiting = [stage.resolve()]
    while waiting:
        folder = waiting.pop(0)
        if folder in manifests:
            continue
        manifests[folder] = read_manifest(folder)
        for ref, digest in manifests[folder]["inputs"].items():
            # A reference with a slash is a path or a Hub id, else a stage of the same run (align/recipe.py).
            other = (Path(ref).expanduser() if "/" in ref else folder.parent / ref).resolve()
            if "/" in ref and not (other / MANIFEST).exists():
                unknown.add(ref)
            else:
                used.setdefault(other, set()).add(digest)
                waiting.append(other)
    return Lineage(manifests, used, tuple(sorted(unknown)))
