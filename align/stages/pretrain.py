"""Multi-task pre-training: audio and a task prompt in, text out (Qwen2-Audio, arXiv:2407.10759, stage 1).

Starts from a Whisper and a Qwen2 put together, as the papers do, from a Qwen2-Audio, or from a small model's
random weights; can order clips by a curriculum. Reads: corpus. Writes: model/ (safetensors, processor),
metrics.jsonl.
    align run recipes/demo --only 1_pretrain
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from align.models.qwen2_audio import assemble, random_parts
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.vocabulary import add_tags, fit_embeddings
from align.recipe.config.training import Assemble, ModelShape, PretrainConfig, RandomAudio, RandomText
from align.recipe.config.training import Lesson as LessonConfig
from align.run_folder.artifacts import StageFolder
from align.stages.tuning import schedule_of, tuning_of
from align.training import processes
from align.training import run as training
from align.training.augmentation import augmentation_of
from align.training.collate import task_row
from align.training.data_loading import Examples, Lesson, Part
from align.training.methods import supervised_fine_tuning
from align.training.preflight import check_clip_lengths
from preference_data import store
from preference_data.audio.decode import SAMPLE_RATE
from preference_data.dataset.dataset import Dataset
from preference_data.prompts.prompts import (
    AUDIO,
    PromptFormat,
    all_tags,
    one_of_each_kind,
    pretraining_prompt,
    prompt_of,
    tags_needed,
)
from preference_data.schema import AudioClip, TaskExample
from preference_data.toy_world.phrasebook import Phrasebook

_WHISPER_S = 30
"""Seconds that a Whisper hears."""
_SILENCE_S = 0.04
"""Behind a clip, in a window that is cut: an encoder trained on longer ones computes the clip's last frames
from it (half a transform's window and two convolutions), and would get them wrong at the edge."""
_TOKENIZER_TEXTS = 2000
"""Texts of a corpus without a phrasebook that a small model's tokenizer is trained on."""


def run(config: PretrainConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Train; returns the last logged metrics."""
    corpus = inputs[config.corpus]
    processor, model = _start(config, inputs, out.path / "assembled")
    is_cut = isinstance(config.model, Assemble) and config.model.clip_s is not None
    check_clip_lengths(
        Dataset(corpus).table(AudioClip), processor, config.max_bad_fraction, _SILENCE_S if is_cut else 0.0
    )
    n_parameters = qwen2_audio.n_parameters(model)
    method = supervised_fine_tuning(
        _examples(config, corpus), augmentation_of(**config.augment.model_dump()), config.max_bad_fraction
    )
    metrics = training.train(
        method,
        model,
        processor,
        corpus,
        out,
        schedule=schedule_of(config, config.steps),
        tuning=replace(tuning_of(config), new_rows=_new_rows(processor, config.prompt_format)),
        trl=config.trl,
    )
    if processes.is_first():
        shutil.rmtree(
            out.path / "assembled", ignore_errors=True
        )  # as large as the model, and soon assembled again
    return {"parameters": float(n_parameters), **metrics}


def _start(
    config: PretrainConfig, inputs: dict[str, Path], assembled: Path
) -> tuple[qwen2_audio.Qwen2AudioProcessor, qwen2_audio.Qwen2AudioForConditionalGeneration]:
    """The model that the recipe starts from. Two are assembled once, in the folder `assembled`."""
    corpus = inputs[config.corpus]
    match config.model:
        case ModelShape() as shape:
            # Trained once: two processes with different tokens would train on each other's nonsense
            trained = _processor(shape, corpus, config.prompt_format) if processes.is_first() else None
            processor = processes.broadcast(trained)
            return processor, _from_random(shape, processor, config.seed)
        case Assemble() as parts:
            if processes.is_first():
                if not assembled.is_dir():
                    _assemble(parts, config, inputs, assembled)
                shutil.copy(assembled / assemble.REPORT, assembled.parent)
            processes.barrier()
            path: Path | str = assembled
        case policy:
            path = qwen2_audio.located(inputs[policy])
    processor, model = qwen2_audio.load_processor(path), qwen2_audio.load_model(path)
    longest_s = processor.feature_extractor.n_samples / SAMPLE_RATE
    tags = tags_needed(store.stream(corpus / "pretrain.jsonl", TaskExample), config.prompt_format, longest_s)
    fit_embeddings(model, processor.tokenizer, add_tags(processor.tokenizer, tags))
    return processor, model


def _assemble(parts: Assemble, config: PretrainConfig, inputs: dict[str, Path], to: Path) -> None:
    """Write a Qwen2-Audio of the parts to the folder `to`, with the tags that the corpus' tasks need."""
    corpus, heard_s = inputs[config.corpus], parts.clip_s or _WHISPER_S
    kinds = one_of_each_kind(store.stream(corpus / "pretrain.jsonl", TaskExample))
    with tempfile.TemporaryDirectory(dir=to.parent, prefix="random-") as name:
        audio, text = Path(name) / "audio", Path(name) / "text"
        if isinstance(parts.audio, RandomAudio):
            sizes = parts.audio.model_dump()
            random_parts.write_whisper(audio, **sizes, clip_s=heard_s, seed=config.seed)
        else:
            audio = assemble.fetched(inputs[parts.audio])
        if isinstance(parts.text, RandomText):
            tokenizer = qwen2_audio.build_tokenizer(_tokenizer_texts(corpus, kinds), parts.text.vocab_size)
            sizes = parts.text.model_dump(exclude={"vocab_size"})
            random_parts.write_qwen2(text, tokenizer, **sizes, seed=config.seed)
        else:
            text = assemble.fetched(inputs[parts.text])
        tags = tags_needed(kinds, config.prompt_format, heard_s)
        assemble.assemble(audio, text, to, clip_s=parts.clip_s, seed=config.seed, tags=tags)


def _new_rows(processor: qwen2_audio.Qwen2AudioProcessor, prompt_format: PromptFormat) -> tuple[int, ...]:
    """Rows of the embeddings that a text model does not know: the tags and the marks around audio."""
    known, tags = processor.tokenizer.get_vocab(), all_tags(prompt_format)
    names = {"<|audio_bos|>", "<|audio_eos|>", *tags.prompt, *tags.answer}
    return tuple(sorted(known[name] for name in names & known.keys()))


def _from_random(
    shape: ModelShape, processor: qwen2_audio.Qwen2AudioProcessor, seed: int
) -> qwen2_audio.Qwen2AudioForConditionalGeneration:
    return qwen2_audio.build_model(
        processor,
        d_model=shape.d_model,
        heads=shape.heads,
        audio_layers=shape.audio_layers,
        text_layers=shape.text_layers,
        seed=seed,
    )


def _processor(
    shape: ModelShape, corpus: Path, prompt_format: PromptFormat
) -> qwen2_audio.Qwen2AudioProcessor:
    """A tokenizer trained on the corpus' texts, with the tags that its tasks need."""
    kinds = one_of_each_kind(store.stream(corpus / "pretrain.jsonl", TaskExample))
    return qwen2_audio.build_processor(
        _tokenizer_texts(corpus, kinds),
        vocab_size=shape.vocab_size,
        mel_bins=shape.mel_bins,
        hop_length=shape.hop_length,
        clip_s=shape.clip_s,
        tags=tags_needed(kinds, prompt_format, shape.clip_s),
    )


def _tokenizer_texts(corpus: Path, kinds: list[TaskExample]) -> list[str]:
    """Texts that a tokenizer is trained on, each so often that BPE makes every word a token."""
    chat = ["system\nYou are a helpful assistant.\n", "user\nAudio 1: \nAudio 2: \n", "assistant\n"]
    always = [pretraining_prompt(task, 0, "sentences") for task in ("transcribe", "caption")]
    prompts = {prompt_of(example, "sentences").replace(AUDIO, "") for example in kinds}
    return [*_corpus_texts(corpus), *chat, *always, *sorted(prompts - {*always})] * 20


def _corpus_texts(corpus: Path) -> list[str]:
    """All texts about synthetic clips, else some of the targets."""
    if (corpus / "phrasebook.yaml").exists():
        return list(Phrasebook.load(corpus / "phrasebook.yaml").texts())
    records = [part.records for part in Dataset(corpus).parts(TaskExample)]
    return [example.text for part in records for example in islice(part, _TOKENIZER_TEXTS // len(records))]


def _examples(config: PretrainConfig, corpus: Path) -> Examples:
    parts = [
        Part(name, records, share, partial(task_row, prompt_format=config.prompt_format))
        for name, records, share in Dataset(corpus).parts(TaskExample)
    ]
    lessons = [
        Lesson(lesson.steps * config.batch_size, [_matching(lesson, corpus, part.records) for part in parts])
        for lesson in config.curriculum
    ]
    return Examples(parts, config.steps * config.batch_size, config.seed, lessons)


def _matching(lesson: LessonConfig, corpus: Path, examples: Iterable[TaskExample]) -> np.ndarray:
    """The numbers of the examples whose clip a lesson is about: 4 bytes each."""
    clips = store.stream(corpus / "clips.jsonl", AudioClip)
    paths = {clip.path for clip in clips if clip.facts.get(lesson.slot) in lesson.values}
    numbers = (n for n, example in enumerate(examples) if example.audios and example.audios[0] in paths)
    return np.fromiter(numbers, dtype=np.uint32)
