"""Real training stages on a Qwen2-Audio of a few thousand parameters, alone or as one of several ranks.

    torchrun --nproc_per_node 2 tests/align/tiny_training.py WORLD OUT sft-ddp dpo-zero3-lora ...

runs each case on two processes and leaves its stage folder in OUT/<case>.
"""

import gc
import os
import sys
from pathlib import Path

STEPS, BATCH = 20, 4
TEXTS = [
    "system\nYou are a helpful assistant.\n",
    "user\nAudio 1: \nAudio 2: \n",
    "assistant\n",
    "Is the tone high or low?",
    "The tone is high. The tone is low. Say something.",
    "Generate the caption in English: A low tone.",
]


def make_world(root):
    """A policy, tones, chats, pre-training targets and pairs. Two of three chats are without audio."""
    import numpy as np
    import soundfile

    from align.artifacts import sha256_file
    from align.models import qwen2_audio
    from preference_data import store
    from preference_data.schema import AudioClip, Chat, PreferencePair, TaskExample, Turn

    processor = qwen2_audio.build_processor(TEXTS * 20, vocab_size=400, mel_bins=32, hop_length=320, clip_s=1)
    model = qwen2_audio.build_model(processor, d_model=32, heads=2, audio_layers=1, text_layers=2, seed=0)
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
    for i in range(24):
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
    return root


def make_config(case, *, steps=STEPS, save_steps=10, **changes):
    """The config of a case `sft|dpo[-ddp|-zero2|-zero3][-lora]`; without a strategy it is one process'."""
    from align.config import DPOConfig, SFTConfig

    kind, *options = case.split("-")
    shared = {
        "stage": kind,
        "corpus": "corpus",
        "policy": "policy",
        "learning_rate": 1e-3,
        "batch_size": BATCH,
        "save_steps": save_steps,
        "hardware": {"workers": 2, "strategy": options[0]} if options and options[0] != "lora" else None,
        "lora": {"r": 4, "alpha": 8} if "lora" in options else None,
        "trl": {"logging_steps": 1, "max_grad_norm": 1.0},
    }
    if kind == "sft":
        augment = {"gain": 0.2, "time_mask": 4}
        own = {"steps": steps, "replay": 0.25, "augment": augment}
        return SFTConfig.model_validate({**shared, **own, **changes})
    own = {"pairs": "pairs", "epochs": steps * BATCH / 24}
    return DPOConfig.model_validate({**shared, **own, **changes})


def run_here(config, world, folder):
    """Run the stage in this process; returns its metrics."""
    from align.artifacts import StageFolder
    from align.stages import dpo, sft

    out = StageFolder(Path(folder), "stage", "fingerprint")
    out.path.mkdir(parents=True, exist_ok=True)
    inputs = {name: Path(world) / name for name in ("corpus", "policy", "pairs")}
    return (sft if config.stage == "sft" else dpo).run(config, inputs, out)


def main(world, out, *cases):
    from accelerate.state import AcceleratorState
    from torch import distributed

    from align.training import strategies

    distributed.init_process_group("gloo")
    for case in cases:
        config = make_config(case)
        strategies.begin(config.hardware.strategy)
        run_here(config, world, Path(out) / case)
        distributed.barrier()
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
        gc.collect()
        if distributed.get_rank() == 0:
            (Path(out) / case / "finished").touch()
    distributed.barrier()
    os._exit(0)  # DeepSpeed's threads now and then abort an orderly exit after everything is done


if __name__ == "__main__":
    main(*sys.argv[1:])
