"""The verb `align serve`: an OpenAI-compatible server for a policy."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from align.cli.options import (
    A_POLICY,
    PolicyEngine,
    fail,
    policy_name,
    port_number,
    registry_uri,
    usable_engine,
)

KEY = "ALIGN_SERVE_API_KEY"


def serve(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", parser=policy_name, help=A_POLICY),
    ],
    port: Annotated[int, typer.Option("--port", parser=port_number, help="0 takes a free one.")] = 8000,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; there is no TLS.")
    ] = "127.0.0.1",
    engine: PolicyEngine = None,
    prompt_format: Annotated[
        Literal["sentences", "tags_paper", "tags_released"],
        typer.Option(
            "--prompt-format", help="Of the policy's pre-training: how it is asked for transcripts."
        ),
    ] = "sentences",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Of an answer.")] = 2048,
    max_clips: Annotated[int, typer.Option("--max-clips", min=1, max=8, help="Of a conversation.")] = 8,
    max_body_mb: Annotated[int, typer.Option("--max-body-mb", min=1, help="Of a request.")] = 64,
) -> None:
    """Serve a policy to any OpenAI client: chats about clips, and transcripts, until Ctrl-C.

    Of a run folder: what it promoted, else its gate's candidate, else its last policy. The key is read from
    ALIGN_SERVE_API_KEY; without it, one is made and shown once. The model's name is `policy`.

    Example: align serve runs/demo --port 8000
    """
    from align.release.policy_files import NoPolicy, find, saved_model
    from align.release.registry import RegistryDown
    from align.serving.requests import Limits
    from align.serving.server import CannotServe, Settings, new_key
    from align.serving.server import serve as run_server

    chosen = usable_engine(engine)
    given = os.environ.get(KEY, "")
    if given != given.strip() or not given.isascii():
        fail(f"{KEY}: must be ASCII, without white space around it", 2)
    key = given or new_key()
    scratch = tempfile.TemporaryDirectory(prefix="align-serve-", ignore_cleanup_errors=True)
    with scratch:
        holder = Path(scratch.name)
        try:
            files = find(run, registry_uri(run), holder)
            settings = Settings(
                policy=saved_model(files, holder),
                name=files.name,
                engine=chosen,
                key=key,
                host=host,
                port=port,
                prompt_format=prompt_format,
                limits=Limits(body_bytes=max_body_mb << 20, clips=max_clips, max_tokens=max_tokens),
            )
        except (NoPolicy, FileNotFoundError) as error:
            fail(str(error), 2)
        except (RegistryDown, LookupError) as error:
            fail(str(error), 1)

        def listening(url: str) -> None:
            shown = f"from {KEY}" if given else f"{key} (shown once; set {KEY} to choose it)"
            print(f"{files.name} on {chosen}: {url}/v1  model policy\nkey {shown}\nloading ...", flush=True)

        def ready() -> None:
            scratch.cleanup()  # the engine has read it: a killed server leaves no copy of a policy behind
            print("ready", flush=True)

        try:
            run_server(settings, listening, ready)
        except CannotServe as error:
            fail(str(error), 1)
