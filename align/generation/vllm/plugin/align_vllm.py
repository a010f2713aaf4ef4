"""Qwen2-Audio as vLLM has it, and what our policies need beside. Nothing here computes logits.

A general plugin: vLLM imports it in each of its processes, found by PYTHONPATH through the .dist-info folder
beside this file.

* Clips as our training takes them. Stock vLLM resamples with torchaudio (no CPU build on PyPI), silently cuts
  what is longer than the model hears, refuses the shortest clips, and lets NaN in; on a CPU a NaN clip
  spoiled the answer to the next request (4 of 4 times), whoever sent it.
* Mel features of any length. The stock check wants 3000 frames, although nothing after it needs the number: a
  model with another `chunk_length` or `hop_length` (the demo's) would end the engine at its first clip.
* LoRA on the language model, which stock Qwen2-Audio refuses and its sister audio models take.
* transformers 5's names (`model.language_model.`), as PEFT and live models have them, beside the Hub's.
* /v1/audio/transcriptions.
* Engine and workers end with the server. By themselves they outlive a killed one and keep its memory.

Not mended here: on CPUs a seeded request whose prompt is computed in chunks ends the engine (vLLM 0.32: a CPU
generator has no offset), so serve with --no-enable-chunked-prefill.
"""

import ctypes
import multiprocessing
import signal
from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from vllm import ModelRegistry
from vllm.config import ModelConfig
from vllm.config.speech_to_text import SpeechToTextConfig, SpeechToTextParams
from vllm.model_executor.models import qwen2_audio as stock
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsTranscription
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import AudioItem
from vllm.transformers_utils.processor import cached_processor_from_config
from vllm.utils.tensor_schema import TensorSchema, TensorShape

_SHORTEST_S = 0.1
_MAX_PEAK = 100.0


class AnyLength(TensorSchema):
    """Clips' mel frames (na, nmb, nf) and which of them are the clip's (na, nf)."""

    type: Literal["audio_features"]
    input_features: Annotated[torch.Tensor | list[torch.Tensor], TensorShape("na", "nmb", "nf")]
    feature_attention_mask: Annotated[torch.Tensor, TensorShape("na", "nf")]


class Clips(stock.Qwen2AudioMultiModalDataParser):
    """Decoded audio -> 16 kHz, or an error that the client sees (400)."""

    def __init__(self, *, longest_s: float, **options: Any) -> None:
        super().__init__(audio_resample_method="soxr", **options)
        self.longest_s = longest_s

    def _get_audio_with_sr(self, audio: AudioItem) -> tuple[np.ndarray, None]:
        wave, rate = super()._get_audio_with_sr(audio)
        wave = np.asarray(wave, dtype=np.float32)
        if not np.abs(wave).max(initial=0) <= _MAX_PEAK:  # NaN compares false
            raise ValueError("the clip holds samples that are not finite or far too loud")
        target = self.audio_resampler.target_sr
        wave = self.audio_resampler.resample(wave, orig_sr=rate or target)
        seconds = wave.shape[-1] / target
        if seconds > self.longest_s:
            raise ValueError(f"the clip lasts {seconds:.1f} s, the model hears {self.longest_s:g} s: cut it")
        return np.pad(wave, (0, max(0, int(_SHORTEST_S * target) - wave.shape[-1]))), None


class ProcessingInfo(stock.Qwen2AudioProcessingInfo):
    """The stock one with our clips."""

    def get_data_parser(self) -> Clips:
        """Told how long a clip may be."""
        extractor = self.get_feature_extractor()
        return Clips(
            longest_s=extractor.n_samples / extractor.sampling_rate,
            target_sr=extractor.sampling_rate,
            target_channels=self.get_target_channels(),
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )


@MULTIMODAL_REGISTRY.register_processor(
    stock.Qwen2AudioMultiModalProcessor,
    info=ProcessingInfo,
    dummy_inputs=stock.Qwen2AudioDummyInputsBuilder,
)
class Qwen2Audio(stock.Qwen2AudioForConditionalGeneration, SupportsLoRA, SupportsTranscription):
    """The stock model; see the module."""

    supported_languages: ClassVar = {"en": "English", "zh": "Chinese"}
    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper: ClassVar = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "model.audio_tower.": "audio_tower.",
            "model.multi_modal_projector.": "multi_modal_projector.",
            "lm_head.": "language_model.lm_head.",
        }
    )

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which modules hear and which speak: adapters are for the latter."""
        return MultiModelKeys.from_string_field(
            language_model="language_model.", connector="multi_modal_projector.", tower_model="audio_tower."
        )

    @classmethod
    def get_speech_to_text_config(cls, model_config: ModelConfig, task_type: str) -> SpeechToTextConfig:
        """As long as the model hears; what is longer is cut in quiet places and transcribed in turn."""
        extractor = cached_processor_from_config(model_config).feature_extractor
        return SpeechToTextConfig(
            max_audio_clip_s=extractor.chunk_length, sample_rate=extractor.sampling_rate
        )

    @classmethod
    def get_generation_prompt(cls, stt_params: SpeechToTextParams) -> dict:
        """Qwen2-Audio's pre-training prompt, or the request's own."""
        ask = f"Detect the language and recognize the speech: <|{stt_params.language or 'en'}|>"
        return {
            "prompt": "<|audio_bos|><|AUDIO|><|audio_eos|>" + (stt_params.request_prompt or ask),
            "multi_modal_data": {"audio": (stt_params.audio, stt_params.stt_config.sample_rate)},
        }

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """By the Hub's names or transformers 5's."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


def register() -> None:
    """Called by vLLM, possibly more than once in a process."""
    if multiprocessing.parent_process() is not None:
        with suppress(OSError, AttributeError):  # not Linux
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    stock.Qwen2AudioFeatureInputs = AnyLength
    ModelRegistry.register_model("Qwen2AudioForConditionalGeneration", Qwen2Audio)
