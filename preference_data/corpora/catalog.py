"""The corpora by name: those that a recipe makes from facts, and those that others publish.

A file of `published/` only parses its publisher's layout. What is the same for all is done once: fetching
and unpacking in `fetch` and `unpack`, checking the audio and writing records in `prepare`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

import preference_data.toy_world
from preference_data.corpora.fetch import OnBytes
from preference_data.corpora.published.recording import BadCorpus, Card, Recording
from preference_data.dataset.splits import HeldOut
from preference_data.toy_world.clip_files import PreparedClips

CORPORA: dict[str, str] = {
    "synthetic": "preference_data.toy_world.synthetic",
    "spoken_digits": "preference_data.toy_world.spoken_digits",
    "folder": "preference_data.corpora.folder",
}
"""Imported when used: making audio needs the speech synthesiser, reading a folder does not."""
PUBLISHED: tuple[str, ...] = (
    "librispeech",
    "common_voice",
    "aishell1",
    "covost2",
    "clotho",
    "audiocaps",
    "clothoaqa",
    "meld",
    "vocalsound",
    "musiccaps",
    "nsynth",
    "air_bench",
)
_PHRASEBOOKS = Path(preference_data.toy_world.__file__).parent / "phrasebooks"


class Corpus(Protocol):
    """A corpus whose facts are known, see `CORPORA`."""

    def prepare(
        self,
        out: Path,
        *,
        recordings: Path | None = None,
        counts: Mapping[str, int] | None = None,
        held_out: HeldOut | None = None,
        seed: int = 0,
        on_progress: Callable[[int], object] | None = None,
    ) -> PreparedClips:
        """Write the audio below `out`; paths of clips are relative to it.

        All take the same keywords; a corpus that has no use for one refuses a value.
        """
        ...


class PublishedCorpus(Protocol):
    """A file of `published/`."""

    CARD: Card

    def download(
        self, folder: Path, parts: Sequence[str] | None = None, on_bytes: OnBytes | None = None
    ) -> str:
        """Fetch what can be fetched into `folder`; repeated or interrupted, it goes on where it was.

        Args:
            folder: where to; `read` reads it.
            parts: keys of `CARD.parts`; None: all.
            on_bytes: called with how far each file is.

        Returns:
            What the user must still do, empty if nothing.

        Raises:
            UnknownPart: a part is not one of the corpus'.
            DownloadFailed, BadArchive: naming the file and the next step.
        """
        ...

    def read(self, folder: Path) -> Iterator[Recording]:
        """Everything that the corpus says about its recordings: test first, then dev, then train.

        Each recording comes once, whether its file is there or not.

        Raises:
            BadCorpus: the folder is not laid out as the publisher does, naming file and line.
        """
        ...


def corpus_module(name: str) -> Corpus:
    """The corpus of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in CORPORA:
        raise ValueError(f"unknown corpus {name!r}; known: {', '.join(CORPORA)}")
    return cast(Corpus, import_module(CORPORA[name]))


def published_corpus(name: str) -> PublishedCorpus:
    """The published corpus of this name.

    Raises:
        BadCorpus: there is none.
    """
    if name not in PUBLISHED:
        raise BadCorpus(f"unknown corpus {name!r}; published ones: {', '.join(PUBLISHED)}")
    return cast(PublishedCorpus, import_module(f"preference_data.corpora.published.{name}"))


def phrasebook_of(corpus: str, recordings: Path | None) -> Path:
    """The wording of a corpus: ours for ours, `phrasebook.yaml` beside the files for a folder of yours.

    Raises:
        ValueError: the corpus is unknown, or a folder was not given or has no phrasebook.
    """
    if corpus not in CORPORA:
        raise ValueError(f"unknown corpus {corpus!r}; known: {', '.join(CORPORA)}")
    if corpus != "folder":
        return _PHRASEBOOKS / f"{corpus}.yaml"
    if recordings is None or not (recordings / "phrasebook.yaml").is_file():
        raise ValueError(
            f"corpus 'folder' needs {recordings or 'its folder'}/phrasebook.yaml, which says what can be "
            f"asked about its clips; start from a copy in {_PHRASEBOOKS}"
        )
    return recordings / "phrasebook.yaml"
