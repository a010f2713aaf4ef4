"""The MLflow model registry: a checkpoint becomes a version, and an alias says which version is in use.

MLflow moves an alias without checking who holds it. Here a move is a compare-and-set: under a lock, the
holder is read again and must be the expected one, and once more after the move. Reading before and after
alone would not do: two promotions could both read, then both write, and the first champion would be lost.
What remains: someone who moves the alias by other means in the milliseconds between our reading and our
writing, and a process that stands still at that very point for longer than `LEASE_S`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

WEIGHTS = "weights.sha256"
"""The version tag by which checkpoints differ."""
CANDIDATE = "candidate"
"""The alias of the version that was registered last."""
LEASE_S = 30.0
"""A lock that stands for longer is taken for abandoned by a killed process; a move takes a second."""
_EXPERIMENT = "align/registry"


class NotPromoted(RuntimeError):
    """Somebody or something has changed, so the alias stays where it is; the message names it."""


class RegistryDown(RuntimeError):
    """MLflow did not answer, or refused."""


class Holder(NamedTuple):
    """The holder of an alias: its version, that version's weights, and the move that put it there.

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
        return f"{self.name!r} at {without_password(self.uri)}"

    # ---------------------------------------------------------------- reading

    def holder(self, alias: str) -> Holder:
        """The holder of an alias now."""
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
            registered = client.get_model_version(self.name, str(version))
            folder = Path(download_artifacts(registered.source, dst_path=str(to), tracking_uri=self.uri))
        if weights_sha256(folder) != registered.tags.get(WEIGHTS):
            raise LookupError(f"{self}: the files of version {version} have changed since it was registered")
        return folder, {**registered.tags, "version": str(version)}

    # ---------------------------------------------------------------- versions

    def register(self, policy: Path, tags: Mapping[str, str], run_id: str | None) -> int:
        """Make a checkpoint a version and the candidate; returns the version.

        May be repeated: weights that are registered already keep their version, with these tags.

        Args:
            policy: folder with weights, config and processor.
            tags: the evidence of the decision; must hold `weights.sha256`.
            run_id: the MLflow run that made the checkpoint; None makes one that holds it.

        Raises:
            ValueError: the folder has no weights, or the tags have no hash of them.
        """
        if not any(policy.glob("*.safetensors")):
            raise ValueError(f"{policy} holds no safetensors weights; only a finished policy can be promoted")
        if WEIGHTS not in tags:
            raise ValueError(f"promoting {policy} needs the tag {WEIGHTS}, by which versions differ")
        with self._answering() as client:
            _make_model(client, self.name)
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
        with self._answering() as client, self._sole_mover(client, alias) as deadline:
            now = self._holder(client, alias)
            if now.version == version:
                return now
            if now.version != expected.version or now.move not in (expected.move, token):
                raise NotPromoted(f"{self}: {_changed(alias, expected, now)}")
            self._set(client, deadline, alias, version, now, token)
            return now

    def roll_back(self, alias: str) -> tuple[int, int]:
        """Give an alias back to the version that held it before, and note it; returns (from, to).

        Raises:
            NotPromoted: nobody holds it, nobody held it before, or that version was itself rolled back.
        """
        with self._answering() as client, self._sole_mover(client, alias) as deadline:
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
            self._set(client, deadline, alias, int(previous), now, token, is_forward=False)
            return now.version, int(previous)

    def _set(
        self,
        client: MlflowClient,
        deadline: float,
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
        if time.monotonic() > deadline:
            raise NotPromoted(f"{self}: this process stood still during the move; give the command again")
        client.set_registered_model_alias(self.name, alias, str(version))
        after = self._holder(client, alias)
        if (after.version, after.move) != (version, token):
            raise NotPromoted(f"{self}: {_changed(alias, now._replace(version=version, move=token), after)}")

    # ---------------------------------------------------------------- MLflow

    @contextmanager
    def _sole_mover(self, client: MlflowClient, alias: str) -> Iterator[float]:
        """Let one process at a time move an alias; yields the time by which it must have done so.

        MLflow has no locks, but makes a registered model of a name only once, on every kind of store, so
        such a model is the lock. A lock that stands for `LEASE_S` is removed.
        """
        name = f"{self.name} ({alias} is being moved)"
        held, held_since = None, time.monotonic()
        deadline = time.monotonic() + LEASE_S
        while not _make_model(client, name, "A lock of `align promote`; it goes away by itself."):
            lock = _find_model(client, name)
            created = lock and lock.creation_timestamp
            if created != held:
                held, held_since = created, time.monotonic()
            elif lock and time.monotonic() - held_since > LEASE_S:
                client.delete_registered_model(name)
            time.sleep(0.2)
            deadline = time.monotonic() + LEASE_S
        try:
            yield deadline
        finally:
            if time.monotonic() < deadline:  # later it may be another process's
                client.delete_registered_model(name)

    @contextmanager
    def _answering(self) -> Iterator[MlflowClient]:
        """The client, made when first used; its failures as ours."""
        # A server that is away is reported soon: the default is seven retries over minutes.
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
            reason = without_password(str(error).strip().partition("\n")[0])[:300]
            raise RegistryDown(
                f"MLflow's registry did not do its part for {self}: {reason}. Nothing was lost; start MLflow "
                "or mend its address (MLFLOW_TRACKING_URI), then give the same command again"
            ) from error

    def _holder(self, client: MlflowClient, alias: str) -> Holder:
        model = _find_model(client, self.name)
        if model is None:
            return Holder(None, None, None)
        move = model.tags.get(f"{alias}.move")
        if alias not in model.aliases:
            return Holder(None, None, move)
        version = str(model.aliases[alias])
        weights = client.get_model_version(self.name, version).tags.get(WEIGHTS)
        return Holder(int(version), weights, move)

    def _version_of(self, client: MlflowClient, weights: str) -> str | None:
        """The newest version made of these weights."""
        wanted = f"name = {_quoted(self.name)} and tags.`{WEIGHTS}` = {_quoted(weights)}"
        versions = client.search_model_versions(wanted, max_results=1, order_by=["version_number DESC"])
        return str(versions[0].version) if versions else None


def models_with(alias: str, tracking_uri: str) -> list[str]:
    """Names of the registered models of which a version holds the alias, sorted.

    Raises:
        RegistryDown: MLflow does not answer.
    """
    with Registry(tracking_uri, f"any model with a {alias}")._answering() as client:
        return sorted(m.name for m in client.search_registered_models(max_results=1000) if alias in m.aliases)


def _changed(alias: str, expected: Holder, now: Holder) -> str:
    """The old and the new holder of the alias, for a person."""
    if now.version == expected.version:
        return (
            f"version {now.version} is {alias} again, but others were in between ({now.move}); "
            "the verdict is older than that"
        )
    was, is_now = (f"version {holder.version}" if holder.version else "nobody" for holder in (expected, now))
    return f"the {alias} has changed: it was {was} when the gate decided, now it is {is_now} ({now.move})"


@contextmanager
def _tolerating(*codes: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code not in codes:
            raise


def _find_model(client: MlflowClient, name: str) -> RegisteredModel | None:
    with _tolerating("RESOURCE_DOES_NOT_EXIST"):
        return client.get_registered_model(name)
    return None


def _make_model(client: MlflowClient, name: str, description: str | None = None) -> bool:
    """Make a registered model; False where there is one, also one that is being removed right now."""
    with _tolerating("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
        client.create_registered_model(name, description=description)
        return True
    return False


def _run_for(client: MlflowClient, weights: str) -> str:
    """The run that holds these weights' files, where no training run is known."""
    experiment = client.get_experiment_by_name(_EXPERIMENT)
    if experiment:
        where = experiment.experiment_id
    else:
        where = client.create_experiment(
            _EXPERIMENT, artifact_location=_artifacts_beside(client.tracking_uri)
        )
    runs = client.search_runs([where], filter_string=f"tags.`{WEIGHTS}` = {_quoted(weights)}")
    if runs:
        return str(runs[0].info.run_id)
    run = client.create_run(where, tags={WEIGHTS: weights}, run_name=weights[:12])
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def without_password(text: str) -> str:
    """A text with addresses, without what stands before their @."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def _artifacts_beside(uri: str) -> str | None:
    """The folder for files: beside a sqlite file, else None: the server decides."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()


def _quoted(value: str) -> str:
    """A value as MLflow's filters want it; they know both quotes and no escapes."""
    return f'"{value}"' if "'" in value else f"'{value}'"
