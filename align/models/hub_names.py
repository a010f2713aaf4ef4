"""What Qwen2-Audio's tensors are called: in transformers 5's modules and in checkpoints on the Hub.

The released checkpoints, transformers 4 and vLLM say `language_model.model.layers.0...`; transformers 5
renamed its modules to `model.language_model.layers.0...` and translates when it reads and writes. When a
ZeRO-3 run is saved, that translation meets itself and leaves `language_model.model.model.layers.0...`,
which only transformers 5 can read.
"""

from __future__ import annotations

_RENAMED = (
    ("model.language_model.", "language_model.model."),
    ("model.audio_tower.", "audio_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
"""Prefix of the module's name, prefix on the Hub."""


def hub_name(module_name: str) -> str:
    """The name that a parameter of Qwen2AudioForConditionalGeneration has on the Hub.

    Raises:
        ValueError: it is none of that model's.
    """
    for ours, theirs in _RENAMED:
        if module_name.startswith(ours):
            return theirs + module_name.removeprefix(ours)
    raise ValueError(f"{module_name!r} is no parameter of Qwen2-Audio")
