"""The policy behind a run folder, a stage folder, a model's folder or a registry name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio import portable
from align.release.ancestry import VERDICT, newest_first, resolve, stage_order
from align.release.registry import Registry, models_with, without_password
from align.run_folder.artifacts import MANIFEST, read_json, read_manifest

CHAMPION = "champion"
"""The alias of the version in use, and the name of its policy where a single model has one."""
_REGISTERED = re.compile(r"models:/(?P<name>.+)@(?P<alias>[^@/]+)")


class NoPolicy(ValueError):
    """There is no policy where one was named; the message says what is there."""


class PolicyFiles(NamedTuple):
    """A policy: its saved model, adapters to merge into it in this order, and where it comes from.

    `stage` is its stage folder, None for a model from elsewhere; `tags` are its registered version's.
    """

    name: str
    model: Path | str
    adapters: tuple[Path, ...]
    stage: Path | None
    tags: dict[str, str]


def find(named: str, tracking_uri: str, scratch: Path) -> PolicyFiles:
    """The policy behind a name.

    Args:
        named: a stage folder, a run folder (what it promoted, else its gate's candidate, else its last
            policy), the folder of a saved model, `models:/NAME@ALIAS`, or `champion`, if a single model has
            one.
        tracking_uri: the registry, for the last.
        scratch: where a registered model's files go.

    Raises:
        NoPolicy: there is none.
        LookupError: nobody holds the alias.
        RegistryDown: MLflow does not answer.
    """
    if named == CHAMPION and not Path(named).exists():
        named = _the_champion(tracking_uri)
    registered = _REGISTERED.fullmatch(named)
    if registered:
        files, tags = Registry(tracking_uri, registered["name"]).fetch(registered["alias"], scratch)
        return PolicyFiles(named, files, (), None, tags)
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise NoPolicy(f"{named}: there is no such folder; name a run, a stage, or models:/NAME@champion")
    if (folder / "config.json").exists():
        return PolicyFiles(folder.name, folder, (), None, {})
    stage = folder if (folder / MANIFEST).exists() else _stage_of_run(folder)
    model, adapters = _weights(stage)
    return PolicyFiles(f"{stage.resolve().parent.name}/{stage.name}", model, adapters, stage, {})


def saved_model(policy: PolicyFiles, scratch: Path) -> Path | str:
    """A saved model that engines load: the policy's own, or, adapters merged, one below `scratch`."""
    if not policy.adapters:
        return policy.model
    folder = scratch / "merged"
    folder.mkdir()
    model = portable.merged(policy.model, policy.adapters)
    portable.write(model, qwen2_audio.load_processor(policy.model), folder)
    return folder


def _the_champion(tracking_uri: str) -> str:
    """The only model of the registry that has a champion."""
    names = models_with(CHAMPION, tracking_uri)
    if len(names) != 1:
        known = ", ".join(f"models:/{name}@{CHAMPION}" for name in names) or "align promote RUN makes one"
        raise NoPolicy(f"{len(names)} models at {without_password(tracking_uri)} have a {CHAMPION}; {known}")
    return f"models:/{names[0]}@{CHAMPION}"


def _stage_of_run(run: Path) -> Path:
    """The stage whose policy a run is about: promoted, else judged by the gate, else the last one."""
    named = [read_manifest(stage)["config"]["policy"] for stage in newest_first(run, "promotion.json")]
    named += [read_json(stage / VERDICT)["candidate"] for stage in newest_first(run, VERDICT)]
    for name in named:
        if (run / name / MANIFEST).exists():
            return run / name
    folders = [path.parent for kind in ("model", "adapter") for path in run.glob(f"[!.]*/{kind}/")]
    finished = [folder for folder in folders if (folder / MANIFEST).exists()]
    if not finished:
        raise NoPolicy(f"{run} holds no finished policy; first: align run RECIPE --out {run}")
    return max(finished, key=lambda folder: stage_order(folder.name))


def _weights(stage: Path) -> tuple[Path | str, tuple[Path, ...]]:
    """A stage's whole model, or the one it started from and the adapters trained on it."""
    if (stage / "model").is_dir():
        return stage / "model", ()
    if not (stage / "adapter").is_dir():
        raise NoPolicy(f"{stage} holds no policy: neither model/ nor adapter/")
    base = str(read_manifest(stage)["config"]["policy"])
    folder = resolve(stage.parent, base)
    if (folder / MANIFEST).exists():
        model, adapters = _weights(folder)
        return model, (*adapters, stage / "adapter")
    return (folder if folder.is_dir() else base), (stage / "adapter",)
