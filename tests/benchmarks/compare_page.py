"""How long the compare page takes to build and to open, at AIR-Bench's size. For a person to run.

    python -m tests.benchmarks.compare_page [--questions 2200] [--keep FOLDER]

Makes a run folder with two policies, judged in both orders with rationales, then reads it, computes, writes
the page with clips packed and linked, and opens it in Chromium.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile

from align.release import compare_page
from align.release.comparison import PolicyComparison, compare

TASKS = {
    "speech_QA": "speech",
    "speech_dialogue_QA": "speech",
    "sound_QA": "sound",
    "sound_generation_QA": "sound",
    "music_QA": "music",
    "music_generation_analysis_QA": "music",
    "speech_and_sound_QA": "mixed",
    "speech_and_music_QA": "mixed",
}
WORDS = (
    "a the piano violin siren rain engine dog barks speaker says laughs slowly twice before after and".split()
)
JUDGE = {
    "name": "made judge (strict)",
    "model": "made",
    "protocol": "strict",
    "prompt_sha256": "ab" * 32,
    "shares_ground_truth": False,
    "tie_margin": 0.5,
}


def make_run(
    run: Path,
    n: int,
    *,
    policies: Sequence[str] = ("2_sft", "6_dpo"),
    clip_s: float = 10.0,
    suffix: str = "flac",
) -> Path:
    """A finished run of `n` questions, each policy half a point better than the one before.

    Every 50th answer of the last policy has no usable score. The last policy has curves and a gate's verdict.
    """
    rng = np.random.default_rng(0)
    tasks = list(TASKS)
    level = rng.normal(6, 1.5, n)
    for name in _clips(n, suffix):
        (run / "0_corpus" / name).parent.mkdir(parents=True, exist_ok=True)
    sounds = [_sound(rng, clip_s) for _ in range(min(n, 50))]
    for index, name in enumerate(_clips(n, suffix)):
        soundfile.write(run / "0_corpus" / name, sounds[index % len(sounds)], 16000)
    questions = [
        {
            "uniq_id": index,
            "task_name": tasks[index % 8],
            "category": TASKS[tasks[index % 8]],
            "audio": name,
            "question": f"{_sentence(rng, 14)}?",
            "answer_gt": _sentence(rng, 12),
        }
        for index, name in enumerate(_clips(n, suffix))
    ]
    (run / "7_evaluate/items").mkdir(parents=True)
    for place, policy in enumerate(policies):
        scores = np.clip(level + 0.5 * place + rng.normal(0, 1.5, (2, n)), 1, 10).round()
        rows = [
            question | _answer(rng, scores[:, index], place == len(policies) - 1 and index % 50 == 49)
            for index, question in enumerate(questions)
        ]
        path = run / f"7_evaluate/items/{policy}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        _stage(run, policy, policy.partition("_")[2], inputs={"0_corpus": "c0" * 32})
    _stage(run, "0_corpus", "corpus", digest="c0")
    _stage(run, "7_evaluate", "evaluate", digest="e7", config={"corpus": "0_corpus"})
    told = {"split": "test", "n": n, "judge": JUDGE, "before": policies[0], "after": policies[-1]}
    told |= {"policies": {policy: {} for policy in policies}}
    (run / "7_evaluate/scores.json").write_text(json.dumps(told))
    _stage(run, "8_gate", "gate", inputs={"7_evaluate": "e7" * 32})
    reasons = ["score: 95 % interval of the difference lies above +0.000"]
    verdict = {"verdict": "pass", "reasons": reasons, "checks": [], "candidate": policies[-1]}
    (run / "8_gate/verdict.json").write_text(json.dumps(verdict))
    curves = [{"step": step, "loss": 0.7 - step / 1000, "rewards/margins": step / 500} for step in range(100)]
    (run / policies[-1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curves))
    return run


def _clips(n: int, suffix: str) -> Iterator[str]:
    tasks = list(TASKS)
    return (f"test/Chat/{tasks[index % 8]}_made/{index:05d}.{suffix}" for index in range(n))


def _sound(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """A tone whose loudness wanders, with some noise."""
    time_s = np.arange(int(16000 * seconds)) / 16000
    loudness = np.interp(time_s, np.linspace(0, seconds, 30), rng.uniform(0, 0.4, 30))
    return loudness * np.sin(2 * np.pi * rng.uniform(200, 900) * time_s) + 0.01 * rng.normal(size=time_s.size)


def _sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words)).capitalize() + "."


def _answer(rng: np.random.Generator, scores: np.ndarray, fails: bool) -> dict[str, Any]:
    """A policy's answer and its rating, as rows of `items/`; `scores` are of the two orders."""
    orders = ("reference_first", "response_first")
    replies = [
        {
            "order": order,
            "reference": None if fails else 8.0,
            "response": None if fails else score,
            "state": "invalid" if fails else "scored",
            "text": _sentence(rng, 45),
            "finish_reason": "stop",
            "prompt_tokens": 400,
            "completion_tokens": 60,
        }
        for order, score in zip(orders, scores.tolist(), strict=True)
    ]
    rating = (
        {"state": "invalid", "score": None} if fails else {"state": "scored", "score": float(scores.mean())}
    )
    return {"response": _sentence(rng, int(rng.integers(8, 60))), **rating, "replies": replies}


def _stage(run: Path, name: str, kind: str, digest: str = "5a", **more: Any) -> None:
    (run / name).mkdir(parents=True, exist_ok=True)
    manifest = {
        "stage": name,
        "kind": kind,
        "produces": kind,
        "config": {},
        "inputs": {},
        "seed": 0,
        "git_commit": "0123456789ab",
    }
    manifest |= {"versions": {"torch": "2.13.0"}, "metrics": {}, "output_digest": digest * 32, **more}
    (run / name / "manifest.json").write_text(json.dumps(manifest))


def measure(run: Path) -> Iterator[tuple[str, str]]:
    """Compute, write and open: rows of the table."""
    policies = [run / "2_sft", run / "6_dpo"]
    found: list[PolicyComparison] = []
    yield "read and compute", f"{_seconds(lambda: found.append(compare(policies))):6.1f} s"
    yield "numbers as JSON", f"{len(json.dumps(compare_page.to_json(found[0]))) / 1e6:6.2f} MB"
    for audio in ("packed", "linked"):
        path = run / f"{audio}.html"
        took = _seconds(lambda: compare_page.write_html(found[0], path, audio))  # noqa: B023
        yield f"write the page, clips {audio}", f"{took:6.1f} s, {path.stat().st_size / 1e6:.2f} MB"
        yield from _opened(path)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    yield "peak memory of this process", f"{peak_mb:6.0f} MB"


def _opened(path: Path) -> Iterator[tuple[str, str]]:
    from tests.chromium import CHROMIUM, chromium

    if not CHROMIUM.exists():
        yield "  open", "no Chromium"
        return
    with chromium() as browser:
        page = browser.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        yield "  open in Chromium", f"{_seconds(lambda: page.goto(path.as_uri())):6.1f} s"
        yield "  filter to regressions", f"{_seconds(lambda: page.keyboard.press('1')):6.2f} s"
        yield (
            "  fifty questions on",
            f"{_seconds(lambda: [page.keyboard.press('j') for _ in range(50)]):6.2f} s",
        )
        page.keyboard.press(" ")
        page.wait_for_selector(".player.on button[aria-label=Pause]")
        yield "  console messages", f"{len(said):6d} {said[:3] if said else ''}"


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=2200)
    parser.add_argument("--keep", type=Path, help="an empty folder for run and pages; else a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = make_run((given.keep or Path(folder)) / "run", given.questions)
        print(
            f"{given.questions} questions x 2 policies; {platform.platform()}; Python "
            f"{platform.python_version()}; {psutil.cpu_count()} cores, load {psutil.getloadavg()[0]:.1f}\n"
        )
        for name, figure in measure(run):
            print(f"{name:<34}{figure}", flush=True)


if __name__ == "__main__":
    main()
