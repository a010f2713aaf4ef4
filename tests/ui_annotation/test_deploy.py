"""Production: the compose file, and what it starts, run here against Debian's PostgreSQL and redis-server.

The commands and settings are read from compose.yaml; only folders, hosts and ports are put in its place.
Elasticsearch cannot run here: a fake speaks its protocol.
"""

import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import soundfile

from preference_data.schema import CHOICES, Comparison, Prompt
from tests.ui_annotation.fake_elasticsearch import FakeElasticsearch
from tests.ui_annotation.production import (
    COMPOSE,
    DEPLOY,
    ROOT,
    SERVICES,
    Production,
    postgres,
    postgresql,
    redis,
    wait_until,
)
from ui_annotation import client, pull, push
from ui_annotation.environment import ARGILLA
from ui_annotation.project import Project

PASSWORDS = ("database_password", "elasticsearch_password", "redis_password")


# ------------------------------------------------------------------------------------ the compose file


def test_compose_file_follows_the_compose_specification():
    tool = Path(sys.executable).with_name("check-jsonschema")
    subprocess.run(
        [tool, "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml"],
        check=True,
        capture_output=True,
    )


def test_docker_compose_takes_the_file(tmp_path):
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("no `docker compose` here")
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    (tmp_path / "deploy/.env").write_text((DEPLOY / ".env.example").read_text())
    subprocess.run(["docker", "compose", "config", "--quiet"], cwd=tmp_path / "deploy", check=True)


def test_compose_runs_the_launcher_of_annotate_up():
    assert SERVICES["server"]["command"][:5] == ["python", "-m", "server", "--home", "/data"]
    assert SERVICES["worker"]["command"][:3] == ["python", "-m", "argilla_server"]
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert "--require-hashes" in dockerfile
    assert "COPY server/requirements.lock" in dockerfile
    for source in re.findall(r"^COPY ([^/ ]\S*)", dockerfile, re.MULTILINE):
        assert (ROOT / source).exists(), source


def test_every_image_has_an_exact_version():
    images = [service["image"] for service in SERVICES.values()]
    images += re.findall(r"^FROM (\S+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    for image in images:
        assert re.search(r":\d+\.\d+\.?\d*(-|$)", image), image


def test_only_the_proxy_can_be_reached():
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["proxy"]
    open_networks = {
        name for name, network in COMPOSE["networks"].items() if not (network or {}).get("internal")
    }
    on_them = {name for name, service in SERVICES.items() if open_networks & set(service["networks"])}
    assert on_them == {"proxy"}
    assert not [name for name, service in SERVICES.items() if "network_mode" in service]


def test_every_service_is_confined_checked_and_limited():
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["mem_limit"], name
        assert service["cpus"], name
        assert service["healthcheck"]["test"], name
        assert service["restart"] == "unless-stopped", name
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    ours = {name for name, service in SERVICES.items() if "build" in service}
    assert all("user" in SERVICES[name] for name in SERVICES.keys() - ours)
    for stage in dockerfile.split("\nFROM ")[1:]:
        assert re.search(r"^USER (?!0|root)", stage, re.MULTILINE), stage
    assert [name for name in SERVICES if not SERVICES[name].get("read_only")] == ["elasticsearch"]


def test_every_service_waits_for_what_it_needs():
    waits = {
        name: {other: how["condition"] for other, how in service.get("depends_on", {}).items()}
        for name, service in SERVICES.items()
    }
    healthy = "service_healthy"
    assert waits["server"] == {"postgres": healthy, "elasticsearch": healthy, "redis": healthy}
    assert waits["worker"] == waits["proxy"] == {"server": healthy}


def test_passwords_come_from_files_and_volumes_have_names():
    assert set(COMPOSE["secrets"]) == set(PASSWORDS)
    assert all(list(source) == ["file"] for source in COMPOSE["secrets"].values())
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            if "PASSWORD" in variable:
                assert value.startswith("/run/secrets/"), variable
            # whoever signs in to a service by URL does so with a secret
            assert re.sub(r"://\w*:\{secret:\w+\}@", "", str(value)).count("@") == 0, variable
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in COMPOSE["volumes"], volume


def test_an_empty_or_missing_secret_is_named(tmp_path):
    (tmp_path / "empty").write_text("\n")
    for name, complaint in (("empty", "is empty"), ("lost", "No such file or directory")):
        ended = subprocess.run(
            [sys.executable, DEPLOY / "with_secrets.py", tmp_path, "true"],
            env={"URL": f"x://{{secret:{name}}}@y"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 1
        assert f"URL: {tmp_path / name}: {complaint}" in ended.stderr


# ------------------------------------------------------------------------------------ what it starts


@pytest.fixture(scope="module")
def production() -> Iterator[Production]:
    _need(bool(postgres("initdb")), "no PostgreSQL: apt-get install postgresql")
    _need(bool(shutil.which("redis-server")), "no redis-server: apt-get install redis-server")
    _need(ARGILLA.is_ready, "no Argilla: align annotate install")
    passwords = {name: secrets.token_hex(12) for name in PASSWORDS}
    passwords["database_password"] += "%/@:"  # a URL must survive it
    with ExitStack() as stack:
        # not pytest's folder: PostgreSQL, which never runs as root, could not enter that
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="production-")))
        root.chmod(0o711)
        (root / "secrets").mkdir(mode=0o700)
        for name, password in passwords.items():
            (root / "secrets" / name).write_text(password + "\n")
        elasticsearch = stack.enter_context(FakeElasticsearch("elastic", passwords["elasticsearch_password"]))
        made = Production(root, elasticsearch, passwords)
        stack.enter_context(postgresql(made))
        stack.enter_context(redis(made))
        try:
            made.start_server()
            made.start("worker")
            yield made
        finally:
            for process in made.processes.values():
                tree = psutil.Process(process.pid).children(recursive=True)  # the worker's
                process.kill()
                process.wait()
                for child in tree:
                    child.kill()


@pytest.fixture(scope="module")
def comparisons() -> list[Comparison]:
    both = {"completions": ("a", "b"), "texts": ("Seven.", "Nine.")}
    return [Comparison(id=f"r{i}", prompt_id=f"p{i}", everyone=True, **both) for i in range(3)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16_000)
    soundfile.write(folder / "tone.wav", wave.astype(np.float32), 16_000)
    return folder


@pytest.fixture(scope="module")
def pushed(production, comparisons, corpus) -> push.PushResult:
    return _push(production, comparisons, corpus, annotators=2)


def test_migrations_users_and_workspace_are_in_postgresql(production):
    assert production.psql("select username, role from users order by 1").splitlines() == [
        "ann|annotator",
        "ben|annotator",
        "owner|owner",
    ]
    assert production.psql("select name from workspaces") == "audio"
    assert not list(production.home.glob("argilla.db*"))
    password = production.credentials()["ann"]["password"]
    with httpx.Client(base_url=production.url) as browser:
        sign_in = browser.post("/api/v1/token", data={"username": "ann", "password": password})
        assert sign_in.status_code == 201
        bearer = {"Authorization": f"Bearer {sign_in.json()['access_token']}"}
        assert browser.get("/api/v1/me", headers=bearer).json()["username"] == "ann"
        # behind the proxy the media cookie must never travel unencrypted
        https = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.7"}
        assert "; Secure" in browser.get("/api/v1/me", headers=bearer | https).headers["set-cookie"]


def test_behind_the_proxy_only_the_address_that_it_saw_counts(production):
    password = production.credentials()["ben"]["password"]

    def attempt(said: str, password: str) -> int:
        """What the proxy passes on: what the client claimed, and behind it where the client really was."""
        with httpx.Client(base_url=production.url) as proxy:
            form = {"username": "ben", "password": password}
            return proxy.post("/api/v1/token", data=form, headers={"X-Forwarded-For": said}).status_code

    spellings = ("203.0.113.7", "203.0.113.7, 127.0.0.1", "203.0.113.7:4711", "::ffff:203.0.113.7")
    for i in range(10):
        assert attempt(f"198.51.100.{i}, {spellings[i % 4]}", "wrong") == 401
    assert attempt("198.51.100.99, 203.0.113.7", password) == 429
    assert attempt("203.0.113.7, 198.51.100.1", password) == 201


def test_what_is_pushed_is_stored_and_indexed(production, pushed, comparisons):
    (name,) = pushed.datasets
    assert pushed.added == 3
    assert production.psql("select status from datasets") == "ready"
    assert production.psql("select external_id from records order by 1").split() == ["r0", "r1", "r2"]
    (index,) = production.elasticsearch.indices.values()
    assert sorted(document["external_id"] for document in index.values()) == ["r0", "r1", "r2"]
    with production.signed_in("ann") as ann:
        assert len(_queue(ann, production)) == 3


def test_a_worker_recomputes_what_is_done_when_less_is_wanted(production, pushed, comparisons, corpus):
    with production.signed_in("ann") as ann:
        record = _queue(ann, production)[0]
        ann.get(pushed.media["tone.wav"]).raise_for_status()
        time.sleep(0.25)  # the clip at twice its speed
        ann.post(f"{pushed.media['tone.wav']}/heard", params={"share": 1.0}).raise_for_status()
        answer = {"factuality": {"value": "a"}, "behaviour": {"value": "tie"}}
        path = f"/api/v1/records/{record['id']}/responses"
        ann.post(path, json={"status": "submitted", "values": answer}).raise_for_status()
        assert len(_queue(ann, production)) == 2
    status = f"select status from records where id = '{record['id']}'"
    assert production.psql(status) == "pending"  # one of two judgements
    argilla = client.connect(production.url, production.credentials()["owner"]["api_key"])
    (dataset,) = client.datasets(argilla, "audio").values()
    less = {"distribution": {"strategy": "overlap", "min_submitted": 1}}
    client.request(argilla, "PATCH", f"/api/v1/datasets/{dataset['id']}", json=less)
    wait_until(lambda: production.psql(status) == "completed", production.processes["worker"], production.log)
    assert production.psql("select count(*) from records where status = 'pending'") == "2"
    (index,) = production.elasticsearch.indices.values()
    assert index[record["id"]]["status"] == "completed"
    (judged,) = pull.pull(argilla, _project(comparisons, corpus))
    assert (judged.comparison, judged.annotator) == (record["external_id"], "ann")
    assert judged.factuality == CHOICES["a"]
    assert judged.heard == 1.0


def test_the_worker_is_found_healthy(production):
    words = SERVICES["worker"]["healthcheck"]["test"][5:]
    start = production.command("worker")[:3]
    env = production.environ("worker")
    healthy = [*start, str(ARGILLA.python), *words]
    # Its name reaches Redis some seconds after its process: Docker, too, asks several times
    worker = production.processes["worker"]
    wait_until(lambda: subprocess.run(healthy, env=env, check=False).returncode == 0, worker, production.log)


def test_no_password_is_in_a_command_line_or_log(production, pushed):
    private = {*production.passwords.values()}
    private |= {user[what] for user in production.credentials().values() for what in ("password", "api_key")}
    said = production.log.read_text()
    for process in production.processes.values():
        said += Path(f"/proc/{process.pid}/cmdline").read_text()
    assert not [secret for secret in private if secret in said]


def test_a_lost_index_is_made_anew(production, pushed):
    (name,) = list(production.elasticsearch.indices)
    lost = production.elasticsearch.indices.pop(name)
    python = str(ARGILLA.python)
    again = [*production.command("server")[:3], python, "-m", "argilla_server", "search-engine", "reindex"]
    subprocess.run(
        again, env=production.environ("server", TMPDIR=str(production.root)), check=True, capture_output=True
    )
    found = production.elasticsearch.indices[name]
    assert found.keys() == lost.keys()
    assert {key: one["status"] for key, one in found.items()} == {
        key: one["status"] for key, one in lost.items()
    }


def test_a_restart_keeps_everything(production, pushed, comparisons, corpus):
    password = production.credentials()["ben"]["password"]
    form = {"username": "ben", "password": password}
    token = httpx.post(f"{production.url}/api/v1/token", data=form).json()["access_token"]
    before = production.psql("select count(*) from records, responses")
    assert production.stop("server") == 0
    production.start_server()
    assert production.psql("select count(*) from records, responses") == before
    me = httpx.get(f"{production.url}/api/v1/me", headers={"Authorization": f"Bearer {token}"})
    assert me.json()["username"] == "ben"
    with production.signed_in("ben") as ben:
        assert ben.get(pushed.media["tone.wav"]).content == (corpus / "tone.wav").read_bytes()
    assert _push(production, comparisons, corpus, annotators=2).added == 0


def test_settings_that_cannot_work_are_refused_in_one_line(production, tmp_path):
    ports = production.ports
    cases = {  # variable -> its value, what the line says
        "ARGILLA_SEARCH_ENGINE": ("embedded", "which works over SQLite only"),
        "ARGILLA_ELASTICSEARCH": ("http://elastic:hidden@127.0.0.1:1", "http://127.0.0.1:1: .*refused"),
        "ARGILLA_REDIS_URL": (f"redis://:hidden@127.0.0.1:{ports['redis']}/0", "invalid username-password"),
        "ARGILLA_DATABASE_URL": (
            f"postgresql+asyncpg://argilla:hidden@127.0.0.1:{ports['postgres']}/argilla",
            f"//127.0.0.1:{ports['postgres']}: .*authentication failed",
        ),
    }
    with ThreadPoolExecutor() as pool:
        runs = {
            variable: pool.submit(production.run_to_its_end, tmp_path / variable, **{variable: value})
            for variable, (value, _) in cases.items()
        }
    for variable, (_, says) in cases.items():
        ended = runs[variable].result()
        assert ended.returncode == 1
        assert re.fullmatch(rf"error: .*{variable}.*\n", ended.stderr)
        assert re.search(says, ended.stderr)
        assert not re.search("hidden|" + re.escape(production.passwords["database_password"]), ended.stderr)


# ------------------------------------------------------------------------------------ how they are run


def _project(comparisons: list[Comparison], corpus: Path, annotators: int = 1) -> Project:
    prompts = {
        one.prompt_id: Prompt(
            id=one.prompt_id,
            audios=("tone.wav",),
            question="Which digit?",
            answer_gt="Seven.",
            meta_info="{}",
            task_name="digit",
        )
        for one in comparisons
    }
    return Project("production", "audio", comparisons, prompts, corpus, annotators)


def _push(
    production: Production, comparisons: list[Comparison], corpus: Path, *, annotators: int
) -> push.PushResult:
    argilla = client.connect(production.url, production.credentials()["owner"]["api_key"])
    return push.push(argilla, _project(comparisons, corpus, annotators))


def _queue(annotator: httpx.Client, production: Production) -> list[dict[str, Any]]:
    """What waits for an annotator, as the browser asks for it."""
    dataset = production.psql("select id from datasets")
    pending = {"type": "terms", "scope": {"entity": "response", "property": "status"}, "values": ["pending"]}
    path = f"/api/v1/me/datasets/{dataset}/records/search"
    found = (
        annotator.post(path, json={"filters": {"type": "and", "and": [pending]}}).raise_for_status().json()
    )
    return [item["record"] for item in found["items"]]


def _need(there: bool, reason: str) -> None:
    if not there and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if not there:
        pytest.skip(reason)
