"""The MLflow model registry: a checkpoint becomes a version, and an alias says which version is in use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

WEIGHTS = "weights.sha256"
"""The version tag that tells checkpoints apart."""
_EXPERIMENT = "align/registry"


def promote(
    policy: Path,
    *,
    model_name: str,
    alias: str,
    tags: dict[str, str],
    tracking_uri: str,
    run_id: str | None,
) -> int:
    """Register a checkpoint and move an alias to it; returns the version.

    May be repeated: weights that are registered already keep their version. The alias moves last, so
    whoever follows it never meets a version without files or tags.

    Args:
        policy: folder with weights, config and processor.
        model_name: the registered model; made if it does not exist.
        alias: such as `champion`.
        tags: what the decision rests on; must hold `weights.sha256`.
        tracking_uri: MLflow server or database.
        run_id: the MLflow run that made the checkpoint; None makes one that holds it.

    Raises:
        ValueError: the folder has no weights, or the tags do not say which.
    """
    from mlflow import MlflowClient

    if not any(policy.glob("*.safetensors")):
        raise ValueError(f"{policy} holds no safetensors weights; only a finished policy can be promoted")
    if WEIGHTS not in tags:
        raise ValueError(f"promoting {policy} needs the tag {WEIGHTS}, which tells its version from others")
    client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
    _ensure_model(client, model_name)
    version = _version_of(client, model_name, tags[WEIGHTS])
    if version is None:
        run_id = run_id or _run_for(client, tags[WEIGHTS])
        place = f"checkpoint-{tags[WEIGHTS][:12]}"  # a run may make other weights later: files never change
        client.log_artifacts(run_id, str(policy), place)
        source = f"runs:/{run_id}/{place}"
        made = client.create_model_version(model_name, source=source, run_id=run_id, tags=tags)
        version = str(made.version)
    for key, value in tags.items():
        client.set_model_version_tag(model_name, version, key, value)
    client.set_registered_model_alias(model_name, alias, version)
    return int(version)


def _ensure_model(client: MlflowClient, model_name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model_name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _version_of(client: MlflowClient, model_name: str, weights: str) -> str | None:
    """The newest version made of these weights."""
    wanted = f"name = {_quoted(model_name)} and tags.`{WEIGHTS}` = {_quoted(weights)}"
    found = client.search_model_versions(wanted, max_results=1, order_by=["version_number DESC"])
    return str(found[0].version) if found else None


def _run_for(client: MlflowClient, weights: str) -> str:
    """The run that holds these weights' files, where no training run is known."""
    experiment = client.get_experiment_by_name(_EXPERIMENT)
    where = experiment.experiment_id if experiment else client.create_experiment(_EXPERIMENT)
    found = client.search_runs([where], filter_string=f"tags.`{WEIGHTS}` = {_quoted(weights)}")
    if found:
        return str(found[0].info.run_id)
    made = client.create_run(where, tags={WEIGHTS: weights}, run_name=weights[:12])
    client.set_terminated(made.info.run_id)
    return str(made.info.run_id)


def _quoted(value: str) -> str:
    """A value as MLflow's filters want it; they know both quotes and no escapes."""
    return f'"{value}"' if "'" in value else f"'{value}'"
