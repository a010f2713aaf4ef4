"""What stages say together that none says alone: lengths of clips, facts, what learns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from align.recipe.config.corpus import CLIP_S, CorpusConfig
from align.recipe.config.evaluation import PromoteConfig
from align.recipe.config.preference import AnnotateConfig, FromJudgementsOrScores, SampleConfig
from align.recipe.config.training import (
    FurtherTrainingConfig,
    ModelPart,
    ModelShape,
    PretrainConfig,
    TrainingConfig,
)
from align.recipe.stage_file import Problem

if TYPE_CHECKING:
    from align.recipe.recipe import Step

_MADE = ("synthetic", "spoken_digits")
"""Corpora whose clips are made, with facts and a length that are known before."""
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
    """Clips that may be longer than a small model hears: it would silently not hear their end.

    A mixture's clips are measured before training: its limit is often far above what they last.
    """
    corpus, origin = steps.get(config.corpus), origin_of(step, steps)
    shape = getattr(origin.config, "model", None) if origin else None
    if origin is None or corpus is None or not isinstance(shape, ModelShape):
        return
    if not isinstance(corpus.config, CorpusConfig) or corpus.config.corpus == "mixture":
        return
    is_made, limit_s = corpus.config.corpus in _MADE, corpus.config.max_duration_s
    longest_s = CLIP_S if is_made else limit_s
    if shape.clip_s < longest_s:
        lengths = f"last {CLIP_S:g} s" if is_made else f"may last {limit_s:g} s"
        instead = "" if is_made else f", or {corpus.name}.max_duration_s to {shape.clip_s}"
        yield step.source.problem(
            ("corpus",),
            f"clips of {corpus.name} {lengths}, but the model hears {shape.clip_s} s: set "
            f"{origin.name}.model.clip_s to {ceil(longest_s)} or more{instead}",
        )


def _empty_lessons(step: Step, steps: Mapping[str, Step]) -> Iterator[Problem]:
    """Lessons of a curriculum about facts that no clip has."""
    corpus = steps.get(str(getattr(step.config, "corpus", None)))
    if not isinstance(step.config, PretrainConfig) or corpus is None or not step.config.curriculum:
        return
    if not isinstance(corpus.config, CorpusConfig) or corpus.config.corpus not in _MADE:
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


def thawed_parts(steps: list[Step]) -> list[str]:
    """Parts of a model that a later stage trains although an earlier one kept them frozen, in words.

    No mistake: a stage may well train more than the one before it, and nothing is lost by it. But where
    `train` is left out everything learns, a tower too that pre-training has kept as Whisper's.
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
            why = "" if config.train else ", because it has no `train`: then all parts learn"
            lines.append(f"{step.name} trains {', '.join(thawed)}, which {before.name} kept frozen{why}")
    return lines


def _frozen(step: Step) -> set[ModelPart]:
    """Parts that a stage does not train; with LoRA none counts, whose updates are merged into them."""
    train = step.config.train if isinstance(step.config, TrainingConfig) else None
    return set() if train is None else set(_PARTS) - set(train)
