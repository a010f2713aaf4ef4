"""Writes `docs/reference.md`, every key of every stage: config classes and the strings below their fields.

python -m docs.write_reference
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from align.recipe.config.base import Config, Needs, NoEffect, StageConfig, mark_of, parts
from align.recipe.config.stages import STAGES

REFERENCE = Path(__file__).with_name("reference.md")
INTRODUCTION = """\
# Reference: every key of every stage

`python -m docs.write_reference` writes this page from the classes in `align/recipe/config/`; a test
compares the two. The guide is [recipes.md](recipes.md). `align check RECIPE` reports unknown keys, wrong
values, and keys that contradict each other, with file, line and suggestion, before anything runs. Each
section lists a stage's own keys and names where its other keys stand.

- **required**: the key has no default.
- **a stage that leaves ...**: name an earlier file of the recipe (`2_sft`), or a folder
  (`./data/imported`); for a policy also an id on the Hub.
- **no effect on the result**: changing the key does not make finished work outdated. Every other key does.
"""
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
WORDS = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    Any: "anything",
    NoneType: "null",
}


def docstrings(config: type[BaseModel]) -> dict[str, str]:
    """Field -> the string that stands right below it in the source of its class."""
    body = ast.parse(inspect.getsource(config)).body[0].body  # type: ignore[attr-defined]
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }


def own_fields(config: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields that the class itself declares, but for a stage's kind, which the section's heading says."""
    declared = inspect.get_annotations(config).keys() - (
        {"stage"} if issubclass(config, StageConfig) else set()
    )
    return {name: info for name, info in config.model_fields.items() if name in declared}


def configs_among(types: Iterable[Any]) -> list[type[Config]]:
    """Config classes among types, each once."""
    return [kind for kind in dict.fromkeys(types) if isinstance(kind, type) and issubclass(kind, Config)]


def bases(config: type[BaseModel]) -> list[type[Config]]:
    """Config classes whose keys a config class has beside its own."""
    return [base for base in configs_among(config.__mro__[1:]) if own_fields(base)]


def name_of(config: type[BaseModel]) -> str:
    """Heading of a section."""
    if issubclass(config, StageConfig) and config in STAGES.values():
        return f"stage: {config.kind()}"
    return config.__name__.removesuffix("Config")


def link_to(config: type[BaseModel]) -> str:
    """Link to a section."""
    heading = name_of(config)
    return f"[{heading}](#{heading.lower().replace(': ', '-').replace(' ', '-')})"


def in_yaml(value: Any) -> str:
    """A plain value as a recipe has it."""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def marked(words: str, marks: Iterable[Any]) -> str:
    """A type in words with what its marks say: what an earlier stage must leave, and bounds."""
    for mark in marks:
        if isinstance(mark, Needs):
            words = f"a stage that leaves {mark.kind.replace('_', ' ')}"
        if isinstance(mark, FieldInfo):
            words = marked(words, mark.metadata)
        for key, bound in BOUNDS.items():
            if hasattr(mark, key):
                words += f", {bound} {getattr(mark, key):,}"
    return words


def type_in_words(annotation: Any) -> str:
    """A field's type as somebody who writes YAML thinks of it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return marked(type_in_words(inner[0]), inner[1:])
    if origin is Literal:
        return ", ".join(in_yaml(value) for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(type_in_words(part) for part in inner)
    if origin is list:
        return f"list of {type_in_words(inner[0])}"
    if origin is dict:
        return f"mapping of {type_in_words(inner[0])} to {type_in_words(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return link_to(annotation)
    return WORDS[annotation]


def default_of(info: FieldInfo) -> str:
    """A field's default in YAML's words."""
    if info.is_required():
        return "**required**"
    value = info.default
    if isinstance(value, BaseModel):
        return "its defaults"
    return in_yaml(value)


def effect_of(info: FieldInfo) -> str:
    """Whether the field decides what the stage makes."""
    mark = mark_of(info, NoEffect)
    if mark is None:
        return ""
    if mark.names is not None:
        return f" No effect on the result: {', '.join(f'`{name}`' for name in sorted(mark.names))}."
    return f" No effect on the result{f', unless `{mark.unless}` is set' if mark.unless else ''}."


def section(config: type[BaseModel]) -> Iterator[str]:
    """Heading, first paragraphs of the docstring, and a table of the class's own keys."""
    yield f"\n## {name_of(config)}\n"
    yield inspect.getdoc(config) or ""
    if config in STAGES.values():
        yield f"\nIt leaves: {config.produces.replace('_', ' ')}."
    if getattr(config, "trl_config", None):
        yield f"\n`trl:` takes names of TRL's `{config.trl_config}`."
    if inherited := bases(config):
        yield f"\nFurther keys: {', '.join(link_to(base) for base in inherited)}."
    texts = docstrings(config)
    if fields := own_fields(config):
        yield "\n| key | value | default | meaning |\n| --- | --- | --- | --- |"
    for name, info in fields.items():
        cells = (
            f"`{name}`",
            marked(type_in_words(info.annotation), info.metadata),
            default_of(info),
            f"{texts.get(name, '')}{effect_of(info)}".strip(),
        )
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def sections() -> list[type[BaseModel]]:
    """The stages in their order, what they inherit from, and every block that these name."""
    found: list[type[BaseModel]] = list(STAGES.values())
    for config in found:
        blocks = [block for info in own_fields(config).values() for block in parts(info.annotation)]
        found += [new for new in [*bases(config), *configs_among(blocks)] if new not in found]
    return found


def reference() -> str:
    """The whole page."""
    contents = " · ".join(link_to(config) for config in STAGES.values())
    lines = [INTRODUCTION, contents, *(line for config in sections() for line in section(config))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    REFERENCE.write_text(reference(), encoding="utf-8")
