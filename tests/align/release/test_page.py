import base64
import io
import re

import numpy as np
import soundfile

from align.release import charts
from align.release.clips import BARS, audio_url, waveform
from align.release.page import bounds, difference, duration, memory, plain, reaches, value


def clip(path, rate_hz=16000):
    """Half a second of a tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.2 * np.sin(np.arange(rate_hz // 2) / 5), rate_hz)


def test_audio_stays_inside_the_corpus(tmp_path):
    clip(tmp_path / "corpus/audio/clip_0.wav")
    clip(tmp_path / "elsewhere/audio/clip_0.wav")
    assert audio_url(tmp_path / "corpus", "audio/clip_0.wav").startswith("data:audio/mpeg;base64,")
    assert audio_url(tmp_path / "corpus", "../elsewhere/audio/clip_0.wav") is None
    assert audio_url(tmp_path / "corpus", str(tmp_path / "elsewhere/audio/clip_0.wav")) is None
    assert audio_url(tmp_path / "corpus", "audio/none.wav") is None
    (tmp_path / "corpus/link.wav").symlink_to(tmp_path / "elsewhere/audio/clip_0.wav")
    assert audio_url(tmp_path / "corpus", "link.wav") is None
    (tmp_path / "corpus/notes.txt").write_text("not audio")
    assert audio_url(tmp_path / "corpus", "notes.txt") is None


def test_clips_of_any_rate_become_what_the_policy_hears(tmp_path):
    clip(tmp_path / "audio/clip_0.wav", rate_hz=96000)
    sound = base64.b64decode(audio_url(tmp_path, "audio/clip_0.wav").partition(",")[2])
    samples, rate_hz = soundfile.read(io.BytesIO(sound))
    assert rate_hz == 16000
    assert samples.shape == (8000,)


def test_a_waveform_is_as_high_as_its_part_is_loud():
    loud, quiet, silent = np.ones(1000), np.full(1000, -0.5), np.zeros(1000)
    bars = re.findall(r"M(\d+) ([\d.]+)v(\d+)", waveform(np.concatenate([loud, quiet, silent])))
    assert [int(x) for x, _, _ in bars] == list(range(BARS))
    third = BARS // 3
    assert [int(bars[at + 5][2]) for at in (0, third, 2 * third)] == [22, 11, 1]
    assert all(float(top) + int(height) / 2 == 12 for _, top, height in bars)
    assert len(re.findall("M", waveform(np.zeros(3)))) == BARS


def test_lengths_are_drawn_for_every_policy_and_not_without_answers():
    svg = charts.lengths({"before": [(n % 9, 5.0) for n in range(90)], "after": [(3, 8.0)]})
    assert ">before<" in svg
    assert ">after<" in svg
    assert charts.lengths({"before": [], "after": []}) == ""


def test_charts_leave_out_what_was_not_logged():
    rows = [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0, "dev/kl": 0.4}]
    svg = charts.curves(rows, charts.TRAINING_PANELS)
    assert ">Loss<" in svg
    assert ">Reward margin<" not in svg
    assert charts.curves(rows, charts.OVEROPTIMISATION_PANELS) == ""
    assert "#2c6e9b" not in svg  # colours are the page's variables
    assert "var(--after)" in svg


def test_numbers_are_written_one_way():
    assert value(0.6543, "factuality") == "65.4 %"
    assert value(6.9, "score") == "6.90"
    assert value(None, "score") == "–"
    assert difference(-0.031, "behaviour") == "−3.1"
    assert difference(0.5, "score") == "+0.50"
    assert [duration(8.44), duration(200), duration(7500)] == ["8.4 s", "3 min 20 s", "2 h 05 min"]
    assert [memory(812.2), memory(2048)] == ["812 MB", "2.00 GB"]
    # From -0.5 to 0.5: -0.5 is the left end, 0 the middle, 0.25 three quarters; 2 is cut off at the end.
    assert bounds(-0.5, 0.25, 2.0, -0.5, 0.5) == (0.0, 75.0, 100.0, 50.0)


def test_interval_graphics_of_a_table_share_one_axis():
    tables = [
        {"factuality": {"ci_low": 0.1, "ci_high": 0.3}, "score": {"ci_low": -2.5, "ci_high": 1.0}},
        {"behaviour": {"ci_low": -0.4, "ci_high": 0.1}},
    ]
    assert reaches(tables) == {"factuality": 0.4, "score": 2.5, "behaviour": 0.4}


def test_values_of_unknown_kind_are_short_text():
    assert [plain(12345.0), plain(0.81234), plain(None), plain(["a"])] == ["12,345", "0.8123", "–", '["a"]']


def test_a_stage_that_logs_no_loss_has_no_training_view_and_any_that_does_has_one():
    assert charts.training([{"step": 1, "dev/kl": 0.1}], {}) is None
    view = charts.training([{"step": 10, "loss": 2.0, "rewards/margins": 0.1}], {"chosen_step": 10})
    assert view["steps"] == 10
    assert ">Reward margin<" in view["curves"]
    assert ">Token accuracy<" not in view["curves"]
    assert view["quality"] == ""
