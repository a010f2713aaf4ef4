"""What is to be judged -> Argilla: clips first, then records. Doing it again adds only what is missing.

Killed at any point and repeated, nothing is lost or doubled: clips are named by their bytes, datasets by
their content, records by their place in the key; and what annotators submitted is never touched.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import argilla as rg
import httpx
import soundfile
from argilla._exceptions import ArgillaError

from preference_data.audio import decode
from preference_data.audio.clip_files import ClipFile
from preference_data.dataset.dataset import Dataset
from preference_data.schema import Comparison, Prompt
from ui_annotation import assignment, client, render
from ui_annotation.settings import settings

_PLAYABLE = {  # formats that Chromium, Firefox and Safari all play, and the names they get
    "WAV/PCM_U8": "wav",
    "WAV/PCM_16": "wav",
    "WAV/PCM_24": "wav",
    "WAV/FLOAT": "wav",
    "FLAC/PCM_16": "flac",
    "FLAC/PCM_24": "flac",
    "MP3/MPEG_LAYER_III": "mp3",
}
_LONGEST_S = 3600.0
_BATCH = 100  # records a request: one that is cut off costs little
_UPLOADS = 4  # at a time

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is, and of how much."""


class Pushed(NamedTuple):
    """Where things are on the server."""

    datasets: tuple[str, ...]
    """Names."""
    media: dict[str, str]
    """Path of a clip in its corpus -> URL on the server, without the host."""
    added: int
    """Records that were not there before."""


class _Clip(NamedTuple):
    url: str
    duration_s: float


def push(
    argilla: rg.Argilla,
    *,
    workspace: str,
    name: str,
    comparisons: Sequence[Comparison],
    prompts: Mapping[str, Prompt],
    corpus: Path,
    annotators: int,
    on_progress: Progress = lambda what, done, total: None,
) -> Pushed:
    """Bring comparisons and their clips to the server.

    Args:
        argilla: Signed in as owner.
        workspace: Whose members annotate.
        name: The datasets' names start with it.
        comparisons: See `assignment.draw`.
        prompts: By id, at least those of `comparisons`.
        corpus: Folder that the prompts' audio paths are relative to.
        annotators: How many judge what everyone judges.
        on_progress: See `Progress`.

    Raises:
        client.Unreachable: the server went away; push again when it is back.
        client.Refused: the server said no.
        audio.BadAudio: a clip is no audio.
    """
    paths = sorted({path for one in comparisons for path in prompts[one.prompt_id].audios})
    clips = _upload(argilla, workspace, corpus, paths, on_progress)
    added = 0
    parts = assignment.datasets(name, comparisons)
    for dataset, part in parts.items():
        dataset_id = _dataset(argilla, workspace, dataset, annotators if part[0].everyone else 1)
        there = {record["external_id"] for record in client.records(argilla, dataset_id)}
        missing = [one for one in part if one.id not in there]
        _log(
            argilla, dataset_id, (_record(one, prompts, clips) for one in missing), len(missing), on_progress
        )
        added += len(missing)
    return Pushed(tuple(parts), {path: clip.url for path, clip in clips.items()}, added)


def _dataset(argilla: rg.Argilla, workspace: str, name: str, min_submitted: int) -> str:
    """The id of a published dataset of that name; made if it is not there, remade if it is half made."""
    found = client.datasets(argilla, workspace).get(name)
    if found and found["status"] == "draft":  # killed before publishing; it cannot have records yet
        client.request(argilla, "DELETE", f"/api/v1/datasets/{found['id']}")
        found = None
    if found is None:
        return _create(argilla, workspace, name, min_submitted)
    if found["distribution"]["min_submitted"] != min_submitted:  # the recipe was changed since
        overlap = {"distribution": {"strategy": "overlap", "min_submitted": min_submitted}}
        client.request(argilla, "PATCH", f"/api/v1/datasets/{found['id']}", json=overlap)
    return str(found["id"])


def _create(argilla: rg.Argilla, workspace: str, name: str, min_submitted: int) -> str:
    made = rg.Dataset(
        name=name,
        workspace=workspace,
        settings=settings(argilla, min_submitted=min_submitted),
        client=argilla,
    )
    try:
        return str(made.create().id)
    except httpx.HTTPError as error:
        raise client.unreachable(argilla.api_url, error) from None
    except ArgillaError as error:
        raise client.Refused(f"{argilla.api_url}: dataset {name!r}: {error}") from None


def _log(
    argilla: rg.Argilla, dataset_id: str, records: Iterable[dict[str, Any]], total: int, told: Progress
) -> None:
    """Send records in batches. An upsert: should one be there already, its judgements stay."""
    path, batch, sent = f"/api/v1/datasets/{dataset_id}/records/bulk", [], 0
    for record in records:
        batch.append(record)
        if len(batch) == _BATCH or sent + len(batch) == total:
            client.request(argilla, "PUT", path, json={"items": batch})
            sent += len(batch)
            batch = []
            told("records", sent, total)


def _record(one: Comparison, prompts: Mapping[str, Prompt], clips: Mapping[str, _Clip]) -> dict[str, Any]:
    """All that an annotator may know; everything else about `one` stays in the key."""
    prompt = prompts[one.prompt_id]
    fields = {
        "audio": render.players([clips[path] for path in prompt.audios]),
        "prompt": render.verbatim(prompt.question),
        "response_a": render.verbatim(one.text_a),
        "response_b": render.verbatim(one.text_b),
    }
    return {"external_id": one.id, "fields": fields, "metadata": {"task": prompt.task_name}}


# -------------------------------------------------------------------- clips


def _upload(
    argilla: rg.Argilla, workspace: str, corpus: Path, paths: Sequence[str], told: Progress
) -> dict[str, _Clip]:
    clips: dict[str, _Clip] = {}
    with ThreadPoolExecutor(_UPLOADS) as pool:
        uploads = pool.map(lambda path: _upload_one(argilla, workspace, corpus, path), paths)
        try:
            for path, clip in zip(paths, uploads, strict=True):
                clips[path] = clip
                told("clips", len(clips), len(paths))
        finally:
            pool.shutdown(cancel_futures=True)  # one that fails ends it all, not after the other thousand
    return clips


def _upload_one(argilla: rg.Argilla, workspace: str, corpus: Path, relative: str) -> _Clip:
    clip = Dataset(corpus).find(relative)
    info = decode.inspect(clip, max_duration_s=_LONGEST_S)
    playable = _PLAYABLE.get(info.format)
    content = None if playable else _flac(clip)
    sha256 = hashlib.sha256(content).hexdigest() if content else info.sha256
    url = f"/media/{workspace}/{sha256}.{playable or 'flac'}"
    if client.request(argilla, "HEAD", url, or_status=404).status_code == 404:
        client.request(argilla, "PUT", url, content=content or _bytes(clip))
    return _Clip(url, info.duration_s)


def _bytes(clip: ClipFile) -> bytes:
    return clip.read_bytes() if isinstance(clip, Path) else clip.read()


def _flac(clip: ClipFile) -> bytes:
    """A clip as what models hear of it, 16 kHz mono, in a format that every browser plays."""
    file = io.BytesIO()
    samples = decode.load(clip, max_duration_s=_LONGEST_S)
    soundfile.write(file, samples, decode.SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()
