"""A folder that plain transformers loads, and the proof that it does.

Tensors have their names on the Hub, whatever the names they were saved under. What older readers look for
under other names (transformers 4, on which serving engines may stand) is written beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from align.models import shards
from align.models.chat import encode_prompt, user
from align.models.features import Clip, stack
from align.models.qwen2_audio.clips import expand_clips
from align.models.qwen2_audio.model import hub_name
from align.run_folder.artifacts import read_json, write_json
from preference_data.audio.decode import SAMPLE_RATE

QUESTION = "What do you hear?"
_ALONE = Path(__file__).with_name("loads_alone.py")
_TOLERANCE = {torch.float32: 1e-5}
"""Allowed difference as a share of the largest logit; other types round more, see `_COARSE`."""
_COARSE = 2e-2


class DoesNotLoad(RuntimeError):
    """Plain transformers does not load what was written, or computes something else with it."""


class Loaded(NamedTuple):
    """What plain transformers computed: largest difference of the logits, and the largest logit."""

    difference: float
    largest: float


def merged(model: Path | str, adapters: Sequence[Path]) -> Qwen2AudioForConditionalGeneration:
    """A saved model in the dtype it was saved in, with adapters merged into it in this order.

    Raises:
        FileNotFoundError: an adapter without safetensors.
    """
    policy = Qwen2AudioForConditionalGeneration.from_pretrained(model, dtype="auto", use_safetensors=True)
    for adapter in adapters:
        if not (adapter / "adapter_model.safetensors").exists():
            raise FileNotFoundError(
                f"{adapter} holds no adapter_model.safetensors; pickled ones are not read"
            )
        policy = PeftModel.from_pretrained(policy, str(adapter)).merge_and_unload(safe_merge=True)
    return policy.eval()


def write(model: Qwen2AudioForConditionalGeneration, processor: Qwen2AudioProcessor, folder: Path) -> None:
    """Write weights, config, generation config, processor and chat template into an existing folder."""
    shards.write(((hub_name(name), tensor) for name, tensor in model.state_dict().items()), folder)
    model.config.architectures = ["Qwen2AudioForConditionalGeneration"]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.feature_extractor.save_pretrained(folder)  # older readers: preprocessor_config.json
    config = read_json(folder / "config.json")
    config["torch_dtype"] = config["dtype"]
    config["text_config"]["rope_theta"] = config["text_config"]["rope_parameters"]["rope_theta"]
    write_json(folder / "config.json", config)


def verify(
    model: Qwen2AudioForConditionalGeneration, processor: Qwen2AudioProcessor, folder: Path, scratch: Path
) -> Loaded:
    """Load the folder in a fresh Python with transformers alone; compare logits on a clip and a question.

    Args:
        model: what the folder must equal, in this process.
        processor: likewise.
        folder: as `write` left it.
        scratch: an existing folder for the comparison's files.

    Raises:
        DoesNotLoad: with what the fresh Python said.
    """
    wave = _sweep()
    ids, logits = _answer(model, processor, wave)
    save_file({"wave": torch.from_numpy(wave), "ids": ids, "logits": logits}, scratch / "probe.safetensors")
    (scratch / "question.txt").write_text(QUESTION, encoding="utf-8")
    command = [sys.executable, "-I", str(_ALONE), str(folder.resolve()), str(scratch.resolve())]
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        command, cwd=scratch, env={**os.environ, **quiet}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise DoesNotLoad(f"{folder} does not load in plain transformers: {done.stderr.strip()[-2000:]}")
    report = json.loads(done.stdout.splitlines()[-1])
    loaded = Loaded(report["difference"], float(logits.abs().max()))
    allowed = _TOLERANCE.get(model.dtype, _COARSE) * loaded.largest
    if report["names"] or not report["same_ids"] or not loaded.difference <= allowed:
        raise DoesNotLoad(
            f"{folder} loads in plain transformers as something else: logits differ by "
            f"{loaded.difference:.3g} (allowed {allowed:.3g}), same tokens: {report['same_ids']}, names "
            f"without a place or missing: {', '.join(report['names'][:5]) or 'none'}"
        )
    return loaded


def _sweep() -> np.ndarray:
    """A second of a rising tone: a clip that no model has learned to ignore."""
    seconds = np.arange(SAMPLE_RATE, dtype=np.float32) / SAMPLE_RATE
    wave: np.ndarray = (0.3 * np.sin(2 * np.pi * (200 + 1500 * seconds) * seconds)).astype(np.float32)
    return wave


def _answer(
    model: Qwen2AudioForConditionalGeneration, processor: Qwen2AudioProcessor, wave: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Token ids (1, T) and logits (1, T, V) of the question about the clip, our way."""
    features = processor.feature_extractor(
        wave, sampling_rate=SAMPLE_RATE, padding="max_length", return_attention_mask=True, return_tensors="pt"
    )
    mel = features["input_features"][0]
    clip = Clip(mel, n_frames=int(features["attention_mask"].sum()), n_padded=mel.shape[-1])
    encoded = expand_clips(processor, encode_prompt(processor, [user(QUESTION, 1)]), [clip])
    ids = torch.tensor([encoded.ids])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **stack([clip])).logits
    return ids, logits.float()
