"""The verb `align chat`: a page to talk to a policy, or to two side by side."""

from __future__ import annotations

import getpass
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from align.cli.options import (
    A_POLICY,
    PolicyEngine,
    fail,
    folder_to_write,
    policy_name,
    port_number,
    registry_uri,
    usable_engine,
)


def chat(
    run: Annotated[str, typer.Argument(metavar="RUN", parser=policy_name, help=A_POLICY)],
    other: Annotated[
        str | None,
        typer.Argument(metavar="[RUN2]", parser=policy_name, help="A second one, to compare blind."),
    ] = None,
    port: Annotated[int, typer.Option("--port", parser=port_number, help="0 takes a free one.")] = 0,
    engine: PolicyEngine = None,
    prompt_format: Annotated[
        Literal["sentences", "tags_paper", "tags_released"],
        typer.Option("--prompt-format", help="Of pre-training: how a policy is asked when words are said."),
    ] = "sentences",
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep",
            metavar="DIR",
            parser=folder_to_write,
            help="For judgements that you choose to keep; by default chat/ in RUN's run folder.",
        ),
    ] = None,
    annotator: Annotated[
        str | None, typer.Option("--annotator", metavar="NAME", help="Who judges; your login name.")
    ] = None,
) -> None:
    """Talk to a policy in the browser, or compare two blind, until Ctrl-C.

    Record or drop clips, ask, read, vote. What you choose to keep becomes judgements, which a pairs stage
    reads. Only browsers of this machine reach the page, and it loads nothing from elsewhere.

    Example: align chat runs/demo/2_sft runs/demo/6_dpo
    """
    from align.chat.server import NamedModel, Settings
    from align.chat.server import chat as run_server
    from align.release.policy_files import NoPolicy, PolicyFiles, find, saved_model
    from align.release.registry import RegistryDown
    from align.serving.requests import Limits
    from align.serving.server import CannotServe, new_key

    chosen, name = usable_engine(engine), _annotator(annotator)
    scratch = tempfile.TemporaryDirectory(prefix="align-chat-", ignore_cleanup_errors=True)
    with scratch:
        found: list[PolicyFiles] = []
        models: list[NamedModel] = []
        try:
            for number, named in enumerate(filter(None, (run, other))):
                holder = Path(scratch.name) / str(number)
                holder.mkdir()
                found.append(find(named, registry_uri(named), holder))
                models.append(NamedModel(found[-1].name, saved_model(found[-1], holder)))
        except (NoPolicy, FileNotFoundError) as error:
            fail(str(error), 2)
        except (RegistryDown, LookupError) as error:
            fail(str(error), 1)
        stage = found[0].stage
        keep_in = keep or (folder_to_write(stage.parent / "chat") if stage else None)
        settings = Settings(
            models=models,
            engine=chosen,
            key=new_key(),
            port=port,
            prompt_format=prompt_format,
            limits=Limits(),
            keep_in=keep_in,
            annotator=name,
        )

        def listening(url: str) -> None:
            names = " and ".join(model.name for model in models)
            where = f"what you keep goes to {keep_in}" if keep_in else "nothing can be kept: see --keep"
            print(f"{names} on {chosen}; {where}\n{url}\nloading ...", flush=True)

        def ready() -> None:
            scratch.cleanup()  # the engines have read it: a killed server leaves no copy of a policy behind
            print("ready  (Ctrl-C ends)", flush=True)

        try:
            run_server(settings, listening, ready)
        except (FileExistsError, FileNotFoundError) as error:
            fail(str(error), 2)
        except CannotServe as error:
            fail(str(error), 1)


def _annotator(given: str | None) -> str:
    """Who judges."""
    if given is not None and not given.strip():
        raise typer.BadParameter("--annotator is empty; name somebody, or leave the option out")
    try:
        return given or getpass.getuser()
    except (KeyError, OSError):  # an account without a name, as in containers
        return "chat"
