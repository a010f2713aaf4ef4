"""How far a long loop is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows `label  120/300  40%  loss 0.412  ETA 00:35`.

    On a terminal one line redraws itself; in a log a line is printed at the start, at the end, and at
    most every 10 s between. A loop that resumes tells where it starts by its first `update`.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label = label
        self.total = total
        self._started = self._printed = time.monotonic()
        self._first = 0
        """`done` at the first update: what an earlier attempt did tells nothing about this one's speed."""
        self._values: dict[str, float] = {}
        """The latest of each; a value not given again is still shown."""
        self._last = self._shown = ""
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            self._bar = Bar(
                TextColumn("{task.fields[line]}", markup=False), BarColumn(bar_width=24), transient=True
            )
            self._task = self._bar.add_task("", total=self.total, line=self.label)
            self._bar.start()
        return self

    def update(self, done: int, **values: float) -> None:
        """Tell that `done` of `total` are ready; `values` are shown beside it."""
        now = time.monotonic()
        if not self._last:
            self._first, self._started = done, now
        self._values |= values
        line = self._line(done, now)
        if self._bar:
            self._bar.update(self._task, completed=done, line=line)
        elif not self._last or now - self._printed >= _SECONDS_BETWEEN_LINES:
            self._print(line, now)
        self._last = line

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        if self._last not in ("", self._shown):
            self._print(self._last, time.monotonic())

    def _print(self, line: str, now: float) -> None:
        print(line, flush=True)
        self._shown, self._printed = line, now

    def _line(self, done: int, now: float) -> str:
        share = f"{100 * done // self.total}%" if self.total else ""
        parts = [self.label, f"{done}/{self.total}" if self.total else f"{done}", share]
        parts += [f"{name.replace('_', ' ')} {_short(value)}" for name, value in self._values.items()]
        ready = done - self._first
        if 0 < ready and done < self.total:
            seconds = round((now - self._started) / ready * (self.total - done))
            parts.append(f"ETA {seconds // 60:02d}:{seconds % 60:02d}")
        return "  ".join(part for part in parts if part)


def _short(value: float) -> str:
    """Three digits, and no exponent for what is counted in thousands."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
