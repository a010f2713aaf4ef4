"""MLflow beside the run folder: the folder's contents are copied there, and training never waits for it.

The run folder is the truth. A thread copies it to MLflow every few seconds; whatever could not be copied
(MLflow down, process killed) is copied by the next `align run`, nothing twice. A failing MLflow is reported
once and changes nothing else. (MLflow's own asynchronous logging does not reach that far: it queues metrics
in memory, and everything else that it does waits for the server.)
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ValidationError

from align.run_folder.artifacts import (
    METRICS,
    StageFolder,
    git_commit,
    read_kept,
    read_manifest,
    read_metrics,
    write_json,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
_LINKS = "mlflow.json"


class Links(BaseModel):
    """What stands in MLflow for a run folder, which keeps it in `mlflow.json`."""

    tracking_uri: str
    run_id: str | None = None
    runs: dict[str, str] = {}
    """Stage -> its MLflow run."""
    models: dict[str, str] = {}
    """Stage -> its logged model."""
    synced: dict[str, tuple[str, str]] = {}
    """Stage -> fingerprint and status of what MLflow has all of."""


def read_links(run: Path) -> Links:
    """The links of a run folder; none if they are damaged, or of another server than is used now."""
    links = Links(tracking_uri=tracking_uri(run))
    try:
        kept = Links.model_validate(read_kept(run / _LINKS) or links)
    except ValidationError:
        log.warning("%s is damaged; it is made again", run / _LINKS)
        return links
    return kept if kept.tracking_uri == links.tracking_uri else links


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
_DATASET_KINDS = ("corpus", "annotations", "pairs")


def tracking_uri(run: Path) -> str:
    """Where a run is tracked: MLFLOW_TRACKING_URI, else a sqlite file beside the run folders."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.resolve().parent / 'mlflow.db'}"


@dataclass(frozen=True)
class StageRecord:
    """A stage as MLflow is to know it.

    `inputs`: name -> (kind of output, digest); `data`: path -> digest, of what no stage made.
    """

    folder: StageFolder
    kind: str
    produces: str
    config: dict[str, Any]
    inputs: dict[str, tuple[str, str]]
    data: dict[str, str]
    status: Status = "running"


_End = tuple[Status, list[Path]]
"""How a run ended, and the files to keep with it."""


class Tracker:
    """Follows the stages of one run in the background. Close it at the end."""

    def __init__(self, run: Path, recipe: str, warn: Callable[[str], None]) -> None:
        self._mirror = _Mirror(run, recipe)
        self.uri = self._mirror.uri
        self._warn = warn
        self._has_warned = False
        self._news: queue.SimpleQueue[StageRecord | threading.Event | _End] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def follow(self, record: StageRecord, status: Status) -> None:
        """Report that a stage is running or how it ended; MLflow hears of it soon."""
        record = replace(record, status=status)
        if status == "done" and self._mirror.is_synced(record):
            return
        if self._thread is None:
            _import_mlflow()  # here, not in the thread: two threads importing at once can deadlock
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._thread.start()
        self._news.put(record)

    def catch_up(self) -> None:
        """Wait until everything so far has been copied or has failed to be, for at most a minute."""
        if self._thread is not None:
            done = threading.Event()
            self._news.put(done)
            done.wait(_WAIT_AT_END_S)

    def close(self, status: Status, files: list[Path]) -> None:
        """Copy what is left, with these files as artifacts of the run; waits for at most a minute."""
        if self._thread is not None:
            self._news.put((status, files))
            self._thread.join(_WAIT_AT_END_S)
            if self._thread.is_alive():
                self._warn("MLflow is slow; what is missing there is sent by the next `align run`")

    def _work(self) -> None:
        records: dict[str, StageRecord] = {}
        end: _End | None = None
        while end is None:
            news: StageRecord | threading.Event | _End | None = None
            with suppress(queue.Empty):
                news = self._news.get(timeout=_SYNC_EVERY_S)
            if isinstance(news, StageRecord):
                records[news.folder.name] = news
            elif isinstance(news, tuple):
                end = news
            self._sync(records, end)
            records = {n: record for n, record in records.items() if not self._mirror.is_synced(record)}
            if isinstance(news, threading.Event):
                news.set()

    def _sync(self, records: dict[str, StageRecord], end: _End | None) -> None:
        try:
            for record in records.values():
                self._mirror.sync(record)
            if end is not None:
                self._mirror.finish(*end)
        except FileNotFoundError:
            pass  # the stage's folder was renamed under us: the next round reads it in its new place
        except Exception as error:  # whatever MLflow, its database or its server raise: the run goes on
            if not self._has_warned:
                first = str(error).strip().partition("\n")[0]
                reason = re.sub(r"//[^/@\s]*@", "//", first)[:200]  # an address may hold a password
                self._warn(f"MLflow is not reachable, the run goes on without it ({reason})")
            self._has_warned = True


def _import_mlflow() -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    # A server that is away must not hold a run up: the default is seven retries over minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    for module in ("mlflow.exceptions", "mlflow.entities", "mlflow.tracking", "sqlalchemy.exc"):
        importlib.import_module(module)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what it raises is reported once, in a line


class _Mirror:
    """The copy in MLflow of one run folder. Every call may be repeated: nothing is made or logged twice."""

    def __init__(self, run: Path, recipe: str) -> None:
        self.run = run
        self.recipe = recipe
        self.uri = tracking_uri(run)
        self._run_of: dict[str, str] = {}
        """Fingerprint -> MLflow run, of the stages followed by this process."""
        self._logged: dict[str, set[tuple[str, int]]] = {}
        """MLflow run -> (metric, step) it has."""
        self.links = read_links(run)
        self._client: MlflowClient | None = None

    def is_synced(self, record: StageRecord) -> bool:
        """Whether MLflow has all of a stage in the state that the record has."""
        return self.links.synced.get(record.folder.name) == (record.folder.fingerprint, record.status)

    def sync(self, record: StageRecord) -> None:
        """Bring MLflow's copy of one stage up to date."""
        run_id = self._stage_run(record)
        # Between the stage's commit and our hearing of it, its files are in the final folder already.
        folder = record.folder.path if record.folder.path.exists() else record.folder.final
        self._log(run_id, read_metrics(folder / METRICS))
        if record.status == "done":
            self._send_result(record, run_id)
        if record.status != "running":
            self.client.set_terminated(run_id, _MLFLOW_STATUS[record.status])
            self._link("synced", record.folder.name, (record.folder.fingerprint, record.status))

    def finish(self, status: Status, files: list[Path]) -> None:
        """End the run of the recipe and give it its files."""
        for path in files:
            self.client.log_artifact(self._recipe_run(), str(path))
        self.client.set_terminated(self._recipe_run(), _MLFLOW_STATUS[status])

    # ---------------------------------------------------------------- runs

    @property
    def client(self) -> MlflowClient:
        """Connects when first used; the first use of a sqlite file takes seconds."""
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self.uri)
        return self._client

    def _experiment(self) -> str:
        name = f"align/{self.recipe}"
        experiment = self.client.get_experiment_by_name(name)
        if experiment:
            return str(experiment.experiment_id)
        is_ours = self.uri.startswith("sqlite:")
        place = (self.run.resolve().parent / "mlartifacts").as_uri() if is_ours else None
        return str(self.client.create_experiment(name, artifact_location=place))

    def _recipe_run(self) -> str:
        if self.links.run_id is None:
            tags = {"recipe": self.recipe, "run_folder": str(self.run.resolve())}
            self.links.run_id = self._run_with(self.recipe, tags, {"git_commit": git_commit()})
            write_json(self.run / _LINKS, self.links.model_dump())
        return self.links.run_id

    def _stage_run(self, record: StageRecord) -> str:
        """The stage's run, under the recipe's; one per fingerprint, whatever was killed in between."""
        if record.folder.fingerprint in self._run_of:
            return self._run_of[record.folder.fingerprint]
        parent = self._recipe_run()
        tags = {"mlflow.parentRunId": parent, "fingerprint": record.folder.fingerprint}
        run_id = self._run_with(record.folder.name, tags, {"stage": record.kind, "recipe": self.recipe})
        known = self.client.get_run(run_id).data.params  # MLflow refuses to change one
        params = [param for param in _params(record.config) if param.key not in known]
        self.client.log_batch(run_id, params=params)
        self._send_inputs(record, run_id)
        for run in (run_id, parent):
            self.client.update_run(run, status="RUNNING")
        self._logged[run_id] = self._already_logged(run_id)
        self._link("runs", record.folder.name, run_id)
        self._run_of[record.folder.fingerprint] = run_id
        return run_id

    def _run_with(self, name: str, key: dict[str, str], more: dict[str, str]) -> str:
        """The run whose tags are `key`, else a new one."""
        experiment = self._experiment()
        query = " and ".join(f"tags.`{tag}` = {_quoted(value)}" for tag, value in key.items())
        runs = self.client.search_runs([experiment], filter_string=query, max_results=1)
        run = runs[0] if runs else self.client.create_run(experiment, tags={**key, **more}, run_name=name)
        return str(run.info.run_id)

    def _link(self, table: Literal["runs", "models", "synced"], stage: str, value: Any) -> None:
        """Write what stands in MLflow for a stage."""
        getattr(self.links, table)[stage] = value
        write_json(self.run / _LINKS, self.links.model_dump())

    # ---------------------------------------------------------------- inputs, results, metrics

    def _send_inputs(self, record: StageRecord, run_id: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

        data = {path: (Path(path).expanduser(), digest) for path, digest in record.data.items()}
        models = []
        for name, (kind, digest) in record.inputs.items():
            if kind in _DATASET_KINDS:
                data[name] = (self.run / name, digest)
            elif kind == "policy" and name in self.links.models:
                models.append(LoggedModelInput(self.links.models[name]))
        tag = InputTag("mlflow.data.context", record.kind)
        datasets = []
        for name, (path, digest) in data.items():
            source = json.dumps({"uri": path.resolve().as_uri()})
            datasets.append(
                DatasetInput(Dataset(name, digest[:36], source_type="local", source=source), [tag])
            )
        if datasets or models:
            self.client.log_inputs(run_id, datasets=datasets, models=models)

    def _send_result(self, record: StageRecord, run_id: str) -> None:
        """Final metrics, and for a policy a logged model that points at its folder."""
        from mlflow.entities import LoggedModelOutput

        manifest = read_manifest(record.folder.final)
        rows = read_metrics(record.folder.final / METRICS)
        step = int(rows[-1]["step"]) if rows else 0
        totals = {key: manifest[key] for key in ("seconds", "peak_memory_mb")}
        self._log(run_id, [{"step": step, **manifest["metrics"], **totals}])
        if record.produces != "policy":
            return
        experiment, key = self._experiment(), f"tags.fingerprint = '{record.folder.fingerprint}'"
        models = self.client.search_logged_models([experiment], filter_string=key)
        if not models:
            tags = {"fingerprint": record.folder.fingerprint, "digest": manifest["output_digest"]}
            tags |= {"stage": record.kind, "folder": str(record.folder.final.resolve())}
            tags |= {"mlflow.model.isExternal": "true"}
            model = self.client.create_logged_model(
                experiment, name=record.folder.name, source_run_id=run_id, tags=tags, model_type=record.kind
            )
            self.client.finalize_logged_model(model.model_id, "READY")
            self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
            models = [model]
        self._link("models", record.folder.name, models[0].model_id)

    def _log(self, run_id: str, rows: list[dict[str, float]]) -> None:
        """Send the values whose (name, step) MLflow does not have yet."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [(name, int(row["step"]), value) for row in rows for name, value in row.items()]
        new = {
            (name, step): Metric(name, value, now, step)
            for name, step, value in values
            if name != "step" and math.isfinite(value) and (name, step) not in self._logged[run_id]
        }
        metrics = list(new.values())
        for start in range(0, len(metrics), 500):
            self.client.log_batch(run_id, metrics=metrics[start : start + 500])
        self._logged[run_id].update(new)

    def _already_logged(self, run_id: str) -> set[tuple[str, int]]:
        names = self.client.get_run(run_id).data.metrics
        return {
            (name, point.step) for name in names for point in self.client.get_metric_history(run_id, name)
        }


def _params(config: dict[str, Any]) -> list[Any]:
    """A config as flat MLflow params: `objective.beta`, lists as JSON."""
    from mlflow.entities import Param

    def flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from flat(inner, f"{name}.{key}".strip("."))
        else:
            yield name, json.dumps(value) if isinstance(value, list) else str(value)

    return [Param(name, text[:5000]) for name, text in flat(config, "")]


def _quoted(value: str) -> str:
    """A value as MLflow's filters want it; they know both quotes and no escapes."""
    return f'"{value}"' if "'" in value else f"'{value}'"
