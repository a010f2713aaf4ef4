"""How fast clips become features, and a manifest of a million rows a corpus. For a person to run.

    python -m tests.benchmarks.input_pipeline [--rows 1000000] [--clips 40] [--out runs/bench/input.json]

Clips per second are those of one core: process time of `ClipFeatures` (decode, resample, 128 mel bins as
Qwen2-Audio has them), without a cache. Beside them stands what one H200 takes in training: estimates for 65 %
of its peak, to be replaced when they were measured. The manifest's part needs 1 KB of disk a row.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from preference_data.audio.tar_shards import write_shards

H200_CLIPS_PER_S = {30: 14, 5: 90}
"""By seconds of a clip: estimates for LoRA DPO of long clips and LoRA SFT of short ones."""
FORMATS = {  # container, coding, sampling rate in Hz, channels
    "WAV 16 kHz mono": ("WAV", "PCM_16", 16_000, 1),
    "FLAC 16 kHz mono": ("FLAC", "PCM_16", 16_000, 1),
    "MP3 16 kHz mono": ("MP3", "MPEG_LAYER_III", 16_000, 1),
    "WAV 44.1 kHz stereo": ("WAV", "PCM_16", 44_100, 2),
    "FLAC 44.1 kHz stereo": ("FLAC", "PCM_16", 44_100, 2),
    "MP3 48 kHz mono": ("MP3", "MPEG_LAYER_III", 48_000, 1),
}
_PART = "a part of this benchmark, in a process of its own"


# -------------------------------------------------------------------------- clips -> features


def sound(rng: np.random.Generator, seconds: float, rate: int, channels: int) -> np.ndarray:
    """Something between speech and music: a gliding voice with harmonics and breath. (n, channels)."""
    t = np.arange(int(seconds * rate)) / rate
    pitch = np.cumsum(120 + 40 * np.sin(2 * np.pi * rng.uniform(0.5, 2) * t)) / rate
    voice = sum(np.sin(2 * np.pi * k * pitch) / k for k in range(1, 12))
    loud = 0.1 * (1 + np.sin(2 * np.pi * 3 * t))
    return loud[:, None] * voice[:, None] + rng.normal(0, 0.01, (len(t), channels))


def written(folder: Path, form: tuple[str, str, int, int], seconds: float, n: int) -> list[str]:
    """Names of `n` clips of a format."""
    container, coding, rate, channels = form
    rng = np.random.default_rng(0)
    names = [f"{container}-{rate}-{seconds:g}-{i}.{container.lower()}" for i in range(n)]
    for name in names:
        samples = sound(rng, seconds, rate, channels)
        soundfile.write(folder / name, samples, rate, format=container, subtype=coding)
    return names


def in_shards(folder: Path, names: list[str]) -> list[str]:
    """The same clips in a tar."""
    samples = ((name.rpartition(".")[0].replace(".", "_"), name) for name in names)
    members = ((key, {"flac": (folder / name).read_bytes()}) for key, name in samples)
    shards = folder / f"{names[0]}.shards"
    return [f"{shards.name}/{shard}/{key}.flac" for key, shard in write_shards(shards, members)]


def speed(features: Any, paths: list[str]) -> dict[str, float]:
    """Clips per second of process time: decoding alone, and with mel features in batches of 8."""
    from preference_data.audio import decode
    from preference_data.dataset.dataset import Dataset

    root = Dataset(features.root)
    features(paths[:2])
    begun = time.process_time()
    for path in paths:
        decode.load(root.find(path), max_duration_s=30)
    decoded = time.process_time() - begun
    begun = time.process_time()
    for start in range(0, len(paths), 8):
        features(paths[start : start + 8])
    both = time.process_time() - begun
    return {"decode": len(paths) / decoded, "decode + mel": len(paths) / both}


def speeds(n: int) -> dict[str, dict[str, float]]:
    """Of every format and length."""
    import torch

    from align.models.features import ClipFeatures
    from align.models.qwen2_audio import model as qwen2_audio

    torch.set_num_threads(1)
    processor = qwen2_audio.build_processor(["x"], vocab_size=300, mel_bins=128, hop_length=160, clip_s=30)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        features = ClipFeatures(processor, Path(folder), cache_bytes=0)
        for seconds in (5, 10, 30):
            for name, form in FORMATS.items():
                paths = written(Path(folder), form, seconds, n)
                found[f"{name}, {seconds} s"] = speed(features, paths)
                if name == "FLAC 16 kHz mono":
                    members = in_shards(Path(folder), paths)
                    found[f"{name} in tar shards, {seconds} s"] = speed(features, members)
    return found


# -------------------------------------------------------------------------- a large manifest


def make_data_set(folder: Path, name: str, n: int) -> None:
    """`n` tiny clips in tar shards and an example of each; the same bytes in all of them."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(200), 16_000, format="WAV", subtype="PCM_16")
    data = file.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    (folder / "shards").mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps({"name": name, "root": "shards"}))
    members = ((f"{name}{i:08d}", {"wav": data}) for i in range(n))
    text = "he hoped there would be stew for dinner turnips and carrots and bruised potatoes and fat mutton"
    with (folder / "clips.jsonl").open("w") as clips, (folder / "pretrain.jsonl").open("w") as examples:
        for key, shard in write_shards(folder / "shards", members, max_bytes=1 << 24):
            path = f"{shard}/{key}.wav"
            clip = {"id": key, "path": path, "split": "train", "duration_s": 0.0125, "sha256": digest}
            clips.write(json.dumps({**clip, "speaker": f"s{hash(key) % 2000}", "source": name}) + "\n")
            example = {"id": key, "audios": [path], "task": "transcribe", "text": text}
            examples.write(json.dumps(example) + "\n")


def mix_part(folder: Path) -> dict[str, Any]:
    """Check and mix two data sets."""
    from preference_data.dataset.mixture import MixturePart, mix

    return mix(
        folder / "corpus",
        [MixturePart(folder / "large"), MixturePart(folder / "small")],
        temperature=2.0,
        seed=0,
        max_duration_s=30,
        max_bad_fraction=0.01,
    )


def order_part(folder: Path) -> dict[str, Any]:
    """Draw 100,000 examples of the mixture as training does, and read their rows."""
    from align.training.data_loading import Examples, Part
    from preference_data.dataset.dataset import Dataset
    from preference_data.schema import TaskExample

    begun = time.process_time()
    parts = [Part(*part, _row) for part in Dataset(folder / "corpus").parts(TaskExample)]
    opened = time.process_time() - begun
    examples = Examples(parts, 10_000_000, seed=0)
    begun = time.process_time()
    small = sum(examples[n]["source"] == "small" for n in range(100_000))
    drawn = time.process_time() - begun
    return {"open_s": opened, "us_per_row": drawn * 10, "share_of_small": small / 100_000}


def _row(example: Any) -> dict[str, Any]:
    return {"completion": example.text, "audios": list(example.audios)}


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {"mix": mix_part, "order": order_part}


def run_part(name: str, folder: Path) -> dict[str, Any]:
    """One part with its process time in seconds, wall time, and largest resident memory in MB."""
    wall, begun = time.perf_counter(), time.process_time()
    found = PARTS[name](folder)
    status = Path("/proc/self/status").read_text()  # getrusage would tell of the parent's memory
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return {
        **found,
        "process_s": time.process_time() - begun,
        "wall_s": time.perf_counter() - wall,
        "peak_rss_mb": peak,
    }


def large_manifest(rows: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each part's findings, each from a fresh process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data_set(folder / "large", "large", rows - rows // 10)
        make_data_set(folder / "small", "small", rows // 10)
        for part in PARTS:
            command = [sys.executable, "-m", "tests.benchmarks.input_pipeline", "--part", part, name]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            yield part, json.loads(told.splitlines()[-1])


# -------------------------------------------------------------------------- report


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/input.json"))
    parser.add_argument("--part", nargs=2, help=_PART)
    asked = parser.parse_args()
    if asked.part:
        print(json.dumps(run_part(asked.part[0], Path(asked.part[1]))))
        return
    found = speeds(asked.clips) if asked.clips else {}
    print(f"{'clips/s of one core':40}   decode   decode + mel   an H200 takes (estimate)")
    for name, one in found.items():
        wanted = next((n for s, n in H200_CLIPS_PER_S.items() if name.endswith(f", {s} s")), None)
        told = f"{wanted:3} = {wanted / one['decode + mel']:.1f} cores" if wanted else ""
        print(f"{name:40} {one['decode']:8.0f} {one['decode + mel']:14.0f}   {told}", flush=True)
    manifest = dict(large_manifest(asked.rows))
    for part, one in manifest.items():
        print(
            part, {key: round(value, 1) if isinstance(value, float) else value for key, value in one.items()}
        )
    about = {
        "command": " ".join(["python -m tests.benchmarks.input_pipeline", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "soundfile", "soxr")},
    }
    report = {**about, "h200_clips_per_s": H200_CLIPS_PER_S, "clips_per_s": found, "manifest": manifest}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
