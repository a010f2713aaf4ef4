"""AIR-Bench chat questions and recognition for several policies, with controls.

Controls: the same questions with the clips shuffled (does the policy listen?), and, where judging is free,
the best constant answer (how far does no listening get?); multiple choice also with silence. Reads: policies,
corpus. Writes: answers/ (AIR-Bench's own jsonl), items/ (marks per question), scores.json.
    align run recipes/demo --only 7_evaluate
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from align.evaluation import aggregation, comparison, judged_answers
from align.evaluation.benchmarks import air_bench, hearing
from align.evaluation.benchmarks import tasks as benchmarks
from align.evaluation.benchmarks.air_bench import Item
from align.evaluation.benchmarks.multiple_choice import is_choice
from align.evaluation.benchmarks.rows import Utterance, held_out_utterances
from align.evaluation.judged_answers import Judge, JudgedAnswer
from align.evaluation.judges import agreement as judge_agreement
from align.evaluation.judges.facts import FactJudge
from align.evaluation.judges.llm_judge import open_judge
from align.generation.complete import Completions, RequestSet, complete_all, first_texts
from align.generation.engine import Completion, Decoding, Request, open_engine
from align.models.features import ClipFeatures, SilentClips
from align.models.qwen2_audio.model import Qwen2AudioProcessor, load_processor, located
from align.recipe.config.evaluation import EvaluateConfig
from align.run_folder.artifacts import StageFolder, plain_values, write_json
from align.run_folder.progress import Progress
from preference_data import store
from preference_data.audio.decode import SAMPLE_RATE
from preference_data.dataset.dataset import Dataset
from preference_data.prompts.prompts import PromptFormat, pretraining_prompt
from preference_data.schema import Comparison, Judgement, Prompt

_CONSTANTS = 20
"""Frequent reference answers that are tried as the answer to everything."""
_CONTROL = "shuffled"
_RECOGNISED = "recognised"


def run(config: EvaluateConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Complete all prompts with each policy, judge, compare; returns the after-policy's main numbers."""
    corpus = inputs[config.corpus]
    processor = load_processor(located(inputs[config.after]))
    heard_s = processor.feature_extractor.n_samples / SAMPLE_RATE
    questions = _questions(config, corpus, heard_s)
    judge = _judge(config, corpus, out.final.parent)
    sets = _request_sets(config, questions, processor)
    completions: dict[str, dict[str, Completions]] = {}
    for policy in config.policies:
        # Where judging costs money, one policy's control is enough.
        needed = [part for part in sets if judge.is_free or policy == config.after or part.name != _CONTROL]
        completions[policy] = _complete(config, policy, located(inputs[policy]), needed, out)
    judged = {
        policy: _judge_answers(policy, questions, own["answers"], judge, out)
        for policy, own in completions.items()
    }
    texts = {
        policy: {name: first_texts(groups) for name, groups in own.items()}
        for policy, own in completions.items()
    }
    usable = questions.audit.usable
    comparisons = _comparisons(config, questions, texts, judged)
    report = {
        "split": config.split,
        "n": len(usable),
        "audio_root": str(questions.root.resolve()) if config.air_bench else config.corpus,
        "unusable": plain_values(questions.audit.missing),
        "unusable_rows": {
            part.file: plain_values(part.rows.missing)
            for part in questions.recognition
            if part.rows.missing or part.name != _RECOGNISED
        },
        "cut": [item.uniq_id for item in usable if questions.audit.seconds.get(item.audio, 0.0) > heard_s],
        "judge": judge.describe(usable),
        "before": config.before,
        "after": config.after,
        "policies": {
            policy: _scores(policy, questions, texts[policy], judged[policy], judge, out.name)
            for policy in config.policies
        },
        **comparisons,
    }
    if config.annotations:
        report["judge_agreement"] = _agreement(config, judge, inputs[config.annotations], corpus, out.name)
    if judge.is_free:
        report["constant_answer"] = _best_constant(judge, usable)
    if without_clip := _answered_without_clip(questions, texts):
        report["answered_without_clip"] = without_clip
    write_json(out.path / "scores.json", report)
    unusable = len(questions.audit.missing) + sum(len(part.rows.missing) for part in questions.recognition)
    return {
        **({"unusable": float(unusable)} if unusable else {}),
        **report["policies"][config.after]["overall"],
        **{f"delta_{name}": interval["delta"] for name, interval in report["comparison"].items()},
    }


class _Recognition(NamedTuple):
    """Rows that are scored without a judge; `name` is that of their texts, `file` where they come from."""

    name: str
    file: str
    kind: benchmarks.Kind
    rows: benchmarks.Rows


class _Questions(NamedTuple):
    """Everything that policies are given. `root` / (`prefix` + an item's audio) is its clip."""

    root: Path
    prefix: str
    everything: list[Item]
    audit: air_bench.Audit
    recognition: list[_Recognition]
    """The corpus' own utterances, then the reports' other benchmarks."""


def _questions(config: EvaluateConfig, corpus: Path, heard_s: float) -> _Questions:
    """The corpus' own questions or those of AIR-Bench itself, with every clip decoded once.

    Raises:
        ValueError: no clip can be used.
    """
    own = corpus / config.split / "recognition.jsonl"
    utterances = held_out_utterances(own)
    rows = [
        _Recognition(
            _RECOGNISED,
            str(own),
            "recognition",
            benchmarks.usable_rows(corpus, utterances, Dataset(corpus).find, heard_s),
        ),
        *(
            _Recognition(f"benchmark_{i}", path, kind, benchmarks.open_rows(Path(path).expanduser(), kind))
            for i, (path, kind) in enumerate(config.benchmarks.items())
        ),
    ]
    benchmark = Path(config.air_bench).expanduser() if config.air_bench else None
    root = benchmark or corpus / config.split
    items = air_bench.read(root)
    audit = air_bench.audit(root, items, air_bench.LONGEST_S if benchmark else heard_s)
    if not audit.usable:
        why = audit.missing[0].why
        raise ValueError(f"{root}: no clip of {len(items)} questions is usable; first: {why}")
    return _Questions(benchmark or corpus, "" if benchmark else f"{config.split}/", items, audit, rows)


def _judge(config: EvaluateConfig, corpus: Path, run: Path) -> Judge:
    """The judge of answers. Replies are kept in the run folder: no call is made twice."""
    if config.judge == "facts":
        return FactJudge(corpus / "phrasebook.yaml")
    return open_judge(cache=run / "judge_replies.jsonl", **config.judge.model_dump())


def _agreement(
    config: EvaluateConfig, judge: Judge, annotated: Path, corpus: Path, label: str
) -> dict[str, dict[str, Any]]:
    """`judge_agreement` on comparisons that annotators have made, drawn by chance."""
    comparisons = [
        row for row in store.read(annotated / "comparisons.jsonl", Comparison) if row.purpose == "comparison"
    ]
    lot = np.random.default_rng(config.seed).permutation(len(comparisons))[: config.annotated_pairs]
    return judge_agreement.measure(
        judge,
        [comparisons[i] for i in sorted(lot)],
        store.stream(annotated / "judgements.jsonl", Judgement),
        {prompt.id: prompt for prompt in store.stream(corpus / "prompts.jsonl", Prompt)},
        f"{label} annotated answers judged",
    )


# -------------------------------------------------------------------------- complete


def _request_sets(
    config: EvaluateConfig, questions: _Questions, processor: Qwen2AudioProcessor
) -> list[RequestSet]:
    """The benchmark, the same with its clips shuffled, what is recognised, and the reports' own rows."""
    longest_s = air_bench.LONGEST_S if config.air_bench else None
    clips_of = ClipFeatures(processor, questions.root, longest_s=longest_s)
    items, clips = questions.audit.usable, [questions.prefix + item.audio for item in questions.audit.usable]
    sets = [
        RequestSet("answers", clips_of, _about(items, clips)),
        RequestSet(_CONTROL, clips_of, _about(items, _shuffled(clips, config.seed))),
    ]
    for part in questions.recognition:
        sets += _row_sets(config, part, processor)
    return sets


def _row_sets(config: EvaluateConfig, part: _Recognition, processor: Qwen2AudioProcessor) -> list[RequestSet]:
    """Rows that are scored without a judge; multiple choice also with silence, and with another clip."""
    is_own = part.name == _RECOGNISED
    rows, longest_s = part.rows.usable, None if is_own else air_bench.LONGEST_S
    clips_of = ClipFeatures(processor, part.rows.root, longest_s=longest_s)
    requests = [
        Request(
            _own_prompt(row, config.prompt_format) if is_own else benchmarks.prompt_of(part.kind, row),
            (row.audio,),
            plain=not benchmarks.is_chat(part.kind),
        )
        for row in rows
    ]
    sets = [RequestSet(part.name, clips_of, requests)]
    if is_choice(part.kind):
        silent = SilentClips(processor, part.rows.root, longest_s=longest_s, cache_bytes=0)
        others = hearing.other_clips([row.audio for row in rows], config.seed)
        # A benchmark of one clip has no other: then nothing is asked
        swapped = [
            request._replace(audios=(other,)) for request, other in zip(requests, others, strict=False)
        ]
        sets.append(RequestSet(_control_name(part, "silence"), silent, requests))
        sets.append(RequestSet(_control_name(part, "other_clip"), clips_of, swapped))
    return sets


def _control_name(part: _Recognition, control: hearing.Control) -> str:
    """Of a multiple-choice benchmark's requests with something else in the clip's place."""
    return f"{part.name}_{control}"


def _about(items: list[Item], clips: list[str]) -> list[Request]:
    return [Request(item.question, (clip,)) for item, clip in zip(items, clips, strict=True)]


def _shuffled(clips: list[str], seed: int) -> list[str]:
    """The clips in an order in which none keeps its place."""
    order = np.random.default_rng(seed).permutation(len(clips))
    shuffled = np.array(clips, dtype=object)
    shuffled[order] = shuffled[np.roll(order, 1)]
    return list(shuffled)


def _own_prompt(utterance: Utterance, prompt_format: PromptFormat) -> str:
    """The text that a policy is to continue, in the prompt format that it was pre-trained in."""
    return pretraining_prompt(
        utterance.prompt,
        1,
        prompt_format,
        audio_language=utterance.audio_language,
        text_language=utterance.text_language,
        question=utterance.question,
    )


def _complete(
    config: EvaluateConfig, policy: str, model: Path | str, sets: list[RequestSet], out: StageFolder
) -> dict[str, Completions]:
    """A policy's completions by set, greedy; each batch is saved when done."""
    with Progress(f"{out.name} {policy}", sum(len(part.requests) for part in sets), out.path) as progress:
        return complete_all(
            partial(open_engine, config.engine, model, sets[0].clips, out.path.parent),
            sets,
            Decoding(config.max_new_tokens),
            seed=config.seed,
            batch_size=config.batch_size,
            folder=out.path / "completions" / _file_name(policy),
            workers=config.workers,
            on_progress=progress.update,
        )


def _file_name(policy: str) -> str:
    return policy.replace("/", "_")


# -------------------------------------------------------------------------- judge


def _judge_answers(
    policy: str, questions: _Questions, completions: Completions, judge: Judge, out: StageFolder
) -> list[JudgedAnswer]:
    """Judge a policy's answers, and write them with their marks for people and for AIR-Bench's own tools."""
    texts = first_texts(completions)
    judged = judge.judge(questions.audit.usable, texts, f"{out.name} {policy} judged")
    answers = [
        answer.model_copy(update={"entropy": _entropy(group)})
        for answer, group in zip(judged, completions, strict=True)
    ]
    name = f"{_file_name(policy)}.jsonl"
    air_bench.write_answers(out.path / "answers" / name, questions.audit.usable, texts)
    judged_answers.write(out.path / "items" / name, answers, questions.prefix)
    return answers


def _entropy(completions: Sequence[Completion]) -> float | None:
    """Mean -log p of a greedy completion's tokens, in nats; None where there is none.

    -log p of the likeliest token is the min-entropy of the distribution that it was taken from, which is at
    most Shannon's entropy: of the policy's own answers all that costs nothing.
    """
    return fmean(-logp for logp in completions[0].logps) if completions and completions[0].logps else None


def _scores(
    policy: str,
    questions: _Questions,
    texts: dict[str, list[str]],
    answers: list[JudgedAnswer],
    judge: Judge,
    label: str,
) -> dict[str, Any]:
    """The report on one policy."""
    scores: dict[str, Any] = {
        "overall": comparison.levels(answers),
        "categories": comparison.levels_by_category(answers),
        "kinds": comparison.levels_by_kind(answers),
        "ratings": aggregation.as_scores(questions.everything, answers),
        "recognition": {
            source: numbers
            for part in questions.recognition
            for source, numbers in benchmarks.score(part.kind, part.rows.usable, texts[part.name]).items()
        },
    }
    if choices := _multiple_choice(questions, texts):
        scores["multiple_choice"] = choices
    if _CONTROL in texts:
        label = f"{label} {policy} judged, clips shuffled"
        scores["shuffled_audio"] = comparison.levels(
            judge.judge(questions.audit.usable, texts[_CONTROL], label)
        )
    return scores


def _multiple_choice(questions: _Questions, texts: dict[str, list[str]]) -> dict[str, Any]:
    """{source: numbers}: how a policy answers, and what it owes to the clips, see `hearing.report`."""
    reports: dict[str, Any] = {}
    for part in questions.recognition:
        if is_choice(part.kind):
            controls = {
                control: own for control in hearing.CONTROLS if (own := texts[_control_name(part, control)])
            }
            source = part.rows.usable[0].source
            reports[source] = hearing.report(part.kind, part.rows.usable, texts[part.name], controls)
    return reports


def _answered_without_clip(
    questions: _Questions, texts: dict[str, dict[str, list[str]]]
) -> dict[str, list[str]]:
    """{source: ids} of multiple-choice questions that most policies answer without their clip."""
    return {
        part.rows.usable[0].source: list(
            hearing.answered_without_clip(
                part.kind,
                part.rows.usable,
                {policy: own[_control_name(part, "silence")] for policy, own in texts.items()},
            )
        )
        for part in questions.recognition
        if is_choice(part.kind)
    }


def _best_constant(judge: Judge, items: list[Item]) -> dict[str, Any]:
    """The frequent reference answer that would do best if given to every question."""
    frequent = [text for text, _ in Counter(item.answer_gt for item in items).most_common(_CONSTANTS)]
    levels = {text: comparison.levels(judge.judge(items, [text] * len(items))) for text in frequent}
    best = max(levels, key=lambda text: levels[text]["score"])
    return {"text": best, **levels[best]}


# -------------------------------------------------------------------------- compare


def _comparisons(
    config: EvaluateConfig,
    questions: _Questions,
    texts: dict[str, dict[str, list[str]]],
    judged: dict[str, list[JudgedAnswer]],
) -> dict[str, Any]:
    """Differences of `after` from `before` and from others, and everybody's gain over `before`."""
    after = judged[config.after]
    by_category = comparison.differences(judged[config.before], after, config.seed)
    overall = by_category.pop(comparison.ALL, {})
    first, second = texts[config.before], texts[config.after]
    spoken: dict[str, Any] = {}
    for name, _, kind, rows in questions.recognition:
        spoken |= benchmarks.compare(kind, rows.usable, first[name], second[name], config.seed)
    against = {
        policy: comparison.differences(other, after, config.seed).get(comparison.ALL, {})
        for policy, other in judged.items()
        if policy not in (config.before, config.after)
    }
    gains = {
        policy: comparison.differences(judged[config.before], other, config.seed).get(comparison.ALL, {})
        for policy, other in judged.items()
        if policy not in (config.before, config.after)
    }
    report: dict[str, Any] = plain_values(
        {
            "comparison": overall,
            "gains": {**gains, config.after: overall},
            "by_category": by_category,
            "by_kind": comparison.differences_by_kind(judged[config.before], after, config.seed),
            "recognition_comparison": spoken,
            "against": against,
        }
    )
    return report
