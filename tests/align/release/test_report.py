import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile

from align.evaluation.benchmarks import hearing
from align.evaluation.benchmarks.rows import Utterance
from align.evaluation.statistics import paired_bootstrap
from align.release import report
from align.release.page import value

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'$x^$&{{ 7*7 }}"
CATEGORIES = ("speech", "sound", "music", "mixed")
WORDS = "one two three four five six seven eight nine zero".split()


class Page(HTMLParser):
    """The elements of a page with their attributes, its text, and the cells of its table rows."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.rows, self.in_cell = [], [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        self.text.append(data)
        if self.in_cell:
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
            "produces": {"sample": "completions", "annotate": "annotations"}.get(kind, kind),
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
                "fact_is_right": good,
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
        "fact_accuracy": float(np.mean([row["fact_is_right"] for row in answerable])),
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
        "by_kind": {"absent": {"behaviour": interval(before[::5], after[::5], "behaves")}},
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
    """Metrics as the stages log them: training first, then the checkpoints' dev scores."""
    rng = np.random.default_rng(1)
    rows, dev = [], []
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
            scored = {
                "dev/factuality": 0.6 + 0.5 * part - 0.35 * part**2,
                "dev/behaviour": 0.5 + 0.3 * part,
                "dev/over_abstention": 0.02 + 0.1 * part**3,
                "dev/kl": 9 * part**1.5,
                "dev/score": 6 + 3 * part - 2 * part**2,
            }
            dev.append({"step": step, **scored})
        rows.append(row)
    write_lines(run / stage / "metrics.jsonl", rows + dev)


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
        manifest(run, stage, kind, {"train_loss": 0.4, "chosen_step": 200.0}, seconds, **config)
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, made once; tests that change it take `run`."""
    folder = tmp_path_factory.mktemp("finished")
    whole_run(folder)
    return folder


@pytest.fixture(scope="module")
def html(finished):
    return report.write(finished).read_text(encoding="utf-8")


@pytest.fixture
def run(finished, tmp_path):
    """A copy to change; without curves, which take most of a report's time."""
    return Path(shutil.copytree(finished, tmp_path / "demo", ignore=shutil.ignore_patterns("metrics.jsonl")))


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


def test_a_whole_run_is_told_in_one_offline_file_with_the_numbers_of_scores_json(finished, html):
    scores = json.loads((finished / "7_evaluate/scores.json").read_text())
    page = Page(html)
    assert_self_contained(page)
    assert not re.search(r"https?://", html)
    assert page.named("script") == []

    rows = [row for row in page.rows if row and row[0].startswith("Factuality")]
    told = scores["comparison"]["factuality"]
    assert rows[0][1] == f"{100 * told['before']:.1f} %"
    assert rows[0][2] == f"{100 * told['after']:.1f} %"
    assert rows[0][3] == f"+{100 * told['delta']:.1f} pts"
    assert rows[0][4] == f"+{100 * told['ci_low']:.1f} to +{100 * told['ci_high']:.1f}"

    kind = next(row for row in page.rows if row and row[0] == "absent")
    assert kind[1:3] == ["24", "Behaviour"]
    assert kind[4] == value(scores["by_kind"]["absent"]["behaviour"]["after"], "behaviour")

    table = {row[0]: row for row in reversed(page.rows) if row}  # of equal names the first: not the costs
    after = scores["policies"]["6_dpo"]["overall"]
    policy = next(row for name, row in table.items() if name.startswith("6_dpoDPO"))
    levels = [value(after[key], key) for key in ("factuality", "behaviour", "score")]
    assert [text[: len(level)] for text, level in zip(policy[1:4], levels, strict=True)] == levels
    against = scores["against"]["6_chosen_only"]["factuality"]
    control = next(row for name, row in table.items() if name.startswith("Chosen-only training"))
    assert control[2:5] == [
        f"{100 * against['before']:.1f} %",
        f"{100 * against['after']:.1f} %",
        f"+{100 * against['delta']:.1f} pts",
    ]
    assert "share the ground truth" in html
    assert "declared rate of 50.0 % (measured: 49.7 %)" in html


def test_samples_cover_outcomes_and_categories_and_play(html):
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


def test_scores_that_the_judge_ties_are_unchanged_as_on_the_page_of_comparisons(run):
    scores = json.loads((run / "7_evaluate/scores.json").read_text())
    scores["judge"]["tie_margin"] = 9.0
    write_json(run / "7_evaluate/scores.json", scores)
    assert "Of all questions 0 improved, 0 regressed and 120 kept" in report.write(run).read_text()


def test_hostile_text_from_models_and_manifests_is_shown_and_never_markup(run):
    for name in ("3_sft", "6_dpo"):
        path = run / "7_evaluate" / "items" / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_lines(
            path, [row | {"response": HOSTILE, "question": HOSTILE, "answer_gt": HOSTILE} for row in rows]
        )
    manifest(run, "9_$<b>", HOSTILE, {HOSTILE: HOSTILE}, note=HOSTILE)
    scores = json.loads((run / "7_evaluate/scores.json").read_text())
    scores["by_category"] = {f"{HOSTILE}": scores["by_category"]["speech"]}
    write_json(run / "7_evaluate/scores.json", scores)
    html = report.write(run).read_text(encoding="utf-8")
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


def test_missing_parts_of_an_evaluation_leave_their_sections_out(run):
    scores = json.loads((run / "7_evaluate/scores.json").read_text())
    for key in ("by_category", "by_kind", "against", "constant_answer"):
        del scores[key]
    for policy in scores["policies"].values():
        del policy["shuffled_audio"], policy["recognition"]
    write_json(run / "7_evaluate/scores.json", scores)
    (run / "7_evaluate/items/6_dpo.jsonl").unlink()
    html = report.write(run).read_text(encoding="utf-8")
    assert "Controls" not in html
    assert "Recognition" not in html
    assert 'class="card"' not in html


def test_published_numbers_stand_beside_a_mixtures_recognition(run):
    scores = json.loads((run / "7_evaluate/scores.json").read_text())
    for policy in scores["policies"].values():
        policy["recognition"]["librispeech/librispeech_test_clean"] = {"exact": 0.5, "wer": 0.05, "n": 9}
    write_json(run / "7_evaluate/scores.json", scores)
    html = report.write(run).read_text(encoding="utf-8")
    assert "librispeech/librispeech_test_clean, published: qwen_audio WER 2.0 %" in html
    assert "read these rows as orientation" in html
    scores["split"] = "dev"
    write_json(run / "7_evaluate/scores.json", scores)
    assert "published" not in report.write(run).read_text(encoding="utf-8")


def test_multiple_choice_stands_beside_the_same_with_silence(run):
    scores = json.loads((run / "7_evaluate/scores.json").read_text())
    rows = [
        Utterance(
            f"{i}.wav", "?", "dog", "x", choices=("dog", "cat"), id=f"q{i}", categories=(("task", "<b>"),)
        )
        for i in range(8)
    ]
    said, silent = ["dog"] * 6 + ["cat"] * 2, ["dog", "cat"] * 4
    for policy in scores["policies"].values():
        policy["multiple_choice"] = {"mini": hearing.report("mmsu", rows, said, {"silence": silent})}
    scores["answered_without_clip"] = {"mini": ["q0", "q2", "q4"]}
    write_json(run / "7_evaluate/scores.json", scores)
    html = report.write(run).read_text(encoding="utf-8")
    assert "Multiple choice: mini" in html
    assert "Most policies answer 3 of 8 questions without the clip." in html
    assert html.count("<td>75.0 % ") == html.count("<td>+25.0 pts ") == 2  # of all, and of the one category
    assert "task: &lt;b&gt;" in html
    assert "Published: Qwen2-Audio-Instruct 53.3 %" in html


def test_questions_in_clips_and_refusals_stand_in_the_report(run):
    scores = json.loads((run / "7_evaluate/scores.json").read_text())
    rows = [Utterance(f"{i}.wav", "", "yes", "x", choices=("yes", "no"), id=f"q{i}") for i in range(4)]
    for policy in scores["policies"].values():
        policy["multiple_choice"] = {"bbh": hearing.report("voicebench", rows, ["Yes"] * 4, {})}
        policy["recognition"]["advbench"] = {"refused": 0.75, "n": 4}
    write_json(run / "7_evaluate/scores.json", scores)
    html = report.write(run).read_text(encoding="utf-8")
    assert "Published: Qwen2-Audio openbookqa 49.5 % mmsu 35.7 % bbh 54.7 %" in html
    assert "refused 75.0 %" in html


def test_no_run_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a run folder"):
        report.write(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("word", "title", "tone"),
    [("fail", "The gate refused", "bad"), ("inconclusive", "The gate is inconclusive", "open")],
)
def test_a_refusal_says_why(run, word, title, tone):
    checks = [{"name": "audio effect", "value": None, "threshold": 0.1, "outcome": word, "passed": False}]
    verdict = {"verdict": word, "reasons": ["audio effect: not measured"], "checks": checks}
    write_json(run / "8_gate/verdict.json", verdict)
    html = report.write(run).read_text(encoding="utf-8")
    assert f'<section class="banner {tone}">' in html
    assert f"<strong>{title}</strong>" in html
    assert "<li>audio effect: not measured</li>" in html
    assert ["audio effect", "–", "0.1", word] in Page(html).rows


def test_a_failed_stage_says_what_went_wrong(run):
    summary = json.loads((run / "summary.json").read_text())
    summary["stages"]["9_promote"] = {"status": "failed", "error": "9_promote: no <registry>"}
    write_json(run / "summary.json", summary)
    assert "9_promote: no &lt;registry&gt;" in report.write(run).read_text(encoding="utf-8")


def test_the_checkpoint_used_is_marked_on_the_dev_curves(html):
    # One legend entry in each of the three dev panels of 6_dpo; no other stage was scored on dev.
    assert html.count(">checkpoint used<") == 3
