"""How much memory, disk and time training takes, by arithmetic on shapes. Imports no torch.

For `align check`: a stage itself measures what its activations take (`align.training.memory`) and takes only
`model_states` from here. Bytes per parameter follow ZeRO (arXiv:1910.02054, section 3). Activations are 0.9
to 1.4 times what autograd keeps of layers with fused attention (tests/align/planning/test_estimate.py).
CUDA's own memory and fragmentation are not counted: `OVERHEAD` stands for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

Strategy = Literal["ddp", "zero2", "zero3", "fsdp2"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
OVERHEAD = 3e9
"""Bytes per process: CUDA context, NCCL buffers, the vocabulary head's tiles, fragmentation; on a CPU the
interpreter and its libraries. An assumption."""
LIVE_PARAMETERS = 1e9
"""That ZeRO-3 keeps gathered at a time (DeepSpeed's stage3_max_live_parameters)."""
PEAK_FLOPS = 989e12
"""Of an H100 or H200, dense bfloat16 (NVIDIA's data sheet)."""
PEAK_BYTES = 3.35e12
"""Per second, of an H100's memory (NVIDIA's data sheet); an H200's is faster."""
MFU = 0.35
"""Share of the peak that training reaches: an assumption until it is measured."""
CPU_FLOPS = 50e9
"""Per second in float32 on one thread of a server: an assumption."""
CPU_OVERHEAD = 1e9
"""Bytes of the interpreter, its libraries, and clips that wait in memory. An assumption."""
SAMPLE_RATE = 16_000
POSITIONS_PER_S = 50
"""Of a Whisper's encoder."""


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
    """Counts by part; the language model's with its head.

    Few rows of `new_tokens` learn, but gradients and optimizer states are those of both tables.
    """

    audio_tower: int
    projector: int
    language_model: int
    new_tokens: int

    @property
    def total(self) -> int:
        """Of the model; the new tokens are among the language model's."""
        return self.audio_tower + self.projector + self.language_model


class Workload(NamedTuple):
    """One example with its forward and backward pass, and what learns from it.

    `parts` are names of `Parameters`' fields, None for all; with `lora_rank` only low-rank updates of the
    language model and the projector learn. `sequences` counts both completions of a preference pair.
    """

    sequences: int
    clips: int
    audio_tokens: int
    """Per clip."""
    text_tokens: float
    """Per sequence."""
    parts: tuple[str, ...] | None = None
    lora_rank: int | None = None
    frozen_bytes: float = 2
    """Per frozen parameter: 2 in bfloat16, about 0.6 in 4 bits."""
    element_bytes: int = 2
    """Of a number in a matrix product: 2 in bfloat16, 4 in float32, as on a CPU."""
    with_reference: bool = False
    """A second, frozen model beside the one that learns."""
    checkpointed: bool = False
    """Activation checkpointing of every layer."""
    packed: bool = False
    """Clips are encoded as long as they are, not padded to what the model hears."""
    completions: int = 1
    """Of a prompt that is computed once: 2 for packed pairs. Attention copies its keys for each."""

    @property
    def tokens(self) -> float:
        """That the language model reads."""
        return self.sequences * self.text_tokens + self.clips * self.audio_tokens


class ModelStates(NamedTuple):
    """Bytes per GPU that are there before the first example."""

    weights: float
    gradients: float
    optimizer: float


# -------------------------------------------------------------------------- shapes


class UnknownShape(ValueError):
    """A config.json lacks a field without which nothing can be said of its model."""


AUDIO_FIELDS = {
    "num_mel_bins": "mel_bins",
    "d_model": "audio_width",
    "encoder_layers": "audio_layers",
    "encoder_ffn_dim": "audio_ffn",
    "max_source_positions": "positions",
}
"""In the config.json of a Whisper or an audio tower -> of `Shape`."""
TEXT_FIELDS = {
    "vocab_size": "vocab",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "intermediate_size": "ffn",
    "num_attention_heads": "heads",
}
"""In the config.json of a Qwen2 -> of `Shape`."""
_NO_DEFAULTS = ("vocab_size", "intermediate_size")
"""Where transformers' Qwen2Config has other defaults than Qwen2-Audio-7B, which writes them down."""


def fields_of(config: Mapping[str, Any], names: Mapping[str, str], ref: str) -> dict[str, int]:
    """Fields of `Shape` from the config.json of the model `ref`, by `AUDIO_FIELDS` or `TEXT_FIELDS`.

    Raises:
        UnknownShape: naming a field that is missing.
    """
    for name in names:
        if config.get(name) is None:
            kind = "a Whisper" if names is AUDIO_FIELDS else "a Qwen2"
            raise UnknownShape(f"the config.json of {ref} has no field {name}, which that of {kind} has")
    fields: dict[str, int] = {field: config[name] for name, field in names.items()}
    if names is TEXT_FIELDS:
        fields["kv_heads"] = config.get("num_key_value_heads") or fields["heads"]
    return fields


def shape_of_config(config: Mapping[str, Any], ref: str) -> Shape:
    """Of the Qwen2-Audio `ref`. Like the released config.json, its own may leave out transformers' defaults.

    Raises:
        UnknownShape: it is not a Qwen2-Audio's.
    """
    for part in ("audio_config", "text_config"):
        if part not in config:
            raise UnknownShape(f"the config.json of {ref} has no field {part}: it is not a Qwen2-Audio's")
    released = Shape()._asdict()
    names = {**AUDIO_FIELDS, **TEXT_FIELDS}
    defaults = {name: released[field] for name, field in names.items() if name not in _NO_DEFAULTS}
    audio, text = ({**defaults, **config[part]} for part in ("audio_config", "text_config"))
    return Shape(**fields_of(audio, AUDIO_FIELDS, ref), **fields_of(text, TEXT_FIELDS, ref))


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
    return Parameters(tower, d * h + h, language, 2 * shape.vocab * h)


def _linear(shape: Shape) -> int:
    """Weights of a decoder layer's linear maps."""
    h, kv = shape.width, shape.kv_heads * shape.head_width
    return 2 * h * h + 2 * h * kv + 3 * h * shape.ffn


def lora_parameters(shape: Shape, rank: int) -> int:
    """Of low-rank updates of every linear map in the language model's layers, and of the projector."""
    h, kv, f = shape.width, shape.kv_heads * shape.head_width, shape.ffn
    per_layer = 2 * (h + h) + 2 * (h + kv) + 3 * (h + f)
    return rank * (shape.layers * per_layer + shape.audio_width + h)


def trained(shape: Shape, load: Workload) -> int:
    """Parameters that learn. The tower's positions never do, but they are counted: they are few."""
    if load.lora_rank is not None:
        return lora_parameters(shape, load.lora_rank)
    counts = parameters(shape)
    return counts.total if load.parts is None else sum(getattr(counts, part) for part in load.parts)


def _learns(part: str, load: Workload) -> bool:
    """Whether a part's own weights do."""
    return load.lora_rank is None and (load.parts is None or part in load.parts)


# -------------------------------------------------------------------------- memory


def model_states(
    learned: float,
    frozen_bytes: float,
    whole: float,
    strategy: Strategy,
    gpus: int,
    offload: str = "none",
    element_bytes: int = 2,
) -> ModelStates:
    """Bytes per GPU of weights, gradients and optimizer.

    Args:
        learned: parameters that learn.
        frozen_bytes: of all other weights, a reference's as well.
        whole: parameters of the model.
        strategy: ddp keeps everything everywhere, with float32 weights for what learns; zero2 spreads
            optimizer and gradients over the GPUs, zero3 and fsdp2 the weights, too.
        gpus: over which things are spread.
        offload: `optimizer` moves its states to host memory, `all` the weights as well.
        element_bytes: of a number in a matrix product.
    """
    gathered = element_bytes * min(LIVE_PARAMETERS, whole)
    if strategy == "ddp":  # autocast keeps bfloat16 copies beside the float32 weights
        weights = (6 if element_bytes == 2 else 4) * learned + frozen_bytes
        copies = 2 if gpus > 1 else 1  # gradients wait in buckets of their size
        return ModelStates(weights, 4.0 * learned * copies, 8.0 * learned)
    if strategy == "fsdp2":
        return ModelStates(
            (4 * learned + frozen_bytes) / gpus + gathered, 4 * learned / gpus, 8 * learned / gpus
        )
    weights = element_bytes * learned + frozen_bytes
    if strategy == "zero3":
        weights = (0 if offload == "all" else weights / gpus) + gathered
    # Gradients are accumulated in float32; beside Adam's moments stand float32 weights
    return ModelStates(weights, 4 * learned / gpus, 0 if offload != "none" else 12 * learned / gpus)


def states_of(
    shape: Shape, load: Workload, strategy: Strategy, gpus: int, offload: str = "none"
) -> ModelStates:
    """`model_states` of a model that trains as `load` says."""
    learned, whole = trained(shape, load), parameters(shape).total
    frozen = (whole if load.lora_rank is not None else whole - learned) * load.frozen_bytes
    frozen += load.element_bytes * whole if load.with_reference else 0
    return model_states(learned, frozen, whole, strategy, gpus, offload, load.element_bytes)


def activations(shape: Shape, load: Workload) -> float:
    """Bytes that autograd keeps of one example between the forward and the backward pass.

    Of a checkpointed layer that is its input. The last layer of all is computed again at once, with its own
    activations beside its input: nothing is saved there.
    """
    h, d = shape.width, shape.audio_width
    kept_layers = 1 if load.checkpointed else shape.layers
    kept = (shape.layers - kept_layers) * 4 * h + kept_layers * decoder_bytes(shape, load) + 8 * h
    total = load.tokens * kept
    if _learns("audio_tower", load):
        own = 4 * d if load.checkpointed else encoder_bytes(shape, load)
        convolutions = 5 * d * load.element_bytes  # at twice the frames, then at as many
        total += load.clips * _frames(shape, load) * (shape.audio_layers * own + convolutions)
    return total


def _frames(shape: Shape, load: Workload) -> int:
    """Of a clip in the audio tower; two become one token."""
    return 2 * load.audio_tokens if load.packed else shape.positions


def decoder_bytes(shape: Shape, load: Workload) -> float:
    """Kept per token of a decoder layer, under autocast, where most is.

    Of attention queries and result (h each), keys and values (kv each, as often as they are copied), of the
    gated MLP gate, up and their activation (f each), of two norms the input in float32 (h each). Where the
    layer learns, or has low-rank updates, the scaled norms (h each) and the inputs of all linear maps: three
    for q, k and v and two for gate and up (h each), and that of the last map (f).
    """
    h, kv, size = shape.width, shape.kv_heads * shape.head_width, load.element_bytes
    copies = 1 + load.completions if load.completions > 1 else 1
    kept = 2 * h * 4 + size * (2 * h + 2 * kv * copies + 3 * shape.ffn)
    if _learns("language_model", load) or load.lora_rank is not None:
        kept += 2 * h * 4 + size * (5 * h + shape.ffn)
    return kept


def encoder_bytes(shape: Shape, load: Workload) -> float:
    """Kept per frame of an encoder layer that learns: as `decoder_bytes`, with a plain MLP."""
    return 8 * shape.audio_width + load.element_bytes * (8 * shape.audio_width + 2 * shape.audio_ffn)


# -------------------------------------------------------------------------- disk and time


def weights_bytes(shape: Shape, load: Workload, strategy: Strategy) -> float:
    """What a checkpoint holds of the weights: those that learn, in the precision in which they do."""
    float32 = load.lora_rank is not None or strategy in ("ddp", "fsdp2")
    return (4.0 if float32 else 2.0) * trained(shape, load)


def checkpoint_bytes(shape: Shape, load: Workload, strategy: Strategy) -> float:
    """One resumable checkpoint: its weights and Adam's moments; DeepSpeed's has its own weights as well."""
    own = {"zero2": 6.0, "zero3": 4.0}.get(strategy, 0.0)  # in float32, and in ZeRO-2 in bfloat16 too
    return weights_bytes(shape, load, strategy) + (8.0 + own) * trained(shape, load)


def flops(shape: Shape, load: Workload) -> float:
    """Of an example's forward and backward pass: 2 per weight and token forward, as much for each gradient.

    A frozen part still passes the gradient on to what lies before it, unless nothing there learns.
    """
    tokens = load.tokens
    length = tokens / load.sequences
    maps = shape.layers * _linear(shape) * tokens
    attention = shape.layers * length * shape.width * tokens  # causal: half of 2 x length x width
    head = load.sequences * load.text_tokens * shape.vocab * shape.width
    language = 2.0 * (maps + attention + head)
    tower = 2.0 * parameters(shape).audio_tower * load.clips * _frames(shape, load)
    total = language * (2 + load.checkpointed + _learns("language_model", load))
    total += tower * (3 + load.checkpointed if _learns("audio_tower", load) else 1)
    if load.with_reference:
        total += language + tower
    return total
