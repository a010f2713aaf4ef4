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
    kind: Annotated[str, typer.Option("--kind", help="foundation, mmau, asr_en, translation, emotion ...")],
    silence: Annotated[
        Path | None,
        typer.Option(
            metavar="ANSWERS", parser=file_to_read, help="Answers to the same multiple choice with silence."
        ),
    ] = None,
    other_clip: Annotated[
        Path | None,
        typer.Option(metavar="ANSWERS", parser=file_to_read, help="Answers to the same with other clips."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", parser=file_to_write, help="Write the numbers as JSON."),
    ] = None,
) -> None:
    """Count right answers: AIR-Bench foundation, or the benchmarks of the Qwen-Audio reports.

    Foundation reads the official jsonl (question, choices, response); mmau, mmar, mmsu, mmau_pro, voicebench
    and big_bench_audio their publishers' rows, choice those of AVQA, AudioMCQ and their like, with a
    response: accuracy with intervals, by category, and above silence, if answers with silence are given;
    advbench VoiceBench's rows: the share refused. The others read rows with gt, response and source, as the
    Qwen2-Audio evaluation writes them; each source gets its own numbers. Published numbers stand beside ours;
    harnesses differ, so they are a reference, not a ranking.

    Example: align score mmau.json --kind mmau --silence mmau_silence.json
    """
    from align.evaluation.benchmarks import foundation, hearing, published
    from align.evaluation.benchmarks import tasks as benchmarks
    from align.evaluation.benchmarks.multiple_choice import is_choice
    from align.evaluation.benchmarks.rows import BadBenchmark
    from align.run_folder.artifacts import write_json

    known = ("foundation", *get_args(benchmarks.Kind))
    if kind not in known:
        raise typer.BadParameter(f"--kind {kind!r}: there are {', '.join(known)}")
    if (silence or other_clip) and not is_choice(kind):
        raise typer.BadParameter(f"--silence and --other-clip are for multiple choice, not for {kind}")
    by_clip: dict[str, Any] = {}
    try:
        if kind == "foundation":
            scored, odd = foundation.read_answers(answers)
            numbers: dict[str, Any] = foundation.score(scored)
        else:
            rows, texts, odd = benchmarks.read_answers(answers, cast(benchmarks.Kind, kind))
            numbers = benchmarks.score(cast(benchmarks.Kind, kind), rows, texts)
            if is_choice(kind):
                files: dict[hearing.Control, Path | None] = {"silence": silence, "other_clip": other_clip}
                controls = {
                    control: hearing.in_order(rows, *benchmarks.read_answers(path, kind)[:2], path)
                    for control, path in files.items()
                    if path
                }
                by_clip = {"multiple_choice": hearing.report(kind, rows, texts, controls)}
    except (BadBenchmark, benchmarks.CannotScore) as error:
        raise typer.BadParameter(str(error)) from error
    report = {**numbers, **by_clip, "odd_rows": {reason: rows._asdict() for reason, rows in odd.items()}}
    print(json.dumps(report, indent=2, ensure_ascii=False))
    for reason, (n, first) in odd.items():
        print(f"left out: {n} rows ({reason}), first {first}")
    if kind == "foundation":
        lines = [published.as_line(row) for row in published.air_bench_foundation()]
    elif benchmarks.is_chat(cast(benchmarks.Kind, kind)):
        lines = [published.as_line(row) for row in published.multiple_choice(kind)]
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
