"""A project -> Argilla: clips first, then records. Doing it again adds only what is missing.

Killed at any point and repeated, nothing is lost or doubled: clips are named by their bytes, records by what
they compare; and what annotators submitted is never touched. Records of an earlier draw that nobody has
judged are taken out of the queues.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import argilla as rg
import httpx
from argilla._exceptions import ArgillaError

from preference_data.audio import decode
from preference_data.audio.clip_files import ClipFile
from preference_data.audio.encode import encode
from preference_data.dataset.dataset import Dataset as Corpus
from preference_data.schema import Comparison, Prompt
from ui_annotation import client, render
from ui_annotation.assignment import PLACES
from ui_annotation.project import Dataset, Project
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
_BATCH = 100  # records per request: a request that is cut off costs little
_UPLOADS = 4  # at a time

OnProgress = Callable[[str, int, int], None]
"""Called with what is being sent, how much of it has been, and of how much."""


class PushResult(NamedTuple):
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
    project: Project,
    on_progress: OnProgress = lambda what, done, total: None,
) -> PushResult:
    """Bring a project's comparisons and their clips to the server, signed in as its owner.

    What is not open is not sent: it has all of its judgements.

    Raises:
        client.Unreachable: the server went away; push again when it is back.
        client.Refused: the server answered with an error.
        audio.BadAudio: a clip cannot be read.
    """
    paths = {path for item in project.open() for path in project.prompts[item.prompt_id].audios}
    clips = _upload(argilla, project, sorted(paths), on_progress)
    existing = client.datasets(argilla, project.workspace)
    datasets = project.datasets()
    added, names = 0, [dataset.name for dataset in datasets]
    for name in sorted(existing.keys() - set(names)):
        if project.owns(name):
            _delete_unjudged(argilla, existing[name]["id"])
    for dataset in datasets:
        dataset_id = _dataset(argilla, project.workspace, dataset, existing.get(dataset.name))
        missing = _missing(argilla, dataset_id, dataset.comparisons)
        _log(argilla, dataset_id, [_record(item, project.prompts, clips) for item in missing], on_progress)
        added += len(missing)
    return PushResult(tuple(names), {path: clip.url for path, clip in clips.items()}, added)


def _dataset(
    argilla: rg.Argilla, workspace: str, dataset: Dataset, existing: Mapping[str, Any] | None
) -> str:
    """The id of a published dataset of that name; made if it is not there, made again if it is half made."""
    if existing and existing["status"] == "draft":  # killed before publishing; it cannot have records yet
        client.request(argilla, "DELETE", f"/api/v1/datasets/{existing['id']}")
        existing = None
    if existing is None:
        return _create(argilla, workspace, dataset)
    return str(existing["id"])


def _create(argilla: rg.Argilla, workspace: str, dataset: Dataset) -> str:
    new = rg.Dataset(
        name=dataset.name,
        workspace=workspace,
        settings=settings(argilla, size=dataset.size, min_submitted=dataset.judgements_each),
        client=argilla,
    )
    try:
        return str(new.create().id)
    except httpx.HTTPError as error:
        raise client.unreachable(argilla.api_url, error) from None
    except ArgillaError as error:
        raise client.Refused(f"{argilla.api_url}: dataset {dataset.name!r}: {error}") from None


def _missing(argilla: rg.Argilla, dataset_id: str, comparisons: Sequence[Comparison]) -> list[Comparison]:
    """What to log, after unjudged records of an earlier draw are gone.

    Annotators can see when a record came. If a draw with retests or gold adds to an earlier one, then what
    nobody has judged comes once more, together with what is new. Without any there is nothing to tell apart.
    """
    ids = [item.id for item in comparisons]
    known = {record["external_id"] for record in client.records(argilla, dataset_id)}
    ours = known.intersection(ids)
    has_controls = any(item.purpose in ("retest", "gold") for item in comparisons)
    is_begun = not has_controls or ours == set(ids[: len(ours)])
    if known - ours or not is_begun:
        known = _delete_unjudged(argilla, dataset_id, keep=ours if is_begun else set())
    return [item for item in comparisons if item.id not in known]


def _delete_unjudged(argilla: rg.Argilla, dataset_id: str, *, keep: Collection[str] = ()) -> set[str]:
    """Take records without any response out of the queues, but for `keep`; returns what stays, by our ids."""
    stays, ids = set(keep), []
    for record in client.records(argilla, dataset_id, include="responses"):
        if record["responses"]:
            stays.add(record["external_id"])
        elif record["external_id"] not in stays:
            ids.append(record["id"])
    for start in range(0, len(ids), _BATCH):
        some = ",".join(ids[start : start + _BATCH])
        client.request(argilla, "DELETE", f"/api/v1/datasets/{dataset_id}/records", params={"ids": some})
    return stays


def _log(
    argilla: rg.Argilla, dataset_id: str, records: Sequence[dict[str, Any]], on_progress: OnProgress
) -> None:
    """Send records in batches. An upsert: should one be there already, its judgements stay."""
    for start in range(0, len(records), _BATCH):
        batch = records[start : start + _BATCH]
        client.request(argilla, "PUT", f"/api/v1/datasets/{dataset_id}/records/bulk", json={"items": batch})
        on_progress("records", start + len(batch), len(records))


def _record(item: Comparison, prompts: Mapping[str, Prompt], clips: Mapping[str, _Clip]) -> dict[str, Any]:
    """All that an annotator may know of a comparison; everything else about it stays in the key."""
    prompt = prompts[item.prompt_id]
    fields = {
        "audio": render.conversation(prompt, clips),
        "prompt": render.verbatim(prompt.question),
        **{f"response_{place}": render.verbatim(t) for place, t in zip(PLACES, item.texts, strict=False)},
    }
    return {"external_id": item.id, "fields": fields, "metadata": {"task": prompt.task_name}}


# -------------------------------------------------------------------- clips


def _upload(
    argilla: rg.Argilla, project: Project, paths: Sequence[str], on_progress: OnProgress
) -> dict[str, _Clip]:
    clips: dict[str, _Clip] = {}
    with ThreadPoolExecutor(_UPLOADS) as pool:
        uploads = pool.map(lambda path: _upload_clip(argilla, project, path), paths)
        try:
            for path, clip in zip(paths, uploads, strict=True):
                clips[path] = clip
                on_progress("clips", len(clips), len(paths))
        finally:
            pool.shutdown(cancel_futures=True)  # a failure ends it at once, not after a thousand more clips
    return clips


def _upload_clip(argilla: rg.Argilla, project: Project, path: str) -> _Clip:
    clip = Corpus(project.corpus).find(path)
    info = decode.inspect(clip, max_duration_s=_LONGEST_S)
    playable = _PLAYABLE.get(info.format)
    content = None if playable else _flac(clip)
    sha256 = hashlib.sha256(content).hexdigest() if content else info.sha256
    url = f"/media/{project.workspace}/{sha256}.{playable or 'flac'}"
    if client.request(argilla, "HEAD", url, or_status=404).status_code == 404:
        client.request(argilla, "PUT", url, content=content or _bytes(clip))
    return _Clip(url, info.duration_s)


def _bytes(clip: ClipFile) -> bytes:
    return clip.read_bytes() if isinstance(clip, Path) else clip.read()


def _flac(clip: ClipFile) -> bytes:
    """A clip as models hear it, 16 kHz mono, in a format that every browser plays."""
    return encode(decode.load(clip, max_duration_s=_LONGEST_S), "FLAC", "PCM_16")
