"""The page of a run while it runs: its stages, how far the current one is, curves, alarms, samples, GPUs.

Reads the run folder as others write it, and writes nothing. A part that cannot be read yet is left out until
the next look. What costs time is kept for as long as its file stays what it is.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align.release import charts, page, report
from align.release.last_samples import LastSamples
from align.release.report import Stage
from align.run_folder.artifacts import METRICS, SECONDS, holder, read_metrics
from align.run_folder.progress import PROGRESS

_MOST_POINTS = 2000
"""Rows of metrics that are drawn; of more, evenly spaced ones are."""
_REST = 9
"""Curves are drawn again after so many times the time that drawing took: a tenth of a core at most."""
_ENDS = ("done", "refused", "inconclusive")
"""Statuses of a run that has nothing left to do."""
_ALARMS = {
    "loss_spike": "The loss is far above its recent values (robust z-score)",
    "slow": "Training is much slower than it was (share of the usual speed)",
    "chosen_falls": "Chosen completions lose probability against the reference (nats)",
    "zero_variance": "In most groups all completions are worth the same (share of groups)",
    "entropy": "The policy explores no more (nats a token)",
    "truncated": "Completions are cut at max_new_tokens (share)",
    "length": "Completions become much longer (tokens)",
}
"""What the alarms of a training say, by the names under which it logs them."""
_BANNERS: dict[str, tuple[str, str]] = {
    "running": ("Running", "open"),
    "stopped": ("The process that ran this is gone; the same command resumes", "bad"),
    "interrupted": ("Interrupted; the same command resumes", "open"),
    "waiting": ("Waiting for people", "open"),
    "failed": ("Failed", "bad"),
    "refused": ("The gate refused", "bad"),
    "inconclusive": ("The gate is inconclusive", "open"),
    "partial": ("What was asked for is done; other stages are not", "open"),
    "done": ("Done", "good"),
}
"""How a run is -> what to say, and a class of the style sheet."""
_TONES = {"done": "good", "failed": "bad", "damaged": "bad", "stopped": "bad", "running": "open"}
_NVIDIA_SMI = ("--query-gpu=name,memory.used,memory.total,utilization.gpu", "--format=csv,noheader,nounits")


class Row(NamedTuple):
    """A stage in the table. `done` of `total` are None where nothing is counted."""

    stage: Stage
    status: str
    tone: str
    done: int | None
    total: int | None
    seconds: float | None
    """Of unfinished work so far."""


class Now(NamedTuple):
    """What the current stage reported last: its line, and the seconds that are left and have passed since."""

    stage: str
    line: str
    done: int
    total: int
    eta_s: float | None
    age_s: float


class Alarm(NamedTuple):
    """An alarm that a training has logged."""

    stage: str
    step: int
    text: str
    value: float


class Gpu(NamedTuple):
    """A GPU of this machine. Memory in MB, `busy` in percent."""

    name: str
    used_mb: float
    total_mb: float
    busy: str


class NotARun(ValueError):
    """A folder holds no run; the message says what does."""


class WatchPage:
    """The page of one run folder, and the clips that it shows. May be used by several threads."""

    def __init__(self, run: Path) -> None:
        """Look whether `run` is a run folder.

        Raises:
            NotARun: it is not.
        """
        if not any((run / name).exists() for name in ("summary.json", "recipe.json")):
            raise NotARun(f"{run} is not a run folder; `align run RECIPE --out {run}` makes one")
        self.run = run
        self._lock = threading.Lock()
        self._curves = _Curves()
        self._rows: dict[Path, tuple[tuple[int, int], list[dict[str, float]]]] = {}
        """Metrics files -> their time and size, and their numbers."""
        self._samples = LastSamples(run)

    @property
    def is_over(self) -> bool:
        """Whether the run has ended, with its report written."""
        is_done = self._summary().get("status") in _ENDS and (self.run / "report.html").exists()
        return is_done and holder(self.run) is None  # the report is written after the summary

    def render(self) -> str:
        """The page as it is now."""
        with self._lock:
            try:
                return self._render()
            except FileNotFoundError:  # a stage's folder was renamed under us; it is in its new place now
                return self._render()

    def clip(self, digest: str) -> bytes | None:
        """The MP3 of a clip that the page shows."""
        return self._samples.clip(digest)

    def own_page(self, stage: str, name: str) -> Path | None:
        """A page that a stage has written beside its records and the report links to."""
        known = {
            f"{path.parent.name}/{path.name}": path
            for own in report.OWN_PAGES.values()
            for path in self.run.glob(f"[!.]*/{own}")
        }
        return known.get(f"{stage}/{name}")

    def _render(self) -> str:
        summary = self._summary()
        stages = [_under_way(self.run, stage) for stage in report.stages_of(self.run, summary)]
        is_held = summary.get("status") == "running" and holder(self.run) is not None
        state = "stopped" if summary.get("status") == "running" and not is_held else summary.get("status")
        rows = [_row(stage, _entry(summary, stage.name), is_held) for stage in stages]
        current = next((row.stage for row in rows if row.status in ("running", "stopped")), None)
        current = current or next((stage for stage in stages if (stage.folder / PROGRESS).exists()), None)
        trained = next(
            (
                stage
                for stage in [*([current] if current else []), *reversed(stages)]
                if any("loss" in row for row in self._metrics(stage))
            ),
            None,
        )
        metrics = self._metrics(trained) if trained else []
        title, tone = _BANNERS.get(str(state), ("Starting" if state is None else str(state), "open"))
        return page.render(
            "watch.html",
            name=summary.get("recipe", self.run.resolve().name),
            title=title,
            tone=tone,
            errors=[stage.error for stage in stages if stage.error],
            waits=[wait for stage in stages if (wait := _wait(_entry(summary, stage.name)))],
            report=(self.run / "report.html").exists(),
            rows=rows,
            now=_now(current, is_held) if current else None,
            alarms=[alarm for stage in reversed(stages) for alarm in _alarms(stage, self._metrics(stage))],
            trained=trained,
            training=trained and self._curves.of(trained, metrics),
            peak_gb=next((row["peak_gb"] for row in reversed(metrics) if "peak_gb" in row), None),
            gpus=gpus(),
            samples=self._samples.of(stages),
        )

    def _summary(self) -> dict[str, Any]:
        return _read(self.run / "summary.json")

    def _metrics(self, stage: Stage) -> list[dict[str, float]]:
        """The numbers of a stage's metrics file."""
        path = stage.folder / METRICS
        if not path.exists():
            return []
        stat = path.stat()
        version = stat.st_mtime_ns, stat.st_size
        if path not in self._rows or self._rows[path][0] != version:
            rows = [
                {key: value for key, value in row.items() if isinstance(value, int | float)}
                for row in read_metrics(path)
            ]
            self._rows[path] = version, rows
        return self._rows[path][1]


# -------------------------------------------------------------------------- stages and their progress


def _read(path: Path) -> dict[str, Any]:
    """An object of a JSON file that others may be writing; empty while it is not whole."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _entry(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    entry = (summary.get("stages") or {}).get(name)
    return entry if isinstance(entry, dict) else {}


def _under_way(run: Path, stage: Stage) -> Stage:
    """The stage as it is made again, where a finished one of other settings is still in place."""
    partial = run / f".partial-{stage.name}"
    if not stage.manifest or stage.status == "done" or not partial.is_dir():
        return stage
    return stage._replace(folder=partial, manifest={}, seconds=None, peak_memory_mb=None, metrics={})


def _row(stage: Stage, entry: Mapping[str, Any], is_held: bool) -> Row:
    status = "stopped" if stage.status == "running" and not is_held else stage.status
    counted = {} if stage.manifest else entry if status == "waiting" else _read(stage.folder / PROGRESS)
    total = counted.get("wanted", counted.get("total"))
    return Row(
        stage,
        status,
        _TONES.get(status, "plain"),
        counted.get("done"),
        total or None,
        stage.seconds if stage.manifest else _seconds(stage.folder / SECONDS) or stage.seconds,
    )


def _seconds(clock: Path) -> float | None:
    try:
        return float(clock.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _wait(entry: Mapping[str, Any]) -> str:
    """How many judgements a stage that waits for people has."""
    if entry.get("status") != "waiting":
        return ""
    return f"{entry.get('done')} of {entry.get('wanted')} judgements are there"


def _now(stage: Stage, is_held: bool) -> Now | None:
    """The state of the stage's loop. Time goes on since it was reported, so less is left now."""
    path = stage.folder / PROGRESS
    state = _read(path)
    if not state:
        return None
    age_s = max(0.0, time.time() - path.stat().st_mtime)
    eta_s = state.get("eta_s") if is_held else None
    return Now(
        stage.name,
        str(state.get("line", "")),
        int(state.get("done") or 0),
        int(state.get("total") or 0),
        None if eta_s is None else max(0.0, eta_s - age_s),
        age_s,
    )


def _alarms(stage: Stage, rows: Sequence[Mapping[str, float]]) -> list[Alarm]:
    """The alarms of a training, the latest first."""
    raised = [
        Alarm(stage.name, int(row["step"]), _alarm_text(key.removeprefix("alarm/")), row[key])
        for row in rows
        for key in row
        if key.startswith("alarm/")
    ]
    return sorted(raised, key=lambda alarm: -alarm.step)


def _alarm_text(name: str) -> str:
    if name.startswith("kind_"):
        return f"The reward of {name.removeprefix('kind_')} prompts falls while the whole rises"
    return _ALARMS.get(name, name.replace("_", " "))


class _Curves:
    """The curves of the stage that trains, drawn again when its metrics have grown."""

    def __init__(self) -> None:
        self._of: Path | None = None
        self._n_rows = 0
        self._view: dict[str, Any] | None = None
        self._next = 0.0

    def of(self, stage: Stage, rows: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
        """What `charts.training` makes of the rows, or has made a moment ago."""
        now = time.monotonic()
        is_new = stage.folder != self._of
        if is_new or (len(rows) != self._n_rows and now >= self._next):
            self._of, self._n_rows = stage.folder, len(rows)
            self._view = charts.training(_thinned(rows), stage.metrics)
            self._next = time.monotonic() + _REST * (time.monotonic() - now)
        return self._view


def _thinned(rows: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Evenly spaced rows of steps, the last among them, and all rows of evaluations, which are few."""
    every = -(-len(rows) // _MOST_POINTS)
    last = len(rows) - 1
    return [row for i, row in enumerate(rows) if "loss" not in row or (last - i) % every == 0]


# -------------------------------------------------------------------------- GPUs


def gpus() -> list[Gpu]:
    """The GPUs of this machine by `nvidia-smi`; none where there is no such command, or it fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        result = subprocess.run(
            [command, *_NVIDIA_SMI], capture_output=True, text=True, timeout=5, check=True
        )
        lines = [[cell.strip() for cell in line.rsplit(",", 3)] for line in result.stdout.splitlines()]
        return [Gpu(name, float(used), float(total), busy) for name, used, total, busy in lines]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
