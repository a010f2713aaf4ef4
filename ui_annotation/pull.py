"""What annotators submitted -> un-blinded judgements, and immutable snapshots of them."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import argilla as rg

from preference_data import store
from preference_data.schema import Comparison, Judgement
from ui_annotation import assignment, client, render
from ui_annotation.assignment import BadAnswer

_BREAK = timedelta(minutes=15)  # nobody takes longer for one judgement, so it was a break
_REPORTING = timedelta(seconds=5)  # what was played reaches the server a little later than a quick submission

Heard = Mapping[tuple[str, str], Sequence[tuple[datetime, float]]]
"""(annotator, sha256 of a clip) -> shares of it played, each with when it was first reached."""


class _Response(NamedTuple):
    """One annotator's submission to one record, as it was shown."""

    comparison: str
    clips: tuple[str, ...]
    annotator: str
    submitted_at: datetime
    answers: dict[str, Any]


class Progress(NamedTuple):
    """How many of the judgements that are needed are there, and how many each annotator submitted."""

    done: int
    wanted: int
    submitted: dict[str, int]


def pull(
    argilla: rg.Argilla, *, workspace: str, name: str, comparisons: Sequence[Comparison]
) -> list[Judgement]:
    """Every submitted judgement of what was pushed, un-blinded, sorted by time and annotator.

    Drafts and discarded records are not judgements. Where more people judged a record than had to, all count.

    Args:
        argilla: Signed in as owner.
        workspace: As pushed to.
        name: As pushed.
        comparisons: The key.

    Raises:
        client.Unreachable: the server does not answer.
        client.Refused: a dataset is not there, or not complete.
        BadAnswer: a record or an answer is not of this key.
    """
    key = {one.id: one for one in comparisons}
    responses = sorted(
        _responses(argilla, workspace, name, comparisons),
        key=lambda r: (r.submitted_at, r.annotator, r.comparison),
    )
    heard = _heard(argilla, workspace)
    before: dict[str, datetime] = {}
    judgements = []
    for one in responses:
        previous = before.get(one.annotator)
        before[one.annotator] = one.submitted_at
        pause = one.submitted_at - previous if previous else None
        judgements.append(
            assignment.unblind(
                key[one.comparison],
                one.annotator,
                one.answers,
                submitted_at=one.submitted_at.isoformat(),
                seconds=pause.total_seconds() if pause is not None and pause <= _BREAK else None,
                heard=_least_heard(one, heard),
            )
        )
    return judgements


def _responses(
    argilla: rg.Argilla, workspace: str, name: str, comparisons: Sequence[Comparison]
) -> list[_Response]:
    names = {user["id"]: user["username"] for user in _get(argilla, "/api/v1/users")["items"]}
    there = client.datasets(argilla, workspace)
    found: list[_Response] = []
    for dataset, part in assignment.datasets(name, comparisons).items():
        if dataset not in there:
            raise client.Refused(
                f"{argilla.api_url}: no dataset {dataset!r} in workspace {workspace!r}; push first"
            )
        wanted, seen = {one.id for one in part}, set()
        for record in client.records(argilla, there[dataset]["id"], include="responses"):
            if record["external_id"] not in wanted:
                raise BadAnswer(
                    f"dataset {dataset!r}: record {record['external_id']!r} ({record['id']}) is not in "
                    "the key; was it added by hand?"
                )
            seen.add(record["external_id"])
            found += _submitted(record, names)
        if missing := len(wanted - seen):
            raise client.Refused(
                f"{argilla.api_url}: dataset {dataset!r} lacks {missing} of {len(wanted)} records; push again"
            )
    return found


def _submitted(record: Mapping[str, Any], names: Mapping[str, str]) -> list[_Response]:
    responses = [one for one in record["responses"] or () if one["status"] == "submitted"]
    if not responses:
        return []
    clips = tuple(PurePosixPath(url).stem for url in render.sources(record["fields"]["audio"]))
    return [
        _Response(
            comparison=record["external_id"],
            clips=clips,
            # an annotator who was deleted since goes on by id
            annotator=names.get(one["user_id"], one["user_id"]),
            submitted_at=_utc(one["updated_at"]),
            answers={question: answer["value"] for question, answer in (one["values"] or {}).items()},
        )
        for one in responses
    ]


def _utc(stamp: str) -> datetime:
    """Argilla writes UTC without saying so."""
    when = datetime.fromisoformat(stamp)
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)


def _heard(argilla: rg.Argilla, workspace: str) -> Heard:
    heard: dict[tuple[str, str], list[tuple[datetime, float]]] = defaultdict(list)
    for one in _get(argilla, f"/media/{workspace}/heard")["heard"]:
        heard[one["annotator"], one["clip"]].append((_utc(one["at"]), one["share"]))
    return heard


def _least_heard(one: _Response, heard: Heard) -> float:
    by = one.submitted_at + _REPORTING
    return min(
        max((share for at, share in heard.get((one.annotator, clip), ()) if at <= by), default=0.0)
        for clip in one.clips
    )


def _get(argilla: rg.Argilla, path: str) -> dict[str, Any]:
    answer: dict[str, Any] = client.request(argilla, "GET", path).json()
    return answer


# -------------------------------------------------------------------- how far


def progress(
    argilla: rg.Argilla, *, workspace: str, name: str, comparisons: Sequence[Comparison], annotators: int
) -> Progress:
    """How far the annotators are; a few cheap questions to the server.

    Raises:
        client.Unreachable: the server does not answer.
        client.Refused: the server said no.
    """
    there = client.datasets(argilla, workspace)
    done = wanted = 0
    submitted: Counter[str] = Counter()
    for dataset, part in assignment.datasets(name, comparisons).items():
        needed = annotators if part[0].everyone else 1
        wanted += needed * len(part)
        if there.get(dataset, {}).get("status") != "ready":
            continue
        path = f"/api/v1/datasets/{there[dataset]['id']}"
        done += needed * _get(argilla, f"{path}/progress")["completed"]
        for user in _get(argilla, f"{path}/users/progress")["users"]:
            so_far = {status: user.get(status, {}).get("submitted", 0) for status in ("completed", "pending")}
            done += so_far["pending"]  # each is one of those that its record still needs
            submitted[user["username"]] += sum(so_far.values())
    return Progress(done, wanted, dict(sorted(submitted.items())))


# -------------------------------------------------------------------- snapshots


def snapshot(folder: Path, judgements: Sequence[Judgement], *, url: str, datasets: Sequence[str]) -> Path:
    """Keep annotations as `<folder>/0001-<digest>/`, read-only; the same again makes no new version.

    Args:
        folder: Of all versions; made if it is not there.
        judgements: As `pull` gives them.
        url: Of the server they are from.
        datasets: Names of the datasets they are from.

    Returns:
        The folder of the version that holds exactly these.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(one.model_dump_json() + "\n" for one in sorted(judgements, key=lambda one: one.id))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    versions = sorted(path for path in folder.iterdir() if path.name[:4].isdigit())
    for version in versions:
        if version.name.endswith(digest[:12]):
            return version
    number = 1 + max((int(path.name.split("-")[0]) for path in versions), default=0)
    about = {
        "sha256": digest,
        "judgements": len(judgements),
        "annotators": dict(sorted(Counter(one.annotator for one in judgements).items())),
        "purposes": dict(sorted(Counter(one.purpose for one in judgements).items())),
        "server": url,
        "datasets": list(datasets),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return _keep(
        folder,
        f"{number:04d}-{digest[:12]}",
        {
            "judgements.jsonl": lines,
            "snapshot.json": json.dumps(about, indent=1, ensure_ascii=False) + "\n",
        },
    )


def _keep(folder: Path, name: str, files: Mapping[str, str]) -> Path:
    """Make a folder with read-only files in one step."""
    partial = Path(tempfile.mkdtemp(dir=folder, prefix=".partial-"))
    try:
        for file, text in files.items():
            store.write_text(partial / file, text)
            (partial / file).chmod(0o444)
        partial.chmod(0o755)
        partial.rename(folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / name
