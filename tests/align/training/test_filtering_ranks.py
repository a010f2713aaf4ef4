"""Two processes leave out of SFT what one does, each having listened to its share of the chats."""

import json

import pytest

from align.run_folder.artifacts import read_json, read_metrics
from tests.align.training import tiny_training
from tests.compiler import need_compiler, possible

pytestmark = [pytest.mark.timeout(600)]
CASES = ["sft-ddp-filtered", "sft-zero3-filtered"]
CHATS = 300
"""Of which 100 have a clip: two chunks, one for each process."""


@pytest.fixture(scope="module")
def root(programs, tmp_path_factory):
    """One run in this process, and each case on two."""
    root = tmp_path_factory.mktemp("filtered")
    world = tiny_training.make_world(root / "world", CHATS)
    (root / "alone").mkdir()
    tiny_training.run_here(tiny_training.make_config("sft-filtered", steps=2), world, root / "alone")
    programs.run_ranks(2, tiny_training.__file__, str(world), str(root), *possible(CASES), STEPS="2")
    return root


@pytest.mark.parametrize("case", CASES)
def test_every_rank_leaves_out_what_one_process_does(root, case):
    if "zero" in case:
        need_compiler()
    one, two = root / "alone" / ".partial-stage", root / case / ".partial-stage"
    names = ["000000.json", "000001.json"]
    for name in names:
        assert read_json(two / "audio_effect" / name, list) == read_json(one / "audio_effect" / name, list)
    assert sorted(path.name for path in (two / "audio_effect").iterdir()) == names
    assert (two / "left_out.jsonl").read_bytes() == (one / "left_out.jsonl").read_bytes()
    reasons = [json.loads(line)["reason"] for line in (one / "left_out.jsonl").read_text().splitlines()]
    assert 5 < reasons.count("needs_no_audio") < 95
    losses = [[row["loss"] for row in read_metrics(folder / "metrics.jsonl")] for folder in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(losses[0]) == 2
