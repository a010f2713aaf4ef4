"""How long examples are, from their texts and the corpus' table of clips. No clip is opened."""

from __future__ import annotations

import hashlib
import heapq
import math
from array import array
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Qwen2AudioProcessor

from align.models.chat import encode_completion, encode_prompt, user
from align.models.qwen2_audio.clips import n_audio_tokens
from align.planning import estimate
from align.planning.estimate import Job, Shape, Strategy
from align.training.collate import Row, encode_row
from align.training.order import Examples
from preference_data.audio.decode import SAMPLE_RATE
from preference_data.dataset.dataset import Dataset
from preference_data.schema import AudioClip

_BYTES_PER_TOKEN = 4
"""Of text: about right for all scripts. For comparing examples only."""
_LOOKED_AT = 2048
"""Draws of a run whose texts are measured in bytes."""
_TOKENISED = 32
"""Of them the longest, whose tokens are counted."""
_LONGER = 1.25
"""Times as long the text of a draw may be at which nobody looked."""


class ClipTokens:
    """Audio tokens of the clips to train on, by path: 10 bytes a clip.

    A clip that is not in the table counts as long as the model hears.
    """

    def __init__(self, clips: Iterable[AudioClip], processor: Qwen2AudioProcessor) -> None:
        extractor = processor.feature_extractor
        self._hop, self._most = extractor.hop_length, extractor.nb_max_frames
        hashes, tokens = array("Q"), array("H")
        for clip in clips:
            if clip.split in ("train", "preference"):
                hashes.append(_hash(clip.path))
                tokens.append(self._of(clip.duration_s))
        order = np.argsort(np.array(hashes, dtype=np.uint64), kind="stable")
        self._hashes = np.array(hashes, dtype=np.uint64)[order]
        self._tokens = np.array(tokens, dtype=np.uint16)[order]

    def _of(self, seconds: float) -> int:
        frames = math.ceil(seconds * SAMPLE_RATE / self._hop)
        return max(1, n_audio_tokens(min(frames, self._most)))

    def __getitem__(self, path: str) -> int:
        key = np.uint64(_hash(path))
        at = int(np.searchsorted(self._hashes, key))
        known = at < len(self._hashes) and self._hashes[at] == key
        return int(self._tokens[at]) if known else n_audio_tokens(self._most)

    @property
    def longest(self) -> int:
        """Of any clip."""
        return int(self._tokens.max(initial=0))


def _hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest())


class Lengths:
    """Of rows for the collators. The corpus' table of clips is read when it is needed, and then once."""

    def __init__(self, corpus: Path, processor: Qwen2AudioProcessor) -> None:
        self.corpus = corpus
        self.processor = processor

    @cached_property
    def clips(self) -> ClipTokens:
        """Of the corpus."""
        return ClipTokens(Dataset(self.corpus).table(AudioClip), self.processor)

    def __getstate__(self) -> dict[str, Any]:
        """A copy for another process takes the table along."""
        return {**self.__dict__, "clips": self.clips}

    def cost(self, row: Row) -> float:
        """About how many tokens a row has: what its passes cost, compared with another's."""
        return self._audio(row) + _text_bytes(row) / _BYTES_PER_TOKEN

    def longest_pair(self, rows: Iterable[Row], job: Job, shape: Shape, strategy: Strategy) -> Job:
        """`job` with the lengths of the pair that keeps most activations: all are tokenised."""
        jobs = (self._of_pair(row, job) for row in rows)
        return max(jobs, key=lambda one: estimate.activations(shape, one, strategy))

    def longest_example(self, examples: Examples, job: Job) -> Job:
        """`job` with the longest clip of the corpus, or clips of an example, and the longest text.

        Of 2,048 draws spread over the run the 32 with most bytes are tokenised; where a run has more draws
        than that, a quarter is added to their longest text.
        """
        step = max(1, len(examples) // _LOOKED_AT)
        rows = [examples[n] for n in range(0, len(examples), step)]
        n_clips = max(1, *(len(row["audios"]) for row in rows))
        audio = max(self.clips.longest, *(self._audio(row) for row in rows))
        longest = heapq.nlargest(_TOKENISED, rows, key=_text_bytes)
        text = max(len(encode_row(self.processor, row).ids) for row in longest)
        text = math.ceil(text * _LONGER) if step > 1 else text
        return job._replace(clips=n_clips, audio_tokens=math.ceil(audio / n_clips), text_tokens=text)

    def _of_pair(self, row: Row, job: Job) -> Job:
        n_clips = len(row["audios"])
        prompt = encode_prompt(self.processor, [user(row["question"], n_clips)]).ids
        answers = [len(encode_completion(self.processor, row[side]).ids) for side in ("chosen", "rejected")]
        # Packed, the prompt counts once for both; else rows are as long as the longer one
        text = math.ceil((len(prompt) + sum(answers)) / 2) if job.packed else len(prompt) + max(answers)
        audio = math.ceil(self._audio(row) / max(1, n_clips))
        return job._replace(
            clips=n_clips if job.packed else 2 * n_clips, audio_tokens=audio, text_tokens=text
        )

    def _audio(self, row: Row) -> int:
        return sum(self.clips[path] for path in row["audios"])


def _text_bytes(row: Row) -> int:
    return sum(len(text.encode()) for text in _texts(row))


def _texts(row: Row) -> Sequence[str]:
    if "chosen" in row:
        return row["question"], row["chosen"], row["rejected"]
    if row["messages"] is None:
        return row["prompt"], row["completion"]
    return [part["text"] or "" for message in row["messages"] for part in message["content"]]
