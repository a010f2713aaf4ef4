"""The verbs of `align data`: corpora are fetched and made ready, preferences go in and out."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from align.cli.options import file_to_read, folder_to_read, folder_to_write
from align.run_folder.progress import Progress
from preference_data.interchange.conversation import Form, RowForm

app = typer.Typer(
    no_args_is_help=True,
    help="Data to train on. Start with: align data list",
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="As `align data list` names it.")]
Format = Annotated[Form, typer.Option("--format", help="Whose rows.")]
_ACCESS = {"open": "no", "account": "account at the publisher", "links": "audio is on YouTube"}
_USE = {
    "trl": "datasets.load_dataset('json', data_files='{path}')",
    "llamafactory": "llamafactory-cli train ... --dataset_dir {out} --dataset align_{stem}",
    "ms-swift": "ROOT_IMAGE_DIR={out} swift rlhf --rlhf_type {method} --dataset {path} ...",
    "hub-folder": "datasets.load_dataset('{path}'), or publish it: hf upload NAME {path} --repo-type dataset",
}
_MOST_REFUSED = 5  # rows that are listed


@app.command("list")
def list_corpora() -> None:
    """Show the published corpora that can be fetched and made ready.

    Example: align data list
    """
    from rich.console import Console
    from rich.table import Table

    from preference_data.corpora.catalog import CARDS

    table = Table("name", "what for", "hours", "GB", "licence", "needs", "parts", box=None, pad_edge=False)
    for card in CARDS.values():
        parts = ", ".join(card.parts[:3]) + (f" ... {len(card.parts)}" if len(card.parts) > 3 else "")
        row = (f"{card.hours:,.0f}", f"{card.size_gb:g}", card.licence, _ACCESS[card.access], parts)
        table.add_row(card.name, card.what_for, *row)
    Console(width=None if Console().is_terminal else 180).print(table)
    print("\nLayouts: preference_data/corpora/published/NAME.py. Next: align data download NAME DIR")


@app.command()
def download(
    name: Name,
    folder: Annotated[Path, typer.Argument(metavar="DIR", parser=folder_to_write, help="Where to.")],
    parts: Annotated[
        list[str] | None, typer.Option("--part", metavar="P", help="Only this part; may be repeated.")
    ] = None,
) -> None:
    """Fetch a corpus, or say what only you can do. Interrupted or repeated, it goes on where it was.

    Example: align data download librispeech data/librispeech --part dev-clean --part test-clean
    """
    from preference_data.corpora import catalog
    from preference_data.corpora.fetch import DownloadFailed
    from preference_data.corpora.published.recording import BadCorpus
    from preference_data.corpora.unpack import BadArchive

    try:
        with _Lines() as line:
            left_to_do = catalog.download(
                catalog.card_of(name),
                folder,
                parts or None,
                lambda file, done, total: line(f"{file} (MB)", done // 10**6, total // 10**6),
            )
    except BadCorpus as error:
        raise typer.BadParameter(str(error)) from error
    except (DownloadFailed, BadArchive, OSError) as error:
        print(error, flush=True)
        raise typer.Exit(1) from error
    command = shlex.join(
        ["align", "data", "prepare", name, "--from", str(folder), "--out", f"{folder}-ready"]
    )
    print(left_to_do or f"{folder} is complete. Next: {command}")


@app.command()
def prepare(
    name: Name,
    folder: Annotated[
        Path,
        typer.Option("--from", metavar="DIR", parser=folder_to_read, help="The corpus, as downloaded."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FOLDER", parser=folder_to_write, help="For the records; audio stays in DIR."
        ),
    ],
    check: Annotated[
        Literal["header", "samples"],
        typer.Option("--check", help="Look at each file's header, or decode it (about ten times slower)."),
    ] = "header",
    preference: Annotated[
        float, typer.Option("--preference", min=0, max=1, help="Share of clips with questions to sample for.")
    ] = 0.05,
    keep_out: Annotated[
        list[Path] | None,
        typer.Option(
            "--keep-out",
            metavar="FOLDER",
            parser=folder_to_read,
            help="A prepared benchmark whose clips stay out of training.",
        ),
    ] = None,
) -> None:
    """Check every recording and write the records that training reads.

    Example: align data prepare librispeech --from data/librispeech --out data/ready/librispeech
    """
    from preference_data.corpora import prepare as preparation
    from preference_data.corpora.published.recording import BadCorpus
    from preference_data.dataset.dataset import BadDataset
    from preference_data.store import BadRecord

    try:
        with _Lines() as line:
            about = preparation.prepare(
                name,
                folder,
                out,
                by=check,
                preference_share=preference,
                keep_out=keep_out or (),
                on_checked=lambda done, total, hours, refused: line(
                    name, done, total, hours=hours, refused=refused
                ),
            )
    except (BadCorpus, BadDataset, BadRecord) as error:
        raise typer.BadParameter(str(error)) from error
    _print_summary(about, out)


@app.command()
def shard(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", parser=folder_to_read, help="A prepared dataset.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FOLDER", parser=folder_to_write, help="The same one in tar shards."),
    ],
    megabytes: Annotated[int, typer.Option("--megabytes", min=1, help="Size of a shard.")] = 256,
) -> None:
    """Put a prepared dataset's audio into tar shards, for file systems that are slow with many files.

    Example: align data shard data/ready/librispeech --out data/sharded/librispeech
    """
    from preference_data.dataset.dataset import DESCRIPTION, is_described
    from preference_data.dataset.sharding import shard as write

    if not is_described(folder):
        raise typer.BadParameter(f"{folder} is not a prepared dataset: it has no {DESCRIPTION}")
    try:
        about = write(folder, out, max_bytes=megabytes << 20)
    except ValueError as error:  # BadDataset, BadAudio and BadRecord among them
        raise typer.BadParameter(str(error)) from error
    shards = len(list((out / "shards").glob("*.tar")))
    print(f"{out}  {about['name']}: {shards} shards. Name it in a mixture: sources: [{{folder: {out}}}]")


def _print_summary(about: dict[str, Any], out: Path) -> None:
    for split, clips in about["clips"].items():
        print(f"{split:<10} {clips:>9,} clips  {about['hours'][split]:>10,.2f} h")
    print("tasks      " + (", ".join(f"{task} {n:,}" for task, n in about["tasks"].items()) or "none"))
    if about["quarantined"]:
        reasons = ", ".join(f"{code} {n:,}" for code, n in about["quarantined"].items())
        print(f"left out   {reasons}  (see {out / 'quarantine.jsonl'})")
    if about.get("odd"):
        reasons = ", ".join(f"{code} {n:,}" for code, n in about["odd"].items())
        print(f"odd        {reasons}  (see {out / 'warnings.jsonl'})")
    if about["speakers_in_train_and_held_out"]:
        print(
            f"warning    {about['speakers_in_train_and_held_out']} speakers are in train and in dev or test"
        )
    print(f"{out}  {about['name']}, {about['licence']}")


@app.command()
def export(
    pairs: Annotated[
        Path,
        typer.Argument(metavar="PAIRS.jsonl", parser=file_to_read, help="Preference pairs, labels or chats."),
    ],
    form: Annotated[
        Literal["trl", "llamafactory", "ms-swift", "hub-folder"],
        typer.Option(
            "--to",
            "--format",
            help="Whose rows; hub-folder: a dataset for the Hub, with the audio inside.",
        ),
    ],
    corpus: Annotated[
        Path,
        typer.Option(
            "--corpus", metavar="FOLDER", parser=folder_to_read, help="Folder its audio is relative to."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", parser=folder_to_write, help="For the rows and their audio."),
    ],
    licences: Annotated[
        list[str] | None,
        typer.Option(
            "--licence", metavar="L", help="Only what is about clips with this licence; may be repeated."
        ),
    ] = None,
) -> None:
    """Write preference pairs, labels or chats as TRL, LLaMA-Factory, ms-swift or the Hub read them.

    DIR can move as a whole: rows name their audio by paths within it, or hold it.

    Example: align data export PAIRS.jsonl --corpus runs/demo/0_corpus --to hub-folder --out published
    """
    from align.release.preference_history import history_of
    from align.run_folder.artifacts import DamagedFile
    from preference_data.dataset.dataset import BadDataset
    from preference_data.interchange import exchange, hub_folder
    from preference_data.interchange.columns import BadRow
    from preference_data.text_files import BadText

    try:
        exported = (
            hub_folder.write(pairs, corpus, out, licences=licences or (), history=history_of(pairs))
            if form == "hub-folder"
            else exchange.write_rows(pairs, form, corpus, out, licences or ())
        )
    except (BadRow, BadText, BadDataset, DamagedFile, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    _print_refused(exported.refused)
    left_out = f"; {len(exported.refused):,} left out" if exported.refused else ""
    method = "kto" if exported.kind == "labels" else "dpo"
    use = _USE[form].format(path=exported.path, out=out, stem=pairs.stem, method=method)
    print(f"{exported.written:,} {exported.kind} in {exported.path}{left_out}. Next: {use}")


@app.command("import")
def import_rows(
    rows: Annotated[
        Path,
        typer.Argument(metavar="FILE", parser=file_to_read, help="Rows: JSON lines or list, CSV, Parquet."),
    ],
    form: Annotated[
        RowForm, typer.Option("--format", help="Whose rows, or choice: AVQA, AudioMCQ and their like.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            parser=folder_to_write,
            help="For the records and the audio; adds to an earlier import.",
        ),
    ],
    root: Annotated[
        Path | None,
        typer.Option(
            "--audio-root",
            metavar="DIR",
            parser=folder_to_read,
            help="What audio paths are relative to; FILE's folder.",
        ),
    ] = None,
    axis: Annotated[
        Literal["factuality", "behaviour"],
        typer.Option("--axis", help="What the preferences are about, where the rows do not say."),
    ] = "factuality",
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", metavar="COLUMN", help="A column not to be read; may be repeated."),
    ] = None,
    question_form: Annotated[
        str | None,
        typer.Option(
            "--question-form",
            metavar="TEXT",
            help="How to put a question with its choices: text with {question} and {choices}; R1-AQA's.",
        ),
    ] = None,
) -> None:
    """Read others' preference pairs, labels, chats or multiple-choice questions.

    A conversation that ends with a question is a prompt to complete. The audio is linked into DIR, which a
    recipe can name.

    Example: align data import dpo.jsonl --format ms-swift --out data/imported
    """
    from preference_data.dataset.dataset import QUARANTINE, BadDataset
    from preference_data.interchange import exchange
    from preference_data.interchange.columns import BadRow
    from preference_data.interchange.questions import QUESTION_FORM, check_form
    from preference_data.store import BadRecord
    from preference_data.text_files import BadText

    try:
        check_form(question_form or QUESTION_FORM)
    except ValueError as error:
        raise typer.BadParameter(f"--question-form {error}") from error
    try:
        with _Lines() as line:
            imported = exchange.read_rows(
                rows,
                form,
                out,
                audio_root=root or rows.parent,
                axis=axis,
                ignored=ignore or (),
                question_form=question_form or QUESTION_FORM,
                on_checked=lambda done, total: line("clips", done, total),
            )
    except (BadRow, BadText, BadDataset, BadRecord, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    _print_refused(imported.refused)
    good, bad = imported.desirable, imported.labels - imported.desirable
    labels = f"{imported.labels:,} labels ({good:,} good, {bad:,} bad), " if imported.labels else ""
    questions = f"{imported.questions:,} questions, " if imported.questions else ""
    kept = (
        f"{imported.pairs:,} pairs, {labels}{questions}{imported.chats:,} chats and {imported.clips:,} clips"
    )
    quarantine = f", see {out / QUARANTINE}" if imported.n_refused else ""
    print(f"{kept} in {out}; {imported.n_refused:,} rows left out{quarantine}")
    named = out if "/" in str(out) else f"./{out}"
    if imported.pairs:
        print(f"In a recipe, a dpo stage reads them by `pairs: {named}` and `corpus: {named}`")
    if imported.questions:
        stages = "a grpo stage reads" if form == "choice" else "sample and grpo stages read"
        reward = " and `reward: {choice: {}}`" if form == "choice" else ""
        print(f"In a recipe, {stages} them by `corpus: {named}`{reward}")


def _print_refused(reasons: list[str]) -> None:
    for reason in reasons[:_MOST_REFUSED]:
        print(f"left out: {reason}")


class _Lines(ExitStack):
    """Shows a line of progress for each thing under way, begun when its name and total are known."""

    def __init__(self) -> None:
        super().__init__()
        self._name, self._line = "", Progress("", 0)

    def __call__(self, name: str, done: int, total: int, **values: float) -> None:
        if name != self._name:
            self.close()
            self._name, self._line = name, self.enter_context(Progress(name, total))
        self._line.update(done, **values)
