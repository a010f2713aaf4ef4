"""The verb `align doctor`: one finding per thing that the pipeline needs, with how to mend it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import typer

_INSTALL = "pip install -c constraints.txt -e ."
_PACKAGES = ("torch", "transformers", "trl", "soundfile", "soxr", "ray", "mlflow")


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
    from ui_annotation.environment import ARGILLA

    yield Finding("ok", "Python", platform.python_version())
    for name in _PACKAGES:
        yield _package(name)
    yield _accelerator()
    yield _deepspeed()
    yield _espeak()
    yield from _disk_and_memory(folder)
    if ARGILLA.is_ready:
        yield Finding("ok", "annotation", f"Argilla in {ARGILLA.location}")
    else:
        yield Finding("warn", "annotation", "Argilla is not installed", "align annotate install")
    yield _vllm()
    browsers = map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))
    if browser := next(filter(None, browsers), None):
        yield Finding("ok", "browser", browser)
    else:
        state = "no Chromium; only tests of the pages need it"
        yield Finding("warn", "browser", state, "apt-get install chromium")


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
        state = "none visible to this CUDA build of torch"
        return Finding("warn", "GPU", state, "check nvidia-smi and the driver")
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


def _vllm() -> Finding:
    """The engine of stages that say `engine: vllm`."""
    try:
        from align.generation.vllm.server import environment, missing
    except (ImportError, OSError):
        return Finding("warn", "vLLM", "unknown without torch")
    if problem := missing():
        state, _, mend = problem.partition(". Run: ")
        return Finding("warn", "vLLM", f"{state}; only stages with engine: vllm need it", mend)
    return Finding("ok", "vLLM", str(environment().location))


def _espeak() -> Finding:
    try:
        library = Path(importlib.import_module("espeakng_loader").get_library_path())
        library.stat()
    except (ImportError, OSError) as error:
        return Finding("fail", "espeak-ng", str(error), "pip install --force-reinstall espeakng-loader")
    return Finding("ok", "espeak-ng", metadata.version("espeakng_loader"))


def _disk_and_memory(folder: Path) -> Iterator[Finding]:
    import psutil

    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    state = f"{free:.1f} GB free at {folder}"
    if free < 5:
        status: Literal["warn", "fail"] = "fail" if free < 1 else "warn"
        yield Finding(status, "disk", state, "free some, or put runs elsewhere with --out")
    else:
        yield Finding("ok", "disk", state)
    memory = psutil.virtual_memory().available / 2**30
    mend = "recipes/demo needs about 2 GB" if memory < 2 else ""
    yield Finding("warn" if mend else "ok", "memory", f"{memory:.1f} GB free", mend)
