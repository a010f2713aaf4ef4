"""recipes/qwen2_audio_7b_grpo as it is, but for sizes: CPU processes, a tiny policy, published layouts.

Multiple-choice questions are imported from files laid out as AVQA, AudioMCQ and MMAU are, and LibriSpeech is
prepared from its own. The policy is warmed up to the form of the answers, right about every other time, and
two Ray workers train it under ZeRO-2; then the arm with transcripts, evaluation, gate and promotion.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from align.models.qwen2_audio import model as qwen2_audio
from align.run_folder.artifacts import read_json, read_metrics
from preference_data.interchange.questions import QUESTION_FORM
from tests import forked
from tests.align.evaluation.openai_server import judge, serving
from tests.compiler import need_compiler
from tests.recipes.test_full_size_twin import librispeech

ROOT = Path(__file__).parents[2]
RECIPE = "qwen2_audio_7b_grpo"
TWO = "{workers: 2, device: cpu, strategy: zero2}"
SMALL = {
    "3_grpo.steps": 40,
    "3_grpo.batch_size": 8,
    "3_grpo.learning_rate": 1e-3,
    "3_grpo.max_new_tokens": 16,
    "3_grpo.save_steps": 20,
    "3_grpo.hardware": TWO,
    "3_grpo.trl.logging_steps": 5,
    "2_grpo_wer.steps": 2,
    "2_grpo_wer.batch_size": 4,
    "2_grpo_wer.max_new_tokens": 8,
    "2_grpo_wer.save_steps": 1,
    "2_grpo_wer.hardware": TWO,
    "2_grpo_wer.trl.logging_steps": 1,
    "4_evaluate.max_new_tokens": 16,
    "4_evaluate.workers": 1,
    "5_gate.thresholds.min_questions": 8,
    "5_gate.thresholds.min_audio_effect_on_score": "null",  # the judge here says the same of everything
    "5_gate.thresholds.min_entropy_ratio": "null",  # a choice that is learned is certain
    "5_gate.thresholds.max_alike": 100,  # all are tones
    "5_gate.thresholds.recognition_gains": "{mmau-test-mini: {accuracy: -0.1}}",  # known before, nearly
    "5_gate.thresholds.recognition_margins": "{val_qa: {unparsed: 0.2}, librispeech_test_clean: {wer: 5.0}}",
}
WARM = {
    "0_corpus": "stage: corpus\ncorpus: mixture\nsources: [{folder: ready/warm}]\n",
    "2_sft": "stage: sft\ncorpus: 0_corpus\npolicy: models/random\nsteps: 150\nbatch_size: 16\n"
    "learning_rate: 3.0e-3\naugment: {gain: 0, time_mask: 0, frequency_mask: 0}\n",
}
TEXTS = ["system\nYou are a helpful assistant.\n", "user\nAudio 1: \nAudio 2: \n", "assistant\n"]
ANSWERS = ["high", "low"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def tone(path: Path, number: int) -> None:
    """High for even numbers, low for odd ones, all different."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hertz, time = 250 + 7 * number if number % 2 else 2500 + 29 * number, np.arange(9600) / 16000
    noise = 0.005 * np.random.default_rng(number).standard_normal(len(time))
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hertz * time) + noise, 16000)


def choices_of(number: int) -> list[str]:
    """In either order, whatever the answer."""
    return ANSWERS if number // 2 % 2 else ANSWERS[::-1]


def avqa(root: Path, name: str, numbers: range) -> None:
    """https://mn.cs.tsinghua.edu.cn/avqa as downloaded, the audio taken out of the videos."""
    rows = []
    for number in numbers:
        tone(root / f"v{number}_000030.wav", number)
        rows.append(
            {
                "id": number,
                "video_name": f"v{number}_000030",
                "video_id": number,
                "question_text": "What is heard in the video?",
                "multi_choice": choices_of(number),
                "answer": choices_of(number).index(ANSWERS[number % 2]),
                "question_relation": "Sound",
                "question_type": "Which",
            }
        )
    (root / name).write_text(json.dumps(rows))


def audiomcq(root: Path, numbers: range) -> None:
    rows = []
    for number in numbers:
        tone(root / f"audio/{number}.wav", number)
        own = {"id": f"Clotho_{number}", "source_dataset": "Clotho", "question_type": "sound"}
        asked = {"question": "How high is it?", "choices": choices_of(number), "answer": ANSWERS[number % 2]}
        rows.append({**own, "audio_path": f"audio/{number}.wav", **asked, "structured_cot": "I hear a tone."})
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def mmau(root: Path, numbers: range) -> None:
    rows = []
    for number in numbers:
        tone(root / f"test-mini-audios/{number}.wav", number)
        asked = {"question": "What is heard in the audio?", "choices": choices_of(number)}
        asked["answer"] = ANSWERS[number % 2]
        about = {"dataset": "own", "task": "sound", "split": "test-mini", "category": "Reasoning"}
        kind = {"sub-category": "Pitch", "difficulty": "easy"}
        rows.append(
            {"id": str(number), "audio_id": f"./test-mini-audios/{number}.wav", **asked, **about, **kind}
        )
    rows.append({**rows[0], "id": "other", "answer": "none of these"})
    (root / "mmau-test-mini.json").write_text(json.dumps(rows, indent=2))


def air_bench(root: Path, numbers: range) -> None:
    tasks = ("speech_QA", "speech_dialogue_QA", "sound_QA", "sound_generation_QA", "music_QA")
    tasks += ("music_generation_analysis_QA", "speech_and_sound_QA", "speech_and_music_QA")
    rows = []
    for number, task in zip(numbers, tasks, strict=True):
        tone(root / f"Chat/{task}_own/{number}.wav", number)
        asked = {"question": "What is heard?", "answer_gt": ANSWERS[number % 2], "meta_info": "A tone."}
        own = {"uniq_id": number, "path": f"{number}.wav", "task_name": task, "dataset_name": "own"}
        rows.append({**asked, **own})
    (root / "Chat/Chat_meta.json").write_text(json.dumps(rows))


def recognition(path: Path, numbers: range) -> None:
    rows = []
    for number in numbers:
        tone(path.parent / f"{number}.wav", number)
        own = {"audio": f"{number}.wav", "source": "librispeech_test_clean"}
        rows.append({**own, "prompt": "Recognize the speech:", "gt": "THE TONE IS HIGH"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def warm_up(root: Path, numbers: range) -> None:
    """Chats of the right form, three answers of four right; and an untrained policy."""
    rows = []
    for number in numbers:
        tone(root / f"warm/{number}.wav", number)
        said = ANSWERS[number % 2 if number % 4 < 3 else 1 - number % 2]
        for question in ("What is heard in the audio?", "How high is it?"):
            asked = QUESTION_FORM.format(question=question, choices=choices_of(number // 2))
            messages = [
                {"role": "user", "content": f"<audio>{asked}"},
                {"role": "assistant", "content": f"<answer>{said}</answer>"},
            ]
            rows.append({"messages": messages, "audios": [f"{number}.wav"]})
    (root / "warm/chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [message["content"] for row in rows[:40] for message in row["messages"]] + TEXTS * 20
    processor = qwen2_audio.build_processor(texts, vocab_size=420, mel_bins=32, hop_length=320, clip_s=1)
    model = qwen2_audio.build_model(processor, d_model=64, heads=2, audio_layers=1, text_layers=2, seed=0)
    qwen2_audio.save(model, processor, root / "models/random")


class Place:
    """A folder with the data, the policy and the recipe, and the command in it."""

    def __init__(self, programs, folder):
        self.programs, self.folder = programs, folder
        data = folder / "data"
        avqa(data / "avqa", "train_qa.json", range(20))
        avqa(data / "avqa", "val_qa.json", range(20, 40))
        audiomcq(data / "audiomcq", range(40, 60))
        mmau(data / "MMAU", range(60, 100))
        air_bench(data / "AIR-Bench", range(100, 108))
        recognition(data / "eval/librispeech_eval.jsonl", range(110, 114))
        warm_up(folder, range(120, 180))
        librispeech(data / "librispeech")
        shutil.copytree(ROOT / "recipes" / RECIPE, folder / RECIPE)

    def align(self, *arguments):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "OPENAI_API_KEY": "none",
        }
        done = self.programs.run(forked.ALIGN, *arguments, cwd=self.folder, env=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def run(self, only, **more):
        small = SMALL | {name.replace("__", "."): value for name, value in more.items()}
        changes = [word for name, value in small.items() for word in ("--set", f"{name}={value}")]
        self.align("run", RECIPE, "--only", only, *changes)
        return self.folder / "runs" / RECIPE / only


@pytest.fixture(scope="module")
def place(programs, tmp_path_factory):
    """The data imported and prepared, the policy warmed up, the corpus mixed."""
    need_compiler()
    place = Place(programs, tmp_path_factory.mktemp("grpo"))
    place.align("data", "import", "warm/chats.jsonl", "--format", "ms-swift", "--out", "ready/warm")
    (place.folder / "warm_up").mkdir()
    for name, text in WARM.items():
        (place.folder / "warm_up" / f"{name}.yaml").write_text(text)
    place.align("run", "warm_up")
    shutil.copytree(
        place.folder / "runs/warm_up/2_sft/model", place.folder / "models/Qwen2-Audio-7B-Instruct"
    )
    choice = ("--format", "choice", "--out")
    place.align("data", "import", "data/avqa/train_qa.json", *choice, "data/ready/avqa")
    ignored = ("--ignore", "structured_cot")
    place.align("data", "import", "data/audiomcq/data.jsonl", *choice, "data/ready/audiomcq", *ignored)
    prepared = ("--from", "data/librispeech", "--out", "data/ready/librispeech")
    place.align("data", "prepare", "librispeech", *prepared)
    corpus = place.run("0_corpus")
    metrics = read_json(corpus / "manifest.json")["metrics"]
    assert (metrics["rows_prompts"], metrics["rows_pretrain"] > 0) == (40, True)
    return place


@pytest.fixture(scope="module")
def chosen(place):
    """The stage folder of multiple choice."""
    return place.run("3_grpo")


def test_two_processes_learn_to_choose(chosen):
    rows = [row for row in read_metrics(chosen / "metrics.jsonl") if "reward" in row]
    first, last = rows[0], rows[-1]
    assert (first["step"], last["step"]) == (5, 40)
    assert first["rewards/choice/mean"] < 0.75
    assert last["rewards/choice/mean"] > first["rewards/choice/mean"] + 0.15
    assert last["rewards/format/mean"] > 0.9
    assert {"reward/kind/Which", "reward/kind/sound"} <= rows[0].keys() | rows[1].keys()
    manifest = read_json(chosen / "manifest.json")
    assert (manifest["metrics"]["workers"], manifest["metrics"]["workers_replaced"]) == (2, 0)
    assert [reward["kind"] for reward in manifest["reward"]["rewards"]] == ["choice", "format"]


def test_two_processes_learn_from_transcripts_and_the_gate_decides(place, chosen):
    transcribed = place.run("2_grpo_wer")
    rows = [row for row in read_metrics(transcribed / "metrics.jsonl") if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 <= row["rewards/wer/mean"] <= 1 for row in rows)

    with serving(judge(lambda text: 5.0)) as server:
        url = {"4_evaluate__judge": f"{{model: m, url: '{server.url}', canary_items: 4}}"}
        evaluated = place.run("4_evaluate", **url)
        place.run("5_gate", **url)
        place.run("6_promote", **url)
    scores = read_json(evaluated / "scores.json")
    assert [row["code"] for row in scores["unusable_rows"]["data/MMAU/mmau-test-mini.json"]] == [
        "no_right_choice"
    ]
    mmau, val = (scores["recognition_comparison"][name]["accuracy"] for name in ("mmau-test-mini", "val_qa"))
    assert mmau["n"] == 40
    assert mmau["after"] >= mmau["before"]
    assert val["after"] >= val["before"]
    verdict = read_json(place.folder / "runs" / RECIPE / "5_gate/verdict.json")
    checks = {check["name"]: check["outcome"] for check in verdict["checks"]}
    assert verdict["verdict"] == "pass", verdict["reasons"]
    assert verdict["contamination"]["benchmark_clips"] == 8 + 40 + 20 + 4
    assert checks["mmau-test-mini accuracy"] == checks["independent judge"] == "pass"
