"""An annotation project: what is to be judged, and the Argilla datasets that hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from preference_data.schema import Comparison, Prompt


class Dataset(NamedTuple):
    """Comparisons that equally many annotators judge: Argilla sets that per dataset, not per record."""

    name: str
    judgements_each: int
    comparisons: list[Comparison]


class Project(NamedTuple):
    """Comparisons for annotators, with all that is needed to show them.

    Record ids are made of a prompt and two answers. So another draw for the same project, with more retests
    say, finds again what is judged already.
    """

    name: str
    """The names of its datasets start with it."""
    workspace: str
    """Its members annotate."""
    comparisons: Sequence[Comparison]
    """See `assignment.draw`."""
    prompts: Mapping[str, Prompt]
    """By id, at least those of the comparisons."""
    corpus: Path
    """Folder that the prompts' audio paths are relative to."""
    annotators: int
    """How many judge what everyone judges."""

    def datasets(self) -> tuple[Dataset, Dataset]:
        """What everyone judges, and what a single annotator does; another draw may move a comparison."""
        everyone = [item for item in self.comparisons if item.everyone]
        one_each = [item for item in self.comparisons if not item.everyone]
        return (
            Dataset(f"{self.name}-everyone", self.annotators, everyone),
            Dataset(f"{self.name}-one-each", 1, one_each),
        )
