"""When the outputs of a frozen audio tower are kept on disk, and what that takes and saves. Imports no torch.

`align.models.tower_outputs` keeps them; `align check` says beforehand what a stage will do.
"""

from __future__ import annotations

from align.planning import estimate
from align.planning.estimate import Shape

SMALLEST = 1_000_000
"""Parameters of a tower below which a clip takes it a few milliseconds: not worth a file."""


def why_not_kept(
    *,
    packed: bool,
    tower_learns: bool,
    augmented: bool,
    strategy: str,
    tower_parameters: int,
    limit_gb: float | None,
) -> str | None:
    """Why a training stage keeps no outputs of the audio tower; None where it does."""
    if limit_gb == 0:
        return "hardware.tower_outputs_gb is 0"
    if tower_learns:
        return "the audio tower learns"
    if augmented:
        return "features are augmented (augment: all zero switches that off)"
    if not packed:
        return "packed: false encodes clips in transformers' own way"
    if strategy in ("zero3", "fsdp2"):
        return f"{strategy} divides the tower, so that all processes must encode at once"
    if tower_parameters < SMALLEST:
        return f"a tower of {tower_parameters:,} parameters encodes a clip in a few milliseconds"
    return None


def clip_bytes(shape: Shape, seconds: float, element_bytes: int) -> float:
    """That the outputs for a clip take on disk: a vector for each audio token."""
    return float(shape.audio_tokens(seconds) * shape.audio_width * element_bytes)


def clip_flops(shape: Shape, seconds: float) -> float:
    """Of the audio tower on a clip: 2 per weight and frame, of which two become a token."""
    return 2.0 * estimate.parameters(shape).audio_tower * 2 * shape.audio_tokens(seconds)
