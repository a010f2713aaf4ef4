"""How far each step of a recipe is in a run folder. `align status` and `align run` decide by it alike."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.recipe.config.base import result_keys
from align.recipe.recipe import Recipe, Step
from align.run_folder.artifacts import (
    MANIFEST,
    DamagedFile,
    NotThisRun,
    StageFolder,
    damage,
    foreign_digest,
    read_json,
    read_manifest,
    sha256_json,
)

State = Literal["done", "damaged", "outdated", "partial", "pending"]


class Reads(NamedTuple):
    """Digests of everything a step reads.

    `inputs`: stages of the run, and policies, pairs and corpora from elsewhere, which may have a manifest;
    `data`: folders and files that no stage wrote.
    """

    inputs: dict[str, str]
    data: dict[str, str]


class Standing(NamedTuple):
    """How far one step is. `folder` and `reads` are None while what the step needs is not finished.

    `manifest` is that of its finished folder, outdated or not; `misfit` is unfinished work of other settings
    or inputs, which a run sets aside.
    """

    step: Step
    state: State
    manifest: dict[str, Any] | None
    folder: StageFolder | None = None
    reads: Reads | None = None
    misfit: Path | None = None
    damage: str | None = None
    """What is wrong with the finished folder."""


def reads(step: Step, digests: dict[str, str]) -> Reads:
    """What a step reads, given the digests of the recipe's finished steps."""
    stages = {name: digests[name] for name in step.needs}
    foreign = {ref: foreign_digest(ref) for ref in step.foreign}
    return Reads(inputs=stages | foreign, data={path: foreign_digest(path) for path in step.folders})


def fingerprint(step: Step, read: Reads) -> str:
    """What decides whether work still belongs to a step: the keys that change its result, and what it read.

    The version of this package is not part of it: a stage whose code makes something else of the same keys
    raises its `epoch`.
    """
    config = {**result_keys(step.config), "epoch": step.config.epoch}
    return sha256_json({"config": config, **read._asdict()})


def standing(step: Step, run: Path, digests: dict[str, str]) -> Standing:
    """How far a step is, given the digests of what earlier steps left."""
    final, partial = run / step.name, run / f".partial-{step.name}"
    try:
        manifest = read_manifest(final) if (final / MANIFEST).exists() else None
    except DamagedFile as error:
        return Standing(step, "damaged", None, damage=str(error))
    state: State = "outdated" if manifest else "pending"
    if not all(name in digests for name in step.needs):
        return Standing(step, state, manifest)
    read = reads(step, digests)
    folder = StageFolder(run, step.name, fingerprint(step, read))
    misfit = partial if partial.exists() and not folder.is_resumable() else None
    wrong = None
    if manifest and manifest.get("fingerprint") == folder.fingerprint:
        state = "done"
        if files := damage(final, manifest):
            advice = f"restore it from a copy, or move {final} elsewhere to make it again"
            state, wrong = "damaged", f"{final}: {'; '.join(files[:3])}; {advice}"
    elif folder.is_resumable():
        state = "partial"
    return Standing(step, state, manifest, folder, read, misfit, wrong)


def survey(recipe: Recipe, run: Path) -> list[Standing]:
    """Where every step stands. A step is done only if everything it reads is done and unchanged."""
    digests: dict[str, str] = {}
    standings = []
    for step in recipe.steps:
        current = standing(step, run, digests)
        if current.state in ("done", "damaged") and current.manifest:
            digests[step.name] = current.manifest["output_digest"]
        standings.append(current)
    return standings


RECIPE = "recipe.json"
"""In a run folder: which recipe it belongs to."""


class OtherRecipe(NotThisRun):
    """The run folder belongs to another recipe."""


def recipe_record(recipe: Recipe, run: Path) -> dict[str, str]:
    """Name and place of a recipe; the place also relative to the run folder, in case both are moved."""
    folder = recipe.folder.resolve()
    return {
        "name": recipe.name,
        "folder": str(folder),
        "folder_from_run": os.path.relpath(folder, run.resolve()),
    }


def check_recipe(recipe: Recipe, run: Path) -> None:
    """Refuse a run folder that another recipe has filled.

    Raises:
        OtherRecipe: naming both recipes and what can be done.
    """
    try:
        kept = read_json(run / RECIPE) if (run / RECIPE).exists() else None
    except DamagedFile:
        kept = None  # it is written anew
    ours = recipe_record(recipe, run)
    if not isinstance(kept, dict) or any(kept.get(key) == ours[key] for key in ("folder", "folder_from_run")):
        return
    if kept.get("name") == recipe.name and not Path(str(kept.get("folder"))).exists():
        return  # the recipe was moved, or this is another machine
    raise OtherRecipe(
        f"{run} holds a run of the recipe {kept.get('folder')}, not of {ours['folder']}. Give this recipe a "
        "folder of its own with --out, or add --replace: stages that do not fit are then kept as "
        ".stale-<stage>-N beside the new ones"
    )
