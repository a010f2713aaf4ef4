"""Some of the kill drill: processes killed anywhere, and one killed while it writes a checkpoint."""

import os
import random

import pytest

from tests.align.training import tiny_training
from tests.benchmarks import kill_drill

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def drill(programs, tmp_path_factory):
    class Drill(kill_drill.Drill):
        """Its trainings, all of one process, start without imports."""

        def _start(self, case, out):
            out.mkdir(parents=True, exist_ok=True)
            env = {**os.environ, "OMP_NUM_THREADS": "1", "SAVE_STEPS": str(kill_drill.SAVE_STEPS)}
            script, log = tiny_training.__file__, out / "log.txt"
            return programs.start(script, str(self.world), str(out), case, env=env, stdout=log, stderr=log)

    return Drill(tmp_path_factory.mktemp("drill"))


@pytest.mark.parametrize(
    ("kind", "seed"),
    [("process", 7), ("save", 7), *(pytest.param("grpo", seed, marks=pytest.mark.slow) for seed in range(2))],
)
def test_nothing_but_time_is_lost(drill, kind, seed):
    result = drill.run(kind, random.Random(seed))
    assert result["hamming"] == 0, result
    assert result["half_written_chosen"] == 0, result
    assert result["repeated_steps"] <= kill_drill.SAVE_STEPS, result
    assert result["weights_max_difference"] == 0.0, result
    if kind == "save":
        assert result["half_written_found"] == 1, result
