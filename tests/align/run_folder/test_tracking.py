import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.run_folder.artifacts import StageFolder, read_json, read_metrics
from align.run_folder.tracking import StageRecord, Tracker, tracking_uri

TOYS = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.syspath_prepend(str(TOYS))
    import toy_stages

    return toy_stages


def start(cwd, *arguments):
    (cwd / "recordings").mkdir(exist_ok=True)  # which the toy corpus names and does not read
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, str(TOYS / "toy_stages.py"), "run", "toy", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_run_killed_and_resumed_is_tracked_without_duplicates(toys, tmp_path):
    from mlflow import MlflowClient

    toys.write_recipe(
        tmp_path / "toy",
        s2_sft=toys.RECIPE["2_sft"].replace("steps: 6", "steps: 120") + "trl: {weight_decay: 0.1}\n",
        s8_gate="stage: gate\nevaluation: 7_evaluate\nthresholds: {min_questions: 1}\n",
        s9_promote=toys.PROMOTE,
    )
    run = tmp_path / "runs" / "toy"
    first = start(tmp_path)
    deadline = time.monotonic() + 120
    links = run / "mlflow.json"
    while "2_sft" not in (read_json(links)["runs"] if links.exists() else {}) or not read_metrics(
        run / ".partial-2_sft" / "metrics.jsonl"
    ):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert 0 < len(read_metrics(run / ".partial-2_sft" / "metrics.jsonl")) < 120

    second = start(tmp_path)
    text, _ = second.communicate(timeout=300)
    assert second.returncode == 0, text
    third = start(tmp_path)
    assert third.communicate(timeout=120)[0].count("up to date") == 5

    links = read_json(run / "mlflow.json")
    assert links["tracking_uri"] == f"sqlite:///{tmp_path}/runs/mlflow.db" == tracking_uri(run)
    client = MlflowClient(tracking_uri=links["tracking_uri"])
    experiment = client.get_experiment_by_name("align/toy")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(one.info.run_name for one in runs) == sorted([*toys.RECIPE, "9_promote", "toy"])
    assert {one.info.status for one in runs} == {"FINISHED"}
    children = [one for one in runs if one.info.run_name != "toy"]
    assert {one.data.tags["mlflow.parentRunId"] for one in children} == {links["run_id"]}

    history = client.get_metric_history(links["runs"]["2_sft"], "loss")
    assert sorted(point.step for point in history) == list(range(1, 121))
    assert {point.step: point.value for point in history}[4] == 0.25
    sft = client.get_run(links["runs"]["2_sft"])
    assert sft.data.params["trl.weight_decay"] == "0.1"
    assert sft.data.tags["stage"] == "sft"
    assert [one.dataset.name for one in sft.inputs.dataset_inputs] == ["1_corpus"]
    corpus = client.get_run(links["runs"]["1_corpus"])
    assert [one.dataset.name for one in corpus.inputs.dataset_inputs] == ["recordings"]
    model = links["models"]["2_sft"]
    assert [one.model_id for one in sft.outputs.model_outputs] == [model]
    evaluated = client.get_run(links["runs"]["7_evaluate"])
    assert [one.model_id for one in evaluated.inputs.model_inputs] == [model]
    assert len(client.search_logged_models([experiment.experiment_id])) == 1
    artifacts = {item.path for item in client.list_artifacts(links["run_id"])}
    assert artifacts == {"report.html", "summary.json"}
    champion = client.get_model_version_by_alias("toy", "champion")
    assert (int(champion.version), champion.tags["gate.verdict"]) == (1, "pass")
    assert champion.run_id == links["runs"]["2_sft"]


def test_an_absent_mlflow_is_told_once_and_never_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    run = tmp_path / "runs" / "toy"
    (run / ".partial-2_sft").mkdir(parents=True)
    warnings = []
    tracker = Tracker(run, "toy", warnings.append)
    record = StageRecord(
        folder=StageFolder(run, "2_sft", "f" * 64),
        kind="sft",
        produces="policy",
        config={"steps": 3},
        inputs={},
        data={},
    )
    tracker.follow(record, "running")
    started = time.monotonic()
    tracker.follow(record, "failed")
    assert time.monotonic() - started < 0.5
    tracker.close("failed", [])
    [warning] = warnings
    assert warning.startswith("MLflow is not reachable, the run goes on without it")


URI = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"tracking_uri": ',
        "[]",
        '{"run_id": 3}',
        "\0" * 200,
        "[" * 100_000,
        f'{{"tracking_uri": "{URI}", "run_id": null, "runs": [], "models": {{}}, "synced": {{}}}}',
        f'{{"tracking_uri": "{URI}", "run_id": "a", "runs": {{}}, "models": {{}}, "synced": {{"2_sft": 3}}}}',
    ],
)
def test_a_damaged_file_of_mlflows_is_named_and_never_stops_a_run(tmp_path, monkeypatch, caplog, text):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", URI)
    (tmp_path / "mlflow.json").write_text(text)
    warnings = []
    tracker = Tracker(tmp_path, "toy", warnings.append)
    tracker.follow(StageRecord(StageFolder(tmp_path, "2_sft", "f" * 64), "sft", "policy", {}, {}, {}), "done")
    tracker.close("done", [])
    (warning,) = warnings
    assert warning.startswith("MLflow is not reachable, the run goes on without it")
    (line,) = [line for line in caplog.messages if "mlflow.json" in line]
    assert line.endswith("; it is made again")


def test_a_key_without_effect_may_change_while_a_stage_is_tracked(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run, warnings = tmp_path / "runs" / "toy", []
    partial = run / ".partial-2_sft"
    partial.mkdir(parents=True)
    for config, step in (({"save_steps": 5}, 1), ({"save_steps": 7, "steps": 3}, 2)):
        with (partial / "metrics.jsonl").open("a") as file:
            file.write(f'{{"step": {step}, "loss": 1.0}}\n')
        tracker = Tracker(run, "toy", warnings.append)
        tracker.follow(
            StageRecord(StageFolder(run, "2_sft", "f" * 64), "sft", "policy", config, {}, {}),
            "interrupted" if step == 1 else "failed",
        )
        tracker.close("interrupted", [])
    assert warnings == []
    client = MlflowClient(tracking_uri=tracking_uri(run))
    run_id = read_json(run / "mlflow.json")["runs"]["2_sft"]
    assert client.get_run(run_id).data.params == {"save_steps": "5", "steps": "3"}
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == [1, 2]
