import json
import time

from align.run_folder.artifacts import StageFolder
from align.run_folder.progress import PROGRESS, Progress


def test_the_file_of_a_loop_has_its_eta_and_is_written_once_a_second(tmp_path, capsys):
    def state():
        return json.loads((tmp_path / PROGRESS).read_text())

    with Progress("2_sft", 1000, tmp_path) as progress:
        progress.update(200)
        first = {"label": "2_sft", "done": 200, "total": 1000, "eta_s": None, "line": "2_sft  200/1000  20%"}
        assert state() == first
        time.sleep(0.5)
        progress.update(205, loss=0.25)
        assert state() == first
        time.sleep(0.6)
        progress.update(210)
        assert state()["done"] == 210
        progress.update(220, loss=0.5)
    # 20 of the 800 that this attempt had to do took 1.1 s
    last = state()
    assert (last["done"], last["total"]) == (220, 1000)
    assert 42 <= last["eta_s"] <= 80
    minutes, seconds = divmod(last["eta_s"], 60)
    assert last["line"] == f"2_sft  220/1000  22%  loss 0.5  ETA {minutes:02d}:{seconds:02d}"
    assert last["line"] in capsys.readouterr().out


def test_a_loop_without_an_end_or_at_its_end_has_no_eta(tmp_path):
    for total in (0, 3):
        with Progress("1_corpus clips", total, tmp_path) as progress:
            progress.update(1)
            progress.update(3)
        assert json.loads((tmp_path / PROGRESS).read_text())["eta_s"] is None


def test_the_file_is_no_part_of_what_a_stage_leaves(tmp_path):
    digests = []
    for name in ("1_quiet", "1_loud"):
        out = StageFolder(tmp_path, name, "f")
        out.open()
        (out.path / "result.txt").write_text("the same")
        if name == "1_loud":
            with Progress(name, 2, out.path) as progress:
                progress.update(1)
            assert (out.path / PROGRESS).exists()
        out.commit({})
        digests.append(json.loads((out.final / "manifest.json").read_text())["output_digest"])
        assert not (out.final / PROGRESS).exists()
    assert digests[0] == digests[1]


def test_a_folder_that_is_gone_or_full_does_not_end_the_loop(tmp_path, capsys):
    with Progress("2_sft", 2, tmp_path / "gone") as progress:
        progress.update(1)
    assert "2_sft  1/2  50%" in capsys.readouterr().out
