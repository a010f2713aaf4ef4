"""recipes/qwen2_audio_7b as it is, but for sizes: CPU processes, tiny checkpoints, published layouts.

Data sets are prepared from the layouts that their publishers ship, mixed, and trained on; people's
judgements come as imported pairs. Two Ray workers train under ZeRO-3 in DPO. Evaluation and gate:
`test_whole_loop`.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from align.run_folder.artifacts import read_json, read_metrics
from tests import forked
from tests.align.models.test_assemble import make_qwen
from tests.compiler import need_compiler
from tests.recipes.test_from_checkpoints import make_whisper

ROOT = Path(__file__).parents[2]
ONE = "{workers: 1, device: cpu, strategy: ddp}"
TWO = "{workers: 2, device: cpu, strategy: zero3}"
TRL = "{gradient_accumulation_steps: 2, logging_steps: 1}"
SMALL = {
    "0_corpus.sources": "[{folder: ready/librispeech}, {folder: ready/clothoaqa}]",
    "0_corpus.max_duration_s": 3,
    "1_pretrain.model": "{audio: ./whisper, text: ./qwen}",
    "1_pretrain.steps": 4,
    "1_pretrain.batch_size": 8,
    "1_pretrain.save_steps": 2,
    "1_pretrain.hardware": ONE,
    "1_pretrain.trl": TRL,
    "2_sft.steps": 3,
    "2_sft.batch_size": 8,
    "2_sft.hardware": ONE,
    "2_sft.trl": TRL,
    "3_sample.workers": 1,
    "3_sample.max_new_tokens": 4,
    "6_dpo.batch_size": 4,
    "6_dpo.learning_rate": 1e-3,
    "6_dpo.hardware": TWO,
    "6_dpo.trl": "{logging_steps: 1}",
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def tone(path: Path, hertz: float, seconds: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(16000 * seconds)) / 16000
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hertz * time), 16000)


def librispeech(root: Path) -> None:
    root = root / "LibriSpeech"
    (root / "train-clean-100/14/208").mkdir(parents=True)
    (root / "SPEAKERS.TXT").write_text(";ID |SEX| SUBSET\n14 | F | train-clean-100 | 25.0 | A B\n")
    lines = [f"14-208-{number:04} THE TONE IS {word}\n" for number, word in enumerate(["LOW", "HIGH"] * 4)]
    (root / "train-clean-100/14/208/14-208.trans.txt").write_text("".join(lines))
    for number in range(8):
        tone(root / f"train-clean-100/14/208/14-208-{number:04}.flac", 300 + 100 * number)


def clothoaqa(root: Path) -> None:
    root.mkdir()
    rows = ["file_name,QuestionText,answer,confidence\n"]
    for number in range(24):
        rows += [f"{number}.wav,Is the tone high?,{'yes' if number % 2 else 'no'},yes\n"] * 3
        tone(root / "audio_files" / f"{number}.wav", 310 + 90 * number, 0.5)
    (root / "clotho_aqa_train.csv").write_text("".join(rows))


class Place:
    """A folder with checkpoints, data sets and the recipe."""

    def __init__(self, programs, folder):
        self.programs, self.folder = programs, folder
        make_whisper(folder / "whisper")
        make_qwen(folder / "qwen")
        librispeech(folder / "librispeech")
        clothoaqa(folder / "clothoaqa")
        shutil.copytree(ROOT / "recipes/qwen2_audio_7b", folder / "qwen2_audio_7b")

    def align(self, *arguments):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENAI_API_KEY": ""}
        done = self.programs.run(forked.ALIGN, *arguments, cwd=self.folder, env=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def run(self, only, **more):
        small = SMALL | {name.replace("__", "."): value for name, value in more.items()}
        changes = [word for name, value in small.items() for word in ("--set", f"{name}={value}")]
        self.align("run", "qwen2_audio_7b", "--only", only, *changes)
        return self.folder / "runs/qwen2_audio_7b" / only


def test_the_recipe_runs_from_published_layouts_to_dpo(programs, tmp_path):
    need_compiler()
    place = Place(programs, tmp_path)
    for name in ("librispeech", "clothoaqa"):
        place.align("data", "prepare", name, "--from", name, "--out", f"ready/{name}")

    corpus = place.run("0_corpus")
    assert read_json(corpus / "manifest.json")["metrics"]["clips_train"] >= 24

    pretrained = place.run("1_pretrain")
    rows = [row for row in read_metrics(pretrained / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert any(name.startswith("loss/task/transcribe") for name in rows[-1] | rows[0] | rows[1])

    finetuned = place.run("2_sft")
    assert (finetuned / "model/model.safetensors").exists()

    sampled = place.run("3_sample")
    completions = [json.loads(line) for line in (sampled / "completions.jsonl").read_text().splitlines()]
    assert len(completions) % 4 == 0
    assert completions

    prompts = [json.loads(line) for line in (sampled / "prompts.jsonl").read_text().splitlines()]
    (tmp_path / "imported").mkdir()
    pairs = [
        {
            "id": f"pair{number}",
            "prompt_id": prompt["id"],
            "audios": prompt["audios"],
            "question": prompt["question"],
            "chosen": "yes",
            "rejected": f"no {number}",
            "axis": "factuality",
            "agreement": 1.0,
        }
        for number, prompt in enumerate(prompts * 8)
    ]
    (tmp_path / "imported/pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    imported = {"6_dpo__pairs": "./imported"}
    preferred = place.run("6_dpo", **imported)
    first, *_, last = [row for row in read_metrics(preferred / "metrics.jsonl") if "loss" in row]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-3)
    assert last["rewards/margins"] > 0
