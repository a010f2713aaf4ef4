"""`align score`: answers that need no judge model, counted as their benchmarks do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from align.cli.options import file_to_read, file_to_write


def score(
    answers: Annotated[
        Path,
        typer.Argument(metavar="ANSWERS", parser=file_to_read, help="Rows with a response: jsonl or JSON."),
    ],
    kind: Annotated[str, typer.Option("--kind", help="foundation, asr_en, translation, emotion, srwt ...")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", parser=file_to_write, help="Write the numbers as JSON."),
    ] = None,
) -> None:
    """Count right answers: AIR-Bench foundation, or the benchmarks of the Qwen-Audio reports.

    Foundation reads the official jsonl (question, choices, response), choice the rows of AVQA, MMAU and their
    like with a response. The others read rows with gt, response
    and source, as the Qwen2-Audio evaluation writes them; each source gets its own numbers. Published numbers
    stand beside ours; harnesses differ, so they are a reference, not a ranking.

    Example: align score librispeech.jsonl --kind asr_en
    """
    from align.evaluation.benchmarks import foundation, published
    from align.evaluation.benchmarks import tasks as benchmarks
    from align.evaluation.benchmarks.rows import BadBenchmark
    from align.run_folder.artifacts import write_json

    known = ("foundation", *get_args(benchmarks.Kind))
    if kind not in known:
        raise typer.BadParameter(f"--kind {kind!r}: there are {', '.join(known)}")
    try:
        if kind == "foundation":
            scored, odd = foundation.read_answers(answers)
            numbers: dict[str, Any] = foundation.score(scored)
        else:
            rows, texts, odd = benchmarks.read_answers(answers, cast(benchmarks.Kind, kind))
            numbers = benchmarks.score(cast(benchmarks.Kind, kind), rows, texts)
    except (BadBenchmark, benchmarks.CannotScore) as error:
        raise typer.BadParameter(str(error)) from error
    report = {**numbers, "odd_rows": {reason: rows._asdict() for reason, rows in odd.items()}}
    print(json.dumps(report, indent=2, ensure_ascii=False))
    for reason, (n, first) in odd.items():
        print(f"left out: {n} rows ({reason}), first {first}")
    if kind == "foundation":
        lines = [published.as_line(row) for row in published.air_bench_foundation()]
    else:
        lines = [
            f"published: {row.benchmark}  {row.policy}  {row.metric} {row.value:g}  ({row.source})"
            for source, own in numbers.items()
            for row in published.beside(source, own)
        ]
    if lines:
        print(*lines, published.warnings()[0], sep="\n")
    if out:
        write_json(out, report)
        print(out)
