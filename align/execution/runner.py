"""Run a recipe: skip what is finished and unchanged, resume what was interrupted, stop at a closed gate."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.execution.attempt import Attempt, handling_signals, interruptible
from align.execution.plan import (
    RECIPE,
    Reads,
    Standing,
    check_finished,
    check_recipe,
    recipe_record,
    standing,
    survey,
)
from align.execution.workers import run_stage
from align.recipe.recipe import Problem, Recipe, RecipeError, Step
from align.run_folder.artifacts import (
    SECONDS,
    SETTINGS,
    DamagedFile,
    FullDisk,
    StageFolder,
    Waiting,
    damaged,
    exclusive,
    full_disk,
    git_commit,
    read_json,
    read_manifest,
    stop_requested,
    versions,
    write_json,
)
from align.run_folder.tracking import StageRecord, Status, Tracker
from preference_data.store import write_text

DONE, FAILED, USAGE, REFUSED, WAITING, INCONCLUSIVE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 75
_STAGE_STATUS: dict[int, Status] = {
    DONE: "done",
    FAILED: "failed",
    WAITING: "waiting",
    INTERRUPTED: "interrupted",
}
_STATUS = {**_STAGE_STATUS, REFUSED: "refused", INCONCLUSIVE: "inconclusive"}
FAILURE = "failure.txt"
"""In the run folder: the traceback of what ended the last run."""
_VERDICT_CODES = {"pass": DONE, "fail": REFUSED, "inconclusive": INCONCLUSIVE}


class DamagedRun(DamagedFile):
    """Files of a finished stage are missing or cut short."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `summary` is what `summary.json` holds; `report` is None if none was written."""

    exit_code: int
    summary: dict[str, Any]
    report: Path | None
    error: str | None = None
    waits_for: str | None = None
    """What people have to do before the run can go on."""

    @property
    def status(self) -> Status:
        """How it ended, in the words of a stage; a gate that refuses has done its work."""
        return _STAGE_STATUS.get(self.exit_code, "done")


def execute(
    recipe: Recipe,
    run: Path,
    only: str | None = None,
    start_at: str | None = None,
    tracker: Tracker | None = None,
    replace: bool = False,
) -> Outcome:
    """Run a recipe's steps in its run folder.

    Args:
        recipe: what to run.
        run: the run folder; created if needed.
        only: run just this step.
        start_at: run this step and those after it. Earlier ones are taken as they are.
        tracker: follows the stages, if given; closed by the caller.
        replace: set aside what another recipe or other settings have finished in the run folder.

    Raises:
        RecipeError: a step to start from does not exist, or needs a stage that has not finished.
        OtherRecipe, OtherSettings: the run folder has what these steps would replace, and not `replace`.
        DamagedRun: files of a stage that is needed are missing or cut short.
        RunIsBusy: another process works in the run folder.
        FullDisk: there is no space even to begin.
    """
    steps = select(recipe, only, start_at)
    if not replace:
        check_recipe(recipe, run)
    _check_inputs(steps, recipe, run, replace)
    try:
        with exclusive(run), handling_signals():
            write_json(run / RECIPE, recipe_record(recipe, run))
            return _Execution(recipe, run, tracker).go(steps)
    except OSError as error:
        if line := full_disk(error, run):
            raise FullDisk(line) from error
        raise


def select(recipe: Recipe, only: str | None, start_at: str | None) -> list[Step]:
    """The steps that `only` and `start_at` leave of a recipe."""
    if only:
        return [recipe.step(only)]
    if start_at:
        return recipe.steps[recipe.steps.index(recipe.step(start_at)) :]
    return recipe.steps


def _check_inputs(steps: list[Step], recipe: Recipe, run: Path, replace: bool) -> None:
    """Refuse to start what cannot be fed, or would replace what is finished; say what is outdated."""
    names = {step.name for step in steps}
    needed = {name: step for step in steps for name in step.needs if name not in names}
    problems, damaged = [], []
    standings = survey(recipe, run, as_they_are=needed)
    for current in standings:
        name = current.step.name
        if current.damage and (name in needed or name in names):
            damaged.append(current.damage)
        elif name in needed and current.manifest is None:
            message = f"needs {name}, which has not finished in {run}; run it first with --only {name}"
            problems.append(Problem(str(needed[name].file), "", message))
        elif name in needed and current.state != "done":
            _say(f"{name}  taken as it is, although the recipe or its inputs have changed since")
    if problems:
        raise RecipeError(problems)
    if damaged:
        raise DamagedRun("\n".join(damaged))
    if not replace:
        check_finished((current for current in standings if current.step.name in names), run)


class _Execution:
    """One `align run`: the steps' statuses, and the summary written after each."""

    def __init__(self, recipe: Recipe, run: Path, tracker: Tracker | None) -> None:
        self.recipe = recipe
        self.run = run
        self.tracker = tracker
        self.standings = survey(recipe, run)
        self.versions = versions()
        self.git_commit = git_commit()
        self.unfinished: dict[str, dict[str, Any]] = {}
        """Summary entries of the step that runs, failed or was interrupted."""
        self.ran = False
        self.error: str | None = None
        self.waits_for: str | None = None

    def go(self, steps: list[Step]) -> Outcome:
        (self.run / FAILURE).unlink(missing_ok=True)
        code = DONE
        for step in steps:
            # A step that needs a verdict does not start unless that verdict is a pass
            code = max(map(self._verdict_code, step.needs), default=DONE) or self._step(step)
            code = code or self._verdict_code(step.name)
            if code:
                break
            if stop_requested.is_set():
                code = INTERRUPTED
                break
        summary = self._write_summary(code)
        report = None if code == INTERRUPTED else self._report()
        if code == DONE and self.error:
            code = FAILED
            summary = self._write_summary(code)
        return Outcome(code, summary, report, self.error, self.waits_for)

    # ---------------------------------------------------------------- one step

    def _step(self, step: Step) -> int:
        """Bring one step up to date; returns the exit code so far."""
        finished = {name: read_manifest(self.run / name)["output_digest"] for name in step.needs}
        current = standing(step, self.run, finished)
        out, read = current.folder, current.reads
        assert out is not None  # all that the step needs is finished
        assert read is not None
        record = self._record(step, out, read)
        if current.state == "done":
            out.remove_scratch()
            _say(f"{step.name}  up to date")
            if self.tracker:
                self.tracker.follow(record, "done")
            return DONE
        self.ran = True
        resumed = out.open()
        for path in out.stale:
            _say(f"{step.name}  unfinished work of other settings or inputs is kept in {path}")
        _say(f"{step.name}  {'resumes' if resumed else 'starts'}")
        made_from = {"kind": record.kind, "config": record.config, **read._asdict()}
        write_json(out.path / SETTINGS, made_from)
        self.unfinished = {step.name: {"status": "running"}}
        self._write_summary(None)
        if self.tracker:
            self.tracker.follow(record, "running")
            if step.config.produces == "alias":
                self.tracker.catch_up()
        with Attempt(out.path / SECONDS) as attempt:
            self._run_stage(step, out, attempt, read)
        code = self._settle(step, attempt)
        self.standings = survey(self.recipe, self.run)
        if self.tracker:
            self.tracker.follow(record, _STAGE_STATUS[code])
        self._write_summary(None if code == DONE else code)
        return code

    def _run_stage(self, step: Step, out: StageFolder, attempt: Attempt, read: Reads) -> None:
        inputs = {name: self.run / name for name in step.needs}
        inputs |= {ref: Path(ref).expanduser() for ref in step.foreign}
        with interruptible():
            metrics = run_stage(step.config, inputs, out)
        peak = metrics.pop("peak_memory_mb", attempt.peak_memory_mb)  # of the largest worker
        n_stale = len(out.stale)
        out.commit(
            {
                "kind": step.config.stage,
                "produces": step.config.produces,
                "config": step.config.model_dump(mode="json"),
                **read._asdict(),
                "git_commit": self.git_commit,
                "versions": self.versions,
                "seed": step.config.seed,
                "seconds": round(attempt.seconds, 2),
                "peak_memory_mb": round(peak, 1),
                "metrics": metrics,
            }
        )
        first = "  ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:4])
        _say(f"{step.name}  done in {attempt.seconds:.1f} s  {first}".rstrip())
        for path in out.stale[n_stale:]:
            _say(f"{step.name}  finished work of other settings or inputs is kept in {path}")

    def _settle(self, step: Step, attempt: Attempt) -> int:
        """The exit code of an attempt; its error or its wait goes into the summary."""
        self.unfinished = {}
        if attempt.error is None:
            return DONE
        entry = {
            "seconds": round(attempt.seconds, 2),
            "peak_memory_mb": round(attempt.peak_memory_mb, 1),
        }
        if isinstance(attempt.error, KeyboardInterrupt):
            self.unfinished = {step.name: {"status": "interrupted", **entry}}
            return INTERRUPTED
        if isinstance(attempt.error, Waiting):
            done, wanted = attempt.error.done, attempt.error.wanted
            self.unfinished = {step.name: {"status": "waiting", **entry, "done": done, "wanted": wanted}}
            self.waits_for = str(attempt.error)
            return WAITING
        lines = traceback.format_exception(attempt.error)
        self.error = f"{step.name}: {_message(attempt.error, self.run)}"
        with _despite_full_disk():
            write_text(self.run / FAILURE, "".join(lines))
        self.unfinished = {step.name: {"status": "failed", **entry, "error": self.error}}
        return FAILED

    def _record(self, step: Step, out: StageFolder, read: Reads) -> StageRecord:
        produces = {other.name: other.config.produces for other in self.recipe.steps}
        return StageRecord(
            folder=out,
            kind=step.config.stage,
            produces=step.config.produces,
            config=step.config.model_dump(mode="json"),
            inputs={name: (produces.get(name, "policy"), digest) for name, digest in read.inputs.items()},
            data=read.data,
        )

    def _verdict_code(self, name: str) -> int:
        """The exit code for a finished gate's verdict; that of other steps is `DONE`."""
        path = self.run / name / "verdict.json"
        verdict = read_json(path).get("verdict") if path.exists() else "pass"
        if verdict not in _VERDICT_CODES:
            raise damaged(path, f"says {verdict!r}, not one of {', '.join(_VERDICT_CODES)}")
        return _VERDICT_CODES[verdict]

    # ---------------------------------------------------------------- what is left behind

    def _write_summary(self, code: int | None) -> dict[str, Any]:
        """Write `summary.json`; `code` is None while the run goes on."""
        stages = {s.step.name: self.unfinished.get(s.step.name) or _entry(s) for s in self.standings}
        everything = all(entry["status"] == "done" for entry in stages.values())
        status = "running" if code is None else _STATUS[code]
        verdict = self._read_finished("verdict", "verdict.json")
        scores = self._read_finished("evaluation", "scores.json")
        summary = {
            "recipe": self.recipe.name,
            "status": "partial" if status == "done" and not everything else status,
            "exit_code": code,
            "stages": stages,
            "verdict": verdict.get("verdict"),
            "verdict_reasons": verdict.get("reasons", []),
            "comparison": scores.get("comparison", {}),
            "seconds": round(sum(entry.get("seconds") or 0 for entry in stages.values()), 2),
        }
        with _despite_full_disk():
            write_json(self.run / "summary.json", summary)
        return summary

    def _read_finished(self, produces: str, name: str) -> dict[str, Any]:
        """A file of the last finished step of a kind; empty if there is none."""
        for current in reversed(self.standings):
            path = self.run / current.step.name / name
            if current.state == "done" and current.step.config.produces == produces and path.exists():
                content: dict[str, Any] = read_json(path)
                return content
        return {}

    def _report(self) -> Path | None:
        """Write the report unless nothing has changed since the last one."""
        existing = self.run / "report.html"
        if not self.ran and existing.exists():
            return existing
        with Attempt() as attempt:
            from align.release import report

            return report.write(self.run)
        if self.error is None and attempt.error is not None:
            self.error = f"the report could not be written: {_message(attempt.error, self.run)}"
            with _despite_full_disk():
                write_text(self.run / FAILURE, "".join(traceback.format_exception(attempt.error)))
        return None


def _entry(current: Standing) -> dict[str, Any]:
    """A step's line in the summary, from its folder."""
    manifest = current.manifest
    if current.state == "done" and manifest:
        return {
            "status": "done",
            **{key: manifest.get(key) for key in ("seconds", "peak_memory_mb", "metrics")},
        }
    return {"status": "interrupted" if current.state == "partial" else current.state}


def _message(error: BaseException, run: Path) -> str:
    return full_disk(error, run) or str(error) or type(error).__name__


@contextmanager
def _despite_full_disk() -> Iterator[None]:
    """Leave out a file for which there is no space: the message that says so must still come."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _say(text: str) -> None:
    print(text, flush=True)
