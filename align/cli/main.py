"""The command `align`. Verbs only wire: they parse, call, print, and turn outcomes into exit codes.

What a verb needs is imported when it runs, here and in the other files: `--help` should not wait.

Exit codes: 0 done, 1 failed, 2 bad recipe or usage, 3 gate refused, 4 waiting for people,
5 gate inconclusive, 75 interrupted and resumable.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import re
import shlex
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.exceptions import TyperException

from align.cli import (
    annotate,
    chat,
    cluster,
    data,
    doctor,
    engine,
    export,
    judge,
    promote,
    score,
    serve,
    watch,
)
from align.cli.options import (
    Out,
    Overrides,
    RecipeFolder,
    file_to_write,
    folder_to_read,
    folder_to_write,
    path,
    run_command,
    stage_name,
)
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
app.add_typer(engine.app, name="engine")


@app.command()
def check(
    recipe: RecipeFolder,
    overrides: Overrides = None,
    gpu_gb: Annotated[
        float, typer.Option("--gpu-gb", metavar="GB", help="Memory of a GPU, 10^9 bytes.")
    ] = 80.0,
    out: Out = None,
) -> None:
    """Check a recipe and print its plan, with memory, disk, and hours of training and of annotators.

    Hours are those of an earlier run in --out where there is one. Trains and writes nothing.

    Example: align check recipes/demo --set 6_dpo.beta=0.2
    """
    if not (math.isfinite(gpu_gb) and gpu_gb > 0):
        raise typer.BadParameter(f"--gpu-gb {gpu_gb}: must be a number above 0")
    from align.execution.checks import load_checked, missing_data, unreachable_models
    from align.planning import annotators, budget
    from align.recipe.between_stages import thawed_parts

    loaded, run = load_checked(recipe, overrides, partial(_run_folder, out=out))
    rows = [["step", "stage", "reads", "work"]]
    for step in loaded.steps:
        corpus = loaded.corpus_of(step)
        work = step.config.describe_work(corpus.clips.model_dump() if corpus and corpus.clips else {})
        rows.append([step.name, step.config.stage, ", ".join([*step.needs, *step.foreign]), work])
    _table(rows)
    budgets = [
        line
        for step in loaded.steps
        for line in (*budget.lines(step, loaded, run, gpu_gb), *annotators.lines(step, loaded, run))
    ]
    if budgets:
        print("\n" + "\n".join(budgets))
    not_here = [*missing_data(loaded.steps), *unreachable_models(loaded.steps)]
    if notes := [*thawed_parts(loaded.steps), *map(str, not_here)]:
        print("\n" + "\n".join(f"Note: {note}" for note in notes))
    print(f"\n{recipe}: {len(loaded.steps)} stages, no mistakes. Next: {run_command(recipe, overrides, out)}")


@app.command()
def run(
    recipe: RecipeFolder,
    only: Annotated[
        str | None,
        typer.Option(
            "--only", metavar="S", parser=stage_name, help="Run just this stage, with inputs as they are."
        ),
    ] = None,
    start_at: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="S", parser=stage_name, help="Start here; earlier stages are taken as is."
        ),
    ] = None,
    overrides: Overrides = None,
    out: Out = None,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Set aside what other settings or another recipe finished there."),
    ] = False,
) -> None:
    """Run a recipe. Finished and unchanged stages are skipped, interrupted ones resume.

    What was finished with other settings is made again only with --replace, and kept as .stale-<stage>-N.
    Move a stage's folder elsewhere to make it again.

    Example: align run recipes/demo --set '*.seed=1' --out runs/demo-seed-1
    """
    if only and start_at:
        raise typer.BadParameter("give --only or --from, not both")
    from align.execution.checks import check_data, load_checked

    loaded, folder = load_checked(recipe, overrides, partial(_run_folder, out=out))
    from align.execution.runner import execute, select  # takes seconds: not before the recipe is valid
    from align.run_folder.artifacts import FullDisk, NotThisRun
    from align.run_folder.tracking import Tracker

    for note in check_data(loaded, folder, select(loaded, only, start_at)):
        _warn(f"Note: {note}")
    tracker = Tracker(folder, loaded.name, _warn)
    print(f"{recipe} -> {folder}", flush=True)
    limits = [
        word for name, value in (("--only", only), ("--from", start_at)) if value for word in (name, value)
    ]
    command = run_command(recipe, overrides, out, *limits, *(["--replace"] if replace else []))
    try:
        outcome = execute(loaded, folder, only=only, start_at=start_at, tracker=tracker, replace=replace)
    except NotThisRun as error:
        _fail(f"{error}\n{_ways_on(recipe, overrides, out, folder, *limits)}", 2)
    except FullDisk as error:
        _fail(f"{error}\nNext: {command}", 1)
    summary = folder / "summary.json"
    tracker.close(outcome.status, [path for path in (summary, outcome.report) if path])
    _print_outcome(outcome, loaded, folder, command, tracker.uri)
    raise typer.Exit(outcome.exit_code)


@app.command()
def status(recipe: RecipeFolder, overrides: Overrides = None, out: Out = None) -> None:
    """Show how far each stage is, and the next command.

    Example: align status recipes/demo
    """
    from align.execution.plan import check_recipe, survey
    from align.recipe.recipe import load
    from align.run_folder.artifacts import NotThisRun, holder, read_kept

    loaded = load(recipe, overrides)
    folder = _run_folder(loaded, out)
    try:
        check_recipe(loaded, folder)
    except NotThisRun as error:
        _fail(f"{error}\n{_ways_on(recipe, overrides, out, folder)}", 2)
    path = folder / "summary.json"
    entries = (read_kept(path) or {}).get("stages")
    entries = {step.name: _object(_object(entries).get(step.name)) for step in loaded.steps}
    process = holder(folder)
    standings = survey(loaded, folder)
    _table([_status_row(standing, entries[standing.step.name], process) for standing in standings])
    for standing in standings:
        if standing.misfit:
            print(f"\n{standing.misfit} holds work of other settings or inputs; a run sets it aside")
    report = folder / "report.html"
    if process:
        print(f"\nProcess {process} works in {folder}.")
    elif all(standing.state == "done" for standing in standings):
        print(f"\nAll done. Report: {report}" if report.exists() else "\nAll done.")
    elif any(standing.state == "outdated" and standing.reads for standing in standings):
        print(f"\n{_ways_on(recipe, overrides, out, folder)}")
    else:
        print(f"\nNext: {run_command(recipe, overrides, out)}")


@app.command()
def verify(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", parser=folder_to_read, help="Run folder, or a stage's.")
    ],
) -> None:
    """Read every file of a run's finished stages and compare it with the hash of when it was written.

    Example: align verify runs/demo
    """
    from align.run_folder.artifacts import MANIFEST, DamagedFile, damage, read_manifest

    manifests = [run / MANIFEST] if (run / MANIFEST).exists() else sorted(run.glob(f"[!.]*/{MANIFEST}"))
    stages = [path.parent for path in manifests]
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
        list[Path],
        typer.Argument(metavar="A B ...", parser=path, help="Stage folders of policies, or run folders."),
    ],
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", parser=file_to_write, help="Write a page."),
    ] = None,
    as_json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", parser=file_to_write, help="Write the numbers."),
    ] = None,
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
app.command()(serve.serve)
app.command()(chat.chat)
app.command()(watch.watch)
app.command()(doctor.doctor)


def main() -> None:
    """Entry point: quiet libraries, clean messages for the user's mistakes."""
    quieten()
    outlive_readers()
    signal.signal(signal.SIGINT, lambda *_: _fail("interrupted", 75))  # until a run saves what it has
    try:
        raise SystemExit(app(prog_name="align", standalone_mode=False))
    except TyperException as error:
        usage = getattr(error, "ctx", None)
        place = f"{usage.command_path}: " if usage else ""
        _fail(place + error.format_message(), error.exit_code)
    except Exception as error:
        from align.recipe.recipe import RecipeError  # looked up only now that something was raised

        if isinstance(error, RecipeError):
            n = len(error.problems)
            _fail(f"{error}\n{n} {'mistake' if n == 1 else 'mistakes'}; nothing was run", 2)
        message, code = _explained(error)
        if code is None:
            raise
        _fail(message, code)


def _explained(error: Exception) -> tuple[str, int | None]:
    """A message that says all that a user needs, and its exit code; None for an error of ours."""
    from align.run_folder.artifacts import DamagedFile, FullDisk, NotThisRun, RunIsBusy, full_disk
    from align.run_folder.server_environment import InstallFailed
    from preference_data.audio.clip_files import BadAudio
    from preference_data.preferences.selection import NothingToRank
    from preference_data.store import BadRecord
    from ui_annotation import AnnotationError

    if isinstance(error, NotThisRun):
        return str(error), 2
    of_data = BadRecord | BadAudio | NothingToRank
    if isinstance(error, RunIsBusy | DamagedFile | AnnotationError | FullDisk | InstallFailed | of_data):
        return str(error), 1
    if isinstance(error, OSError) and error.filename is not None:
        return full_disk(error, Path(error.filename)) or f"{error.filename}: {error.strerror}", 1
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{error}; free some space and run the same command again", 1 if is_full else None


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
    from align.execution.plan import difference

    name, manifest = standing.step.name, standing.manifest
    if standing.state == "done" and manifest:
        return [name, "done", f"{manifest.get('seconds', 0):.0f} s"]
    if standing.state == "damaged":
        return [name, "damaged", str(standing.damage)]
    if entry.get("status") == "running" and process:
        return [name, "running", ""]
    if entry.get("status") == "failed":
        return [name, "failed", str(entry.get("error", ""))]
    if entry.get("status") == "waiting" and standing.state == "partial":
        return [name, "waiting", f"for annotators: {entry.get('done')} of {entry.get('wanted')} judgements"]
    words = {
        "outdated": ("out of date", difference(standing)),
        "partial": ("partial", "resumes where it was"),
        "pending": ("pending", ""),
    }
    return [name, *words.get(standing.state, (standing.state, ""))]


def _object(value: Any) -> dict[str, Any]:
    """What should be an object of a JSON file; empty if it is something else."""
    return value if isinstance(value, dict) else {}


def _seed_rows(runs: list[Path]) -> list[list[str]]:
    """Per run: after minus before with its interval, and the verdict."""
    from align.run_folder.artifacts import damaged, read_json

    rows: list[list[str]] = []
    for folder in runs:
        path = folder / "summary.json"
        if not path.exists():
            _fail(f"{folder} is not a run folder: it has no summary.json", 2)
        summary = read_json(path)
        try:
            cells = [
                f"{row['delta']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
                for row in summary["comparison"].values()
            ]
            rows = rows or [["run", *summary["comparison"], "verdict"]]
            rows.append([folder.name, *cells, str(summary["verdict"])])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise damaged(path, "is not the summary of a run") from None
    return rows


def _table(rows: list[list[str]]) -> None:
    columns = max(map(len, rows))
    padded = [row + [""] * (columns - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
    for row in padded:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def _ways_on(recipe: Path, overrides: list[str] | None, out: Path | None, folder: Path, *limits: str) -> str:
    """The two commands that a user chooses between where a run folder holds other work."""
    names = (folder.with_name(f"{folder.name}-{n}") for n in itertools.count(2))
    free = next(name for name in names if not name.exists())
    return (
        f"Next: {run_command(recipe, overrides, free)}\n"
        f"  or: {run_command(recipe, overrides, out, *limits, '--replace')}\n"
        "The first starts in a folder of its own; the second makes again what differs, and keeps what is "
        "there as .stale-<stage>-N"
    )


def _run_folder(recipe: Recipe, out: Path | None) -> Path:
    """Where the recipe runs."""
    return out or folder_to_write(Path("runs") / recipe.name)


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _fail(message: str, code: int) -> NoReturn:
    _warn(message)
    raise SystemExit(code)
