"""AIR-Bench (arXiv:2402.07729): an evaluation set, in its official layout; nothing of it is for training.

Home: https://huggingface.co/datasets/qyang1021/AIR-Bench-Dataset. Licence: those of its sources (Common
Voice, IEMOCAP, Fisher, SpokenWOZ, Clotho, MusicCaps, AudioCaps and others); for evaluation. 49 GB, of which
Chat about 6.
Layout: `Chat/Chat_meta.json`, a list of path, question, answer_gt, meta_info, task_name, dataset_name,
uniq_id, with audio at `Chat/{task_name}_{dataset_name}/{path}`; `Foundation/Foundation_meta.json` likewise.
The evaluate stage reads this folder itself (`air_bench: DIR`). Prepared, its clips can be kept out of other
corpora: `align data prepare clotho … --keep-out FOLDER`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from preference_data.corpora.published.recording import BadCorpus, Recording, not_a_corpus
from preference_data.text_files import BadText, read_json

_PARTS = ("Chat", "Foundation")
_KEYS = ("path", "task_name", "dataset_name")


def read(folder: Path) -> Iterator[Recording]:
    """Every clip that a question is about, as test."""
    metas = [folder / part / f"{part}_meta.json" for part in _PARTS]
    if not any(meta.is_file() for meta in metas):
        raise not_a_corpus(folder, "Chat/Chat_meta.json", "air_bench")
    for meta in metas:
        before: set[str] = set()
        for number, row in enumerate(_rows(meta) if meta.is_file() else []):
            if not isinstance(row, dict) or any(not isinstance(row.get(key), str) for key in _KEYS):
                raise BadCorpus(f"{meta}: item {number}: no text under {', '.join(_KEYS)}; fetch it again")
            group = f"{row['task_name']}_{row['dataset_name']}"
            path = f"{meta.parent.name}/{group}/{row['path']}"
            if path not in before:
                before.add(path)
                yield Recording(path, "test", f"air_bench/{group}", ())


def _rows(meta: Path) -> list[object]:
    try:
        rows = read_json(meta)
    except BadText as error:
        raise BadCorpus(f"{error}; fetch it again") from error
    if not isinstance(rows, list):
        raise BadCorpus(f"{meta} holds a {type(rows).__name__}, not a list; fetch it again")
    return rows
