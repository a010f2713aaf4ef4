"""Published corpora, one file each, two verbs: `download(folder)` fetches, `prepare(folder)` reads.

A file here only parses its publisher's layout. What is the same for all is done once: fetching and
unpacking in `corpora.fetch` and `corpora.unpack`, checking the audio and writing records in
`corpora.dataset_folder`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from preference_data.corpora.fetch import OnBytes
from preference_data.corpora.published.found import BadCorpus, Card, Found

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


class Published(Protocol):
    """What a file of this folder offers."""

    CARD: Card

    def download(
        self, folder: Path, parts: Sequence[str] | None = None, on_bytes: OnBytes | None = None
    ) -> str:
        """Fetch what can be fetched into `folder`; repeated or interrupted, it goes on where it was.

        Args:
            folder: where to; `prepare` reads it.
            parts: keys of `CARD.parts`; None: all.
            on_bytes: told how far each file is.

        Returns:
            What the user must still do, empty if nothing.

        Raises:
            UnknownPart: a part is none of the corpus'.
            DownloadFailed, BadArchive: naming the file and the next step.
        """
        ...

    def prepare(self, folder: Path) -> Iterator[Found]:
        """Everything that the corpus says about its recordings: test first, then dev, then train.

        Each recording comes once, whether its file is there or not.

        Raises:
            BadCorpus: the folder is not laid out as the publisher does, naming file and line.
        """
        ...


def published_corpus(name: str) -> Published:
    """The published corpus of this name.

    Raises:
        BadCorpus: there is none.
    """
    if name not in PUBLISHED:
        raise BadCorpus(f"unknown corpus {name!r}; published ones: {', '.join(PUBLISHED)}")
    return cast(Published, import_module(f"{__name__}.{name}"))
