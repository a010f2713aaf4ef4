"""How much memory, disk and time training takes, by arithmetic on shapes. Imports no torch.

Bytes per parameter follow ZeRO (arXiv:1910.02054, section 3): in bfloat16 training each learned parameter
costs 2 (weight) + 2 (gradient) + 12 (float32 weight and Adam's two moments). Activations are those that
autograd keeps of a layer with fused attention, in the precision that a strategy trains in; within a tenth
of what it does keep (tests/align/test_estimate.py). What is not counted: CUDA's own memory and
fragmentation, which `OVERHEAD` stands for. A run that must fit tightly has to be tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

Strategy = Literal["ddp", "zero2", "zero3", "fsdp2"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero2", "zero3", "fsdp2")
OVERHEAD = 3e9
"""Bytes per process: CUDA context, NCCL buffers, the vocabulary head's tiles, fragmentation; on a CPU the
interpreter and its libraries. An assumption."""
LIVE_PARAMETERS = 1e9
"""That ZeRO-3 keeps gathered at a time (DeepSpeed's stage3_max_live_parameters)."""
PEAK_FLOPS = 989e12
"""Of an H100 or H200, dense bfloat16 (NVIDIA's data sheet)."""
MFU = 0.35
"""Share of the peak that training reaches: an assumption until it is measured."""
SAMPLE_RATE = 16_000


class Shape(NamedTuple):
    """Of a Qwen2-Audio; the defaults are Qwen2-Audio-7B's."""

    mel_bins: int = 128
    audio_width: int = 1280
    audio_layers: int = 32
    audio_ffn: int = 5120
    positions: int = 1500
    """Of the audio tower, two mel frames each; every clip is padded to them."""
    vocab: int = 156_032
    width: int = 4096
    layers: int = 32
    ffn: int = 11_008
    heads: int = 32
    kv_heads: int = 32
    hop_length: int = 160

    @property
    def head_width(self) -> int:
        """Of one attention head."""
        return self.width // self.heads

    def audio_tokens(self, seconds: float) -> int:
        """Of a clip: one per four mel frames."""
        return min(self.positions // 2, int(seconds * SAMPLE_RATE / self.hop_length) // 4)


class Parameters(NamedTuple):
    """Counts by part; the language model's with its head."""

    audio_tower: int
    projector: int
    language_model: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)

    def of(self, parts: Sequence[str] | None) -> int:
        """Of the named parts; None is all."""
        return self.total if parts is None else sum(getattr(self, part) for part in parts)


class Job(NamedTuple):
    """What one GPU does in one forward and backward pass, and what learns.

    `parts` are names of `Parameters`' fields, None for all; with `lora_rank` only low-rank updates of the
    language model and the projector learn. `sequences` counts both answers of a preference pair.
    """

    sequences: int
    clips: int
    audio_tokens: int
    """Per clip."""
    text_tokens: int
    """Per sequence."""
    parts: tuple[str, ...] | None = None
    lora_rank: int | None = None
    frozen_bytes: float = 2
    """Per frozen parameter: 2 in bfloat16, about 0.6 in 4 bits."""
    element_bytes: int = 2
    """Of a number in a matrix product: 2 in bfloat16, 4 in float32, as on a CPU."""
    with_reference: bool = False
    """A second, frozen model beside the one that learns."""
    recomputed: int = 0
    """Activation checkpointing: so many layers are computed again in the backward pass. They are the first
    in the order of the forward pass (the audio tower's if it learns, then the language model's): what they
    need while they are computed again is free by then."""
    packed: bool = False
    """Clips are encoded as long as they are, not padded to what the model hears."""
    answers: int = 1
    """To a prompt that is computed once: 2 for packed pairs. Attention copies its keys for each."""

    def as_pair(self) -> Job:
        """Of one example: two answers to its prompt; packed, they share prompt and clips."""
        if self.packed:
            return self._replace(sequences=2, answers=2)
        return self._replace(sequences=2, clips=2 * self.clips)

    def times(self, n: int) -> Job:
        """`n` such examples at once."""
        return self._replace(sequences=n * self.sequences, clips=n * self.clips)


class Memory(NamedTuple):
    """Bytes per GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """With the overhead."""
        return sum(self) + OVERHEAD

    @property
    def standing(self) -> float:
        """All but the activations: what is there before the first example."""
        return self.total - self.activations


# -------------------------------------------------------------------------- shapes


def shape_of_config(config: Mapping[str, Any]) -> Shape:
    """Of a Qwen2-Audio's config.json; what it leaves out is the default of transformers' classes."""
    return joined(config.get("audio_config") or {}, config.get("text_config") or {})


def joined(audio: Mapping[str, Any], text: Mapping[str, Any]) -> Shape:
    """Of an audio tower (or a Whisper) and a language model, by their config.json."""
    fields = {
        "mel_bins": audio.get("num_mel_bins"),
        "audio_width": audio.get("d_model"),
        "audio_layers": audio.get("encoder_layers"),
        "audio_ffn": audio.get("encoder_ffn_dim"),
        "positions": audio.get("max_source_positions"),
        "vocab": text.get("vocab_size"),
        "width": text.get("hidden_size"),
        "layers": text.get("num_hidden_layers"),
        "ffn": text.get("intermediate_size"),
        "heads": text.get("num_attention_heads"),
        "kv_heads": text.get("num_key_value_heads", text.get("num_attention_heads")),
    }
    return Shape(**{name: value for name, value in fields.items() if value is not None})


# -------------------------------------------------------------------------- parameters


def parameters(shape: Shape) -> Parameters:
    """How many a Qwen2-Audio of this shape has; 8,397,094,912 for the 7B."""
    d, f, h = shape.audio_width, shape.audio_ffn, shape.width
    attention = 4 * d * d + 3 * d  # the key has no bias
    encoder_layer = attention + 2 * d * f + f + d + 4 * d
    tower = 3 * shape.mel_bins * d + d + 3 * d * d + d + shape.positions * d
    tower += shape.audio_layers * encoder_layer + 2 * d
    decoder_layer = _linear(shape) + h + 2 * shape.kv_heads * shape.head_width + 2 * h  # biases, norms
    language = 2 * shape.vocab * h + shape.layers * decoder_layer + h
    return Parameters(tower, d * h + h, language)


def _linear(shape: Shape) -> int:
    """Weights of a decoder layer's linear maps."""
    h, kv = shape.width, shape.kv_heads * shape.head_width
    return 2 * h * h + 2 * h * kv + 3 * h * shape.ffn


def lora_parameters(shape: Shape, rank: int) -> int:
    """Of low-rank updates of every linear map in the language model's layers, and of the projector."""
    h, kv, f = shape.width, shape.kv_heads * shape.head_width, shape.ffn
    per_layer = 2 * (h + h) + 2 * (h + kv) + 3 * (h + f)
    return rank * (shape.layers * per_layer + shape.audio_width + h)


def trained(shape: Shape, job: Job) -> int:
    """Parameters that learn. The tower's positions never do, but they are counted: they are few."""
    if job.lora_rank is not None:
        return lora_parameters(shape, job.lora_rank)
    if job.parts is None or "new_tokens" not in job.parts:
        return parameters(shape).of(job.parts)
    # A few rows do, but gradients and optimizer states are those of both tables
    others = [part for part in job.parts if part != "new_tokens"]
    return parameters(shape).of(others) + 2 * shape.vocab * shape.width


def _learns(part: str, job: Job) -> bool:
    """Whether a part's own weights do."""
    return job.lora_rank is None and (job.parts is None or part in job.parts)


# -------------------------------------------------------------------------- memory


def memory(shape: Shape, job: Job, strategy: Strategy, gpus: int, offload: str = "none") -> Memory:
    """Bytes per GPU.

    Args:
        shape: of the model.
        job: what one GPU does.
        strategy: ddp keeps everything everywhere, with float32 weights for what learns; zero2 spreads
            optimizer and gradients over the GPUs, zero3 and fsdp2 the weights, too.
        gpus: over which things are spread.
        offload: `optimizer` moves its states to host memory, `all` the weights as well.
    """
    learn = trained(shape, job)
    whole = parameters(shape).total
    frozen = (whole if job.lora_rank is not None else whole - learn) * job.frozen_bytes
    reference = job.element_bytes * whole if job.with_reference else 0
    if strategy == "ddp":  # autocast keeps bfloat16 copies beside the float32 weights
        own = 6 if _autocast(job, strategy) else 4
        copies = 2 if gpus > 1 else 1  # gradients wait in buckets of their size
        weights, gradients = own * learn + frozen + reference, 4.0 * learn * copies
        optimizer = 8.0 * learn
    elif strategy == "fsdp2":
        weights = (4 * learn + frozen + reference) / gpus + _gathered(shape, job)
        gradients, optimizer = 4 * learn / gpus, 8 * learn / gpus
    else:
        n = gpus if strategy == "zero3" else 1
        weights = (job.element_bytes * learn + frozen + reference) / n
        if strategy == "zero3":
            weights = (0 if offload == "all" else weights) + _gathered(shape, job)
        gradients = job.element_bytes * learn / gpus
        optimizer = 0 if offload != "none" else 12 * learn / gpus
    return Memory(weights, gradients, optimizer, activations(shape, job, strategy))


def _gathered(shape: Shape, job: Job) -> float:
    return job.element_bytes * min(LIVE_PARAMETERS, parameters(shape).total)


def layers(shape: Shape, job: Job) -> int:
    """Those that keep activations: the language model's, and the audio tower's if it learns."""
    return shape.layers + (shape.audio_layers if _learns("audio_tower", job) else 0)


def recomputed(shape: Shape, job: Job) -> tuple[int, int]:
    """How many layers of the audio tower, and of the language model, are computed again."""
    of_tower = min(job.recomputed, layers(shape, job) - shape.layers)
    return of_tower, job.recomputed - of_tower


def activations(shape: Shape, job: Job, strategy: Strategy = "ddp") -> float:
    """Bytes that autograd keeps between the forward and the backward pass.

    Of a layer that is computed again that is what goes into it. The last one of all would be computed
    again at once, with its own activations beside its input: nothing is saved there.
    """
    again_tower, again = recomputed(shape, job)
    tokens = job.sequences * job.text_tokens + job.clips * job.audio_tokens
    into = _stream_bytes("language_model", job, strategy) * shape.width
    own = decoder_bytes(shape, job, strategy)
    last_norm = shape.width * 4 + _learns("language_model", job) * into
    kept = tokens * (again * into + max(shape.layers - again, 1) * own + last_norm)
    if _learns("audio_tower", job):
        into = _stream_bytes("audio_tower", job, strategy) * shape.audio_width
        own = encoder_bytes(shape, job, strategy)
        frames = job.clips * _frames(shape, job)
        convolutions = 5 * shape.audio_width * job.element_bytes  # at twice the frames, then at as many
        kept += frames * (again_tower * into + (shape.audio_layers - again_tower) * own + convolutions)
    return kept


def _frames(shape: Shape, job: Job) -> int:
    """Of a clip in the audio tower; two become one token."""
    return 2 * job.audio_tokens if job.packed else shape.positions


def _autocast(job: Job, strategy: Strategy) -> bool:
    """Whether weights that learn are float32 and every product casts what it reads; ZeRO's are bfloat16."""
    return job.element_bytes == 2 and strategy in ("ddp", "fsdp2")


def _stream_bytes(part: str, job: Job, strategy: Strategy) -> int:
    """Of a number between two layers of a part."""
    return 4 if _autocast(job, strategy) and _learns(part, job) else job.element_bytes


def decoder_bytes(shape: Shape, job: Job, strategy: Strategy = "ddp") -> float:
    """Kept per token of a decoder layer.

    Of two norms the input in float32 (they compute in it) and, where their weights learn, it scaled (h
    each). Of each linear map that learns, or has a low-rank update, its input: one for q, k and v and one
    for gate and up (h each), but a copy for each of them under autocast; the output's is what attention
    gives. Of attention queries and result (h each), keys and values (kv each, as often as they are copied).
    Of the gated MLP gate, up, their activation (f each) and the input of its last map (f).
    """
    h, kv, size = shape.width, shape.kv_heads * shape.head_width, job.element_bytes
    learns, lora = _learns("language_model", job), job.lora_rank is not None
    norms = 2 * h * (4 + learns * _stream_bytes("language_model", job, strategy))
    inputs = h * (5 + lora if _autocast(job, strategy) else 2) * (learns or lora)
    copies = 1 + job.answers if job.answers > 1 else 1
    attention = 2 * h + 2 * kv * copies
    return norms + size * (inputs + attention + shape.ffn * (3 + (learns or lora)))


def encoder_bytes(shape: Shape, job: Job, strategy: Strategy = "ddp") -> float:
    """Kept per frame of an encoder layer that learns: as `decoder_bytes`, with layer norms and a plain MLP.

    Norms keep their input alone (d each), attention q, k, v and result (4 d), the MLP two (f each).
    """
    d, size = shape.audio_width, job.element_bytes
    norms = 2 * d * _stream_bytes("audio_tower", job, strategy)
    inputs = d * (4 if _autocast(job, strategy) else 2)
    return norms + size * (inputs + 4 * d + 2 * shape.audio_ffn)


# -------------------------------------------------------------------------- disk and time


def checkpoint_bytes(shape: Shape, job: Job, strategy: Strategy) -> float:
    """One checkpoint: weights, and the optimizer's state of what learns."""
    learn, whole = trained(shape, job), parameters(shape).total
    if job.lora_rank is not None:
        return 12.0 * learn  # the adapter alone, in float32
    if strategy in ("zero2", "zero3"):
        return 2.0 * whole + 12.0 * learn
    return 2.0 * (whole - learn) + 12.0 * learn


def flops(shape: Shape, job: Job) -> float:
    """Of one forward and backward pass on one GPU: 2 per weight and token forward, as much for each gradient.

    A frozen part still passes the gradient on to what lies before it, unless nothing there learns.
    """
    tokens = job.sequences * job.text_tokens + job.clips * job.audio_tokens
    length = tokens / job.sequences
    maps = shape.layers * _linear(shape) * tokens
    attention = shape.layers * length * shape.width * tokens  # causal: half of 2 x length x width
    head = job.sequences * job.text_tokens * shape.vocab * shape.width
    language = 2.0 * (maps + attention + head)
    tower = 2.0 * parameters(shape).audio_tower * job.clips * _frames(shape, job)
    again_tower, again = recomputed(shape, job)
    backward = 2 if _learns("language_model", job) else 1
    total = language * (1 + again / shape.layers + backward)
    total += tower * (3 + again_tower / max(1, shape.audio_layers) if _learns("audio_tower", job) else 1)
    if job.with_reference:
        total += language + tower
    return total


def hours(steps: int, passes: int, shape: Shape, job: Job) -> float:
    """Of `steps` optimizer steps of `passes` passes each, at the assumed share of the peak."""
    return steps * passes * flops(shape, job) / (MFU * PEAK_FLOPS) / 3600
