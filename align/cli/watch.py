"""The verb `align watch`: a run in the browser while it runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from align.cli.options import folder_to_read, port_number

_NICENESS = 10
"""Drawing curves must not take time from the run that they are of."""


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=folder_to_read, help="Run folder.")],
    port: Annotated[int, typer.Option("--port", parser=port_number, help="0 takes a free one.")] = 0,
) -> None:
    """Show a run on a page that refreshes itself, and its report at the end; until Ctrl-C.

    Stages, progress, curves, alarms, the last samples with their clips, GPU memory. Only browsers of this
    machine reach it, and nothing in the run is changed. MLflow keeps the record.

    Example: align watch runs/demo
    """
    from align.release.watch_page import NotARun, WatchPage
    from align.release.watch_server import CannotWatch, serve

    os.nice(_NICENESS)
    try:
        serve(WatchPage(run), port, lambda url: print(f"{run}: {url}  (Ctrl-C ends)", flush=True))
    except (NotARun, CannotWatch) as error:
        print(error, file=sys.stderr, flush=True)
        raise typer.Exit(2 if isinstance(error, NotARun) else 1) from None
