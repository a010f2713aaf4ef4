"""From a sealed checkpoint to the policy that later stages read: plain weights under the Hub's names.

Whatever trained it (one process, ZeRO's parts, low-rank updates), the result is what
`from_pretrained` of plain transformers loads.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from align.models.qwen2_audio import model as qwen2_audio
from align.training.lora import merged

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def publish(checkpoint: Path, base: Path | str | None, processor: Qwen2AudioProcessor, out: Path) -> None:
    """Write `out/model` and, where low-rank updates were trained on `base`, `out/adapter`."""
    qwen2_audio.save(_load(checkpoint, base), processor, out / "model")
    if _is_adapter(checkpoint):
        (out / "adapter").mkdir(exist_ok=True)
        for name in _ADAPTER:
            shutil.copyfile(checkpoint / name, out / "adapter" / name)


@contextmanager
def as_policy(checkpoint: Path, base: Path | str, processor: Qwen2AudioProcessor) -> Iterator[Path]:
    """A folder with the checkpoint's policy as plain weights, for as long as the block runs."""
    if not _is_adapter(checkpoint):
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=".merged-") as folder:
        qwen2_audio.save(_load(checkpoint, base), processor, Path(folder))
        yield Path(folder)


def _is_adapter(checkpoint: Path) -> bool:
    return (checkpoint / _ADAPTER[0]).exists()


def _load(checkpoint: Path, base: Path | str | None) -> Qwen2AudioForConditionalGeneration:
    if not _is_adapter(checkpoint):
        return qwen2_audio.load_model(checkpoint)
    if base is None:
        raise ValueError(f"{checkpoint} holds low-rank updates, but not of which policy")
    return merged(base, checkpoint)
