"""Export a policy: one folder that plain transformers loads, whole or absent, checked before it appears."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio import portable
from align.models.qwen2_audio.portable import Loaded
from align.release import model_card
from align.release.policy_files import PolicyFiles, find
from align.run_folder.artifacts import commit_folder
from preference_data.audio.decode import SAMPLE_RATE
from preference_data.store import write_text


class Exported(NamedTuple):
    """The exported policy, and the result of loading it in a fresh Python with plain transformers."""

    policy: PolicyFiles
    n_parameters: int
    loaded: Loaded


def export(named: str, to: Path, tracking_uri: str) -> Exported:
    """Write the policy behind `named` (see `policy_files.find`) to the new folder `to`.

    Adapters are merged; a README.md says where it comes from. Takes the memory of the model once, and of
    the check's own copy.

    Raises:
        FileExistsError: `to` is there already.
        NoPolicy, LookupError, RegistryDown: there is no such policy, or it cannot be had.
        DoesNotLoad: the folder failed its check; nothing is left behind.
    """
    if to.exists():
        raise FileExistsError(f"{to} is there already; remove it or name another folder")
    partial = to.with_name(f".partial-{to.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            policy = find(named, tracking_uri, Path(scratch))
            partial.mkdir(parents=True)
            exported = _write(policy, partial, Path(scratch))
        commit_folder(partial, to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return exported


def _write(policy: PolicyFiles, folder: Path, scratch: Path) -> Exported:
    model = portable.merged(policy.model, policy.adapters)
    processor = qwen2_audio.load_processor(policy.model)
    portable.write(model, processor, folder)
    loaded = portable.verify(model, processor, folder, scratch)
    checked = (
        "Checked on export: in a fresh Python with transformers alone, the logits of a question about a clip "
        f"differed by at most {loaded.difference:.2g} (the largest is {loaded.largest:.3g})."
    )
    heard_s = processor.feature_extractor.n_samples / SAMPLE_RATE
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    write_text(folder / "README.md", model_card.write(policy, heard_s, n_parameters, checked))
    return Exported(policy, n_parameters, loaded)
