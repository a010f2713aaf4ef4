"""`align engine install`: vLLM, the engine that completes requests in a server of its own."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, help="vLLM, for `engine: vllm` in a stage.", rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """vLLM, for `engine: vllm` in a stage."""


@app.command()
def install() -> None:
    """Make vLLM's own Python environment (it cannot share ours); once, about two minutes on a CPU.

    Example: align engine install
    """
    from align.generation.vllm.server import environment

    python = environment().install(typer.echo)
    typer.echo(f"Ready: {python.parent.parent}")
