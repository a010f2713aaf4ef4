"""MLflow beside the run folder: what the folder holds is copied there, and training never waits for it.

The run folder is the truth. A thread copies it to MLflow every few seconds; whatever could not be copied
(MLflow down, process killed) is copied by the next `align run`, nothing twice. A failing MLflow is told
once and changes nothing else.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.run_folder.artifacts import METRICS, git_commit, read_json, read_manifest, read_metrics, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

LINKS = "mlflow.json"
"""In the run folder: `tracking_uri`, `run_id`, and per stage its MLflow run and logged model."""

Status = Literal["running", "waiting", "done", "failed", "interrupted"]
_MLFLOW_STATUS = {
    "running": "RUNNING",
    "waiting": "SCHEDULED",
    "done": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}
_SYNC_EVERY_S = 3.0
_WAIT_AT_END_S = 60.0


def tracking_uri(run: Path) -> str:
    """Where a run is tracked: MLFLOW_TRACKING_URI, else a sqlite file beside the run folders."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.resolve().parent / 'mlflow.db'}"


@dataclass(frozen=True)
class StageRecord:
    """What MLflow is told of a stage.

    `inputs`: name -> (kind of output, digest); `data`: path -> digest, of what no stage made.
    """

    name: str
    kind: str
    produces: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, tuple[str, str]]
    data: dict[str, str]
    partial: Path
    final: Path
    status: Status = "running"

    @property
    def folder(self) -> Path:
        """Where its files are now."""
        return self.final if self.status == "done" else self.partial


class Tracker:
    """Follows the stages of one run in the background. Close it at the end."""

    def __init__(self, run: Path, recipe: str, warn: Callable[[str], None]) -> None:
        self._mirror = _Mirror(run, recipe)
        self.uri = self._mirror.uri
        self._warn = warn
        self._warned = False
        self._records: dict[str, StageRecord] = {}
        self._files: list[Path] = []
        self._status: Status = "running"
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._closing = False
        self._idle = True
        self._thread: threading.Thread | None = None

    def follow(self, record: StageRecord, status: Status) -> None:
        """Tell that a stage is running or how it ended; MLflow hears of it soon."""
        if status == "done" and self._mirror.is_synced(record):
            return
        self._start()
        with self._wake:
            self._records[record.name] = replace(record, status=status)
            self._idle = False
            self._wake.notify_all()

    def catch_up(self) -> None:
        """Wait until MLflow has heard of everything so far, for at most a minute."""
        with self._wake:
            self._wake.wait_for(lambda: self._idle, timeout=_WAIT_AT_END_S)

    def close(self, status: Status, files: list[Path]) -> None:
        """Copy what is left, with these files as artifacts of the run; waits for at most a minute."""
        if self._thread is None:
            return
        with self._wake:
            self._status, self._files, self._closing = status, files, True
            self._wake.notify_all()
        self._thread.join(_WAIT_AT_END_S)
        if self._thread.is_alive():
            self._warn("MLflow is slow; what is missing there is sent by the next `align run`")

    def _start(self) -> None:
        """Import MLflow here, not in the thread: two threads importing at once can deadlock."""
        if self._thread is None:
            _import_mlflow()
            self._mirror.save_links()
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        closing = False
        while not closing:
            with self._wake:
                if self._idle and not self._closing:
                    self._wake.wait(_SYNC_EVERY_S)
                closing, records = self._closing, dict(self._records)
            self._sync(records, closing)

    def _sync(self, records: dict[str, StageRecord], closing: bool) -> None:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            for record in records.values():
                self._mirror.sync(record)
            if closing:
                self._mirror.finish(self._status, self._files)
        except FileNotFoundError:
            pass  # the stage's folder was renamed under us: it is found next time
        except (MlflowException, SQLAlchemyError, OSError) as error:
            if not self._warned:
                first = str(error).strip().partition("\n")[0]
                reason = re.sub(r"//[^/@\s]*@", "//", first)[:200]  # an address may hold a password
                self._warn(f"MLflow is not reachable, the run goes on without it ({reason})")
            self._warned = True
        with self._wake:
            self._idle = self._records == records  # nothing was told meanwhile
            self._records = {n: r for n, r in self._records.items() if not self._mirror.is_synced(r)}
            self._wake.notify_all()


def _import_mlflow() -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    # A server that is away must not hold a run up: the default is seven retries over minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    for module in ("mlflow.exceptions", "mlflow.entities", "mlflow.tracking", "sqlalchemy.exc"):
        importlib.import_module(module)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _Mirror:
    """The copy in MLflow of one run folder. Every call may be repeated: nothing is made or logged twice."""

    def __init__(self, run: Path, recipe: str) -> None:
        self.run = run
        self.recipe = recipe
        self.uri = tracking_uri(run)
        self._logged: dict[str, set[tuple[str, int]]] = {}
        """MLflow run -> (metric, step) it has."""
        links = read_json(run / LINKS) if (run / LINKS).exists() else {}
        fresh: dict[str, Any] = {
            "tracking_uri": self.uri,
            "run_id": None,
            "runs": {},
            "models": {},
            "synced": {},
        }
        self.links: dict[str, Any] = links if links.get("tracking_uri") == self.uri else fresh
        self._client: MlflowClient | None = None

    def is_synced(self, record: StageRecord) -> bool:
        """Whether MLflow has all of a stage in the state the record tells."""
        return bool(self.links["synced"].get(record.name) == [record.fingerprint, record.status])

    def sync(self, record: StageRecord) -> None:
        """Bring MLflow's copy of one stage up to date."""
        run_id = self._stage_run(record)
        self._send_metrics(record, run_id)
        if record.status == "done":
            self._send_result(record, run_id)
        if record.status != "running":
            self.client.set_terminated(run_id, _MLFLOW_STATUS[record.status])
            self.links["synced"][record.name] = [record.fingerprint, record.status]
            self.save_links()

    def finish(self, status: Status, files: list[Path]) -> None:
        """End the parent run and give it these files."""
        run_id = self._parent_run()
        for path in files:
            self.client.log_artifact(run_id, str(path))
        self.client.set_terminated(run_id, _MLFLOW_STATUS[status])

    # ---------------------------------------------------------------- finding or making runs

    @property
    def client(self) -> MlflowClient:
        """Connects when first used; the first use of a sqlite file takes seconds."""
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self.uri)
        return self._client

    def _experiment(self) -> str:
        name = f"align/{self.recipe}"
        found = self.client.get_experiment_by_name(name)
        if found:
            return str(found.experiment_id)
        is_ours = self.uri.startswith("sqlite:")
        place = (self.run.resolve().parent / "mlartifacts").as_uri() if is_ours else None
        return str(self.client.create_experiment(name, artifact_location=place))

    def _parent_run(self) -> str:
        if self.links["run_id"] is None:
            tags = {"recipe": self.recipe, "run_folder": str(self.run.resolve())}
            self.links["run_id"] = self._find_or_make(self.recipe, tags, {"git_commit": git_commit()})
            self.save_links()
        return str(self.links["run_id"])

    def _stage_run(self, record: StageRecord) -> str:
        """The stage's run, under the recipe's; one per fingerprint, whatever was killed in between."""
        if record.name in self.links["runs"] and record.fingerprint in self._logged:
            return str(self.links["runs"][record.name])
        parent = self._parent_run()
        tags = {"mlflow.parentRunId": parent, "fingerprint": record.fingerprint}
        run_id = self._find_or_make(record.name, tags, {"stage": record.kind, "recipe": self.recipe})
        self.client.log_batch(run_id, params=_params(record.config))
        self._send_inputs(record, run_id)
        self.client.update_run(run_id, status="RUNNING")
        self.client.update_run(parent, status="RUNNING")
        self._logged[record.fingerprint] = self._already_logged(run_id)
        self.links["runs"][record.name] = run_id
        self.save_links()
        return run_id

    def _find_or_make(self, name: str, key: dict[str, str], more: dict[str, str]) -> str:
        """The run whose tags are `key`, else a new one."""
        experiment = self._experiment()
        wanted = " and ".join(f"tags.`{tag}` = {_quoted(value)}" for tag, value in key.items())
        found = self.client.search_runs([experiment], filter_string=wanted, max_results=1)
        if found:
            return str(found[0].info.run_id)
        return str(self.client.create_run(experiment, tags={**key, **more}, run_name=name).info.run_id)

    def save_links(self) -> None:
        """Write which MLflow run stands for what."""
        write_json(self.run / LINKS, self.links)

    # ---------------------------------------------------------------- what a stage read and made

    def _send_inputs(self, record: StageRecord, run_id: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

        read = {path: (Path(path).expanduser(), digest) for path, digest in record.data.items()}
        models = []
        for name, (kind, digest) in record.inputs.items():
            if kind in ("corpus", "annotations", "pairs"):
                read[name] = (self.run / name, digest)
            elif kind == "policy" and name in self.links["models"]:
                models.append(LoggedModelInput(self.links["models"][name]))
        datasets = []
        for name, (path, digest) in read.items():
            source = json.dumps({"uri": path.resolve().as_uri()})
            dataset = Dataset(name, digest[:36], source_type="local", source=source)
            datasets.append(DatasetInput(dataset, [InputTag("mlflow.data.context", record.kind)]))
        if datasets or models:
            self.client.log_inputs(run_id, datasets=datasets, models=models)

    def _send_result(self, record: StageRecord, run_id: str) -> None:
        """Final metrics, and for a policy a logged model that points at its folder."""
        from mlflow.entities import LoggedModelOutput, Metric

        manifest = read_manifest(record.final)
        rows = read_metrics(record.final / METRICS)
        step = int(rows[-1]["step"]) if rows else 0
        totals = {key: manifest[key] for key in ("seconds", "peak_memory_mb")}
        self._log(record, run_id, [(step, {**manifest["metrics"], **totals})], Metric)
        if record.produces != "policy":
            return
        experiment = self._experiment()
        tags = {"fingerprint": record.fingerprint, "digest": manifest["output_digest"], "stage": record.kind}
        found = self.client.search_logged_models(
            [experiment], filter_string=f"tags.fingerprint = '{record.fingerprint}'"
        )
        if found:
            model = found[0]
        else:
            tags |= {"folder": str(record.final.resolve()), "mlflow.model.isExternal": "true"}
            model = self.client.create_logged_model(
                experiment, name=record.name, source_run_id=run_id, tags=tags, model_type=record.kind
            )
            self.client.finalize_logged_model(model.model_id, "READY")
            self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
        self.links["models"][record.name] = model.model_id
        self.save_links()

    # ---------------------------------------------------------------- metrics

    def _send_metrics(self, record: StageRecord, run_id: str) -> None:
        from mlflow.entities import Metric

        # Between the stage's commit and our hearing of it, its files are in the final folder already.
        folder = record.partial if record.partial.exists() else record.final
        rows = read_metrics(folder / METRICS)
        named = [(int(row["step"]), {k: v for k, v in row.items() if k != "step"}) for row in rows]
        self._log(record, run_id, named, Metric)

    def _log(
        self, record: StageRecord, run_id: str, rows: list[tuple[int, dict[str, float]]], metric: Any
    ) -> None:
        """Send the values whose (name, step) MLflow does not have yet."""
        logged, now = self._logged[record.fingerprint], int(time.time() * 1000)
        new = {
            (name, step): metric(name, value, now, step)
            for step, values in rows
            for name, value in values.items()
            if (name, step) not in logged and math.isfinite(value)
        }
        waiting = list(new.values())
        for start in range(0, len(waiting), 500):
            self.client.log_batch(run_id, metrics=waiting[start : start + 500])
        logged.update(new)

    def _already_logged(self, run_id: str) -> set[tuple[str, int]]:
        names = self.client.get_run(run_id).data.metrics
        return {
            (name, point.step) for name in names for point in self.client.get_metric_history(run_id, name)
        }


def _params(config: dict[str, Any]) -> list[Any]:
    """A config as flat MLflow params: `objective.beta`, lists as JSON."""
    from mlflow.entities import Param

    def flat(value: Any, name: str) -> list[tuple[str, str]]:
        if isinstance(value, dict):
            return [pair for key, inner in value.items() for pair in flat(inner, f"{name}.{key}".strip("."))]
        return [(name, json.dumps(value) if isinstance(value, list) else str(value))]

    return [Param(name, text[:5000]) for name, text in flat(config, "")]


def _quoted(value: str) -> str:
    """A value as MLflow's filters want it; they know both quotes and no escapes."""
    return f'"{value}"' if "'" in value else f"'{value}'"
