"""Argilla's jobs without Redis: a queue in the server's process and a thread that works it off.

The queue is lost at a stop, which harms nothing: the jobs only compute again what the tables already say.
"""

import threading

from rq import SimpleWorker
from rq.timeouts import TimerDeathPenalty


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
    threading.Thread(target=_work, daemon=True, name="jobs").start()


def _work() -> None:
    from argilla_server.jobs.queues import DEFAULT_QUEUE, HIGH_QUEUE, REDIS_CONNECTION

    ThreadWorker([HIGH_QUEUE, DEFAULT_QUEUE], connection=REDIS_CONNECTION).work(logging_level="WARNING")
