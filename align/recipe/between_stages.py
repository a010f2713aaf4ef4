"""What stages say together that none says alone: lengths of clips, facts, what learns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil, floor
from pathlib import Path
from typing import TYPE_CHECKING

from align.recipe.config.base import StageConfig
from align.recipe.config.corpus import MADE, CorpusConfig
from align.recipe.config.evaluation import PromoteConfig
from align.recipe.config.preference import AnnotateConfig, FromJudgementsOrScores, SampleConfig
from align.recipe.config.training import (
    Assemble,
    FurtherTrainingConfig,
    ModelPart,
    ModelShape,
    PretrainConfig,
    TrainingConfig,
)
from align.recipe.stage_file import Problem, StageFile

if TYPE_CHECKING:
    from align.recipe.recipe import Step

_ABOUT_THE_SAME = ("completions", "annotations", "scores", "pairs")
"""Keys of stages that must be about the same clips and completions as the stage that reads them."""
_PARTS: tuple[ModelPart, ...] = ("audio_tower", "projector", "language_model")


def problems(steps: list[Step]) -> list[Problem]:
    """Mistakes in steps that are right by themselves."""
    by_name = {step.name: step for step in steps}
    of_training = [
        problem
        for step in steps
        if isinstance(step.config, TrainingConfig)
        for problem in (*_clips_too_long(step, step.config, by_name), *_empty_lessons(step, by_name))
    ]
    of_data = [
        problem
        for step in steps
        for problem in (
            *_of_different_data(step, by_name),
            *_too_few_to_compare(step, by_name),
            *_rules_about_nobody(step, by_name),
        )
    ]
    return of_training + of_data + [problem for step in steps for problem in _not_judged(step, by_name)]


def _not_judged(step: Step, steps: Mapping[str, Step]) -> Iterator[Problem]:
    """A policy to promote that the gate does not decide on."""
    config = step.config
    gate = steps.get(config.verdict) if isinstance(config, PromoteConfig) else None
    evaluation = steps.get(str(getattr(gate.config, "evaluation", None))) if gate else None
    candidate = getattr(evaluation.config, "after", None) if evaluation else None
    if gate and evaluation and candidate and isinstance(config, PromoteConfig) and candidate != config.policy:
        message = (
            f"{gate.name} decides on {candidate!r} (after of {evaluation.name}), not on {config.policy!r}"
        )
        yield step.source.problem(("policy",), message)


def _of_different_data(step: Step, steps: Mapping[str, Step]) -> Iterator[Problem]:
    """Stages that a step reads together although they are about different completions or clips."""
    for shared in ("completions", "corpus"):
        named = getattr(step.config, shared, None)
        if named not in steps:
            continue
        for loc, _, ref in step.references:
            other = _behind(ref, shared, steps) if loc[0] in _ABOUT_THE_SAME and ref in step.needs else named
            if other in steps and other != named:
                message = f"{ref!r} is made of {other!r}, and {shared} is {named!r}: both must be the same"
                yield step.source.problem(loc, message)


def _too_few_to_compare(step: Step, steps: Mapping[str, Step]) -> Iterator[Problem]:
    """Comparisons of more completions than a prompt has."""
    config = step.config
    sample = steps.get(config.completions) if isinstance(config, AnnotateConfig) else None
    if not sample or not isinstance(config, AnnotateConfig) or not isinstance(sample.config, SampleConfig):
        return
    size, drawn = config.completions_per_comparison, sample.config.completions_per_prompt
    if size > drawn:
        message = (
            f"{sample.name} draws {drawn} completions of a prompt, fewer than {size}: lower this key, or "
            f"raise {sample.name}.completions_per_prompt"
        )
        yield step.source.problem(("completions_per_comparison",), message)


def _rules_about_nobody(step: Step, steps: Mapping[str, Step]) -> Iterator[Problem]:
    """Rules on annotators that have no effect, or let nothing pass, whoever annotates."""
    config = step.config
    before = steps.get(str(getattr(config, "annotations", None)))
    if not isinstance(config, FromJudgementsOrScores) or not before:
        return
    source = before.config
    if not isinstance(source, AnnotateConfig):
        return
    has_gold, has_others = source.gold > 0, source.by == "people" or source.snapshot is not None
    if config.min_gold is not None and not has_gold:
        message = f"has no effect: {before.name} asks no gold (gold: 0); raise that, or remove this key"
        yield step.source.problem(("min_gold",), message)
    if "min_model_agreement" in config.model_fields_set and source.judge is None:
        message = f"has no effect: no model judges in {before.name}; give it a judge, or remove this key"
        yield step.source.problem(("min_model_agreement",), message)
    judge = source.judge.model if source.judge else None
    if has_others:
        return  # who they are is known when they have judged
    is_measured = has_gold or source.by == "simulated" or judge in config.exclude
    if judge and config.min_model_agreement and not is_measured:
        message = (
            f"{config.min_model_agreement:g} cannot be reached: {judge!r} judges alone in {before.name}, and "
            "there is nobody and no gold to agree with. Give it gold, or a snapshot of people's judgements, "
            "or say 0 here to take its word"
        )
        yield step.source.problem(("min_model_agreement",), message)
    people = [f"simulated-{i + 1}" for i in range(source.annotators)] if source.by == "simulated" else []
    names = [*people, *([judge] if judge else [])]
    if missing := [name for name in config.exclude if name not in names]:
        message = f"nobody called {missing[0]!r} judges in {before.name}; those who do: {', '.join(names)}"
        yield step.source.problem(("exclude",), message)
    if config.annotator_weights == "dawid_skene" and not has_gold:
        from preference_data.preferences.annotator_weights import (
            ENOUGH_ANNOTATORS,
        )

        if len(names) < ENOUGH_ANNOTATORS:
            message = (
                f"dawid_skene needs gold or {ENOUGH_ANNOTATORS} annotators, and {before.name} has no gold "
                f"and {len(names)} annotators: raise gold or annotators there, or say equal"
            )
            yield step.source.problem(("annotator_weights",), message)


def _behind(ref: str, shared: str, steps: Mapping[str, Step]) -> str | None:
    """The completions or the corpus that a stage of completions, judgements, scores or pairs is made of."""
    while ref in steps:
        step = steps[ref]
        if named := getattr(step.config, shared, None):
            return str(named)
        ref = next(
            (ref for loc, _, ref in step.references if loc == ("completions",) and ref in step.needs), ""
        )
    return None


def origin_of(step: Step, steps: Mapping[str, Step]) -> Step | None:
    """The stage whose model a training stage's policy comes from, if it is of the recipe."""
    while isinstance(step.config, TrainingConfig) and isinstance(step.config.starts_from, str):
        before = steps.get(step.config.starts_from)
        if before is None or before.name not in step.needs:  # only what comes before goes in no circle
            return None
        step = before
    return step


def _clips_too_long(step: Step, config: TrainingConfig, steps: Mapping[str, Step]) -> Iterator[Problem]:
    """Clips that may be longer than a model with a `clip_s` hears: it would silently not hear their end.

    One that was trained on longer clips, a Whisper, hears the last frames of a clip right only with silence
    behind them. A mixture's clips are measured before training: its limit is often far above what they last.
    """
    corpus, origin = steps.get(config.corpus), origin_of(step, steps)
    model = getattr(origin.config, "model", None) if origin else None
    if origin is None or corpus is None or not isinstance(model, ModelShape | Assemble) or not model.clip_s:
        return
    if not isinstance(corpus.config, CorpusConfig) or corpus.config.longest_s is None:
        return
    longest_s, is_made = corpus.config.longest_s, corpus.config.corpus in MADE
    is_cut = isinstance(model, Assemble)
    fits = model.clip_s > longest_s if is_cut else model.clip_s >= longest_s
    if not fits:
        lengths = f"{'' if is_made else 'may '}last {longest_s:g} s"
        least = floor(longest_s) + 1 if is_cut else ceil(longest_s)
        why = " and needs silence behind a clip" if is_cut and model.clip_s == longest_s else ""
        shorter = model.clip_s - 1 if is_cut else model.clip_s
        instead = "" if is_made or not shorter else f", or {corpus.name}.max_duration_s to {shorter}"
        yield step.source.problem(
            ("corpus",),
            f"clips of {corpus.name} {lengths}, but the model hears {model.clip_s} s{why}: set "
            f"{origin.name}.model.clip_s to {least} or more{instead}",
        )


def _empty_lessons(step: Step, steps: Mapping[str, Step]) -> Iterator[Problem]:
    """Lessons of a curriculum about facts that no clip has."""
    corpus = steps.get(str(getattr(step.config, "corpus", None)))
    if not isinstance(step.config, PretrainConfig) or corpus is None or not step.config.curriculum:
        return
    if not isinstance(corpus.config, CorpusConfig) or corpus.config.corpus not in MADE:
        return
    from preference_data.corpora.catalog import phrasebook_of  # these take half a second
    from preference_data.toy_world.phrasebook import Phrasebook

    slots = Phrasebook.load(phrasebook_of(corpus.config.corpus, Path(corpus.config.dir or ""))).slots
    for number, lesson in enumerate(step.config.curriculum):
        if lesson.slot not in slots:
            message = f"clips of {corpus.name} have no fact {lesson.slot!r}; known: {', '.join(slots)}"
            yield step.source.problem(("curriculum", number, "slot"), message)
        elif not slots[lesson.slot].sequence:
            known = slots[lesson.slot].values
            for place, value in enumerate(lesson.values):
                if value not in known:
                    message = f"no {lesson.slot} of {corpus.name} is {value!r}; known: {', '.join(known)}"
                    yield step.source.problem(("curriculum", number, "values", place), message)


def with_inherited_train(
    file: StageFile, config: StageConfig, earlier: list[Step]
) -> tuple[StageConfig, list[Problem]]:
    """A stage's config with the `train` of the stage that it goes on from, unless it says its own.

    What pre-training keeps frozen, a tower as Whisper's, stays frozen. Stages with LoRA train nothing of the
    model itself: their own `train` is empty, and one after them goes on from the stage before them.
    """
    if not isinstance(config, FurtherTrainingConfig) or config.train is not None or config.lora is not None:
        return config, []
    before = train_comes_from(config, {step.name: step for step in earlier})
    if before is None or not isinstance(before.config, TrainingConfig):
        return config, []
    if "new_tokens" in (before.config.train or ()):
        message = f"must be given: {before.name} trains new_tokens, which are learned in pretrain only"
        return config, [file.problem(("stage",), f"train {message}")]
    return config.model_copy(update={"train": before.config.train}), []


def train_comes_from(config: FurtherTrainingConfig, steps: Mapping[str, Step]) -> Step | None:
    """The nearest stage among those that a policy comes from which says what learns, if one does."""
    before = steps.get(config.policy)
    while before is not None and isinstance(before.config, TrainingConfig):
        if before.config.train is not None and "train" in before.source.data:
            return before
        before = steps.get(str(getattr(before.config, "policy", None)))
    return None


def thawed_parts(steps: list[Step]) -> list[str]:
    """Parts of a model that a later stage trains although an earlier one kept them frozen, in words.

    No mistake: a stage may well train more than the one before it, and nothing is lost by it.
    """
    by_name = {step.name: step for step in steps}
    lines = []
    for step in steps:
        config = step.config
        before = by_name.get(config.policy) if isinstance(config, FurtherTrainingConfig) else None
        if before is None or not isinstance(config, FurtherTrainingConfig) or config.lora is not None:
            continue
        frozen = _frozen(before)
        if thawed := [part for part in _PARTS if part in frozen and part not in _frozen(step)]:
            lines.append(f"{step.name} trains {', '.join(thawed)}, which {before.name} kept frozen")
    return lines


def _frozen(step: Step) -> set[ModelPart]:
    """Parts that a stage does not train; with LoRA none counts, whose updates are merged into them."""
    train = step.config.train if isinstance(step.config, TrainingConfig) else None
    return set() if train is None else set(_PARTS) - set(train)
