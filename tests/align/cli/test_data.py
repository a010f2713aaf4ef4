"""`align data` as a user types it."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from align.cli.main import app
from align.recipe.recipe import load
from preference_data import store
from preference_data.corpora.catalog import CARDS
from preference_data.schema import PreferencePair, TaskExample

MESSAGES = [{"role": "user", "content": "<audio>What is it?"}, {"role": "assistant", "content": "Rain."}]
PAIR = PreferencePair(
    id="p",
    prompt_id="q",
    audios=("a.wav",),
    question="What is it?",
    chosen="Rain.",
    rejected="A dog.",
    axis="factuality",
    agreement=1.0,
)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def tone(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(np.arange(4000) / (3 + len(path.name))), 16_000)


@pytest.fixture
def sounds(tmp_path) -> Path:
    root = tmp_path / "vocal"
    for name in ("f0003_0_sigh", "m0004_0_laughter", "m0005_0_cough"):
        tone(root / f"audio_16k/{name}.wav")
    (root / "audio_16k/f0003_0_sneeze.wav").write_bytes(b"")
    (root / "meta").mkdir()
    for part, speaker in (("tr", "f0003,f,28"), ("val", "m0004,m,30"), ("te", "m0005,m,31")):
        (root / f"meta/{part}_meta.csv").write_text(f"{speaker},US,English,no\n")
    return root


def test_list_names_every_corpus_and_what_it_needs():
    told = run("list")
    assert all(name in told for name in CARDS)
    assert "CC BY-SA 4.0" in told
    assert "account at the publisher" in told
    assert "audio is on YouTube" in told


def test_every_verb_shows_an_example():
    for verb in ("list", "download", "prepare", "export", "import"):
        assert f"Example: align data {verb}" in " ".join(run(verb, "--help").split())


def test_prepare_tells_what_is_there_and_what_was_left_out(sounds, tmp_path):
    told = run("prepare", "vocalsound", "--from", sounds, "--out", tmp_path / "ready", "--preference", 0)
    assert "vocalsound  4/4  100%" in told
    assert "train              1 clips" in told
    assert "vocal_sound 1" in told
    assert "left out   empty_file 1" in told
    assert [one.text for one in store.stream(tmp_path / "ready/pretrain.jsonl", TaskExample)] == [
        "sigh",
        "female",
        "28",
    ]


def test_mistakes_are_told_in_one_message(sounds, tmp_path):
    told = run("prepare", "vocalsounds", "--from", sounds, "--out", tmp_path / "r", code=2)
    assert "unknown corpus 'vocalsounds'" in told
    told = " ".join(run("prepare", "nsynth", "--from", sounds, "--out", tmp_path / "r", code=2).split())
    assert "holds no nsynth-{train,valid,test}/" in told
    assert not (tmp_path / "r").exists()


def test_a_failed_download_says_so_and_one_by_hand_says_how(tmp_path, monkeypatch):
    gone = {"16k": (CARDS["vocalsound"].files["16k"][0]._replace(url="http://127.0.0.1:9/gone.zip"),)}
    monkeypatch.setitem(CARDS, "vocalsound", CARDS["vocalsound"].model_copy(update={"files": gone}))
    monkeypatch.setattr("preference_data.corpora.fetch.time", SimpleNamespace(sleep=lambda seconds: None))
    assert "ConnectError" in run("download", "vocalsound", tmp_path, code=1)
    assert "no part '44k'" in run("download", "vocalsound", tmp_path, "--part", "44k", code=2)
    assert f"align data prepare common_voice --from {tmp_path}" in run("download", "common_voice", tmp_path)


def test_pairs_go_out_come_back_and_a_recipe_can_name_them(tmp_path):
    corpus, out = tmp_path / "corpus", tmp_path / "imported"
    tone(corpus / "a.wav")
    store.write(corpus / "pairs.jsonl", [PAIR])
    rows = ["--format", "ms-swift"]
    told = run("export", corpus / "pairs.jsonl", "--corpus", corpus, "--out", tmp_path / "rows", *rows)
    assert "1 pairs in" in told
    assert "swift rlhf --rlhf_type dpo" in told
    arguments = ["--audio-root", tmp_path / "rows", "--out", out, *rows]
    exported = json.loads((tmp_path / "rows/pairs.jsonl").read_text())
    told = run("import", tmp_path / "rows/pairs.jsonl", *arguments)
    assert "1 pairs, 0 chats and 1 clips" in told
    assert f"pairs: {out}" in told
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    (recipe / "1_dpo.yaml").write_text(
        f"stage: dpo\npolicy: Qwen/Qwen2-Audio-7B-Instruct\npairs: {out}\ncorpus: {out}\n"
        "batch_size: 1\nlearning_rate: 1.0e-6\n"
    )
    assert load(recipe).step("1_dpo").foreign == sorted(["Qwen/Qwen2-Audio-7B-Instruct", str(out)])
    before = (out / "pairs.jsonl").read_bytes()
    again = run("import", tmp_path / "rows/pairs.jsonl", *arguments, code=2)
    assert "has a record 'p', which the dataset holds already. Nothing was changed" in " ".join(
        again.replace("│", " ").split()
    )
    assert (out / "pairs.jsonl").read_bytes() == before
    (tmp_path / "rows/pairs.jsonl").write_text(json.dumps({"messages": 3}) + "\n")
    (tmp_path / "rows/more.jsonl").write_text(
        "".join(
            json.dumps({"messages": MESSAGES, "audios": [exported["audios"][0]], "score": 1, **more}) + "\n"
            for more in ({"label": True}, {"label": False}, {"label": "?"}, {"rejected_answer": "A cat."})
        )
    )
    more = run("import", tmp_path / "rows/more.jsonl", *arguments, "--ignore", "score")
    assert "left out: row 3: label is '?', neither true nor false" in more
    assert "1 pairs, 2 labels (1 good, 1 bad), 0 chats and 0 clips in" in more
    assert f"1 rows left out, see {out}/quarantine.jsonl" in more
    assert len(store.read(out / "pairs.jsonl", PreferencePair)) == 2
    told = run("export", out / "labels.jsonl", "--corpus", out, "--out", tmp_path / "rows", *rows)
    assert "2 labels in" in told
    assert "swift rlhf --rlhf_type kto" in told
    arguments[3] = tmp_path / "other"
    assert "none of its 1 rows can be used" in " ".join(
        run("import", tmp_path / "rows/pairs.jsonl", *arguments, code=2).split()
    )
