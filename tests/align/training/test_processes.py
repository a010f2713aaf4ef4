"""What ranks agree on, in real processes; the one that does not come is named."""

import subprocess
import sys
import textwrap

import pytest

from tests.compiler import need_compiler

pytestmark = pytest.mark.alone
PROGRAM = """
import sys, time
from datetime import timedelta
from torch import distributed
from align.training import processes
rank = int(sys.argv[1])
store = distributed.FileStore(sys.argv[2], 3)
distributed.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timedelta(seconds=40))
processes.set_timeout(4)
"""


def run(tmp_path, body):
    """Three processes run `body`; their outputs."""
    program = PROGRAM + textwrap.dedent(body)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(3)
    ]
    return [process.communicate(timeout=90)[0] for process in started]


@pytest.mark.timeout(120)
def test_they_agree(tmp_path):
    outputs = run(
        tmp_path,
        """
        told = processes.broadcast({"from": rank}), processes.gather(rank * 10)
        print(*told, processes.any_rank(rank == 2), processes.any_rank(False), processes.is_first())
        processes.monitored_barrier("here")
        """,
    )
    assert [text.splitlines()[-1] for text in outputs] == [
        f"{{'from': 0}} [0, 10, 20] True False {rank == 0}" for rank in range(3)
    ]


@pytest.mark.timeout(120)
def test_a_rank_that_does_not_come_is_named(tmp_path):
    outputs = run(
        tmp_path,
        """
        processes.barrier()
        if rank == 1:
            time.sleep(8)
        else:
            started = time.monotonic()
            try:
                processes.monitored_barrier("before step 7")
            except RuntimeError as error:
                print(type(error).__name__, error, time.monotonic() - started < 7.5)
        """,
    )
    assert "MissingRanks before step 7" in outputs[0]
    assert "Ranks 1 failed to pass monitoredBarrier in 4000 ms" in outputs[0]
    assert outputs[0].strip().endswith("True")


def test_alone_everything_is_free():
    from align.training import processes

    processes.barrier()
    processes.monitored_barrier("anywhere")
    assert (processes.rank(), processes.world_size(), processes.is_first()) == (0, 1, True)
    assert (processes.broadcast(3), processes.gather(3), processes.any_rank(True)) == (3, [3], True)


@pytest.mark.timeout(400)
def test_a_build_that_was_killed_does_not_stop_later_ones():
    """torch's mark of a build in progress, left by a killed process, would be waited for for ever."""
    need_compiler()
    program = """
    import os
    from pathlib import Path
    from torch import distributed
    from torch.utils import cpp_extension
    from align.training import preparation
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mark = Path(cpp_extension._get_build_directory("deepspeed_shm_comm", verbose=False)) / "lock"
    mark.touch()
    preparation.prepare_process("zero2")
    print("ready", mark.exists(), flush=True)
    os._exit(0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=390,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "ready False", done.stderr[-2000:]
