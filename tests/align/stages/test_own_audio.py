"""A fresh user's folder of recordings with a table of questions: from the README's commands to pairs."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from align.recipe.config.corpus import CorpusConfig
from align.recipe.recipe import RecipeError, load
from preference_data import store
from preference_data.schema import AudioClip, CompletionScore, PreferencePair, Prompt
from tests.align.evaluation.openai_server import judge, serving

RECIPE = Path(__file__).parents[3] / "recipes/own_audio"


@pytest.fixture
def recordings(tmp_path):
    """Forty recordings of five people, and a CSV of questions and answers beside them."""
    folder = tmp_path / "my_recordings"
    folder.mkdir()
    rows = []
    for n in range(40):
        t = np.arange(8000 + 100 * n) / 16_000
        wave = 0.4 * np.sin(2 * np.pi * (200 + 40 * n) * t) * (1 + 0.3 * np.sin(2 * np.pi * 3 * t))
        soundfile.write(folder / f"{n}.wav", wave.astype(np.float32), 16_000)
        height = "low" if n < 20 else "high"
        rows.append([f"{n}.wav", "Is the tone high or low?", f"It is {height}.", f"person {n % 5}"])
    with (folder / "questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["audio", "question", "reference", "speaker"], *rows])
    return folder


def test_from_forty_recordings_and_a_table_to_pairs(recordings, tiny, tmp_path):
    """The judge of this test likes long completions; it answers over a real socket."""
    with serving(judge(lambda text: min(9, 1 + len(text)))) as server:
        settings = {
            "corpus.manifest": recordings / "questions.csv",
            "corpus.held_out": "{dev: 0.1, test: 0.2}",
            "corpus.max_duration_s": 1,
            "sample.policy": tiny.policy,
            "sample.max_new_tokens": 8,
            "score.reward.judge.url": server.url,
        }
        command = [sys.executable, "-m", "align", "run", RECIPE, "--out", tmp_path / "run"]
        command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        done = subprocess.run(map(str, command), cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        asked = len(server.requests)
    corpus = tmp_path / "run/0_corpus"
    clips = {clip.path: clip for clip in store.stream(corpus / "clips.jsonl", AudioClip)}
    assert len(clips) == 40
    held_out = {clip.speaker for clip in clips.values() if clip.split in ("dev", "test")}
    assert len(held_out) == 2
    assert not held_out & {clip.speaker for clip in clips.values() if clip.split in ("train", "preference")}
    assert len(json.loads((corpus / "test/Chat/Chat_meta.json").read_text())) == 8
    prompts = store.read(corpus / "prompts.jsonl", Prompt)
    pairs = store.read(tmp_path / "run/3_pairs/pairs.jsonl", PreferencePair)
    scores = {
        row.id: row.reward for row in store.stream(tmp_path / "run/2_score/scores.jsonl", CompletionScore)
    }
    assert len(scores) == 4 * len(prompts)
    assert 0 < len(pairs) <= len(prompts)
    for pair in pairs:
        assert clips[pair.audios[0]].split == "preference"
        assert min(9, 1 + len(pair.chosen)) > min(9, 1 + len(pair.rejected))
    assert asked > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": "manifest"}, "corpus 'manifest' needs manifest"),
        ({"corpus": "manifest", "manifest": "m.csv", "dir": "d"}, "corpus 'manifest' has no dir"),
        ({"corpus": "manifest", "manifest": "m.csv", "defect_rate": 0.1}, "has no defect_rate"),
        ({"corpus": "manifest", "manifest": "m.csv", "held_out": {"test": 1.5}}, "between 0 and 1"),
        ({"corpus": "manifest", "manifest": "m.csv", "questions_per_clip": 2}, "needs questions"),
        ({"corpus": "folder", "dir": "d", "manifest": "m.csv"}, "belongs to corpus 'manifest'"),
        ({"corpus": "folder", "dir": "d", "held_out": {"dev": 0.1}}, "only corpus 'manifest' draws a share"),
        ({"corpus": "mixture", "sources": [{"folder": "a"}], "licences": ["MIT"]}, "has no licences"),
    ],
)
def test_keys_of_a_manifest_belong_to_it(settings, message):
    with pytest.raises(ValueError, match=message):
        CorpusConfig(stage="corpus", **settings)


def recipe(folder, clip_s, **corpus):
    folder.mkdir()
    keys = "".join(f"{key}: {value}\n" for key, value in corpus.items())
    (folder / "0_corpus.yaml").write_text(f"stage: corpus\n{keys}")
    (folder / "1_pretrain.yaml").write_text(
        f"stage: pretrain\ncorpus: 0_corpus\nmodel: {{clip_s: {clip_s}}}\nsteps: 2\nbatch_size: 2\n"
        "learning_rate: 1.0e-3\n"
    )
    return folder


@pytest.mark.parametrize(
    "corpus", [{"corpus": "folder", "dir": "d"}, {"corpus": "manifest", "manifest": "m.csv"}]
)
def test_the_two_limits_of_a_clips_length_follow_each_other(tmp_path, corpus):
    with pytest.raises(RecipeError) as caught:
        load(recipe(tmp_path / "short", 5, max_duration_s=5.2, **corpus))
    said = (
        "clips of 0_corpus may last 5.2 s, but the model hears 5 s: set 1_pretrain.model.clip_s to 6 or more"
    )
    assert f"{said}, or 0_corpus.max_duration_s to 5" in str(caught.value)
    assert load(recipe(tmp_path / "long", 6, max_duration_s=5.2, **corpus))
