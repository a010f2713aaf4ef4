"""Clips -> log-mel features, each clip decoded and transformed once.

Features of recently used clips stay in memory up to a byte limit, because every training stage sees
each clip several times and the mel transform costs as much as a small model's forward pass.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import ProcessorMixin

from align.models.tower_outputs import TowerOutputs
from align.run_folder.artifacts import sha256_json
from preference_data.audio.decode import SAMPLE_RATE, inspect, load
from preference_data.dataset.dataset import Dataset

_SHORTEST = SAMPLE_RATE // 10
"""Samples. Below ~70 ms a clip has one token at most; transformers then takes a legacy path that crashes."""


class Clip(NamedTuple):
    """`mel` (M, F): `n_frames` frames of the clip, then silent ones; the stock model wants `n_padded` in all.

    The last frame hears nothing of the clip any more, so that all further ones would equal it.

    Where `TowerOutputs` were looked at, `name` is the clip's name there, and `outputs` (V, d) what they had
    for it: then nothing else was computed, and `mel` is empty.
    """

    mel: Tensor
    n_frames: int
    n_padded: int
    name: str | None = None
    outputs: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return self.mel.nbytes + (0 if self.outputs is None else self.outputs.nbytes)

    def padded(self) -> Clip:
        """The clip with the silence up to the stock model's fixed length."""
        missing = self.n_padded - self.mel.shape[-1]
        return self._replace(mel=torch.cat([self.mel, self.mel[:, -1:].expand(-1, missing)], dim=1))


class ClipFeatures:
    """Looks up features of clips under `root`; keeps up to `cache_bytes` of them.

    A clip longer than `longest_s` is refused; without it, one longer than the model hears. Of a clip in
    between the model hears the beginning.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        root: Path,
        *,
        longest_s: float | None = None,
        cache_bytes: int = 1 << 30,
    ) -> None:
        self.extractor = processor.feature_extractor
        self.root = root
        self._files = Dataset(root)
        self.longest_s = longest_s or self.extractor.n_samples / SAMPLE_RATE
        self.cache_bytes = cache_bytes
        self._clips: OrderedDict[tuple[Path | None, str], Clip] = OrderedDict()
        self._bytes = 0

    def __call__(self, paths: Sequence[str], tower_outputs: TowerOutputs | None = None) -> list[Clip]:
        """Features of clips given by their path relative to `root`, in that order.

        Of a clip of which `tower_outputs` holds the outputs, those alone.
        """
        tower = None if tower_outputs is None else tower_outputs.folder
        distinct = dict.fromkeys(paths)
        clips = {path: self._clips[tower, path] for path in distinct if (tower, path) in self._clips}
        new = [path for path in distinct if path not in clips]
        clips |= self._compute(new) if tower_outputs is None else self._look_up(new, tower_outputs)
        for path, clip in clips.items():
            if clip.name is None or clip.outputs is not None:  # else its outputs will be kept soon
                self._keep((tower, path), clip)
        return [clips[path] for path in paths]

    def per_row(
        self, rows: Sequence[Sequence[str]], tower_outputs: TowerOutputs | None = None
    ) -> list[list[Clip]]:
        """Features of each row's clips; new ones of all rows are computed together, in half the time."""
        clips = iter(self([path for row in rows for path in row], tower_outputs))
        return [[next(clips) for _ in row] for row in rows]

    def name(self, path: str) -> str:
        """Digest of all that a clip's features depend on: its bytes, and how they are heard.

        Raises:
            BadAudio: the file is refused by its header.
        """
        sound = inspect(self._files.find(path), max_duration_s=self.longest_s)
        return sha256_json([sound.sha256, type(self).__name__, self._hearing])

    @cached_property
    def _hearing(self) -> dict[str, Any]:
        """Of the feature extractor, all that its features depend on."""
        about: dict[str, Any] = self.extractor.to_dict()
        return about

    def wave(self, path: str) -> np.ndarray:
        """Samples (S,) of a clip at 16 kHz, as far as the model hears them."""
        return audible(self.extractor, load(self._files.find(path), max_duration_s=self.longest_s))

    def _compute(self, paths: list[str]) -> dict[str, Clip]:
        return dict(zip(paths, mel_features(self.extractor, map(self.wave, paths)), strict=True))

    def _look_up(self, paths: list[str], tower_outputs: TowerOutputs) -> dict[str, Clip]:
        """What is kept of the clips, and features of the others.

        Those are computed one by one, because beside other clips their last bits could be others.
        """
        names = {path: self.name(path) for path in paths}
        found = {path: outputs for path in paths if (outputs := tower_outputs.get(names[path]))}
        new = [path for path in paths if path not in found]
        computed = {path: clip for path in new for clip in self._compute([path]).values()}
        most, nothing = self.extractor.nb_max_frames, torch.empty(self.extractor.feature_size, 0)
        return {
            **{path: clip._replace(name=names[path]) for path, clip in computed.items()},
            **{
                path: Clip(nothing, outputs.n_frames, most, names[path], outputs.vectors)
                for path, outputs in found.items()
            },
        }

    def __getstate__(self) -> dict[str, Any]:
        """A copy for another process begins with an empty cache."""
        return {**self.__dict__, "_clips": OrderedDict(), "_bytes": 0}

    def _keep(self, key: tuple[Path | None, str], clip: Clip) -> None:
        """As the most recently used; the least recently used go."""
        if key not in self._clips:
            self._clips[key] = clip
            self._bytes += clip.nbytes
        self._clips.move_to_end(key)
        while self._bytes > self.cache_bytes:
            _, dropped = self._clips.popitem(last=False)
            self._bytes -= dropped.nbytes


class SilentClips(ClipFeatures):
    """Digital silence in the place of each clip, and as long: what a policy says without hearing it."""

    def wave(self, path: str) -> np.ndarray:
        """Zeros (S,), as many as the clip has samples."""
        return np.zeros_like(super().wave(path))


def audible(extractor: Any, wave: np.ndarray) -> np.ndarray:
    """A clip's samples (S,) as far as the model hears them, with silence behind the shortest ones."""
    wave = wave[: extractor.n_samples]
    return np.pad(wave, (0, max(0, _SHORTEST - len(wave))))


def n_frames(extractor: Any, wave: np.ndarray) -> int:
    """Mel frames of a clip's samples (S,)."""
    return min(-(-len(wave) // extractor.hop_length), extractor.nb_max_frames)


def mel_features(extractor: Any, waves: Iterable[np.ndarray]) -> list[Clip]:
    """Features of `audible` clips, all computed together."""
    waves = list(waves)
    if not waves:
        return []
    most, own_frames = extractor.nb_max_frames, [n_frames(extractor, wave) for wave in waves]
    # Frames after a clip up to the first that hears nothing of it; a window is centred on its frame. With
    # that much silence the transform mirrors nothing of the clip at its end: frames are those of a clip
    # padded to the model's length, which costs as much for 1 s as for 30 s.
    n_silent = -(-(extractor.n_fft // 2) // extractor.hop_length) + 1
    lengths = [min(n + n_silent, most) for n in own_frames]
    mels = extractor(
        waves,
        sampling_rate=SAMPLE_RATE,
        padding="max_length",
        max_length=max(lengths) * extractor.hop_length,
    )["input_features"]
    return [
        Clip(torch.tensor(mel[:, :length]), n, most)
        for mel, n, length in zip(mels, own_frames, lengths, strict=True)
    ]


def stack(clips: Sequence[Clip]) -> dict[str, Tensor]:
    """The stock model's inputs of C clips: input_features (C, M, F), feature_attention_mask (C, F)."""
    if not clips:
        return {}
    frames = torch.arange(clips[0].n_padded)
    lengths = torch.tensor([clip.n_frames for clip in clips])
    return {
        "input_features": torch.stack([clip.padded().mel for clip in clips]),
        "feature_attention_mask": (frames[None] < lengths[:, None]).long(),
    }
