"""The MLflow registry: versions, and an alias that moves only from whom it was expected to be with."""

import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from align.release import registry as registry_module
from align.release.registry import Holder, NotPromoted, Registry, RegistryDown
from align.run_folder.artifacts import sha256_file

NAME = "it's a toy"
NOBODY = Holder(None, None, None)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """Making MLflow's tables takes seconds, so it is done once."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Registry(f"sqlite:///{path}", "x").holder("champion")
    return path


@pytest.fixture
def uri(tmp_path, empty_database):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def policy(folder, value):
    folder.mkdir()
    save_file({"a": np.full(3, value, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def register(registry, folder, run_id=None, **tags):
    tags["weights.sha256"] = sha256_file(folder / "model.safetensors")
    return registry.register(folder, tags, run_id)


def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def test_registering_is_idempotent_and_makes_the_candidate(tmp_path, uri):
    from mlflow.artifacts import download_artifacts

    mlflow = client(uri)
    experiment = mlflow.create_experiment("align/toy", artifact_location=(tmp_path / "files").as_uri())
    run_id = mlflow.create_run(experiment).info.run_id
    registry = Registry(uri, NAME)
    first, second = policy(tmp_path / "first", 1.0), policy(tmp_path / "second", 2.0)
    assert register(registry, first, run_id, verdict="pass") == 1
    assert register(registry, first, run_id, verdict="pass again") == 1
    assert mlflow.get_model_version(NAME, "1").tags["verdict"] == "pass again"
    assert register(registry, second) == 2  # without a run of its own
    assert int(mlflow.get_model_version_by_alias(NAME, "candidate").version) == 2
    assert registry.holder("champion") == NOBODY
    assert len(mlflow.search_model_versions('name = "it\'s a toy"')) == 2
    for version, value in (("1", 1.0), ("2", 2.0)):
        source = mlflow.get_model_version_download_uri(NAME, version)
        got = str(tmp_path / f"got{version}")
        files = download_artifacts(artifact_uri=source, dst_path=got, tracking_uri=uri)
        assert load_file(f"{files}/model.safetensors")["a"].tolist() == [value] * 3
    assert (tmp_path / "mlartifacts").is_dir()  # beside the database, wherever the command was given


def test_a_folder_without_weights_is_refused(tmp_path, uri):
    with pytest.raises(ValueError, match="holds no safetensors weights"):
        Registry(uri, NAME).register(tmp_path, {}, None)


def three(tmp_path, uri):
    registry = Registry(uri, NAME)
    return registry, [register(registry, policy(tmp_path / f"p{i}", float(i))) for i in range(3)]


def test_an_alias_moves_only_from_the_expected_holder(tmp_path, uri):
    registry, (one, two, three_) = three(tmp_path, uri)
    assert registry.move("champion", one, expected=NOBODY, why="gate a") == NOBODY
    first = registry.holder("champion")
    assert first.version == one
    assert first.weights == sha256_file(tmp_path / "p0" / "model.safetensors")
    registry.move("champion", one, expected=NOBODY, why="gate a")  # a repetition changes nothing
    assert registry.holder("champion") == first
    registry.move("champion", two, expected=first, why="gate b")
    with pytest.raises(NotPromoted) as refused:
        registry.move("champion", three_, expected=first, why="gate c")
    assert "it was version 1 when the gate decided, now it is version 2 (1 -> 2: gate b)" in str(
        refused.value
    )
    with pytest.raises(NotPromoted, match="it was nobody when the gate decided"):
        registry.move("champion", three_, expected=NOBODY, why="gate c")
    assert registry.holder("champion").version == two
    assert client(uri).get_model_version(NAME, "2").tags["champion.previous"] == "1"
    assert [model.name for model in client(uri).search_registered_models()] == [NAME]  # the lock is gone


def test_a_move_that_was_killed_half_way_can_be_repeated(tmp_path, uri):
    registry, (one, *_) = three(tmp_path, uri)
    client(uri).set_registered_model_tag(NAME, "champion.move", "nobody -> 1: gate a")  # the alias was next
    with pytest.raises(NotPromoted):
        registry.move("champion", one, expected=NOBODY, why="another gate")
    registry.move("champion", one, expected=NOBODY, why="gate a")
    assert registry.holder("champion").version == one


def test_rolling_back_gives_the_alias_back_once_and_is_noted(tmp_path, uri):
    registry, (one, two, three_) = three(tmp_path, uri)
    with pytest.raises(NotPromoted, match="no champion to roll back"):
        registry.roll_back("champion")
    before = NOBODY
    for version in (one, two, three_):
        registry.move("champion", version, expected=before, why=f"gate {version}")
        before = registry.holder("champion")
    assert registry.roll_back("champion") == (3, 2)
    assert registry.holder("champion").version == two
    assert client(uri).get_model_version(NAME, "3").tags["champion.rolled_back"].endswith("to version 2")
    assert "3 -> 2: rolled back" in client(uri).get_registered_model(NAME).tags["champion.move"]
    assert registry.roll_back("champion") == (2, 1)
    with pytest.raises(NotPromoted, match="version 1 is the first champion"):
        registry.roll_back("champion")


def test_who_was_rolled_back_needs_a_new_verdict(tmp_path, uri):
    registry, (one, two, _) = three(tmp_path, uri)
    registry.move("champion", one, expected=NOBODY, why="gate 1")
    noted = registry.holder("champion")
    registry.move("champion", two, expected=noted, why="gate 2")
    registry.roll_back("champion")
    with pytest.raises(NotPromoted, match="version 1 is champion again, but others were in between"):
        registry.move("champion", two, expected=noted, why="gate 2")
    registry.move("champion", two, expected=registry.holder("champion"), why="gate 2, made again")
    assert "champion.rolled_back" not in client(uri).get_model_version(NAME, "2").tags
    assert registry.roll_back("champion") == (2, 1)


RACE = """
import sys, time
from pathlib import Path
from align.release.registry import Holder, NotPromoted, Registry
uri, name, version, go = sys.argv[1:]
registry = Registry(uri, name)
expected = registry.holder("champion")
Path(f"{go}.{version}").touch()
while not Path(go).exists():
    time.sleep(0.001)
try:
    registry.move("champion", int(version), expected=expected, why=f"gate {version}")
except NotPromoted as error:
    sys.exit(f"refused: {error}")
print("moved")
"""


def race(uri, go, versions):
    """Processes that all saw the same holder move the alias at once; returns what each said."""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, uri, NAME, str(version), str(go)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for version in versions
    ]
    deadline = time.monotonic() + 120
    while len(list(go.parent.glob(f"{go.name}.*"))) < len(versions):
        assert time.monotonic() < deadline, [racer.poll() for racer in racers]
        time.sleep(0.05)
    go.touch()
    return [racer.communicate(timeout=120)[0].strip() for racer in racers]


def test_of_concurrent_promotions_one_wins(tmp_path, uri):
    registry, versions = three(tmp_path, uri)
    said = race(uri, tmp_path / "go", versions)
    assert sorted(text.split(":")[0] for text in said) == ["moved", "refused", "refused"], said
    winner = versions[said.index("moved")]
    assert registry.holder("champion").version == winner
    for text in said:
        assert text == "moved" or f"it was nobody when the gate decided, now it is version {winner}" in text


def test_a_lock_is_waited_for_and_taken_from_the_dead(tmp_path, uri, monkeypatch):
    registry, (one, two, _) = three(tmp_path, uri)
    monkeypatch.setattr(registry_module, "LEASE_S", 1.0)
    client(uri).create_registered_model(f"{NAME} (champion is being moved)")  # whoever made it was killed
    started = time.monotonic()
    registry.move("champion", one, expected=NOBODY, why="gate")
    assert time.monotonic() - started > 1.0
    assert registry.holder("champion").version == one
    assert [model.name for model in client(uri).search_registered_models()] == [NAME]


def test_a_mover_that_stood_still_moves_nothing(tmp_path, uri, monkeypatch):
    registry, (one, two, _) = three(tmp_path, uri)
    registry.move("champion", one, expected=NOBODY, why="gate")
    monkeypatch.setattr(registry_module, "LEASE_S", -1.0)  # the lease is over before the alias is written
    with pytest.raises(NotPromoted, match="stood still"):
        registry.move("champion", two, expected=registry.holder("champion"), why="gate 2")
    assert registry.holder("champion").version == one


def test_an_absent_mlflow_is_told_of_soon(monkeypatch):
    started = time.monotonic()
    with pytest.raises(RegistryDown, match="did not do its part for 'toy' at http://127.0.0.1:9"):
        Registry("http://me:secret@127.0.0.1:9", "toy").holder("champion")
    assert time.monotonic() - started < 20
