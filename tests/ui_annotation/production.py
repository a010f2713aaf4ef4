"""What compose.yaml starts, started here: its commands and variables, on our folders, hosts and ports."""

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import ui_annotation
from tests.ui_annotation.fake_elasticsearch import FakeElasticsearch
from ui_annotation.environment import ARGILLA

ROOT = Path(ui_annotation.__file__).parent
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


class Production:
    """What compose.yaml starts, but on free ports, without containers and without the proxy."""

    def __init__(self, root: Path, elasticsearch: FakeElasticsearch, passwords: dict[str, str]) -> None:
        self.root, self.elasticsearch, self.passwords = root, elasticsearch, passwords
        self.home, self.log = root / "home", root / "log.txt"
        self.ports = {name: free_port() for name in ("postgres", "redis", "server")}
        self.url = f"http://127.0.0.1:{self.ports['server']}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        (root / "app").mkdir()  # as the image has it
        (root / "app/server").symlink_to(ROOT / "server")
        shutil.copy(DEPLOY / "with_secrets.py", root / "app")

    def environ(self, service: str, **changed: str) -> dict[str, str]:
        """The service's variables, with our hosts; nothing of this process's."""
        fixed = {"PATH": os.environ["PATH"], "PYTHONPATH": str(self.root / "app"), "HOME": str(self.root)}
        fixed["TMPDIR"] = str(self.root)  # Argilla leaves 14 MB there when it is imported
        named = {name: self._here(value) for name, value in SERVICES[service]["environment"].items()}
        return fixed | named | changed

    def command(self, service: str) -> list[str]:
        """The service's command, with our folders and ports."""
        words = [self._here(word) for word in SERVICES[service]["command"]]
        python = str(ARGILLA.python)
        start = [python, str(self.root / "app/with_secrets.py"), str(self.root / "secrets")]
        return start + [python if word == "python" else word for word in words]

    def start(self, service: str) -> None:
        with self.log.open("a") as log:
            self.processes[service] = subprocess.Popen(
                self.command(service), env=self.environ(service), cwd=self.root, stdout=log, stderr=log
            )

    def start_server(self) -> None:
        self.start("server")
        wait_until(lambda: (self.home / "server.json").exists(), self.processes["server"], self.log)

    def stop(self, service: str) -> int:
        process = self.processes.pop(service)
        process.send_signal(signal.SIGTERM)
        return process.wait(20)

    def run_to_its_end(self, home: Path, **changed: str) -> subprocess.CompletedProcess[str]:
        """Start a second server that should refuse to."""
        command = [str(home) if word == str(self.home) else word for word in self.command("server")]
        command[command.index("--port") + 1] = "0"
        return subprocess.run(
            command,
            env=self.environ("server", **changed),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def credentials(self) -> dict[str, dict[str, str]]:
        users: dict[str, dict[str, str]] = json.loads((self.home / "credentials.json").read_text())["users"]
        return users

    def signed_in(self, name: str) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers={"X-Argilla-Api-Key": self.credentials()[name]["api_key"]}, timeout=30
        )

    def psql(self, query: str) -> str:
        return subprocess.run(
            [
                postgres("psql"),
                "-h",
                "127.0.0.1",
                "-p",
                str(self.ports["postgres"]),
                "-U",
                "argilla",
                "-Atc",
                query,
            ],
            env={"PGPASSWORD": self.passwords["database_password"], "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    def _here(self, text: str) -> str:
        places = {
            "@postgres:5432": f"@127.0.0.1:{self.ports['postgres']}",
            "@elasticsearch:9200": f"@127.0.0.1:{self.elasticsearch.port}",
            "@redis:6379": f"@127.0.0.1:{self.ports['redis']}",
            "0.0.0.0": "127.0.0.1",
            "${FRONT_SUBNET:-172.29.187.0/28}": "127.0.0.1",
            "6900": str(self.ports["server"]),
            "/data": str(self.home),
            "/tmp/worker": str(self.root / "worker"),
            "${ANNOTATORS:?list who annotates, in .env}": "ann,ben",
        }
        for there, here in places.items():
            text = text.replace(there, here)
        return text


def postgres(program: str) -> str:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"), key=lambda path: int(path.parts[4]))
    return str(found[-1]) if found else ""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def postgresql(production: Production) -> Iterator[None]:
    """PostgreSQL with what its image makes of the service's variables: a user with a password, a database."""
    as_whom, data = [], production.root / "postgres"
    data.mkdir(mode=0o700)
    password_file = production.root / "postgres_password"
    password_file.touch(mode=0o600)
    password_file.write_text(production.passwords["database_password"])
    if os.getuid() == 0:
        user = pwd.getpwnam("postgres")
        for path in (data, password_file):
            os.chown(path, user.pw_uid, user.pw_gid)
        as_whom = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    wanted = SERVICES["postgres"]["environment"]
    initdb = [*as_whom, postgres("initdb"), "-D", data, "-U", wanted["POSTGRES_USER"], "--no-sync"]
    initdb += ["--auth=scram-sha-256", f"--pwfile={password_file}", "--encoding=UTF8", "--locale=C.UTF-8"]
    subprocess.run(initdb, check=True, capture_output=True)
    port = str(production.ports["postgres"])
    serve = [*as_whom, postgres("postgres"), "-D", data, "-p", port, "-c", "unix_socket_directories="]
    serve += ["-c", "listen_addresses=127.0.0.1", "-F"]
    log = (production.root / "postgres.log").open("w")
    process = subprocess.Popen(serve, stdout=log, stderr=log)
    try:
        ready = [postgres("pg_isready"), "--quiet", "--host=127.0.0.1", f"--port={port}"]
        wait_until(lambda: subprocess.run(ready, check=False).returncode == 0, process, Path(log.name))
        login = {"PGPASSWORD": production.passwords["database_password"], "PATH": os.environ["PATH"]}
        create = [postgres("createdb"), "-h", "127.0.0.1", "-p", port, "-U", wanted["POSTGRES_USER"]]
        subprocess.run([*create, wanted["POSTGRES_DB"]], env=login, check=True)
        yield
    finally:
        process.send_signal(signal.SIGQUIT)  # at once
        process.wait()


@contextmanager
def redis(production: Production) -> Iterator[None]:
    """The service's own script, with our folders and port."""
    (script,) = SERVICES["redis"]["command"]
    (production.root / "redis").mkdir()
    here = f"redis-server --bind 127.0.0.1 --port {production.ports['redis']} "
    script = script.replace("redis-server ", here).replace("$$", "$")
    script = script.replace("/run/secrets", str(production.root / "secrets"))
    script = script.replace("/data", str(production.root / "redis"))
    log = (production.root / "redis.log").open("w")
    process = subprocess.Popen([*SERVICES["redis"]["entrypoint"], script], stdout=log, stderr=log)
    try:
        login = {"REDISCLI_AUTH": production.passwords["redis_password"], "PATH": os.environ["PATH"]}
        ping = ["redis-cli", "-p", str(production.ports["redis"]), "ping"]
        wait_until(
            lambda: subprocess.run(ping, env=login, capture_output=True, check=False).stdout == b"PONG\n",
            process,
            Path(log.name),
        )
        yield
    finally:
        process.kill()
        process.wait()


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"{process.args}: exit code {process.poll()}:\n{log.read_text()[-3000:]}")
        time.sleep(0.1)
