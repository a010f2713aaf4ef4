"""The demo's stages, small, through the real command: whole, killed, refused, with two workers.

Two groups of tests share one finished run, each in a worker of its own: what the run leaves behind, and runs
that are killed or wait for people. Only the finished run starts the command itself; see `tests.forked`.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import pytest

from tests import forked
from tests.align.evaluation.openai_server import judge, serving

ROOT = Path(__file__).parents[2]
ALIGN = str(Path(sys.executable).with_name("align"))
SMALL = {
    "0_corpus.clips": "{train: 48, preference: 16, dev: 16, test: 16}",
    "1_pretrain.model": "{d_model: 32, heads: 2, audio_layers: 1, text_layers: 1, mel_bins: 32, clip_s: 3}",
    "1_pretrain.steps": 8,
    "1_pretrain.batch_size": 4,
    "1_pretrain.save_steps": 2,
    "1_pretrain.trl.logging_steps": 2,
    "2_sft.trl.logging_steps": 2,
    "6_dpo.trl.logging_steps": 2,
    "6_chosen_only.trl.logging_steps": 2,
    "2_sft.steps": 8,
    "2_sft.batch_size": 4,
    "2_sft.save_steps": 2,
    "3_sample.batch_size": 4,
    "3_sample.max_new_tokens": 12,
    "4_annotate.error_rate": 1.0,  # an untrained policy says nothing right: random choices still make pairs
    "5_pairs.min_alpha": "null",
    "6_dpo.epochs": 2,
    "6_dpo.batch_size": 4,
    "6_dpo.save_steps": 2,
    "6_dpo.choose": "{questions: 8, max_new_tokens: 8}",
    "6_chosen_only.batch_size": 4,
    "6_chosen_only.save_steps": 2,
    "6_chosen_only.choose": "{questions: 8, max_new_tokens: 8}",
    "7_evaluate.max_new_tokens": 8,
    "8_gate.thresholds.min_questions": 16,
}
OPEN_GATE = {
    "8_gate.thresholds.factuality_gain": -2,
    "8_gate.thresholds.behaviour_gain": -2,
    "8_gate.thresholds.max_over_abstention": 1,
    "8_gate.thresholds.max_fact_accuracy_loss": 1,
    "8_gate.thresholds.min_audio_effect": -1,
    "8_gate.thresholds.max_length_ratio": 100,
    "8_gate.thresholds.min_distinct_ratio": 0,
    "8_gate.thresholds.category_margins": "{}",
    "8_gate.thresholds.recognition_margins": "{}",
    "8_gate.thresholds.min_length_ratio": 0,
    "8_gate.thresholds.max_unfinished_rise": 1,
    "8_gate.thresholds.kind_margins": "{}",
    "8_gate.thresholds.max_under_abstention_rise": "null",
    "8_gate.thresholds.max_kind_length_ratio": "null",
    "8_gate.thresholds.min_entropy_ratio": 0,
    "8_gate.thresholds.max_foreign_rise": 1,
}
pytestmark = pytest.mark.timeout(900)


def command(out: Path, **changes) -> list[str]:
    settings = SMALL | OPEN_GATE | {k.replace("__", "."): v for k, v in changes.items()}
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["run", str(ROOT / "recipes/demo"), "--out", str(out), *sets]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_TRACKING")}
    return kept | {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


@pytest.fixture(scope="module")
def align(programs):
    """Run the command with these words."""
    return lambda *words: programs.run(forked.ALIGN, *words, env=environment())


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, worker_id) -> Path:
    """A finished run. Whoever comes first makes it for all; nobody changes it."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    out = shared / "loop" / "runs" / "whole"
    with (shared / "loop.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "loop" / "done").exists():
            result = subprocess.run(
                [ALIGN, *command(out)], env=environment(), capture_output=True, text=True, check=False
            )
            assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
            (shared / "loop" / "done").touch()
    return out


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    """A copy of the finished run, to be changed."""
    out = tmp_path / "runs" / "copy"
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("argilla", "snapshots"))
    return out


def test_every_stage_finishes_and_the_summary_says_so(whole):
    found = summary(whole)
    names = sorted(path.stem for path in (ROOT / "recipes/demo").glob("*.yaml"))
    assert sorted(found["stages"]) == names
    for name, stage in found["stages"].items():
        assert stage["status"] == "done", name
        assert stage["seconds"] > 0
        assert stage["metrics"], name
    assert found["verdict"] == "pass"
    for axis in ("factuality", "behaviour", "score"):
        one = found["comparison"][axis]
        assert one["n"] == 16
        assert one["delta"] == pytest.approx(one["after"] - one["before"])
        assert one["ci_low"] <= one["delta"] <= one["ci_high"]
    assert (whole / "report.html").stat().st_size > 10_000


def test_the_evaluation_set_is_in_air_bench_layout(whole):
    meta = json.loads((whole / "0_corpus/test/Chat/Chat_meta.json").read_text())
    assert len(meta) == 16
    for item in meta:
        clip = f"Chat/{item['task_name']}_{item['dataset_name']}/{item['path']}"
        assert (whole / "0_corpus/test" / clip).is_file()
    keys = {"meta_info", "question", "answer_gt", "path", "task_name", "dataset_name", "response", "uniq_id"}
    answers = (whole / "7_evaluate/answers/6_dpo.jsonl").read_text().splitlines()
    assert all(set(json.loads(line)) == keys for line in answers)


def test_mlflow_holds_the_run_its_stages_and_the_champion(whole):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{whole.parent / 'mlflow.db'}")
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(experiments)
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert len(children) == len(summary(whole)["stages"])
    assert len(runs) == len(children) + 1
    dpo = next(r for r in children if r.info.run_name == "6_dpo")
    assert [m.step for m in client.get_metric_history(dpo.info.run_id, "loss")]
    champion = client.get_model_version_by_alias("demo-qwen2-audio", "champion")
    assert champion.tags["gate.verdict"] == "pass"


def test_again_is_up_to_date_in_seconds(align, whole):
    out = whole.with_name("again")  # beside the other: MLflow knows its stages
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("argilla", "snapshots"))
    before = (out / "6_dpo/manifest.json").read_bytes()
    started = time.monotonic()
    result = align(*command(out))
    assert result.returncode == 0
    assert time.monotonic() - started < max(30, summary(whole)["seconds"] / 2)  # more on a busy machine
    assert result.stdout.count("up to date") >= 11
    assert (out / "6_dpo/manifest.json").read_bytes() == before


def wait_and_kill(programs, out: Path, sign: str) -> bool:
    """Start the run, kill -9 when `sign` appears below the run folder; False if it ended before."""
    process = programs.start(forked.ALIGN, *command(out), env=environment())
    try:
        while process.poll() is None:
            if list(out.glob(sign)):
                return True
            time.sleep(0.02)
        return False
    finally:
        if process.poll() is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # so young that it leads no group yet
                os.kill(process.pid, signal.SIGKILL)
        process.wait()


SIGNS = [
    ".partial-0_corpus/audio/train/*",
    ".partial-1_pretrain/checkpoints/checkpoint-4",
    ".partial-2_sft/checkpoints/.partial-checkpoint-*",
    ".partial-3_sample/batches/prompts/*.json",
    ".partial-4_annotate/comparisons.jsonl",
    "argilla/server.json",
    "snapshots/*/judgements.jsonl",
    ".partial-6_dpo/checkpoints/checkpoint-2/manifest.json",
    ".partial-6_dpo/dev/*.json",
    ".partial-7_evaluate/completions/*/answers/*.json",
]


def timeless(metrics: dict[str, float]) -> dict[str, float]:
    """What does not tell how long annotators took, or how fast training was."""
    timed = re.compile(r"seconds.*|.*_per_s")
    return {name: value for name, value in metrics.items() if not timed.fullmatch(name)}


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_with_identical_numbers(align, programs, whole, tmp_path):
    out = tmp_path / "runs" / "killed"
    hit = [wait_and_kill(programs, out, sign) for sign in SIGNS]
    assert sum(hit) >= 8, hit  # a stage may end before the kill
    result = align(*command(out))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    ours, theirs = summary(out)["stages"], summary(whole)["stages"]
    for name in theirs:
        if name != "9_promote":
            assert timeless(ours[name]["metrics"]) == timeless(theirs[name]["metrics"]), name
    manifests = [json.loads((root / "6_dpo/manifest.json").read_text()) for root in (out, whole)]
    weights = [m["outputs"]["model/model.safetensors"] for m in manifests]
    assert weights[0] == weights[1]


def test_a_closed_gate_exits_3_and_nothing_is_promoted(align, copied):
    stricter = command(copied, **{"8_gate__thresholds__min_questions": 500})
    assert align(*stricter).returncode == 2  # there is a finished gate of other settings
    result = align(*stricter, "--replace")
    assert result.returncode == 3
    found = summary(copied)
    assert found["verdict"] == "fail"
    assert "questions" in found["verdict_reasons"][0]
    assert found["stages"]["9_promote"]["status"] != "running"
    assert align(*command(copied), "--replace").returncode == 0


PEOPLE = {"4_annotate__by": "people", "5_pairs__min_alpha": 0.3}


@pytest.fixture(scope="module")
def only(align):
    """Run one step."""
    return lambda out, step, **changes: align(*command(out, **changes), "--only", step, "--replace")


@pytest.fixture
def with_people(only, copied):
    """A copy of the run whose annotate stage asks people; its server is up, nobody has answered."""
    from ui_annotation import launch

    yield copied, only(copied, "4_annotate", **PEOPLE)
    launch.stop(copied / "argilla")


def by_chance(seen, rng):
    return {axis: ["a", "b", "tie", "both_bad"][rng.integers(4)] for axis in ("factuality", "behaviour")}


def always_a(seen, rng):
    return {"factuality": "a", "behaviour": "a"}


def answer(out: Path, share: float = 1.0) -> int:
    """The annotators work through the API: not people, but their accounts. Neither of them listens."""
    from ui_annotation import client, launch, simulated

    home, answers = out / "argilla", 0
    url, users = launch.running(home).url, launch.credentials(home)["users"]
    for name, choice in {"annotator-1": always_a, "annotator-2": by_chance}.items():
        signed_in = [client.connect(url, users[name]["api_key"])]
        datasets = [name for name in client.datasets(signed_in[0], "audio") if name.startswith("4_annotate")]
        datasets = datasets[: round(share * len(datasets))]
        answers += simulated.annotate(signed_in, workspace="audio", datasets=datasets, judge=choice, seed=3)
    return answers


def test_people_are_waited_for_and_those_who_do_not_listen_are_named_and_refused(align, only, with_people):
    out, asked = with_people
    assert asked.returncode == 4, asked.stderr
    url = json.loads((out / "argilla" / "server.json").read_text())["url"]
    password = json.loads((out / "argilla" / "credentials.json").read_text())["users"]["annotator-1"][
        "password"
    ]
    assert url in asked.stdout
    assert str(out / "argilla" / "credentials.json") in asked.stdout
    assert password not in asked.stdout + asked.stderr + (out / "argilla" / "server.log").read_text()
    assert summary(out)["stages"]["4_annotate"]["status"] == "waiting"
    recipe = command(out, **PEOPLE)[1:]
    status = align("status", *recipe)
    assert re.search(r"4_annotate +waiting +for annotators: 0 of \d+ judgements", status.stdout), (
        status.stdout
    )
    assert answer(out, share=0.5) > 0
    pushed, pulled, again = (align("annotate", verb, *recipe) for verb in ("push", "pull", "pull"))
    assert re.search(r" 0 of \d+ records are new", pushed.stdout), pushed.stdout + pushed.stderr
    (snapshot,) = (out / "snapshots").glob("0001-*/")
    assert str(snapshot) in pulled.stdout
    assert snapshot.with_name(f"{snapshot.name}.html").exists()
    assert again.stdout == pulled.stdout
    waiting = only(out, "4_annotate", **PEOPLE)
    assert waiting.returncode == 4
    assert not re.search(r"annotators: 0 of", waiting.stdout)
    assert answer(out) > 0
    done = only(out, "4_annotate", **PEOPLE)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((out / "4_annotate/manifest.json").read_text())["metrics"]
    assert metrics["alpha_factuality"] < 0.3
    remarks = " ".join(json.loads((out / "4_annotate/quality.json").read_text())["remarks"])
    assert "annotator-1" in remarks
    assert "shown first" in remarks
    refused = only(out, "5_pairs", **PEOPLE)
    assert refused.returncode == 1
    assert "alpha" in refused.stderr
    assert "min_alpha" in refused.stderr


def test_a_server_that_is_not_there_is_a_clear_error_and_loses_nothing(only, copied):
    out = copied
    away = PEOPLE | {"4_annotate__server": "http://127.0.0.1:9"}
    os.environ["ALIGN_ARGILLA_API_KEY"] = "not-a-key"
    try:
        failed = only(out, "4_annotate", **away)
    finally:
        del os.environ["ALIGN_ARGILLA_API_KEY"]
    assert failed.returncode == 1
    assert "http://127.0.0.1:9" in failed.stderr
    assert "align annotate up" in failed.stderr
    assert "not-a-key" not in failed.stdout + failed.stderr
    assert (out / "4_annotate" / "judgements.jsonl").exists()


def test_a_judge_model_rates_and_its_ratings_reach_the_gate(only, copied):
    out = copied
    limits = {
        "factuality_gain": "null",
        "behaviour_gain": "null",
        "score_gain": -9,
        "max_over_abstention": "null",
    }
    limits |= {
        "max_fact_accuracy_loss": "null",
        "min_audio_effect": "null",
        "judge": "{max_missing_tasks: 8}",
    }
    with serving(judge(lambda text: 1 + text.count("e") % 9)) as served:
        asked = {"7_evaluate__judge": f"{{model: m, url: '{served.url}', canary_items: 4}}"}
        asked |= {f"8_gate__thresholds__{name}": value for name, value in limits.items()}
        evaluated = only(out, "7_evaluate", **asked)
        assert evaluated.returncode == 0, evaluated.stderr
        calls = len(served.requests)
        scores = json.loads((out / "7_evaluate/scores.json").read_text())
        rows = [json.loads(line) for line in (out / "7_evaluate/items/6_dpo.jsonl").read_text().splitlines()]
        shutil.rmtree(out / "7_evaluate")
        assert only(out, "7_evaluate", **asked).returncode == 0
        assert len(served.requests) == calls  # every reply was kept
    mean = scores["policies"]["6_dpo"]["ratings"]
    assert mean["n"] == mean["states"]["scored"] == 16
    categories = [value for value in mean["categories"].values() if value is not None]
    assert mean["overall"] == pytest.approx(sum(categories) / len(categories))
    assert all(row["score"] == 1 + row["response"].count("e") % 9 for row in rows)
    assert scores["judge"]["canary_uplift"] is not None
    one = scores["comparison"]["score"]
    assert one["delta"] == pytest.approx(one["after"] - one["before"])
    gate = only(out, "8_gate", **asked)
    verdict = json.loads((out / "8_gate/verdict.json").read_text())
    names = {check["name"]: check["outcome"] for check in verdict["checks"]}
    assert gate.returncode == {"pass": 0, "fail": 3, "inconclusive": 5}[verdict["verdict"]]
    assert "canary uplift" in names, names


def test_a_downloaded_benchmark_is_asked_and_its_broken_clips_are_counted(
    align, only, whole, copied, tmp_path
):
    out, bench = copied, tmp_path / "AIR-Bench"
    shutil.copytree(whole / "0_corpus/test", bench)
    broken = sorted((bench / "Chat").rglob("*.wav"))[0]
    broken.write_bytes(b"")
    long = sorted((bench / "Chat").rglob("*.wav"))[1]
    with wave.open(str(long), "rb") as file:
        params, frames = file.getparams(), file.readframes(file.getnframes())
    with wave.open(str(long), "wb") as file:  # four times as long: more than the three seconds that are heard
        file.setparams(params)
        file.writeframes(frames * 4)
    rows = [json.loads(line) for line in (whole / "0_corpus/test/recognition.jsonl").read_text().splitlines()]
    benchmark = bench / "ours.jsonl"
    benchmark.write_text(
        "".join(
            json.dumps(
                {**row, "audio": row["audio"].removeprefix("test/"), "prompt": "Say:", "source": "ours"}
            )
            + "\n"
            for row in rows
        )
    )
    asked = {
        "7_evaluate__air_bench": str(bench),
        "7_evaluate__benchmarks": {str(benchmark): "asr_en"},
        "8_gate__thresholds__min_questions": 8,
        "8_gate__thresholds__recognition_margins": {"ours": {"wer": 20.0}},
    }
    assert only(out, "7_evaluate", **asked).returncode == 0
    scores = json.loads((out / "7_evaluate/scores.json").read_text())
    assert [one["code"] for one in scores["unusable"]] == ["empty_file"] * len(scores["unusable"])
    assert 1 <= len(scores["unusable"]) == 16 - scores["n"]
    items = [json.loads(line) for line in (out / "7_evaluate/items/6_dpo.jsonl").read_text().splitlines()]
    assert scores["cut"] == [one["uniq_id"] for one in items if one["audio"].endswith(long.name)] != []
    assert scores["policies"]["6_dpo"]["recognition"]["ours"]["wer"] > 0
    assert {one["code"] for one in scores["unusable_rows"][str(benchmark)]} == {"empty_file"}
    gated = only(out, "8_gate", **asked)
    assert gated.returncode == 0, gated.stdout + gated.stderr
    verdict = json.loads((out / "8_gate/verdict.json").read_text())
    assert any(check["name"] == "ours wer" and "interval" in check["reason"] for check in verdict["checks"])
    assert any("0 of" in check["reason"] for check in verdict["checks"] if check["name"] == "contamination")
    page = tmp_path / "compare.html"
    compared = align("compare", str(out / "2_sft"), str(out / "6_dpo"), "--html", str(page))
    assert compared.returncode == 0, compared.stderr
    assert page.stat().st_size > 20_000


def test_ray_workers_make_the_same_completions(whole, tmp_path):
    from align.recipe.config.preference import SampleConfig
    from align.run_folder.artifacts import StageFolder
    from align.stages import sample

    made = []
    for workers in (1, 2):
        config = SampleConfig(
            stage="sample", policy="2_sft", corpus="0_corpus", workers=workers, batch_size=4, max_new_tokens=8
        )
        out = StageFolder(tmp_path / str(workers), "3_sample", "x")
        out.open()
        sample.run(config, {"2_sft": whole / "2_sft", "0_corpus": whole / "0_corpus"}, out)
        made.append((out.path / "completions.jsonl").read_text())
    assert made[0] == made[1]


@pytest.mark.parametrize("prompt_format", ["tags_paper", "tags_released"])
def test_the_tag_dialect_is_one_key(whole, tmp_path, prompt_format):
    from align.models.qwen2_audio.model import load_processor
    from align.recipe.config.training import ModelShape, PretrainConfig
    from align.run_folder.artifacts import StageFolder
    from align.stages import pretrain
    from preference_data.prompts.prompts import pretraining_prompt

    config = PretrainConfig(
        stage="pretrain",
        corpus="0_corpus",
        prompt_format=prompt_format,
        model=ModelShape(d_model=32, heads=2, audio_layers=1, text_layers=1, mel_bins=32, clip_s=3),
        steps=2,
        batch_size=4,
        learning_rate=1e-3,
        trl={"logging_steps": 1},
    )
    out = StageFolder(tmp_path, "1_pretrain", "x")
    out.open()
    assert pretrain.run(config, {"0_corpus": whole / "0_corpus"}, out)["loss"] > 0
    tokenizer = load_processor(out.path / "model").tokenizer
    asked = pretraining_prompt("caption", 0, prompt_format)
    assert len(tokenizer(asked, add_special_tokens=False)["input_ids"]) == 6
