"""The page on rules: what each of them left out, and what an annotator's vote weighs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from align.release import page
from align.run_folder.artifacts import write_json
from preference_data.preferences.rules import CountedJudgements, Removal
from preference_data.schema import AXES
from preference_data.store import write_text


def write(removals: Sequence[Removal], counted: CountedJudgements, path: Path, *, title: str) -> None:
    """Write `<path>.json` and the page `<path>.html`, which works offline.

    Args:
        removals: what each rule left out, in the order of the rules.
        counted: the judgements that count, and how much.
        path: without ending.
        title: what was made of the judgements.
    """
    weights = {
        name: {axis: counted.weights[axis].get(name) for axis in AXES}
        for name in sorted({name for axis in AXES for name in counted.weights[axis]})
    }
    rows = [removal._asdict() for removal in removals]
    write_json(
        path.with_name(f"{path.name}.json"),
        {"counted": counted.tally.counted, "rules": rows, "weights": weights},
    )
    write_text(
        path.with_name(f"{path.name}.html"),
        page.render(
            "rules.html",
            title=title,
            tables=[(of, rows) for of, rows in _tables(removals) if rows[0].total],
            counted=counted,
            weights=weights,
            axes=AXES,
        ),
    )


def _tables(removals: Sequence[Removal]) -> list[tuple[str, list[Removal]]]:
    """Rules on the same things, and what these are."""
    return [(of, list(rows)) for of, rows in groupby(removals, key=lambda removal: removal.of)]
