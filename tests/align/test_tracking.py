import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.run_folder.artifacts import read_json, read_metrics
from align.run_folder.tracking import StageRecord, Tracker, tracking_uri

TOYS = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.syspath_prepend(str(TOYS))
    import toy_stages

    return toy_stages


def start(cwd, *arguments):
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, str(TOYS / "toy_stages.py"), "run", "toy", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_run_killed_and_resumed_is_tracked_without_duplicates(toys, tmp_path):
    from mlflow import MlflowClient

    toys.write_recipe(
        tmp_path / "toy",
        s2_sft=toys.RECIPE["2_sft"].replace("steps: 6", "steps: 50") + "trl: {weight_decay: 0.1}\n",
        s8_gate="stage: gate\nevaluation: 7_evaluate\nthresholds: {min_questions: 1}\n",
        s9_promote=toys.PROMOTE,
    )
    run = tmp_path / "runs" / "toy"
    first = start(tmp_path)
    deadline = time.monotonic() + 120
    while "2_sft" not in (read_json(run / "mlflow.json")["runs"] if (run / "mlflow.json").exists() else {}):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert 0 < len(read_metrics(run / ".partial-2_sft" / "metrics.jsonl")) < 50

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
        name="2_sft",
        kind="sft",
        produces="policy",
        fingerprint="f" * 64,
        config={"steps": 3},
        inputs={},
        data={},
        partial=run / ".partial-2_sft",
        final=run / "2_sft",
    )
    tracker.follow(record, "running")
    started = time.monotonic()
    tracker.follow(record, "failed")
    assert time.monotonic() - started < 0.5
    tracker.close("failed", [])
    [warning] = warnings
    assert warning.startswith("MLflow is not reachable, the run goes on without it")
