import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from align.artifacts import sha256_file
from align.release import registry


def policy(folder, value):
    folder.mkdir()
    save_file({"a": np.full(3, value, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_promoting_is_idempotent_and_moves_the_alias_last(tmp_path):
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.create_experiment("align/toy", artifact_location=(tmp_path / "files").as_uri())
    run_id = client.create_run(experiment).info.run_id

    def promote(folder, **tags):
        tags["weights.sha256"] = sha256_file(folder / "model.safetensors")
        return registry.promote(
            folder, model_name="it's a toy", alias="champion", tags=tags, tracking_uri=uri, run_id=run_id
        )

    first, second = policy(tmp_path / "first", 1.0), policy(tmp_path / "second", 2.0)
    assert promote(first, verdict="pass") == 1
    assert promote(first, verdict="pass again") == 1
    assert client.get_model_version("it's a toy", "1").tags["verdict"] == "pass again"
    assert promote(second) == 2
    assert int(client.get_model_version_by_alias("it's a toy", "champion").version) == 2
    assert promote(first) == 1
    assert int(client.get_model_version_by_alias("it's a toy", "champion").version) == 1
    assert len(client.search_model_versions('name = "it\'s a toy"')) == 2
    for version, value in (("1", 1.0), ("2", 2.0)):
        source = client.get_model_version_download_uri("it's a toy", version)
        got = str(tmp_path / f"got{version}")
        files = download_artifacts(artifact_uri=source, dst_path=got, tracking_uri=uri)
        assert load_file(f"{files}/model.safetensors")["a"].tolist() == [value] * 3


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no safetensors weights"):
        registry.promote(
            tmp_path, model_name="toy", alias="champion", tags={}, tracking_uri="sqlite://", run_id=None
        )
