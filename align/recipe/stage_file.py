"""A YAML file of a recipe with the line of every value, so that a mistake can be pointed at."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Loc = tuple[str | int, ...]
"""Where a value is inside a file: keys and list positions from the top."""

_ODD_NUMBER = re.compile(r"[-+]?0[0-9_]+|[-+]?\d[\d_]*(:[0-5]?\d)+(\.\d*)?")
"""Octal and base-60 numbers of YAML 1.1, which nobody means: 010 would be 8, and 1:30 would be 90."""
_FILE = re.compile(r"(?P<number>\d+)_(?P<title>[A-Za-z0-9_-]+)\.yaml")


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
    """A stage file as written: `data` by key, and the place each value comes from."""

    path: Path
    name: str
    number: int
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[Loc, str] = field(default_factory=dict)

    def place(self, loc: Loc) -> str:
        """Where a value is, or the nearest thing around it."""
        return next(
            (self.places[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in self.places), f"{self.path}:1"
        )

    def problem(self, loc: Loc, message: str) -> Problem:
        """A mistake at this place."""
        return Problem(self.place(loc), dotted(loc), message)


def read_files(folder: Path, problems: list[Problem]) -> list[StageFile]:
    """All stage files in the order they run; what cannot be read is reported and left out."""
    files = []
    paths = [p for p in folder.iterdir() if p.suffix in (".yaml", ".yml") and not p.name.startswith(".")]
    for path in sorted(paths):
        match = _FILE.fullmatch(path.name)
        if match is None:
            problems.append(Problem(str(path), "", "a stage file is named N_name.yaml, such as 2_sft.yaml"))
            continue
        file = StageFile(path, path.stem, int(match["number"]))
        problems += _parse(file)
        files.append(file)
    if not paths:
        problems.append(Problem(str(folder), "", "holds no stage files (N_name.yaml)"))
    return sorted(files, key=lambda file: (file.number, file.name))


def _parse(file: StageFile) -> list[Problem]:
    """Fill in `data` and `places`."""
    problems: list[Problem] = []
    try:
        loader = yaml.SafeLoader(file.path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            return [Problem(f"{file.path}:1", "", "expected keys and values, such as `stage: sft`")]
        problems += _walk(node, (), file, set())
        if not problems:
            file.data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        return [Problem(f"{file.path}:{line}", "", f"not YAML: {error.problem or error.context}")]
    except (yaml.YAMLError, ValueError) as error:
        return [Problem(f"{file.path}:1", "", f"not YAML: {error}")]
    except RecursionError:
        return [Problem(f"{file.path}:1", "", "not a stage file: its brackets are nested too deeply")]
    except OSError as error:
        return [Problem(str(file.path), "", f"cannot be read: {error.strerror}")]
    return problems


def _walk(node: yaml.Node, loc: Loc, file: StageFile, visited: set[int]) -> Iterator[Problem]:
    """Note the line of every value; yields repeated keys and anchors, which would hide a value."""
    if id(node) in visited:
        yield file.problem(loc, "anchors (&, *) are not supported in recipes; write the value out")
        return
    visited.add(id(node))
    if isinstance(node, yaml.ScalarNode) and node.style is None and _ODD_NUMBER.fullmatch(node.value):
        yield file.problem(loc, f"YAML reads {node.value} in base 8 or 60; write it plainly, or in quotes")
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            file.places[(*loc, index)] = f"{file.path}:{item.start_mark.line + 1}"
            yield from _walk(item, (*loc, index), file, visited)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here, place = (*loc, str(key.value)), f"{file.path}:{key.start_mark.line + 1}"
            if here in file.places:
                yield Problem(place, dotted(here), f"written twice, first at {file.places[here]}")
            elif key.tag != "tag:yaml.org,2002:str":
                yield Problem(place, dotted(here), "a key must be text; put it in quotes")
            file.places.setdefault(here, place)
            yield from _walk(value, here, file, visited)


def dotted(loc: Loc) -> str:
    """A place as it is written: `lora.rank`, `policies[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")
