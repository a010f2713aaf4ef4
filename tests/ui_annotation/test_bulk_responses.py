"""Many responses in one request: what Argilla answers and keeps, in less time."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import argilla as rg
import pytest

from tests.ui_annotation.conftest import ANNOTATORS


@pytest.fixture
def dataset(argilla_server):
    """Twenty records for two judgements each: its id, and theirs."""
    workspace = argilla_server.add_workspace(*ANNOTATORS)
    client = rg.Argilla(api_url=argilla_server.url, api_key=argilla_server.api_key("owner"))
    settings = rg.Settings(
        fields=[rg.TextField("text")],
        questions=[rg.LabelQuestion("choice", labels=["a", "b"])],
        distribution=rg.TaskDistribution(min_submitted=2),
    )
    made = rg.Dataset(f"bulk-{uuid.uuid4()}", workspace=workspace, settings=settings, client=client).create()
    made.records.log([rg.Record(id=f"r{i}", fields={"text": str(i)}) for i in range(20)])
    records = argilla_server.owner.get(f"/api/v1/datasets/{made.id}/records").json()["items"]
    return made.id, [record["id"] for record in records]


def response(record, value="a", status="submitted"):
    return {"record_id": record, "status": status, "values": {"choice": {"value": value}}}


def send(server, name, items):
    with server.client(name) as client:
        answer = client.post("/api/v1/me/responses/bulk", json={"items": items})
        assert answer.status_code == 200
        return answer.json()["items"]


def kept(server, dataset_id):
    """By record: its status and its responses."""
    with server.owner as owner:
        path = f"/api/v1/datasets/{dataset_id}/records"
        records = owner.get(path, params={"include": "responses"}).json()["items"]
    return {
        record["id"]: (
            record["status"],
            sorted(item["values"]["choice"]["value"] for item in record["responses"]),
        )
        for record in records
    }


def test_all_are_kept_in_order_and_records_are_complete_with_the_last_of_them(argilla_server, dataset):
    dataset_id, records = dataset
    values = ["ab"[i % 2] for i in range(20)]
    made = send(argilla_server, ANNOTATORS[0], [response(r, v) for r, v in zip(records, values, strict=True)])
    assert [item["item"]["record_id"] for item in made] == records
    assert [item["item"]["values"]["choice"]["value"] for item in made] == values
    assert {state for state, _ in kept(argilla_server, dataset_id).values()} == {"pending"}
    send(argilla_server, ANNOTATORS[1], [response(record) for record in records[:5]])
    send(argilla_server, ANNOTATORS[1], [response(records[5], status="draft")])
    states = kept(argilla_server, dataset_id)
    assert [states[record][0] for record in records[:6]] == ["completed"] * 5 + ["pending"]
    assert states[records[1]] == ("completed", ["a", "b"])


def test_a_bad_one_is_refused_alone(argilla_server, dataset):
    dataset_id, records = dataset
    nowhere = str(uuid.uuid4())
    items = [response(records[0]), response(records[1], "c"), response(nowhere), response(records[2], "b")]
    made = send(argilla_server, ANNOTATORS[0], items)
    assert [item["item"] is None for item in made] == [False, True, True, False]
    assert "c" in made[1]["error"]["detail"]
    assert nowhere in made[2]["error"]["detail"]
    with_answers = {name for name, (_, values) in kept(argilla_server, dataset_id).items() if values}
    assert with_answers == {records[0], records[2]}


def test_the_same_again_changes_it_and_strangers_are_refused(argilla_server, dataset):
    dataset_id, records = dataset
    first = send(argilla_server, ANNOTATORS[0], [response(records[0], "a")])
    again = send(argilla_server, ANNOTATORS[0], [response(records[0], "a"), response(records[0], "b")])
    assert {item["item"]["id"] for item in first + again} == {first[0]["item"]["id"]}
    assert kept(argilla_server, dataset_id)[records[0]] == ("pending", ["b"])
    stranger = argilla_server.add_user()
    (refused,) = send(argilla_server, stranger, [response(records[1])])
    assert refused["item"] is None
    assert kept(argilla_server, dataset_id)[records[1]] == ("pending", [])


def test_two_at_once_complete_every_record(argilla_server, dataset):
    dataset_id, records = dataset
    with ThreadPoolExecutor(4) as pool:
        batches = [records[start : start + 5] for start in range(0, 20, 5)]
        work = [
            pool.submit(send, argilla_server, name, [response(record) for record in batch])
            for batch in batches
            for name in ANNOTATORS
        ]
        assert all(item["error"] is None for done in work for item in done.result())
    assert set(map(str, kept(argilla_server, dataset_id).values())) == {str(("completed", ["a", "a"]))}
