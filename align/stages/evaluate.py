"""AIR-Bench chat questions and recognition for several policies, with controls.

Controls: the same questions with the clips shuffled (does the policy listen?), and, where judging is free,
the best constant answer (how far does no listening get?). Reads: policies, corpus. Writes: answers/
(AIR-Bench's own jsonl), items/ (marks per question), scores.json.
    align run recipes/demo --only 7_evaluate
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align.evaluation import aggregation, comparison, judged_answers
from align.evaluation.benchmarks import air_bench, recognition
from align.evaluation.benchmarks import tasks as benchmarks
from align.evaluation.benchmarks.air_bench import Item
from align.evaluation.benchmarks.recognition import Utterance
from align.evaluation.judged_answers import Judge, JudgedAnswer
from align.evaluation.judges import agreement as judge_agreement
from align.evaluation.judges.facts import FactJudge
from align.evaluation.judges.llm_judge import ChatModel, LLMJudge
from align.evaluation.judges.local_model import LocalModel
from align.evaluation.judges.prompt import Official, Strict
from align.evaluation.statistics import Interval
from align.generation.generate import Decoding, Request
from align.generation.sheets import Sheet, answer
from align.models.features import ClipFeatures
from align.models.qwen2_audio.model import Qwen2AudioProcessor, load_processor, located
from align.recipe.config.evaluation import EvaluateConfig, JudgeModel
from align.run_folder.artifacts import StageFolder, read_json, write_json
from preference_data import store
from preference_data.audio.decode import SAMPLE_RATE
from preference_data.prompts.prompts import PromptFormat, pretraining_prompt
from preference_data.schema import Comparison, Judgement, Prompt

_CONSTANTS_TRIED = 20


def run(config: EvaluateConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Answer, judge and compare; returns the after-policy's headline numbers."""
    corpus = inputs[config.corpus]
    processor = load_processor(located(inputs[config.after]))
    asked = _questions(config, corpus)
    items = asked.usable
    own = corpus / config.split / "recognition.jsonl"
    utterances = recognition.read(own) if own.exists() else []
    judge = _judge(config, corpus, out.final.parent)
    heard_s = processor.feature_extractor.n_samples / SAMPLE_RATE
    sheets = _sheets(config, asked, utterances, processor)
    found: dict[str, dict[str, Any]] = {}
    judged: dict[str, list[JudgedAnswer]] = {}
    said: dict[str, dict[str, list[str]]] = {}
    for policy in config.policies:
        texts = said[policy] = _texts(config, policy, located(inputs[policy]), sheets, out)
        answers = judged[policy] = judge.judge(items, texts["answers"], f"{out.name} {policy} judged")
        found[policy] = {
            "overall": comparison.levels(answers),
            "categories": comparison.levels_by_category(answers),
            "ratings": aggregation.as_scores(asked.everything, answers),
            "recognition": _recognition(config, asked, utterances, texts),
        }
        if judge.is_free or policy == config.after:
            label = f"{out.name} {policy} judged, clips shuffled"
            found[policy]["shuffled_audio"] = comparison.levels(judge.judge(items, texts["shuffled"], label))
        name = policy.replace("/", "_")
        air_bench.write_answers(out.path / "answers" / f"{name}.jsonl", items, texts["answers"])
        judged_answers.write(out.path / "items" / f"{name}.jsonl", answers, asked.prefix)
    by_category = comparison.differences(judged[config.before], judged[config.after], config.seed)
    overall = by_category.pop(comparison.ALL, {})
    report = {
        "split": config.split,
        "n": len(items),
        "audio_root": str(asked.root.resolve()) if config.air_bench else config.corpus,
        "unusable": [one._asdict() for one in asked.missing],
        "unusable_rows": {path: [one._asdict() for one in rows.missing] for path, rows in asked.rows.items()},
        "cut": air_bench.longer_than(heard_s, asked.root, items) if config.air_bench else [],
        "judge": judge.describe(items),
        "before": config.before,
        "after": config.after,
        "policies": found,
        "comparison": _plain_intervals(overall),
        "by_category": {category: _plain_intervals(rows) for category, rows in by_category.items()},
        "recognition_comparison": _recognition_differences(
            config, asked, utterances, said[config.before], said[config.after]
        ),
        "against": {
            policy: _plain_intervals(
                comparison.differences(answers, judged[config.after], config.seed).get(comparison.ALL, {})
            )
            for policy, answers in judged.items()
            if policy not in (config.before, config.after)
        },
    }
    if config.annotations:
        report["judge_agreement"] = _agreement(config, judge, inputs[config.annotations], corpus, out.name)
    if judge.is_free:
        report["constant_answer"] = _best_constant(judge, items)
    write_json(out.path / "scores.json", report)
    return {
        **found[config.after]["overall"],
        **{f"delta_{name}": interval.delta for name, interval in overall.items()},
    }


class _Questions(NamedTuple):
    """What is asked. `root` / (`prefix` + an item's audio) is its clip."""

    corpus: Path
    root: Path
    prefix: str
    everything: list[Item]
    usable: list[Item]
    missing: list[air_bench.Missing]
    rows: dict[str, benchmarks.Rows]
    """The reports' other benchmarks, by their file."""


def _questions(config: EvaluateConfig, corpus: Path) -> _Questions:
    """The corpus' own questions, whose clips were checked when it was made, or those of AIR-Bench itself.

    Raises:
        ValueError: no clip of AIR-Bench can be used.
    """
    rows = {path: benchmarks.open_rows(Path(path).expanduser()) for path in config.benchmarks}
    if config.air_bench is None:
        items = air_bench.read(corpus / config.split)
        return _Questions(corpus, corpus, f"{config.split}/", items, items, [], rows)
    root = Path(config.air_bench).expanduser()
    items = air_bench.read(root)
    usable, missing = air_bench.audit(root, items)
    if not usable:
        raise ValueError(f"{root}: no clip of {len(items)} questions is usable; first: {missing[0].why}")
    return _Questions(corpus, root, "", items, usable, missing, rows)


def _plain_intervals(rows: dict[str, Interval]) -> dict[str, dict[str, float]]:
    return {metric: interval._asdict() for metric, interval in rows.items()}


def _judge(config: EvaluateConfig, corpus: Path, run: Path) -> Judge:
    """How answers are judged. Replies are kept in the run folder: no call is made twice."""
    if config.judge == "facts":
        return FactJudge(corpus / "phrasebook.yaml")
    asked = config.judge
    model: ChatModel = (
        _endpoint(asked, asked.url) if asked.url else LocalModel(Path(asked.model).expanduser())
    )
    protocol = Official() if asked.protocol == "official" else Strict()
    return LLMJudge(model, run / "judge_replies.jsonl", protocol, asked.canary_items)


def _endpoint(asked: JudgeModel, url: str) -> ChatModel:
    from align.evaluation.judges.endpoint import Endpoint  # its client takes a second to import

    return Endpoint(url, asked.model, parameters=asked.parameters, concurrency=asked.concurrency)


def _agreement(
    config: EvaluateConfig, judge: Judge, annotated: Path, corpus: Path, label: str
) -> dict[str, dict[str, Any]]:
    """`judge_agreement` on comparisons that annotators have made, drawn by chance."""
    comparisons = [
        one for one in store.read(annotated / "comparisons.jsonl", Comparison) if one.purpose == "comparison"
    ]
    lot = np.random.default_rng(config.seed).permutation(len(comparisons))[: config.annotated_pairs]
    return judge_agreement.measure(
        judge,
        [comparisons[i] for i in sorted(lot)],
        store.stream(annotated / "judgements.jsonl", Judgement),
        {prompt.id: prompt for prompt in store.stream(corpus / "prompts.jsonl", Prompt)},
        f"{label} annotated answers judged",
    )


def _recognition(
    config: EvaluateConfig, asked: _Questions, utterances: list[Utterance], texts: dict[str, list[str]]
) -> dict[str, dict[str, Any]]:
    """Source -> metrics: of the corpus' own utterances, and of the reports' benchmarks."""
    found: dict[str, dict[str, Any]] = {**benchmarks.score("recognition", utterances, texts["recognised"])}
    for path, rows in asked.rows.items():
        found |= benchmarks.score(config.benchmarks[path], rows.usable, texts[path])
    return found


def _recognition_differences(
    config: EvaluateConfig,
    asked: _Questions,
    utterances: list[Utterance],
    before: dict[str, list[str]],
    after: dict[str, list[str]],
) -> dict[str, dict[str, Any]]:
    """Source -> metric -> paired difference with its interval, where there is one."""
    found = benchmarks.compare(
        "recognition", utterances, before["recognised"], after["recognised"], config.seed
    )
    for path, rows in asked.rows.items():
        found |= benchmarks.compare(
            config.benchmarks[path], rows.usable, before[path], after[path], config.seed
        )
    return found


def _sheets(
    config: EvaluateConfig, asked: _Questions, utterances: list[Utterance], processor: Qwen2AudioProcessor
) -> list[Sheet]:
    """The benchmark, the benchmark with its clips shuffled, what is recognised, and the reports' own rows."""
    of_corpus = ClipFeatures(processor, asked.corpus)
    of_benchmark = of_corpus
    if config.air_bench:
        of_benchmark = ClipFeatures(processor, asked.root, longest_s=air_bench.LONGEST_S)
    items, clips = asked.usable, [asked.prefix + item.audio for item in asked.usable]
    order = np.random.default_rng(config.seed).permutation(len(items))
    wrong = [""] * len(items)
    for here, there in zip(order, np.roll(order, 1), strict=True):  # nobody keeps their own clip
        wrong[here] = clips[there]
    groups = {
        "answers": (
            of_benchmark,
            [Request(item.question, (clip,)) for item, clip in zip(items, clips, strict=True)],
        ),
        "shuffled": (
            of_benchmark,
            [Request(item.question, (clip,)) for item, clip in zip(items, wrong, strict=True)],
        ),
        "recognised": (
            of_corpus,
            [Request(_plain(one, config.prompt_format), (one.audio,), plain=True) for one in utterances],
        ),
    }
    return [Sheet(name, features, requests) for name, (features, requests) in groups.items()] + [
        Sheet(
            path,
            ClipFeatures(processor, rows.root, longest_s=air_bench.LONGEST_S),
            [Request(benchmarks.prompt_of(row), (row.audio,), plain=True) for row in rows.usable],
        )
        for path, rows in asked.rows.items()
    ]


def _plain(one: Utterance, prompt_format: PromptFormat) -> str:
    """What a policy is to continue, in the prompt format that it was pre-trained in."""
    return pretraining_prompt(
        one.prompt,
        1,
        prompt_format,
        audio_language=one.audio_language,
        text_language=one.text_language,
        question=one.question,
    )


def _texts(
    config: EvaluateConfig, policy: str, model: Path | str, sheets: list[Sheet], out: StageFolder
) -> dict[str, list[str]]:
    """A policy's texts by sheet; saved once made."""
    saved = out.path / "texts" / f"{policy.replace('/', '_')}.json"
    if not saved.exists():
        how = Decoding(config.max_new_tokens)
        label = f"{out.name} {policy}"
        texts = answer(model, sheets, how, seed=config.seed, batch_size=config.batch_size, label=label)
        write_json(saved, texts)
    found: dict[str, list[str]] = read_json(saved)
    return found


def _best_constant(judge: Judge, items: list[Item]) -> dict[str, Any]:
    """The frequent reference answer that would do best if given to every question."""
    frequent = [text for text, _ in Counter(item.answer_gt for item in items).most_common(_CONSTANTS_TRIED)]
    tried = {
        text: comparison.levels(judge.judge(items, [text] * len(items), "constant")) for text in frequent
    }
    best = max(tried, key=lambda text: tried[text]["score"])
    return {"text": best, **tried[best]}
