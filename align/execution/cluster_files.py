"""Files that start a recipe on a cluster: an sbatch script for SLURM, a RayJob for KubeRay.

Both start Ray on the machines they get and then `align run` on the first one. Exit code 75 means that
training stopped in time and resumes: SLURM requeues the job, KubeRay starts it again.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import yaml

_SLURM = """\
#!/usr/bin/env bash
# Written by: align cluster render {recipe} --to slurm
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={cpus}
{gpus}#SBATCH --time={time}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}-%j.log
#SBATCH --signal=B:USR1@{grace_s}
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

# SLURM sends USR1 {grace_s} s before the time is up: training saves and ends with 75.
warned="" run=""
trap 'warned=yes; [ -z "$run" ] || kill -TERM "$run"' USR1 TERM

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{{print $1}}')
export RAY_ADDRESS="$ip:$((20000 + SLURM_JOB_ID % 20000))"
ray get-auth-token --generate >/dev/null # in the home directory, which all machines share

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \\
  ray start --head --node-ip-address="$ip" --port="${{RAY_ADDRESS##*:}}" --disable-usage-stats --block &
for _ in $(seq 60); do
  ray status >/dev/null 2>&1 && break
  sleep 2
done
others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
  srun --overlap --nodes="$others" --ntasks="$others" --exclude="$head" \\
    ray start --address="$RAY_ADDRESS" --disable-usage-stats --block &
fi

{command} &
run=$!
[ -z "$warned" ] || kill -TERM "$run"
alive=yes
while [ -n "$alive" ]; do
  kill -0 "$run" 2>/dev/null || alive="" # before the wait: only of a run that is gone it tells the code
  code=0
  wait "$run" || code=$? # a signal ends the wait, not the run
done
if [ "$code" -eq 75 ] || [ "$warned $code" = "yes 143" ]; then # 143: it had hardly begun
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


_CPUS_PER_GPU = 4
"""At least: decoding audio, offloaded optimizers and the stages between the trainings run on CPUs."""


@dataclass(frozen=True)
class ClusterJob:
    """What a recipe needs of a cluster. `stages` are those with `hardware`, `run` is on shared storage."""

    recipe: str
    run: str
    stages: tuple[str, ...]
    workers: int
    on_gpu: bool
    cpus_per_worker: int
    loaders: int = 0
    """Processes that load data for each worker."""
    workers_per_node: int = 8
    overrides: tuple[str, ...] = ()

    @property
    def nodes(self) -> int:
        """How many machines."""
        return math.ceil(self.workers / self.workers_per_node)

    @property
    def on_a_node(self) -> int:
        """Workers on one machine."""
        return min(self.workers, self.workers_per_node)

    @property
    def cpus_on_a_node(self) -> int:
        """CPUs of one machine: for its workers, what loads their data, and Ray itself."""
        a_worker = self.cpus_per_worker + self.loaders
        return self.on_a_node * (max(_CPUS_PER_GPU, a_worker) if self.on_gpu else a_worker) + 1

    @property
    def name(self) -> str:
        """Name of the job: letters, digits and dashes."""
        last = self.recipe.rstrip("/").rsplit("/", 1)[-1]
        return "align-" + re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:50]

    @property
    def command(self) -> str:
        """What runs the recipe on the cluster it is in, for a shell."""
        words = ["align", "run", self.recipe, "--out", self.run]
        for override in [*self.overrides, *(f"{stage}.hardware.address=auto" for stage in self.stages)]:
            words += ["--set", override]
        return shlex.join(words)


def slurm(job: ClusterJob, *, time: str, grace_s: int = 300) -> str:
    """An sbatch script; `time` as SLURM writes it."""
    gpus = f"#SBATCH --gpus-per-node={job.on_a_node}\n" if job.on_gpu else ""
    return _SLURM.format(
        recipe=shlex.quote(job.recipe),
        name=job.name,
        nodes=job.nodes,
        cpus=job.cpus_on_a_node,
        gpus=gpus,
        time=shlex.quote(time),
        grace_s=grace_s,
        command=job.command,
    )


def kuberay(job: ClusterJob, *, image: str, claim: str, mount: str, retries: int = 10) -> str:
    """A RayJob; `claim` is a volume that all pods share, mounted at `mount`."""
    limits = {
        "cpu": str(job.cpus_on_a_node),
        **({"nvidia.com/gpu": str(job.on_a_node)} if job.on_gpu else {}),
    }
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": job.name},
        "spec": {
            "entrypoint": job.command,
            "backoffLimit": retries,  # each takes up the newest checkpoint
            "shutdownAfterJobFinishes": True,
            "rayClusterSpec": {
                "rayVersion": metadata.version("ray"),
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "1", "num-gpus": "0"},
                    "template": _pod("head", image, claim, mount, {"cpu": "2", "memory": "16Gi"}),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": job.nodes,
                        "minReplicas": job.nodes,
                        "maxReplicas": job.nodes,
                        "rayStartParams": {},
                        "template": _pod("worker", image, claim, mount, limits),
                    }
                ],
            },
        },
    }
    header = f"# Written by: align cluster render {shlex.quote(job.recipe)} --to kuberay\n"
    return header + yaml.safe_dump(manifest, sort_keys=False, width=200)


def _pod(role: str, image: str, claim: str, mount: str, limits: dict[str, str]) -> dict[str, Any]:
    shared_memory = {"name": "shm", "emptyDir": {"medium": "Memory"}}  # NCCL talks through it
    return {
        "spec": {
            "containers": [
                {
                    "name": f"ray-{role}",
                    "image": image,
                    "resources": {"requests": dict(limits), "limits": dict(limits)},
                    "volumeMounts": [
                        {"name": "runs", "mountPath": mount},
                        {"name": "shm", "mountPath": "/dev/shm"},
                    ],
                }
            ],
            "terminationGracePeriodSeconds": 300,
            "volumes": [
                {"name": "runs", "persistentVolumeClaim": {"claimName": claim}},
                shared_memory,
            ],
        }
    }
