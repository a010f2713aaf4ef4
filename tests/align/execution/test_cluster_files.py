"""Files for SLURM and KubeRay: equal to those kept here, valid, and doing what they say."""

import os
import stat
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from align.cli.main import app
from align.execution import cluster_files
from align.recipe.recipe import RecipeError

GOLDEN = Path(__file__).parent / "cluster_files"
DEMO = Path(__file__).parents[3] / "recipes" / "demo"
JOB = cluster_files.ClusterJob(
    recipe="recipes/qwen2_audio_7b",
    run="runs/7b one",
    stages=("2_sft", "6_dpo"),
    workers=12,
    on_gpu=True,
    cpus_per_worker=4,
    loaders=4,
    overrides=("2_sft.steps=5",),
)


def render(*args):
    return CliRunner().invoke(app, ["cluster", "render", str(DEMO), *args])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.sbatch", cluster_files.slurm(JOB, time="2-00:00:00")),
        ("train.yaml", cluster_files.kuberay(JOB, image="reg/align:1", claim="runs", mount="/runs")),
    ],
)
def test_the_files_are_those_kept_here(name, text):
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_the_sbatch_script_is_valid_bash_and_the_rayjob_valid_yaml(tmp_path):
    script = tmp_path / "train.sbatch"
    script.write_text(cluster_files.slurm(JOB, time="1:00:00"))
    subprocess.run(["bash", "-n", str(script)], check=True)
    job = yaml.safe_load(cluster_files.kuberay(JOB, image="i", claim="c", mount="/m"))
    assert job["kind"] == "RayJob"
    (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == 2
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "65", "nvidia.com/gpu": "8"}


def test_one_machine_asks_for_no_more_gpus_than_it_has_workers():
    one = cluster_files.ClusterJob("r", "runs/r", ("2_sft",), workers=2, on_gpu=True, cpus_per_worker=1)
    text = cluster_files.slurm(one, time="1:00:00")
    assert "--nodes=1\n" in text
    assert "--gpus-per-node=2\n" in text
    assert "--cpus-per-task=9\n" in text  # 4 for each GPU, and one for Ray
    on_cpu = cluster_files.ClusterJob("r", "runs/r", ("2_sft",), workers=2, on_gpu=False, cpus_per_worker=1)
    assert "gpu" not in cluster_files.slurm(on_cpu, time="1:00:00")


def test_a_hostile_recipe_name_stays_one_word(tmp_path):
    touched = tmp_path / "touched"
    evil = cluster_files.ClusterJob(
        f"recipes/x; touch {touched} #\n$(touch {touched})", "r", (), 1, on_gpu=False, cpus_per_worker=1
    )
    found = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {evil.command}"], capture_output=True, text=True, check=True
    )
    assert evil.recipe in found.stdout
    assert not touched.exists()


def test_the_verb_reads_hardware_from_the_recipe(tmp_path):
    out = tmp_path / "train.sbatch"
    done = render("--to", "slurm", "--set", "2_sft.hardware={workers: 16, device: gpu}", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "2 machines, 16 workers for 2_sft" in done.output
    assert "--set 2_sft.hardware.address=auto" in out.read_text()


def test_a_recipe_for_one_process_is_refused():
    refused = render("--to", "kuberay")
    assert isinstance(refused.exception, RecipeError)
    assert "no stage has hardware" in str(refused.exception)


def fake(folder, name, body):
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (3, False)])
def test_a_warned_job_saves_and_is_requeued(tmp_path, code, requeued):
    """The script under a SLURM of five shell lines: USR1 reaches the run as SIGTERM, 75 requeues."""
    commands = tmp_path / "bin"
    commands.mkdir()
    fake(commands, "scontrol", f'[ "$1" = requeue ] && touch {tmp_path}/requeued || echo node1')
    fake(commands, "srun", 'while [[ "$1" == --* ]]; do shift; done; "$@"')
    fake(commands, "hostname", "echo 127.0.0.1")
    fake(commands, "ray", "exit 0")
    fake(
        commands, "align", f"trap 'exit {code}' TERM; touch {tmp_path}/started; while :; do sleep 0.05; done"
    )
    script = tmp_path / "train.sbatch"
    script.write_text(cluster_files.slurm(JOB, time="1:00:00"))
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}
    env = {**os.environ, **job, "SLURM_JOB_NODELIST": "node1", "PATH": f"{commands}:{os.environ['PATH']}"}
    batch = subprocess.Popen(["bash", str(script)], env=env)
    while not (tmp_path / "started").exists():
        assert batch.poll() is None
    batch.send_signal(subprocess.signal.SIGUSR1)
    assert batch.wait(timeout=30) == code
    assert (tmp_path / "requeued").exists() == requeued
