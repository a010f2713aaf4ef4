"""An annotation project: what is to be judged, and the Argilla datasets that hold it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from preference_data.schema import Comparison, Judgement, Prompt


class Dataset(NamedTuple):
    """Records with one form that equally many annotators judge: Argilla sets both per dataset."""

    name: str
    size: int
    """Completions in a comparison."""
    judgements_each: int
    comparisons: list[Comparison]


class Project(NamedTuple):
    """Comparisons for annotators, with all that is needed to show them.

    Record ids are made of a prompt and its completions. So another draw for the same project, with more
    retests say, finds again what is judged already.
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
    earlier: Sequence[Judgement] = ()
    """Judgements that are there already: what has all of its own is not asked again."""
    left_to_model: Container[str] = frozenset()
    """Ids of comparisons that no annotator gets."""

    def open(self) -> list[Comparison]:
        """Comparisons that want more judgements than there were earlier."""
        n = Counter(item.comparison for item in {item.id: item for item in self.earlier}.values())
        return [item for item in self.comparisons if n[item.id] < self.judgements_each(item)]

    def judgements_each(self, comparison: Comparison) -> int:
        """How many judgements of annotators a comparison wants."""
        if comparison.id in self.left_to_model:
            return 0
        return self.annotators if comparison.everyone else 1

    def owns(self, dataset: str) -> bool:
        """Whether a dataset of this name is of this project, of this draw or an earlier one."""
        return re.fullmatch(rf"{re.escape(self.name)}-\d+-\d+", dataset) is not None

    def datasets(self) -> list[Dataset]:
        """What annotators get: comparisons that are open, by size and by how many judge them.

        Every dataset holds retests and gold at the same rates, so that its name tells nothing. Another draw
        may move a comparison.
        """
        forms: dict[tuple[int, int], list[Comparison]] = defaultdict(list)
        for item in self.open():
            forms[len(item.texts), self.judgements_each(item)].append(item)
        return [
            Dataset(f"{self.name}-{size}-{each}", size, each, comparisons)
            for (size, each), comparisons in sorted(forms.items())
        ]
