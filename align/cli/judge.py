"""`align judge`: rate answers in AIR-Bench's official jsonl, wherever they were made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from align.evaluation.benchmarks.air_bench import Item
    from align.evaluation.judges.llm_judge import LLMJudge
    from align.evaluation.judges.local_model import LocalModel


def judge(
    answers: Annotated[Path, typer.Argument(metavar="ANSWERS.jsonl", help="Official inference output.")],
    model: Annotated[str, typer.Option("--judge-model", metavar="M", help="As its server names it.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="For scores.json and replies.jsonl.")],
    url: Annotated[
        str | None,
        typer.Option("--judge-url", metavar="URL", help="Up to /v1. Without: M is a local model's folder."),
    ] = None,
    protocol: Annotated[
        Literal["strict", "official"], typer.Option("--protocol", help="How the judge is asked and read.")
    ] = "strict",
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests in flight.")] = 8,
    canary_items: Annotated[
        int, typer.Option("--canary", min=0, help="Questions on which tricks are tried; 0: none.")
    ] = 0,
    prompt_price: Annotated[
        float | None, typer.Option("--prompt-price", help="Per million tokens, for the estimate.")
    ] = None,
    reply_price: Annotated[
        float | None, typer.Option("--reply-price", help="Per million tokens, for the estimate.")
    ] = None,
    estimate_only: Annotated[
        bool, typer.Option("--estimate", help="Tell what it would cost, and ask nothing.")
    ] = False,
) -> None:
    """Rate answers in AIR-Bench's official jsonl with a judge model, each in both orders.

    The key is read from ALIGN_JUDGE_API_KEY (or OPENAI_API_KEY, for openai.com). Interrupted or repeated, no
    call that succeeded is made twice.

    Example: align judge answers.jsonl --judge-url http://127.0.0.1:8000/v1 --judge-model qwen --out judged
    """
    from align.evaluation import aggregation
    from align.evaluation.benchmarks import air_bench
    from align.evaluation.judges import ratings
    from align.evaluation.judges.endpoint import Endpoint, JudgeFailed
    from align.evaluation.judges.llm_judge import LLMJudge
    from align.evaluation.judges.prompt import Official, Strict
    from align.run_folder.artifacts import write_json

    try:
        read = air_bench.read_answers(answers)
        items, responses = [item for item, _ in read], [response for _, response in read]
        asked = Endpoint(url, model, concurrency=concurrency) if url else _local(model)
        rater = LLMJudge(
            asked, out / "judge_replies.jsonl", Official() if protocol == "official" else Strict()
        )
        print(rater.estimate(items, responses, prompt_price, reply_price), flush=True)
        if estimate_only:
            return
        rated = rater.rate(items, responses, "judge")
        uplift = _uplift(rater, items[:canary_items]) if canary_items else None
    except (air_bench.BadBenchmark, FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    except JudgeFailed as error:
        print(error, flush=True)
        raise typer.Exit(1) from error
    scores = aggregation.as_scores(items, rated)
    judged_by = {"name": rater.name, "protocol": protocol, "prompt_sha256": rater.prompt_sha256}
    told = {"judge": {**judged_by, "canary_uplift": uplift}, "answers": str(answers)}
    write_json(out / "scores.json", {**told, **scores})
    ratings.write_replies(out / "replies.jsonl", rated)
    _print(scores)
    print(f"{out / 'scores.json'}, {out / 'replies.jsonl'}")


def _local(model: str) -> LocalModel:
    from align.evaluation.judges.local_model import (
        LocalModel,  # with torch: an endpoint's user need not wait for it
    )

    return LocalModel(Path(model).expanduser())


def _uplift(rater: LLMJudge, items: Sequence[Item]) -> float | None:
    """Points that known tricks gain on the mean; None where they could not be tried."""
    from align.evaluation.judges import canary

    try:
        tried = canary.measure(rater, items)
    except ValueError as error:
        print(f"canary: {error}")
        return None
    worst = f", most by {tried.worst.name!r}: {tried.worst.points:+.2f}" if tried.worst else ""
    print(f"canary: tricks gain {tried.uplift} points on the mean of {tried.scored}{worst}")
    return tried.uplift


def _print(scores: dict[str, Any]) -> None:
    from align.evaluation.benchmarks import published

    for name, mean in {**scores["categories"], "overall": scores["overall"]}.items():
        print(f"{name:<8} {'-' if mean is None else f'{mean:.2f}'}")
    print("  ".join(f"{state} {n}" for state, n in scores["states"].items()))
    for row in published.air_bench_chat()[:3]:
        columns = "  ".join(f"{name} {value:.2f}" for name, value in row.categories.items())
        print(f"published: {row.policy}  {columns}  overall {row.overall:.2f}  ({row.source})")
    print(published.warnings()[0])
