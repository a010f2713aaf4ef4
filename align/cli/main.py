"""The command `align`. Verbs only wire: they parse, call, print, and turn outcomes into exit codes.

What a verb needs is imported when it runs, here and in the other files: `--help` should not wait.

Exit codes: 0 done, 1 failed, 2 bad recipe or usage, 3 gate refused, 4 waiting for people,
5 gate inconclusive, 75 interrupted and resumable.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from align.cli import annotate, cluster, data, export, judge, promote, score
from align.run_folder.quiet import quieten

if TYPE_CHECKING:
    from align.execution.plan import Standing
    from align.recipe.recipe import Recipe, RecipeError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Align audio-language models with human preferences. Start with: align run recipes/demo",
)

app.add_typer(annotate.app, name="annotate")
app.add_typer(cluster.app, name="cluster")
app.add_typer(data.app, name="data")

RecipeFolder = Annotated[Path, typer.Argument(metavar="RECIPE", help="Folder of N_name.yaml files.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="S.key=value", help="Override a key of stage S; '*' is every stage."),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Run folder; runs/<recipe> by default.")
]


@app.command()
def check(
    recipe: RecipeFolder,
    overrides: Overrides = None,
    gpu_gb: Annotated[
        float, typer.Option("--gpu-gb", metavar="GB", help="Memory of a GPU, 10^9 bytes.")
    ] = 80.0,
    out: Out = None,
) -> None:
    """Check a recipe and print its plan, with memory, disk and hours of training. Trains and writes nothing.

    Hours are those of an earlier run in --out where there is one.

    Example: align check recipes/demo --set 6_dpo.beta=0.2
    """
    from align.execution.plan import arithmetic
    from align.planning.budget import lines
    from align.recipe.recipe import load

    loaded = load(recipe, overrides)
    rows = [
        [step.name, step.config.stage, ", ".join([*step.needs, *step.foreign]), arithmetic(step, loaded)]
        for step in loaded.steps
    ]
    _table([["step", "stage", "reads", "work"], *rows])
    run = out or _default_run(loaded)
    budgets = [line for step in loaded.steps for line in lines(step, loaded, run, gpu_gb)]
    if budgets:
        print("\n" + "\n".join(budgets))
    print(f"\n{recipe}: {len(loaded.steps)} stages, no mistakes. Next: align run {recipe}")


@app.command()
def run(
    recipe: RecipeFolder,
    only: Annotated[
        str | None, typer.Option("--only", metavar="S", help="Run just this stage, with inputs as they are.")
    ] = None,
    start_at: Annotated[
        str | None, typer.Option("--from", metavar="S", help="Start here; earlier stages are taken as is.")
    ] = None,
    overrides: Overrides = None,
    out: Out = None,
) -> None:
    """Run a recipe. Finished and unchanged stages are skipped, interrupted ones resume.

    Delete a stage's folder to make it again.

    Example: align run recipes/demo --set '*.seed=1' --out runs/demo-seed-1
    """
    if only and start_at:
        raise typer.BadParameter("give --only or --from, not both")
    from align.recipe.recipe import load

    loaded = load(recipe, overrides)
    folder = out or _default_run(loaded)
    from align.execution.runner import execute  # takes seconds: not before the recipe is known to be one
    from align.run_folder.tracking import Tracker

    tracker = Tracker(folder, loaded.name, _warn)
    print(f"{recipe} -> {folder}", flush=True)
    outcome = execute(loaded, folder, only=only, start_at=start_at, tracker=tracker)
    summary = folder / "summary.json"
    tracker.close(outcome.status, [path for path in (summary, outcome.report) if path])
    _print_outcome(outcome, loaded, folder, _again(recipe, overrides, out), tracker.uri)
    raise typer.Exit(outcome.exit_code)


@app.command()
def status(recipe: RecipeFolder, overrides: Overrides = None, out: Out = None) -> None:
    """Show how far each stage is, and the next command.

    Example: align status recipes/demo
    """
    from align.execution.plan import survey
    from align.recipe.recipe import load
    from align.run_folder.artifacts import holder, read_json

    loaded = load(recipe, overrides)
    folder = out or _default_run(loaded)
    path = folder / "summary.json"
    told = read_json(path)["stages"] if path.exists() else {}
    process = holder(folder)
    standings = survey(loaded, folder)
    rows = [_status_row(standing, told.get(standing.step.name, {}), process) for standing in standings]
    _table(rows)
    command = _again(recipe, overrides, out)
    if process:
        print(f"\nProcess {process} works in {folder}.")
    elif all(standing.state == "done" for standing in standings):
        print(f"\nAll done. Report: {folder / 'report.html'}")
    else:
        print(f"\nNext: {command}")


@app.command()
def compare(
    policies: Annotated[
        list[Path], typer.Argument(metavar="A B ...", help="Stage folders of policies, or run folders.")
    ],
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers.")] = None,
    audio: Annotated[
        Literal["packed", "linked"],
        typer.Option("--audio", help="Clips inside the page (up to 14 MB), or linked beside it."),
    ] = "packed",
    seeds: Annotated[
        bool, typer.Option("--seeds", help="The runs repeat one recipe: one row per run, after minus before.")
    ] = False,
) -> None:
    """Compare policies on the same questions, with 95 % intervals. The first is the baseline.

    Example: align compare runs/demo/2_sft runs/demo/6_dpo --html compare.html
    """
    from align.release import compare_page
    from align.release.comparison import CannotCompare
    from align.release.comparison import compare as compare_policies
    from preference_data.store import BadRecord, write_text

    if seeds:
        _table(_seed_rows(policies))
        return
    try:
        comparison = compare_policies(policies)
    except (CannotCompare, BadRecord, FileNotFoundError) as error:
        _fail(str(error), 2)
    print("\n".join(compare_page.as_table(comparison)))
    if html:
        compare_page.write_html(comparison, html, audio)
        print(f"Page: {html}")
    if as_json:
        write_text(as_json, json.dumps(compare_page.to_json(comparison), indent=2) + "\n")
        print(f"Numbers: {as_json}")


app.command()(judge.judge)
app.command()(score.score)
app.command()(promote.promote)
app.command()(export.export)


@app.command()
def doctor() -> None:
    """Look at everything the pipeline needs on this machine, and say how to mend what is missing.

    Example: align doctor
    """
    from align.cli.doctor import examine

    failed = False
    for finding in examine(Path("runs")):
        mend = f"  -> {finding.mend}" if finding.mend else ""
        print(f"{finding.status:<5} {finding.thing:<13} {finding.found}{mend}", flush=True)
        failed |= finding.status == "fail"
    raise typer.Exit(1 if failed else 0)


def main() -> None:
    """Entry point: quiet libraries, clean messages for the user's mistakes."""
    quieten()
    try:
        app()
    except SystemExit:
        raise
    except KeyboardInterrupt:
        _fail("interrupted", 75)
    except _recipe_error() as error:  # looked up only now that something was raised
        n = len(error.problems)
        _fail(f"{error}\n{n} {'mistake' if n == 1 else 'mistakes'}; nothing was run", 2)
    except _told_errors() as error:
        _fail(str(error), 1)


def _recipe_error() -> type[RecipeError]:
    from align.recipe.recipe import RecipeError

    return RecipeError


def _told_errors() -> tuple[type[Exception], ...]:
    """Whose messages say all that a user needs."""
    from align.run_folder.artifacts import RunIsBusy
    from ui_annotation import AnnotationError

    return RunIsBusy, AnnotationError


# -------------------------------------------------------------------------- printing


def _print_outcome(outcome: Any, recipe: Recipe, folder: Path, command: str, uri: str) -> None:
    """What came out, where it is, and what to do next."""
    summary = outcome.summary
    print()
    for name, found in summary["comparison"].items():
        low, high, n = found["ci_low"], found["ci_high"], found["n"]
        before, after, delta = found["before"], found["after"], found["delta"]
        print(f"{name:<11} {before:.3f} -> {after:.3f}  {delta:+.3f}  95 % [{low:+.3f}, {high:+.3f}]  n={n}")
    if summary["verdict"]:
        print(f"Verdict: {summary['verdict'].upper()}")
        for reason in summary["verdict_reasons"]:
            print(f"  {reason}")
    if outcome.error:
        _warn(f"{outcome.error}\n  traceback: {folder / 'failure.txt'}")
    if outcome.exit_code == 75:
        print("Interrupted; what was saved is kept.")
    if outcome.report:
        print(f"Report: {outcome.report}")
    if outcome.waits_for:
        print(outcome.waits_for)
    if outcome.exit_code in (1, 4, 75):
        print(f"Next: {command}")
        return
    compared = next((s.config for s in reversed(recipe.steps) if s.config.stage == "evaluate"), None)
    if compared and summary["comparison"]:
        before, after = (getattr(compared, side) for side in ("before", "after"))
        print(f"Next: align compare {folder / before} {folder / after} --html compare.html")
    shown = re.sub(r"//[^/@]*@", "//", uri)  # a password in the address stays out of logs
    print(f"      mlflow ui --backend-store-uri {shown}" if uri.startswith("sqlite") else f"      {shown}")


def _status_row(standing: Standing, told: dict[str, Any], process: str | None) -> list[str]:
    """A step's name, its state in words, and what there is to know about it."""
    name, manifest = standing.step.name, standing.manifest
    if standing.state == "done" and manifest:
        return [name, "done", f"{manifest['seconds']:.0f} s"]
    if told.get("status") == "running" and process:
        return [name, "running", ""]
    if told.get("status") == "failed":
        return [name, "failed", str(told.get("error", ""))]
    if told.get("status") == "waiting" and standing.state == "partial":
        return [name, "waiting", f"for annotators: {told['done']} of {told['wanted']} judgements"]
    words = {
        "outdated": ("out of date", "the recipe or its inputs have changed"),
        "partial": ("partial", "resumes where it was"),
        "pending": ("pending", ""),
    }
    return [name, *words.get(standing.state, (standing.state, ""))]


def _seed_rows(runs: list[Path]) -> list[list[str]]:
    """Per run: after minus before with its interval, and the verdict."""
    from align.run_folder.artifacts import read_json

    rows: list[list[str]] = []
    for folder in runs:
        path = folder / "summary.json"
        if not path.exists():
            _fail(f"{folder} is not a run folder: it has no summary.json", 2)
        summary = read_json(path)
        cells = [
            f"{found['delta']:+.3f} [{found['ci_low']:+.3f}, {found['ci_high']:+.3f}]"
            for found in summary["comparison"].values()
        ]
        rows = rows or [["run", *summary["comparison"], "verdict"]]
        rows.append([folder.name, *cells, str(summary["verdict"])])
    return rows


def _table(rows: list[list[str]]) -> None:
    columns = max(map(len, rows))
    padded = [row + [""] * (columns - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
    for row in padded:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def _default_run(recipe: Recipe) -> Path:
    return Path("runs") / recipe.name


def _again(recipe: Path, overrides: list[str] | None, out: Path | None) -> str:
    """The command that goes on with the same run."""
    words = ["align run", str(recipe), *(f"--set '{override}'" for override in overrides or [])]
    return " ".join([*words, *(["--out", str(out)] if out else [])])


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _fail(message: str, code: int) -> NoReturn:
    _warn(message)
    raise SystemExit(code)
