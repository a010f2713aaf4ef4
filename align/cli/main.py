"""The command `align`. Verbs only wire: they parse, call, print, and turn outcomes into exit codes.

What a verb needs is imported when it runs, here and in the other files: `--help` should not wait.

Exit codes: 0 done, 1 failed, 2 bad recipe or usage, 3 gate refused, 4 waiting for people,
5 gate inconclusive, 75 interrupted and resumable.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shlex
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from align.cli import annotate, cluster, data, doctor, export, judge, promote, score
from align.run_folder.progress import outlive_readers, quieten

if TYPE_CHECKING:
    from align.execution.plan import Standing
    from align.execution.runner import Outcome
    from align.recipe.recipe import Recipe

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


def _folder(text: str) -> Path:
    """A folder's name as given; an empty one, such as of an unset variable, would be the current folder."""
    if not text.strip():
        raise typer.BadParameter("is empty; name a folder, or leave the option out")
    return Path(text)


RecipeFolder = Annotated[
    Path, typer.Argument(metavar="RECIPE", parser=_folder, help="Folder of N_name.yaml files.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="S.key=value", help="Override a key of stage S; '*' is every stage."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", parser=_folder, help="Run folder; runs/<recipe> by default."),
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
    if not (math.isfinite(gpu_gb) and gpu_gb > 0):
        raise typer.BadParameter(f"--gpu-gb {gpu_gb}: must be a number above 0")
    from align.execution.checks import load_checked, missing_data, unreachable_models
    from align.planning.budget import lines
    from align.recipe.between_stages import thawed_parts

    loaded, run = load_checked(recipe, overrides, partial(_run_folder, out=out))
    rows = [["step", "stage", "reads", "work"]]
    for step in loaded.steps:
        corpus = loaded.corpus_of(step)
        work = step.config.describe_work(corpus.clips.model_dump() if corpus and corpus.clips else {})
        rows.append([step.name, step.config.stage, ", ".join([*step.needs, *step.foreign]), work])
    _table(rows)
    budgets = [line for step in loaded.steps for line in lines(step, loaded, run, gpu_gb)]
    if budgets:
        print("\n" + "\n".join(budgets))
    not_here = [*missing_data(loaded.steps), *unreachable_models(loaded.steps)]
    if notes := [*thawed_parts(loaded.steps), *map(str, not_here)]:
        print("\n" + "\n".join(f"Note: {note}" for note in notes))
    print(f"\n{recipe}: {len(loaded.steps)} stages, no mistakes. Next: {_again(recipe, overrides, out)}")


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
    replace: Annotated[
        bool, typer.Option("--replace", help="Take over a run folder that another recipe has filled.")
    ] = False,
) -> None:
    """Run a recipe. Finished and unchanged stages are skipped, interrupted ones resume.

    Work that does not fit the recipe any more is kept as .stale-<stage>-N. Delete a stage's folder to make
    it again.

    Example: align run recipes/demo --set '*.seed=1' --out runs/demo-seed-1
    """
    if only and start_at:
        raise typer.BadParameter("give --only or --from, not both")
    from align.execution.checks import check_data, load_checked

    loaded, folder = load_checked(recipe, overrides, partial(_run_folder, out=out))
    from align.execution.runner import (
        execute,
        select,
    )  # takes seconds: not before the recipe is known to be valid
    from align.run_folder.tracking import Tracker

    for note in check_data(loaded, folder, select(loaded, only, start_at)):
        _warn(f"Note: {note}")
    tracker = Tracker(folder, loaded.name, _warn)
    print(f"{recipe} -> {folder}", flush=True)
    outcome = execute(loaded, folder, only=only, start_at=start_at, tracker=tracker, replace=replace)
    summary = folder / "summary.json"
    tracker.close(outcome.status, [path for path in (summary, outcome.report) if path])
    _print_outcome(outcome, loaded, folder, _again(recipe, overrides, out, only, start_at), tracker.uri)
    raise typer.Exit(outcome.exit_code)


@app.command()
def status(recipe: RecipeFolder, overrides: Overrides = None, out: Out = None) -> None:
    """Show how far each stage is, and the next command.

    Example: align status recipes/demo
    """
    from align.execution.plan import check_recipe, survey
    from align.recipe.recipe import load
    from align.run_folder.artifacts import DamagedFile, holder, read_json

    loaded = load(recipe, overrides)
    folder = _run_folder(loaded, out)
    check_recipe(loaded, folder)
    path = folder / "summary.json"
    try:
        entries = read_json(path)["stages"] if path.exists() else {}
    except (DamagedFile, KeyError, TypeError):
        _warn(f"{path} is damaged; the next `align run` writes it anew")
        entries = {}
    process = holder(folder)
    standings = survey(loaded, folder)
    _table([_status_row(standing, entries.get(standing.step.name, {}), process) for standing in standings])
    for standing in standings:
        if standing.misfit:
            print(f"\n{standing.misfit} holds work of other settings or inputs; a run sets it aside")
    report = folder / "report.html"
    if process:
        print(f"\nProcess {process} works in {folder}.")
    elif all(standing.state == "done" for standing in standings):
        print(f"\nAll done. Report: {report}" if report.exists() else "\nAll done.")
    else:
        print(f"\nNext: {_again(recipe, overrides, out)}")


@app.command()
def verify(run: Annotated[Path, typer.Argument(metavar="RUN", parser=_folder, help="Run folder.")]) -> None:
    """Read every file of a run's finished stages and compare it with the hash of when it was written.

    Example: align verify runs/demo
    """
    from align.run_folder.artifacts import MANIFEST, DamagedFile, damage, read_manifest

    stages = [path.parent for path in sorted(run.glob(f"[!.]*/{MANIFEST}"))]
    if not stages:
        _fail(f"{run} has no finished stages", 2)
    is_whole = True
    for stage in stages:
        try:
            manifest = read_manifest(stage)
            if "outputs" not in manifest:
                raise DamagedFile(
                    f"{stage / MANIFEST} does not say which files there were: restore it from a copy"
                )
            problems = damage(stage, manifest, by_hash=True)
            print(f"{stage.name}  {len(manifest['outputs']):,} files  {'damaged' if problems else 'whole'}")
        except DamagedFile as error:
            problems = [str(error)]
        is_whole &= not problems
        for problem in problems:
            _warn(f"{stage.name}: {problem}")
    raise typer.Exit(0 if is_whole else 1)


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
app.command()(doctor.doctor)


def main() -> None:
    """Entry point: quiet libraries, clean messages for the user's mistakes."""
    quieten()
    outlive_readers()
    signal.signal(signal.SIGINT, lambda *_: _fail("interrupted", 75))  # until a run saves what it has
    try:
        app()
    except Exception as error:
        from align.recipe.recipe import RecipeError  # looked up only now that something was raised

        if isinstance(error, RecipeError):
            n = len(error.problems)
            _fail(f"{error}\n{n} {'mistake' if n == 1 else 'mistakes'}; nothing was run", 2)
        code = _exit_code(error)
        if code is None:
            raise
        _fail(str(error), code)


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error whose message says all that a user needs; None for any other."""
    from align.run_folder.artifacts import DamagedFile, NotThisRun, RunIsBusy
    from ui_annotation import AnnotationError

    if isinstance(error, NotThisRun):
        return 2
    if isinstance(error, OSError):
        return 1 if error.filename is not None or error.errno in _DISK_FULL else None
    return 1 if isinstance(error, RunIsBusy | DamagedFile | AnnotationError) else None


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


# -------------------------------------------------------------------------- printing


def _print_outcome(outcome: Outcome, recipe: Recipe, folder: Path, command: str, uri: str) -> None:
    """What came out, where it is, and what to do next."""
    summary = outcome.summary
    print()
    for name, row in summary["comparison"].items():
        interval = f"95 % [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]  n={row['n']}"
        print(f"{name:<11} {row['before']:.3f} -> {row['after']:.3f}  {row['delta']:+.3f}  {interval}")
    if summary["verdict"]:
        print(f"Verdict: {summary['verdict'].upper()}")
        for reason in summary["verdict_reasons"]:
            print(f"  {reason}")
    if outcome.error:
        traceback = folder / "failure.txt"
        _warn(f"{outcome.error}\n  traceback: {traceback}" if traceback.exists() else outcome.error)
    if outcome.exit_code == 75:
        print("Interrupted; what was saved is kept.")
    if outcome.report:
        print(f"Report: {outcome.report}")
    if outcome.waits_for:
        print(outcome.waits_for)
    if outcome.exit_code in (1, 4, 75):
        print(f"Next: {command}")
        return
    compared = next((s.config for s in reversed(recipe.steps) if s.config.produces == "evaluation"), None)
    if compared and summary["comparison"]:
        stages = [str(folder / getattr(compared, side)) for side in ("before", "after")]
        print(f"Next: {shlex.join(['align', 'compare', *stages, '--html', 'compare.html'])}")
    address = re.sub(r"//[^/@]*@", "//", uri)  # a password in the address stays out of logs
    print("      " + ("mlflow ui --backend-store-uri " if uri.startswith("sqlite") else "") + address)


def _status_row(standing: Standing, entry: dict[str, Any], process: str | None) -> list[str]:
    """A step's name, its state in words, and what there is to know about it.

    `entry` is the step's in the summary of the last run.
    """
    name, manifest = standing.step.name, standing.manifest
    if standing.state == "done" and manifest:
        return [name, "done", f"{manifest['seconds']:.0f} s"]
    if standing.state == "damaged":
        return [name, "damaged", str(standing.damage)]
    if entry.get("status") == "running" and process:
        return [name, "running", ""]
    if entry.get("status") == "failed":
        return [name, "failed", str(entry.get("error", ""))]
    if entry.get("status") == "waiting" and standing.state == "partial":
        return [name, "waiting", f"for annotators: {entry['done']} of {entry['wanted']} judgements"]
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
            f"{row['delta']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
            for row in summary["comparison"].values()
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


def _run_folder(recipe: Recipe, out: Path | None) -> Path:
    """Where the recipe runs; ends with a message if that can be no folder."""
    folder = out or Path("runs") / recipe.name
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:
        _fail(f"{str(folder)[:80]}...: {error.strerror}; choose another folder with --out", 2)
    if not nearest.is_dir():
        _fail(f"{nearest} is a file; choose another folder with --out", 2)
    if not os.access(nearest, os.W_OK | os.X_OK):
        _fail(f"{nearest} cannot be written to; choose another folder with --out", 2)
    return folder


def _again(
    recipe: Path,
    overrides: list[str] | None,
    out: Path | None,
    only: str | None = None,
    start_at: str | None = None,
) -> str:
    """The command that goes on with the same run, for a shell."""
    words = ["align", "run", str(recipe)]
    options = {"--only": only, "--from": start_at, "--out": out and str(out)}
    for name, value in [*(("--set", override) for override in overrides or []), *options.items()]:
        words += [name, value] if value else []
    return shlex.join(words)


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _fail(message: str, code: int) -> NoReturn:
    _warn(message)
    raise SystemExit(code)
