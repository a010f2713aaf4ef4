"""A named person decides: the annotate stage with people, from the first push to the last decision."""

import numpy as np
import pytest
import soundfile

from align.recipe.config.preference import AnnotateConfig
from align.run_folder.artifacts import StageFolder, Waiting
from align.stages import annotate
from preference_data import store
from preference_data.schema import AudioClip, Comparison, Completion, Judgement, Prompt
from tests.ui_annotation.conftest import ANNOTATORS
from ui_annotation import accounts, client, launch

TEXTS = ["right", "wrong"]


@pytest.fixture
def inputs(tmp_path):
    folders = {"0_corpus": tmp_path / "0_corpus", "3_sample": tmp_path / "3_sample"}
    prompts = [
        Prompt(id=f"p{i}", audios=("a.wav",), question=f"{i}?", answer_gt="x", meta_info="{}", task_name="t")
        for i in range(3)
    ]
    completions = [
        Completion(id=f"{prompt.id}-{i}", prompt_id=prompt.id, index=i, text=text, policy="x")
        for prompt in prompts
        for i, text in enumerate(TEXTS)
    ]
    store.write(folders["3_sample"] / "prompts.jsonl", prompts)
    store.write(folders["3_sample"] / "completions.jsonl", completions)
    clip = AudioClip(id="a", path="a.wav", split="train", duration_s=0.3, sha256="0" * 64)
    store.write(folders["0_corpus"] / "clips.jsonl", [clip])
    soundfile.write(folders["0_corpus"] / "a.wav", np.zeros(4_800), 16_000)
    return folders


def submit_all(server, workspace, name, **answers_by_question):
    """Answer every record of a workspace; the answers may depend on the texts."""
    argilla = client.connect(server.url, server.api_key(name))
    owner = client.connect(server.url, server.api_key("owner"))
    for dataset in client.datasets(argilla, workspace).values():
        for record in list(client.records(owner, dataset["id"])):
            values = {key: {"value": answer(record["fields"])} for key, answer in answers_by_question.items()}
            body = {"status": "submitted", "values": {k: v for k, v in values.items() if v["value"]}}
            client.request(argilla, "POST", f"/api/v1/records/{record['id']}/responses", json=body)


def prefers(text):
    """Whichever place it is in: a choice between two, a ranking of more."""

    def answer(fields):
        places = [name[-1] for name in fields if name.startswith("response_")]
        best = next(place for place in places if f">{text}<" in fields[f"response_{place}"])
        if len(places) == 2:
            return best
        return [{"value": place, "rank": 1 if place == best else 2} for place in places]

    return answer


def test_a_run_waits_for_annotators_then_for_decisions_and_then_ends(
    argilla_server, inputs, tmp_path, monkeypatch
):
    monkeypatch.setenv(annotate.API_KEY, argilla_server.api_key("owner"))
    workspace, adjudicator = argilla_server.add_workspace(*ANNOTATORS), argilla_server.add_user()
    accounts.admit(argilla_server.home, adjudicator, workspace=f"{workspace}-review")
    config = AnnotateConfig(
        stage="annotate",
        completions="3_sample",
        corpus="0_corpus",
        by="people",
        server=argilla_server.url,
        workspace=workspace,
        overlap=1,
        retests=0,
        gold=0,
        min_heard=0,
        adjudicator=adjudicator,
    )
    out = StageFolder(tmp_path / "run", "4_annotate", "f" * 64)
    out.open()
    with pytest.raises(Waiting, match="0 of 6 judgements"):
        annotate.run(config, inputs, out)
    ann, bob = ANNOTATORS
    right, wrong = prefers("right"), prefers("wrong")
    typed = {"corrected": lambda fields: "typed" if ">1" in fields["prompt"] else None}
    submit_all(argilla_server, workspace, ann, factuality=right, behaviour=right, **typed)
    assert not (tmp_path / "run" / "snapshots").exists()
    with pytest.raises(Waiting, match="3 of 6 judgements"):
        annotate.run(config, inputs, out)
    changed = annotate.make_project(config.model_copy(update={"seed": 7}), inputs, out)
    assert {item.annotator for item in changed.earlier} == {ann}
    assert {item.comparison for item in changed.earlier} == {item.id for item in changed.comparisons}
    submit_all(
        argilla_server,
        workspace,
        bob,
        factuality=lambda fields: (wrong if ">0" in fields["prompt"] else right)(fields),
        behaviour=right,
    )
    with pytest.raises(Waiting, match=f"Waiting for {adjudicator}: 0 of 2 decisions"):
        annotate.run(config, inputs, out)
    submit_all(
        argilla_server,
        f"{workspace}-review",
        adjudicator,
        factuality=lambda fields: prefers("typed" if "response_c" in fields else "wrong")(fields),
        behaviour=lambda fields: right(fields),
    )
    metrics = annotate.run(config, inputs, out)
    assert metrics["judgements"] == 8
    purposes = {item.purpose for item in store.read(out.path / "comparisons.jsonl", Comparison)}
    assert purposes == {"comparison", "adjudication", "correction"}
    decisions = {
        item.purpose: item
        for item in store.read(out.path / "judgements.jsonl", Judgement)
        if item.annotator == adjudicator
    }
    for purpose, prompt_id, best in (("adjudication", "p0", "wrong"), ("correction", "p1", "typed")):
        decided = decisions[purpose]
        assert decided.prompt_id == prompt_id
        assert decided.texts[decided.factuality.ranks.index(1)] == best
        assert decided.texts[decided.behaviour.ranks.index(1)] == "right"


def test_admit_lets_in_once_whoever_has_an_account_or_not(argilla_server):
    workspace, name = argilla_server.add_workspace(), "decider"
    for _ in range(2):
        accounts.admit(argilla_server.home, name, workspace=workspace)
    assert argilla_server.password(name)
    for _ in range(2):
        accounts.admit(argilla_server.home, name, workspace=f"{workspace}-review")
    (user,) = [item for item in accounts.list_users(argilla_server.home) if item.name == name]
    assert (user.role, set(user.workspaces)) == ("annotator", {workspace, f"{workspace}-review"})


@pytest.mark.usefixtures("argilla_environment")
def test_a_recipe_that_changes_gets_its_accounts_and_workspace_from_a_server_that_runs(tmp_path):
    keys = {"stage": "annotate", "completions": "3_sample", "corpus": "0_corpus", "by": "people"}

    def members(**changed):
        with annotate.server(AnnotateConfig(**keys | changed), tmp_path):
            users = accounts.list_users(tmp_path / "argilla")
        return {user.name: set(user.workspaces) for user in users if user.role == "annotator"}

    with launch.serving(tmp_path / "argilla", users=["annotator-1"]):
        both = {"annotator-1": {"audio"}, "annotator-2": {"audio"}}
        assert members(annotators=2) == members(annotators=1) == both
        both["annotator-1"].add("team")
        assert members(annotators=1, workspace="team") == both
        accounts.add_user(tmp_path / "argilla", "ann", workspace="team")
        assert members(annotators=2, workspace="team") == both | {"ann": {"team"}}
        both["annotator-2"].add("team")
        assert members(annotators=3, workspace="team") == both | {"ann": {"team"}}
