import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.cli.main import main
from align.execution.plan import OtherRecipe, OtherSettings, check_recipe, survey
from align.execution.runner import DamagedRun, execute
from align.recipe.config.training import SFTConfig
from align.recipe.recipe import RecipeError, load
from align.run_folder.artifacts import (
    DamagedFile,
    FullDisk,
    RunIsBusy,
    exclusive,
    read_manifest,
    read_metrics,
)

TOYS = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def toys(monkeypatch):
    """The toy stages in place of the real ones, and the function that writes their recipe."""
    monkeypatch.syspath_prepend(str(TOYS))
    import toy_stages

    for kind in ("corpus", "sft", "evaluate", "gate"):
        monkeypatch.setitem(sys.modules, f"align.stages.{kind}", toy_stages)
    return toy_stages


def gate(questions):
    return f"stage: gate\nevaluation: 7_evaluate\nthresholds: {{min_questions: {questions}}}\n"


def made_at(run):
    return {path.parent.name: path.stat().st_mtime_ns for path in run.glob("[!.]*/manifest.json")}


def test_a_whole_run(toys, tmp_path):
    recipe = load(toys.write_recipe(tmp_path / "toy", s8_gate=gate(1)))
    outcome = execute(recipe, tmp_path / "run")
    assert outcome.exit_code == 0
    assert outcome.report == tmp_path / "run" / "report.html"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary == outcome.summary
    assert (summary["status"], summary["exit_code"], summary["verdict"]) == ("done", 0, "pass")
    assert summary["verdict_reasons"] == ["min_questions is 1"]
    assert summary["comparison"]["factuality"]["before"] == 0.75
    assert {entry["status"] for entry in summary["stages"].values()} == {"done"}
    manifest = read_manifest(tmp_path / "run" / "2_sft")
    assert manifest["metrics"] == {"loss": 1 / 6}
    assert manifest["inputs"] == {
        "1_corpus": read_manifest(tmp_path / "run" / "1_corpus")["output_digest"],
        "owner/base": "hub:owner/base",
    }
    assert manifest["peak_memory_mb"] > 10


def test_a_second_run_does_nothing_and_a_change_reruns_what_depends_on_it(toys, tmp_path, capsys):
    folder, run = toys.write_recipe(tmp_path / "toy", s8_gate=gate(1)), tmp_path / "run"
    execute(load(folder), run)
    first, report = made_at(run), (run / "report.html").stat().st_mtime_ns
    capsys.readouterr()
    assert execute(load(folder), run).exit_code == 0
    assert capsys.readouterr().out.count("up to date") == 4
    assert made_at(run) == first
    assert (run / "report.html").stat().st_mtime_ns == report

    # The gate's threshold concerns the gate alone.
    looser = load(folder, ["8_gate.thresholds.max_fact_accuracy_loss=0.5"])
    assert execute(looser, run, replace=True).exit_code == 0
    second = made_at(run)
    assert {name for name in second if second[name] != first[name]} == {"8_gate"}

    # The corpus changes, so everything made of it does.
    assert execute(load(folder, ["1_corpus.chats_per_clip=9"]), run, replace=True).exit_code == 0
    third = made_at(run)
    assert {name for name in third if third[name] == second[name]} == set()


def statuses(recipe, run):
    return {standing.step.name: standing.state for standing in survey(recipe, run)}


HARMLESS = [
    "2_sft.save_steps=7",
    "2_sft.hardware={workers: 1}",
    "2_sft.trl.logging_steps=5",
    "2_sft.trl.dataloader_num_workers=2",
    "2_sft.max_bad_fraction=0.5",
    "7_evaluate.batch_size=3",
    "7_evaluate.workers=2",
    "1_corpus.chats_per_clip=2",  # the default
]


def test_keys_without_effect_and_versions_outdate_nothing(toys, tmp_path, monkeypatch, capsys):
    folder, run = toys.write_recipe(tmp_path / "toy", s8_gate=gate(1)), tmp_path / "run"
    execute(load(folder), run)
    first = made_at(run)
    capsys.readouterr()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
    assert set(statuses(load(folder, HARMLESS), run).values()) == {"done"}
    assert execute(load(folder, HARMLESS), run).exit_code == 0
    assert capsys.readouterr().out.count("up to date") == 4
    assert made_at(run) == first
    monkeypatch.setattr(SFTConfig, "epoch", 2)
    assert statuses(load(folder), run)["2_sft"] == "outdated"


def test_unfinished_work_that_does_not_fit_is_kept_and_named(toys, tmp_path, monkeypatch, capsys):
    folder, run = toys.write_recipe(tmp_path / "toy", s8_gate=gate(1)), tmp_path / "run"
    monkeypatch.setattr(toys, "save_file", lambda *_: (_ for _ in ()).throw(RuntimeError("killed here")))
    assert execute(load(folder), run).exit_code == 1
    monkeypatch.undo()
    for kind in ("corpus", "sft", "evaluate", "gate"):
        monkeypatch.setitem(sys.modules, f"align.stages.{kind}", toys)
    assert statuses(load(folder, HARMLESS), run)["2_sft"] == "partial"
    changed = load(folder, ["2_sft.learning_rate=1"])
    current = next(s for s in survey(changed, run) if s.step.name == "2_sft")
    assert (current.state, current.misfit) == ("pending", run / ".partial-2_sft")
    capsys.readouterr()
    assert execute(changed, run).exit_code == 0
    kept = run / ".stale-2_sft-1"
    assert f"2_sft  unfinished work of other settings or inputs is kept in {kept}" in capsys.readouterr().out
    assert len(read_metrics(kept / "metrics.jsonl")) == 6
    # Finished work of other settings is kept as well
    assert execute(load(folder), run, replace=True).exit_code == 0
    assert read_manifest(run / ".stale-2_sft-2")["config"]["learning_rate"] == 1
    assert "finished work of other settings or inputs is kept in" in capsys.readouterr().out


def test_a_run_folder_of_another_recipe_is_refused(toys, tmp_path):
    a, b = (load(toys.write_recipe(tmp_path / name / "toy", s8_gate=gate(1))) for name in ("a", "b"))
    run = tmp_path / "run"
    execute(a, run)
    first = made_at(run)
    with pytest.raises(OtherRecipe, match=f"{run} holds a run of the recipe {a.folder}, not of {b.folder}"):
        execute(b, run)
    assert made_at(run) == first
    assert execute(b, run, replace=True).exit_code == 0
    assert made_at(run) == first  # it asks for the same
    with pytest.raises(OtherRecipe):
        execute(a, run)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("2_sft.learning_rate=0.5", "2_sft: learning_rate was 0.001, is 0.5"),
        ("1_corpus.chats_per_clip=9", "1_corpus: chats_per_clip was 2, is 9"),
        ("8_gate.thresholds.min_questions=2", "8_gate: thresholds.min_questions was 1, is 2"),
        ("2_sft.trl.weight_decay=0.5", "2_sft: trl.weight_decay was None, is 0.5"),
        ("2_sft.policy=owner/other", "2_sft: policy was owner/base, is owner/other; owner/other has changed"),
    ],
)
def test_finished_work_of_other_settings_is_replaced_on_request_only(toys, tmp_path, change, difference):
    folder, run = toys.write_recipe(tmp_path / "toy", s8_gate=gate(1)), tmp_path / "run"
    execute(load(folder), run)
    first, files = made_at(run), sorted(run.rglob("*"))
    stage = change.partition(".")[0]
    for only in (None, stage):
        with pytest.raises(OtherSettings) as refused:
            execute(load(folder, [change]), run, only=only)
        assert str(refused.value).splitlines() == [
            f"{run} holds finished work of other settings or inputs:",
            f"  {difference}",
        ]
    assert (made_at(run), sorted(run.rglob("*"))) == (first, files)
    execute(load(folder, [change]), run, only=stage, replace=True)
    assert made_at(run)[stage] != first[stage]
    assert (run / f".stale-{stage}-1/manifest.json").stat().st_mtime_ns == first[stage]


def test_what_was_begun_in_the_place_of_finished_work_goes_on(toys, tmp_path, monkeypatch):
    folder, run = toys.write_recipe(tmp_path / "toy", s8_gate=gate(1)), tmp_path / "run"
    execute(load(folder), run)
    changed = load(folder, ["2_sft.learning_rate=0.5"])
    with monkeypatch.context() as patch:
        patch.setattr(toys, "save_file", lambda *_: (_ for _ in ()).throw(RuntimeError("killed here")))
        assert execute(changed, run, replace=True).exit_code == 1
    assert statuses(changed, run)["2_sft"] == "partial"
    assert statuses(load(folder), run)["2_sft"] == "done"
    assert execute(changed, run).exit_code == 0
    assert read_manifest(run / ".stale-2_sft-1")["config"]["learning_rate"] == 1e-3


def test_a_recipe_and_its_run_may_be_moved(toys, tmp_path):
    folder = toys.write_recipe(tmp_path / "here" / "toy", s8_gate=gate(1))
    execute(load(folder), tmp_path / "here" / "run")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    check_recipe(load(tmp_path / "there" / "toy"), tmp_path / "there" / "run")
    (tmp_path / "here").rename(tmp_path / "elsewhere")
    check_recipe(load(tmp_path / "there" / "toy"), tmp_path / "elsewhere" / "run")


@pytest.mark.parametrize("harm", ["missing", "empty", "manifest"])
def test_a_damaged_stage_is_named_before_anything_runs(toys, tmp_path, harm):
    folder, run = toys.write_recipe(tmp_path / "toy", s8_gate=gate(1)), tmp_path / "run"
    execute(load(folder), run)
    weights = run / "2_sft" / "model" / "model.safetensors"
    if harm == "missing":
        shutil.rmtree(weights.parent)
    elif harm == "empty":
        weights.write_bytes(b"")
    else:
        (run / "2_sft" / "manifest.json").write_text("")
    before = made_at(run)
    assert statuses(load(folder), run)["2_sft"] == "damaged"
    with pytest.raises(DamagedRun, match=r"2_sft.*(missing|has 0 bytes|is empty).*restore it from a copy"):
        execute(load(folder), run)
    with pytest.raises(DamagedRun):
        execute(load(folder), run, only="7_evaluate")
    assert made_at(run) == before
    (run / "2_sft").rename(tmp_path / "old")
    assert execute(load(folder), run).exit_code == 0


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 400 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_one_line_wherever_it_fills_and_the_run_goes_on(toys, small_disk, tmp_path):
    recipe = load(toys.write_recipe(tmp_path / "toy", s8_gate=gate(1)))
    assert execute(recipe, tmp_path / "roomy").exit_code == 0
    run, ballast = small_disk / "run", small_disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    lines = []
    while ballast.stat().st_size:
        try:
            outcome = execute(recipe, run)
        except FullDisk as error:
            lines.append(str(error))
        else:
            if outcome.exit_code == 0:
                break
            lines.append(outcome.error.partition(": ")[2])
        os.truncate(ballast, max(0, ballast.stat().st_size - 12288))
    assert len(lines) > 5
    for line in lines:
        assert line.startswith(f"no space left on the disk of {run} ({small_disk}): "), line
        assert "of 0.4 MB are free" in line
        assert "\n" not in line
    for name in recipe.steps:
        ours, theirs = (read_manifest(where / name.name)["outputs"] for where in (run, tmp_path / "roomy"))
        for changing in ("attempts.txt", "resumed_from.txt"):
            ours.pop(changing, None), theirs.pop(changing, None)
        assert ours == theirs


def test_a_rerun_with_equal_output_does_not_spread(toys, tmp_path):
    folder, run = toys.write_recipe(tmp_path / "toy", s8_gate=gate(1)), tmp_path / "run"
    execute(load(folder), run)
    first = made_at(run)
    # max_duration_s is no part of what the toy corpus writes.
    execute(load(folder, ["1_corpus.max_duration_s=9"]), run, replace=True)
    second = made_at(run)
    assert {name for name in second if second[name] != first[name]} == {"1_corpus"}


@pytest.mark.parametrize(
    ("questions", "code", "verdict", "status"),
    [(2, 3, "fail", "refused"), (3, 5, "inconclusive", "inconclusive")],
)
def test_a_closed_gate_stops_before_promotion_and_still_reports(
    toys, tmp_path, questions, code, verdict, status
):
    recipe = load(toys.write_recipe(tmp_path / "toy", s8_gate=gate(questions), s9_promote=toys.PROMOTE))
    for _ in range(2):  # the second time from finished stages
        outcome = execute(recipe, tmp_path / "run")
        assert (outcome.exit_code, outcome.summary["verdict"], outcome.summary["status"]) == (
            code,
            verdict,
            status,
        )
        assert outcome.summary["stages"]["9_promote"] == {"status": "pending"}
        assert outcome.report
        assert outcome.report.exists()
    assert execute(recipe, tmp_path / "run", only="promote").exit_code == code
    assert not (tmp_path / "run" / "9_promote").exists()


def test_a_failing_stage_is_told_and_the_rest_waits(toys, tmp_path, monkeypatch):
    sample = "stage: sample\npolicy: 2_sft\ncorpus: 1_corpus\n"
    recipe = load(toys.write_recipe(tmp_path / "toy", s3_sample=sample))
    monkeypatch.setitem(sys.modules, "align.stages.sample", None)
    outcome = execute(recipe, tmp_path / "run")
    assert outcome.exit_code == 1
    assert outcome.error == "3_sample: import of align.stages.sample halted; None in sys.modules"
    statuses = {name: entry["status"] for name, entry in outcome.summary["stages"].items()}
    assert statuses == {
        "1_corpus": "done",
        "2_sft": "done",
        "3_sample": "failed",
        "7_evaluate": "pending",
        "8_gate": "pending",
    }
    assert outcome.summary["status"] == "failed"
    assert "ModuleNotFoundError" in (tmp_path / "run" / "failure.txt").read_text()
    assert not (tmp_path / "run" / "3_sample").exists()


def test_only_and_from(toys, tmp_path, capsys):
    folder, run = toys.write_recipe(tmp_path / "toy", s8_gate=gate(1)), tmp_path / "run"
    with pytest.raises(RecipeError, match="needs 1_corpus, which has not finished"):
        execute(load(folder), run, only="2_sft")
    assert not run.exists()
    assert execute(load(folder), run, only="1_corpus").summary["status"] == "partial"
    assert sorted(made_at(run)) == ["1_corpus"]
    assert execute(load(folder), run, start_at="sft").exit_code == 0
    assert sorted(made_at(run)) == ["1_corpus", "2_sft", "7_evaluate", "8_gate"]
    capsys.readouterr()
    execute(load(folder, ["corpus.chats_per_clip=9"]), run, start_at="7_evaluate")
    assert "1_corpus  taken as it is, although the recipe" in capsys.readouterr().out


def test_a_busy_run_folder_is_left_alone(toys, tmp_path):
    recipe = load(toys.write_recipe(tmp_path / "toy"))
    with exclusive(tmp_path / "run"), pytest.raises(RunIsBusy):
        execute(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "1_corpus").exists()


SLOW = (
    "stage: sft\ncorpus: 1_corpus\npolicy: owner/base\nsteps: 40\nbatch_size: 2\nlearning_rate: 1e-3\n"
    "trl: {weight_decay: 0.05}\n"
)


def start(folder, run, log):
    """The toy pipeline without MLflow in a process of its own."""
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[3]); import toy_stages\n"
        "from align.execution.runner import execute\n"
        "from align.recipe.recipe import load\n"
        "toy_stages.replace_stages()\n"
        "sys.exit(execute(load(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2])).exit_code)"
    )
    arguments = [sys.executable, "-c", code, str(folder), str(run), str(TOYS)]
    return subprocess.Popen(arguments, stdout=log.open("a"), stderr=subprocess.STDOUT)


def wait_for_step(run, step, process):
    path = run / ".partial-2_sft" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if len(read_metrics(path)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.parametrize(
    ("number", "code", "status"),
    [
        (signal.SIGKILL, -9, "running"),
        (signal.SIGTERM, 75, "interrupted"),
        (signal.SIGINT, 75, "interrupted"),
        (signal.SIGHUP, 75, "interrupted"),
    ],
)
def test_a_killed_run_resumes_where_it_was(toys, tmp_path, number, code, status):
    folder, run, log = (
        toys.write_recipe(tmp_path / "toy", s2_sft=SLOW, s8_gate=gate(1)),
        tmp_path / "run",
        tmp_path / "log",
    )
    process = start(folder, run, log)
    wait_for_step(run, 8, process)
    os.kill(process.pid, number)
    assert process.wait(30) == code, log.read_text()
    assert json.loads((run / "summary.json").read_text())["stages"]["2_sft"]["status"] == status
    assert not (run / "2_sft").exists()
    assert (run / "1_corpus" / "manifest.json").exists()
    made_from = json.loads((run / ".partial-2_sft/.settings.json").read_text())
    again = start(folder, run, log)
    assert again.wait(60) == 0, log.read_text()
    assert int((run / "2_sft" / "resumed_from.txt").read_text()) >= 8
    rows = read_metrics(run / "2_sft" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 41))
    manifest = read_manifest(run / "2_sft")
    assert made_from == {key: manifest[key] for key in ("kind", "config", "inputs", "data")}
    assert not (run / "2_sft/.settings.json").exists()
    # 40 steps of 0.05 s over both attempts; kill -9 may come before the first has written how long it took
    assert read_manifest(run / "2_sft")["seconds"] >= (1.7 if code == 75 else 1.5)
    assert (run / "1_corpus" / "attempts.txt").read_text() == "x"


def test_a_run_whose_reader_goes_away_ends_as_if_nothing_had_happened(toys, tmp_path):
    toys.write_recipe(tmp_path / "toy", s2_sft=SLOW, s8_gate=gate(1))
    (tmp_path / "recordings").mkdir()  # which the toy corpus names and does not read
    command = [sys.executable, str(TOYS / "toy_stages.py"), "run", "toy"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for_step(tmp_path / "runs" / "toy", 3, process)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(120) == 0
    assert json.loads((tmp_path / "runs" / "toy" / "summary.json").read_text())["status"] == "done"


def test_a_stage_that_does_not_heed_a_stop_is_interrupted_at_once(tmp_path):
    code = """
import os, signal, threading, time
from align.execution.attempt import Attempt, handling_signals, interruptible
started = time.monotonic()
threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
with handling_signals(), Attempt() as attempt, interruptible():
    time.sleep(30)
print(type(attempt.error).__name__, time.monotonic() - started < 10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "Interrupted True\n"


HARM = {
    "empty": b"",
    "cut": b'{"output_digest": "x", "stages": {"1_cor',
    "list": b"[]",
    "number": b"3",
    "null": b"null",
    "fields": b'{"output_digest": 3, "outputs": [], "stages": [], "runs": [], "synced": 1, "folder": {}}',
    "NUL": bytes(300),
    "UTF-16": '{"output_digest": "x"}'.encode("utf-16"),
    "nested": b"[" * 100_000,
    "folder": None,
}


@pytest.mark.parametrize(
    ("name", "is_fatal"),
    [
        ("2_sft/manifest.json", True),
        ("8_gate/verdict.json", True),
        ("summary.json", False),
        ("recipe.json", False),
        (".partial-2_sft/.fingerprint", False),
        (".partial-2_sft/.seconds", False),
        (".partial-2_sft/metrics.jsonl", False),
    ],
)
def test_damaged_state_is_named_with_the_next_step(toys, tmp_path, monkeypatch, capsys, name, is_fatal):
    folder, run = toys.write_recipe(tmp_path / "toy", s8_gate=gate(1)), tmp_path / "runs" / "toy"
    execute(load(folder), run)
    if name.startswith(".partial"):
        mark = read_manifest(run / "2_sft")["fingerprint"]
        (run / "2_sft").rename(run / ".partial-2_sft")
        (run / ".partial-2_sft/manifest.json").unlink()
        (run / ".partial-2_sft/.fingerprint").write_text(mark)
    shutil.copytree(run, tmp_path / "whole")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["align", "status", "toy"])
    for harm, content in HARM.items():
        if not is_fatal and harm not in ("empty", "fields", "NUL", "nested"):
            continue
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "whole", run)
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir() if content is None else (run / name).write_bytes(content)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out = capsys.readouterr().out
        assert not end.value.code, harm
        assert ("damaged" in out) == is_fatal, (harm, out)
        if is_fatal:
            with pytest.raises(
                DamagedFile, match=rf"{run}/{name[:6]}.*: .*restore it from a copy.*elsewhere"
            ):
                execute(load(folder), run)
        else:
            assert execute(load(folder), run).exit_code == 0, harm
