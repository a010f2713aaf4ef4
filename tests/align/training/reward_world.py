"""Tones, a random policy, and pairs of true and false words about them, for reward models."""

import numpy as np
import soundfile

from align.models.qwen2_audio import model as qwen2_audio
from align.recipe.config.alignment import RewardModelConfig
from align.run_folder.artifacts import StageFolder, sha256_file
from align.stages import reward
from preference_data import store
from preference_data.schema import AudioClip, PreferencePair
from tests.conftest import TEXTS

ANSWERS = {
    "Is the tone high or low?": ("The tone is high.", "The tone is low."),
    "high?": ("high", "low"),
}
N = 16


def make_world(root):
    """`policy`, `corpus` of 16 clips of which the odd ones are low, `pairs`, and `deaf`: of other clips."""
    processor = qwen2_audio.build_processor(TEXTS * 20, vocab_size=400, mel_bins=32, hop_length=320, clip_s=1)
    model = qwen2_audio.build_model(processor, d_model=32, heads=2, audio_layers=1, text_layers=1, seed=0)
    qwen2_audio.save(model, processor, root / "policy" / "model")
    (root / "corpus" / "audio").mkdir(parents=True)
    clips = []
    for i in range(N):
        t = np.arange(int(16_000 * (0.3 + 0.03 * i))) / 16_000
        wave = 0.4 * np.sin(2 * np.pi * (200 + 10 * i if i % 2 else 2500 + 50 * i) * t)
        path = root / "corpus" / "audio" / f"{i}.wav"
        soundfile.write(path, wave.astype(np.float32), 16_000)
        known = {"path": f"audio/{i}.wav", "split": "preference", "sha256": sha256_file(path)}
        clips.append(AudioClip(id=f"clip-{i}", duration_s=len(t) / 16_000, **known))
    store.write(root / "corpus" / "clips.jsonl", clips)
    heard = np.random.default_rng(0).permutation(N)
    for name, clip_of in (("pairs", range(N)), ("deaf", heard)):
        (root / name).mkdir()
        pairs = [
            PreferencePair(
                id=f"pair-{i}-{n}",
                prompt_id=f"p-{i}-{n}",
                audios=(f"audio/{clip_of[i]}.wav",),
                question=question,
                chosen=answers[i % 2],
                rejected=answers[1 - i % 2],
                axis="behaviour" if (i + n) % 3 else "factuality",
                agreement=1.0,
            )
            for i in range(N)
            for n, (question, answers) in enumerate(ANSWERS.items())
        ]
        store.write(root / name / "pairs.jsonl", pairs)
    return root


def make_config(**changes):
    """A training of 40 steps that holds out a quarter of the pairs."""
    known = {
        "stage": "reward",
        "corpus": "corpus",
        "policy": "policy",
        "pairs": "pairs",
        "learning_rate": 3e-3,
        "batch_size": 8,
        "epochs": 13,
        "held_out": 0.25,
        "save_steps": 20,
        "trl": {"logging_steps": 1},
    }
    return RewardModelConfig.model_validate({**known, **changes})


def run_here(config, world, folder):
    """Run the stage in this process; its folder and metrics."""
    out = StageFolder(folder, "5_reward", "fingerprint")
    out.path.mkdir(parents=True, exist_ok=True)
    return out.path, reward.run(
        config, {name: world / name for name in ("corpus", "policy", config.pairs)}, out
    )
