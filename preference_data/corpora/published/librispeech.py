"""LibriSpeech: read English audiobooks with transcripts.

Home: https://www.openslr.org/12. Licence: CC BY 4.0. 982 h, 60 GB of FLAC at 16 kHz.
Layout: `LibriSpeech/{part}/{speaker}/{chapter}/{utterance}.flac`, beside them
`{speaker}-{chapter}.trans.txt` (utterance, text in capitals), and `LibriSpeech/SPEAKERS.TXT`.
The parts train-*, dev-* and test-* are its splits; no speaker is in two of them.

Word times, where `{speaker}-{chapter}.alignment.txt` lies beside the transcript: the condensed
alignments of https://github.com/CorentinJ/librispeech-alignments (Montreal Forced Aligner, CC BY 4.0;
unpack them over the corpus): utterance, words, and the second at which each ends; "" is silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

from preference_data.audio.clip_files import list_files
from preference_data.corpora.published.recording import BadCorpus, Content, Recording, lines, not_a_corpus
from preference_data.schema import Split, Word

_SPLITS: dict[str, Split] = {
    "test-clean": "test",
    "test-other": "test",
    "dev-clean": "dev",
    "dev-other": "dev",
    "train-clean-100": "train",
    "train-clean-360": "train",
    "train-other-500": "train",
}
"""Split of each part; held-out parts first."""
_GENDERS = {"F": "female", "M": "male"}


def read(folder: Path) -> Iterator[Recording]:
    """Every utterance of the parts that are there."""
    root = folder / "LibriSpeech" if (folder / "LibriSpeech").is_dir() else folder
    there = [part for part in _SPLITS if (root / part).is_dir()]
    if not there:
        raise not_a_corpus(folder, "LibriSpeech/{train,dev,test}-*", "librispeech")
    genders = _genders(root / "SPEAKERS.TXT")
    for part in there:
        for transcripts in list_files(root / part, "*/*/*.trans.txt"):
            yield from _chapter(folder, part, transcripts, genders)


def _chapter(folder: Path, part: str, transcripts: Path, genders: Mapping[str, str]) -> Iterator[Recording]:
    speaker = transcripts.parent.parent.name
    stamped = _alignments(transcripts.with_name(transcripts.name.replace(".trans.", ".alignment.")))
    for number, line in lines(transcripts):
        utterance, _, text = line.partition(" ")
        if not utterance.startswith(f"{speaker}-"):
            raise BadCorpus(f"{transcripts}:{number}: {utterance[:40]!r} is not an utterance of {speaker}")
        benchmark = f"librispeech_{part.replace('-', '_')}"
        contents = [Content("transcribe", text.strip().lower(), "en", "en", benchmark=benchmark)]
        if words := stamped.get(utterance):
            spoken = " ".join(word.text for word in words)
            contents.append(Content("transcribe_words", spoken, "en", "en", words=words))
        if speaker in genders:
            contents.append(Content("gender", genders[speaker], "en", "en"))
        path = (transcripts.parent / f"{utterance}.flac").relative_to(folder).as_posix()
        yield Recording(path, _SPLITS[part], part, tuple(contents), speaker=speaker)


def _genders(table: Path) -> dict[str, str]:
    """Speaker -> gender; ` 14 | F | train-clean-360 | 25.03 | Name`, comments begin with `;`."""
    if not table.is_file():
        return {}
    cells = [[cell.strip() for cell in line.split("|")] for _, line in lines(table) if line[0] != ";"]
    return {row[0]: _GENDERS[row[1]] for row in cells if len(row) > 1 and row[1] in _GENDERS}


def _alignments(path: Path) -> dict[str, tuple[Word, ...]]:
    """Utterance -> its words, from lines `utterance ",A,,B," "0.5,0.9,1.2,1.4,2.0"`."""
    if not path.is_file():
        return {}
    words = {}
    for number, line in lines(path):
        parts = line.split(" ")
        spoken, ends = (
            (parts[1].strip('"').split(","), parts[2].strip('"').split(","))
            if len(parts) == 3
            else ([], [""])
        )
        if len(spoken) != len(ends):
            raise BadCorpus(f"{path}:{number}: {len(spoken)} words, {len(ends)} times; fetch it again")
        try:
            times = [0.0, *map(float, ends)]
        except ValueError as error:
            raise BadCorpus(f"{path}:{number}: {error}; fetch it again") from error
        words[parts[0]] = tuple(
            Word(text=text.lower(), start_s=start, end_s=end)
            for text, (start, end) in zip(spoken, pairwise(times), strict=True)
            if text
        )
    return words
