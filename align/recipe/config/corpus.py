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
"""How long every clip of a corpus that is made lasts."""


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
    corpus: Literal["synthetic", "spoken_digits", "folder", "mixture"]
    """A file of `preference_data/corpora/`. `mixture`: prepared data sets, whose audio stays where it is."""
    dir: OutsideFolder | None = None
    """Where the recordings are, for corpora of recordings."""
    sources: Annotated[list[DataSetShare], Outside()] = []
    """The data sets of a mixture."""
    temperature: float = Field(1.0, ge=1)
    """In a mixture, data sets without a share are drawn from by size^(1/temperature)."""
    clips: ClipCounts | None = None
    """How many clips to make, for corpora that make or compose them."""
    held_out: dict[Literal["dev", "test"], list[str]] = {}
    """Speakers kept out of training, per split, for corpora of recordings."""
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
        """Whether it knows what is true of every clip: a mixture does not."""
        return self.corpus != "mixture"

    def describe_work(self, clips: Mapping[str, int]) -> str:
        """Clips per split."""
        counts = self.clips.model_dump() if self.clips else {}
        splits = ", ".join(f"{split} {n:,}" for split, n in counts.items())
        return f"{sum(counts.values()):,} clips ({splits})" if counts else ""

    def conflicts(self) -> Iterator[Conflict]:
        """Each corpus has keys that it needs and keys that it has no use for."""
        if self.corpus == "mixture":
            yield from self._conflicts_of_mixture()
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
        if self.corpus in ("synthetic", "spoken_digits") and self.max_duration_s < CLIP_S:
            message = (
                f"clips of {self.corpus!r} last {CLIP_S:g} s: must allow that, is {self.max_duration_s:g}"
            )
            yield Conflict("max_duration_s", message)
        if self.corpus == "folder" and self.clips:
            yield Conflict("clips", "corpus 'folder' uses every recording: it has no clips")
        if self.corpus != "folder" and self.clips is None:
            yield Conflict("clips", f"corpus {self.corpus!r} needs clips: how many to make per split")

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
