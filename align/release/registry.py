"""The MLflow model registry: a checkpoint becomes a version, and an alias says which version is in use.

MLflow moves an alias without asking who held it. Here a move is a compare-and-set: under a lock, the
holder is read again and must be the one that was expected, and once more after the move. What remains:
someone who moves the alias by other means in the milliseconds between our reading and our writing, and a
process that stands still at that very point for so long that its lock is taken for abandoned.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from align.release.alias_lock import Lock, NotPromoted

if TYPE_CHECKING:
    from mlflow import MlflowClient

WEIGHTS = "weights.sha256"
"""The version tag that tells checkpoints apart."""
CANDIDATE = "candidate"
"""The alias of the version that was registered last."""
_EXPERIMENT = "align/registry"


class RegistryDown(RuntimeError):
    """MLflow did not answer or did not do what it was asked."""


class Holder(NamedTuple):
    """Who holds an alias: its version, that one's weights, and the move that put it there.

    All None while nobody does. Equal versions with different moves mean that others held it in between.
    """

    version: int | None
    weights: str | None
    move: str | None


class Registry:
    """One registered model at an MLflow server or database. Its methods raise RegistryDown."""

    def __init__(self, tracking_uri: str, model_name: str) -> None:
        self.uri = tracking_uri
        self.name = model_name
        self._client: MlflowClient | None = None

    def __str__(self) -> str:
        """The model and where it is; a password in the address stays out."""
        return f"{self.name!r} at {_without_password(self.uri)}"

    # ---------------------------------------------------------------- reading

    def holder(self, alias: str) -> Holder:
        """Who holds an alias now."""
        with self._answering() as client:
            return self._holder(client, alias)

    def fetch(self, alias: str, to: Path) -> tuple[Path, dict[str, str]]:
        """Copy the files of the version that holds an alias below `to`; returns their folder and its tags.

        Raises:
            LookupError: nobody holds the alias, or the files are not those that were registered.
        """
        from mlflow.artifacts import download_artifacts

        from align.models.shards import weights_sha256

        with self._answering() as client:
            version = self._holder(client, alias).version
            if version is None:
                raise LookupError(f"{self}: nobody is {alias}")
            found = client.get_model_version(self.name, str(version))
            folder = Path(download_artifacts(found.source, dst_path=str(to), tracking_uri=self.uri))
        if weights_sha256(folder) != found.tags.get(WEIGHTS):
            raise LookupError(f"{self}: the files of version {version} have changed since it was registered")
        return folder, {**found.tags, "version": str(version)}

    # ---------------------------------------------------------------- versions

    def register(self, policy: Path, tags: Mapping[str, str], run_id: str | None) -> int:
        """Make a checkpoint a version and the candidate; returns the version.

        May be repeated: weights that are registered already keep their version, with these tags.

        Args:
            policy: folder with weights, config and processor.
            tags: what the decision rests on; must hold `weights.sha256`.
            run_id: the MLflow run that made the checkpoint; None makes one that holds it.

        Raises:
            ValueError: the folder has no weights, or the tags do not say which.
        """
        if not any(policy.glob("*.safetensors")):
            raise ValueError(f"{policy} holds no safetensors weights; only a finished policy can be promoted")
        if WEIGHTS not in tags:
            raise ValueError(
                f"promoting {policy} needs the tag {WEIGHTS}, which tells its version from others"
            )
        with self._answering() as client:
            self._ensure_model(client)
            version = self._version_of(client, tags[WEIGHTS])
            if version is None:
                run_id = run_id or _run_for(client, tags[WEIGHTS])
                place = f"checkpoint-{tags[WEIGHTS][:12]}"  # a run may make other weights later: files stay
                client.log_artifacts(run_id, str(policy), place)
                source = f"runs:/{run_id}/{place}"
                version = client.create_model_version(self.name, source, run_id, tags=dict(tags)).version
            for key, value in tags.items():
                client.set_model_version_tag(self.name, str(version), key, value)
            client.set_registered_model_alias(self.name, CANDIDATE, str(version))
        return int(version)

    # ---------------------------------------------------------------- moving an alias

    def move(self, alias: str, version: int, *, expected: Holder, why: str) -> Holder:
        """Give an alias to a version if `expected` still holds it; returns who held it.

        May be repeated, also after a failure half-way: a version that holds the alias already keeps it.

        Args:
            alias: such as `champion`.
            version: as `register` returned it.
            expected: the holder that the candidate was compared with.
            why: what stands behind the move, e.g. the digest of a verdict; equal ones mean a repetition.

        Raises:
            NotPromoted: naming who holds the alias instead.
        """
        token = f"{expected.version or 'nobody'} -> {version}: {why}"
        with self._answering() as client, Lock(client, self.name, alias) as lock:
            now = self._holder(client, alias)
            if now.version == version:
                return now
            if now.version != expected.version or now.move not in (expected.move, token):
                raise NotPromoted(f"{self}: {_changed(alias, expected, now)}")
            self._set(client, lock, alias, version, now, token)
            return now

    def roll_back(self, alias: str) -> tuple[int, int]:
        """Give an alias back to the version that held it before, and note it; returns (from, to).

        Raises:
            NotPromoted: nobody holds it, nobody held it before, or that version was itself rolled back.
        """
        with self._answering() as client, Lock(client, self.name, alias) as lock:
            now = self._holder(client, alias)
            if now.version is None:
                raise NotPromoted(f"{self}: there is no {alias} to roll back")
            tags = client.get_model_version(self.name, str(now.version)).tags
            previous = tags.get(f"{alias}.previous", "")
            if not previous:
                raise NotPromoted(
                    f"{self}: version {now.version} is the first {alias}, there is none before it"
                )
            if f"{alias}.rolled_back" in client.get_model_version(self.name, previous).tags:
                raise NotPromoted(
                    f"{self}: version {previous}, {alias} before version {now.version}, was itself rolled "
                    "back; promote the run whose checkpoint is wanted"
                )
            when = datetime.now(UTC).isoformat(timespec="seconds")
            note = f"{when} to version {previous}"
            client.set_model_version_tag(self.name, str(now.version), f"{alias}.rolled_back", note)
            token = f"{now.version} -> {previous}: rolled back {when}"
            self._set(client, lock, alias, int(previous), now, token, is_forward=False)
            return now.version, int(previous)

    def _set(
        self,
        client: MlflowClient,
        lock: Lock,
        alias: str,
        version: int,
        now: Holder,
        token: str,
        *,
        is_forward: bool = True,
    ) -> None:
        """Note the move, make it last, and look whether it held."""
        if is_forward:
            client.set_model_version_tag(self.name, str(version), f"{alias}.previous", str(now.version or ""))
            client.delete_model_version_tag(self.name, str(version), f"{alias}.rolled_back")
        client.set_registered_model_tag(self.name, f"{alias}.move", token)
        lock.check()
        client.set_registered_model_alias(self.name, alias, str(version))
        after = self._holder(client, alias)
        if (after.version, after.move) != (version, token):
            raise NotPromoted(f"{self}: {_changed(alias, now._replace(version=version, move=token), after)}")

    # ---------------------------------------------------------------- MLflow

    @contextmanager
    def _answering(self) -> Iterator[MlflowClient]:
        """The client, made when first used; its failures as ours."""
        # A server that is away is told of soon: the default is seven retries over minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            if self._client is None:
                self._client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            yield self._client
        except (MlflowException, RequestException, SQLAlchemyError) as error:
            reason = _without_password(str(error).strip().partition("\n")[0])[:300]
            raise RegistryDown(
                f"MLflow's registry did not do its part for {self}: {reason}. Nothing was lost; start MLflow "
                "or mend its address (MLFLOW_TRACKING_URI), then give the same command again"
            ) from error

    def _ensure_model(self, client: MlflowClient) -> None:
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _holder(self, client: MlflowClient, alias: str) -> Holder:
        from mlflow.exceptions import MlflowException

        try:
            model = client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return Holder(None, None, None)
            raise
        move = model.tags.get(f"{alias}.move")
        if alias not in model.aliases:
            return Holder(None, None, move)
        version = str(model.aliases[alias])
        weights = client.get_model_version(self.name, version).tags.get(WEIGHTS)
        return Holder(int(version), weights, move)

    def _version_of(self, client: MlflowClient, weights: str) -> str | None:
        """The newest version made of these weights."""
        wanted = f"name = {_quoted(self.name)} and tags.`{WEIGHTS}` = {_quoted(weights)}"
        found = client.search_model_versions(wanted, max_results=1, order_by=["version_number DESC"])
        return str(found[0].version) if found else None


def _changed(alias: str, expected: Holder, now: Holder) -> str:
    """Who held the alias and who does, for a person."""
    if now.version == expected.version:
        return (
            f"version {now.version} is {alias} again, but others were in between ({now.move}); "
            "the verdict is older than that"
        )
    was, is_now = (f"version {one.version}" if one.version else "nobody" for one in (expected, now))
    return f"the {alias} has changed: it was {was} when the gate decided, now it is {is_now} ({now.move})"


def _run_for(client: MlflowClient, weights: str) -> str:
    """The run that holds these weights' files, where no training run is known."""
    experiment = client.get_experiment_by_name(_EXPERIMENT)
    if experiment:
        where = experiment.experiment_id
    else:
        where = client.create_experiment(
            _EXPERIMENT, artifact_location=_artifacts_beside(client.tracking_uri)
        )
    found = client.search_runs([where], filter_string=f"tags.`{WEIGHTS}` = {_quoted(weights)}")
    if found:
        return str(found[0].info.run_id)
    made = client.create_run(where, tags={WEIGHTS: weights}, run_name=weights[:12])
    client.set_terminated(made.info.run_id)
    return str(made.info.run_id)


def _without_password(text: str) -> str:
    """A text with addresses, without what stands before their @."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def _artifacts_beside(uri: str) -> str | None:
    """Where the files go: beside a sqlite file, else where the server puts them."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()


def _quoted(value: str) -> str:
    """A value as MLflow's filters want it; they know both quotes and no escapes."""
    return f'"{value}"' if "'" in value else f"'{value}'"
