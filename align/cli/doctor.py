"""The verb `align doctor`: one finding per thing that the pipeline needs, with how to mend it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import typer

_ROOM_GB = {"fail": 1, "warn": 5}
_INSTALL = "pip install -c constraints.txt -e ."
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Finding(NamedTuple):
    """A thing that was looked at, and its state in words. `mend` says what to do; empty if nothing is."""

    status: Literal["ok", "warn", "fail"]
    thing: str
    state: str
    mend: str = ""


def doctor() -> None:
    """Look at everything the pipeline needs on this machine, and say how to mend what is missing.

    Example: align doctor
    """
    failed = False
    for finding in examine(Path("runs")):
        mend = f"  -> {finding.mend}" if finding.mend else ""
        print(f"{finding.status:<5} {finding.thing:<13} {finding.state}{mend}", flush=True)
        failed |= finding.status == "fail"
    raise typer.Exit(1 if failed else 0)


def examine(folder: Path) -> Iterator[Finding]:
    """Look at everything; `folder` is where runs will be written."""
    checks: list[Callable[[], Finding]] = [
        *(lambda name=name: _package(name) for name in ("torch", "transformers", "trl", "soundfile", "soxr")),
        _accelerator,
        _deepspeed,
        lambda: _package("ray"),
        _espeak,
        lambda: _disk(folder),
        _memory,
        lambda: _package("mlflow"),
        _annotation,
        _browser,
    ]
    yield Finding("ok", "Python", platform.python_version())
    for check in checks:
        yield check()


def _package(name: str) -> Finding:
    try:
        importlib.import_module(name)
    except (ImportError, OSError) as error:
        return Finding("fail", name, str(error).partition("\n")[0], _INSTALL)
    return Finding("ok", name, metadata.version(name))


def _accelerator() -> Finding:
    try:
        import torch
    except (ImportError, OSError):
        return Finding("warn", "GPU", "unknown without torch")
    if torch.cuda.is_available():
        n = torch.cuda.device_count()
        free, total = map(min, zip(*(torch.cuda.mem_get_info(i) for i in range(n)), strict=True))
        names = " and ".join(sorted({torch.cuda.get_device_name(i) for i in range(n)}))
        memory = f"at least {free / 1e9:.0f} of {total / 1e9:.0f} GB free on each"
        return Finding("ok", "GPU", f"{n} x {names}, {memory}, CUDA {torch.version.cuda}")
    if torch.version.cuda:
        return Finding(
            "warn", "GPU", "none visible to this CUDA build of torch", "check nvidia-smi and the driver"
        )
    return Finding("warn", "GPU", f"none; {os.cpu_count()} CPU cores do for recipes/demo, not for 7B models")


def _deepspeed() -> Finding:
    """DeepSpeed compiles what it needs when it is first used; importing it here would take seconds."""
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return Finding("warn", "DeepSpeed", "not installed; strategy: ddp works without it", _INSTALL)
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        state = f"{version}, but no {' and no '.join(missing)} to compile with; zero2 and zero3 would fail"
        return Finding("warn", "DeepSpeed", state, "apt-get install g++ ninja-build")
    return Finding("ok", "DeepSpeed", f"{version}, compiles with g++ and ninja on first use")


def _espeak() -> Finding:
    try:
        loader = importlib.import_module("espeakng_loader")
        library = loader.get_library_path()
    except (ImportError, OSError) as error:
        return Finding("fail", "espeak-ng", str(error), "pip install espeakng-loader")
    if not Path(library).exists():
        return Finding(
            "fail", "espeak-ng", f"{library} is missing", "pip install --force-reinstall espeakng-loader"
        )
    return Finding("ok", "espeak-ng", metadata.version("espeakng_loader"))


def _disk(folder: Path) -> Finding:
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    status: Literal["ok", "warn", "fail"] = (
        "fail" if free < _ROOM_GB["fail"] else "warn" if free < _ROOM_GB["warn"] else "ok"
    )
    mend = "" if status == "ok" else "free some, or put runs elsewhere with --out"
    return Finding(status, "disk", f"{free:.1f} GB free at {folder}", mend)


def _memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available / 2**30
    if free < 2:
        return Finding("warn", "memory", f"{free:.1f} GB free", "recipes/demo needs about 2 GB")
    return Finding("ok", "memory", f"{free:.1f} GB free")


def _annotation() -> Finding:
    from ui_annotation import environment

    if environment.is_ready():
        return Finding("ok", "annotation", f"Argilla in {environment.location()}")
    return Finding("warn", "annotation", "Argilla is not installed", "align annotate install")


def _browser() -> Finding:
    browser = next((path for path in map(shutil.which, _BROWSERS) if path), None)
    if browser:
        return Finding("ok", "browser", browser)
    return Finding(
        "warn", "browser", "no Chromium; only tests of the pages need it", "apt-get install chromium"
    )
