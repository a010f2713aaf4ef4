"""The reference's log-probs of all completions, computed once, before training divides the model, and kept.

TRL computes the same numbers when its trainer is built, but under DeepSpeed through an engine of its own,
whose hooks stay on the model and later meet those of the training engine: with a single batch of pairs
ZeRO-3 then fails (`pop from an empty deque`), and a forward pass in another order waits for ever. Here the
model is still whole: each process computes its share of the batches without an engine, along the policy's own
packed path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Qwen2AudioProcessor

from align.run_folder.artifacts import read_kept, sha256_json
from align.training import processes
from align.training.collate import Row
from preference_data.dataset.dataset import Dataset
from preference_data.schema import AudioClip
from preference_data.store import write_text

Logps = dict[str, list[float]]
"""log p(completion | prompt) of the reference in nats, by the columns in which TRL reads it, in the rows'
order."""
_TEXTS = ("prompt", "chosen", "rejected", "messages", "completion")
"""What the model reads of rows, as far as they have it."""


@dataclass(frozen=True)
class ReferenceStore:
    """A folder of reference log-probs, each file named by a digest of all that they depend on."""

    folder: Path
    clips: Mapping[str, str]
    """Path, as rows name it -> sha256 of the clip's file."""

    @classmethod
    def of_run(cls, run: Path, rows: Iterable[Row], corpus: Path) -> ReferenceStore:
        """The store of a run, which stays when only `beta` or a rate is changed."""
        used = {path for row in rows for path in row["audios"]}
        clips = Dataset(corpus).table(AudioClip)
        return cls(run / ".reference", {clip.path: clip.sha256 for clip in clips if clip.path in used})

    def get(self, key: Mapping[str, Any], rows: Iterable[Row], compute: Callable[[], Logps]) -> Logps:
        """Log-probs that were computed before with this `key` (weights, template, dtype), or are now.

        All ranks call it; rank 0 alone reads and writes.
        """
        path = self.folder / f"{sha256_json({**key, 'rows': self._digest(rows)})}.json"
        logps: Logps | None = read_kept(path) if processes.is_first() else None
        logps = processes.broadcast(logps)
        if logps is None:
            logps = compute()
            if processes.is_first():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(logps))
        return logps

    def _digest(self, rows: Iterable[Row]) -> str:
        """Digest of what the model reads of the rows; neither weights nor labels are part of it."""
        sha = hashlib.sha256()
        for row in rows:
            clips = [self.clips[path] for path in row["audios"]]
            earlier = [row["system"]] if row.get("system") else []
            earlier += [turn.model_dump() for turn in row.get("history", ())]
            texts = [*earlier, *(row[name] for name in _TEXTS if name in row)]
            sha.update(sha256_json([*texts, clips]).encode())
        return sha.hexdigest()


def processor_digest(processor: Qwen2AudioProcessor) -> str:
    """Digest of everything by which a processor turns a row into inputs: template, tokens, features."""
    features = processor.feature_extractor.to_dict()
    return sha256_json([processor.chat_template, processor.tokenizer.backend_tokenizer.to_str(), features])


def batches_of(rank: int, world_size: int, n: int, size: int) -> list[range]:
    """This rank's share of rows 0 to `n` - 1 in batches of `size`: every `world_size`-th batch.

    All ranks get equally many, because a divided model needs all of them in every forward pass: a rank for
    which none is left gets the last batch again.
    """
    batches = [range(start, min(start + size, n)) for start in range(0, n, size)]
    return [batches[min(first + rank, len(batches) - 1)] for first in range(0, len(batches), world_size)]


def merge(mine: Sequence[tuple[range, Logps]], n: int) -> Logps:
    """The log-probs of all ranks' rows together, on all ranks."""
    merged: Logps = {}
    for part in processes.gather(mine):
        for rows, columns in part:
            for name, logps in columns.items():
                merged.setdefault(name, [0.0] * n)[rows.start : rows.stop] = logps
    return merged
