"""One file per corpus, two verbs: `download(dir)` fetches it, `prepare(...)` turns it into records.

Corpora that others publish are in `published/`, with an interface of their own. A corpus that is made has
nothing to download. Every `prepare` takes the same keywords; one that has no
use for a keyword refuses a value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol, cast

from preference_data.schema import AudioClip

HeldOut = Mapping[Literal["dev", "test"], Sequence[str]]
"""Speakers kept out of training, per split."""

CORPORA: dict[str, str] = {
    "synthetic": "preference_data.toy_world.synthetic",
    "spoken_digits": "preference_data.toy_world.spoken_digits",
    "folder": "preference_data.corpora.folder",
}
"""Imported when used: making audio needs the speech synthesiser, reading a folder does not."""

_PHRASEBOOKS = Path(__file__).parents[1] / "toy_world" / "phrasebooks"


class Corpus(Protocol):
    """What a file of this folder offers."""

    def prepare(
        self,
        out: Path,
        *,
        source: Path | None = None,
        counts: Mapping[str, int] | None = None,
        held_out: HeldOut | None = None,
        seed: int = 0,
        on_progress: Callable[[int], object] | None = None,
    ) -> list[AudioClip]:
        """Write the audio below `out` and return its records, paths relative to `out`.

        Recordings that cannot be used are left out and listed in `out/quarantine.jsonl`.
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


def phrasebook_of(corpus: str, source: Path | None) -> Path:
    """The wording of a corpus: ours for ours, `phrasebook.yaml` beside the files for a folder of yours.

    Raises:
        ValueError: the corpus is unknown, or a folder was not given or has no phrasebook.
    """
    if corpus not in CORPORA:
        raise ValueError(f"unknown corpus {corpus!r}; known: {', '.join(CORPORA)}")
    if corpus != "folder":
        return _PHRASEBOOKS / f"{corpus}.yaml"
    if source is None or not (source / "phrasebook.yaml").is_file():
        raise ValueError(
            f"corpus 'folder' needs {source or 'its folder'}/phrasebook.yaml, which says what can be asked "
            f"about its clips; start from a copy in {_PHRASEBOOKS}"
        )
    return source / "phrasebook.yaml"
