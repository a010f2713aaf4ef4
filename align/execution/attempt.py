"""An attempt at a stage: its time and memory, the error that ended it, and how signals stop it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

import psutil

from align.run_folder.artifacts import Interrupted, is_stop_heeded, stop_requested

_SAMPLE_EVERY_S = 0.2
_in_stage = threading.Event()


class Attempt:
    """Measures a block and keeps the error that ended it, instead of letting it through.

    `seconds` adds up over earlier attempts at the same work, which left their total in `clock`; it is
    kept up to date there, so that even a killed attempt counts. `peak_memory_mb` is the largest resident
    size of this process in the block. Only SystemExit passes.
    """

    def __init__(self, clock: Path | None = None) -> None:
        self.error: BaseException | None = None
        self.peak_memory_mb = 0.0
        self._clock = clock
        self._before = _read_seconds(clock) if clock else 0.0
        self._started = time.monotonic()
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="attempt", daemon=True)

    @property
    def seconds(self) -> float:
        """Time spent so far, earlier attempts included."""
        return self._before + time.monotonic() - self._started

    def __enter__(self) -> Attempt:
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._over.set()
        self._watcher.join()
        self.error = error
        return not isinstance(error, SystemExit)

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.peak_memory_mb = max(self.peak_memory_mb, process.memory_info().rss / 2**20)
            if self._clock and self._clock.parent.is_dir():
                try:
                    self._clock.write_text(f"{self.seconds:.2f}", encoding="utf-8")
                except FileNotFoundError:
                    return  # the folder has just been renamed: the work is finished
                except OSError:
                    pass  # a full disk ends the stage where it writes its work, not here
            if self._over.wait(_SAMPLE_EVERY_S):
                return


def _read_seconds(clock: Path) -> float:
    """The total an earlier attempt left; nothing if it was killed while writing it."""
    try:
        return float(clock.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this block the first signal interrupts, unless the running code heeds `stop_requested`.

    One that came before the block ends it at once.
    """
    _in_stage.set()
    try:
        if stop_requested.is_set():
            raise Interrupted
        yield
    finally:
        _in_stage.clear()


@contextmanager
def handling_signals() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into an orderly stop; the earlier handlers come back afterwards.

    SIGHUP comes when the terminal is closed; under `nohup` it is ignored, and stays so.
    Code outside `interruptible` (hashing and renaming finished work) is never cut short.
    """
    stop_requested.clear()
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    earlier = {number: signal.signal(number, _on_signal) for number in signals}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        stop_requested.clear()


def _on_signal(number: int, frame: FrameType | None) -> None:
    again = stop_requested.is_set()
    stop_requested.set()
    if _in_stage.is_set() and (again or not is_stop_heeded()):
        raise Interrupted
