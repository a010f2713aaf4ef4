import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.run_folder.artifacts import StageFolder, sha256_file

ALIGN = Path(sys.executable).with_name("align")
GOOD = {
    "1_corpus": "stage: corpus\ncorpus: folder\ndir: recordings\n",
    "2_sft": "stage: sft\ncorpus: 1_corpus\npolicy: owner/base\nsteps: 5\nbatch_size: 2\n"
    "learning_rate: 1e-3\n",
}


def align(*arguments, cwd, **environment):
    return subprocess.run(
        [str(ALIGN), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120", **environment},
    )


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "toy").mkdir()
    for name, text in GOOD.items():
        (tmp_path / "toy" / f"{name}.yaml").write_text(text)
    return tmp_path / "toy"


@pytest.mark.parametrize("verb", ["check", "run"])
def test_five_mistakes_in_two_files_are_all_told_at_once_and_fast(recipe, verb):
    (recipe / "1_corpus.yaml").write_text(
        "stage: corpus\ncorpus: folder\ndir: recordings\nchats_per_clip: two\nmax_durations: 3\n"
    )
    (recipe / "2_sft.yaml").write_text(
        "stage: sft\ncorpus: 1_corpu\npolicy: owner/base\nsteps: 5\nbatch_size: 2\n"
        "learning_rate: 1e-3\nreplay: 2\ntrl:\n  warmup_step: 3\n"
    )
    before = sorted(recipe.parent.rglob("*"))
    started = time.monotonic()
    done = align(verb, "toy", cwd=recipe.parent)
    assert time.monotonic() - started < 3
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "toy/1_corpus.yaml:4: chats_per_clip: expected a whole number, got 'two'",
        "toy/1_corpus.yaml:5: max_durations: unknown key (did you mean 'max_duration_s'?)",
        "toy/2_sft.yaml:2: corpus: there is no stage '1_corpu' (did you mean '1_corpus'?); "
        "earlier stages producing corpus: 1_corpus",
        "toy/2_sft.yaml:7: replay: should be less than 1, got 2",
        "toy/2_sft.yaml:9: trl.warmup_step: trl.SFTConfig has no such name (did you mean 'warmup_steps'?)",
        "5 mistakes; nothing was run",
    ]
    assert sorted(recipe.parent.rglob("*")) == before


def test_check_prints_the_plan_and_writes_nothing(recipe):
    before = sorted(recipe.parent.rglob("*"))
    done = align("check", "toy", "--set", "sft.steps=50", cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    assert "50 steps x 2 = 100 examples" in done.stdout
    assert "1_corpus, owner/base" in done.stdout
    assert done.stdout.endswith("2 stages, no mistakes. Next: align run toy --set sft.steps=50\n")
    assert sorted(recipe.parent.rglob("*")) == before


@pytest.mark.parametrize("verb", ["check", "run", "status", "compare", "export", "serve", "chat", "doctor"])
def test_help_shows_an_example(verb, tmp_path):
    done = align(verb, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert f"Example: align {verb}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere"], "nowhere: is not a folder"),
        (["run", "toy", "--only", "7_x"], "there is no stage '7_x'"),
        (["run", "toy", "--only", "2_sft", "--from", "2_sft"], "give --only or --from, not both"),
        (["run", "toy", "--only", ""], "'--only': is empty; name a stage"),
        (["run", "toy", "--from", " "], "'--from': is empty; name a stage"),
        (["annotate", "up", "--port", "99999"], "99999 is not a port"),
        (["annotate", "up", "--port", "-1"], "-1 is not a port"),
        (["annotate", "up", "--port", "http"], "http is not a port"),
        (["run", "toy", "--only", "2_sft"], "needs 1_corpus, which has not finished in runs/toy"),
        (["compare", "a", "b"], "a has no finished evaluation"),
        (["compare", "a", "--seeds"], "a is not a run folder"),
        (["check", "toy", "--gpu-gb", "nan"], "must be a number above 0"),
        (["verify", "toy"], "toy has no finished stages"),
        (["chat", "nowhere"], "nowhere: there is no such folder; name a run, a stage"),
        (["chat", "toy", "nowhere", "--annotator", " "], "--annotator is empty"),
        (["nonsense"], "No such command"),
    ],
)
def test_usage_errors_are_one_clean_message_and_write_nothing(recipe, arguments, message):
    before = sorted(recipe.parent.rglob("*"))
    done = align(*arguments, cwd=recipe.parent)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(recipe.parent.rglob("*")) == before


def test_a_manifest_that_names_no_files_is_not_whole(tmp_path):
    (tmp_path / "toy" / "1_corpus").mkdir(parents=True)
    (tmp_path / "toy" / "1_corpus" / "manifest.json").write_text('{"output_digest": "x"}')
    done = align("verify", "toy", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "does not say which files there were: restore it" in done.stderr


def test_verify_reads_every_file_and_names_each_difference(tmp_path):
    for name in ("1_corpus", "2_sft"):
        out = StageFolder(tmp_path / "run", name, "f")
        out.open()
        for file in ("a.txt", "b.txt", "c.txt"):
            (out.path / file).write_text("12345")
        out.commit({})
    whole = align("verify", "run", cwd=tmp_path)
    assert (whole.returncode, whole.stdout, whole.stderr) == (
        0,
        "1_corpus  3 files  whole\n2_sft  3 files  whole\n",
        "",
    )
    stage = tmp_path / "run" / "2_sft"
    (stage / "a.txt").write_text("54321")
    (stage / "b.txt").unlink()
    (stage / "c.txt").write_text("")
    for folder, n_whole in (("run", 1), ("run/2_sft", 0)):
        harmed = align("verify", folder, cwd=tmp_path)
        assert harmed.returncode == 1
        assert harmed.stdout.count("whole") == n_whole
        assert harmed.stderr.splitlines() == [
            "2_sft: a.txt has other contents than when it was written",
            "2_sft: b.txt is missing",
            "2_sft: c.txt has 0 bytes, not 5",
        ]
    text = (stage / "manifest.json").read_text()
    (stage / "manifest.json").write_text(text.replace(sha256_file(tmp_path / "run/1_corpus/a.txt"), "0" * 64))
    assert (
        "manifest.json has other hashes than when it was written"
        in align("verify", "run", cwd=tmp_path).stderr
    )


MOMENTS = (0.2, 0.4, 0.8, 1.6, 3.0)


def test_ctrl_c_at_any_moment_of_the_start_ends_with_75_and_no_traceback(recipe):
    """Sooner, while Python itself starts, the signal ends it as it ends any program."""
    command = [sys.executable, "-m", "align", "run", "toy"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    (recipe / "1_corpus.yaml").write_text("stage: corpus\ncorpus: folder\ndir: no_such_recordings\n")
    for moment in MOMENTS:
        process = subprocess.Popen(
            command,
            cwd=recipe.parent,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=120)
        over = "nothing was run" in message  # its last words; then Python itself ends
        assert over or process.returncode == 75, (moment, message)
        assert "Traceback" not in message, moment


def test_the_command_runs_as_a_module_and_survives_a_reader_that_is_gone(recipe):
    command = f"{sys.executable} -m align check toy"
    shell = f"set -o pipefail; {command} | head -n 0; {command} >&-; {command} > /dev/full"
    done = subprocess.run(
        ["bash", "-c", shell], cwd=recipe.parent, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_next_command_keeps_options_and_quotes(recipe):
    done = align("status", "toy", "--set", "*.seed=1", "--out", "a b", cwd=recipe.parent)
    assert done.stdout.endswith("Next: align run toy --set '*.seed=1' --out 'a b'\n")


def test_what_cannot_be_read_as_a_stage_file_is_one_line(recipe):
    (recipe / "3_sample.yaml").symlink_to("nowhere.yaml")
    (recipe / "4_annotate.yaml").mkdir()
    (recipe / "5_pairs.yaml").symlink_to("5_pairs.yaml")
    (recipe / "6_dpo.yaml").write_text("[" * 20_000)
    done = align("check", "toy", cwd=recipe.parent)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "toy/3_sample.yaml: cannot be read: No such file or directory",
        "toy/4_annotate.yaml: cannot be read: Is a directory",
        "toy/5_pairs.yaml: cannot be read: Too many levels of symbolic links",
        "toy/6_dpo.yaml:1: not a stage file: its brackets are nested too deeply",
        "4 mistakes; nothing was run",
    ]


def test_status_before_anything_ran(recipe):
    done = align("status", "toy", cwd=recipe.parent)
    assert done.returncode == 0
    assert done.stdout == "1_corpus  pending\n2_sft     pending\n\nNext: align run toy\n"
    assert not (recipe.parent / "runs").exists()


def test_a_failing_stage_exits_1_with_the_next_command(recipe):
    (recipe / "1_corpus.yaml").write_text("stage: corpus\ncorpus: folder\ndir: recordings\n")
    (recipe.parent / "recordings").mkdir()  # empty
    done = align("run", "toy", cwd=recipe.parent, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "1_corpus: " in done.stderr
    assert "Next: align run toy" in done.stdout
    status = align("status", "toy", cwd=recipe.parent)
    assert "1_corpus  failed" in status.stdout


def test_doctor_finds_what_the_tests_stand_on(tmp_path):
    done = align("doctor", cwd=tmp_path)
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    found = {thing: status for status, thing, _ in lines}
    assert {found[name] for name in ("Python", "torch", "trl", "soundfile", "mlflow", "espeak-ng")} == {"ok"}
    assert found["browser"] in ("ok", "warn")
    assert done.returncode == (1 if "fail" in found.values() else 0)


def test_doctor_says_what_deepspeed_needs_to_compile(tmp_path, monkeypatch):
    from align.cli.doctor import examine

    def found():
        return next(finding for finding in examine(tmp_path) if finding.thing == "DeepSpeed")

    assert found().state.split(",")[0].count(".") == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found().status == "warn"
    assert "no g++ and no ninja" in found().state
    assert "apt-get install" in found().mend


HEAVY = {"torch", "transformers", "deepspeed", "ray", "mlflow"}


@pytest.mark.parametrize(
    ("arguments", "not_needed"),
    [
        (["--help"], HEAVY | {"numpy", "pydantic", "yaml", "rich"}),
        (["check", "toy"], HEAVY),
        (["status", "toy"], HEAVY),
        (["data", "list"], HEAVY),
    ],
    ids=["help", "check", "status", "data list"],
)
def test_a_verb_imports_what_it_needs(recipe, arguments, not_needed):
    """`--help` in 0.15 s of process time, `check` in 0.7 (2 cores, 21 November 2026)."""
    program = (
        "import sys, atexit; from align.cli.main import main; sys.argv[0] = 'align'; "
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr)); main()"
    )
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=recipe.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    loaded = set(done.stderr.split())
    assert "typer" in loaded
    assert not not_needed & loaded


def test_training_alone_on_a_cpu_prints_its_progress_only(tmp_path):
    """DeepSpeed, which accelerate imports whenever there is one, would tell on stdout that it sees no GPU."""
    program = (
        "from align.run_folder.progress import quieten; quieten(); "
        "import sys; from pathlib import Path; from tests.align.training import tiny_training as tiny; "
        "world = tiny.make_world(Path(sys.argv[1])); "
        "tiny.run_here(tiny.make_config('sft', steps=1), world, Path(sys.argv[1]) / 'run'); "
        "assert 'deepspeed' in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["stage"] * 4
