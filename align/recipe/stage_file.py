"""A YAML file of a recipe with the line of every value, so that a mistake can be pointed at."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Loc = tuple[str | int, ...]
"""Where a value is inside a file: keys and list positions from the top."""

_FILE = re.compile(r"(?P<number>\d+)_(?P<title>[A-Za-z0-9_-]+)\.yaml")
_STR = "tag:yaml.org,2002:str"


class _Loader(yaml.SafeLoader):
    """YAML with the plain values of version 1.2 (core schema, decimal); all else is text as written.

    PyYAML follows version 1.1, where 010 is 8, 1:30 is 90, 1_000 is 1000 and no is false, but 1e-3 is text.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"({_pattern})\\Z"), list(_first))
_RESOLVER = _Loader("")


class Problem(NamedTuple):
    """A mistake: `place` is `file:line` or the override that made it, `key` a dotted path or empty."""

    place: str
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)

    @property
    def line(self) -> int:
        """The line of the file; 0 where the place is not in one."""
        line = self.place.rpartition(":")[2]
        return int(line) if line.isdecimal() else 0


@dataclass
class StageFile:
    """A stage file as written: `data` by key, the place each value comes from, and what cannot be read."""

    path: Path
    name: str
    number: tuple[int, ...]
    """Stages with a smaller one come before."""
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[Loc, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    block: str = ""
    """The key of the file that holds the stage's own keys, where the file stands for several stages."""
    beside: Collection[str] = ()
    """Keys that stand beside the block."""

    def place(self, loc: Loc) -> str:
        """Where a value is, or the nearest thing around it."""
        return next(
            (self.places[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in self.places),
            f"{self.path}:1",
        )

    def problem(self, loc: Loc, message: str) -> Problem:
        """A mistake at this place."""
        inside = (self.block,) if self.block and not {*loc[:1]} & {*self.beside} else ()
        return Problem(self.place(loc), dotted((*inside, *loc)), message)


def read_files(folder: Path, problems: list[Problem]) -> list[StageFile]:
    """All stage files in the order they run; what is no stage file is reported and left out."""
    files = []
    paths = [p for p in folder.iterdir() if p.suffix in (".yaml", ".yml") and not p.name.startswith(".")]
    for path in sorted(paths):
        match = _FILE.fullmatch(path.name)
        if match is None:
            problems.append(Problem(str(path), "", "a stage file is named N_name.yaml, such as 2_sft.yaml"))
            continue
        files.append(_read(StageFile(path, path.stem, (int(match["number"]),))))
    if not paths:
        problems.append(Problem(str(folder), "", "holds no stage files (N_name.yaml)"))
    return sorted(files, key=lambda file: (file.number, file.name))


def _read(file: StageFile) -> StageFile:
    """Fill in what is read of a file, and what is wrong with it."""
    try:
        text = file.path.read_text(encoding="utf-8-sig")
    except OSError as error:
        file.problems.append(Problem(str(file.path), "", f"cannot be read: {error.strerror}"))
        return file
    except UnicodeDecodeError:
        file.problems.append(Problem(f"{file.path}:1", "", "is not text in UTF-8"))
        return file
    data, file.places, file.problems = parse(text, (), lambda line: f"{file.path}:{line}")
    if isinstance(data, dict):
        file.data = data
    elif not file.problems:
        file.problems.append(Problem(f"{file.path}:1", "", "expected keys and values, such as `stage: sft`"))
    return file


class Parsed(NamedTuple):
    """A value, the places of what is in it, and the mistakes; what is mistaken is left out of the value."""

    value: Any
    places: dict[Loc, str]
    problems: list[Problem]


def parse(text: str, loc: Loc, place: Callable[[int], str]) -> Parsed:
    """Read YAML that stands at `loc`. `place` is what a line of it is called in messages."""
    walk = _Walk(place)
    line = 1
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = loader.construct_document(node) if node and walk.keeps(node, loc) else None
        return Parsed(value, walk.places, walk.problems)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        message = f"not YAML: {error.problem or error.context}"
        if "'\\t'" in message:
            message += "; indent with spaces"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"not YAML: holds the character {chr(error.character)!r}"
    except (yaml.YAMLError, ValueError) as error:
        message = f"not YAML: {error}"
    except RecursionError:
        message = "not a stage file: its brackets are nested too deeply"
    walk.note(line, loc, message)
    return Parsed(None, walk.places, walk.problems)


@dataclass
class _Walk:
    """Goes through the nodes of a text before values are made of them, and takes out what is mistaken.

    That is what would hide a value or make something else of it: a repeated key (the first counts), a key
    that is not text, an alias, a tag.
    """

    place: Callable[[int], str]
    places: dict[Loc, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    visited: set[int] = field(default_factory=set)

    def note(self, line: int, loc: Loc, message: str) -> None:
        """Note a mistake."""
        self.problems.append(Problem(self.place(line), dotted(loc), message))

    def keeps(self, node: yaml.Node, loc: Loc) -> bool:
        """Note the places of what is in a node; False where it is mistaken itself."""
        line = node.start_mark.line + 1
        if id(node) in self.visited:  # an alias has no mark of its own
            message = "anchors (&, *) are not supported in recipes; write the value out"
            self.problems.append(Problem(self.places.get(loc, self.place(line)), dotted(loc), message))
            return False
        self.visited.add(id(node))
        if node.tag != _implicit_tag(node):
            self.note(line, loc, f"tags ({node.tag}) are not supported in recipes; write the value plainly")
            return False
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.places[(*loc, index)] = self.place(item.start_mark.line + 1)
            node.value = [item for index, item in enumerate(node.value) if self.keeps(item, (*loc, index))]
        elif isinstance(node, yaml.MappingNode):
            node.value = [(key, value) for key, value in node.value if self._keeps_pair(key, value, loc)]
        return True

    def _keeps_pair(self, key: yaml.Node, value: yaml.Node, loc: Loc) -> bool:
        line = key.start_mark.line + 1
        here = (*loc, key.value if isinstance(key, yaml.ScalarNode) else "?")
        if here in self.places:
            self.note(line, here, f"written twice, first at {self.places[here]}")
            return False
        self.places[here] = self.place(line)
        if key.tag != _STR:
            self.note(line, here, "a key must be text; put it in quotes")
            return False
        return self.keeps(value, here)


def _implicit_tag(node: yaml.Node) -> str:
    """The tag of a node that is written without any."""
    is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return str(_RESOLVER.resolve(type(node), node.value, (is_plain, not is_plain)))


def dotted(loc: Loc) -> str:
    """A place as it is written: `lora.rank`, `policies[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")
