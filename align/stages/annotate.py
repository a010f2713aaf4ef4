"""Judge pairs of completions for factuality and behaviour, in Argilla.

What is compared, on which side, is drawn here and stays here as the key; annotators see texts and clips
only. Their judgements come back un-blinded as a snapshot, with a report on how far they can be trusted.
Reads: completions, corpus. Writes: comparisons.jsonl (the key), judgements.jsonl, snapshot.json,
quality.json, quality.html.
    align run recipes/demo --only 4_annotate
    align run recipes/demo --set 4_annotate.by=people
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import argilla as rg

from align.recipe.config.preference import AnnotateConfig
from align.release import annotators as page
from align.run_folder.artifacts import StageFolder, Waiting, write_json
from align.run_folder.progress import Progress
from preference_data import store
from preference_data.preferences import quality
from preference_data.schema import MIN_HEARD, AudioClip, Comparison, Completion, Judgement, Prompt
from preference_data.toy_world.phrasebook import Phrasebook
from ui_annotation import assignment, client, environment, launch, pull, push, simulated

API_KEY = "ALIGN_ARGILLA_API_KEY"
"""Holds the owner's key of an Argilla that others run."""


class Questionnaire(NamedTuple):
    """What annotators are asked. Its datasets on the server are named after `name`."""

    name: str
    comparisons: list[Comparison]
    prompts: dict[str, Prompt]
    corpus: Path


class Desk(NamedTuple):
    """A server to annotate on, with its owner signed in. `home` is None if others run it."""

    argilla: rg.Argilla
    url: str
    home: Path | None


class Judgements(NamedTuple):
    """What came back: the snapshot's folder, its records, and whether they can be trusted."""

    snapshot: Path
    judgements: list[Judgement]
    quality: quality.Quality


def run(config: AnnotateConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Ask, wait or simulate, fetch; returns counts and how far the annotators can be trusted.

    Raises:
        Waiting: people have not judged enough yet.
    """
    asked = questionnaire(config, inputs, out.name, out.fingerprint)
    store.write(out.path / "comparisons.jsonl", asked.comparisons)
    with desk(config, out.final.parent) as at:
        pushed = send(at, config, asked)
        if config.by == "simulated":
            phrasebook = Phrasebook.load(inputs[config.corpus] / "phrasebook.yaml")
            _simulate(at, config, asked, pushed, phrasebook)
        else:
            _wait_for_people(at, config, asked)
        found = fetch(at, config, asked, out.final.parent / "snapshots")
    for name in ("judgements.jsonl", "snapshot.json"):
        store.write_text(out.path / name, (found.snapshot / name).read_text(encoding="utf-8"))
    report(found, config, asked, out.path / "quality")
    return {
        "comparisons": float(len(asked.comparisons)),
        "judgements": float(len(found.judgements)),
        **({"error_rate_declared": config.error_rate} if config.by == "simulated" else {}),
        **quality.metrics(found.quality),
    }


def questionnaire(
    config: AnnotateConfig, inputs: dict[str, Path], step: str, fingerprint: str
) -> Questionnaire:
    """Draw what is asked: the same inputs and seed ask the same.

    Simulated judgements depend on more of the recipe than the questions do, so each fingerprint has its own
    datasets; people's work is kept as long as the questions stay.
    """
    source = inputs[config.completions]
    prompts = {one.id: one for one in store.stream(source / "prompts.jsonl", Prompt)}
    comparisons = assignment.draw(
        store.read(source / "completions.jsonl", Completion),
        prompts,
        per_prompt=config.comparisons_per_prompt,
        overlap=config.overlap,
        retests=config.retests,
        gold=config.gold,
        seed=config.seed,
    )
    name = f"{step}-{fingerprint[:8]}-simulated" if config.by == "simulated" else step
    return Questionnaire(name, comparisons, prompts, inputs[config.corpus])


@contextmanager
def desk(config: AnnotateConfig, run: Path) -> Iterator[Desk]:
    """A server to work on: the recipe's, or the run's own, which is started if it does not run.

    An own server goes on for people; with simulated annotators it ends, even if
    this process is killed.

    Raises:
        client.Unreachable: the recipe's server does not answer, or no key is given for it.
        launch.ServerFailed: the own server does not start.
    """
    if config.server:
        key = os.environ.get(API_KEY)
        if not key:
            raise client.Unreachable(f"{config.server}: no key: put its owner's into {API_KEY}")
        yield Desk(client.connect(config.server, key), config.server, None)
        return
    home = (run / "argilla").resolve()
    with ExitStack() as until_done:
        server = launch.running(home)
        if server is None:
            environment.install(print)
            names = _names(config)
            if config.by == "simulated":
                serving = launch.serving(home, users=names, workspace=_workspace(config))
                server = until_done.enter_context(serving)
            else:
                server = launch.start(home, users=names, workspace=_workspace(config))
        owner = launch.credentials(home)["users"]["owner"]
        yield Desk(client.connect(server.url, owner["api_key"]), server.url, home)


def send(at: Desk, config: AnnotateConfig, asked: Questionnaire) -> push.Pushed:
    """Bring clips and questions to the server; what is there already is left alone."""
    with _Told(asked.name) as told:
        return push.push(
            at.argilla,
            workspace=_workspace(config),
            name=asked.name,
            comparisons=asked.comparisons,
            prompts=asked.prompts,
            corpus=asked.corpus,
            annotators=config.annotators,
            on_progress=told,
        )


def fetch(at: Desk, config: AnnotateConfig, asked: Questionnaire, snapshots: Path) -> Judgements:
    """Keep all judgements so far as a version in `snapshots`; the same ones again make no new version."""
    judgements = pull.pull(
        at.argilla, workspace=_workspace(config), name=asked.name, comparisons=asked.comparisons
    )
    datasets = tuple(assignment.datasets(asked.name, asked.comparisons))
    folder = pull.snapshot(snapshots, judgements, url=at.url, datasets=datasets)
    # The snapshot's order does not depend on time, so that the same answers make the same report.
    judgements = store.read(folder / "judgements.jsonl", Judgement)
    seconds = None if config.by == "simulated" else _clip_seconds(asked)
    found = quality.assess(judgements, min_heard=MIN_HEARD, seed=config.seed, clip_seconds=seconds)
    return Judgements(folder, judgements, found)


def report(found: Judgements, config: AnnotateConfig, asked: Questionnaire, path: Path) -> None:
    """Write `<path>.json` and the page `<path>.html`."""
    write_json(path.with_name(f"{path.name}.json"), found.quality.model_dump(mode="json"))
    page.write(
        found.quality,
        path.with_name(f"{path.name}.html"),
        title="Simulated annotators" if config.by == "simulated" else "Annotators",
        examples=page.examples(found.judgements, asked.comparisons, asked.prompts),
    )


def progress(at: Desk, config: AnnotateConfig, asked: Questionnaire) -> pull.Progress:
    """How many judgements are there, and of how many."""
    return pull.progress(
        at.argilla,
        workspace=_workspace(config),
        name=asked.name,
        comparisons=asked.comparisons,
        annotators=config.annotators,
    )


def _clip_seconds(asked: Questionnaire) -> dict[str, float]:
    """Prompt id -> seconds of audio it plays."""
    durations = {one.path: one.duration_s for one in store.stream(asked.corpus / "clips.jsonl", AudioClip)}
    return {one.id: sum(durations[path] for path in one.audios) for one in asked.prompts.values()}


def _workspace(config: AnnotateConfig) -> str:
    """Simulated annotators work in one of their own: people do not see their datasets."""
    return f"{config.workspace}-simulated" if config.by == "simulated" else config.workspace


def _names(config: AnnotateConfig) -> list[str]:
    """Who has an account on an own server from the start."""
    who = "simulated" if config.by == "simulated" else "annotator"
    return [f"{who}-{number + 1}" for number in range(config.annotators)]


def _simulate(
    at: Desk, config: AnnotateConfig, asked: Questionnaire, pushed: push.Pushed, phrasebook: Phrasebook
) -> None:
    """Let annotators that know the facts empty their queues, each with an own key, over the same API."""
    assert at.home, "simulated annotators work on an own server, see AnnotateConfig"
    users = launch.credentials(at.home)["users"]
    for name in _names(config):
        if name not in users:
            users[name] = launch.add_user(at.home, name, workspace=_workspace(config))
    with _Told(asked.name) as told:
        simulated.annotate(
            [client.connect(at.url, users[name]["api_key"]) for name in _names(config)],
            workspace=_workspace(config),
            datasets=pushed.datasets,
            judge=simulated.informed(
                asked.prompts.values(), pushed.media, phrasebook, error_rate=config.error_rate
            ),
            seed=config.seed,
            on_progress=partial(told, "judgements"),
        )


def _wait_for_people(at: Desk, config: AnnotateConfig, asked: Questionnaire) -> None:
    so_far = progress(at, config, asked)
    if so_far.done >= config.enough * so_far.wanted:
        return
    lines = [f"Annotators are asked: {so_far.done} of {so_far.wanted} judgements are there."]
    lines += [f"  {name}: {n}" for name, n in so_far.submitted.items()]
    lines += [f"  They sign in at {at.url}", *_sign_ins(at)]
    raise Waiting("\n".join(lines), done=so_far.done, wanted=so_far.wanted)


def _sign_ins(at: Desk) -> list[str]:
    """Names and passwords for a person at the terminal; a log gets only where they are."""
    if at.home is None:
        return []
    users = launch.credentials(at.home)["users"]
    people = [(name, user["password"]) for name, user in users.items() if user["role"] == "annotator"]
    shown = [f"    {name}  {password}" for name, password in people] if sys.stdout.isatty() else []
    return [*shown, f"  Names and passwords, for your eyes only: {at.home / 'credentials.json'}"]


class _Told:
    """Shows what is being done to how many things: one line of progress each, the earlier ones closed."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._what: tuple[str, int] | None = None
        self._open = ExitStack()

    def __enter__(self) -> _Told:
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._what != (what, total):
            self._open.close()
            self._what = (what, total)
            self._line = self._open.enter_context(Progress(f"{self._label} {what}", total))
        self._line.update(done)

    def __exit__(self, *error: object) -> None:
        self._open.close()
