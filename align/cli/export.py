"""The verb `align export`: a policy as one folder for plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align.cli.options import fail, folder_to_write, path, registry_uri


def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            parser=lambda text: str(path(text)) if not text.startswith("models:/") else text,
            help="Run folder, stage folder, model folder or models:/NAME@champion.",
        ),
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", parser=folder_to_write, help="The new folder.")],
) -> None:
    """Write a policy as one folder that plain transformers loads: merged safetensors, processor, model card.

    Of a run folder: what it promoted, else its gate's candidate, else its last policy. Before the folder
    appears, a fresh Python without our code loads it and must find the same logits on a clip.

    Example: align export runs/demo --to exported
    """
    from align.models.qwen2_audio.portable import DoesNotLoad
    from align.release.export import export as write
    from align.release.policy_files import NoPolicy
    from align.release.registry import RegistryDown

    try:
        done = write(run, to, registry_uri(run))
    except (NoPolicy, FileExistsError, FileNotFoundError) as error:
        fail(str(error), 2)
    except (DoesNotLoad, RegistryDown, LookupError) as error:
        fail(str(error), 1)
    merged = f", {len(done.policy.adapters)} adapters merged" if done.policy.adapters else ""
    print(f"{done.policy.name} -> {to}: {done.n_parameters:,} parameters{merged}")
    print(
        f"plain transformers loads it; logits differ by at most {done.loaded.difference:.2g} "
        f"of {done.loaded.largest:.3g}. Read {to / 'README.md'} before publishing"
    )
