"""Promotion refuses what the gate did not see, and completes once MLflow is back."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from align.cli import promote
from align.recipe.config.evaluation import PromoteConfig
from align.release.registry import NotPromoted, Registry, RegistryDown
from align.run_folder.artifacts import StageFolder, read_manifest
from align.stages import promote as stage

app = typer.Typer()
app.command()(promote.promote)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Registry(f"sqlite:///{path}", "x").holder("champion")
    return path


@pytest.fixture
def gated(tmp_path, monkeypatch, empty_database):
    """The module that makes runs; those in `tmp_path` have one registry."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    import gated_run

    return gated_run


def registry(run, gated):
    return Registry(f"sqlite:///{run.parent / 'mlflow.db'}", gated.MODEL)


def promote(run, gated, alias="champion"):
    return stage.promote(run / "8_gate", "6_dpo", model_name=gated.MODEL, alias=alias)


def refused(run, gated):
    with pytest.raises(NotPromoted) as caught:
        promote(run, gated)
    assert registry(run, gated).holder("champion").version is None
    return str(caught.value)


def test_a_passed_candidate_becomes_champion_with_what_it_rests_on(gated, tmp_path):
    run = gated.make(tmp_path / "run")
    gated.gate(run)
    links = {"tracking_uri": registry(run, gated).uri, "run_id": "parent", "runs": {"8_gate": "gate"}}
    (run / "mlflow.json").write_text(json.dumps(links))
    config = PromoteConfig(stage="promote", policy="6_dpo", verdict="8_gate", model_name=gated.MODEL)
    out = StageFolder(run, "9_promote", "made")
    out.open()
    assert stage.run(config, {"6_dpo": run / "6_dpo", "8_gate": run / "8_gate"}, out) == {"version": 1.0}
    done = json.loads((out.path / "promotion.json").read_text())
    assert (done["version"], done["previous"]) == (1, None)
    digest = {
        name: read_manifest(run / name)["output_digest"] for name in ("0_corpus", "4_annotate", "8_gate")
    }
    told = done["tags"]
    assert told["gate.verdict"] == "pass"
    assert told["gate.digest"] == digest["8_gate"]
    assert told["dataset.0_corpus"] == digest["0_corpus"]
    assert told["dataset.4_annotate"] == digest["4_annotate"]
    assert (told["run.parent"], told["gate.run"], told["judge.name"]) == ("parent", "gate", "facts")
    holder = registry(run, gated).holder("champion")
    assert (holder.version, holder.weights) == (1, told["weights.sha256"])
    assert registry(run, gated).holder("candidate").version == 1
    assert promote(run, gated).version == 1  # again: nothing new


def test_a_closed_gate_is_refused(gated, tmp_path):
    run = gated.make(tmp_path / "run", scores=gated.scores(policies__dpo__overall__n=3))
    assert gated.gate(run)["verdict"] == "fail"
    message = refused(run, gated)
    assert "8_gate says FAIL (questions: 3, needed at least 4)" in message


def test_what_changed_is_named(gated, tmp_path):
    run = gated.make(tmp_path / "run")
    gated.gate(run)
    kept = tmp_path / "kept"
    shutil.copytree(run, kept)

    def fresh():
        shutil.rmtree(run)
        shutil.copytree(kept, run)

    verdict = run / "8_gate" / "verdict.json"
    verdict.write_text(verdict.read_text().replace('"baseline": "2_sft"', '"baseline": "2_sft "'))
    assert f"{verdict} is not what the gate wrote" in refused(run, gated)

    fresh()
    gated.evaluate(run, gated.scores(policies__dpo__overall__n=5))
    assert "7_evaluate was made again after 8_gate had judged it" in refused(run, gated)

    fresh()
    (run / "7_evaluate" / "scores.json").write_text("{}")
    assert "scores.json is not what the evaluation wrote" in refused(run, gated)

    fresh()
    gated.stage(run, "6_dpo", "dpo", ["0_corpus", "2_sft", "5_pairs"], gated.weights(3.0))
    assert "6_dpo was made again after 7_evaluate had scored it" in refused(run, gated)

    fresh()
    gated.weights(3.0)(tmp_path)  # other weights of the same shape
    shutil.copy(tmp_path / "model/model.safetensors", run / "6_dpo/model/model.safetensors")
    assert "6_dpo/model/model.safetensors has changed since 6_dpo was made" in refused(run, gated)

    fresh()
    shutil.copy(run / "2_sft/model/model.safetensors", run / "6_dpo/model/adapter.safetensors")
    assert "adapter.safetensors was added after 6_dpo had been made" in refused(run, gated)

    fresh()
    with pytest.raises(NotPromoted, match="8_gate judged 6_dpo, not 2_sft"):
        stage.promote(run / "8_gate", "2_sft", model_name=gated.MODEL, alias="champion")
    with pytest.raises(NotPromoted, match="compared with 'toy-audio', not with 'other'"):
        stage.promote(run / "8_gate", "6_dpo", model_name="other", alias="champion")
    assert promote(run, gated).version == 1


def test_a_champion_that_changed_meanwhile_stays(gated, tmp_path):
    first, second = gated.make(tmp_path / "first", value=2.0), gated.make(tmp_path / "second", value=3.0)
    for run in (first, second):  # both see that nobody is champion
        gated.gate(run, replaces_any_champion=True)
    assert promote(first, gated).version == 1
    with pytest.raises(NotPromoted) as caught:
        promote(second, gated)
    message = str(caught.value)
    assert "it was nobody when the gate decided, now it is version 1" in message
    assert f"Version 2 stays candidate. To decide anew: rm -r {second / '8_gate'}" in message
    assert registry(first, gated).holder("champion").version == 1

    # Deciding anew, the gate sees a champion that it has not compared with.
    shutil.rmtree(second / "8_gate")
    assert "champion: version 1 was not compared with" in gated.gate(second)["reasons"][0]
    shutil.rmtree(second / "8_gate")
    gated.gate(second, replaces_any_champion=True)
    assert promote(second, gated)._replace(tags={}) == (2, 1, {})


def test_a_gate_that_asked_for_no_champion_replaces_none(gated, tmp_path):
    first, second = gated.make(tmp_path / "first", value=2.0), gated.make(tmp_path / "second", value=3.0)
    for run in (first, second):
        gated.gate(run, model_name=None)
    assert promote(first, gated).version == 1
    with pytest.raises(NotPromoted, match="with `model_name` in the gate's file"):
        promote(second, gated)


# -------------------------------------------------------------------------- the verb


def align_promote(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.output


def test_the_verb_promotes_and_rolls_back(gated, tmp_path):
    first, second = gated.make(tmp_path / "first", value=2.0), gated.make(tmp_path / "second", value=3.0)
    gated.gate(first)
    assert align_promote(first, "--to", "candidate")[0] == 0
    assert registry(first, gated).holder("champion").version is None
    code, said = align_promote(first)
    assert (code, said.splitlines()[0]) == (0, "toy-audio: champion is version 1")
    gated.gate(second, replaces_any_champion=True)
    code, said = align_promote(second)
    assert (code, said.splitlines()[0]) == (0, "toy-audio: champion is version 2, it was version 1")
    code, said = align_promote(second, "--rollback")
    assert (code, said.strip()) == (0, "toy-audio: champion is version 1 again, it was version 2")
    code, said = align_promote(second)  # its verdict is older than the rollback
    assert code == 1
    assert "version 1 is champion again, but others were in between" in said
    code, said = align_promote(second, "--rollback")
    assert code == 1
    assert "version 1 is the first champion" in said


def test_the_verb_has_the_gates_exit_codes(gated, tmp_path):
    low = {"ci_low": -0.1, "ci_high": 0.1}
    for name, changes, code in (
        ("refused", {"policies__dpo__overall__n": 3}, 3),
        ("open", {"comparison__factuality": low}, 5),
    ):
        run = gated.make(tmp_path / name, scores=gated.scores(**changes))
        gated.gate(run)
        found, said = align_promote(run)
        assert found == code
        assert "6_dpo is not promoted" in said
    code, said = align_promote(tmp_path / "nowhere")
    assert code == 2
    assert "has no finished gate; first: align run RECIPE" in said


# -------------------------------------------------------------------------- a real MLflow server


class Server:
    """`mlflow server` on a sqlite file, to be started."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1"]
        files = ["--artifacts-destination", str(self.folder / "files")]
        log = (self.folder / "log").open("ab")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_TRACKING")}
        self.process = subprocess.Popen(
            [*command, *store, *files], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + 180
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, (self.folder / "log").read_text()[-2000:]
                assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
                time.sleep(0.2)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path, empty_database):
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    server = Server(folder)
    yield server
    server.kill()


def test_mlflow_that_is_away_promotes_nothing_and_a_repetition_completes(
    gated, tmp_path, server, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    run = gated.make(tmp_path / "run")
    with pytest.raises(RegistryDown):
        gated.gate(run)
    server.start()
    assert gated.gate(run)["verdict"] == "pass"

    server.kill()
    started = time.monotonic()
    code, said = align_promote(run)
    assert time.monotonic() - started < 30
    assert code == 1
    assert f"MLflow's registry did not do its part for 'toy-audio' at {server.url}" in said
    assert "then give the same command again" in said

    server.start()
    assert align_promote(run)[0] == 0
    holder = Registry(server.url, gated.MODEL).holder("champion")
    assert holder.version == 1
    got = tmp_path / "got"
    from mlflow.artifacts import download_artifacts

    files = download_artifacts(f"models:/{gated.MODEL}@champion", dst_path=str(got), tracking_uri=server.url)
    weights = Path(files) / "model.safetensors"
    assert weights.read_bytes() == (run / "6_dpo/model/model.safetensors").read_bytes()
    assert align_promote(run)[0] == 0  # again: nothing new
    assert Registry(server.url, gated.MODEL).holder("champion") == holder
