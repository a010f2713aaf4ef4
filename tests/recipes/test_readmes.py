"""Every `align` command that a page tells people to type can be parsed, and names what there is."""

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
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "recipes").glob("*/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def commands(page):
    """Commands in code blocks (indented) and in backticks; a line that ends in a backslash goes on."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
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


def is_verb(words):
    """`data import` is; with a verb's arguments it is a command."""
    command = typer.main.get_command(app)
    for word in words:
        command = getattr(command, "commands", {}).get(word)
    return command is not None


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


CASES = [(str(page.relative_to(ROOT)), words) for page in PAGES for words in commands(page) if words]


@pytest.mark.parametrize(
    ("page", "words"),
    CASES,
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_the_command_is_one(page, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if words[-1] == "..." or is_verb(words):
        pytest.skip("the name of a verb, not a command")
    params = parse_where_all_is_there(words)
    if str(params.get("recipe")).startswith("recipes/"):
        assert not mistakes(ROOT / params["recipe"], params.get("overrides"))
    if words[0] == "data" and "name" in params and params["name"] != "$name":
        assert params["name"].lower() in (*CARDS, "name")


def anchors(page):
    """What a link may name behind `#`: headings, as GitHub and static site builders spell them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!https?:)(.*?)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_and_python_have_what_a_page_runs(page):
    text, makefile = page.read_text(encoding="utf-8"), (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^ {4}make ([\w-]+)|`make ([\w-]+)`", text, re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target
    for module in re.findall(r"python -m ((?:docs|tests)[\w.]+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module


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
