"""A clip is in one split, and whoever is heard in the benchmark is heard nowhere else."""

from __future__ import annotations

from collections.abc import Iterable

from preference_data.schema import AudioClip, Split

_BENCHMARK: tuple[Split, ...] = ("dev", "test")


class Leak(ValueError):
    """The same audio or the same speaker on both sides of a split."""


def check(clips: Iterable[AudioClip]) -> None:
    """Refuse clips that would make a result look better than it is. Train and preference share speakers.

    Raises:
        Leak: naming two records that share their audio across splits, or their speaker across a
            benchmark split and any other.
    """
    by_audio: dict[str, AudioClip] = {}
    by_speaker: dict[str, dict[Split, AudioClip]] = {}
    for clip in clips:
        same = by_audio.setdefault(clip.sha256, clip)
        if same.split != clip.split:
            raise Leak(
                f"records {same.id!r} ({same.split}) and {clip.id!r} ({clip.split}) are the same audio "
                f"(sha256 {clip.sha256[:12]}…); keep it in one split"
            )
        if clip.speaker is not None:
            by_speaker.setdefault(clip.speaker, {}).setdefault(clip.split, clip)
    for speaker, heard in by_speaker.items():
        for benchmark in _BENCHMARK:
            others = [clip for split, clip in heard.items() if split != benchmark]
            if benchmark in heard and others:
                raise Leak(
                    f"speaker {speaker!r} is heard in records {heard[benchmark].id!r} ({benchmark}) and "
                    f"{others[0].id!r} ({others[0].split}); hold a speaker of {benchmark} out of all else"
                )
