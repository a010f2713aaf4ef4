"""Every `align` command that a README tells people to type can be parsed, and names what there is."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from align.cli.main import app
from align.recipe.recipe import RecipeError, load
from preference_data.corpora.catalog import CARDS

ROOT = Path(__file__).parents[2]
USAGE_ERROR = typer.BadParameter.__base__
READMES = [ROOT / "README.md", *sorted((ROOT / "recipes").glob("*/README.md"))]


def commands(readme):
    """Commands in code blocks (indented) and in backticks; a line that ends in a backslash goes on."""
    text = readme.read_text(encoding="utf-8").replace("\\\n", " ")
    shown = re.findall(r"^ {4,}((?:#? ?or: )?align .*)$", text, re.MULTILINE) + re.findall(
        r"`(align .*?)`", text
    )
    for line in shown:
        words = shlex.split(line.removeprefix("or: "), comments=True)
        end = next((i for i, word in enumerate(words) if word in ("&&", "|", ";")), len(words))
        yield words[1:end]


def parse(words):
    """As a shell would hand them over, up to the last option; nothing is run."""
    command, parent, name = typer.main.get_command(app), None, "align"
    while hasattr(command, "resolve_command"):
        parent = command.make_context(name, list(words), parent=parent)
        name, command, words = command.resolve_command(parent, [*parent._protected_args, *parent.args])
    return command.make_context(name, list(words), parent=parent).params


def parse_where_all_is_there(words):
    """In the current folder, where the files and folders that the command reads are made first."""
    for _ in words:
        try:
            return parse(words)
        except typer.BadParameter as error:
            missing = re.fullmatch(r"(.+) does not exist; name a (file|folder)", error.message)
            if missing is None:
                raise
            place = Path(missing[1])
            (place.parent if missing[2] == "file" else place).mkdir(parents=True, exist_ok=True)
            if missing[2] == "file":
                place.touch()
    return parse(words)


def mistakes(recipe, overrides):
    """Of a recipe with what the command sets, but for data that an earlier command writes."""
    try:
        load(recipe, overrides)
    except RecipeError as error:
        return [one for one in error.problems if "there is no folder './data/" not in one.message]
    return []


CASES = [(readme, words) for readme in READMES for words in commands(readme) if words]


@pytest.mark.parametrize(
    ("readme", "words"),
    CASES,
    ids=lambda value: " ".join(value) if isinstance(value, list) else value.parent.name,
)
def test_the_command_is_one(readme, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if words in (["check"], ["run"]) or words[-1] == "..." or len(words) == 1:
        pytest.skip("the name of a verb, not a command")
    params = parse_where_all_is_there(words)
    if str(params.get("recipe")).startswith("recipes/"):
        assert not mistakes(ROOT / params["recipe"], params.get("overrides"))
    if words[0] == "data" and "name" in params and params["name"] != "$name":
        assert params["name"].lower() in (*CARDS, "name")


def test_the_full_size_recipes_tell_how_to_get_every_data_set():
    for name in ("qwen2_audio_7b", "qwen2_audio_7b_lora"):
        told = (ROOT / "recipes" / name / "README.md").read_text(encoding="utf-8")
        (loop,) = re.findall(r"for name in ([\w ]+); do", told)
        wanted = [
            Path(source.folder).name for source in load(ROOT / "recipes" / name).steps[0].config.sources
        ]
        assert sorted(loop.split()) == sorted(wanted)
        assert set(wanted) <= set(CARDS)


def test_a_command_that_is_none_is_found_out():
    with pytest.raises(USAGE_ERROR, match="No such option"):
        parse(["run", "recipes/demo", "--onyl", "6_dpo"])
    with pytest.raises(USAGE_ERROR, match="No such command"):
        parse(["data", "fetch", "clotho"])
