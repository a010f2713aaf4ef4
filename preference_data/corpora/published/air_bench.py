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

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from preference_data.audio.decode import BadAudio, resolve_inside
from preference_data.corpora.fetch import DownloadFailed, OnBytes, RemoteFile, UnknownPart
from preference_data.corpora.fetch_many import fetch_many
from preference_data.corpora.published.found import BadCorpus, Card, Found, nothing_in

_ENDPOINT = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
_REPO = "qyang1021/AIR-Bench-Dataset"
_PARTS = ("Chat", "Foundation")
_AT_ONCE = 8  # files, as many as the Hub's own client fetches
_KEYS = ("path", "task_name", "dataset_name")
_SLACK = 1.001  # of a bound on a size that the Hub states

CARD = Card(
    "air_bench",
    "evaluation: chat and foundation; nothing to train on",
    100,
    49,
    "those of its sources; evaluation",
    f"https://huggingface.co/datasets/{_REPO}",
    "open",
    _PARTS,
    max_duration_s=600.0,
)


def download(folder: Path, parts: Sequence[str] | None = None, on_bytes: OnBytes | None = None) -> str:
    """Fetch Chat (the gate's part) or the parts named, several files at once, checked by the Hub's sha256."""
    if unknown := [part for part in parts or () if part not in _PARTS]:
        raise UnknownPart(f"no part {unknown[0]!r}; there are {', '.join(_PARTS)}")
    wanted = list(parts or ("Chat",))
    for part, files in {part: _files(folder, part) for part in wanted}.items():
        fetch_many(files, folder, part, on_bytes, at_once=_AT_ONCE)
    return ""


def prepare(folder: Path) -> Iterator[Found]:
    """Every clip that is asked about, as test."""
    metas = [folder / part / f"{part}_meta.json" for part in _PARTS]
    if not any(meta.is_file() for meta in metas):
        raise nothing_in(folder, "Chat/Chat_meta.json", "air_bench")
    for meta in metas:
        seen: set[str] = set()
        for number, row in enumerate(_rows(meta) if meta.is_file() else []):
            if not isinstance(row, dict) or any(not isinstance(row.get(key), str) for key in _KEYS):
                raise BadCorpus(f"{meta}: item {number}: no text under {', '.join(_KEYS)}; fetch it again")
            group = f"{row['task_name']}_{row['dataset_name']}"
            path = f"{meta.parent.name}/{group}/{row['path']}"
            if path not in seen:
                seen.add(path)
                yield Found(path, "test", f"air_bench/{group}", ())


def _rows(meta: Path) -> list[object]:
    try:
        rows = json.loads(meta.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadCorpus(f"{meta} is not JSON: {error}; fetch it again") from error
    if not isinstance(rows, list):
        raise BadCorpus(f"{meta} holds a {type(rows).__name__}, not a list; fetch it again")
    return rows


def _files(folder: Path, part: str) -> list[RemoteFile]:
    """What the Hub lists below a part."""
    headers = {"Authorization": f"Bearer {token}"} if (token := get_token()) else {}
    files = []
    try:
        for entry in HfApi(_ENDPOINT).list_repo_tree(_REPO, part, repo_type="dataset", recursive=True):
            if isinstance(entry, RepoFile):
                resolve_inside(folder, entry.path)
                url = hf_hub_url(_REPO, entry.path, repo_type="dataset", endpoint=_ENDPOINT)
                checksum = f"sha256:{entry.lfs.sha256}" if entry.lfs else None
                bound_gb = entry.size * _SLACK / 1e9 + 1e-6
                files.append(RemoteFile(url, entry.path, bound_gb, checksum, headers, entry.size))
    except HfHubHTTPError as error:
        raise DownloadFailed(f"the Hub does not list {_REPO}: {error}") from error
    except BadAudio as error:
        raise DownloadFailed(f"the Hub lists a path that is refused: {error}") from error
    return files
