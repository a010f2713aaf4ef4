"""Qwen2-Audio as transformers has it: a small one from random weights, or any saved one.

Differs from the stock processor in one thing: our chat template renders the same text but marks the
assistant's words with `{% generation %}`, so that SFT can train on them alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder, sinusoids

from align.models.qwen2_audio.vocabulary import add_tags
from preference_data.audio.decode import SAMPLE_RATE
from preference_data.prompts.prompts import Tagset

END_OF_TURN = "<|im_end|>"
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    END_OF_TURN,
    "<|audio_bos|>",
    "<|AUDIO|>",
    "<|audio_eos|>",
]
SMALL_TAGS = Tagset(
    (
        "<|caption_plain|>",
        "<|caption|>",
        "<|en|>",
        "<|notimestamps|>",
        "<|startofanalysis|>",
        "<|startoftranscript|>",
        "<|transcribe|>",
        "<|unknown|>",
        "<|wo_itn|>",
    ),
    (),
)
"""Tags of every small model: English transcripts and captions, as the release tags them."""
CHAT_TEMPLATE = (
    "{% set clips = namespace(n=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "<|im_end|>{% endgeneration %}{{ '\n' }}"  # a bare newline after a block tag would be trimmed
    "{% elif message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}"
    "{% set clips.n = clips.n + 1 %}"
    "Audio {{ clips.n }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "<|im_end|>\n"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_RENAMED = (
    ("model.language_model.", "language_model.model."),
    ("model.audio_tower.", "audio_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
    ("score.", "score."),
)
"""Prefix of the module's name in transformers 5, prefix on the Hub.

The released checkpoints, transformers 4 and vLLM say `language_model.model.layers.0...`; transformers 5
translates when it reads and writes. When a ZeRO-3 run is saved, that translation meets itself and leaves
`language_model.model.model.layers.0...`, which only transformers 5 can read.
"""


def build_processor(
    texts: Iterable[str],
    *,
    vocab_size: int,
    mel_bins: int,
    hop_length: int,
    clip_s: int,
    tags: Tagset = SMALL_TAGS,
) -> Qwen2AudioProcessor:
    """A processor whose byte-level BPE is trained on `texts`; any text stays encodable.

    `clip_s` whole seconds is the longest clip: the feature extractor pads to it and cuts beyond it. `tags`
    beyond `SMALL_TAGS` are added to the `vocab_size` tokens.
    """
    tokenizer = build_tokenizer(texts, vocab_size)
    add_tags(tokenizer, tags)
    features = WhisperFeatureExtractor(
        feature_size=mel_bins,
        hop_length=hop_length,
        chunk_length=clip_s,
        n_fft=400,
        sampling_rate=SAMPLE_RATE,
        return_attention_mask=True,
    )
    return Qwen2AudioProcessor(features, tokenizer, chat_template=CHAT_TEMPLATE)


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `texts`, with the tokens of chats and `SMALL_TAGS` among `vocab_size`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [*SPECIAL_TOKENS, *SMALL_TAGS.prompt]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TURN,
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in special if t not in (END_OF_TURN, "<|endoftext|>")],
        padding_side="left",
    )


def build_model(
    processor: Qwen2AudioProcessor,
    *,
    d_model: int,
    heads: int,
    audio_layers: int,
    text_layers: int,
    seed: int,
) -> Qwen2AudioForConditionalGeneration:
    """A Qwen2-Audio from random weights that fits `processor`."""
    torch.manual_seed(seed)
    features, tokenizer = processor.feature_extractor, processor.tokenizer
    spread = 0.06  # transformers' 0.02 is for d = 4096; a narrow model needs larger weights to start learning
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=features.feature_size,
        d_model=d_model,
        encoder_layers=audio_layers,
        encoder_attention_heads=heads,
        encoder_ffn_dim=4 * d_model,
        max_source_positions=features.nb_max_frames // 2,
        initializer_range=spread,
    )
    text = small_qwen2(tokenizer, d_model=d_model, heads=heads, layers=text_layers, spread=spread)
    audio_token = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    model = Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=audio_token)
    )
    wake_audio_tower(model.model.audio_tower)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def small_qwen2(
    tokenizer: PreTrainedTokenizerFast, *, d_model: int, heads: int, layers: int, spread: float
) -> Qwen2Config:
    """The config of a small Qwen2 for the tokenizer; random weights have the standard deviation `spread`."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=8 * d_model // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        initializer_range=spread,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


@torch.no_grad()
def wake_audio_tower(tower: Qwen2AudioEncoder | WhisperEncoder, amplitude: float = 0.3) -> None:
    """Positions as Whisper has them and convolutions that let the signal through.

    A random encoder of transformers has frozen noise for positions and convolutions so small that the audio
    drowns in it; released checkpoints bring Whisper's own.
    """
    tower.embed_positions.weight.copy_(amplitude * sinusoids(*tower.embed_positions.weight.shape))
    for convolution in (tower.conv1, tower.conv2):
        torch.nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")


def located(policy: Path) -> Path | str:
    """Where a policy's model is: `model/` of a stage folder, a saved model's folder, or else a Hub id."""
    if (policy / "model").is_dir():
        return policy / "model"
    return policy if policy.is_dir() else str(policy)


def load_model(path: Path | str) -> Qwen2AudioForConditionalGeneration:
    """A saved Qwen2-Audio (safetensors only), encoder positions frozen as in Whisper.

    `from_pretrained` silently un-freezes `embed_positions` (transformers 5.23).

    Raises:
        ValueError: weights are missing, as the language head of a reward model is.
    """
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model, loading = Qwen2AudioForConditionalGeneration.from_pretrained(
        path, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):  # they would be drawn at random
        raise ValueError(f"{path} is no whole Qwen2-Audio: it lacks {', '.join(missing[:3])}")
    model.model.audio_tower.embed_positions.requires_grad_(False)
    return model


def context_of(path: Path | str) -> int:
    """Positions that a saved model's language model knows."""
    return int(Qwen2AudioConfig.from_pretrained(path).text_config.max_position_embeddings)


def load_processor(path: Path | str) -> Qwen2AudioProcessor:
    """The processor saved beside a model, with our chat template."""
    processor = Qwen2AudioProcessor.from_pretrained(path)
    processor.chat_template = CHAT_TEMPLATE
    return processor


def save(model: PreTrainedModel, processor: Qwen2AudioProcessor, path: Path) -> None:
    """Write weights (safetensors, the names the Hub uses), config and processor."""
    model.save_pretrained(path)
    processor.save_pretrained(path)


def n_parameters(model: torch.nn.Module) -> int:
    """Parameters of a model, whole ones, also where this process holds but its share (ZeRO-3)."""
    return sum(int(getattr(weight, "ds_numel", weight.numel())) for weight in model.parameters())


def hub_name(module_name: str) -> str:
    """The name that a parameter of a policy has on the Hub, or one of a reward model in its files.

    Raises:
        ValueError: neither has such a parameter.
    """
    for ours, theirs in _RENAMED:
        if module_name.startswith(ours):
            return theirs + module_name.removeprefix(ours)
    raise ValueError(f"{module_name!r} is not a parameter of Qwen2-Audio")
