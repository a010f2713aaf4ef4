"""A clip is in one split, and whoever is heard in the benchmark is heard nowhere else."""

from __future__ import annotations

from collections.abc import Collection

from preference_data.fingerprints import Fingerprints, fingerprint
from preference_data.schema import AudioClip, Split

SPLITS: tuple[Split, ...] = ("train", "preference", "dev", "test")
_BENCHMARK: tuple[Split, ...] = ("dev", "test")


class Leak(ValueError):
    """The same audio or the same speaker on both sides of a split."""


def check(clips: Collection[AudioClip]) -> None:
    """Refuse clips that would make a result look better than it is. Train and preference share speakers.

    Goes through `clips` once and, if something looks wrong, once more; keeps 9 bytes per clip, and a record
    id per speaker and split.

    Raises:
        Leak: naming two records that share their audio across splits, or their speaker across a
            benchmark split and any other.
    """
    audio = Fingerprints()
    by_speaker: dict[str, dict[Split, str]] = {}
    for clip in clips:
        audio.add(clip.sha256, SPLITS.index(clip.split))
        if clip.speaker is not None:
            by_speaker.setdefault(clip.speaker, {}).setdefault(clip.split, clip.id)
    if suspects := audio.repeated(with_other_label=True):
        _refuse_shared_audio([clip for clip in clips if fingerprint(clip.sha256) in suspects])
    for speaker, heard in by_speaker.items():
        for benchmark in _BENCHMARK:
            others = [split for split in heard if split != benchmark]
            if benchmark in heard and others:
                raise Leak(
                    f"speaker {speaker!r} is heard in records {heard[benchmark]!r} ({benchmark}) and "
                    f"{heard[others[0]]!r} ({others[0]}); hold a speaker of {benchmark} out of all else"
                )


def _refuse_shared_audio(clips: Collection[AudioClip]) -> None:
    by_audio: dict[str, AudioClip] = {}
    for clip in clips:
        same = by_audio.setdefault(clip.sha256, clip)
        if same.split != clip.split:
            raise Leak(
                f"records {same.id!r} ({same.split}) and {clip.id!r} ({clip.split}) are the same audio "
                f"(sha256 {clip.sha256[:12]}…); keep it in one split"
            )
