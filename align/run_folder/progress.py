"""Output of a run: progress of long loops, quiet libraries, and readers that may go away."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

PROGRESS = "progress.json"
"""In a stage's folder until it is finished: how far its loop is (`label`, `done`, `total`), the seconds that
are left by its speed (`eta_s`, null where that is unknown), and the `line` that was printed of it. When that
was is the file's time."""
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_WRITES = 1.0


class Progress:
    """Shows `label  120/300  40%  loss 0.412  ETA 00:35`.

    On a terminal one line redraws itself; in a log a line is printed at the start, at the end, and at
    most every 10 s between. The first `update` of a loop that resumes says where it starts.

    With `folder`, a stage's, the latest state is in its progress.json, too, at most a second old.
    """

    def __init__(self, label: str, total: int, folder: Path | None = None) -> None:
        self.label = label
        self.total = total
        self._file = folder / PROGRESS if folder else None
        self._state: dict[str, str | int | None] = {}
        """What goes into the file."""
        self._started = self._printed_at = time.monotonic()
        self._written_at = float("-inf")
        self._first = 0
        """`done` at the first update: an earlier attempt says nothing about this one's speed."""
        self._values: dict[str, float] = {}
        """The latest of each; a value not given again is still printed."""
        self._last = self._printed_line = ""
        self._bar: Bar | None = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.fields[line]}", markup=False), BarColumn(bar_width=24), transient=True
            )
            self._task = self._bar.add_task("", total=self.total, line=self.label)
            self._bar.start()
        return self

    def update(self, done: int, **values: float) -> None:
        """Report that `done` of `total` are ready; `values` are printed beside it."""
        now = time.monotonic()
        if not self._last:
            self._first, self._started = done, now
        self._values |= values
        eta_s = self._eta_s(done, now)
        line = self._line(done, eta_s)
        self._state = {"label": self.label, "done": done, "total": self.total, "eta_s": eta_s, "line": line}
        if now - self._written_at >= _SECONDS_BETWEEN_WRITES:
            self._write(now)
        if self._bar:
            self._bar.update(self._task, completed=done, line=line)
        elif not self._last or now - self._printed_at >= _SECONDS_BETWEEN_LINES:
            self._print(line, now)
        self._last = line

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        if self._last not in ("", self._printed_line):
            self._print(self._last, time.monotonic())
        self._write(time.monotonic())

    def _write(self, now: float) -> None:
        """Write the state in place: a second file could stay behind. Those who read it expect half of it."""
        if self._file and self._state:
            with suppress(OSError):  # a full disk ends the stage where it writes its work, not here
                self._file.write_text(json.dumps(self._state) + "\n", encoding="utf-8")
        self._written_at = now

    def _print(self, line: str, now: float) -> None:
        print(line, flush=True)
        self._printed_line, self._printed_at = line, now

    def _eta_s(self, done: int, now: float) -> int | None:
        """Seconds to the end at the speed since the first update; None at the ends of the loop."""
        ready = done - self._first
        if ready <= 0 or done >= self.total:
            return None
        return round((now - self._started) / ready * (self.total - done))

    def _line(self, done: int, eta_s: int | None) -> str:
        share = f"{100 * done // self.total}%" if self.total else ""
        parts = [self.label, f"{done}/{self.total}" if self.total else f"{done}", share]
        parts += [f"{name.replace('_', ' ')} {_short(value)}" for name, value in self._values.items()]
        if eta_s is not None:
            parts.append(f"ETA {eta_s // 60:02d}:{eta_s % 60:02d}")
        return "  ".join(part for part in parts if part)


def _short(value: float) -> str:
    """Three digits, and no exponent for what is counted in thousands."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


_SETTINGS = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin for long starve everyone else on a shared machine
    "GOMP_SPINCOUNT": "10000",  # but none at all halves the speed of small models: some 10 us, then sleep
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "TRL_EXPERIMENTAL_SILENCE": "1",  # of rollout_func, which tests/align/training/test_grpo.py holds
    "TQDM_DISABLE": "1",  # we show our own progress
}


def quieten() -> None:
    """Keep libraries from printing beside us; call it before anything heavy is imported.

    No progress bars, no telemetry, threads that share their cores; what the user has set stays. Deprecations
    are for the libraries to mend.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # accelerate imports DeepSpeed whenever it is installed; without a GPU it would say so on stdout
    logging.getLogger("DeepSpeed").addFilter(lambda record: "accelerator to CPU" not in str(record.msg))


def outlive_readers() -> None:
    """Go on in silence when nobody reads our output any more.

    A closed terminal, `| head`, or a full disk under a log would otherwise end a training at its next line.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            by_line = stream.line_buffering or name == "stderr"
            raw = io.BufferedWriter(_Output(stream.fileno()))
            text = io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=by_line)
            setattr(sys, name, text)


class _Output(io.RawIOBase):
    """A file descriptor that becomes /dev/null, also for our children, once it cannot be written to."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            raise
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._descriptor)
            os.close(null)
            return len(data)
