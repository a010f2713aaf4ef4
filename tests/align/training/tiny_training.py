"""Real training stages on a Qwen2-Audio of a few thousand parameters, alone or as one of several ranks.

    torchrun --nproc_per_node 2 tests/align/training/tiny_training.py WORLD OUT sft-ddp sft-zero2@7 ...

runs each case on two processes (without torchrun: in one) and leaves its stage folder in OUT/<case>; with
@7 it is stopped in step 7 (OUT/<case>-stopped) and resumed (OUT/<case>-resumed).
"""

import gc
import hashlib
import importlib
import json
import os
import shutil
import sys
from datetime import timedelta
from pathlib import Path

STRATEGIES = {"ddp", "zero2", "zero3"}
STEPS, BATCH = int(os.environ.get("STEPS", "20")), 4
SAVE_STEPS = int(os.environ.get("SAVE_STEPS", "10"))
TEXTS = [
    "system\nYou are a helpful assistant.\n",
    "user\nAudio 1: \nAudio 2: \n",
    "assistant\n",
    "Is the tone high or low?",
    "The tone is high. The tone is low. Say something.",
    "Generate the caption in English: A low tone.",
]


def make_world(root, n=24, d_model=32):
    """A policy, tones, `n` chats, pre-training targets, pairs and labels. A third of the chats has audio."""
    import numpy as np
    import soundfile

    from align.models.qwen2_audio import model as qwen2_audio
    from align.run_folder.artifacts import sha256_file
    from preference_data import store
    from preference_data.schema import AudioClip, Chat, Label, PreferencePair, TaskExample, Turn

    processor = qwen2_audio.build_processor(TEXTS * 20, vocab_size=400, mel_bins=32, hop_length=320, clip_s=1)
    model = qwen2_audio.build_model(
        processor, d_model=d_model, heads=2, audio_layers=1, text_layers=2, seed=0
    )
    qwen2_audio.save(model, processor, root / "policy" / "model")
    corpus = root / "corpus"
    (corpus / "audio").mkdir(parents=True)
    clips = []
    for i in range(8):
        t = np.arange(int(16_000 * (0.3 + 0.08 * i))) / 16_000
        wave = 0.4 * np.sin(2 * np.pi * (200 + 30 * i if i % 2 else 2500 + 90 * i) * t)
        soundfile.write(corpus / "audio" / f"{i}.wav", wave.astype(np.float32), 16_000)
        known = {"path": f"audio/{i}.wav", "split": "train", "sha256": sha256_file(corpus / f"audio/{i}.wav")}
        clips.append(AudioClip(id=f"clip-{i}", duration_s=len(t) / 16_000, **known))
    answers = ("The tone is high.", "The tone is low.")
    chats, targets, pairs = [], [], []
    for i in range(n):
        audios = (f"audio/{i % 8}.wav",) if i % 3 == 0 else ()
        question = "Is the tone high or low?" if audios else "Say something."
        turns = (Turn(question=question, answer=answers[i % 2]), Turn(question=f"{i}?", answer=f"low {i}"))
        chats.append(Chat(id=f"chat-{i}", audios=audios, turns=turns[: 1 + i % 2]))
        targets.append(
            TaskExample(id=f"t-{i}", audios=(f"audio/{i % 8}.wav",), task="caption", text=f"tone {i}")
        )
        pairs.append(
            PreferencePair(
                id=f"pair-{i}",
                prompt_id=f"p-{i}",
                audios=audios,
                question=question,
                chosen=answers[i % 2],
                rejected=answers[1 - i % 2] + f" Say {i}",
                axis="factuality" if i % 4 else "behaviour",
                agreement=1.0,
            )
        )
    store.write(corpus / "clips.jsonl", clips)
    store.write(corpus / "sft.jsonl", chats)
    store.write(corpus / "pretrain.jsonl", targets)
    (root / "pairs").mkdir()
    store.write(root / "pairs" / "pairs.jsonl", pairs)
    (root / "labels").mkdir()
    store.write(
        root / "labels" / "labels.jsonl", [label for pair in pairs for label in labels_of(pair, Label)]
    )
    return root


def labels_of(pair, kind):
    """The two completions of a pair, each on its own."""
    text = {"type": "text", "text": pair.question}
    prompt = [{"role": "user", "content": [*({"type": "audio"} for _ in pair.audios), text]}]
    own = {"prompt_id": pair.prompt_id, "prompt": prompt, "audios": pair.audios}
    return [
        kind.model_validate({**own, "id": f"{pair.id}-{side}", "completion": text, "label": side == "chosen"})
        for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
    ]


def make_config(case, *, steps=STEPS, save_steps=SAVE_STEPS, **changes):
    """The config of a case `KIND[-STRATEGY][-OPTION]`, such as `sft-zero2-lora`.

    Without a strategy in one process. `tight`: in memory for nothing at all, so with the thriftiest of all
    plans; `frozen`: the audio tower; `kept`: that, and SFT does not augment; `once`: all rows are one batch,
    else DPO holds three out; `filtered`: without chats that need no audio; `stock`: not packed; `tags`:
    pre-training on tags; `twice`: two steps of GRPO for each batch of completions; `vllm`: those come from
    vLLM.
    """
    from align.recipe.config.alignment import DPOConfig, GRPOConfig, KTOConfig
    from align.recipe.config.training import PretrainConfig, SFTConfig

    kind, *options = case.split("-")
    tight = {"memory_gb": 3.0} if "tight" in options else {}
    batch = 24 if "once" in options else BATCH
    shared = {
        "stage": kind,
        "corpus": "corpus",
        "policy": "policy",
        "learning_rate": 1e-3,
        "batch_size": batch,
        "save_steps": save_steps,
        "hardware": {"workers": 2, "strategy": options[0], **tight} if {*options} & STRATEGIES else None,
        "lora": {"r": 4, "alpha": 8} if "lora" in options else None,
        "packed": "stock" not in options,
        "train": ["projector", "language_model"] if {"frozen", "kept"} & {*options} else None,
        "trl": {"logging_steps": 1, "max_grad_norm": 1.0},
    }
    if kind == "sft":
        augment = {"gain": 0.2, "time_mask": 4}
        if "kept" in options:
            augment = dict.fromkeys(("gain", "time_mask", "frequency_mask"), 0)
        own = {"steps": steps, "replay": 0.25, "augment": augment}
        if "filtered" in options:
            own["filters"] = {"min_audio_effect": 0.0}
        return SFTConfig.model_validate({**shared, **own, **changes})
    if kind == "pretrain":
        del shared["policy"], shared["lora"]
        shape = {"d_model": 32, "heads": 2, "audio_layers": 1, "text_layers": 1, "mel_bins": 32, "clip_s": 1}
        own = {"steps": steps, "model": shape}
        if "tags" in options:
            own |= {"model": "policy", "prompt_format": "tags_released", "train": ["projector", "new_tokens"]}
            own["trl"] = {**shared["trl"], "weight_decay": 0.1}
        return PretrainConfig.model_validate({**shared, **own, **changes})
    if kind == "grpo":
        own = {
            "steps": steps,
            "prompts": {"tasks": ["caption"]},
            "reward": {"format": {"pattern": ".*[aeiou].*"}, "length": {"max_chars": 6}},
            "answers": 4,
            "max_new_tokens": 8,
            "replay": {"weight": 0.5},
            "beta": 0.0 if "ddp" in options else 0.05,
            "iterations": 2 if "twice" in options else 1,
            "engine": "vllm" if "vllm" in options else "transformers",
        }
        return GRPOConfig.model_validate({**shared, **own, **changes})
    if kind == "kto":
        own = {"labels": "labels", "epochs": (steps * batch - 0.5) / 48}
        return KTOConfig.model_validate({**shared, **own, **changes})
    held_out = 0 if "once" in options else 3  # pairs of 24
    own = {"pairs": "pairs", "epochs": (steps * batch - 0.5) / (24 - held_out), "held_out": held_out / 24}
    return DPOConfig.model_validate({**shared, **own, **changes})


def run_here(config, world, folder):
    """Run the stage in this process; returns its metrics."""
    from align.run_folder.artifacts import StageFolder

    out = StageFolder(Path(folder), "stage", "fingerprint")
    out.path.mkdir(parents=True, exist_ok=True)
    inputs = {name: Path(world) / name for name in ("corpus", "policy", "pairs", "labels")}
    return importlib.import_module(f"align.stages.{config.stage}").run(config, inputs, out)


def stage(folder):
    """Where the stage of `run_here` writes."""
    return Path(folder) / ".partial-stage"


def weights(folder):
    """Of the policy that it has published."""
    from safetensors.torch import load_file

    return load_file(stage(folder) / "model" / "model.safetensors")


def rows_of(folder):
    """What it has logged about training."""
    from align.run_folder.artifacts import read_metrics

    return [row for row in read_metrics(stage(folder) / "metrics.jsonl") if "loss" in row]


def trace(path, stop_before=None):
    """Log what every step of this process is trained on; optionally ask for a stop in the middle."""
    import torch

    from align.run_folder.artifacts import stop_requested
    from align.training.trainers import AudioTrainer

    def digest(tensor):
        return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:12]

    def logged(trainer, model, inputs, *args, **kwargs):
        step = trainer.state.global_step + 1
        if isinstance(inputs, list):  # prompts that are to be completed
            rows, clips = [str(row["prompt"]["draw"]) for row in inputs], []
        else:
            rows = [
                digest(ids[mask.bool()])
                for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ]
            # What the shortest clip has: a packed batch is as wide as its longest clip needs
            clips = [
                digest(torch.round(clip[:, :14], decimals=3)) for clip in inputs.get("input_features", ())
            ]
        with path.open("a") as file:
            file.write(json.dumps({"step": step, "rows": rows, "clips": clips}) + "\n")
        if step == stop_before:
            stop_requested.set()
        return stock(trainer, model, inputs, *args, **kwargs)

    stock = getattr(AudioTrainer.training_step, "stock", AudioTrainer.training_step)
    logged.stock = stock
    AudioTrainer.training_step = logged


def read_trace_of(folder, rank):
    """Step -> row of one rank's trace; the last attempt at a step counts."""
    lines = (Path(folder) / f"trace-{rank}.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


def read_trace(folder, ranks):
    """Step -> (rows, clips) of the whole batch, rank after rank."""
    own = [read_trace_of(folder, rank) for rank in range(ranks)]
    joined = {step: [one[step] for one in own] for step in own[0]}
    return {
        step: tuple([item for row in rows for item in row[key]] for key in ("rows", "clips"))
        for step, rows in joined.items()
    }


def run_case(case, world, out, rank, stop_before=None):
    """One case on this rank; leaves `finished` behind."""
    from align.run_folder.artifacts import Interrupted, stop_requested
    from align.training import preparation

    config, folder = make_config(case), out / case
    strategy = config.hardware.strategy if config.hardware else "ddp"
    folder.mkdir(parents=True, exist_ok=True)
    if stop_before:
        folder = out / f"{case}-resumed"
        folder.mkdir(exist_ok=True)
        trace(folder / f"trace-{rank}.jsonl", stop_before)
        preparation.prepare_process(strategy)
        try:
            run_here(config, world, folder)
        except Interrupted:
            stop_requested.clear()
        forget_accelerate()
        if rank == 0:
            shutil.copytree(folder, out / f"{case}-stopped")
    trace(folder / f"trace-{rank}.jsonl")
    preparation.prepare_process(strategy)
    run_here(config, world, folder)
    forget_accelerate()
    if rank == 0:
        (folder / "finished").touch()


def forget_accelerate():
    """Accelerate and DeepSpeed settle their state once per process; a stage has a process of its own."""
    from accelerate.state import AcceleratorState
    from torch import distributed

    if distributed.is_initialized():
        distributed.barrier()
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    gc.collect()
    gc.freeze()  # what is left, modules above all, need not be looked through in each collection


def main(world, out, *cases):
    from torch import distributed

    rank = int(os.environ.get("RANK", "0"))
    if "RANK" in os.environ:
        distributed.init_process_group("gloo", timeout=timedelta(seconds=240))
    for case in cases:
        name, _, stop = case.partition("@")
        run_case(name, world, Path(out), rank, int(stop or 0))
    if distributed.is_initialized():
        distributed.barrier()
    os._exit(0)  # DeepSpeed's threads now and then abort an orderly exit after everything is done


if __name__ == "__main__":
    main(*sys.argv[1:])
