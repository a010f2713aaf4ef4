"""Models from outside a recipe: whether their folders hold what loading them takes. Nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.planning import estimate
from align.planning.estimate import Shape, UnknownShape
from align.recipe.config.corpus import CorpusConfig
from align.recipe.config.training import Assemble, RandomAudio, RandomText
from align.recipe.recipe import Step
from align.recipe.stage_file import Problem
from align.run_folder.artifacts import read_json

_TOKENIZER = ("tokenizer.json", "vocab.json", "tokenizer.model")
_TIMEOUT_S = 5
_EXTRACTOR = ("preprocessor_config.json", "processor_config.json")


def model_problems(step: Step, corpus: CorpusConfig | None) -> list[Problem]:
    """What the folders of models that a step names lack, and where they hear less than clips may last."""
    problems: list[Problem] = []
    for ref, (loc, needs) in step.foreign_models.items():
        folder = Path(ref).expanduser()
        if folder.is_dir():
            kind = _policy if needs.kind == "policy" else {"audio": _whisper, "text": _qwen2}[str(loc[-1])]
            problems += [step.source.problem(loc, what) for what in kind(folder)]
    model = getattr(step.config, "model", None)
    if isinstance(model, Assemble) and not problems:
        problems += [step.source.problem(("model", key), what) for key, what in _positions(model, corpus)]
    return problems


def _positions(model: Assemble, corpus: CorpusConfig | None) -> Iterator[tuple[str, str]]:
    """Where the parts know fewer positions than `clip_s` asks for, or the longest clip takes."""
    audio, text = (
        read_json(path) if (path := _config_of(part)) else {} for part in (model.audio, model.text)
    )
    heard_s = audio.get("max_source_positions", Shape().positions) // estimate.POSITIONS_PER_S
    encoder = model.audio if isinstance(model.audio, str) else "the encoder"
    if model.clip_s and model.clip_s > heard_s:
        yield "clip_s", f"{model.clip_s} is more than the {heard_s} s that {encoder} has positions for"
    longest_s = corpus.longest_s if corpus else None
    if longest_s and longest_s > heard_s:
        yield (
            "audio",
            f"{encoder} has positions for {heard_s} s, and clips may last {longest_s:g} s: take an "
            "encoder that hears more, or shorter clips",
        )
    tokens = (model.clip_s or heard_s) * estimate.POSITIONS_PER_S // 2
    context = text.get("max_position_embeddings")
    if isinstance(context, int) and context <= tokens:
        yield (
            "text",
            f"{model.text} knows {context} positions (max_position_embeddings), and the longest clip alone "
            f"takes {tokens}: take a language model that knows more, or set clip_s",
        )


def _config_of(part: RandomAudio | RandomText | str) -> Path | None:
    """The config.json of a part that is a folder on this machine."""
    path = Path(part).expanduser() / "config.json" if isinstance(part, str) else None
    return path if path and path.is_file() else None


def hub_problem(ref: str) -> str | None:
    """Why a model that is named by its Hub id cannot be had now; None if it is here, or can be fetched."""
    from huggingface_hub import HfApi, try_to_load_from_cache  # takes half a second
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if Path(ref).expanduser().is_dir() or isinstance(try_to_load_from_cache(ref, "config.json"), str):
        return None
    try:
        HfApi().model_info(ref, timeout=_TIMEOUT_S)
    except (RepositoryNotFoundError, GatedRepoError):
        return f"the Hub has no model {ref}, or does not give it to you (`hf auth login`)"
    except Exception as error:  # of many libraries: no network, a proxy, offline mode
        return (
            f"{ref} is not on this machine, and the Hub cannot be asked for it ({type(error).__name__}): "
            f"fetch it where there is a network (hf download {ref} --local-dir DIR) and name its folder"
        )
    return None


def _whisper(folder: Path) -> Iterator[str]:
    config, problem = _config(folder, "whisper", "openai/whisper-large-v3")
    yield from [problem] if problem else _missing_fields(config, estimate.AUDIO_FIELDS, folder)
    yield from _missing_files(folder, _EXTRACTOR, "feature extractor")
    yield from _missing_weights(folder)


def _qwen2(folder: Path) -> Iterator[str]:
    config, problem = _config(folder, "qwen2", "Qwen/Qwen1.5-7B")
    yield from [problem] if problem else _missing_fields(config, estimate.TEXT_FIELDS, folder)
    yield from _missing_files(folder, _TOKENIZER, "tokenizer")
    yield from _missing_weights(folder)


def _policy(folder: Path) -> Iterator[str]:
    folder = folder / "model" if (folder / "model").is_dir() else folder
    config, problem = _config(folder, "qwen2_audio", "Qwen/Qwen2-Audio-7B")
    if problem:
        yield problem
    else:
        try:
            estimate.shape_of_config(config, str(folder))
        except (UnknownShape, TypeError) as error:
            yield str(error)
    yield from _missing_files(folder, _TOKENIZER, "tokenizer")
    yield from _missing_files(folder, _EXTRACTOR, "feature extractor")
    yield from _missing_weights(folder)


def _config(folder: Path, model_type: str, example: str) -> tuple[dict[str, Any], str | None]:
    """A folder's config.json, and what is wrong with it."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, f"{folder} holds no config.json: it is not the folder of a model such as {example}"
    except (OSError, ValueError) as error:
        return {}, f"{path} cannot be read: {error}"
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != model_type:
        return {}, f"{folder} holds a model of type {kind!r}; needed is {model_type!r}, such as {example}"
    return config, None


def _missing_fields(config: Mapping[str, Any], names: Mapping[str, str], folder: Path) -> Iterator[str]:
    for name in names:
        if type(config.get(name)) is not int or config[name] < 1:
            yield f"{folder / 'config.json'} has no whole number in its field {name}: fetch the model again"


def _missing_files(folder: Path, any_of: tuple[str, ...], what: str) -> Iterator[str]:
    if not any((folder / name).is_file() for name in any_of):
        yield f"{folder} holds no {what} ({' or '.join(any_of)}): fetch it from where the model comes from"


def _missing_weights(folder: Path) -> Iterator[str]:
    """Weights that are not there: none at all, none as safetensors, or some shards of them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            yield f"{index} is not an index of weights: fetch it again"
            return
        if missing := [name for name in shards if not (folder / str(name)).is_file()]:
            yield f"{folder} lacks {len(missing)} of {len(shards)} shards, such as {missing[0]}: fetch it"
    elif not any(folder.glob("*.safetensors")):
        yield f"{folder} holds no safetensors, the only weights that are loaded: convert or fetch them"
