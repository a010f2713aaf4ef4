"""What annotators submitted -> un-blinded judgements."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import argilla as rg

from preference_data.schema import AnnotatorKind, Judgement
from ui_annotation import assignment, client, render
from ui_annotation.project import Project

_BREAK = timedelta(minutes=15)  # nobody takes longer for one judgement, so it was a break
_REPORTING = timedelta(seconds=5)  # what was played reaches the server a little later than a quick submission


class _Response(NamedTuple):
    """One annotator's submission to one record."""

    comparison: str
    clips: tuple[str, ...]
    """Their sha256 on the server."""
    annotator: str
    submitted_at: datetime
    answers: dict[str, Any]


class Progress(NamedTuple):
    """How many of the judgements that are needed are there, and how many each annotator submitted."""

    done: int
    wanted: int
    submitted: dict[str, int]


def pull(argilla: rg.Argilla, project: Project, kind: AnnotatorKind = "person") -> list[Judgement]:
    """Every judgement of a project's comparisons, un-blinded: those from earlier, and those submitted since.

    Those from earlier come first, then by time and annotator. Drafts and discarded records are not
    judgements, and records of an earlier draw are left alone. Where more people judged a record than had to,
    all count.

    Args:
        argilla: Signed in as owner.
        project: As pushed.
        kind: Of its annotators.

    Raises:
        client.Unreachable: the server does not answer.
        client.Refused: a dataset is not there, or not complete.
        assignment.BadAnswer: an answer does not fit its question.
    """
    if not project.comparisons:  # nothing was pushed, and so there may be no workspace
        return []
    key = {item.id: item for item in project.comparisons}
    responses = sorted(
        _responses(argilla, project), key=lambda item: (item.submitted_at, item.annotator, item.comparison)
    )
    listening = _listening(argilla, project.workspace) if responses else {}
    last: dict[str, datetime] = {}
    judgements = {item.id: item for item in earlier(project)}
    for response in responses:
        comparison, who = key[response.comparison], response.annotator
        pause = response.submitted_at - last[who] if who in last else None
        last[who] = response.submitted_at
        judgement = assignment.unblind(
            comparison,
            who,
            response.answers,
            kind=kind,
            submitted_at=response.submitted_at.isoformat(),
            seconds=pause.total_seconds() if pause is not None and pause <= _BREAK else None,
            heard=min(
                _share_heard(listening[who, clip], response.submitted_at + _REPORTING)
                for clip in response.clips
            ),
        )
        judgements[judgement.id] = judgement  # the latest, if a new overlap made somebody judge it twice
    return list(judgements.values())


def earlier(project: Project) -> list[Judgement]:
    """The judgements from earlier that are of this draw's comparisons, with what they are for now."""
    key = {item.id: item for item in project.comparisons}
    copied = ("completions", "purpose", "about", "expected")
    return [
        item.model_copy(update={name: getattr(key[item.comparison], name) for name in copied})
        for item in project.earlier
        if item.comparison in key
    ]


def progress(project: Project, judgements: Iterable[Judgement]) -> Progress:
    """How far the annotators are. A judgement more than a comparison needs is not progress."""
    of_comparison = Counter(item.comparison for item in judgements)
    wanted = {item.id: project.judgements_each(item) for item in project.comparisons}
    return Progress(
        sum(min(of_comparison[name], n) for name, n in wanted.items()),
        sum(wanted.values()),
        dict(sorted(Counter(item.annotator for item in judgements).items())),
    )


def _responses(argilla: rg.Argilla, project: Project) -> list[_Response]:
    names = {user["id"]: user["username"] for user in client.call(argilla, "GET", "/api/v1/users")["items"]}
    existing = client.datasets(argilla, project.workspace)
    key = {item.id for item in project.comparisons}
    missing = {item.id for item in project.open()}
    responses: list[_Response] = []
    for name, dataset in existing.items():
        if project.owns(name):  # also of an earlier draw: a comparison may have been in another dataset
            for record in client.records(argilla, dataset["id"], include="responses"):
                missing.discard(record["external_id"])
                if record["external_id"] in key:
                    responses += _submitted(record, names)
    if missing:
        raise client.Refused(
            f"{argilla.api_url}: workspace {project.workspace!r} lacks {len(missing)} of the "
            f"{len(project.open())} records of {project.name}; push first"
        )
    return responses


def _submitted(record: Mapping[str, Any], names: Mapping[str, str]) -> list[_Response]:
    responses = [item for item in record["responses"] or () if item["status"] == "submitted"]
    if not responses:
        return []
    clips = tuple(PurePosixPath(url).stem for url in render.sources(record["fields"]["audio"]))
    return [
        _Response(
            comparison=record["external_id"],
            clips=clips,
            # an annotator who was deleted since goes on by id
            annotator=names.get(item["user_id"], item["user_id"]),
            submitted_at=_utc(item["updated_at"]),
            answers={question: answer["value"] for question, answer in (item["values"] or {}).items()},
        )
        for item in responses
    ]


def _utc(stamp: str) -> datetime:
    """Argilla writes UTC without saying so."""
    when = datetime.fromisoformat(stamp)
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)


def _listening(argilla: rg.Argilla, workspace: str) -> Mapping[tuple[str, str], list[dict[str, Any]]]:
    """By annotator and sha256 of a clip: shares of it that were played, as the server keeps them."""
    listening: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in client.call(argilla, "GET", f"/media/{workspace}/heard")["heard"]:
        listening[row["annotator"], row["clip"]].append(row)
    return listening


def _share_heard(listening: Sequence[Mapping[str, Any]], by: datetime) -> float:
    """How much of a clip was played by then."""
    return max((row["share"] for row in listening if _utc(row["at"]) <= by), default=0.0)
