"""A synthetic world whose facts are known: speech, sound events, music, and speech over a background.

Four categories as in AIR-Bench chat, equally often, 3 s each. Voices come from espeak-ng variants;
train and preference share theirs, dev and test have their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from preference_data.audio.decode import SAMPLE_RATE
from preference_data.dataset.splits import SPLITS
from preference_data.schema import AudioClip, Facts, Split
from preference_data.toy_world import espeak, sounds
from preference_data.toy_world.clip_files import ClipWriter, PreparedClips
from preference_data.toy_world.phrasebook import Phrasebook
from preference_data.toy_world.sounds import Samples

CLIP_S = 3.0
CATEGORIES = ("speech", "sound", "music", "mixed")
_NAMES = ("one", "two", "three", "four")
_LEARNING_VOICES = {
    "man": ("m1", "m2", "m3", "m5", "Mike", "Gene", "Lee", "Reed"),
    "woman": ("f1", "f2", "f3", "Annie", "Alicia", "linda"),
}
VOICES: dict[Split, dict[str, tuple[str, ...]]] = {
    "train": _LEARNING_VOICES,
    "preference": _LEARNING_VOICES,
    "dev": {"man": ("m4", "Michael"), "woman": ("f5", "anika")},
    "test": {"man": ("m7", "paul", "john"), "woman": ("f4", "steph", "Andrea")},
}
"""espeak-ng variants of en-us, by gender."""
_PER_VOICE = 6
"""Utterances of each word by each voice; clips draw from them."""


class _Spoken(NamedTuple):
    voice: str
    samples: Samples


_Pool = Mapping[tuple[str, str], list[_Spoken]]
"""(word, gender) -> utterances."""


class _Scene(NamedTuple):
    """A clip before it is a file."""

    samples: Samples
    facts: Facts
    speaker: str | None


def prepare(
    out: Path,
    phrasebook: Phrasebook,
    *,
    counts: Mapping[str, int],
    seed: int = 0,
    on_progress: Callable[[int], object] | None = None,
) -> PreparedClips:
    """Make the clips of each split; the same seed gives the same bytes.

    Args:
        out: where the audio goes.
        phrasebook: the corpus' own.
        counts: clips per split.
        seed: draws everything. A clip depends on it and on its own number only.
        on_progress: called with the number of clips so far.

    Raises:
        SpeechError: the speech synthesiser does not work here.
    """
    pools = _pools([split for split in SPLITS if counts.get(split)], phrasebook, seed)
    writer = ClipWriter(out, phrasebook, "synthetic")
    clips: list[AudioClip] = []
    for number, split in enumerate(SPLITS):
        for i in range(counts.get(split, 0)):
            rng = np.random.default_rng([seed, number, i])
            category = CATEGORIES[i % len(CATEGORIES)]
            scene = _scene(category, pools[split], phrasebook, rng)
            clip_id = f"synthetic-{split}-{i:05d}"
            clips.append(
                writer.write(
                    clip_id, split, scene.samples, scene.facts, speaker=scene.speaker, source="synthetic"
                )
            )
            if on_progress:
                on_progress(len(clips))
    return PreparedClips(clips, [])


def _pools(splits: list[Split], phrasebook: Phrasebook, seed: int) -> dict[Split, _Pool]:
    """The utterances of each split, each set of voices spoken once and at the same time."""
    words = phrasebook.slots["word"].values
    casts = {tuple(VOICES[split].items()): split for split in reversed(splits)}
    with ThreadPoolExecutor(max_workers=len(casts) or 1) as threads:
        spoken = threads.map(lambda cast: _pool(dict(cast), words, seed), casts)
        pools = dict(zip(casts, spoken, strict=True))
    return {split: pools[tuple(VOICES[split].items())] for split in splits}


def _pool(voices: dict[str, tuple[str, ...]], words: tuple[str, ...], seed: int) -> _Pool:
    plan: list[tuple[str, str, str]] = [
        (word, gender, voice)
        for gender, names in voices.items()
        for voice in names
        for word in words
        for _ in range(_PER_VOICE)
    ]
    rng = np.random.default_rng([seed, len(SPLITS)])
    utterances = [
        espeak.Utterance(
            word,
            f"en-us+{voice}",
            rate=int(rng.integers(140, 200)),
            pitch=int(rng.integers(35, 65)),
            pitch_range=int(rng.integers(30, 70)),
        )
        for word, _, voice in plan
    ]
    pool: dict[tuple[str, str], list[_Spoken]] = defaultdict(list)
    for (word, gender, voice), samples in zip(plan, espeak.say_all(utterances), strict=True):
        pool[word, gender].append(_Spoken(voice, 0.6 * samples / np.abs(samples).max()))
    return pool


def _scene(category: str, pool: _Pool, phrasebook: Phrasebook, rng: Generator) -> _Scene:
    if category == "sound":
        scene = _sound(rng)
    elif category == "music":
        scene = _music(phrasebook, rng)
    else:
        scene = _speech(pool, phrasebook, rng)
        if category == "mixed":
            background = str(rng.choice(list(sounds.BACKGROUNDS)))
            scene.samples[:] += sounds.BACKGROUNDS[background](CLIP_S, rng)
            scene.facts["background"] = background
    recorded = scene.samples * rng.uniform(0.5, 1.0)
    hiss = rng.uniform(0.0003, 0.002) * rng.standard_normal(len(recorded), dtype=np.float32)
    return scene._replace(samples=recorded + hiss)


def _silence() -> Samples:
    return np.zeros(int(CLIP_S * SAMPLE_RATE))


def _speech(pool: _Pool, phrasebook: Phrasebook, rng: Generator) -> _Scene:
    word = str(rng.choice(phrasebook.slots["word"].values))
    gender = str(rng.choice(phrasebook.slots["gender"].values))
    utterances = pool[word, gender]
    spoken = utterances[int(rng.integers(len(utterances)))]
    buffer = _silence()
    sounds.add(buffer, spoken.samples, rng.uniform(0.05, 1.0))
    return _Scene(buffer, {"word": word, "gender": gender}, spoken.voice)


def _sound(rng: Generator) -> _Scene:
    """One kind one to four times, or two kinds one after the other, once or twice each."""
    two = rng.random() < 0.4
    kinds = [str(kind) for kind in rng.choice(list(sounds.EVENTS), 2 if two else 1, replace=False)]
    times = [int(rng.integers(1, 3)) for _ in kinds] if two else [int(rng.integers(1, 5))]
    buffer, at_s, step_s = _silence(), rng.uniform(0.05, 0.3), rng.uniform(0.48, 0.6)
    for kind in np.repeat(kinds, times):
        sounds.add(buffer, rng.uniform(0.7, 1) * sounds.EVENTS[str(kind)](rng), at_s)
        at_s += step_s
    count = _NAMES[sum(times) - 1]
    facts: Facts = {"first": kinds[0], "last": kinds[1]} if two else {"event": kinds[0]}
    return _Scene(buffer, {**facts, "count": count}, None)


def _music(phrasebook: Phrasebook, rng: Generator) -> _Scene:
    drawn = {
        slot: str(rng.choice(phrasebook.slots[slot].values)) for slot in ("instrument", "direction", "tempo")
    }
    samples = sounds.melody(CLIP_S, drawn["instrument"], drawn["direction"], drawn["tempo"], rng)
    return _Scene(samples, {**drawn}, None)
