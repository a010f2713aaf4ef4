"""`align cluster render`: the files that start a recipe on SLURM or Kubernetes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from align.cli.options import Overrides, RecipeFolder, file_to_write, path

if TYPE_CHECKING:
    from align.execution.cluster_files import ClusterJob
    from align.recipe.recipe import Recipe

app = typer.Typer(no_args_is_help=True, help="Run a recipe on a cluster of machines.")


@app.callback()
def _group() -> None:
    """Run a recipe on a cluster of machines."""


@app.command()
def render(
    recipe: RecipeFolder,
    to: Annotated[Literal["slurm", "kuberay"], typer.Option("--to", help="What runs the cluster.")],
    run: Annotated[
        Path | None,
        typer.Option(
            "--run", metavar="DIR", parser=path, help="Run folder that all machines share; runs/<recipe>."
        ),
    ] = None,
    per_node: Annotated[int, typer.Option("--per-node", min=1, help="Workers on one machine: its GPUs.")] = 8,
    time: Annotated[str, typer.Option("--time", help="SLURM: time limit.")] = "24:00:00",
    image: Annotated[str, typer.Option("--image", help="KubeRay: with audio-align in it.")] = "audio-align",
    claim: Annotated[
        str, typer.Option("--claim", help="KubeRay: name of the shared volume's claim.")
    ] = "runs",
    mount: Annotated[str, typer.Option("--mount", help="KubeRay: where it is mounted.")] = "/runs",
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", parser=file_to_write, help="Write here, not to the terminal."),
    ] = None,
) -> None:
    """Write the file that starts a recipe on a cluster; its stages say what they need under `hardware`.

    Example: align cluster render recipes/qwen2_audio_7b --to slurm --out train.sbatch && sbatch train.sbatch
    """
    from align.execution import cluster_files
    from align.recipe.recipe import load
    from preference_data.store import write_text

    loaded = load(recipe, overrides)
    folder = run or Path(mount if to == "kuberay" else "runs") / loaded.name
    job = _job(loaded, str(recipe), str(folder), per_node, overrides or [])
    if to == "slurm":
        text = cluster_files.slurm(job, time=time)
    else:
        text = cluster_files.kuberay(job, image=image, claim=claim, mount=mount)
    if out is None:
        print(text, end="")
    else:
        write_text(out, text)
        print(f"{out}: {job.nodes} machines, {job.workers} workers for {', '.join(job.stages)}")


def _job(loaded: Recipe, recipe: str, run: str, per_node: int, overrides: list[str]) -> ClusterJob:
    """What the most demanding of the recipe's stages needs.

    Raises:
        RecipeError: no stage has `hardware`.
    """
    from align.execution.cluster_files import ClusterJob
    from align.recipe.config.training import TrainingConfig
    from align.recipe.recipe import Problem, RecipeError

    hardware_of = {
        step.name: step.config.hardware
        for step in loaded.steps
        if isinstance(step.config, TrainingConfig) and step.config.hardware is not None
    }
    if not hardware_of:
        message = "no stage has hardware: nothing to spread over a cluster; add `hardware: {workers: 8}`"
        raise RecipeError([Problem(recipe, "", message)])
    return ClusterJob(
        recipe=recipe,
        run=run,
        stages=tuple(hardware_of),
        workers=max(hardware.workers for hardware in hardware_of.values()),
        on_gpu=any(hardware.device != "cpu" for hardware in hardware_of.values()),
        cpus_per_worker=max(hardware.cpus_per_worker for hardware in hardware_of.values()),
        loaders=max(
            int(getattr(step.config, "trl", {}).get("dataloader_num_workers", 0)) for step in loaded.steps
        ),
        workers_per_node=per_node,
        overrides=tuple(overrides),
    )
