import json
import subprocess
import sys
import time

import pytest

from align.run_folder.artifacts import (
    DamagedFile,
    RunIsBusy,
    StageFolder,
    damage,
    exclusive,
    holder,
    read_manifest,
    read_metrics,
    sha256_json,
)


def test_a_folder_is_absent_until_it_is_whole(tmp_path):
    out = StageFolder(tmp_path, "2_sft", "f1")
    assert out.open() is False
    (out.path / "sub").mkdir()
    (out.path / "sub" / "a.txt").write_text("abc")
    assert not out.final.exists()
    out.commit({"kind": "sft"})
    assert read_manifest(out.final)["fingerprint"] == "f1"
    assert not out.path.exists()
    assert sorted(path.name for path in out.final.iterdir()) == ["manifest.json", "sub"]
    # sha256 of "abc", the example of FIPS 180-2
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    manifest = read_manifest(out.final)
    assert manifest["outputs"] == {"sub/a.txt": digest}
    assert manifest["output_digest"] == sha256_json({"sub/a.txt": digest})


def test_partial_work_is_kept_for_the_same_fingerprint_only(tmp_path):
    first = StageFolder(tmp_path, "2_sft", "f1")
    first.open()
    first.log(1, {"loss": 2.0})
    assert StageFolder(tmp_path, "2_sft", "f1").open() is True
    assert read_metrics(first.path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    other = StageFolder(tmp_path, "2_sft", "f2")
    assert other.open() is False
    assert read_metrics(first.path / "metrics.jsonl") == []
    assert other.stale == [tmp_path / ".stale-2_sft-1"]
    assert read_metrics(other.stale[0] / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_a_commit_keeps_an_outdated_folder_beside_the_new_one(tmp_path):
    for mark in ("f1", "f2", "f3"):
        out = StageFolder(tmp_path, "2_sft", mark)
        out.open()
        (out.path / f"{mark}.txt").write_text(mark)
        out.commit({})
    assert sorted(path.name for path in out.final.iterdir()) == ["f3.txt", "manifest.json"]
    names = [".stale-2_sft-1", ".stale-2_sft-2", "2_sft"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    kept = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in names[:2]]
    assert kept == [["f1.txt", "manifest.json"], ["f2.txt", "manifest.json"]]


def test_a_partial_folder_in_which_nothing_was_done_is_not_kept(tmp_path):
    StageFolder(tmp_path, "2_sft", "f1").open()
    other = StageFolder(tmp_path, "2_sft", "f2")
    other.open()
    assert other.stale == []
    assert [path.name for path in tmp_path.iterdir()] == [".partial-2_sft"]


def test_a_commit_killed_before_the_rename_is_taken_up_again(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from align.run_folder import artifacts
artifacts.commit_folder = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
out = artifacts.StageFolder(Path(sys.argv[1]), "2_sft", "f1")
out.open()
(out.path / "a.txt").write_text("abc")
out.commit({})
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -9
    out = StageFolder(tmp_path, "2_sft", "f1")
    assert not out.final.exists()
    assert out.open() is True
    out.commit({})
    assert list(read_manifest(out.final)["outputs"]) == ["a.txt"]


def test_what_workers_leave_is_no_output(tmp_path):
    """Interrupted on workers, then resumed in this process: `hardware` may change between the two."""
    out = StageFolder(tmp_path, "2_sft", "f1")
    out.open()
    (out.path / ".workers").mkdir()
    (out.path / ".workers" / "outcome.json").write_text("{}")
    (out.path / "a.txt").write_text("abc")
    assert out.open() is True
    out.commit({})
    assert list(read_manifest(out.final)["outputs"]) == ["a.txt"]
    assert sorted(path.name for path in out.final.iterdir()) == ["a.txt", "manifest.json"]


def test_rewind_forgets_what_a_resumed_training_repeats(tmp_path):
    out = StageFolder(tmp_path, "2_sft", "f1")
    out.open()
    for step in range(1, 6):
        out.log(step, {"loss": 1 / step})
    out.rewind(3)
    assert [row["step"] for row in read_metrics(out.path / "metrics.jsonl")] == [1, 2, 3]


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def test_a_row_after_a_torn_line_does_not_continue_it(tmp_path):
    out = StageFolder(tmp_path, "2_sft", "f1")
    out.open()
    out.log(1, {"loss": 1.0})
    with (out.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    again = StageFolder(tmp_path, "2_sft", "f1")
    assert again.open() is True
    again.log(2, {"loss": 0.5})
    assert read_metrics(out.path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    (out.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2{"step": 3}\n{"step": 4}\n')
    assert [row["step"] for row in read_metrics(out.path / "metrics.jsonl")] == [1, 4]


def test_missing_cut_and_changed_files_are_named(tmp_path):
    out = StageFolder(tmp_path, "2_sft", "f1")
    out.open()
    for name in ("gone", "cut", "changed", "whole"):
        (out.path / name).write_text("12345")
    out.commit({})
    (out.final / "gone").unlink()
    (out.final / "cut").write_text("")
    (out.final / "changed").write_text("54321")
    manifest = read_manifest(out.final)
    assert damage(out.final, manifest) == ["cut has 0 bytes, not 5", "gone is missing"]
    assert damage(out.final, manifest, by_hash=True) == [
        "changed has other contents than when it was written",
        "cut has 0 bytes, not 5",
        "gone is missing",
    ]


@pytest.mark.parametrize(
    ("text", "what"), [("", "is empty"), ('{"a": 1', "is not whole JSON"), ("{}", "is not a man")]
)
def test_a_damaged_manifest_is_named_with_what_to_do(tmp_path, text, what):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DamagedFile, match=f"{tmp_path}/manifest.json {what}.*restore it .*and.* run again"):
        read_manifest(tmp_path)


def test_an_unfinished_stage_has_no_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a finished stage"):
        read_manifest(tmp_path)


def test_the_lock_refuses_a_second_process_and_dies_with_the_first(tmp_path):
    code = (
        "import sys, time, pathlib; from align.run_folder.artifacts import exclusive\n"
        "with exclusive(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        assert holder(tmp_path) == str(other.pid)
        with pytest.raises(RunIsBusy, match=f"in use by process {other.pid}"), exclusive(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    with exclusive(tmp_path):
        pass
    assert holder(tmp_path) is None


def test_seconds_of_earlier_attempts_count(tmp_path):
    from align.execution.attempt import Attempt

    clock = tmp_path / ".seconds"
    clock.write_text("100.0")
    with Attempt(clock) as attempt:
        time.sleep(0.05)
    assert 100.05 <= attempt.seconds < 105
    assert attempt.error is None
    assert 10 < attempt.peak_memory_mb < 100_000
    with Attempt(clock) as failing:
        raise ValueError("no")
    assert failing.seconds > 100
    assert str(failing.error) == "no"
