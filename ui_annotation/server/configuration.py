"""How our Argilla is configured, in the environment, before anything of Argilla is imported.

In production the environment names services. They are asked before Argilla starts: Argilla itself tries for
a minute, then fails with a traceback that holds Redis's password.
"""

import os
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import redis
from sqlalchemy import create_engine, make_url
from sqlalchemy.exc import DBAPIError

from .home import StartRefused

EMBEDDED = "embedded"
_ANSWER_WITHIN_S = 5


def configure(home: Path, auth_secret: str) -> None:
    """Set Argilla's environment for a server with this home.

    ARGILLA_DATABASE_URL, ARGILLA_REDIS_URL and ARGILLA_SEARCH_ENGINE are respected where they are given;
    without them everything stays in this process and in the home's SQLite file.

    Raises:
        StartRefused: for the embedded search engine over anything but SQLite, or with Redis, whose
            worker does not know it.
    """
    os.environ.update(
        {
            "ARGILLA_HOME_PATH": str(home),
            "ARGILLA_CORS_ORIGINS": "[]",
            "ARGILLA_DOCS_ENABLED": "false",
            "ARGILLA_DATABASE_SQLITE_TIMEOUT": "30",
            "ARGILLA_AUTH_SECRET_KEY": auth_secret,
            "ARGILLA_AUTH_OAUTH_CFG": str(home / "oauth.yaml"),  # by default relative to the current folder
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1",
        }
    )
    os.environ.setdefault("ARGILLA_SEARCH_ENGINE", EMBEDDED)
    is_sqlite = os.environ.get("ARGILLA_DATABASE_URL", "sqlite").startswith("sqlite")
    if os.environ["ARGILLA_SEARCH_ENGINE"] == EMBEDDED and (uses_real_redis() or not is_sqlite):
        name = "ARGILLA_REDIS_URL" if is_sqlite else "ARGILLA_DATABASE_URL"
        raise StartRefused(
            f"{name} is set, but ARGILLA_SEARCH_ENGINE is {EMBEDDED!r}, which works over SQLite only and "
            "without Redis. Set ARGILLA_SEARCH_ENGINE=elasticsearch (with ARGILLA_ELASTICSEARCH), or unset "
            f"{name}"
        )


def uses_real_redis() -> bool:
    """Whether jobs go to a Redis server, and so to `argilla_server worker`, not to a thread of ours."""
    return "ARGILLA_REDIS_URL" in os.environ


def keep_jobs_in_process() -> None:
    """Have the connection that Argilla opens when it is imported lead to a queue in this process.

    The queue is lost at a stop, which harms nothing: the jobs only compute again what the tables already say.
    """
    import fakeredis

    shared = fakeredis.FakeServer()
    redis.from_url = lambda url, **options: fakeredis.FakeRedis(server=shared, **options)


def check_services() -> None:
    """Ask every service that the environment names; compose starts us again when one was not ready.

    Raises:
        StartRefused: one is not.
    """
    for setting, ask in (
        ("ARGILLA_DATABASE_URL", _ask_postgresql),
        ("ARGILLA_ELASTICSEARCH", _ask_search_engine),
        ("ARGILLA_REDIS_URL", _ask_redis),
    ):
        url = os.environ.get(setting, "")
        if not url or url.startswith("sqlite"):
            continue
        try:
            ask(url)
        except (DBAPIError, httpx.TransportError, redis.RedisError, ConnectionError) as error:
            parts = urlsplit(url)
            address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # without the password
            problem = " ".join(str(getattr(error, "orig", error)).split()) or type(error).__name__
            raise StartRefused(
                f"{setting}: {address}: {problem}. Start it, or mend the setting, and start again"
            ) from None


def _ask_postgresql(url: str) -> None:
    # Argilla's URL names a driver for the event loop; this is the one that its migrations use
    address = make_url(url).set(drivername="postgresql+psycopg2")
    create_engine(address, connect_args={"connect_timeout": _ANSWER_WITHIN_S}).connect().close()


def _ask_search_engine(url: str) -> None:
    verify: bool | str = os.environ.get("ARGILLA_ELASTICSEARCH_CA_PATH") or True
    if os.environ.get("ARGILLA_ELASTICSEARCH_SSL_VERIFY", "true").lower() in ("false", "0", "no"):
        verify = False
    answer = httpx.get(url, timeout=_ANSWER_WITHIN_S, trust_env=False, verify=verify)
    if not answer.is_success:  # httpx's own error would tell the password
        raise ConnectionError(f"answers {answer.status_code} {answer.reason_phrase}")


def _ask_redis(url: str) -> None:
    redis.from_url(url, socket_connect_timeout=_ANSWER_WITHIN_S, socket_timeout=_ANSWER_WITHIN_S).ping()
