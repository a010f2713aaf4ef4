"""How long examples are, from their texts and the corpus' table of clips. No clip is opened."""

from __future__ import annotations

import hashlib
import heapq
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import Qwen2AudioProcessor

from align.models.qwen2_audio.clips import n_audio_tokens
from align.training.collate import Row, encode_pair, encode_row
from align.training.data_loading import Examples
from preference_data.audio.decode import SAMPLE_RATE
from preference_data.dataset.dataset import Dataset
from preference_data.schema import AudioClip

_BYTES_PER_TOKEN = 4
"""Of text: about right for all scripts. For comparing examples only."""
_DRAWS = 2048
"""Examples of a run that are compared by the bytes of their texts."""
_TOKENISED = 32
"""The longest of them, whose tokens are counted."""
_OF_TEMPLATE = 32
"""Most tokens of a chat template for a message or a clip; the first message has a system prompt, too."""
_LONGER = 1.25
"""Times as long the text of an example may be that was not compared."""


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


class Longest(NamedTuple):
    """A long example, and how many times as long the longest one of the run may be.

    `further_tokens` may follow those of its row in a sequence: completions that are drawn in training.
    """

    row: Row
    factor: float = 1.0
    further_tokens: int = 0


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
        """About how many tokens a row has: what its micro-batch costs, compared with another's."""
        return self._audio(row) + _text_bytes(row) / _BYTES_PER_TOKEN

    def tokens(self, row: Row, *, packed: bool = True) -> int:
        """Tokens that the language model reads of a row, but for the template's own.

        Packed, a pair's prompt counts once; else its two rows are as long as the longer one.
        """
        audio = self._audio(row)
        texts = [len(self.processor.tokenizer(text).input_ids) for text in _texts(row)]
        if "chosen" in row and not packed:
            return 2 * (audio + sum(texts[:-2]) + max(texts[-2:]))
        return audio + sum(texts)

    def exact_tokens(self, row: Row) -> int:
        """Tokens that the language model reads of a row, with the template's; of a pair's longer side."""
        encoded = encode_pair(self.processor, row) if "chosen" in row else [encode_row(self.processor, row)]
        return self._audio(row) - len(row["audios"]) + max(len(side.ids) for side in encoded)

    def rows_beyond(self, context: int, rows: Iterable[Row]) -> Iterator[tuple[int, Row]]:
        """Rows with more tokens than `context`, and how many they have.

        A token is at least a byte of text: only rows that may be too long by that are tokenised.
        """
        for row in rows:
            n_parts = len(row["audios"]) + len(row.get("messages") or ()) + 2 * len(row.get("history", ()))
            most = self._audio(row) + _text_bytes(row) + _OF_TEMPLATE * (4 + n_parts)
            if most > context and (tokens := self.exact_tokens(row)) > context:
                yield tokens, row

    def longest_pair(self, rows: Iterable[Row], *, packed: bool) -> Longest:
        """The pair with most tokens; the 32 that cost most are tokenised."""
        candidates = heapq.nlargest(_TOKENISED, rows, key=self.cost)
        return Longest(max(candidates, key=lambda row: self.tokens(row, packed=packed)))

    def longest_label(self, rows: Sequence[Row], *, packed: bool) -> Longest:
        """The longest label, as long as with the longest completion of another beside its own."""
        candidates = heapq.nlargest(_TOKENISED, rows, key=self.cost)
        longest = max(candidates, key=self.tokens)
        wordy = heapq.nlargest(_TOKENISED, rows, key=lambda row: len(row["completion"].encode()))
        other = max(map(self._completion, wordy))
        tokens = self.tokens(longest)
        further = max(0, other - self._completion(longest))
        return Longest(longest, 1 + (other if packed else further) / max(1, tokens), further)

    def _completion(self, row: Row) -> int:
        return len(self.processor.tokenizer(row["completion"]).input_ids)

    def longest_group(
        self, rows: Iterable[Row], completions: int, max_new_tokens: int, *, packed: bool
    ) -> Longest:
        """The longest of the prompts with their references, as long as with so many completions instead."""
        candidates = heapq.nlargest(_TOKENISED, rows, key=self.cost)
        longest = max(candidates, key=self.tokens)
        reference = len(self.processor.tokenizer(_texts(longest)[-1]).input_ids)
        prompt = self.tokens(longest) - reference
        group = completions * max_new_tokens + prompt * (1 if packed else completions)
        factor = max(1.0, group / max(1, prompt + reference))
        return Longest(longest, factor, max(0, max_new_tokens - reference))

    def together(self, longest: Longest, *others: Longest) -> Longest:
        """A long example whose activations stand in memory beside those of others."""
        more = sum(self.tokens(other.row) * other.factor for other in others)
        return longest._replace(factor=longest.factor + more / max(1, self.tokens(longest.row)))

    def longest_example(self, examples: Examples) -> Longest:
        """The longest of 2,048 draws spread over the run.

        The longest of the run may have the corpus' longest clip and the longest of these texts, and, where
        it has more draws than that, a quarter more text.
        """
        step = max(1, len(examples) // _DRAWS)
        rows = [examples[n] for n in range(0, len(examples), step)]
        candidates = heapq.nlargest(_TOKENISED, rows, key=self.cost)
        longest = max(candidates, key=self.tokens)
        wordy = heapq.nlargest(_TOKENISED, rows, key=_text_bytes)
        text = max(self.tokens(row) - self._audio(row) for row in wordy)
        audio = max(self.clips.longest, *map(self._audio, rows))
        bound = audio + text * (_LONGER if step > 1 else 1)
        return Longest(longest, max(1.0, bound / max(1, self.tokens(longest))))

    def _audio(self, row: Row) -> int:
        return sum(self.clips[path] for path in row["audios"])


def _text_bytes(row: Row) -> int:
    return sum(len(text.encode()) for text in _texts(row))


def _texts(row: Row) -> Sequence[str]:
    if "chosen" in row:
        earlier = [text for turn in row.get("history", ()) for text in (turn.question, turn.answer)]
        return row.get("system") or "", *earlier, row["prompt"], row["chosen"], row["rejected"]
    if row["messages"] is None:
        return row["prompt"], row["completion"]
    texts = [part["text"] or "" for message in row["messages"] for part in message["content"]]
    return texts if row.get("completion") is None else [*texts, row["completion"]]
