"""A clip is in one split, and whoever is heard in the benchmark is heard nowhere else."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

from preference_data.dataset.fingerprints import Fingerprints, fingerprint
from preference_data.schema import AudioClip, Split

SPLITS: tuple[Split, ...] = ("train", "preference", "dev", "test")
HELD_OUT: tuple[Split, ...] = ("dev", "test")
"""Splits that nothing is trained on."""
HeldOut = Mapping[Literal["dev", "test"], Sequence[str]]
"""Speakers kept out of training, per split."""


class Leak(ValueError):
    """The same audio or the same speaker on both sides of a split."""


def check(clips: Collection[AudioClip]) -> None:
    """Refuse clips that would make a result look better than it is. Train and preference share speakers.

    Goes through `clips` twice or thrice; keeps 9 bytes per clip, and a record id per speaker and split.

    Raises:
        Leak: naming two records that share their audio across splits, or their speaker across a
            benchmark split and any other.
    """
    check_audio(clips)
    for speaker, heard in _heard(clips).items():
        for benchmark in HELD_OUT:
            others = [split for split in heard if split != benchmark]
            if benchmark in heard and others:
                raise Leak(
                    f"speaker {speaker!r} is heard in records {heard[benchmark]!r} ({benchmark}) and "
                    f"{heard[others[0]]!r} ({others[0]}); hold a speaker of {benchmark} out of all else"
                )


def check_audio(clips: Collection[AudioClip]) -> None:
    """Refuse the same audio in two splits, as `check` does.

    Raises:
        Leak: it is.
    """
    audio = Fingerprints()
    for clip in clips:
        audio.add(clip.sha256, SPLITS.index(clip.split))
    if not (suspects := audio.repeated(with_other_label=True)):
        return
    by_audio: dict[str, AudioClip] = {}
    for clip in clips:
        if fingerprint(clip.sha256) in suspects:
            same = by_audio.setdefault(clip.sha256, clip)
            if same.split != clip.split:
                raise Leak(
                    f"records {same.id!r} ({same.split}) and {clip.id!r} ({clip.split}) are the same audio "
                    f"(sha256 {clip.sha256[:12]}…); keep it in one split"
                )


def speakers_on_both_sides(clips: Iterable[AudioClip]) -> int:
    """How many speakers of a benchmark split are also heard in training: some publishers split that way."""
    heard = _heard(clips).values()
    return sum(any(s in HELD_OUT for s in own) and any(s not in HELD_OUT for s in own) for own in heard)


def _heard(clips: Iterable[AudioClip]) -> dict[str, dict[Split, str]]:
    """Speaker -> split -> the first record of theirs in it."""
    heard: dict[str, dict[Split, str]] = {}
    for clip in clips:
        if clip.speaker is not None:
            heard.setdefault(clip.speaker, {}).setdefault(clip.split, clip.id)
    return heard
