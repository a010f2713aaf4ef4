"""What verbs share: paths as users type them, the options of a recipe, and the command that goes on with it.

What a verb reads has to be there, and what it writes has to be possible: before it does anything else.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer


def fail(message: str, code: int) -> NoReturn:
    """End the command with a message on stderr."""
    print(message, file=sys.stderr, flush=True)
    raise typer.Exit(code)


def path(text: str | Path) -> Path:
    """A name that can be one: not empty, without control characters, not too long.

    An empty one, such as of an unset variable, would be the current folder.
    """
    name = str(text)
    if not name.strip():
        raise typer.BadParameter("is empty; name a path, or leave the option out")
    if re.search(r"[\x00-\x1f\x7f]", name):
        raise typer.BadParameter(f"{name!r} has a control character in it")
    try:
        Path(name).stat()
    except (FileNotFoundError, NotADirectoryError):  # those that read it say what should be there
        if os.path.islink(name):
            raise typer.BadParameter(
                f"{name} is a link to {os.readlink(name)}, which does not exist"
            ) from None
    except OSError as error:
        short = name if len(name) <= 120 else f"{name[:80]}...{name[-20:]}"
        raise typer.BadParameter(f"{short}: {error.strerror}; choose another path") from None
    return Path(name)


def stage_name(text: str) -> str:
    """A stage's name."""
    if not text.strip():
        raise typer.BadParameter("is empty; name a stage, or leave the option out")
    return text


def port_number(text: str | int) -> int:
    """A port, or 0."""
    if not str(text).isdecimal() or int(text) > 65535:
        raise typer.BadParameter(f"{text} is not a port: a whole number from 0 to 65535")
    return int(text)


def policy_name(text: str) -> str:
    """What names a policy: a folder, `models:/NAME@ALIAS`, or `champion`."""
    return text if text.startswith("models:/") else str(path(text))


PolicyEngine = Annotated[
    Literal["transformers", "vllm"] | None,
    typer.Option("--engine", help="vllm by default where it is installed and a GPU is there."),
]
A_POLICY = "Run folder, stage folder, model folder, models:/NAME@ALIAS, or champion."


def usable_engine(wanted: Literal["transformers", "vllm"] | None) -> Literal["transformers", "vllm"]:
    """The engine that serves a policy: the one that is wanted, if it is there, else the best one."""
    import torch

    from align.generation.vllm.server import missing

    problem = missing()
    if wanted == "vllm" and problem:
        raise typer.BadParameter(f"{problem}. Or say --engine transformers")
    return wanted or ("vllm" if torch.cuda.is_available() and problem is None else "transformers")


def registry_uri(named: str) -> str:
    """The MLflow registry of a policy that a command names: beside its run, else that of `runs/`."""
    from align.run_folder.tracking import tracking_uri

    return tracking_uri(Path(named) if Path(named).is_dir() else Path("runs") / "any")


def file_to_read(text: str) -> Path:
    """A file that is there; a pipe will do."""
    file = path(text)
    if not file.exists():
        raise typer.BadParameter(f"{text} does not exist; name a file")
    if file.is_dir():
        raise typer.BadParameter(f"{text} is a folder; name a file")
    return file


def folder_to_read(text: str) -> Path:
    """A folder that is there."""
    folder = path(text)
    if not folder.is_dir():
        raise typer.BadParameter(
            f"{text} {'is a file' if folder.exists() else 'does not exist'}; name a folder"
        )
    return folder


def folder_to_write(text: str | Path) -> Path:
    """A folder that is there or can be made."""
    folder = path(text)
    _check_place(folder, folder, "folder")
    return folder


def file_to_write(text: str) -> Path:
    """A file that can be made or replaced."""
    file = path(text)
    if file.is_dir():
        raise typer.BadParameter(f"{text} is a folder; name a file")
    _check_place(file, file.parent, "file")
    return file


def _check_place(target: Path, folder: Path, kind: str) -> None:
    """Refuse a target whose nearest existing folder is none, or cannot be written to."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise typer.BadParameter(f"{target}: {nearest} is not a folder; choose another {kind}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"{target}: {nearest} cannot be written to; choose another {kind}")


RecipeFolder = Annotated[
    Path, typer.Argument(metavar="RECIPE", parser=path, help="Folder of N_name.yaml files.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="S.key=value", help="Override a key of stage S; '*' is every stage."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", parser=folder_to_write, help="Run folder; runs/<recipe> by default."
    ),
]


def run_command(
    recipe: Path, overrides: list[str] | None, out: Path | None, *more: str, verb: str = "run"
) -> str:
    """The command that goes on with the same run, for a shell; `more` are further words."""
    words = ["align", *verb.split(), str(recipe)]
    for override in overrides or []:
        words += ["--set", override]
    return shlex.join([*words, *more, *(["--out", str(out)] if out else [])])
