"""`align judge`: rate answers in AIR-Bench's official jsonl, wherever they were made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from align.cli.options import file_to_read, folder_to_read, folder_to_write

if TYPE_CHECKING:
    from align.evaluation.judges.llm_judge import ChatModel


def judge(
    answers: Annotated[
        Path,
        typer.Argument(metavar="ANSWERS.jsonl", parser=file_to_read, help="Official inference output."),
    ],
    model: Annotated[str, typer.Option("--judge-model", metavar="M", help="As its server names it.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", parser=folder_to_write, help="For scores.json and replies.jsonl."
        ),
    ],
    url: Annotated[
        str | None,
        typer.Option("--judge-url", metavar="URL", help="Up to /v1. Without: M is a local model's folder."),
    ] = None,
    protocol: Annotated[
        Literal["strict", "official"],
        typer.Option("--protocol", help="How the judge is prompted and read."),
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
        bool, typer.Option("--estimate", help="Print what it would cost, and send nothing.")
    ] = False,
) -> None:
    """Rate answers in AIR-Bench's official jsonl with a judge model, each in both orders.

    The key is read from ALIGN_JUDGE_API_KEY (or OPENAI_API_KEY, for openai.com). Interrupted or repeated, no
    call that succeeded is made twice.

    Example: align judge answers.jsonl --judge-url http://127.0.0.1:8000/v1 --judge-model qwen --out judged
    """
    from align.evaluation import aggregation, judged_answers
    from align.evaluation.benchmarks import air_bench
    from align.evaluation.judges.endpoint import Endpoint, JudgeFailed
    from align.evaluation.judges.llm_judge import LLMJudge
    from align.evaluation.judges.prompt import Official, Strict
    from align.run_folder.artifacts import write_json

    if not url:
        folder_to_read(os.path.expanduser(model))
    try:
        rows = air_bench.read_answers(answers)
        items, responses = [item for item, _ in rows], [response for _, response in rows]
        chat_model: ChatModel
        if url:
            chat_model = Endpoint(url, model, concurrency=concurrency)
        else:
            # Imported here, because it brings torch, which an endpoint's user need not wait for.
            from align.evaluation.judges.local_model import LocalModel

            chat_model = LocalModel(Path(model).expanduser())
        llm_judge = LLMJudge(
            chat_model,
            out / "judge_replies.jsonl",
            Official() if protocol == "official" else Strict(),
            canary_items,
        )
        print(llm_judge.estimate(items, responses, prompt_price, reply_price), flush=True)
        if estimate_only:
            return
        judged = llm_judge.judge(items, responses)
        about = llm_judge.describe(items)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    except JudgeFailed as error:
        print(error, flush=True)
        raise typer.Exit(1) from error
    scores = aggregation.as_scores(items, judged)
    write_json(out / "scores.json", {"judge": about, "answers": str(answers), **scores})
    judged_answers.write(out / "replies.jsonl", judged)
    _print(scores, about)
    print(f"{out / 'scores.json'}, {out / 'replies.jsonl'}")


def _print(scores: dict[str, Any], judge: dict[str, Any]) -> None:
    from align.evaluation.benchmarks import published

    if worst := judge["canary_worst"]:
        print(
            f"canary: tricks gain {judge['canary_uplift']:+.2f} points on the mean, most by "
            f"{worst['trick']!r}: {worst['points']:+.2f}"
        )
    for name, mean in {**scores["categories"], "overall": scores["overall"]}.items():
        print(f"{name:<8} {'-' if mean is None else f'{mean:.2f}'}")
    print("  ".join(f"{state} {n}" for state, n in scores["states"].items()))
    for row in published.air_bench_chat()[:3]:
        print(published.as_line(row))
    print(published.warnings()[0])
