"""The evaluate stage: answers are kept batch by batch, the control is made where it is judged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

import preference_data
from align.generation import complete
from align.recipe.config.evaluation import EvaluateConfig
from align.run_folder.artifacts import StageFolder
from align.stages import evaluate
from tests.align.generation import toy_policy

FACTS = json.dumps({"word": "seven", "gender": "man"})
QUESTIONS = [
    "Which word is spoken?",
    "Which instrument plays?",
    "Is the speaker a man or a woman? Answer in one word.",
]
PHRASEBOOK = Path(preference_data.__file__).parent / "toy_world" / "phrasebooks" / "synthetic.yaml"


@pytest.fixture(scope="module")
def inputs(tiny, tmp_path_factory):
    """An untrained and a trained policy; a corpus of six questions and two utterances about four clips."""
    root = tmp_path_factory.mktemp("evaluate")
    toy_policy.train(tiny.policy, tiny.audio, root / "trained")
    chat = root / "corpus" / "test" / "Chat"
    shutil.copytree(tiny.audio, chat / "speech_QA_toy")
    rows = [
        {
            "uniq_id": f"q{i}",
            "path": f"{i % 4}.wav",
            "question": QUESTIONS[i % 3],
            "answer_gt": "The speaker says seven.",
            "meta_info": FACTS,
            "task_name": "speech_QA",
            "dataset_name": "toy",
        }
        for i in range(6)
    ]
    (chat / "Chat_meta.json").write_text(json.dumps(rows))
    shutil.copy(PHRASEBOOK, root / "corpus" / "phrasebook.yaml")
    spoken = [
        {"audio": f"test/Chat/speech_QA_toy/{i}.wav", "prompt": "transcribe", "gt": "high", "source": "toy"}
        for i in range(2)
    ]
    (root / "corpus" / "test" / "recognition.jsonl").write_text("".join(json.dumps(r) + "\n" for r in spoken))
    return {"0": root / "corpus", "1": tiny.policy, "2": root / "trained"}


def run(inputs, folder, **more):
    config = EvaluateConfig(
        stage="evaluate", corpus="0", policies=["1", "2"], before="1", after="2", **({"batch_size": 4} | more)
    )
    out = StageFolder(folder, "7_evaluate", "x")
    out.open()
    return evaluate.run(config, inputs, out), out.path


def files(out):
    return sorted(str(path.relative_to(out / "completions")) for path in out.glob("completions/*/*/*.json"))


def test_an_interrupted_evaluation_completes_only_what_is_missing(inputs, tmp_path, monkeypatch):
    whole, out = run(inputs, tmp_path / "whole")
    assert whole["score"] > 0
    scores = (out / "scores.json").read_text()
    save, saved = complete._save, []

    def fails_at_the_fifth(folder, completed):
        if len(saved) == 4:
            raise KeyboardInterrupt
        saved.append(save(folder, completed))

    monkeypatch.setattr(complete, "_save", fails_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        run(inputs, tmp_path / "killed")
    monkeypatch.setattr(complete, "_save", lambda *batch: saved.append(save(*batch)))
    again, resumed = run(inputs, tmp_path / "killed")
    assert again == whole
    assert (resumed / "scores.json").read_text() == scores
    assert len(saved) == len(files(out)) == 10  # two policies: 6 answers, 6 shuffled, 2 recognised
    items = [json.loads(line) for line in (resumed / "items" / "2.jsonl").read_text().splitlines()]
    assert [item["audio"] for item in items][:2] == [f"test/Chat/speech_QA_toy/{i}.wav" for i in range(2)]
    kept = json.loads((resumed / "completions" / "2" / "answers" / "00000000.json").read_text())
    assert [item["response"] for item in items][:4] == [group[0]["text"] for group in kept.values()]
    entropies = [-np.mean(group[0]["logps"]) for group in kept.values()]
    assert [item["entropy"] for item in items][:4] == pytest.approx(entropies)
    assert min(entropies) > 0


def test_where_judging_costs_the_control_is_made_for_one_policy(inputs, tmp_path, monkeypatch):
    _, free = run(inputs, tmp_path / "free")
    assert {name.split("/")[0] for name in files(free) if "shuffled" in name} == {"1", "2"}
    monkeypatch.setattr(evaluate.FactJudge, "is_free", False)
    _, paid = run(inputs, tmp_path / "paid")
    assert {name.split("/")[0] for name in files(paid) if "shuffled" in name} == {"2"}
    report = json.loads((paid / "scores.json").read_text())
    assert "shuffled_audio" in report["policies"]["2"]
    assert "shuffled_audio" not in report["policies"]["1"]


def test_questions_about_bad_clips_are_counted_by_name(inputs, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(inputs["0"], corpus)
    clip = corpus / "test/Chat/speech_QA_toy/1.wav"
    soundfile.write(clip, np.full(8_000, np.nan), 16_000, subtype="FLOAT")
    metrics, out = run({**inputs, "0": corpus}, tmp_path / "run")
    report = json.loads((out / "scores.json").read_text())
    unusable = [(row["uniq_id"], row["code"]) for row in report["unusable"]]
    assert unusable == [("q1", "non_finite"), ("q5", "non_finite")]
    assert [row["path"] for rows in report["unusable_rows"].values() for row in rows] == [
        "test/Chat/speech_QA_toy/1.wav"
    ]
    assert metrics["unusable"] == 3
    assert report["n"] == 4


def test_a_corpus_that_holds_out_nothing_to_recognise_is_asked_all_the_same(inputs, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(inputs["0"], corpus)
    (corpus / "test/recognition.jsonl").write_text("")
    _, out = run({**inputs, "0": corpus}, tmp_path / "run")
    report = json.loads((out / "scores.json").read_text())
    assert (report["n"], report["policies"]["2"]["recognition"]) == (6, {})


def test_multiple_choice_is_put_with_silence_and_with_another_clip_too(inputs, tmp_path):
    questions = [
        {
            "id": f"m{i}",
            "audio_id": f"./{i % 4}.wav",
            "question": "Is it high or low?",
            "choices": ["high", "low"],
            "answer": ["high", "low"][i % 2],
            "task": ["sound", "music"][i % 2],
        }
        for i in range(6)
    ]
    clips = tmp_path / "mmau"
    shutil.copytree(inputs["0"] / "test/Chat/speech_QA_toy", clips)
    (clips / "mmau-test-mini.json").write_text(json.dumps(questions))
    _, out = run(inputs, tmp_path / "run", benchmarks={str(clips / "mmau-test-mini.json"): "mmau"})
    assert {name.split("/")[1] for name in files(out)} == {
        *("answers", "shuffled", "recognised"),
        *("benchmark_0", "benchmark_0_silence", "benchmark_0_other_clip"),
    }
    report = json.loads((out / "scores.json").read_text())
    for scores in report["policies"].values():
        numbers = scores["multiple_choice"]["mmau-test-mini"]
        assert numbers["accuracy"] == scores["recognition"]["mmau-test-mini"]["accuracy"]
        assert (numbers["n"], numbers["n_clips"], numbers["chance"]) == (6, 4, 0.5)
        assert set(numbers["categories"]["task"]) == {"sound", "music"}
        for control in ("silence", "other_clip"):
            above = numbers[f"above_{control}"]
            assert above["delta"] == pytest.approx(numbers["accuracy"] - above["before"])
    assert set(report["answered_without_clip"]["mmau-test-mini"]) <= {f"m{i}" for i in range(6)}


def test_a_question_in_the_clip_is_put_as_the_clip_alone(inputs, tmp_path):
    clips = tmp_path / "voicebench"
    shutil.copytree(inputs["0"] / "test/Chat/speech_QA_toy", clips)
    rows = [{"prompt": f"Tone {i}?", "audio": f"{i}.wav", "reference": "AB"[i % 2]} for i in range(4)]
    for name in ("mmsu", "advbench"):
        (clips / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {"mmsu": "voicebench", "advbench": "advbench"}
    _, out = run(
        inputs,
        tmp_path / "run",
        benchmarks={str(clips / f"{name}.jsonl"): kind for name, kind in kinds.items()},
    )
    report = json.loads((out / "scores.json").read_text())
    for scores in report["policies"].values():
        assert scores["multiple_choice"]["mmsu"]["chance"] == 0.25
        assert "above_silence" in scores["multiple_choice"]["mmsu"]
        assert 0 <= scores["recognition"]["advbench"]["refused"] <= 1
        assert "advbench" not in scores["multiple_choice"]
    assert "refused" in report["recognition_comparison"]["advbench"]


def test_no_clip_keeps_its_place_in_the_control():
    clips = [f"{i}.wav" for i in range(50)]
    shuffled = evaluate._shuffled(clips, 0)
    assert sorted(shuffled) == sorted(clips)
    assert all(here != there for here, there in zip(clips, shuffled, strict=True))
