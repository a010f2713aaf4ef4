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
# Made by: align cluster render {recipe} --to slurm
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


@dataclass(frozen=True)
class Wanted:
    """What of a cluster a recipe needs. `stages` are those with `hardware`, `run` is on shared storage."""

    recipe: str
    run: str
    stages: tuple[str, ...]
    workers: int
    on_gpu: bool
    cpus_per_worker: int
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
    def name(self) -> str:
        """Of the job: letters, digits and dashes."""
        last = self.recipe.rstrip("/").rsplit("/", 1)[-1]
        return "align-" + re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:50]

    @property
    def command(self) -> str:
        """What runs the recipe on the cluster it is in, for a shell."""
        words = ["align", "run", self.recipe, "--out", self.run]
        for override in [*self.overrides, *(f"{stage}.hardware.address=auto" for stage in self.stages)]:
            words += ["--set", override]
        return shlex.join(words)


def slurm(wanted: Wanted, *, time: str, grace_s: int = 300) -> str:
    """An sbatch script; `time` as SLURM writes it."""
    gpus = f"#SBATCH --gpus-per-node={wanted.on_a_node}\n" if wanted.on_gpu else ""
    return _SLURM.format(
        recipe=shlex.quote(wanted.recipe),
        name=wanted.name,
        nodes=wanted.nodes,
        cpus=wanted.on_a_node * wanted.cpus_per_worker + 1,
        gpus=gpus,
        time=shlex.quote(time),
        grace_s=grace_s,
        command=wanted.command,
    )


def kuberay(wanted: Wanted, *, image: str, claim: str, mount: str, retries: int = 10) -> str:
    """A RayJob; `claim` is a volume that all pods share, mounted at `mount`."""
    cpus = wanted.on_a_node * wanted.cpus_per_worker
    limits = {"cpu": str(cpus + 1), **({"nvidia.com/gpu": str(wanted.on_a_node)} if wanted.on_gpu else {})}
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": wanted.name},
        "spec": {
            "entrypoint": wanted.command,
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
                        "replicas": wanted.nodes,
                        "minReplicas": wanted.nodes,
                        "maxReplicas": wanted.nodes,
                        "rayStartParams": {},
                        "template": _pod("worker", image, claim, mount, limits),
                    }
                ],
            },
        },
    }
    made_by = f"# Made by: align cluster render {shlex.quote(wanted.recipe)} --to kuberay\n"
    return made_by + yaml.safe_dump(job, sort_keys=False, width=200)


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
