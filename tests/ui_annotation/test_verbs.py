"""`align annotate`: the server's life as its keeper sees it, with a real process for the server."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from align.cli.main import main
from ui_annotation import launch

ALIGN = str(Path(sys.executable).with_name("align"))


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def align(monkeypatch, capsys):
    """The command in this process: starting Python anew takes longer than what it does."""

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["align", "annotate", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(ended.value.code or 0, *capsys.readouterr())

    return run


def up(home: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [ALIGN, "annotate", "up", "--home", str(home), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not launch.running(home):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


@pytest.mark.usefixtures("argilla_environment")
def test_up_status_users_and_down(align, tmp_path):
    home = tmp_path / "home"
    process = up(home)
    url = launch.running(home).url
    assert align("status", "--home", str(home)).stdout.startswith(f"{url}  process {process.pid}")
    added = align("users", "add", "ann", "--home", str(home))
    assert added.returncode == 0, added.stderr
    assert str(home / "credentials.json") in added.stdout
    secret = launch.credentials(home)["users"]["ann"]["password"]
    assert secret not in added.stdout + added.stderr
    listed = align("users", "list", "--home", str(home)).stdout
    assert re.search(r"^ann  annotator  audio$", listed, re.MULTILINE)
    assert align("down", "--home", str(home)).stdout == "Stopped.\n"
    told = process.communicate(timeout=20)[0]
    assert process.returncode == 0
    assert url in told
    assert secret not in told
    gone = align("status", "--home", str(home))
    assert (gone.returncode, gone.stdout) == (1, f"No server runs for {home}.\n")

    refused = align("users", "list", "--home", str(home))
    assert refused.returncode == 1
    assert f"align annotate up --home {home}" in refused.stderr
