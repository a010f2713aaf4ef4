"""Which policy is meant by a run folder, a stage folder, a model's folder or a registry name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from align.release.evaluations import stage_order
from align.release.provenance import VERDICT
from align.release.registry import Registry
from align.run_folder.artifacts import MANIFEST, read_json, read_manifest

_REGISTERED = re.compile(r"models:/(?P<name>.+)@(?P<alias>[^@/]+)")


class NoPolicy(ValueError):
    """There is no policy where one was named; the message says what is there."""


class Source(NamedTuple):
    """A policy: its saved model, adapters to merge into it in this order, and where it comes from.

    `stage` is its stage folder, None for a model from elsewhere; `tags` are its registered version's.
    """

    name: str
    model: Path | str
    adapters: tuple[Path, ...]
    stage: Path | None
    tags: dict[str, str]


def find(named: str, tracking_uri: str, scratch: Path) -> Source:
    """The policy meant by `named`.

    Args:
        named: a stage folder, a run folder (what it promoted, else its gate's candidate, else its last
            policy), the folder of a saved model, or `models:/NAME@ALIAS`.
        tracking_uri: the registry, for the last.
        scratch: where a registered model's files go.

    Raises:
        NoPolicy: there is none.
        RegistryDown: MLflow does not answer.
    """
    registered = _REGISTERED.fullmatch(named)
    if registered:
        files, tags = Registry(tracking_uri, registered["name"]).fetch(registered["alias"], scratch)
        return Source(named, files, (), None, tags)
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise NoPolicy(f"{named}: there is no such folder; name a run, a stage, or models:/NAME@champion")
    if (folder / "config.json").exists():
        return Source(folder.name, folder, (), None, {})
    stage = folder if (folder / MANIFEST).exists() else _of_run(folder)
    model, adapters = _weights(stage)
    return Source(f"{stage.resolve().parent.name}/{stage.name}", model, adapters, stage, {})


def _of_run(run: Path) -> Path:
    """The stage whose policy a run is about."""
    for file, key in (("promotion.json", "config"), (VERDICT, "candidate")):
        for path in sorted(run.glob(f"[!.]*/{file}"), key=_by_stage, reverse=True):
            told = read_manifest(path.parent)["config"]["policy"] if key == "config" else read_json(path)[key]
            if (run / told / MANIFEST).exists():
                return run / told
    stages = [path for kind in ("model", "adapter") for path in run.glob(f"[!.]*/{kind}/")]
    finished = sorted((path for path in stages if (path.parent / MANIFEST).exists()), key=_by_stage)
    if not finished:
        raise NoPolicy(f"{run} holds no finished policy; first: align run RECIPE --out {run}")
    return finished[-1].parent


def _by_stage(path: Path) -> tuple[int, str]:
    return stage_order(path.parent.name)


def _weights(stage: Path) -> tuple[Path | str, tuple[Path, ...]]:
    """A stage's whole model, or the one it started from and the adapters trained on it."""
    if (stage / "model").is_dir():
        return stage / "model", ()
    if not (stage / "adapter").is_dir():
        raise NoPolicy(f"{stage} holds no policy: neither model/ nor adapter/")
    base = str(read_manifest(stage)["config"]["policy"])
    folder = Path(base).expanduser() if "/" in base else stage.parent / base
    if (folder / MANIFEST).exists():
        model, adapters = _weights(folder)
        return model, (*adapters, stage / "adapter")
    return (folder if folder.is_dir() else base), (stage / "adapter",)
