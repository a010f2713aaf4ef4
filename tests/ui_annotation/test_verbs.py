"""`align annotate`: the server's life as its keeper sees it, with a real process for the server."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from align.cli.main import main
from preference_data import store
from preference_data.schema import AudioClip, Completion, Prompt
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


STAGES = {
    "0_corpus": "{stage: corpus, corpus: manifest, manifest: q.csv}",
    "3_sample": "{stage: sample, policy: owner/name, corpus: 0_corpus}",
    "4_annotate": "{stage: annotate, completions: 3_sample, corpus: 0_corpus, by: people}",
}


@pytest.fixture
def sampled(tmp_path):
    """A recipe for people and its run, up to what they compare; of the clip there is the row alone."""
    recipe, run = tmp_path / "recipe", tmp_path / "run"
    recipe.mkdir()
    for name, text in STAGES.items():
        (recipe / f"{name}.yaml").write_text(text)
    prompt = Prompt(id="p", audios=("a.wav",), question="?", answer_gt="", meta_info="{}", task_name="t")
    texts = enumerate("ab")
    completions = [Completion(id=text, prompt_id="p", index=i, text=text, policy="x") for i, text in texts]
    store.write(run / "3_sample" / "prompts.jsonl", [prompt])
    store.write(run / "3_sample" / "completions.jsonl", completions)
    clip = AudioClip(id="a", path="a.wav", split="train", duration_s=1, sha256="0" * 64)
    store.write(run / "0_corpus" / "clips.jsonl", [clip])
    for name in ("0_corpus", "3_sample"):
        (run / name / "manifest.json").write_text(json.dumps({"output_digest": name}))
    return [str(recipe), "--out", str(run)]


@pytest.mark.parametrize("verb", ["status", "push", "pull", "adjudicate"])
def test_bad_data_is_named_and_no_traceback_shown(align, sampled, tmp_path, verb):
    (tmp_path / "judgements.jsonl").write_text("3\n")
    ended = align(
        verb, *sampled, "--set", f"4_annotate.snapshot={tmp_path}", "--set", "4_annotate.adjudicator=x"
    )
    assert ended.returncode == 1
    assert f"{tmp_path}/judgements.jsonl:1: Judgement" in ended.stderr
    assert not (tmp_path / "run" / "argilla").exists()


@pytest.mark.usefixtures("argilla_server")
def test_a_clip_that_is_gone_is_named(align, sampled, argilla_server, monkeypatch):
    monkeypatch.setenv("ALIGN_ARGILLA_API_KEY", argilla_server.api_key("owner"))
    ended = align("push", *sampled, "--set", f"4_annotate.server={argilla_server.url}")
    assert ended.returncode == 1
    assert "a.wav': missing" in ended.stderr
