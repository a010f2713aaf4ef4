"""The page on annotators: whether their answers can be trusted, who stands out, and their own words."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.release import page
from preference_data.preferences import quality as limits
from preference_data.preferences.agreement import SECONDS_EDGES
from preference_data.preferences.quality import Quality
from preference_data.prompts.prompts import transcript
from preference_data.schema import AXES, LETTERS, Judgement, Prompt
from preference_data.store import write_text

_EXAMPLES = 12


def examples(
    judgements: Sequence[Judgement], prompts: Mapping[str, Prompt]
) -> list[tuple[Judgement, Prompt]]:
    """A dozen answers that came with a rationale or a correction. All of it is untrusted text.

    Which answers is decided by a hash of their id: neither by chance, nor by what looks good.
    """
    typed = [
        item for item in judgements if any(text and text.strip() for text in (item.rationale, item.corrected))
    ]
    typed.sort(key=lambda item: hashlib.sha256(item.id.encode()).hexdigest())
    return [(item, prompts[item.prompt_id]) for item in typed[:_EXAMPLES]]


def write(
    quality: Quality,
    path: Path,
    *,
    title: str,
    examples: Sequence[tuple[Judgement, Prompt]] = (),
    model: Mapping[str, Any] | None = None,
) -> None:
    """Write the page as one file that works offline.

    Args:
        quality: the measurements.
        path: of the page.
        title: its heading, e.g. whose answers these are.
        examples: answers to show with what annotators typed.
        model: of a model that judged too: its agreement with people and its biases (model.json).
    """
    write_text(
        path,
        page.render(
            "annotators.html",
            title=title,
            quality=quality,
            rows=[("all", quality.overall), *quality.annotators.items()],
            examples=examples,
            transcript=transcript,
            model=model,
            axes=AXES,
            edges=SECONDS_EDGES,
            limits=limits,
            percent=_percent,
            two_digits=_two_digits,
            letters=LETTERS,
        ),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def _two_digits(number: float) -> str:
    return f"{number:z.2f}".replace("-", "−")
