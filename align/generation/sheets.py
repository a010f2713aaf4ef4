"""Sheets of questions, each about clips below one folder, answered by one policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from align.generation.generate import Decoding, Request, Sampler, complete_all, flatten
from align.models.features import ClipFeatures
from align.run_folder.progress import Progress


class Sheet(NamedTuple):
    """Requests whose clips `features` knows. Several sheets may share them."""

    name: str
    features: ClipFeatures
    requests: list[Request]


def answer(
    policy: Path | str, sheets: Sequence[Sheet], how: Decoding, *, seed: int, batch_size: int, label: str
) -> dict[str, list[str]]:
    """One text per request, by the sheet's name; the policy is loaded once.

    `seed` decides what is drawn, were it not greedy; `label` stands before the progress.
    """
    model = None
    texts: dict[str, list[str]] = {}
    with Progress(label, sum(len(sheet.requests) for sheet in sheets)) as progress:
        done = 0
        for sheet in sheets:
            sampler = Sampler(policy, sheet.features.root, model=model, features=sheet.features)
            model = sampler.model

            def told(n: int, before: int = done) -> None:
                progress.update(before + n)

            answered = complete_all(
                sampler, sheet.requests, how, seed=seed, batch_size=batch_size, on_progress=told
            )
            texts[sheet.name] = flatten(answered)
            done += len(sheet.requests)
    return texts
