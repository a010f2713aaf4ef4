"""A Qwen2-Audio made of a Whisper encoder and a Qwen2-family language model, as both reports start.

    Whisper  model.encoder.*    -> audio_tower.*            the decoder and its head are left behind;
                                                            positions beyond the window as well
    Qwen2    model.*, lm_head   -> language_model.*         embeddings grown by the new special tokens
             (random)           -> multi_modal_projector.*  the one new part

Copied tensor by tensor: a 7B model takes the memory of one file. The audio tower computes what Whisper's
encoder does, except that it averages each two frames (40 ms instead of 20) before the last layer norm.
Qwen2-Audio-7B is Whisper-large-v3 and a language model in Qwen1.5-7B's shape; others fit as well.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from align.models import shards
from align.models.qwen2_audio.model import CHAT_TEMPLATE, END_OF_TURN, SPECIAL_TOKENS, hub_name
from align.models.qwen2_audio.vocabulary import add_tags, spelled_row
from align.models.shards import SavedTensors
from align.run_folder.artifacts import commit_folder, write_json
from preference_data.prompts.prompts import Tagset

REPORT = "assembly.json"
"""In the assembled folder: where each tensor came from."""
_AUDIO_TOKENS = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
"""First of the new ones, so that they get the released checkpoint's ids where Qwen's tokenizer is grown."""
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
"""A tokenizer is in one of them."""
_NO_TAGS = Tagset((), ())
_ROWS_MULTIPLE = 64
"""Embeddings grow to a multiple of it: matrix units want whole tiles, and tensor parallelism equal parts."""
_NOT_NEEDED = re.compile(r"(model\.)?decoder\..*|proj_out\.weight|.*\.rotary_emb\.inv_freq")
_POSITIONS = "audio_tower.embed_positions.weight"
_EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


class CannotAssemble(ValueError):
    """The two checkpoints do not make a Qwen2-Audio; the message says which part and why."""


class Assembly(NamedTuple):
    """Where everything came from and went.

    `used`: tensor of the result -> "audio:NAME" or "text:NAME"; `unused`: what was left behind; `new`:
    made here; `new_tokens`: special tokens and their ids, whose embedding is the mean of the old ones.
    """

    used: dict[str, str]
    unused: list[str]
    new: list[str]
    new_tokens: dict[str, int]
    rows: tuple[int, int]
    """Rows of the embeddings, before and after."""


def assemble(
    audio: Path,
    text: Path,
    to: Path,
    *,
    clip_s: int | None = None,
    seed: int = 0,
    tags: Tagset = _NO_TAGS,
) -> Assembly:
    """Write a Qwen2-Audio to the folder `to`, which appears whole or not at all.

    Args:
        audio: a Whisper checkpoint: config, feature extractor, safetensors.
        text: a Qwen2ForCausalLM checkpoint: config, tokenizer, safetensors.
        to: the new folder.
        clip_s: seconds that the model hears: the positions beyond are cut off. None is all, Whisper's 30.
        seed: of the projector's weights.
        tags: added to the tokenizer, those that it lacks, after the tokens around audio and turns.

    Raises:
        CannotAssemble: a model of another family, parts that do not fit, a tensor too many or too few.
        FileNotFoundError: a checkpoint without safetensors.
    """
    whisper = _config(audio, WhisperConfig, "a Whisper model, such as openai/whisper-large-v3")
    qwen = _config(text, Qwen2Config, "a Qwen2-family language model, such as Qwen/Qwen1.5-7B")
    sources = {"audio": SavedTensors(audio), "text": SavedTensors(text)}
    positions = whisper.max_source_positions
    extractor = _extractor(audio, whisper)
    if clip_s is not None:
        extractor = _cut(audio, extractor, whisper, clip_s)
    tokenizer = _tokenizer(text)
    new_tokens = _add_tokens(tokenizer, tags)
    old_rows = qwen.vocab_size
    config = _joined(whisper, qwen, tokenizer)
    expected = expected_tensors(config)
    used, unused, new = _matched(sources, expected)
    _check_context(config, text)
    _check_shapes(sources, used, expected, {**dict.fromkeys(_EMBEDDINGS, old_rows), _POSITIONS: positions})

    partial = to.with_name(f".partial-{to.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    assembly = Assembly(used, unused, new, new_tokens, (old_rows, config.text_config.vocab_size))
    shards.write(_tensors(sources, assembly, expected, tokenizer, seed), partial)
    config.save_pretrained(partial)
    # Stop at the end of a turn, and at the end of a text, as a language model without turns does
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(partial)
    Qwen2AudioProcessor(extractor, tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(partial)
    write_json(partial / REPORT, assembly._asdict())
    commit_folder(partial, to)
    return assembly


def fetched(checkpoint: Path) -> Path:
    """The folder of a checkpoint; one on the Hub is downloaded to the usual cache first.

    Raises:
        CannotAssemble: it is not a folder, and the Hub does not have it or does not answer.
    """
    if checkpoint.is_dir():
        return checkpoint
    try:
        wanted = ["*.json", "*.txt", "model.safetensors", "model-*.safetensors"]
        return Path(snapshot_download(str(checkpoint), allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise CannotAssemble(
            f"{checkpoint} is not a folder here and could not be fetched from the Hub ({error}). Download it "
            f"elsewhere (hf download {checkpoint} --local-dir DIR), copy it here and name its folder"
        ) from error


def expected_tensors(config: Qwen2AudioConfig) -> dict[str, tuple[int, ...]]:
    """Name on the Hub and shape of every tensor of such a model, without making it."""
    with torch.device("meta"):
        model = Qwen2AudioForConditionalGeneration(config)
    return {hub_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# -------------------------------------------------------------------------- the parts


def _config(folder: Path, family: type[PreTrainedConfig], wanted: str) -> PreTrainedConfig:
    if not (folder / "config.json").exists():
        raise CannotAssemble(f"{folder} holds no config.json; name the folder of {wanted}")
    config = AutoConfig.from_pretrained(folder)
    if type(config) is not family:
        raise CannotAssemble(f"{folder} holds a model of type {config.model_type!r}; needed is {wanted}")
    return config


def _extractor(audio: Path, whisper: WhisperConfig) -> WhisperFeatureExtractor:
    """Whisper's feature extractor, which must make what its encoder takes."""
    if not any((audio / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        raise CannotAssemble(f"{audio} holds no preprocessor_config.json: fetch Whisper's to it")
    extractor = WhisperFeatureExtractor.from_pretrained(audio, return_attention_mask=True)
    extracted = (extractor.feature_size, extractor.nb_max_frames)
    expected = (whisper.num_mel_bins, 2 * whisper.max_source_positions)
    if extracted != expected:
        raise CannotAssemble(
            f"{audio}: its feature extractor makes {extracted[0]} mel bins x {extracted[1]} frames, its "
            f"encoder takes {expected[0]} x {expected[1]} (2 x max_source_positions); they are not of the "
            "same model"
        )
    return extractor


def _cut(
    audio: Path, extractor: WhisperFeatureExtractor, whisper: WhisperConfig, clip_s: int
) -> WhisperFeatureExtractor:
    """The extractor for a window of `clip_s` seconds; the config gets as many positions."""
    if clip_s > extractor.chunk_length:
        raise CannotAssemble(
            f"clip_s is {clip_s}, but {audio} has positions for {extractor.chunk_length} s alone: take an "
            f"encoder that hears more, or set clip_s to {extractor.chunk_length} at most, or leave it out"
        )
    settings = {**extractor.to_dict(), "chunk_length": clip_s}
    for derived in ("n_samples", "nb_max_frames", "feature_extractor_type", "mel_filters"):
        settings.pop(derived, None)
    shorter = WhisperFeatureExtractor(**settings)
    whisper.max_source_positions = shorter.nb_max_frames // 2
    return shorter


def _tokenizer(text: Path) -> PreTrainedTokenizerBase:
    """Of the language model; without its files transformers would make one up that knows no word."""
    if not any((text / name).exists() for name in _TOKENIZER_FILES):
        raise CannotAssemble(
            f"{text} holds no tokenizer ({', '.join(_TOKENIZER_FILES)}): save the language model's beside it "
            "(tokenizer.save_pretrained), or copy its files there"
        )
    return AutoTokenizer.from_pretrained(text)


def _check_context(config: Qwen2AudioConfig, text: Path) -> None:
    """The language model must know positions for the longest clip's tokens and some words beside them."""
    context = config.text_config.max_position_embeddings
    n_audio = config.audio_config.max_source_positions // 2
    if context <= n_audio:
        raise CannotAssemble(
            f"{text} knows {context} positions (max_position_embeddings), and the longest clip alone takes "
            f"{n_audio}: take a language model that knows more, or set clip_s"
        )


def _add_tokens(tokenizer: PreTrainedTokenizerBase, tags: Tagset) -> dict[str, int]:
    """Give the tokenizer the tokens it lacks, and the roles that our chats need; returns the new ones."""
    has = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys([*_AUDIO_TOKENS, *SPECIAL_TOKENS]) if token not in has]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new], special_tokens=True)
    new += add_tags(tokenizer, tags)
    tokenizer.eos_token = END_OF_TURN
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.padding_side = "left"
    return {token: tokenizer.convert_tokens_to_ids(token) for token in new}


def _joined(
    whisper: WhisperConfig, qwen: Qwen2Config, tokenizer: PreTrainedTokenizerBase
) -> Qwen2AudioConfig:
    """The config of the two in one; embeddings only ever grow."""
    fields = Qwen2AudioEncoderConfig().to_dict().keys() - {"model_type", "transformers_version", "dtype"}
    audio = Qwen2AudioEncoderConfig(
        **{name: value for name, value in whisper.to_dict().items() if name in fields}
    )
    text = Qwen2Config.from_dict(qwen.to_dict())
    n_ids = max(tokenizer.get_vocab().values()) + 1
    if n_ids > text.vocab_size:
        text.vocab_size = -(-n_ids // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
    text.tie_word_embeddings = False  # Qwen2-Audio has a head of its own; a tied one starts as a copy
    text.eos_token_id = tokenizer.eos_token_id
    text.pad_token_id = tokenizer.pad_token_id
    audio_token = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=audio_token)
    config.architectures = ["Qwen2AudioForConditionalGeneration"]
    config.dtype = qwen.dtype
    return config


# -------------------------------------------------------------------------- name by name


def _matched(
    sources: dict[str, SavedTensors], expected: dict[str, tuple[int, ...]]
) -> tuple[dict[str, str], list[str], list[str]]:
    """Which tensor becomes which: used (target -> source), unused, new. Nothing is left unsaid."""
    used: dict[str, str] = {}
    unused, unknown = [], []
    for kind, tensors in sources.items():
        for name in tensors.names:
            encoder = re.sub(r"^(model\.)?encoder\.", "audio_tower.", name)
            target = encoder if kind == "audio" else f"language_model.{name}"
            if target in expected:
                used[target] = f"{kind}:{name}"
            elif _NOT_NEEDED.fullmatch(name):
                unused.append(f"{kind}:{name}")
            else:
                unknown.append(f"{kind}:{name}")
    if _EMBEDDINGS[1] not in used and _EMBEDDINGS[0] in used:
        used[_EMBEDDINGS[1]] = used[_EMBEDDINGS[0]]  # a tied head is saved once
    new = [name for name in expected if name.startswith("multi_modal_projector.")]
    missing = [name for name in expected if name not in used and name not in new]
    if unknown or missing:
        raise CannotAssemble(
            f"tensors do not match. Without a place in Qwen2-Audio: {_some(unknown)}; "
            f"found in neither checkpoint: {_some(missing)}"
        )
    return used, unused, new


def _check_shapes(
    sources: dict[str, SavedTensors],
    used: dict[str, str],
    expected: dict[str, tuple[int, ...]],
    rows: dict[str, int],
) -> None:
    """Every tensor must have its place's shape; those that grow or are cut have had so many `rows`."""
    wrong = []
    for target, source in used.items():
        kind, _, name = source.partition(":")
        wanted = expected[target]
        if target in rows:
            wanted = (rows[target], *wanted[1:])
        if sources[kind].shape(name) != wanted:
            wrong.append(f"{source} is {sources[kind].shape(name)}, its config says {wanted}")
    if wrong:
        raise CannotAssemble(f"tensors of another shape than their config says: {_some(wrong)}")


def _some(names: list[str]) -> str:
    first = ", ".join(names[:5]) or "none"
    return f"{first} and {len(names) - 5} more" if len(names) > 5 else first


# -------------------------------------------------------------------------- values


def _tensors(
    sources: dict[str, SavedTensors],
    assembly: Assembly,
    expected: dict[str, tuple[int, ...]],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the result, one at a time, in the dtype it came in."""
    draw = torch.Generator().manual_seed(seed)
    for target, shape in expected.items():
        if target in assembly.new:  # weights as transformers draws them, biases zero
            fresh = torch.zeros(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=draw)
            yield target, fresh
            continue
        kind, _, name = assembly.used[target].partition(":")
        tensor = sources[kind][name]
        if target in _EMBEDDINGS:
            tensor = _grown(tensor, shape[0], tokenizer, assembly)
        yield target, tensor[: shape[0]].clone() if target == _POSITIONS else tensor


def _grown(tensor: Tensor, rows: int, tokenizer: PreTrainedTokenizerBase, assembly: Assembly) -> Tensor:
    """Embeddings (rows, d): the old ones, and for each new token a mean of old ones.

    Of those that spell its name for a tag (see `vocabulary`), of all for the tokens around audio and turns,
    and for rows that nobody has. Means leave the model's predictions nearly as they were, where random rows
    can outbid all others (nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    old = sorted(set(tokenizer.get_vocab().values()) - {*assembly.new_tokens.values()})
    mean = tensor[old].float().mean(0).to(tensor.dtype)
    grown = tensor.new_empty(rows, tensor.shape[1])
    grown[: len(tensor)] = tensor
    grown[len(tensor) :] = mean
    for token, row in assembly.new_tokens.items():
        is_control = token in (*_AUDIO_TOKENS, *SPECIAL_TOKENS)
        grown[row] = mean if is_control else spelled_row(tensor, tokenizer, token)
    return grown
