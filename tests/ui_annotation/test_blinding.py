"""Nothing that annotators can see tells what measures them from what does not."""

import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import stats

from preference_data.schema import Completion, Prompt, Ranking
from tests.ui_annotation.conftest import ANNOTATORS
from ui_annotation import client, push, render
from ui_annotation.assignment import Rates, draw
from ui_annotation.project import Project

CHANCE = 1e-5
"""A test of a property fails by bad luck about this often: all draws here are from fixed seeds."""
HIGH = Rates(retests=0.2, gold=0.2)


def is_true(prompt, text):
    return text.startswith("true") if text.startswith(("true", "false")) else None


def make_project(n, *, size=2, overlap=0.5, rates=HIGH, seed=0, corpus=Path(), workspace="audio"):
    prompts = {
        f"p{i}": Prompt(
            id=f"p{i}", audios=("0.wav",), question="?", answer_gt="true", meta_info="{}", task_name="t"
        )
        for i in range(n)
    }
    texts = ["true", "false", "true too", "false too", "unknown"]
    completions = [
        Completion(id=f"{name}-{j}", prompt_id=name, index=j, text=text, policy="x")
        for name in prompts
        for j, text in enumerate(texts)
    ]
    comparisons = draw(
        completions,
        prompts,
        size=size,
        per_prompt=2,
        overlap=overlap,
        rates=rates,
        seed=seed,
        is_true=is_true,
    )
    return Project("blind", workspace, comparisons, prompts, corpus, 2)


def is_control(item):
    return item.purpose != "comparison"


# -------------------------------------------------------------------- what is sent


@hypothesis_settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 40),
    size=st.integers(2, 4),
    overlap=st.floats(0, 1),
    retests=st.floats(0, 0.5),
    gold=st.floats(0, 0.5),
    seed=st.integers(0, 2**32),
)
def test_every_dataset_has_controls_at_the_asked_rate(n, size, overlap, retests, gold, seed):
    project = make_project(n, size=size, overlap=overlap, rates=Rates(retests, gold), seed=seed)
    for dataset in project.datasets():
        assert dataset.name == f"blind-{size}-{dataset.judgements_each}"
        count = Counter(item.purpose for item in dataset.comparisons)
        assert count["retest"] == round(retests * count["comparison"])
        # where facts are scarce there is less gold: a prompt gives one to a dataset, and not what is compared
        assert count["gold"] <= round(gold * count["comparison"])
        if size == 2 and gold < 0.3:
            assert count["gold"] == round(gold * count["comparison"])


@hypothesis_settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(2, 4), data=st.data())
def test_what_is_sent_follows_from_the_prompt_and_the_texts_alone(seed, size, data):
    """A record with all else of its comparison changed is the same record."""
    project = make_project(6, size=size, seed=seed)
    clips = {"0.wav": push._Clip("/media/audio/0.wav", 1.0)}
    item = data.draw(st.sampled_from(project.comparisons))
    other = item.model_copy(
        update={
            "purpose": data.draw(st.sampled_from(["comparison", "retest", "gold"])),
            "about": data.draw(st.none() | st.just("another")),
            "completions": tuple(data.draw(st.text(string.hexdigits, min_size=16)) for _ in item.texts),
            "expected": data.draw(st.none() | st.just(Ranking(ranks=(1,) * len(item.texts)))),
            "everyone": not item.everyone,
            "selected": data.draw(st.sampled_from([None, "random", "active"])),
        }
    )
    assert push._record(item, project.prompts, clips) == push._record(other, project.prompts, clips)
    again = make_project(6, size=size, seed=seed + 1, rates=Rates(0.5, 0.5), overlap=0.9)
    ids = {(other.prompt_id, other.texts): other.id for other in again.comparisons}
    assert ids.get((item.prompt_id, item.texts), item.id) == item.id


@pytest.mark.parametrize("size", [2, 3, 4])
def test_neither_id_nor_place_tells_controls(size):
    project = make_project(1000, size=size, rates=Rates(0.1, 0.1))
    for dataset in project.datasets():
        control = np.array([is_control(item) for item in dataset.comparisons])
        ids = np.array([int(item.id, 16) for item in dataset.comparisons], dtype=float)
        for feature in (ids, np.arange(len(ids)), ids % 2, ids % 16):
            assert stats.mannwhitneyu(feature[control], feature[~control]).pvalue > CHANCE
        runs = int(np.sum(control[1:] != control[:-1]))  # neither in blocks nor spread evenly
        share = control.mean()
        expected, spread = 2 * share * (1 - share) * len(control), (len(control) * share) ** 0.5
        assert abs(runs - expected) < 4.5 * spread


# -------------------------------------------------------------------- what the server gives


def leaves(value, path=""):
    """Every value of a JSON document by where it stands."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    else:
        return {path: value}
    return {
        name: leaf
        for key, part in parts
        for name, leaf in (leaves(part, f"{path}/{key}") or {f"{path}/{key}": str(part)}).items()
    }


def visible(annotator, dataset_id, **search):
    """All records of a dataset as an annotator can read them, in the order of the search."""
    path = f"/api/v1/me/datasets/{dataset_id}/records/search"
    params = {"include": ["responses", "suggestions", "vectors"]}
    return [item["record"] for item in client.items(annotator, "POST", path, json=search, params=params)]


def by(entity, **scope):
    return {"sort": [{"scope": {"entity": entity, **scope}, "order": "asc"}]}


IN_TIME = by("record", property="inserted_at")


@pytest.fixture
def workspace(argilla_server):
    return argilla_server.add_workspace(*ANNOTATORS)


@pytest.mark.parametrize("size", [2, 4])
def test_an_annotator_reads_nothing_that_tells_controls(argilla_server, workspace, tmp_path, size):
    soundfile.write(tmp_path / "0.wav", np.zeros(4_800), 16_000)
    project = make_project(75, size=size, corpus=tmp_path, workspace=workspace, rates=Rates(0.3, 0.3))
    push.push(client.connect(argilla_server.url, argilla_server.api_key("owner")), project)
    key = {item.id: item for item in project.comparisons}
    for name in ANNOTATORS:
        annotator = client.connect(argilla_server.url, argilla_server.api_key(name))
        datasets = client.datasets(annotator, workspace)
        assert sorted(datasets) == [f"blind-{size}-1", f"blind-{size}-2"]
        for about in datasets.values():
            tells_nothing(annotator, about["id"], key)


def tells_nothing(annotator, dataset_id, key):
    orders = [
        visible(annotator, dataset_id, **search)
        for search in (
            {},
            IN_TIME,
            by("record", property="updated_at"),
            by("metadata", metadata_property="task"),
        )
    ]
    for records in orders:
        control = np.array([is_control(key[record["external_id"]]) for record in records])
        place = np.arange(len(records))
        assert control.sum() >= 20
        assert stats.mannwhitneyu(place[control], place[~control]).pvalue > CHANCE
    documents = [leaves(record) for record in orders[0]]
    control = np.array([is_control(key[record["external_id"]]) for record in orders[0]])
    (paths,) = {tuple(document) for document in documents}  # all have the same keys
    varying = set()
    for path in paths:
        if len(values := {str(document[path]) for document in documents}) > 1:
            varying.add(path)
            rank = {value: i for i, value in enumerate(sorted(values))}
            if not path.startswith("/fields"):  # what is judged; it is what was drawn, see above
                place = np.array([rank[str(document[path])] for document in documents])
                assert stats.mannwhitneyu(place[control], place[~control]).pvalue > CHANCE, path
    answers = {path for path in paths if path.startswith("/fields/response_")}
    assert varying == {"/id", "/external_id", "/inserted_at", "/updated_at", *answers}
    for record in orders[0]:
        item = key[record["external_id"]]
        texts = (render.plain(record["fields"][f"response_{place}"]) for place in "abcd"[: len(item.texts)])
        assert tuple(texts) == item.texts
    assert {record["status"] for record in orders[0]} == {"pending"}


def test_owners_endpoints_are_closed_to_annotators(argilla_server, workspace, tmp_path):
    soundfile.write(tmp_path / "0.wav", np.zeros(4_800), 16_000)
    project = make_project(2, corpus=tmp_path, workspace=workspace)
    push.push(client.connect(argilla_server.url, argilla_server.api_key("owner")), project)
    with argilla_server.annotator as annotator:
        for about in annotator.get("/api/v1/me/datasets").json()["items"]:
            if about["name"].startswith("blind"):
                path = f"/api/v1/datasets/{about['id']}/records"
                assert annotator.get(path).status_code == 403
                assert annotator.post(f"{path}/search", json={}).status_code == 403


def test_controls_that_are_added_later_do_not_come_alone(argilla_server, workspace, tmp_path):
    """Annotators can sort by when a record came."""
    soundfile.write(tmp_path / "0.wav", np.zeros(4_800), 16_000)
    owner = client.connect(argilla_server.url, argilla_server.api_key("owner"))
    more = make_project(40, corpus=tmp_path, workspace=workspace, overlap=1, rates=Rates(0.3, 0.3))
    before = make_project(40, corpus=tmp_path, workspace=workspace, overlap=1, rates=Rates(0, 0))
    assert push.push(owner, before).added == 80
    assert push.push(owner, more).added == len(more.comparisons) == 128
    assert push.push(owner, more).added == 0
    annotator = client.connect(argilla_server.url, argilla_server.api_key(ANNOTATORS[0]))
    about = client.datasets(annotator, workspace)["blind-2-2"]
    key = {item.id: item for item in more.comparisons}
    records = visible(annotator, about["id"], **IN_TIME)
    control = np.array([is_control(key[record["external_id"]]) for record in records])
    place = np.arange(len(control))
    assert stats.mannwhitneyu(place[control], place[~control]).pvalue > CHANCE
