"""Run untrusted work in processes that may crash or hang without harm, and know what they died of."""

from __future__ import annotations

import multiprocessing
import os
import queue
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
Item = TypeVar("Item")
_SPAWN = multiprocessing.get_context("spawn")  # not fork: the parent has threads and much memory
_WORKER_BYTES = 2 * 2**30  # memory that a worker may take on top of what it starts with
_GUARD = 'guard the calling script by `if __name__ == "__main__":`'


class Died(NamedTuple):
    """An item whose worker ended, with the worker's exit code; a negative code is a signal."""

    exit_code: int | None

    @property
    def of_timeout(self) -> bool:
        """Whether the item took too long."""
        return self.exit_code == -signal.SIGALRM


class _Worker(Generic[Item, T]):
    """A process that holds a single item at a time, so that it is known which item killed it."""

    def __init__(self, work: Callable[[Item], T], timeout_s: float) -> None:
        self.held: tuple[int, Item] | None = None  # None until its first message: "I am up"
        self.pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, work, timeout_s), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, index: int, item: Item) -> None:
        self.held = index, item
        with suppress(BrokenPipeError):  # it died idle; `take` will return how
            self.pipe.send(item)

    def take(self) -> T | Died:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return Died(_exit_code(self._process))

    def stop(self) -> None:
        self.pipe.close()
        self._process.kill()
        self._process.join()


def _exit_code(process: SpawnProcess) -> int | None:
    """How a process ended.

    Whatever thread starts a worker reaps all that have ended (`multiprocessing` polls its children then), so
    that `join` here may return a moment before that thread has noted the code.
    """
    process.join()
    deadline = time.monotonic() + 1.0
    while process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.001)
    return process.exitcode


def _serve(pipe: Connection, work: Callable[[Item], T], timeout_s: float) -> None:
    """A worker's life: an item in, a result out, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # kills, even inside a C decoder that loops
    if sys.platform == "linux":  # elsewhere the limit is not enforced, or cannot be set
        own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit, hard = own + _WORKER_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    with suppress(EOFError, BrokenPipeError):  # closed: also before this worker was ready
        pipe.send(None)
        while True:
            item = pipe.recv()
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
            result = work(item)
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(result)


class WorkerPool(Generic[Item, T]):
    """Workers that stay, for items that come one at a time, from several threads.

    They end with `close`, or with this process, however it ends. One that has died is replaced.
    """

    def __init__(self, work: Callable[[Item], T], timeout_s: float, workers: int) -> None:
        self._work, self._timeout_s = work, timeout_s
        self._idle: queue.SimpleQueue[_Worker[Item, T]] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(_Worker(work, timeout_s))

    def run(self, item: Item) -> T | Died:
        """The item's result, or how its worker died; waits for a worker that is free."""
        worker = self._idle.get()
        try:
            is_new = worker.held is None
            if is_new and isinstance(up := worker.take(), Died):
                raise RuntimeError(f"a decoder process does not start: {up}; {_GUARD}")
            worker.give(0, item)
            result = worker.take()
            died = isinstance(result, Died)
        except BaseException:
            died = True
            raise
        finally:
            if died:
                worker.stop()
                worker = _Worker(self._work, self._timeout_s)
            self._idle.put(worker)
        return result

    def close(self) -> None:
        """End the workers that are free."""
        with suppress(queue.Empty):
            while True:
                self._idle.get_nowait().stop()


def in_workers(
    work: Callable[[Item], T], items: Iterable[Item], timeout_s: float
) -> Iterator[tuple[int, T | Died]]:
    """Yield (index, result) of every item as results come.

    An item is taken from `items` when a worker is free for it, so `items` may be longer than memory. An item
    whose worker died gets a second worker, as the first may have been killed for another's sake (the
    system's memory ran out); an item that took longer than `timeout_s` does not.
    """
    new = enumerate(items)
    waiting = deque(islice(new, min(8, os.cpu_count() or 1)))
    """Items that are given out before new ones."""
    suspects: set[int] = set()
    workers: list[_Worker[Item, T]] = [_Worker(work, timeout_s) for _ in waiting]
    try:
        while workers:
            ready = wait([worker.pipe for worker in workers])
            for worker in [worker for worker in workers if worker.pipe in ready]:
                held, result = worker.held, worker.take()
                if not waiting:
                    waiting.extend(islice(new, 1))
                if waiting and not isinstance(result, Died):
                    worker.give(*waiting.popleft())
                else:
                    worker.stop()
                    workers.remove(worker)
                if isinstance(result, Died):
                    if held is None:
                        raise RuntimeError(f"a decoder process does not start: {result}; {_GUARD}")
                    if held[0] not in suspects and not result.of_timeout:
                        suspects.add(held[0])
                        waiting.append(held)
                        held = None
                    if waiting:
                        workers.append(_Worker(work, timeout_s))
                if held is not None:
                    yield held[0], result
    finally:
        for worker in workers:
            worker.stop()


def in_order(
    work: Callable[[Item], T], items: Iterable[Item], timeout_s: float
) -> Iterator[tuple[Item, T | Died]]:
    """Yield every item with its result in the order of `items`, see `in_workers`."""
    begun: dict[int, Item] = {}
    finished: dict[int, T | Died] = {}
    following = 0

    def beginning() -> Iterator[Item]:
        for index, item in enumerate(items):
            begun[index] = item
            yield item

    for index, result in in_workers(work, beginning(), timeout_s):
        finished[index] = result
        while following in finished:
            yield begun.pop(following), finished.pop(following)
            following += 1
