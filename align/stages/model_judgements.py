"""A model as annotator beside people, or in their place: its part of the annotate stage.

Writes: model_replies.jsonl (every reply), model.json (agreement, biases, what the replies came to).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.evaluation.judges.chat_model import open_chat_model
from align.evaluation.judges.comparison_judge import ComparisonJudge, ModelJudgements, RankingReply
from align.recipe.config.preference import AnnotateConfig
from align.run_folder.artifacts import StageFolder, read_json, write_json
from preference_data import store
from preference_data.audio.clip_files import ClipFile
from preference_data.audio.decode import load
from preference_data.audio.encode import encode
from preference_data.dataset.dataset import Dataset
from preference_data.preferences import model_agreement
from preference_data.preferences.model_agreement import ModelAgreement
from preference_data.schema import Axis, Comparison, Completion, Judgement, Ranking, stable_id
from ui_annotation.project import Project

REPORT = "model.json"
REPLIES = "model_replies.jsonl"
_LONGEST_S = 3600.0
"""Of a clip that is sent; the corpus has its own, lower limit."""


def left_to_model(config: AnnotateConfig, comparisons: Sequence[Comparison]) -> frozenset[str]:
    """Ids of what no annotator judges: a lot for each decides, and a retest goes with what it repeats."""
    share = 0.0 if config.by == "model" else config.people_share
    lots = {item.id: int(stable_id(config.seed, "people", item.about or item.id), 16) for item in comparisons}
    return frozenset(name for name, lot in lots.items() if lot >= share * 16**16)


def judge_by_model(
    config: AnnotateConfig, project: Project, out: StageFolder
) -> tuple[ComparisonJudge, ModelJudgements]:
    """Have the recipe's judge judge; replies are kept in the run folder, and written to the stage's.

    Raises:
        CannotJudge: the judge cannot hear, and a prompt has no reference.
        JudgeFailed: the model cannot be used.
    """
    assert config.judge, "see AnnotateConfig.conflicts"
    model = open_chat_model(
        config.judge.model, config.judge.url, config.judge.parameters, config.judge.concurrency
    )
    corpus = Dataset(project.corpus)
    judge = ComparisonJudge(
        model,
        out.final.parent / "judge_replies.jsonl",
        (lambda path: _wav(corpus.find(path))) if config.judge.hears else None,
    )
    judged = judge.judge(project.comparisons, project.prompts, f"{out.name}: {model.name}")
    store.write_rows(out.path / REPLIES, [item._asdict() for item in judged.replies])
    return judge, judged


def report(
    judge: ComparisonJudge,
    judged: ModelJudgements,
    people: Sequence[Judgement],
    completions: Sequence[Completion],
    min_heard: float,
    out: Path,
) -> dict[str, float]:
    """Write `model.json` into the folder `out`; returns its figures for MLflow."""
    agreement = model_agreement.measure([*people, *judged.judgements], judge.model.name, min_heard=min_heard)
    own = {judge.model.name, str(judge.model.identity.get("weights"))}
    biases = {
        "model": model_agreement.biases_of_model(
            judged.judgements,
            _both_orders(judged.replies),
            policies={item.id: item.policy for item in completions},
            own=own,
        ),
        "people": model_agreement.biases_of_people(people, min_heard=min_heard),
    }
    outcomes = Counter(item.outcome for item in judged.replies)
    write_json(
        out / REPORT,
        {
            "judge": judge.model.name,
            "identity": dict(judge.model.identity),
            "hears": judge.hears,
            "prompt_sha256": judge.prompt_sha256,
            "comparisons": len(judged.replies) // 2,
            "judged": len(judged.judgements),
            "replies": dict(outcomes.most_common()),
            "agreement": agreement.model_dump(mode="json"),
            "biases": {name: bias.model_dump(mode="json") for name, bias in biases.items()},
        },
    )
    return _metrics(judged, agreement)


def read_report(folder: Path) -> dict[str, Any] | None:
    """What `report` wrote into a folder; None where no model has judged."""
    return read_json(folder / REPORT) if (folder / REPORT).exists() else None


def _metrics(judged: ModelJudgements, agreement: ModelAgreement) -> dict[str, float]:
    metrics = {
        "model_judgements": float(len(judged.judgements)),
        "model_unusable_replies": float(sum(item.outcome != "used" for item in judged.replies)),
    }
    for name, measured in [*agreement.axes.items(), ("overall", agreement.overall)]:
        if measured.share:
            metrics[f"model_agreement_{name}"] = measured.share.value
            metrics[f"model_agreement_{name}_low"] = measured.share.low
    return metrics


def _both_orders(replies: Sequence[RankingReply]) -> list[tuple[dict[Axis, Ranking], dict[Axis, Ranking]]]:
    rankings = [_by_axis(reply) for reply in replies]
    return [
        (first, second)
        for first, second in zip(rankings[::2], rankings[1::2], strict=True)
        if first and second
    ]


def _by_axis(reply: RankingReply) -> dict[Axis, Ranking]:
    if reply.factuality is None or reply.behaviour is None:
        return {}
    return {"factuality": Ranking(ranks=reply.factuality), "behaviour": Ranking(ranks=reply.behaviour)}


def _wav(clip: ClipFile) -> bytes:
    """A clip as every API takes it: WAV, 16 kHz, 16 bits."""
    return encode(load(clip, max_duration_s=_LONGEST_S), "WAV", "PCM_16")
