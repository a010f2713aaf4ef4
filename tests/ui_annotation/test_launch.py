"""The server's life with real processes: private, restartable, alone on its home, silent about secrets."""

import base64
import dataclasses
import hashlib
import json
import os
import pty
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from align.run_folder.server_environment import InstallFailed
from ui_annotation import accounts, client, launch
from ui_annotation.environment import ARGILLA

NAMES = ("annotator-1", "annotator-2")


def eventually(condition: Callable[[], bool], within_s: float = 60.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def sign_in(url: str, name: str, password: str) -> str:
    form = {"username": name, "password": password}
    answer = httpx.post(f"{url}/api/v1/token", data=form, trust_env=False)
    assert answer.status_code == 201, answer.text
    return answer.json()["access_token"]


def who(url: str, token: str) -> str:
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.get(f"{url}/api/v1/me", headers=headers, trust_env=False).json()["username"]


def secrets_of(home: Path) -> list[str]:
    kept = launch.credentials(home)
    return [kept["auth_secret"], *(u[k] for u in kept["users"].values() for k in ("password", "api_key"))]


@pytest.fixture(scope="module")
def home(argilla_environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("life") / "home"
    yield place
    launch.stop(place)


@pytest.fixture
def served(home: Path) -> launch.Running:
    """A server on `home`: tests here stop and kill it, so that it is started where it is missing."""
    return launch.running(home) or launch.start(home)


def run_server(*options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """For starts that are refused."""
    command = [str(ARGILLA.python), "-P", "-m", "server", *options]
    path = {"PYTHONPATH": str(Path(launch.__file__).parent)}
    return subprocess.run(
        command, env=os.environ | path | environ, capture_output=True, text=True, timeout=30
    )


def test_in_the_foreground_passwords_are_shown_once_and_only_to_a_terminal(home: Path) -> None:
    screen, terminal = pty.openpty()
    serve = "import pathlib, sys; from ui_annotation import launch; launch.serve(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", serve, str(home)]
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal)
    try:
        assert eventually(lambda: launch.running(home) is not None), os.read(screen, 10_000).decode()
        os.set_blocking(screen, False)
        shown = os.read(screen, 10_000).decode()
        assert launch.running(home).url in shown  # type: ignore[union-attr]
        users = launch.credentials(home)["users"]
        assert set(users) == {"owner", *NAMES}
        assert all(user["password"] in shown and user["api_key"] not in shown for user in users.values())
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        os.close(screen)
        os.close(terminal)
    assert launch.running(home) is None


def test_nobody_else_can_read_the_home(home: Path, served: launch.Running) -> None:
    paths = [home, *home.rglob("*")]
    paths = [p for p in paths if home / "tmp" not in p.parents]  # copies of Argilla's public pages
    assert {"argilla.db", "credentials.json", "server.json", "server.log"} <= {path.name for path in paths}
    assert [p for p in paths if stat.S_IMODE(p.stat().st_mode) & 0o077] == []


def test_no_secret_in_the_process_list_nor_in_the_log(home: Path, served: launch.Running) -> None:
    me = launch.credentials(home)["users"]["annotator-1"]
    sign_in(served.url, "annotator-1", me["password"])
    httpx.get(f"{served.url}/api/v1/me", headers={"X-Argilla-Api-Key": me["api_key"]}, trust_env=False)
    visible = " ".join(psutil.Process(served.pid).cmdline()) + (home / "server.log").read_text()
    assert f"serves at {served.url}" in visible
    assert [secret for secret in secrets_of(home) if secret in visible] == []


def test_listens_on_this_machine_only_and_speaks_to_nobody_else(served: launch.Running) -> None:
    sockets = psutil.Process(served.pid).net_connections("inet")
    assert {s.laddr.ip for s in sockets} == {"127.0.0.1"}
    assert [s.laddr.port for s in sockets if s.status == psutil.CONN_LISTEN] == [
        int(served.url.rsplit(":", 1)[1])
    ]


def test_no_other_site_may_read_answers(served: launch.Running) -> None:
    answer = httpx.get(
        f"{served.url}/api/v1/settings", headers={"Origin": "http://elsewhere.example"}, trust_env=False
    )
    assert answer.is_success
    assert "access-control-allow-origin" not in answer.headers


def test_jobs_run_without_redis(home: Path, served: launch.Running) -> None:
    """Changing the overlap re-computes the records' states in a job."""
    users = launch.credentials(home)["users"]
    owner, annotator = (
        httpx.Client(
            base_url=f"{served.url}/api/v1",
            headers={"X-Argilla-Api-Key": users[name]["api_key"]},
            trust_env=False,
        )
        for name in ("owner", "annotator-1")
    )
    [workspace] = annotator.get("/me/workspaces").json()["items"]
    overlap = {"strategy": "overlap", "min_submitted": 2}
    dataset = owner.post(
        "/datasets", json={"name": "jobs", "workspace_id": workspace["id"], "distribution": overlap}
    ).json()["id"]
    field = {"name": "text", "title": "text", "settings": {"type": "text", "use_markdown": True}}
    options = [{"value": value, "text": value} for value in "AB"]
    question = {
        "name": "choice",
        "title": "choice",
        "settings": {"type": "label_selection", "options": options},
    }
    owner.post(f"/datasets/{dataset}/fields", json=field | {"required": True}).raise_for_status()
    owner.post(f"/datasets/{dataset}/questions", json=question | {"required": True}).raise_for_status()
    owner.put(f"/datasets/{dataset}/publish").raise_for_status()
    records = owner.post(f"/datasets/{dataset}/records/bulk", json={"items": [{"fields": {"text": "hello"}}]})
    record = records.json()["items"][0]["id"]
    answer = {"status": "submitted", "values": {"choice": {"value": "A"}}}
    annotator.post(f"/records/{record}/responses", json=answer).raise_for_status()
    assert owner.get(f"/records/{record}").json()["status"] == "pending"
    owner.patch(
        f"/datasets/{dataset}", json={"distribution": overlap | {"min_submitted": 1}}
    ).raise_for_status()
    assert eventually(lambda: owner.get(f"/records/{record}").json()["status"] == "completed")
    assert owner.delete(f"/datasets/{dataset}").is_success


def test_a_second_server_on_the_home_is_refused(home: Path, served: launch.Running) -> None:
    with pytest.raises(launch.ServerFailed, match=rf"\(pid {served.pid}\) runs on it already"):
        launch.start(home)
    assert launch.running(home) == served


def test_a_taken_port_is_named(argilla_environment: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = run_server("--home", str(tmp_path / "home"), "--port", str(port))
        assert refused.returncode == 1
        assert re.search(rf"port {port} on 127.0.0.1: .*--port 0", refused.stderr)


def test_restart_keeps_users_and_sign_ins(home: Path, served: launch.Running) -> None:
    made = accounts.add_user(home, "visitor", workspace="elsewhere")
    with pytest.raises(client.Refused, match="visitor"):
        accounts.add_user(home, "visitor")
    token = sign_in(served.url, "visitor", made["password"])
    before = accounts.list_users(home)
    assert accounts.User("visitor", "annotator", ("elsewhere",)) in before

    assert launch.stop(home)
    assert not (home / "server.json").exists()
    assert not psutil.pid_exists(served.pid) or psutil.Process(served.pid).status() == psutil.STATUS_ZOMBIE
    assert not launch.stop(home)
    with pytest.raises(launch.ServerFailed, match="align annotate up"):
        accounts.list_users(home)

    again = launch.start(home, users=NAMES)
    assert who(again.url, token) == "visitor"
    assert accounts.list_users(home) == before
    assert launch.credentials(home)["users"]["visitor"] == made


def test_starts_again_after_kill_9_without_bringing_deleted_users_back(
    home: Path, served: launch.Running
) -> None:
    accounts.add_user(home, "left-us")
    headers = {"X-Argilla-Api-Key": launch.credentials(home)["users"]["owner"]["api_key"]}
    with httpx.Client(base_url=served.url, headers=headers, trust_env=False) as owner:
        ids = {user["username"]: user["id"] for user in owner.get("/api/v1/users").json()["items"]}
        assert owner.delete(f"/api/v1/users/{ids['left-us']}").is_success
    os.kill(served.pid, signal.SIGKILL)
    assert eventually(lambda: launch.running(home) is None)
    assert (home / "server.json").exists()

    again = launch.start(home)
    assert again.pid != served.pid
    names = {user.name for user in accounts.list_users(home)}
    assert {"owner", *NAMES} <= names
    assert "left-us" not in names


def test_a_home_that_others_can_read_is_refused(argilla_environment: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    refused = run_server("--home", str(tmp_path))
    assert refused.returncode == 1
    assert f"chmod 700 {tmp_path}" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_embedded_engine_is_refused_over_postgresql(argilla_environment: Path, tmp_path: Path) -> None:
    url = "postgresql+asyncpg://argilla:hidden-word@db/argilla"
    refused = run_server("--home", str(tmp_path / "home"), ARGILLA_DATABASE_URL=url)
    assert refused.returncode == 1
    assert "ARGILLA_SEARCH_ENGINE=elasticsearch" in refused.stderr
    assert "hidden-word" not in refused.stderr


BAD_NAMES = ("jörg", "ann smith", "-ann", "ann\n", "\u0430nn", "a" * 101, "../ann")
THE_RULE = "letters (a to z, A to Z), digits, '-' and '_', at most 100, the first a letter or a digit"


def test_names_follow_one_rule_wherever_they_are_given(home: Path, served: launch.Running) -> None:
    owner = client.connect(served.url, launch.credentials(home)["users"]["owner"]["api_key"])
    for name in BAD_NAMES:
        with pytest.raises(client.Refused, match=re.escape(f"user {name!r}: a name has {THE_RULE}")):
            accounts.add_user(home, name)
        assert name not in launch.credentials(home)["users"]
        with pytest.raises(client.Refused, match="workspace '.*: a name has"):
            client.call(owner, "POST", "/api/v1/workspaces", json={"name": name})
    for name in ("9-a_B", "a" * 100):
        made = accounts.add_user(home, name)
        assert who(served.url, sign_in(served.url, name, made["password"])) == name
    ids = {user["username"]: user["id"] for user in client.call(owner, "GET", "/api/v1/users")["items"]}
    with pytest.raises(client.Refused, match="user 'B c': a name has"):
        client.call(owner, "PATCH", f"/api/v1/users/{ids['9-a_B']}", json={"username": "B c"})


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--annotators", "ann, jörg", f"user 'jörg': a name has {THE_RULE}"),
        ("--annotators", "ann,,ben smith,", "user 'ben smith': a name"),
        ("--workspace", "../audio", "workspace '../audio': a name"),
    ],
)
def test_an_odd_name_is_refused_at_the_start(
    argilla_environment: Path, tmp_path: Path, option: str, value: str, says: str
) -> None:
    refused = run_server("--home", str(tmp_path / "home"), option, value)
    assert refused.returncode == 1
    assert says in refused.stderr


@pytest.mark.parametrize("proxies", ["*", "127.0.0.1, 0.0.0.0/0", "proxy", "10.0.0.1:80"])
def test_a_proxy_is_named_by_its_address(argilla_environment: Path, tmp_path: Path, proxies: str) -> None:
    refused = run_server("--home", str(tmp_path / "home"), FORWARDED_ALLOW_IPS=proxies)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"error: FORWARDED_ALLOW_IPS: {proxies.split(', ')[-1]!r} is no address")


def test_telemetry_is_off_and_nothing_is_fetched(argilla_environment: Path, tmp_path: Path) -> None:
    probe = (
        "import pathlib, sys\n"
        "from server import configuration\n"
        "configuration.configure(pathlib.Path(sys.argv[1]), 'secret')\n"
        "from argilla_server.settings import settings as s\n"
        "from huggingface_hub import constants as hub\n"
        "print([s.enable_telemetry, hub.HF_HUB_OFFLINE, s.docs_enabled, s.cors_origins, s.search_engine])\n"
    )
    environ = os.environ | {"PYTHONPATH": str(Path(launch.__file__).parent), "TMPDIR": str(tmp_path)}
    command = [str(argilla_environment), "-P", "-c", probe, str(tmp_path)]
    found = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[False, True, False, [], 'embedded']"


def test_told_to_end_while_it_starts_it_ends(argilla_environment: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    command = [str(argilla_environment), "-P", "-m", "server", "--home", str(home)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path(launch.__file__).parent)})
    assert eventually((home / "credentials.json").exists)
    assert launch.running(home) is None
    assert launch.stop(home)
    assert process.wait(10) == 0


# ---- the environment, with a lock file of one tiny package -------------------------------------------------


def tiny_lock(folder: Path, *, digest: str | None = None) -> Path:
    """A requirements.lock that names one wheel made here."""
    wheel = folder / "tiny_thing-1.0-py3-none-any.whl"
    about = "tiny_thing-1.0.dist-info"
    files = {
        "tiny_thing.py": "",
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        lines = []
        for name, content in files.items():
            archive.writestr(name, content)
            known = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={known},{len(content)}")
        archive.writestr(f"{about}/RECORD", "\n".join([*lines, f"{about}/RECORD,,"]) + "\n")
    digest = digest or hashlib.sha256(wheel.read_bytes()).hexdigest()
    lock = folder / "requirements.lock"
    lock.write_text(f"tiny-thing @ file://{wheel} --hash=sha256:{digest}\n")
    return lock


def installer(lock: Path, target: Path, first_import: str) -> subprocess.Popen[str]:
    """Another process that installs."""
    program = (
        "import dataclasses, pathlib, sys\nfrom ui_annotation.environment import ARGILLA\n"
        "own = dataclasses.replace(ARGILLA, lock_file=pathlib.Path(sys.argv[1]), proof=sys.argv[2])\n"
        "own.install(lambda line: print(line, flush=True))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(lock), first_import],
        env=os.environ | {"ALIGN_ARGILLA_ENV": str(target)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_killed_install_is_not_taken_for_a_finished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, target = tiny_lock(tmp_path), tmp_path / "env"
    monkeypatch.setenv("ALIGN_ARGILLA_ENV", str(target))
    own = dataclasses.replace(ARGILLA, lock_file=lock)
    here = tmp_path / "reached"
    killed = installer(lock, target, f"import time; open({str(here)!r}, 'w'); time.sleep(60)")
    assert eventually(here.exists, 60)
    killed.kill()
    killed.wait()
    assert own.python.exists()
    assert not own.is_ready

    # What it left running still counts as an install; when that is gone, one of two others does the work.
    waiting = installer(lock, target, "import tiny_thing")
    assert waiting.stdout.readline().startswith("another install works on")  # type: ignore[union-attr]
    other = installer(lock, target, "import tiny_thing")
    os.killpg(killed.pid, signal.SIGKILL)
    said = [process.communicate(timeout=60)[0] for process in (waiting, other)]
    assert [waiting.returncode, other.returncode] == [0, 0]
    assert sum("is installed" in text for text in said) == 1
    assert own.is_ready
    assert own.install(pytest.fail) == target / "bin" / "python"

    lock.write_text(lock.read_text() + "# changed\n")
    assert not own.is_ready


def test_a_package_with_another_digest_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGN_ARGILLA_ENV", str(tmp_path / "env"))
    own = dataclasses.replace(ARGILLA, lock_file=tiny_lock(tmp_path, digest="0" * 64))
    with pytest.raises(InstallFailed, match="(?s)HASH.*align annotate install"):
        own.install(lambda line: None)
    assert not own.is_ready


def test_a_folder_with_something_else_in_it_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.setenv("ALIGN_ARGILLA_ENV", str(tmp_path))
    with pytest.raises(InstallFailed, match="ALIGN_ARGILLA_ENV"):
        ARGILLA.install(lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_lock_names_every_digest_and_no_place() -> None:
    lines = ARGILLA.lock_file.read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith((" ", "#"))]
    assert all("==" in line and line.endswith("\\") for line in packages)
    assert [line for line in lines if "://" in line or "--index" in line or "--find-links" in line] == []
    assert json.dumps(packages).count("argilla-server==2.8.0") == 1
