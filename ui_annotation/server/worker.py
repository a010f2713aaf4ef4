"""Argilla's jobs: in a thread of the server without Redis, else `python -m server.worker --home HOME`.

Argilla's own worker does not know our search engine. The queue in the process is lost at a stop, which harms
nothing: the jobs only compute again what the tables already say.
"""

import argparse
import os
import sys
import tempfile
import threading
from pathlib import Path

from rq import SimpleWorker, Worker
from rq.timeouts import TimerDeathPenalty

from . import configuration


class ThreadWorker(SimpleWorker):
    """A worker that may run outside the main thread: no signals, neither for timeouts nor for its end."""

    death_penalty_class = TimerDeathPenalty

    def _install_signal_handlers(self) -> None:
        pass


def keep_jobs_in_process() -> None:
    """Make the connection that Argilla opens when it is imported lead to a queue in this process."""
    import fakeredis
    import redis

    shared = fakeredis.FakeServer()
    redis.from_url = lambda url, **options: fakeredis.FakeRedis(server=shared, **options)


def start_thread() -> None:
    """Work the queue off in the background, until the process ends."""
    threading.Thread(target=_work, args=(ThreadWorker,), daemon=True, name="jobs").start()


def main() -> int:
    """Work jobs off until a signal ends it.

    Returns:
        0 after an orderly end, 1 when the settings cannot work; the reason is on stderr.
    """
    parser = argparse.ArgumentParser(prog="server.worker", description="Work off Argilla's jobs from Redis.")
    parser.add_argument("--home", type=Path, required=True, help="the server's state folder")
    folder = parser.parse_args().home.absolute()
    os.umask(0o077)
    try:
        configuration.configure(folder)
        if not configuration.uses_real_redis():
            raise configuration.ConfigurationRefused(
                "ARGILLA_REDIS_URL is not set: without Redis the server works off its jobs itself, "
                "no worker is needed"
            )
    except configuration.ConfigurationRefused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TMPDIR"] = scratch  # Argilla leaves 14 MB there when it is imported
        tempfile.tempdir = None
        from . import argilla_fixes, search_engine  # noqa: F401  search_engine: importing it registers it

        argilla_fixes.apply()
        _work(Worker)
    return 0


def _work(kind: type[Worker]) -> None:
    from argilla_server.jobs.queues import DEFAULT_QUEUE, HIGH_QUEUE, REDIS_CONNECTION

    kind([HIGH_QUEUE, DEFAULT_QUEUE], connection=REDIS_CONNECTION).work(logging_level="WARNING")


if __name__ == "__main__":
    sys.exit(main())
