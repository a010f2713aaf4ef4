"""How far each step of a recipe is in a run folder. `align status` and `align run` decide by it alike."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from align.recipe.config.base import result_keys
from align.recipe.recipe import Recipe, Step
from align.run_folder.artifacts import (
    MANIFEST,
    DamagedFile,
    NotThisRun,
    StageFolder,
    damage,
    foreign_digest,
    read_kept,
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


def survey(recipe: Recipe, run: Path, as_they_are: Collection[str] = ()) -> list[Standing]:
    """Where every step stands. A step is done only if everything it reads is done and unchanged.

    What the steps named by `as_they_are` have finished counts as unchanged.
    """
    digests: dict[str, str] = {}
    standings = []
    for step in recipe.steps:
        current = standing(step, run, digests)
        if current.manifest and (current.state in ("done", "damaged") or step.name in as_they_are):
            digests[step.name] = current.manifest["output_digest"]
        standings.append(current)
    return standings


def difference(current: Standing) -> str:
    """How outdated work differs from what the recipe says now: `beta was 0.1, is 0.2`."""
    if current.manifest is None or current.reads is None:
        return "what it reads is to be made again"
    config = current.step.config
    now = _flat(result_keys(config))
    by_default = type(config).model_construct(stage=config.stage).model_dump(mode="json")
    written = current.manifest.get("config") or {}
    try:  # a manifest has all keys; some may be given only beside others
        kept = type(config).model_validate(
            {
                key: value
                for key, value in written.items()
                if key == "stage" or by_default.get(key, ...) != value
            }
        )
    except ValidationError:
        return "its settings are of an earlier version"
    then, defaults = _flat(result_keys(kept)), _flat(by_default)
    words = [
        f"{key} was {then.get(key, defaults.get(key))}, is {now.get(key, defaults.get(key))}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    for kind, digests in current.reads._asdict().items():
        before = current.manifest.get(kind, {})
        words += [f"{name} has changed" for name, digest in digests.items() if before.get(name) != digest]
    return "; ".join(words[:3]) or "the stage now makes something else of the same settings"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as `objective.beta`."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else {f"{prefix}{key}": inner}
    return flat


RECIPE = "recipe.json"
"""In a run folder: which recipe it belongs to."""


class OtherRecipe(NotThisRun):
    """The run folder belongs to another recipe."""


class OtherSettings(NotThisRun):
    """Stages of the run folder were finished with other settings, or from other inputs."""


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
    kept, ours = read_kept(run / RECIPE), recipe_record(recipe, run)
    if kept is None or not isinstance(kept.get("folder"), str):
        return  # it is written anew
    if any(kept.get(key) == ours[key] for key in ("folder", "folder_from_run")):
        return
    if kept.get("name") == recipe.name and not Path(kept["folder"]).exists():
        return  # the recipe was moved, or this is another machine
    raise OtherRecipe(f"{run} holds a run of the recipe {kept['folder']}, not of {ours['folder']}")


def check_finished(standings: Iterable[Standing], run: Path) -> None:
    """Refuse to make again what is finished; what is unfinished already has been begun on purpose.

    Raises:
        OtherSettings: naming each stage and how it differs.
    """
    outdated = [current for current in standings if current.state == "outdated" and current.reads]
    if outdated:
        stages = "\n".join(f"  {current.step.name}: {difference(current)}" for current in outdated)
        raise OtherSettings(f"{run} holds finished work of other settings or inputs:\n{stages}")
