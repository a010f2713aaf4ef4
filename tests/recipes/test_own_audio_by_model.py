"""A fresh user's forty recordings and a table of questions, no answers: to pairs by a model that hears."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from preference_data import store
from preference_data.schema import Judgement, PreferencePair, Prompt
from tests.align.evaluation import comparing_judges as judges
from tests.align.evaluation.openai_server import serving

RECIPE = Path(__file__).parents[2] / "recipes/own_audio_by_model"


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "my_recordings"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n}.wav").write_bytes(judges.tone(n))
    with (folder / "questions.csv").open("w", newline="") as file:
        rows = [[f"{n}.wav", "Is the tone high or low?"] for n in range(40)]
        csv.writer(file).writerows([["audio", "question"], *rows])
    return folder


def align(folder, *words):
    command = [sys.executable, "-m", "align", *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.timeout(300)
def test_from_recordings_and_questions_to_pairs_by_a_model(recordings, tiny, tmp_path):
    """The judge counts the letters e that it reads, more of them where the tone is high."""
    taste = judges.ranking(lambda text, own: text.count("e") * (1 if judges.is_high(own.wavs[0]) else -1))
    with serving(taste) as server:
        settings = {
            "corpus.manifest": recordings / "questions.csv",
            "corpus.max_duration_s": 1,
            "sample.policy": tiny.policy,
            "sample.max_new_tokens": 8,
            "annotate.judge.url": server.url,
        }
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        done = align(tmp_path, "run", RECIPE, "--out", "run", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        asked = len(server.requests)
        pairs = store.read(tmp_path / "run/5_pairs/pairs.jsonl", PreferencePair)
        refused = align(
            tmp_path,
            "run",
            RECIPE,
            "--out",
            "run",
            *words,
            "--set",
            "pairs.min_model_agreement=0.6",
            "--replace",
        )
        assert refused.returncode == 1, refused.stdout + refused.stderr
        assert "the model 'judge' cannot be used" in refused.stdout + refused.stderr
        assert "nothing to compare it with" in refused.stdout + refused.stderr
        assert len(server.requests) == asked
    browser = align(tmp_path, "annotate", "push", RECIPE, "--out", "run")
    assert browser.returncode == 2
    assert "4_annotate.yaml:5: by: model judges, and no person does" in browser.stdout + browser.stderr
    assert pairs
    for pair in pairs:
        more = pair.chosen.count("e") > pair.rejected.count("e")
        assert more == judges.is_high(judges.tone(int(Path(pair.audios[0]).stem)))
        assert pair.annotators == ("judge",)
    run = tmp_path / "run"
    prompts = {item.id: item for item in store.stream(run / "0_corpus/prompts.jsonl", Prompt)}
    assert len(prompts) == 40
    assert not any(prompt.answer_gt for prompt in prompts.values())
    judgements = store.read(run / "4_annotate/judgements.jsonl", Judgement)
    assert {item.annotator_kind for item in judgements} == {"model"}
    assert asked == 2 * len({(item.prompt_id, item.texts) for item in judgements}) > 40
    assert all(len(request.wavs) == 1 for request in server.requests)
    report = json.loads((run / "4_annotate/model.json").read_text())
    assert report["replies"] == {"used": asked}
    assert "heard the clips" in (run / "4_annotate/quality.html").read_text()
    assert not (run / "argilla").exists()
