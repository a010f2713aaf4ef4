"""A run folder with real files, from the corpus to the evaluation, small enough to gate in a second."""

import copy
import json

import numpy as np
import soundfile
from safetensors.numpy import save_file

from align.evaluation.benchmarks import air_bench
from align.evaluation.benchmarks.air_bench import Item
from align.recipe.config.evaluation import GateConfig
from align.run_folder.artifacts import StageFolder, read_manifest
from align.stages import gate as gate_stage
from preference_data import store
from preference_data.audio import decode
from preference_data.schema import AudioClip

MODEL = "toy-audio"
THRESHOLDS = {"min_questions": 4, "judge": None}
SCORES = {
    "split": "test",
    "n": 4,
    "judge": {"name": "facts", "shares_ground_truth": True},
    "before": "2_sft",
    "after": "6_dpo",
    "policies": {
        "2_sft": {"overall": {"factuality": 0.5, "fact_accuracy": 0.5, "words": 4.0, "distinct": 4, "n": 4}},
        "6_dpo": {
            "overall": {
                "factuality": 0.75,
                "fact_accuracy": 0.5,
                "words": 4.0,
                "distinct": 4,
                "n": 4,
                "over_abstention": 0.0,
            },
            "shuffled_audio": {"factuality": 0.25},
        },
    },
    "comparison": {name: {"ci_low": 0.1, "ci_high": 0.4} for name in ("factuality", "behaviour")},
}

ITEMS = [
    {
        "path": f"{i}.wav",
        "question": "?",
        "answer_gt": "!",
        "meta_info": "{}",
        "task_name": "speech_QA",
        "dataset_name": "made",
        "uniq_id": str(i),
    }
    for i in range(4)
]


def tone(path, hz):
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds = np.arange(3200) / 16000
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hz * seconds), 16000, subtype="PCM_16")


PRODUCES = {
    "annotate": "annotations",
    "dpo": "policy",
    "evaluate": "evaluation",
    "gate": "verdict",
    "grpo": "policy",
    "sft": "policy",
}


def stage(run, name, kind, needs, write, metrics=None, **config):
    """One finished stage; `write` fills its folder."""
    out = StageFolder(run, name, "made")
    out.open()
    write(out.path)
    digests = {need: read_manifest(run / need)["output_digest"] for need in needs}
    head = {"kind": kind, "produces": PRODUCES.get(kind, kind), "status": "done", "config": config}
    out.commit({**head, "inputs": digests, "metrics": metrics or {}})


def corpus(folder):
    clips = {f"audio/train/{i}.wav": "train" for i in range(3)}
    clips |= {f"audio/preference/{i}.wav": "preference" for i in range(2)}
    clips |= {f"test/Chat/speech_QA_made/{i}.wav": "test" for i in range(4)}
    records = []
    for i, (path, split) in enumerate(clips.items()):
        tone(folder / path, 200 + 50 * i)
        sha256 = decode.inspect(folder / path, max_duration_s=9).sha256
        records.append(AudioClip(id=f"c{i}", path=path, split=split, duration_s=0.2, sha256=sha256))
    store.write(folder / "clips.jsonl", records)
    (folder / "test/Chat/Chat_meta.json").write_text(json.dumps(ITEMS))
    row = {
        "audio": "test/Chat/speech_QA_made/0.wav",
        "prompt": "caption",
        "gt": "x",
        "source": "caption/made",
    }
    (folder / "test/recognition.jsonl").write_text(json.dumps(row) + "\n")


def weights(value):
    def write(folder):
        (folder / "model").mkdir()
        save_file({"a": np.full(3, value, np.float32)}, folder / "model" / "model.safetensors")
        (folder / "model" / "config.json").write_text("{}")

    return write


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def make(run, *, value=2.0, scores=SCORES, corpus=corpus):
    """Everything a gate reads; `value` tells one candidate's weights from another's."""
    stage(run, "0_corpus", "corpus", [], corpus)
    stage(run, "2_sft", "sft", ["0_corpus"], weights(1.0))
    stage(run, "4_annotate", "annotate", ["0_corpus"], text("judgements.jsonl", "{}"))
    stage(run, "5_pairs", "pairs", ["4_annotate"], text("pairs.jsonl", "{}"))
    stage(run, "6_dpo", "dpo", ["0_corpus", "2_sft", "5_pairs"], weights(value))
    evaluate(run, scores)
    return run


def evaluate(run, scores=SCORES):
    answers = [(Item(**row), "Yes.") for row in ITEMS]

    def written(folder):
        (folder / "scores.json").write_text(json.dumps(scores))
        for policy in ("2_sft", "6_dpo"):
            air_bench.write_answers(folder / "answers" / f"{policy}.jsonl", *zip(*answers, strict=True))

    needs = ["0_corpus", "2_sft", "6_dpo"]
    stage(run, "7_evaluate", "evaluate", needs, written, corpus="0_corpus", split="test")


def gate(run, *, model_name=MODEL, **thresholds):
    """Run the real gate and finish its folder; returns what verdict.json says."""
    config = GateConfig(
        stage="gate", evaluation="7_evaluate", model_name=model_name, thresholds=THRESHOLDS | thresholds
    )
    inputs = {"7_evaluate": run / "7_evaluate"}
    out = StageFolder(run, "8_gate", "made")
    out.open()
    metrics = gate_stage.run(config, inputs, out)
    digests = {"7_evaluate": read_manifest(run / "7_evaluate")["output_digest"]}
    dumped = config.model_dump(mode="json")
    out.commit({"kind": "gate", "status": "done", "config": dumped, "inputs": digests, "metrics": metrics})
    return json.loads((run / "8_gate" / "verdict.json").read_text())


def scores(**changes):
    """SCORES with values replaced by their path, `comparison__factuality`."""
    changed = copy.deepcopy(SCORES)
    for path, value in changes.items():
        *parents, key = path.split("__")
        node = changed
        for name in parents:
            node = node[{"dpo": "6_dpo", "sft": "2_sft"}.get(name, name)]
        node[key] = value
    return changed
