"""Pre-training from a Whisper and a Qwen2 on disk, SFT on top, export: through the real command."""

import os
from pathlib import Path

import pytest
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from align.run_folder.artifacts import read_json, read_metrics
from tests import forked
from tests.align.models.test_assemble import make_qwen

ROOT = Path(__file__).parents[2]
RECIPE = {
    "0_corpus": "stage: corpus\ncorpus: synthetic\nclips: {train: 12, preference: 2, dev: 2, test: 2}\n",
    "1_pretrain": "stage: pretrain\ncorpus: 0_corpus\nmodel: {audio: ../whisper, text: ../qwen}\nsteps: 4\n"
    "batch_size: 2\nsave_steps: 2\nlearning_rate: 1.0e-3\ntrl: {logging_steps: 1}\n",
    "2_sft": "stage: sft\ncorpus: 0_corpus\npolicy: 1_pretrain\nsteps: 2\nbatch_size: 2\n"
    "learning_rate: 1.0e-3\ntrl: {logging_steps: 1}\n",
}
pytestmark = pytest.mark.timeout(400)


def make_whisper(folder):
    config = WhisperConfig(
        num_mel_bins=16,
        d_model=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        max_source_positions=150,
        vocab_size=60,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16, chunk_length=3).save_pretrained(folder)


@pytest.fixture
def place(tmp_path):
    make_whisper(tmp_path / "whisper")
    make_qwen(tmp_path / "qwen")
    (tmp_path / "work" / "toy").mkdir(parents=True)
    for name, text in RECIPE.items():
        (tmp_path / "work" / "toy" / f"{name}.yaml").write_text(text)
    return tmp_path / "work"


def test_a_model_is_assembled_trained_and_exported(programs, place):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def align(*arguments):
        return programs.run(forked.ALIGN, *arguments, cwd=place, env=environment)

    checked = align("check", "toy")
    assert checked.returncode == 0, checked.stderr
    assert "1_pretrain: 0." in checked.stdout

    done = align("run", "toy")
    assert done.returncode == 0, done.stdout + done.stderr
    run = place / "runs" / "toy"
    told = read_json(run / "1_pretrain" / "assembly.json")
    assert told["used"]["audio_tower.conv1.weight"] == "audio:model.encoder.conv1.weight"
    assert "<|AUDIO|>" in told["new_tokens"]
    assert not (run / "1_pretrain" / "assembled").exists()
    manifest = read_json(run / "1_pretrain" / "manifest.json")
    assert set(manifest["inputs"]) == {"0_corpus", "../whisper", "../qwen"}
    assert all(row["examples_per_s"] > 0 for row in read_metrics(run / "2_sft" / "metrics.jsonl"))

    again = align("check", "toy")
    assert "at the speed measured in runs/toy/1_pretrain/manifest.json" in again.stdout
    assert "1_pretrain  up to date" in align("run", "toy").stdout

    exported = align("export", "runs/toy", "--to", "exported")
    assert exported.returncode == 0, exported.stderr
    assert "toy/2_sft -> exported" in exported.stdout
    card = (place / "exported" / "README.md").read_text()
    assert "../whisper" in card
    assert "clips of up to 3 s" in card
