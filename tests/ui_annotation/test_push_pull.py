"""Push and pull against a real server: nothing lost, doubled or changed, whatever is killed in between."""

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import get_args

import numpy as np
import pytest
import soundfile

from preference_data import store
from preference_data.preferences import snapshots
from preference_data.schema import CHOICES, Comparison, Completion, ErrorType, Prompt, Ranking
from tests.ui_annotation.conftest import ANNOTATORS
from tests.ui_annotation.test_render import HOSTILE
from ui_annotation import assignment, client, pull, push, render, settings
from ui_annotation.assignment import PLACES, Rates
from ui_annotation.project import Project


@pytest.fixture
def owner(argilla_server):
    return client.connect(argilla_server.url, argilla_server.api_key("owner"))


@pytest.fixture
def workspace(argilla_server):
    """A workspace of its own with two members."""
    return argilla_server.add_workspace(*ANNOTATORS), ANNOTATORS


@pytest.fixture
def annotators(argilla_server, workspace):
    return [client.connect(argilla_server.url, argilla_server.api_key(name)) for name in workspace[1]]


def is_true(prompt, text):
    return {"right": True, prompt.answer_gt: True, "wrong": False}.get(text)


def world(
    workspace,
    corpus,
    n=6,
    texts=("right", "wrong", "vague"),
    clips_of=lambda i: (f"{i}.wav",),
    earlier=(),
    **changed,
):
    """A project of `n` prompts on clips of 0.3 s and more."""
    for i in range(n):
        seconds = np.arange(4_800 + 160 * i) / 16_000
        soundfile.write(corpus / f"{i}.wav", 0.2 * np.sin(2 * np.pi * (200 + i) * seconds), 16_000)
    prompts = {
        f"p{i}": Prompt(
            id=f"p{i}",
            audios=clips_of(i),
            question="Is the tone high?",
            answer_gt=("It is high.", "It is low.")[i % 2],
            meta_info="{}",
            task_name="sound_QA",
        )
        for i in range(n)
    }
    completions = [
        Completion(id=f"{name}-{j}", prompt_id=name, index=j, text=text, policy="0" * 64)
        for name in prompts
        for j, text in enumerate(texts)
    ]
    options = {"size": 2, "per_prompt": 3, "overlap": 0.5, "rates": Rates(0.2, 0.1), "seed": 0} | changed
    comparisons = assignment.draw(completions, prompts, **options, is_true=is_true, earlier=earlier)
    return Project("t", workspace[0], comparisons, prompts, corpus, 2, earlier)


NONE = Rates(0, 0)


def names(project):
    return [dataset.name for dataset in project.datasets()]


def stored(owner, workspace, dataset):
    """Records of a dataset on the server."""
    found = client.datasets(owner, workspace[0])[dataset]
    return list(client.records(owner, found["id"], include="responses"))


def submit(annotator, record, **answers):
    values = {"factuality": "a", "behaviour": "tie"} | answers
    item = {
        "record_id": record["id"],
        "status": "submitted",
        "values": {name: {"value": value} for name, value in values.items()},
    }
    path = "/api/v1/me/responses/bulk"
    (outcome,) = client.request(annotator, "POST", path, json={"items": [item]}).json()["items"]
    assert outcome["error"] is None


# -------------------------------------------------------------------- what is stored


def test_the_server_holds_what_is_shown_and_nothing_that_tells_more(owner, workspace, tmp_path):
    project = world(workspace, tmp_path)
    done = push.push(owner, project)
    assert done.added == len(project.comparisons)
    assert done.datasets == tuple(names(project))
    for dataset in project.datasets():
        records = {record["external_id"]: record for record in stored(owner, workspace, dataset.name)}
        assert set(records) == {item.id for item in dataset.comparisons}
        for item in dataset.comparisons:
            record = records[item.id]
            assert record["metadata"] == {"task": "sound_QA"}
            fields = record["fields"]
            assert (render.plain(fields["response_a"]), render.plain(fields["response_b"])) == item.texts
            assert render.plain(fields["prompt"]) == project.prompts[item.prompt_id].question
            assert render.sources(fields["audio"]) == (done.media[project.prompts[item.prompt_id].audios[0]],)
            told = json.dumps(record)
            for secret in (item.prompt_id, *item.completions, "0" * 64, "gold", "retest"):
                assert f'"{secret}"' not in told


@pytest.mark.parametrize("size", [2, 3])
def test_every_answer_of_the_schema_can_be_given(owner, workspace, tmp_path, size):
    project = world(workspace, tmp_path, n=1, size=size, per_prompt=1, rates=NONE)
    push.push(owner, project)
    dataset = client.datasets(owner, workspace[0])[names(project)[0]]
    path = f"/api/v1/datasets/{dataset['id']}"
    questions = {q["name"]: q for q in client.request(owner, "GET", f"{path}/questions").json()["items"]}
    options = {
        name: [option["value"] for option in question["settings"].get("options", [])]
        for name, question in questions.items()
    }
    places = PLACES[:size]
    asked_of_all = list(CHOICES) if size == 2 else list(places)
    assert options["factuality"] == options["behaviour"] == asked_of_all
    assert options["thumbs"] == [f"{place}_{value}" for place in places for value in ("good", "bad")]
    assert options.get("all_bad") == (None if size == 2 else ["factuality", "behaviour"])
    assert all(set(options[f"errors_{place}"]) == set(get_args(ErrorType)) for place in places)
    assert {name for name, item in questions.items() if item["required"]} == {"factuality", "behaviour"}
    fields = client.request(owner, "GET", f"{path}/fields").json()["items"]
    assert [item["name"] for item in fields] == ["audio", "prompt", *(f"response_{p}" for p in places)]
    assert all(item["settings"] == {"type": "text", "use_markdown": True} for item in fields)
    assert dataset["guidelines"] == settings.guidelines().strip()


def test_hostile_text_is_stored_literally(owner, workspace, tmp_path):
    texts = [*HOSTILE, "plain", "another", "third"]
    project = world(workspace, tmp_path, n=1, texts=texts, size=4, per_prompt=60, overlap=1, rates=NONE)
    project.prompts["p0"] = project.prompts["p0"].model_copy(
        update={"question": HOSTILE[0], "task_name": HOSTILE[1]}
    )
    push.push(owner, project)
    (dataset,) = names(project)
    there = {record["external_id"]: record["fields"] for record in stored(owner, workspace, dataset)}
    seen = set()
    for item in project.comparisons:
        fields = there[item.id]
        shown = tuple(render.plain(fields[f"response_{place}"]) for place in PLACES)
        assert shown == item.texts
        assert render.plain(fields["prompt"]) == HOSTILE[0]
        seen |= set(shown)
    assert seen == set(texts)


def test_clips_arrive_whole_and_once(argilla_server, owner, workspace, tmp_path):
    project = world(workspace, tmp_path, n=3, clips_of=lambda i: (f"{i}.wav", "0.wav"))
    done = push.push(owner, project)
    assert set(done.media) == {"0.wav", "1.wav", "2.wav"}
    for path, url in done.media.items():
        content = (tmp_path / path).read_bytes()
        assert url == f"/media/{workspace[0]}/{hashlib.sha256(content).hexdigest()}.wav"
        assert client.request(owner, "GET", url).content == content
    folder = argilla_server.home / "media" / workspace[0]
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    push.push(owner, project)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_a_clip_that_no_browser_plays_becomes_flac(owner, workspace, tmp_path):
    project = world(workspace, tmp_path, n=1)
    samples, rate = soundfile.read(tmp_path / "0.wav")
    soundfile.write(tmp_path / "0.wav", samples, rate, subtype="IMA_ADPCM")
    done = push.push(owner, project)
    url = done.media["0.wav"]
    assert url.endswith(".flac")
    (tmp_path / "back.flac").write_bytes(client.request(owner, "GET", url).content)
    decoded, _ = soundfile.read(tmp_path / "0.wav")
    back, back_rate = soundfile.read(tmp_path / "back.flac")
    assert back_rate == 16_000
    np.testing.assert_allclose(back, decoded, atol=1e-4)


# -------------------------------------------------------------------- again, and after a kill


def test_another_number_of_annotators_is_another_dataset(owner, workspace, annotators, tmp_path):
    project = world(workspace, tmp_path, overlap=1, rates=NONE)
    push.push(owner, project)
    judged, *_ = stored(owner, workspace, "t-2-2")
    submit(annotators[0], judged)
    assert push.push(owner, project._replace(annotators=3)).datasets == ("t-2-3",)
    assert client.datasets(owner, workspace[0])["t-2-3"]["distribution"]["min_submitted"] == 3
    assert len(stored(owner, workspace, "t-2-3")) == len(project.comparisons)
    (left,) = stored(owner, workspace, "t-2-2")  # nobody finds the others in two queues
    assert left["external_id"] == judged["external_id"]
    assert len(pull.pull(owner, project._replace(annotators=3))) == 1


def test_a_draft_left_by_a_kill_is_completed(owner, workspace, tmp_path):
    project = world(workspace, tmp_path, n=2)
    first, *_ = names(project)
    ids = client.request(owner, "GET", "/api/v1/me/workspaces").json()["items"]
    (home,) = (item["id"] for item in ids if item["name"] == workspace[0])
    draft = {"name": first, "workspace_id": home}
    client.request(owner, "POST", "/api/v1/datasets", json=draft)  # as if killed before it had questions
    assert client.datasets(owner, workspace[0])[first]["status"] == "draft"
    assert push.push(owner, project).added == len(project.comparisons)
    assert client.datasets(owner, workspace[0])[first]["status"] == "ready"


KILLED = """
import os, signal, sys
from pathlib import Path
from preference_data import store
from preference_data.schema import Prompt, Comparison
from ui_annotation import client, push
from ui_annotation.project import Project

url, workspace, corpus, batches = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
push._BATCH = 5

def told(what, done, total):
    if what == "records" and done >= 5 * batches:
        os.kill(os.getpid(), signal.SIGKILL)

comparisons = store.read(corpus / "comparisons.jsonl", Comparison)
prompts = {item.id: item for item in store.read(corpus / "prompts.jsonl", Prompt)}
push.push(
    client.connect(url, os.environ["KEY"]), Project("t", workspace, comparisons, prompts, corpus, 2), told
)
"""


def test_killed_pushes_lose_and_double_nothing_while_annotators_submit(
    argilla_server, owner, workspace, annotators, tmp_path
):
    project = world(workspace, tmp_path, n=12, overlap=1)
    store.write(tmp_path / "comparisons.jsonl", project.comparisons)
    store.write(tmp_path / "prompts.jsonl", project.prompts.values())
    (dataset,) = names(project)
    told = {}
    for batches in (1, 2, 1):
        command = [
            sys.executable,
            "-c",
            KILLED,
            argilla_server.url,
            workspace[0],
            str(tmp_path),
            str(batches),
        ]
        ended = subprocess.run(command, env={"KEY": argilla_server.api_key("owner")}, cwd=".")
        assert ended.returncode == -signal.SIGKILL
        for record in stored(owner, workspace, dataset):
            if record["external_id"] not in told:
                choice = ("a", "b", "both_bad")[len(told) % 3]
                submit(annotators[0], record, factuality=choice, corrected=f"said {len(told)}")
                told[record["external_id"]] = (choice, f"said {len(told)}")
    assert 20 <= len(told) < len(project.comparisons)  # 5 + 10 + 5, and what a kill let through
    before = responses(stored(owner, workspace, dataset))

    stop = threading.Event()
    second = threading.Thread(target=keep_submitting, args=(annotators[1], owner, workspace, dataset, stop))
    second.start()
    for _ in range(3):
        push.push(owner, project)
    stop.set()
    second.join()

    records = stored(owner, workspace, dataset)
    assert sorted(record["external_id"] for record in records) == sorted(
        item.id for item in project.comparisons
    )
    after = responses(records)
    assert {key: after[key] for key in before} == before  # every byte, times included
    made = pull.pull(owner, project)
    mine = [item for item in made if item.annotator == workspace[1][0]]
    assert {item.comparison: (item.factuality, item.corrected) for item in mine} == {
        name: (CHOICES[choice], text) for name, (choice, text) in told.items()
    }
    assert len(made) == len(after) > len(mine)
    assert push.push(owner, project).added == 0


def responses(records):
    """What annotators submitted, as the server tells it, by its id."""
    return {response["id"]: response for record in records for response in record["responses"]}


def keep_submitting(annotator, owner, workspace, dataset, stop):
    done = set()
    while not stop.is_set() or not done:
        for record in stored(owner, workspace, dataset):
            if record["id"] not in done:
                submit(annotator, record, factuality="b")
                done.add(record["id"])
            if stop.is_set():
                break


# -------------------------------------------------------------------- pull


def hear(annotator, clip, share):
    client.request(annotator, "GET", clip)
    time.sleep(0.2)  # clips of 0.3 s, at twice their speed
    client.request(annotator, "POST", f"{clip}/heard", params={"share": share})


def test_pull_gives_exactly_what_was_submitted(owner, workspace, annotators, tmp_path):
    project = world(
        workspace, tmp_path, n=3, clips_of=lambda i: ("0.wav", "1.wav") if i == 0 else (f"{i}.wav",)
    )
    done = push.push(owner, project)
    records = {r["external_id"]: r for part in names(project) for r in stored(owner, workspace, part)}
    both = next(item for item in project.comparisons if item.everyone and item.prompt_id == "p0")
    single = next(item for item in project.comparisons if not item.everyone and item.prompt_id == "p2")
    hear(annotators[0], done.media["0.wav"], 1.0)
    hear(annotators[0], done.media["1.wav"], 0.5)
    submit(
        annotators[0],
        records[both.id],
        factuality="b",
        behaviour="both_bad",
        errors_a=["wrong_words", "omission"],
        thumbs=["b_good"],
        clip="unusable",
        corrected="<b>no</b>",
        rationale="heard it twice",
    )
    submit(annotators[1], records[both.id])
    submit(annotators[0], records[single.id], factuality="tie")
    draft = {
        "record_id": records[single.id]["id"],
        "status": "draft",
        "values": {"factuality": {"value": "a"}},
    }
    client.request(annotators[1], "POST", "/api/v1/me/responses/bulk", json={"items": [draft]})

    first, second, third = pull.pull(owner, project)
    assert [item.annotator for item in (first, second, third)] == [*ANNOTATORS, ANNOTATORS[0]]
    assert [item.comparison for item in (first, second, third)] == [both.id, both.id, single.id]
    assert first.factuality == Ranking(ranks=(2, 1))
    assert first.behaviour == Ranking(ranks=(1, 1), all_bad=True)
    assert (first.errors, first.thumbs) == ((("wrong_words", "omission"), ()), (None, True))
    assert (first.audio_unusable, first.corrected, first.rationale) == (True, "<b>no</b>", "heard it twice")
    assert (first.completions, first.texts) == (both.completions, both.texts)
    assert (first.heard, second.heard, third.heard) == (0.5, 0.0, 0.0)  # the least of two clips; none
    assert (first.seconds, second.seconds) == (None, None)
    at = [datetime.fromisoformat(item.submitted_at) for item in (first, second, third)]
    assert third.seconds == pytest.approx((at[2] - at[0]).total_seconds())
    assert all(abs(datetime.now(UTC) - when) < timedelta(minutes=5) for when in at)

    so_far = pull.progress(project, pull.pull(owner, project))
    wanted = sum(2 if item.everyone else 1 for item in project.comparisons)
    assert so_far == pull.Progress(3, wanted, {workspace[1][0]: 2, workspace[1][1]: 1})


def test_one_judgement_more_than_needed_is_kept_but_not_counted_as_progress(
    owner, workspace, annotators, tmp_path
):
    project = world(workspace, tmp_path, n=2, overlap=0, rates=NONE)
    push.push(owner, project)
    (dataset,) = names(project)
    record = stored(owner, workspace, dataset)[0]
    for annotator in annotators:  # both had it on their screen
        submit(annotator, record)
    assert len(pull.pull(owner, project)) == 2
    so_far = pull.progress(project, pull.pull(owner, project))
    assert (so_far.done, so_far.wanted) == (1, len(project.comparisons))


def test_listening_after_the_judgement_does_not_count(owner, workspace, annotators, tmp_path, monkeypatch):
    monkeypatch.setattr(pull, "_REPORTING", timedelta(0))
    project = world(workspace, tmp_path, n=1, overlap=1, rates=NONE)
    done = push.push(owner, project)
    (dataset,) = names(project)
    first, second, *_ = stored(owner, workspace, dataset)
    submit(annotators[0], first)
    hear(annotators[0], done.media["0.wav"], 1.0)
    submit(annotators[0], second)
    assert [item.heard for item in pull.pull(owner, project)] == [0, 1]


def test_what_was_never_pushed_is_refused(owner, workspace, tmp_path):
    project = world(workspace, tmp_path, n=1)
    with pytest.raises(client.Refused, match="push first"):
        pull.pull(owner, project)
    with pytest.raises(client.Refused, match="no workspace 'nowhere'"):
        pull.pull(owner, project._replace(workspace="nowhere"))


# -------------------------------------------------------------------- another draw


def test_another_draw_finds_again_what_is_judged(owner, workspace, annotators, tmp_path):
    first = world(workspace, tmp_path, n=3, overlap=0.3)
    push.push(owner, first)
    one_each, everyone = names(first)
    for annotator, dataset in (
        (annotators[0], everyone),
        (annotators[1], everyone),
        (annotators[0], one_each),
    ):
        for record in stored(owner, workspace, dataset):
            submit(annotator, record)
    judged = {item.comparison: item.purpose for item in pull.pull(owner, first)}

    second = world(workspace, tmp_path, n=4, overlap=0.6, rates=Rates(0.4, 0.3))
    done = push.push(owner, second)
    assert 0 < done.added < len(second.comparisons)
    again = pull.pull(owner, second)
    kept = {item.comparison for item in again}
    assert {name for name, purpose in judged.items() if purpose == "comparison"} <= kept
    so_far = pull.progress(second, again)
    assert so_far.submitted[workspace[1][0]] == sum(item.annotator == workspace[1][0] for item in again)
    # one judgement of what everyone judges now is half of it
    moved = {item.id for item in second.comparisons if item.everyone} - {
        item.id for item in first.comparisons if item.everyone
    }
    assert moved & kept
    assert all(sum(item.comparison == name for item in again) == 1 for name in moved & kept)


def test_what_nobody_judged_leaves_the_queues_with_its_draw(owner, workspace, annotators, tmp_path):
    first = world(workspace, tmp_path, n=2, overlap=1, rates=Rates(0, 0.5))
    push.push(owner, first)
    (dataset,) = names(first)
    before = stored(owner, workspace, dataset)
    of_gold = {item.id for item in first.comparisons if item.purpose == "gold"}
    judged, *unjudged = [record for record in before if record["external_id"] in of_gold]
    assert unjudged
    submit(annotators[0], judged)
    second = world(workspace, tmp_path, n=2, overlap=1, rates=NONE)
    assert push.push(owner, second).added == 0
    left = {record["external_id"] for record in stored(owner, workspace, dataset)}
    assert left == {item.id for item in second.comparisons} | {judged["external_id"]}
    assert pull.pull(owner, second) == []
    still_there = first._replace(comparisons=[item for item in first.comparisons if item.id in left])
    assert [item.comparison for item in pull.pull(owner, still_there)] == [judged["external_id"]]


# -------------------------------------------------------------------- snapshots


def judged(n):
    item = Comparison(id="s", prompt_id="p", completions=("x", "y"), texts=("X", "Y"), everyone=True)
    return [assignment.unblind(item, f"ann-{i}", {"factuality": "a", "behaviour": "b"}) for i in range(n)]


def test_snapshots_are_versions_that_never_change(tmp_path):
    keep = {"url": "http://h", "datasets": ["d"]}
    first = snapshots.keep(tmp_path / "snaps", judged(2), **keep)
    assert snapshots.keep(tmp_path / "snaps", judged(2)[::-1], **keep) == first
    second = snapshots.keep(tmp_path / "snaps", judged(3), **keep)
    assert [first.name[:5], second.name[:5]] == ["0001-", "0002-"]
    assert snapshots.keep(tmp_path / "snaps", judged(2), **keep) == first
    assert sorted(path.name for path in (tmp_path / "snaps").iterdir()) == [first.name, second.name]
    lines = (second / "judgements.jsonl").read_bytes()
    about = json.loads((second / "snapshot.json").read_text())
    assert about["sha256"] == hashlib.sha256(lines).hexdigest()
    assert second.name == f"0002-{about['sha256'][:12]}"
    assert about["judgements"] == 3
    assert about["annotators"] == {"ann-0": 1, "ann-1": 1, "ann-2": 1}
    assert (about["server"], about["datasets"]) == ("http://h", ["d"])
    for file in second.iterdir():
        assert file.stat().st_mode & 0o222 == 0
