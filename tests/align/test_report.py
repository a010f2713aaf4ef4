import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile

from align.release import charts, report
from align.release.page import audio_url, bounds, difference, duration, memory, value
from preference_data.statistics import paired_bootstrap

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'$x^$&{{ 7*7 }}"
CATEGORIES = ("speech", "sound", "music", "mixed")
WORDS = "one two three four five six seven eight nine zero".split()


class Page(HTMLParser):
    """The elements of a page with their attributes, its text, and the cells of its table rows."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.rows = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def manifest(run, stage, kind, metrics=None, seconds=12.5, **config):
    write_json(
        run / stage / "manifest.json",
        {
            "stage": stage,
            "kind": kind,
            "config": {"stage": kind, **config},
            "inputs": {"corpus": "ab" * 32},
            "seconds": seconds,
            "peak_memory_mb": 40 * seconds,
            "metrics": metrics or {},
            "git_commit": "0123456789ab",
            "versions": {"torch": "2.8.0"},
            "output_digest": "cd" * 32,
        },
    )


def answers(n, right, rng):
    """Items of a policy right with probability `right`; question and clip depend on the index alone."""
    rows = []
    for index in range(n):
        word, good, behaves = WORDS[index % 10], bool(rng.random() < right), bool(rng.random() < right)
        wrong = WORDS[(index + 3) % 10]
        rows.append(
            {
                "uniq_id": f"q{index:04d}",
                "task_name": "spoken_word",
                "category": CATEGORIES[index % 4],
                "audio": f"audio/clip_{index % 12}.wav",
                "question": "Which word is said, and who says it? Answer in one sentence.",
                "answer_gt": f'A woman says "{word}".',
                "meta_info": "{}",
                "response": f'A woman says "{word if good else wrong}"{"." if behaves else ""}',
                "factual": good,
                "behaves": behaves,
                "asked": good,
                "abstains": False,
                "answerable": index % 5 != 0,
                "score": 2.0 + 5 * good + 3 * behaves,
            }
        )
    return rows


def overall(rows):
    answerable = [row for row in rows if row["answerable"]]
    return {
        "factuality": float(np.mean([row["factual"] for row in rows])),
        "behaviour": float(np.mean([row["behaves"] for row in rows])),
        "score": float(np.mean([row["score"] for row in rows])),
        "asked": float(np.mean([row["asked"] for row in answerable])),
        "over_abstention": 0.01,
        "words": 5.1,
        "distinct": len({row["response"] for row in rows}),
        "n": len(rows),
    }


def interval(before, after, key):
    return paired_bootstrap([row[key] for row in before], [row[key] for row in after])._asdict()


def evaluate(run, n=120, stage="7_evaluate", corpus="1_corpus", rates=(0.5, 0.8, 0.65), seed=0):
    """An evaluate stage with three policies."""
    rng = np.random.default_rng(seed)
    names = ("3_sft", "6_dpo", "6_chosen_only")
    items = {name: answers(n, rate, rng) for name, rate in zip(names, rates, strict=True)}
    before, after, control = items.values()
    keys = {"factuality": "factual", "behaviour": "behaves", "score": "score"}
    compared = {metric: interval(before, after, key) for metric, key in keys.items()}
    scores = {
        "split": "test",
        "n": n,
        "judge": {"name": "facts", "shares_ground_truth": True},
        "before": "3_sft",
        "after": "6_dpo",
        "policies": {
            name: {
                "overall": overall(rows),
                "categories": {},
                "shuffled_audio": {"factuality": 0.18, "score": 3.1, "n": n},
                "recognition": {"caption/made": {"exact": 0.61, "wer": 0.21, "n": n}},
            }
            for name, rows in items.items()
        },
        "constant_answer": {
            "text": "There is no music.",
            "factuality": 0.2,
            "behaviour": 0.3,
            "score": 3.0,
            "n": n,
        },
        "comparison": compared,
        "by_category": {
            category: {
                metric: interval(
                    [row for row in before if row["category"] == category],
                    [row for row in after if row["category"] == category],
                    key,
                )
                for metric, key in keys.items()
            }
            for category in CATEGORIES
        },
        "against": {"6_chosen_only": {metric: interval(control, after, key) for metric, key in keys.items()}},
    }
    manifest(run, stage, "evaluate", seconds=95.0, corpus=corpus, split="test")
    write_json(run / stage / "scores.json", scores)
    for name, rows in items.items():
        write_lines(run / stage / "items" / f"{name}.jsonl", rows)
    return scores


def clips(corpus, n=12, rate_hz=16000):
    """Short tones, each its own pitch."""
    (corpus / "audio").mkdir(parents=True)
    t = np.arange(rate_hz // 2) / rate_hz
    for index in range(n):
        soundfile.write(
            corpus / f"audio/clip_{index}.wav", 0.2 * np.sin(2 * np.pi * (200 + 40 * index) * t), rate_hz
        )


def curves(run, stage, steps, preference=False):
    rng = np.random.default_rng(1)
    rows = []
    for step in range(10, steps + 1, 10):
        part = step / steps
        row = {
            "step": step,
            "loss": 3 * np.exp(-3 * part) + 0.3 + 0.1 * rng.random(),
            "learning_rate": 1e-3 * (1 - part),
            "grad_norm": 1 + rng.random(),
            "mean_token_accuracy": 0.95 * part**0.5,
        }
        if preference:
            row |= {
                "rewards/margins": 2 * part,
                "rewards/accuracies": 0.5 + 0.4 * part,
                "rewards/chosen": 0.3 * part,
                "rewards/rejected": -1.7 * part,
                "logps/chosen": -6 - 4 * part,
            }
        if preference and step % 50 == 0:
            row |= {
                "dev/factuality": 0.6 + 0.5 * part - 0.35 * part**2,
                "dev/behaviour": 0.5 + 0.3 * part,
                "dev/over_abstention": 0.02 + 0.1 * part**3,
                "dev/kl": 9 * part**1.5,
            }
        rows.append(row)
    write_lines(run / stage / "metrics.jsonl", rows)


def whole_run(run, n=120):
    """A finished run of every stage; returns its `scores.json`."""
    clips(run / "1_corpus")
    manifest(
        run,
        "1_corpus",
        "corpus",
        {
            "clips_train": 800,
            "clips_test": 200,
            "defect_rate_declared": 0.5,
            "defect_rate_actual": 0.497,
            "quarantined": 3,
        },
        seconds=31.0,
    )
    for stage, kind, steps, seconds, config in (
        ("2_pretrain", "pretrain", 600, 210.0, {}),
        ("3_sft", "sft", 300, 100.0, {}),
        ("6_dpo", "dpo", 300, 140.0, {"loss": "sigmoid"}),
        ("6_chosen_only", "dpo", 200, 90.0, {"loss": "sft"}),
    ):
        manifest(run, stage, kind, {"train_loss": 0.4}, seconds, **config)
        curves(run, stage, steps, preference=stage == "6_dpo")
    manifest(
        run,
        "4_annotate",
        "annotate",
        {"annotations": 4100, "comparisons": 3150, "alpha_factuality": 0.81, "alpha_behaviour": 0.78},
        seconds=3.0,
    )
    manifest(
        run, "5_pairs", "pairs", {"pairs_factuality": 1210, "pairs_behaviour": 988, "ties": 400}, seconds=0.4
    )
    scores = evaluate(run, n)
    manifest(run, "8_gate", "gate", seconds=0.1)
    checks = [
        {
            "name": "factuality gain, lower bound",
            "value": 0.21,
            "threshold": 0.0,
            "outcome": "pass",
            "reason": "",
            "passed": True,
        }
    ]
    reasons = ["factuality rose by 30.0 points"]
    write_json(run / "8_gate" / "verdict.json", {"verdict": "pass", "reasons": reasons, "checks": checks})
    stages = {path.parent.name: {"status": "done"} for path in run.glob("*/manifest.json")}
    write_json(
        run / "summary.json",
        {
            "recipe": "demo",
            "status": "done",
            "stages": stages,
            "verdict": "pass",
            "verdict_reasons": reasons,
            "git_commit": "0123456789ab",
            "seconds": 1234.0,
        },
    )
    return scores


def assert_self_contained(page):
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), (tag, name, attributes[name][:60])
    policy = next(meta["content"] for meta in page.named("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")
    for script in page.named("script"):
        assert f"'nonce-{script['nonce']}'" in policy


def test_a_whole_run_is_told_in_one_offline_file_with_the_numbers_of_scores_json(tmp_path):
    scores = whole_run(tmp_path)
    path = report.write(tmp_path)
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert path == tmp_path / "report.html"
    assert_self_contained(page)
    assert not re.search(r"https?://", html)
    assert page.named("script") == []

    rows = [row for row in page.rows if row and row[0].startswith("Factuality")]
    told = scores["comparison"]["factuality"]
    assert rows[0][1] == f"{100 * told['before']:.1f} %"
    assert rows[0][2] == f"{100 * told['after']:.1f} %"
    assert rows[0][3] == f"+{100 * told['delta']:.1f} pts"
    assert rows[0][4] == f"+{100 * told['ci_low']:.1f} to +{100 * told['ci_high']:.1f}"

    table = {row[0]: row for row in page.rows if row}
    after = scores["policies"]["6_dpo"]["overall"]
    assert table["6_dpo"][1:4] == [value(after[key], key) for key in ("factuality", "behaviour", "score")]
    against = scores["against"]["6_chosen_only"]["factuality"]
    control = next(row for name, row in table.items() if name.startswith("Chosen-only training"))
    assert control[2:5] == [
        f"{100 * against['before']:.1f} %",
        f"{100 * against['after']:.1f} %",
        f"+{100 * against['delta']:.1f} pts",
    ]
    assert "share the ground truth" in html
    assert "declared rate of 50.0 % (measured: 49.7 %)" in html


def test_samples_cover_outcomes_and_categories_and_play(tmp_path):
    whole_run(tmp_path)
    html = report.write(tmp_path).read_text(encoding="utf-8")
    cards = re.findall(
        r'<article class="card">\s*<header><span class="pill \w+">(\w+)</span><span>(\w+)', html
    )
    assert len(cards) == 12
    assert set(cards) == {
        (outcome, name) for outcome in ("improved", "regressed", "unchanged") for name in CATEGORIES
    }
    clips = Page(html).named("audio")
    assert len(clips) == 12
    assert all(clip["src"].startswith("data:audio/mpeg;base64,") for clip in clips)
    assert report.write(tmp_path).read_text(encoding="utf-8").count("q0") == html.count("q0")


def test_hostile_text_from_models_and_manifests_is_shown_and_never_markup(tmp_path):
    whole_run(tmp_path, n=12)
    for name in ("3_sft", "6_dpo"):
        path = tmp_path / "7_evaluate" / "items" / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_lines(
            path, [row | {"response": HOSTILE, "question": HOSTILE, "answer_gt": HOSTILE} for row in rows]
        )
    manifest(tmp_path, "9_$<b>", HOSTILE, {HOSTILE: HOSTILE}, note=HOSTILE)
    scores = json.loads((tmp_path / "7_evaluate/scores.json").read_text())
    scores["by_category"] = {f"{HOSTILE}": scores["by_category"]["speech"]}
    write_json(tmp_path / "7_evaluate/scores.json", scores)
    html = report.write(tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    assert_self_contained(page)
    assert page.named("script") == page.named("img") == page.named("b") == []
    assert "<script>alert(1)</script>" in "".join(page.text)
    assert "{{ 7*7 }}" in "".join(page.text)


@pytest.mark.parametrize(
    "summary", [None, {"recipe": "demo", "status": "failed", "stages": {"2_sft": {"status": "failed"}}}]
)
def test_a_run_that_has_hardly_begun_still_gets_a_report(tmp_path, summary):
    if summary:
        write_json(tmp_path / "summary.json", summary)
    html = report.write(tmp_path).read_text(encoding="utf-8")
    assert "No evaluation has finished" in html
    assert "The gate has not decided" in html
    assert ("2_sft" in html) == bool(summary)


def test_curves_of_a_stage_that_was_killed_are_shown(tmp_path):
    curves(tmp_path, ".partial-2_sft", 100)
    html = report.write(tmp_path).read_text(encoding="utf-8")
    assert "2_sft" in html
    assert "100 steps · not finished" in html


def test_missing_parts_of_an_evaluation_leave_their_sections_out(tmp_path):
    whole_run(tmp_path, n=12)
    scores = json.loads((tmp_path / "7_evaluate/scores.json").read_text())
    for key in ("by_category", "against", "constant_answer"):
        del scores[key]
    for policy in scores["policies"].values():
        del policy["shuffled_audio"], policy["recognition"]
    write_json(tmp_path / "7_evaluate/scores.json", scores)
    (tmp_path / "7_evaluate/items/6_dpo.jsonl").unlink()
    html = report.write(tmp_path).read_text(encoding="utf-8")
    assert "Controls" not in html
    assert "Recognition" not in html
    assert 'class="card"' not in html


def test_no_run_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a run folder"):
        report.write(tmp_path / "nowhere")


def test_audio_stays_inside_the_corpus(tmp_path):
    clips(tmp_path / "corpus", n=1)
    clips(tmp_path / "elsewhere", n=1)
    assert audio_url(tmp_path / "corpus", "audio/clip_0.wav").startswith("data:audio/mpeg;base64,")
    assert audio_url(tmp_path / "corpus", "../elsewhere/audio/clip_0.wav") is None
    assert audio_url(tmp_path / "corpus", str(tmp_path / "elsewhere/audio/clip_0.wav")) is None
    assert audio_url(tmp_path / "corpus", "audio/none.wav") is None


def test_a_rate_unknown_to_mp3_is_kept_as_flac(tmp_path):
    clips(tmp_path, n=1, rate_hz=96000)
    assert audio_url(tmp_path, "audio/clip_0.wav").startswith("data:audio/flac;base64,")


def test_charts_leave_out_what_was_not_logged():
    rows = [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0, "dev/kl": 0.4}]
    svg = charts.curves(rows, charts.PREFERENCE_PANELS)
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
    assert bounds(-0.5, 0.25, 2.0, 0.5) == (0.0, 75.0, 100.0, 50.0)
