"""The corpora that others publish, by name, and the phrasebooks of those that a recipe makes from facts.

A file of `published/` only parses its publisher's layout, and `published/cards.yaml` says what to fetch. What
is the same for all is done once: fetching and unpacking here, checking the audio and writing records in
`prepare`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict

import preference_data.toy_world
from preference_data.corpora.fetch import OnBytes, RemoteFile, fetch_part
from preference_data.corpora.hub import fetch_folder
from preference_data.corpora.published.recording import BadCorpus, Recording
from preference_data.corpora.unpack import unpack_inner

_PHRASEBOOKS = Path(preference_data.toy_world.__file__).parent / "phrasebooks"


class Card(BaseModel):
    """Facts about a published corpus and its files; `published/cards.yaml` explains the keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    what_for: str
    hours: float
    size_gb: float
    licence: str
    home: str
    access: Literal["open", "account", "links"]
    files: dict[str, tuple[RemoteFile, ...]] = {}
    hub: str | None = None
    hub_folders: tuple[str, ...] = ()
    inner_archives: str | None = None
    then: str = ""
    max_duration_s: float = 30.0
    """Longer recordings are refused: Qwen2-Audio hears 30 s."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names that `download` can be limited to."""
        return self.hub_folders or tuple(self.files)


_CARDS = yaml.safe_load((Path(__file__).parent / "published" / "cards.yaml").read_text("utf-8"))
CARDS: dict[str, Card] = {name: Card.model_validate({"name": name, **card}) for name, card in _CARDS.items()}
"""The card of every published corpus."""


def card_of(name: str) -> Card:
    """The card of the published corpus of this name.

    Raises:
        BadCorpus: there is none.
    """
    if name not in CARDS:
        raise BadCorpus(f"unknown corpus {name!r}; published ones: {', '.join(CARDS)}")
    return CARDS[name]


def read(name: str, folder: Path) -> Iterator[Recording]:
    """Everything that a published corpus says about its recordings: test first, then dev, then train.

    Each recording comes once, whether its file is there or not. `read` of a file of `published/` does it.

    Raises:
        BadCorpus: there is no such corpus, or the folder is not laid out as the publisher does; naming file
            and line.
    """
    module = import_module(f"preference_data.corpora.published.{card_of(name).name}")
    yield from module.read(folder)


def download(
    card: Card, folder: Path, parts: Sequence[str] | None = None, on_bytes: OnBytes | None = None
) -> str:
    """Fetch what can be fetched into `folder`; repeated or interrupted, it goes on where it was.

    Args:
        card: of the corpus.
        folder: where to; `read` reads it.
        parts: of `card.parts`; None: all, or the first folder of a data set on the Hub.
        on_bytes: called with how far each file is.

    Returns:
        What the user must still do, empty if nothing.

    Raises:
        BadCorpus: a part is not one of the corpus'.
        DownloadFailed, BadArchive: naming the file and the next step.
    """
    if unknown := [part for part in parts or () if part not in card.parts]:
        raise BadCorpus(f"no part {unknown[0]!r}; there are {', '.join(card.parts) or 'none'}")
    if card.hub:
        for name in parts or card.hub_folders[:1]:
            fetch_folder(card.hub, name, folder, on_bytes)
    for part in parts or card.files:
        fetch_part(card.files.get(part, ()), folder, on_bytes)
    if card.inner_archives:
        unpack_inner(folder, card.inner_archives)
    packed = [part for part in parts or card.parts if not (folder / part).is_dir()]
    return _still_to_do(card.then, folder, packed)


def _still_to_do(then: str, folder: Path, packed: Sequence[str]) -> str:
    """A card's text for a folder; empty where it is about parts to unpack and there is none."""
    if "<part>" in then and not packed:
        return ""
    lines = [
        line.replace("<part>", part).replace("<folder>", str(folder))
        for line in then.split("\n")
        for part in (packed if "<part>" in line else [""])
    ]
    return "\n".join(lines)


def phrasebook_of(corpus: str, recordings: Path | None) -> Path:
    """The wording of a corpus: ours for ours, `phrasebook.yaml` beside the files for a folder of yours.

    Raises:
        ValueError: a folder was not given or has no phrasebook.
    """
    if corpus != "folder":
        return _PHRASEBOOKS / f"{corpus}.yaml"
    if recordings is None or not (recordings / "phrasebook.yaml").is_file():
        raise ValueError(
            f"corpus 'folder' needs {recordings or 'its folder'}/phrasebook.yaml, which says what can be "
            f"asked about its clips; start from a copy in {_PHRASEBOOKS}"
        )
    return recordings / "phrasebook.yaml"
