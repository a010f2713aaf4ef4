"""Keys of the stage that prepares a corpus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from align.recipe.config.base import (
    Config,
    Conflict,
    NoEffect,
    OutputKind,
    Outside,
    OutsideFolder,
    StageConfig,
)

CLIP_S = 3.0
"""How long a clip of a corpus that is made lasts, at most."""
MADE = ("synthetic", "spoken_digits")
"""Corpora whose clips are made, with facts and a length that are known before."""


_OF_MANIFEST = (
    *("manifest", "audio_root", "check", "questions", "questions_per_clip", "preference_share"),
    *("category", "licence", "licences", "ignore"),
)
_OF_OTHERS = ("dir", "sources", "temperature", "clips", "chats_per_clip", "turns_per_chat", "defect_rate")
"""Keys that a manifest has no use for."""


class ClipCounts(Config):
    """Clips to make per split. Splits share no clip; dev and test share no voice with any other."""

    train: int = Field(ge=1)
    preference: int = Field(ge=1)
    dev: int = Field(ge=1)
    test: int = Field(ge=1)


class DataSetShare(Config):
    """A prepared data set of a mixture."""

    folder: str = Field(min_length=1)
    """Holds `dataset.json` and records, as `align data prepare` writes them."""
    share: float | None = Field(None, gt=0, le=1)
    """Share of the training draws; data sets without one share the rest by size."""


class CorpusConfig(StageConfig):
    """Prepare a corpus: audio files, records, and an evaluation set in AIR-Bench's layout."""

    produces: ClassVar[OutputKind] = "corpus"
    renamed: ClassVar[Mapping[str, str]] = {"made_world": "synthetic"}
    stage: Literal["corpus"]
    corpus: Literal["synthetic", "spoken_digits", "folder", "manifest", "mixture"]
    """A file of `preference_data/corpora/`. `manifest`: your own audio with whatever you know about it;
    `mixture`: prepared data sets. The audio of these two stays where it is."""
    dir: OutsideFolder | None = None
    """Where the recordings are, for corpora of recordings."""
    sources: Annotated[list[DataSetShare], Outside()] = []
    """The data sets of a mixture."""
    temperature: float = Field(1.0, ge=1)
    """In a mixture, data sets without a share are drawn from by size^(1/temperature)."""
    clips: ClipCounts | None = None
    """How many clips to make, for corpora that make or compose them."""
    held_out: dict[Literal["dev", "test"], list[str] | float] = {}
    """Speakers kept out of training, per split, for corpora of recordings. Of a manifest also the share of
    its clips: whole speakers where its rows name them, else files. A row's own split comes before a share."""
    manifest: OutsideFolder | None = None
    """A table of clips (JSON lines, CSV, Parquet, lhotse's cuts), what `datasets` saves, or a folder of
    audio; `preference_data/corpora/manifest_rows.py` names its columns."""
    audio_root: str | None = None
    """Of a manifest: what its paths are relative to, by default its own folder."""
    check: Literal["header", "samples"] = "samples"
    """Of a manifest: decode every clip, or look at its header alone, which is about ten times faster."""
    questions: OutsideFolder | None = None
    """A YAML list of sentences, asked about clips of a manifest whose rows have no question."""
    questions_per_clip: int = Field(1, ge=1)
    """How many of them are asked about a clip; about one with an answer it is one."""
    preference_share: float = Field(0.2, ge=0, le=1)
    """Of a manifest's clips with answers: how many are for preferences instead of SFT. Those without are."""
    category: Literal["speech", "sound", "music", "mixed"] = "mixed"
    """Of a manifest's rows that name none: the column of the evaluation that they count towards."""
    licence: str | None = None
    """Of a manifest's clips whose rows name none."""
    licences: list[str] = []
    """Clips of a manifest with another licence, or with none, are left out."""
    ignore: list[str] = []
    """Columns of a manifest that are not read."""
    pad_to_s: float = Field(CLIP_S, ge=0, le=CLIP_S)
    """Of spoken_digits: clips end in silence up to so many seconds. 0 ends each 0.1 s after its last digit:
    the model then reads a token for 40 ms of speech, and none for silence."""
    chats_per_clip: int = Field(2, ge=1)
    turns_per_chat: int = Field(3, ge=1)
    defect_rate: float = Field(0.5, ge=0, le=1)
    """Share of SFT answers that are wrong on purpose (invented, wrong format, about absent things)."""
    max_bad_fraction: Annotated[float, NoEffect()] = Field(0.01, ge=0, le=1)
    """Stop when more than this share of the audio files is unusable; else quarantine them."""
    max_duration_s: float = Field(3.0, gt=0)
    """Longer clips are bad audio: the model would silently not hear their end."""

    @property
    def has_facts(self) -> bool:
        """Whether it knows what is true of every clip: a manifest and a mixture do not."""
        return self.corpus not in ("manifest", "mixture")

    @property
    def longest_s(self) -> float | None:
        """The longest that a clip may last; None for a mixture, whose limit is often far above its clips."""
        if self.corpus == "mixture":
            return None
        return CLIP_S if self.corpus in MADE else self.max_duration_s

    def describe_work(self, clips: Mapping[str, int]) -> str:
        """Clips per split."""
        counts = self.clips.model_dump() if self.clips else {}
        splits = ", ".join(f"{split} {n:,}" for split, n in counts.items())
        return f"{sum(counts.values()):,} clips ({splits})" if counts else ""

    def conflicts(self) -> Iterator[Conflict]:
        """Each corpus has keys that it needs and keys that it has no use for."""
        yield from self._conflicts_of_manifest()
        if self.corpus != "spoken_digits" and "pad_to_s" in self.model_fields_set:
            yield Conflict("pad_to_s", f"corpus {self.corpus!r} has no pad_to_s: it pads no clip")
        if self.corpus == "mixture":
            yield from self._conflicts_of_mixture()
        if self.corpus in ("manifest", "mixture"):
            return
        if self.sources:
            yield Conflict(
                "sources", f"corpus {self.corpus!r} has no sources; they belong to corpus 'mixture'"
            )
        if self.corpus != "synthetic" and self.dir is None:
            yield Conflict("dir", f"corpus {self.corpus!r} needs dir: the folder of its recordings")
        if self.corpus == "synthetic":
            for key in ("dir", "held_out"):
                if getattr(self, key):
                    yield Conflict(key, f"corpus 'synthetic' makes its own clips and voices: it has no {key}")
        if self.corpus in MADE and self.max_duration_s < CLIP_S:
            message = (
                f"clips of {self.corpus!r} last {CLIP_S:g} s: must allow that, is {self.max_duration_s:g}"
            )
            yield Conflict("max_duration_s", message)
        if self.corpus == "folder" and self.clips:
            yield Conflict("clips", "corpus 'folder' uses every recording: it has no clips")
        if self.corpus != "folder" and self.clips is None:
            yield Conflict("clips", f"corpus {self.corpus!r} needs clips: how many to make per split")

    def _conflicts_of_manifest(self) -> Iterator[Conflict]:
        if self.corpus != "manifest":
            for key in self.model_fields_set.intersection(_OF_MANIFEST):
                yield Conflict(key, f"corpus {self.corpus!r} has no {key}; it belongs to corpus 'manifest'")
            for split, held in self.held_out.items():
                if isinstance(held, float):
                    message = f"{split}: only corpus 'manifest' draws a share; name speakers"
                    yield Conflict("held_out", message)
            return
        if self.manifest is None:
            yield Conflict("manifest", "corpus 'manifest' needs manifest: the table of your clips")
        for key in self.model_fields_set.intersection(_OF_OTHERS):
            yield Conflict(key, f"corpus 'manifest' has no {key}")
        shares = [held for held in self.held_out.values() if isinstance(held, float)]
        if any(not 0 <= share < 1 for share in shares) or sum(shares) >= 1:
            yield Conflict(
                "held_out", "shares lie between 0 and 1, and together leave some clips to learn from"
            )
        if self.questions_per_clip > 1 and self.questions is None:
            yield Conflict("questions_per_clip", "needs questions, a YAML of sentences to draw from")

    def _conflicts_of_mixture(self) -> Iterator[Conflict]:
        if not self.sources:
            yield Conflict("sources", "corpus 'mixture' needs sources")
        for key in ("dir", "clips", "held_out"):
            if getattr(self, key):
                yield Conflict(key, f"corpus 'mixture' has no {key} of its own: its sources have")
        given = [source.share for source in self.sources if source.share is not None]
        if sum(given) > 1 + 1e-9 or (self.sources and len(given) < len(self.sources) and sum(given) >= 1):
            message = f"the shares sum to {sum(given):g} and must leave some of 1 for the others"
            yield Conflict("sources", message)
