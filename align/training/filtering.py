"""Chats that SFT leaves out: counted by reason, listed by id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from align.run_folder.artifacts import StageFolder
from align.training import ranks
from preference_data.dataset.filters import Limits, review
from preference_data.schema import Chat
from preference_data.store import write_rows

Effects = Callable[[Sequence[Chat]], Sequence[float]]
"""What the clips are worth to each chat, in nats per token; see `audio_effect`."""


class Kept(NamedTuple):
    """Numbers of the chats that stay, in order, and what became of all, for the metrics."""

    numbers: list[int]
    counts: dict[str, float]


def keep(
    chats: Sequence[Chat],
    limits: Limits,
    out: StageFolder,
    min_audio_effect: float | None = None,
    effects: Effects | None = None,
) -> Kept:
    """Review all chats; those left out are listed in `left_out.jsonl`. All ranks find the same.

    With `min_audio_effect`, `effects` is asked about the chats with clips that pass the rest.

    Raises:
        ValueError: none is left.
    """
    reasons: list[str | None] = list(review(chats, limits))
    if min_audio_effect is not None and effects is not None:
        numbers = [i for i, chat in enumerate(chats) if reasons[i] is None and chat.audios]
        for i, effect in zip(numbers, effects([chats[i] for i in numbers]), strict=True):
            if effect < min_audio_effect:
                reasons[i] = "needs_no_audio"
    left_out = [(chat.id, reason) for chat, reason in zip(chats, reasons, strict=True) if reason]
    if ranks.is_first():
        write_rows(out.path / "left_out.jsonl", [{"id": name, "reason": reason} for name, reason in left_out])
    by_reason = Counter(reason for _, reason in left_out)
    if len(left_out) == len(chats):
        raise ValueError(f"filters leave none of {len(chats)} chats: {dict(by_reason)}; loosen them")
    counts = {f"left_out_{reason}": float(n) for reason, n in sorted(by_reason.items())}
    numbers = [i for i, reason in enumerate(reasons) if reason is None]
    return Kept(numbers, {"chats": float(len(chats)), "chats_kept": float(len(numbers)), **counts})
