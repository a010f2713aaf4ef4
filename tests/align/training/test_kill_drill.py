"""Two of the kill drill's twenty: a process killed anywhere, and one killed while it writes a checkpoint."""

import random

import pytest

from tests.benchmarks import kill_drill

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def drill(tmp_path_factory):
    return kill_drill.Drill(tmp_path_factory.mktemp("drill"))


@pytest.mark.parametrize("kind", ["process", "save"])
def test_nothing_but_time_is_lost(drill, kind):
    result = drill.run(kind, random.Random(7))
    assert result["hamming"] == 0, result
    assert result["half_written_chosen"] == 0, result
    assert result["repeated_steps"] <= kill_drill.SAVE_STEPS, result
    assert result["weights_max_difference"] == 0.0, result
    if kind == "save":
        assert result["half_written_found"] == 1, result
