"""The verbs of `align annotate`: the annotation server, its users, and what goes in and comes out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from align.cli.options import (
    Out,
    Overrides,
    RecipeFolder,
    folder_to_write,
    path,
    port_number,
    run_command,
)

if TYPE_CHECKING:
    from align.recipe.config.preference import AnnotateConfig
    from ui_annotation.project import Project

app = typer.Typer(
    no_args_is_help=True,
    help="Annotators judge in the browser. Start with: align annotate up",
    rich_markup_mode=None,
)
users = typer.Typer(no_args_is_help=True, help="Who may sign in.", rich_markup_mode=None)
app.add_typer(users, name="users")

Home = Annotated[
    Path,
    typer.Option(
        "--home",
        metavar="DIR",
        parser=folder_to_write,
        help="The server's data: database, clips, credentials.",
    ),
]
HOME = Path("runs/argilla")


@app.command()
def install() -> None:
    """Make the server's own Python environment (it cannot share ours); once, about a minute.

    Example: align annotate install
    """
    from ui_annotation.environment import ARGILLA

    python = ARGILLA.install(typer.echo)
    typer.echo(f"Ready: {python.parent.parent}")


@app.command()
def up(
    home: Home = HOME,
    port: Annotated[int, typer.Option("--port", parser=port_number, help="0 takes a free one.")] = 6900,
) -> None:
    """Run the annotation server until Ctrl-C or `align annotate down`.

    Example: align annotate up --home runs/argilla --port 6900
    """
    from ui_annotation import launch
    from ui_annotation.environment import ARGILLA

    ARGILLA.install(typer.echo)
    launch.serve(home, port=port)


@app.command()
def down(home: Home = HOME) -> None:
    """Stop the annotation server; its data stays.

    Example: align annotate down --home runs/demo/argilla
    """
    from ui_annotation import launch

    typer.echo("Stopped." if launch.stop(home) else f"No server runs for {home}.")


@app.command()
def status(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", parser=path)] = None,
    home: Annotated[Path | None, typer.Option("--home", metavar="DIR", parser=folder_to_write)] = None,
    overrides: Overrides = None,
    out: Out = None,
) -> None:
    """Tell whether the server runs and, for a recipe, how many judgements are there.

    Example: align annotate status recipes/demo
    """
    from ui_annotation import launch
    from ui_annotation import pull as pulling

    if recipe is None:
        server = launch.running(home or HOME)
        typer.echo(f"{server.url}  process {server.pid}" if server else f"No server runs for {home or HOME}.")
        raise typer.Exit(0 if server else 1)
    from align.stages import annotate

    stage = _annotate_stage(recipe, overrides, out)
    own = stage.run / "argilla"
    if not stage.config.server and launch.running(own) is None:  # to look is not to start it
        command = run_command(recipe, overrides, out, verb="annotate push")
        typer.echo(f"No server runs for {own}. Start it: {command}")
        raise typer.Exit(1)
    with annotate.server(stage.config, stage.run) as host:
        so_far = pulling.progress(stage.project, annotate.fetch(host, stage.config, stage.project))
    typer.echo(f"{host.url}  {so_far.done} of {so_far.wanted} judgements")
    for name, n in so_far.submitted.items():
        typer.echo(f"  {name}: {n}")


@app.command()
def push(recipe: RecipeFolder, overrides: Overrides = None, out: Out = None) -> None:
    """Send a recipe's comparisons to the server. May be repeated: only what is missing is sent.

    Example: align annotate push recipes/demo --set 4_annotate.by=people
    """
    from align.stages import annotate

    stage = _annotate_stage(recipe, overrides, out)
    with annotate.server(stage.config, stage.run) as host:
        result = annotate.send(host, stage.project)
    typer.echo(f"{host.url}  {result.added} of {len(stage.project.open())} records are new")
    for name in result.datasets:
        typer.echo(f"  {name}")
    typer.echo(f"  {annotate.work_left(stage.project)}")


@app.command()
def adjudicate(recipe: RecipeFolder, overrides: Overrides = None, out: Out = None) -> None:
    """Send what annotators disagree about, and what they typed, to the recipe's adjudicator.

    Annotators go on meanwhile: repeat it for what came since. `align run` waits for the decisions.

    Example: align annotate adjudicate recipes/qwen2_audio_7b --set 4_annotate.adjudicator=ann
    """
    from align.recipe.recipe import Problem, RecipeError
    from align.stages import annotate
    from ui_annotation import pull

    stage = _annotate_stage(recipe, overrides, out)
    config, project = stage.config, stage.project
    if config.adjudicator is None:
        raise RecipeError([Problem(str(recipe), "adjudicator", "not given; who decides? Name an account")])
    with annotate.server(config, stage.run) as host:
        judgements = annotate.fetch(host, config, project)
        decisions = annotate.review_project(config, project, judgements)
        annotate.send_for_review(host, config, decisions)
        so_far = pull.progress(decisions, annotate.fetch(host, config, decisions))
    typed = sum(item.purpose == "correction" for item in decisions.comparisons)
    typer.echo(f"{host.url}  workspace {decisions.workspace}, for {config.adjudicator}:")
    typer.echo(f"  {len(decisions.comparisons) - typed} disagreements, {typed} typed answers")
    typer.echo(f"  {so_far.done} of {so_far.wanted} are decided")
    typer.echo(f"Next, when all are: {run_command(recipe, overrides, out)}")


@app.command()
def pull(recipe: RecipeFolder, overrides: Overrides = None, out: Out = None) -> None:
    """Fetch the judgements so far as a version in RUN/snapshots, with their quality report.

    Example: align annotate pull recipes/demo --set 4_annotate.by=people
    """
    from align.stages import annotate

    stage = _annotate_stage(recipe, overrides, out)
    config, project = stage.config, stage.project
    with annotate.server(config, stage.run) as host:
        judgements = annotate.fetch(host, config, project)
    result = annotate.keep(judgements, host.url, config, project, stage.run / "snapshots")
    annotate.report(result, config, project, result.snapshot)
    typer.echo(f"{result.snapshot}  {len(judgements)} judgements; report: {result.snapshot}.html")


@users.command("add")
def add_user(
    name: Annotated[str, typer.Argument(help="Letters (a to z, A to Z), digits, '-' and '_'; at most 100.")],
    home: Home = HOME,
    workspace: Annotated[str, typer.Option("--workspace", help="What the annotator may see.")] = "audio",
) -> None:
    """Give somebody an account; the server must be up. Name and password go into HOME/credentials.json.

    Example: align annotate users add ann --home runs/demo/argilla
    """
    from ui_annotation import accounts

    sign_in = accounts.add_user(home, name, workspace=workspace)
    password = f"password {sign_in['password']}" if sys.stdout.isatty() else "password in"
    typer.echo(f"{name}  {password}  {home / 'credentials.json'}")


@users.command("list")
def list_users(home: Home = HOME) -> None:
    """Show who may sign in; the server must be up.

    Example: align annotate users list --home runs/demo/argilla
    """
    from ui_annotation import accounts

    for user in accounts.list_users(home):
        typer.echo(f"{user.name}  {user.role}  {', '.join(user.workspaces)}")


class _Stage(NamedTuple):
    """The annotate stage of a recipe, and what it has people judge."""

    config: AnnotateConfig
    project: Project
    run: Path


def _annotate_stage(recipe: Path, overrides: list[str] | None, out: Path | None) -> _Stage:
    """Find the recipe's annotate stage and draw its comparisons.

    Raises:
        RecipeError: there is no such stage, a model alone judges, or what it reads has not finished.
    """
    from align.execution.plan import check_recipe, fingerprint, reads
    from align.recipe.config.preference import AnnotateConfig
    from align.recipe.recipe import Problem, RecipeError, load
    from align.run_folder.artifacts import MANIFEST, StageFolder, read_manifest
    from align.stages import annotate

    loaded = load(recipe, overrides)
    run = out or Path("runs") / loaded.name
    check_recipe(loaded, run)
    step = next((step for step in loaded.steps if isinstance(step.config, AnnotateConfig)), None)
    if step is None:
        raise RecipeError([Problem(str(recipe), "", "no stage of this recipe is `stage: annotate`")])
    if isinstance(step.config, AnnotateConfig) and step.config.by == "model":
        message = f"model judges, and no person does; its judgements: {run_command(recipe, overrides, out)}"
        raise RecipeError([step.source.problem(("by",), message)])
    missing = [name for name in step.needs if not (run / name / MANIFEST).exists()]
    if missing:
        first = run_command(recipe, overrides, out)
        message = f"needs {missing[0]}, which has not finished in {run}; first: {first}"
        raise RecipeError([Problem(str(step.file), "", message)])
    inputs = {name: run / name for name in step.needs}
    digests = {name: read_manifest(folder)["output_digest"] for name, folder in inputs.items()}
    mark = fingerprint(step, reads(step, digests))
    assert isinstance(step.config, AnnotateConfig)
    return _Stage(
        step.config, annotate.make_project(step.config, inputs, StageFolder(run, step.name, mark)), run
    )
