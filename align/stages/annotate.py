"""Judge completions beside each other for factuality and behaviour, in Argilla.

The comparisons and their order are drawn here and stay here as the key; annotators get texts and clips only.
Their judgements come back un-blinded as a snapshot, with a report on how far they can be trusted. What was
judged earlier is not asked again. A named person may then decide what annotators disagree about, and approve
what they typed.
Reads: completions, corpus. Writes: comparisons.jsonl (the key), judgements.jsonl, snapshot.json,
quality.json, quality.html; of a judge also model.json and model_replies.jsonl.
    align run recipes/demo --only 4_annotate
    align run recipes/demo --set 4_annotate.by=people
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import argilla as rg

from align.evaluation.benchmarks.choices import chosen
from align.recipe.config.preference import AnnotateConfig
from align.release import annotators as page
from align.run_folder.artifacts import StageFolder, Waiting, sha256_file, write_json
from align.run_folder.progress import Progress
from align.stages import model_judgements
from preference_data import store
from preference_data.preferences import quality, selection, snapshots, votes, working_time
from preference_data.schema import Completion, CompletionScore, Judgement, Prompt, SelectedBy, stable_id
from preference_data.toy_world.phrasebook import Phrasebook
from ui_annotation import AnnotationError, accounts, assignment, client, launch, pull, push, simulated
from ui_annotation.environment import ARGILLA
from ui_annotation.project import Project

API_KEY = "ALIGN_ARGILLA_API_KEY"
"""Holds the owner's key of an Argilla that others run."""


_TITLES = {"simulated": "Simulated annotators", "people": "Annotators", "model": "A model as annotator"}


class Server(NamedTuple):
    """An annotation server with its owner signed in. `home` is None if others run it."""

    argilla: rg.Argilla
    url: str
    home: Path | None


class OtherSnapshot(AnnotationError):
    """The recipe names a snapshot that has nothing to say about this run's completions."""


class Judgements(NamedTuple):
    """What came back: the snapshot's folder, its records, and whether they can be trusted."""

    snapshot: Path
    judgements: list[Judgement]
    quality: quality.Quality


def run(config: AnnotateConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Push, wait or simulate, pull; returns counts and how far the annotators can be trusted.

    Raises:
        Waiting: people have not judged enough yet.
    """
    run_folder = out.final.parent
    project = make_project(config, inputs, out)
    judgements, comparisons, url = pull.earlier(project), list(project.comparisons), ""
    store.write(out.path / "comparisons.jsonl", comparisons)
    if project.open() or config.adjudicator:
        with server(config, run_folder) as host:
            url = host.url
            pushed = send(host, project)
            if config.by == "simulated":
                phrasebook = Phrasebook.load(inputs[config.corpus] / "phrasebook.yaml")
                _simulate(host, config, project, pushed, phrasebook)
            judgements = fetch(host, config, project)
            if config.by == "people":
                _keep_so_far(judgements, url, project, run_folder / "snapshots")
                _require_enough(host, config, project, judgements)
            if config.adjudicator:
                decisions = review_project(config, project, judgements)
                send_for_review(host, config, decisions)
                judgements += fetch(host, config, decisions)
                _require_decisions(host, config, decisions, judgements)
                comparisons += decisions.comparisons
                store.write(out.path / "comparisons.jsonl", comparisons)
    result = keep(judgements, url, config, project, run_folder / "snapshots")
    for name in ("judgements.jsonl", "snapshot.json"):
        store.write_text(out.path / name, (result.snapshot / name).read_text(encoding="utf-8"))
    by_model = _judge_by_model(config, inputs, project, result.judgements, out) if config.judge else {}
    report(result, config, project, out.path / "quality")
    purposes = Counter(item.purpose for item in comparisons)
    return {
        "comparisons": float(len(comparisons)),
        "retests": float(purposes["retest"]),
        "gold": float(purposes["gold"]),
        "judgements": float(len(result.judgements)),
        "earlier_unused": float(_unused(project)),
        **by_model,
        **({"error_rate_declared": config.error_rate} if config.by == "simulated" else {}),
        **quality.metrics(result.quality),
    }


def make_project(config: AnnotateConfig, inputs: dict[str, Path], out: StageFolder) -> Project:
    """Draw the comparisons: the same inputs, seed and earlier judgements give the same ones.

    Simulated judgements depend on more of the recipe than the comparisons do, so each fingerprint has its
    own datasets. People's datasets belong to the run and its clips: whatever else of the recipe changes, a
    comparison that is drawn again is judged already. Other runs may use the same server.

    Raises:
        BadRecord: a snapshot is damaged; naming file, line and field.
        OtherSnapshot: the one that the recipe names is of other completions.
    """
    source = inputs[config.completions]
    prompts = {prompt.id: prompt for prompt in store.stream(source / "prompts.jsonl", Prompt)}
    corpus, workspace = inputs[config.corpus], config.workspace
    completions = store.read(source / "completions.jsonl", Completion)
    named = _of_snapshot(config, completions)
    earlier = [*named, *_of_run(config, out.final.parent, completions)]
    comparisons = assignment.draw(
        completions,
        prompts,
        size=config.completions_per_comparison,
        per_prompt=config.comparisons_per_prompt,
        overlap=config.overlap,
        rates=assignment.Rates(config.retests, config.gold),
        seed=config.seed,
        is_true=_truth(corpus),
        earlier=earlier,
        select=_selection(config, completions, inputs),
    )
    if config.snapshot and {item.comparison for item in named}.isdisjoint(item.id for item in comparisons):
        raise OtherSnapshot(
            f"snapshot: {config.snapshot}: none of its {len(named)} judgements is of a comparison of "
            f"{source.name}: other prompts, other completions, or another completions_per_comparison. Next: "
            "name a snapshot of these completions, or remove the key"
        )
    if config.by == "simulated":  # in a workspace of their own: people do not see their datasets
        name, workspace = f"{out.name}-{out.fingerprint[:8]}-simulated", f"{workspace}-simulated"
    else:
        run = _in_a_name(out.final.parent.resolve().name)
        name = f"{out.name}-{run}-{sha256_file(corpus / 'clips.jsonl')[:8]}"
    by_model = model_judgements.left_to_model(config, comparisons)
    return Project(name, workspace, comparisons, prompts, corpus, config.annotators, earlier, by_model)


def _in_a_name(run: str) -> str:
    """A run folder's name as Argilla allows it; one that has to change gets a digest and is no other's."""
    allowed = re.sub(r"[^A-Za-z0-9_-]+", "-", run)[:60]
    return allowed if allowed == run else f"{allowed}-{stable_id(run)[:8]}"


def _of_snapshot(config: AnnotateConfig, completions: list[Completion]) -> list[Judgement]:
    """Judgements of the snapshot that the recipe names, without models': a judge's replies are in its run."""
    named = [Path(config.snapshot).expanduser()] if config.snapshot else []
    judgements = snapshots.read(named, {item.id: item.text for item in completions})
    return [item for item in judgements if item.annotator_kind != "model"]


def _of_run(config: AnnotateConfig, run_folder: Path, completions: list[Completion]) -> list[Judgement]:
    """People's judgements of this run, where people judge."""
    folders = snapshots.versions(run_folder / "snapshots") if config.by == "people" else []
    judgements = snapshots.read(folders, {item.id: item.text for item in completions})
    return [item for item in judgements if item.annotator_kind == "person"]


def _unused(project: Project) -> int:
    """How many earlier judgements are of nothing that is drawn now; decisions have a draw of their own."""
    ids = {item.id for item in project.comparisons}
    given = {item.id: item for item in project.earlier if item.purpose in ("comparison", "retest", "gold")}
    return sum(item.comparison not in ids for item in given.values())


def _selection(
    config: AnnotateConfig, completions: list[Completion], inputs: dict[str, Path]
) -> assignment.Select:
    """The recipe's rule on what to ask about, where not all can be."""
    rows = store.stream(inputs[config.scores] / "scores.jsonl", CompletionScore) if config.scores else ()
    scores = {score.id: score for score in rows}
    by_id = {item.id: item for item in completions}

    def select(candidates: Collection[selection.Candidate]) -> Mapping[selection.Candidate, SelectedBy]:
        return selection.select(
            candidates,
            by_id,
            scores,
            n=config.max_comparisons,
            rule=config.select,
            random_share=config.random_share,
            near_tie=config.near_tie,
            seed=config.seed,
        )

    return select


def _truth(corpus: Path) -> assignment.Truth:
    """What is known of a completion: by the facts of the clip, or by the choices of the question."""
    if not (corpus / "phrasebook.yaml").exists():
        return _is_right_choice
    phrasebook = Phrasebook.load(corpus / "phrasebook.yaml")

    def is_true(prompt: Prompt, text: str) -> bool:
        facts = json.loads(prompt.meta_info)
        return phrasebook.assess(text, phrasebook.question(prompt.question, facts), facts).factual

    return is_true


def _is_right_choice(prompt: Prompt, text: str) -> bool | None:
    choice = chosen(prompt.choices, text) if prompt.choices else None
    return None if choice is None else choice == prompt.answer_gt


@contextmanager
def server(config: AnnotateConfig, run: Path) -> Iterator[Server]:
    """The recipe's server, or the run's own, which is started if it does not run.

    An own server goes on for people; with simulated annotators it ends, even if this process is killed.

    Raises:
        client.Unreachable: the recipe's server does not answer, or no key is given for it.
        launch.ServerFailed: the own server does not start.
    """
    if config.server:
        key = os.environ.get(API_KEY)
        if not key:
            raise client.Unreachable(f"{config.server}: no key: put its owner's into {API_KEY}")
        yield Server(client.connect(config.server, key), config.server, None)
        return
    home = (run / "argilla").resolve()
    with ExitStack() as until_done:
        running = launch.running(home)
        if running is None:
            ARGILLA.install(print)
            names = _account_names(config)
            if config.by == "simulated":
                workspace = f"{config.workspace}-simulated"
                running = until_done.enter_context(launch.serving(home, users=names, workspace=workspace))
            else:
                running = launch.start(home, users=names, workspace=config.workspace)
        elif config.by == "people":
            _let_in(home, config)
        owner = launch.credentials(home)["users"]["owner"]
        yield Server(client.connect(running.url, owner["api_key"]), running.url, home)


def _let_in(home: Path, config: AnnotateConfig) -> None:
    """Let as many into the workspace of a server that runs already as the recipe has annotators.

    They are the accounts that a start makes; where there are enough others, none is brought back.
    """
    users = accounts.list_users(home)
    members = {
        user.name for user in users if user.role == "annotator" and config.workspace in user.workspaces
    }
    others = [name for name in _account_names(config) if name not in members]
    for name in others[: max(config.annotators - len(members), 0)]:
        accounts.admit(home, name, workspace=config.workspace)


def work_left(project: Project) -> working_time.WorkingTime:
    """What the comparisons that are open take of people, at the pace of their earlier judgements."""
    durations_s = working_time.clip_durations(project.corpus, project.prompts.values())
    pace = working_time.pace_of(project.earlier, project.prompts, durations_s)
    return working_time.working_time(
        project.open(), project.prompts, durations_s, annotators=project.annotators, pace=pace
    )


def send(host: Server, project: Project) -> push.PushResult:
    """Bring clips and comparisons to the server; what is there already is left alone."""
    with _progress(project.name) as on_progress:
        return push.push(host.argilla, project, on_progress)


def fetch(host: Server, config: AnnotateConfig, project: Project) -> list[Judgement]:
    """All judgements so far."""
    return pull.pull(host.argilla, project, "simulated" if config.by == "simulated" else "person")


def review_project(config: AnnotateConfig, project: Project, judgements: list[Judgement]) -> Project:
    """What the adjudicator decides of judgements that count, in a workspace that annotators do not see."""
    return project._replace(
        name=f"{project.name}-review",
        workspace=f"{project.workspace}-review",
        comparisons=assignment.review(votes.counted(judgements, config.min_heard), config.adjudicator),
        annotators=1,
    )


def send_for_review(host: Server, config: AnnotateConfig, decisions: Project) -> None:
    """Let the adjudicator into the workspace, and bring there what is open."""
    assert config.adjudicator
    if host.home:
        accounts.admit(host.home, config.adjudicator, workspace=decisions.workspace)
    if decisions.open():
        send(host, decisions)


def _keep_so_far(judgements: list[Judgement], url: str, project: Project, folder: Path) -> None:
    """Keep what people have judged, so that it is drawn again whatever of the recipe changes meanwhile."""
    if judgements:
        datasets = [dataset.name for dataset in project.datasets()]
        snapshots.keep(folder, judgements, url=url, datasets=datasets)


def keep(
    judgements: list[Judgement], url: str, config: AnnotateConfig, project: Project, folder: Path
) -> Judgements:
    """Keep judgements as a snapshot in `folder`, and assess them; the same ones make no new one."""
    datasets = [dataset.name for dataset in project.datasets()]
    snapshot = snapshots.keep(folder, judgements, url=url, datasets=datasets)
    # The snapshot's order does not depend on time, so that the same answers make the same report.
    judgements = store.read(snapshot / "judgements.jsonl", Judgement)
    seconds = None  # simulated annotators take no time, so none is too fast
    if config.by == "people":
        durations_s = working_time.clip_durations(project.corpus, project.prompts.values())
        seconds = {
            item.id: sum(durations_s[path] for path in item.audios) for item in project.prompts.values()
        }
    assessed = quality.assess(judgements, min_heard=config.min_heard, seed=config.seed, clip_seconds=seconds)
    return Judgements(snapshot, judgements, assessed)


def _judge_by_model(
    config: AnnotateConfig,
    inputs: dict[str, Path],
    project: Project,
    people: list[Judgement],
    out: StageFolder,
) -> dict[str, float]:
    """Put the judge's judgements beside people's, and measure how far it agrees with them."""
    judge, judged = model_judgements.judge_by_model(config, project, out)
    store.write(out.path / "judgements.jsonl", [*people, *judged.judgements])
    completions = store.read(inputs[config.completions] / "completions.jsonl", Completion)
    return model_judgements.report(judge, judged, people, completions, config.min_heard, out.path)


def report(result: Judgements, config: AnnotateConfig, project: Project, path: Path) -> None:
    """Write `<path>.json` and the page `<path>.html`."""
    write_json(path.with_name(f"{path.name}.json"), result.quality.model_dump(mode="json"))
    page.write(
        result.quality,
        path.with_name(f"{path.name}.html"),
        title=_TITLES[config.by],
        model=model_judgements.read_report(path.parent),
        examples=page.examples(result.judgements, project.prompts),
    )


def _account_names(config: AnnotateConfig) -> list[str]:
    """Who has an account on an own server from the start."""
    kind = "simulated" if config.by == "simulated" else "annotator"
    return [f"{kind}-{number + 1}" for number in range(config.annotators)]


def _simulate(
    host: Server, config: AnnotateConfig, project: Project, pushed: push.PushResult, phrasebook: Phrasebook
) -> None:
    """Let annotators that know the facts empty their queues, each with an own key, over the same API."""
    assert host.home, "simulated annotators work on an own server, see AnnotateConfig"
    users = launch.credentials(host.home)["users"]
    for name in _account_names(config):
        if name not in users:
            users[name] = accounts.add_user(host.home, name, workspace=project.workspace)
    with _progress(project.name) as on_progress:
        simulated.annotate(
            [client.connect(host.url, users[name]["api_key"]) for name in _account_names(config)],
            workspace=project.workspace,
            datasets=pushed.datasets,
            judge=simulated.informed(
                project.prompts.values(), pushed.media, phrasebook, error_rate=config.error_rate
            ),
            seed=config.seed,
            on_progress=partial(on_progress, "judgements"),
        )


def _require_enough(
    host: Server, config: AnnotateConfig, project: Project, judgements: list[Judgement]
) -> None:
    so_far = pull.progress(project, judgements)
    if so_far.done >= config.enough * so_far.wanted:
        return
    lines = [f"Waiting for annotators: {so_far.done} of {so_far.wanted} judgements are there."]
    lines += [f"  {name}: {n}" for name, n in so_far.submitted.items()]
    lines += [f"  All together: {work_left(project)}"]
    raise Waiting("\n".join(lines + _sign_in(host)), done=so_far.done, wanted=so_far.wanted)


def _require_decisions(
    host: Server, config: AnnotateConfig, decisions: Project, judgements: list[Judgement]
) -> None:
    so_far = pull.progress(decisions, judgements)
    if so_far.done < so_far.wanted:
        line = f"Waiting for {config.adjudicator}: {so_far.done} of {so_far.wanted} decisions are there."
        line += f" They are in workspace {decisions.workspace}."
        raise Waiting("\n".join([line, *_sign_in(host)]), done=so_far.done, wanted=so_far.wanted)


def _sign_in(host: Server) -> list[str]:
    """Where people sign in, and with what."""
    lines = [f"  They sign in at {host.url}"]
    if host.home:
        if sys.stdout.isatty():  # passwords are for a person at the terminal, not for a log
            users = launch.credentials(host.home)["users"].items()
            lines += [
                f"    {name}  {user['password']}" for name, user in users if user["role"] == "annotator"
            ]
        lines += [f"  Names and passwords, for your eyes only: {host.home / 'credentials.json'}"]
    return lines


@contextmanager
def _progress(label: str) -> Iterator[Callable[[str, int, int], None]]:
    """Reports the progress of phases that follow each other, a line each."""
    with ExitStack() as current:
        lines: dict[tuple[str, int], Progress] = {}

        def report(phase: str, done: int, total: int) -> None:
            if (phase, total) not in lines:
                current.close()
                lines[phase, total] = current.enter_context(Progress(f"{label} {phase}", total))
            lines[phase, total].update(done)

        yield report
