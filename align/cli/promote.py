"""The verb `align promote`: moves an alias of the MLflow registry, or gives it back."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from align.cli.options import fail, path

_CODES = {"fail": 3, "inconclusive": 5}


def promote(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=path, help="Run folder with a finished gate.")],
    to: Annotated[
        str, typer.Option("--to", metavar="ALIAS", help="Alias to move; `candidate` only registers.")
    ] = "champion",
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Give the alias back to the version that held it before.")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Registered model; the run's by default.")
    ] = None,
) -> None:
    """Move the alias to the checkpoint that the run's gate has passed, or take the last move back.

    Refuses when the gate did not pass, and when its evaluation, the weights or the champion have changed
    since. Exit codes: 0 done, 1 something has changed or MLflow is away, 3 the gate refused, 5 inconclusive.

    Example: align promote runs/demo --to champion
    """
    from align.release.registry import NotPromoted, Registry, RegistryDown
    from align.run_folder.artifacts import exclusive, read_json
    from align.run_folder.tracking import tracking_uri
    from align.stages import promote as stage

    gate = _gate(run)
    decision = read_json(gate / "verdict.json")
    name = model or _model_name(run, decision)
    try:
        with exclusive(run):
            if rollback:
                left, back = Registry(tracking_uri(run), name).roll_back(to)
                print(f"{name}: {to} is version {back} again, it was version {left}")
                return
            done = stage.promote(gate, decision["candidate"], model_name=name, alias=to)
    except stage.GateClosed as error:
        fail(str(error), _CODES[error.verdict])
    except (NotPromoted, RegistryDown) as error:
        fail(str(error), 1)
    before = f", it was version {done.previous}" if done.previous not in (None, done.version) else ""
    print(f"{name}: {to} is version {done.version}{before}")
    words = ["align", "promote", str(run), "--to", to, *(["--model", model] if model else []), "--rollback"]
    print(f"Back: {shlex.join(words)}" if before else f"weights {done.tags['weights.sha256'][:16]}")


def _gate(run: Path) -> Path:
    """The run's finished gate."""
    from align.release.ancestry import VERDICT, newest_first

    gates = newest_first(run, VERDICT)
    if not gates:
        fail(f"{run} has no finished gate; first: align run RECIPE --out {shlex.quote(str(run))}", 2)
    if len(gates) > 1:
        names = ", ".join(gate.name for gate in reversed(gates))
        fail(f"{run} has several gates ({names}); a run is promoted by one", 2)
    return gates[0]


def _model_name(run: Path, decision: dict[str, Any]) -> str:
    """The registered model that the gate, or else the run's promotion, names."""
    from align.release.ancestry import newest_first
    from align.run_folder.artifacts import read_manifest

    named = decision.get("registry", {}).get("model_name")
    for stage in () if named else newest_first(run, "promotion.json"):
        named = read_manifest(stage)["config"]["model_name"]
    if named is None:
        fail(f"no registered model is named in {run}; give --model NAME, or model_name in the gate's file", 2)
    return str(named)
