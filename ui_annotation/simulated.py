"""Simulated annotators that know the facts: the demo's stand-in for people, with an error rate.

They work through Argilla's HTTP API as the browser does, each with an API key: page the queue, read the
fields, load the clips and report them played, submit. They get what people get, and judge by the phrasebook
that the demo's judge also uses; reports say so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, NamedTuple

import argilla as rg
import numpy as np
from numpy.random import Generator

from preference_data.schema import CHOICES, ErrorType, Facts, Prompt, stable_id
from preference_data.toy_world.phrasebook import Claim, Phrasebook, Question
from ui_annotation import client, render
from ui_annotation.assignment import PLACES

_SUBMITTED_AT_ONCE = 100  # the most that Argilla takes
_PENDING = {
    "filters": {
        "and": [
            {"type": "terms", "scope": {"entity": entity, "property": "status"}, "values": ["pending"]}
            for entity in ("response", "record")
        ]
    }
}
"""The queue of the browser: not judged by me, and still wanted."""


class Task(NamedTuple):
    """A record as an annotator gets it."""

    id: str
    """Argilla's own."""
    external_id: str
    clips: tuple[str, ...]
    """URLs."""
    seconds: tuple[float, ...]
    """How long the clips last."""
    question: str
    answers: tuple[str, ...]
    """In the order in which they are shown."""


Judge = Callable[[Task, Generator], dict[str, Any]]
"""Gives the answers by question; the generator is of this annotator and this record."""


def informed(
    prompts: Iterable[Prompt], media: Mapping[str, str], phrasebook: Phrasebook, *, error_rate: float
) -> Judge:
    """A judge that knows what is true of every clip, and answers at random to a share of the questions.

    Args:
        prompts: Whose `meta_info` tells the facts of their clips.
        media: Path of a clip -> its URL, see `push.PushResult`.
        phrasebook: Of the corpus.
        error_rate: Share of the two required answers that is random.
    """
    facts: dict[tuple[str, ...], Facts] = {
        tuple(media[path] for path in prompt.audios): json.loads(prompt.meta_info)
        for prompt in prompts
        if all(path in media for path in prompt.audios)
    }

    def judge(task: Task, rng: Generator) -> dict[str, Any]:
        known = facts[task.clips]
        question = phrasebook.question(task.question, known)
        marks = [phrasebook.assess(answer, question, known) for answer in task.answers]
        good = {
            "factuality": [mark.factual for mark in marks],
            "behaviour": [mark.behaves for mark in marks],
        }
        is_random = {axis: rng.random() < error_rate for axis in good}
        answers = _choices(good, is_random, rng) if len(marks) == 2 else _rankings(good, is_random, rng)
        for place, answer in zip(PLACES, task.answers, strict=False):
            if errors := _errors(phrasebook.claims(answer, question, known), question):
                answers[f"errors_{place}"] = errors
        return answers

    return judge


def _choices(
    good: Mapping[str, Sequence[bool]], is_random: Mapping[str, bool], rng: Generator
) -> dict[str, Any]:
    names = list(CHOICES)
    return {
        axis: names[int(rng.integers(len(names)))] if is_random[axis] else _prefer(*good[axis])
        for axis in good
    }


def _rankings(
    good: Mapping[str, Sequence[bool]], is_random: Mapping[str, bool], rng: Generator
) -> dict[str, Any]:
    """Good answers tie for the first rank, the others for the one after."""
    answers: dict[str, Any] = {}
    for axis, marks in good.items():
        ranks = rng.permutation(len(marks)) + 1 if is_random[axis] else [2 - mark for mark in marks]
        answers[axis] = [
            {"value": place, "rank": int(rank)} for place, rank in zip(PLACES, ranks, strict=False)
        ]
    all_bad = [axis for axis, marks in good.items() if not any(marks) and not is_random[axis]]
    return {**answers, **({"all_bad": all_bad} if all_bad else {})}


def _prefer(a: bool, b: bool) -> str:
    if a == b:
        return "tie" if a else "both_bad"
    return "a" if a else "b"


def _errors(claims: Sequence[Claim], question: Question) -> list[ErrorType]:
    """Errors that the phrasebook can name: false claims beside the question, and no answer to it."""
    errors: list[ErrorType] = []
    if question.slot and not any(question.slot in claim.slots for claim in claims):
        if question.kind != "absent":
            errors.append("omission")
    if any(claim.slots and not claim.true and question.slot not in claim.slots for claim in claims):
        errors.append("invented_event")
    return errors


def annotate(
    annotators: Sequence[rg.Argilla],
    *,
    workspace: str,
    datasets: Sequence[str],
    judge: Judge,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Empty the queues of all annotators, who work at the same time. Killed and repeated, it goes on.

    Args:
        annotators: Each signed in with an own key.
        workspace: Where they work.
        datasets: By name, see `push.PushResult`.
        judge: Gives their answers.
        seed: What is random follows from it, the annotator and the record, not from the order of the work.
        on_progress: Called with how many judgements are submitted and of how many.

    Returns:
        How many judgements were submitted.

    Raises:
        client.Unreachable: the server went away; annotate again when it is back.
        client.Refused: the server answered with an error.
    """
    workers = [_Annotator(argilla, workspace, judge, seed) for argilla in annotators]
    done = total = 0
    lock = Lock()  # progress is reported by one thread at a time, and in order

    def on_submit() -> None:
        nonlocal done
        with lock:
            done += 1
            on_progress(done, total)

    def queue(number: int) -> list[Task]:
        return workers[number].queue(datasets, number, len(workers))

    with ThreadPoolExecutor(len(workers)) as pool:
        while any(queues := list(pool.map(queue, range(len(workers))))):
            total += sum(map(len, queues))
            running = [
                pool.submit(worker.work, queue, on_submit)
                for worker, queue in zip(workers, queues, strict=True)
            ]
            for future in running:
                future.result()
    return total


class _Annotator:
    """An annotator at work."""

    def __init__(self, argilla: rg.Argilla, workspace: str, judge: Judge, seed: int) -> None:
        self.argilla, self.workspace, self.judge, self.seed = argilla, workspace, judge, seed
        self.name = str(argilla.me.username)
        self._heard: set[str] = set()

    def queue(self, datasets: Sequence[str], number: int, n_annotators: int) -> list[Task]:
        """The tasks of annotator `number` of `n_annotators`.

        Where fewer judgements are wanted than there are annotators, the records' ids share them out: two
        who worked on the same record would do more than is needed.
        """
        existing = client.datasets(self.argilla, self.workspace)
        tasks = []
        for name in datasets:
            wanted = existing[name]["distribution"]["min_submitted"]
            path = f"/api/v1/me/datasets/{existing[name]['id']}/records/search"
            for item in client.items(self.argilla, "POST", path, json=_PENDING):
                task = _task(item["record"])
                if (number - int(stable_id(task.external_id), 16)) % n_annotators < wanted:
                    tasks.append(task)
        return tasks

    def work(self, queue: Sequence[Task], on_submit: Callable[[], None]) -> None:
        """Listen, judge, submit."""
        self._listen({clip: s for task in queue for clip, s in zip(task.clips, task.seconds, strict=True)})
        for start in range(0, len(queue), _SUBMITTED_AT_ONCE):
            items = []
            for task in queue[start : start + _SUBMITTED_AT_ONCE]:
                rng = np.random.default_rng(int(stable_id(self.seed, self.name, task.external_id), 16))
                values = {name: {"value": value} for name, value in self.judge(task, rng).items()}
                items.append({"record_id": task.id, "status": "submitted", "values": values})
            answer = client.call(self.argilla, "POST", "/api/v1/me/responses/bulk", json={"items": items})
            for item, outcome in zip(items, answer["items"], strict=True):
                if outcome["error"]:
                    detail = outcome["error"]["detail"]
                    raise client.Refused(f"{self.name}, record {item['record_id']}: {detail}")
                on_submit()

    def _listen(self, clips: Mapping[str, float]) -> None:
        """Load clips and report them played, each once, when there was time to play it."""
        played_at = {}
        for clip, seconds in clips.items():
            if clip not in self._heard:
                client.request(self.argilla, "GET", clip)
                played_at[clip] = time.monotonic() + seconds
        for clip, end in played_at.items():
            time.sleep(max(0.0, end - time.monotonic()))
            client.request(self.argilla, "POST", f"{clip}/heard", params={"share": 1.0})
        self._heard.update(played_at)


def _task(record: Mapping[str, Any]) -> Task:
    fields = record["fields"]
    question = render.plain(fields["prompt"])
    answers = tuple(render.plain(fields[name]) for place in PLACES if (name := f"response_{place}") in fields)
    clips, durations = render.sources(fields["audio"]), render.durations(fields["audio"])
    return Task(record["id"], record["external_id"], clips, durations, question, answers)
