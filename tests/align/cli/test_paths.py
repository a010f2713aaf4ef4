"""Every verb, given paths that cannot be: one line that names the path, code 2, and nothing is written."""

import signal
import sys
import typing

import pytest

from align.cli.main import app, main

UNUSABLE = ["", " ", "a\nb", "a\tb", "a\0b", "x" * 300, "file/below"]
BAD = {
    "<file>": ["missing", "folder", "link", *UNUSABLE],
    "<folder>": ["missing", "file", "link", *UNUSABLE],
    "<new file>": ["folder", "link/below", *UNUSABLE],
    "<new folder>": ["file", "link", "link/below", *UNUSABLE],
    "<shared folder>": UNUSABLE[:-1],  # on other machines
}
CALLS = """
check <folder>
check toy --out <new folder>
run <folder>
run toy --out <new folder>
status <folder>
status toy --out <new folder>
verify <folder>
compare <folder> folder
compare a b --html <new file>
compare a b --json <new file>
judge <file> --judge-model m --judge-url http://127.0.0.1:9/v1 --out o
judge file --judge-model m --judge-url http://127.0.0.1:9/v1 --out <new folder>
judge file --judge-model <folder> --out o
score <file> --kind asr_en
score file --kind asr_en --out <new file>
score file --kind choice --silence <file>
score file --kind choice --other-clip <file>
watch <folder>
chat folder --keep <new folder>
promote <folder>
export <folder> --to o
export folder --to <new folder>
annotate up --home <new folder>
annotate down --home <new folder>
annotate status <folder>
annotate status --home <new folder>
annotate status toy --out <new folder>
annotate push <folder>
annotate push toy --out <new folder>
annotate pull <folder>
annotate pull toy --out <new folder>
annotate adjudicate <folder>
annotate adjudicate toy --out <new folder>
annotate users add ann --home <new folder>
annotate users list --home <new folder>
cluster render <folder> --to slurm
cluster render toy --to slurm --run <shared folder>
cluster render toy --to slurm --out <new file>
data download vocalsound <new folder>
data prepare vocalsound --from <folder> --out o
data prepare vocalsound --from folder --out <new folder>
data prepare vocalsound --from folder --out o --keep-out <folder>
data shard <folder> --out o
data shard folder --out <new folder>
data export <file> --format trl --corpus folder --out o
data export file --format trl --corpus <folder> --out o
data export file --format trl --corpus folder --out <new folder>
data import <file> --format trl --out o
data import file --format trl --out <new folder>
data import file --format trl --out o --audio-root <folder>
""".strip().splitlines()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a recipe, a file, a folder and a link to nothing; the user is in it."""
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "1_corpus.yaml").write_text("stage: corpus\ncorpus: folder\ndir: recordings\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    handler = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("call", CALLS)
def test_a_path_that_cannot_be_is_named_and_nothing_is_written(here, monkeypatch, capsys, call):
    before = sorted(here.rglob("*"))
    head, _, rest = call.partition("<")
    kind, _, tail = rest.partition(">")
    for bad in BAD[f"<{kind}>"]:
        monkeypatch.setattr(sys, "argv", ["align", *head.split(), bad, *tail.split()])
        with pytest.raises(SystemExit) as end:
            main()
        message = capsys.readouterr().err.removesuffix("1 mistake; nothing was run\n")
        assert end.value.code == 2, (bad, message)
        assert message.count("\n") == 1, (bad, message)
        assert (repr(bad)[1:-1][:60] if bad.strip() else "is empty") in message, (bad, message)
        assert sorted(here.rglob("*")) == before, bad


def test_the_calls_are_all_that_there_are():
    """One for each path of each verb; `export` also takes what is no path, `judge` a local model."""

    def verbs(group, words):
        for inner in group.registered_groups:
            yield from verbs(inner.typer_instance, [*words, inner.name])
        for command in group.registered_commands:
            hints = typing.get_type_hints(command.callback, include_extras=True)
            name = command.name or command.callback.__name__
            n_paths = sum("Path" in str(strip(hint)) for hint in hints.values())
            yield " ".join([*words, name]), n_paths

    def strip(hint):
        return typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint

    expected = {verb: n for verb, n in verbs(app, []) if n}
    more = {"export": 1, "judge": 1}
    calls = {verb: sum(call.startswith(f"{verb} ") for call in CALLS) for verb in expected}
    assert calls == {verb: n + more.get(verb, 0) for verb, n in expected.items()}
