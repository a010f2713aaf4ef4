"""A folder of YAML files -> an ordered, checked list of steps. All mistakes are reported at once.

Imports neither torch nor TRL: checking a recipe takes a blink and touches nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from align.recipe import between_stages
from align.recipe.config.base import CONFLICTS, Config, Needs, Outside, StageConfig, mark_of, parts
from align.recipe.config.corpus import CorpusConfig, DataSetShare
from align.recipe.config.stages import STAGES
from align.recipe.rounds import expand
from align.recipe.stage_file import Loc, Problem, StageFile, dotted, parse, read_files
from align.recipe.trl_names import REFUSED, as_written, known_names, problem_with, set_by_stage

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_IMPORTED, _KEPT = "as `align data import` writes", "as `align chat` keeps"
_FROM_OUTSIDE = {
    "pairs": (_IMPORTED, ["pairs.jsonl"]),
    "labels": (_IMPORTED, ["labels.jsonl"]),
    "corpus": (_IMPORTED, ["clips.jsonl"]),
    "completions": (_KEPT, ["completions.jsonl", "prompts.jsonl"]),
    "annotations": (_KEPT, ["judgements.jsonl", "quality.json"]),
}
"""What writes folders from outside the recipe, and the files they must hold, by what they stand for."""


class RecipeError(ValueError):
    """Everything that is wrong with a recipe."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


@dataclass(frozen=True)
class Step:
    """One stage of a recipe. `needs` are the names of the earlier stages it reads."""

    name: str
    config: StageConfig
    needs: list[str]
    source: StageFile

    @property
    def file(self) -> Path:
        """Where it is written."""
        return self.source.path

    @property
    def references(self) -> list[tuple[Loc, Needs, str]]:
        """What it reads: where that is named, as what, and its name."""
        return list(_references(type(self.config), self.config.model_dump()))

    @property
    def foreign(self) -> list[str]:
        """Policies and records from outside the recipe: paths and Hub ids."""
        return sorted({ref for _, _, ref in self.references if ref not in self.needs})

    @property
    def foreign_models(self) -> dict[str, tuple[Loc, Needs]]:
        """Models from outside the recipe: paths and Hub ids, with where each is named and as what."""
        models = (each for each in self.references if each[1].kind in ("policy", "checkpoint"))
        return {ref: (loc, needs) for loc, needs, ref in models if ref not in self.needs}

    @property
    def folders(self) -> list[str]:
        """Folders and files of data from outside the run."""
        fields = type(self.config).model_fields.items()
        marked = [name for name, info in fields if mark_of(info, Outside)]
        values = [value for name in marked if (value := getattr(self.config, name))]
        return [path for value in values for path in _paths(value)]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe, its steps in the order they run."""

    name: str
    folder: Path
    steps: list[Step]

    def corpus_of(self, step: Step) -> CorpusConfig | None:
        """The recipe's own corpus that a step reads, if there is one."""
        name = getattr(step.config, "corpus", None)
        configs = (other.config for other in self.steps if other.name == name)
        return next((config for config in configs if isinstance(config, CorpusConfig)), None)

    def step(self, name: str) -> Step:
        """The step of this name, or the only step whose name has this part after the number.

        Raises:
            RecipeError: there is none, or more than one.
        """
        match = _matching(name, [step.name for step in self.steps])
        if isinstance(match, str):
            raise RecipeError([Problem(str(self.folder), "", match)])
        return next(step for step in self.steps if step.name == match[0])


def load(folder: Path, overrides: list[str] | None = None) -> Recipe:
    """Read and check a recipe. `overrides` are `S.key=value` as given to `--set`.

    Raises:
        RecipeError: with every problem of every file.
    """
    recipe, problems = read(folder, overrides)
    if problems:
        raise RecipeError(problems)
    return recipe


def read(folder: Path, overrides: list[str] | None = None) -> tuple[Recipe, list[Problem]]:
    """What `load` reads, with the problems; stages with mistakes are left out, or lack what is mistaken.

    Raises:
        RecipeError: the folder cannot be read.
    """
    problems: list[Problem] = []
    try:
        files = read_files(folder, problems)
    except OSError as error:
        message = f"is not a folder that can be read ({error.strerror}); a recipe is a folder of N_name.yaml"
        raise RecipeError([Problem(str(folder), "", message)]) from None
    for override in overrides or []:
        problems += _apply(override, files)
    steps: list[Step] = []
    for file in (files := expand(files)):
        config, mistakes = _validate(file)
        unread = {problem.key for problem in file.problems}
        mistakes = [*file.problems, *(problem for problem in mistakes if problem.key not in unread)]
        earlier = {other.name: other for other in files if _comes_before(other, file)}
        mistakes += [
            file.problem(
                (), f"stands for a stage {file.name}, which {other.path.name} is too: rename that file"
            )
            for other in files
            if other.name == file.name and other.path != file.path and file.block
        ]
        mistakes += _check_references(file, earlier, files)
        mistakes += _check_trl(file)
        if config is not None:
            config, wrong = between_stages.with_inherited_train(file, config, steps)
            mistakes += wrong
            mistakes += _check_folders(file, config)
            mistakes += _check_facts(file, config, {step.name: step.config for step in steps})
            refs = [ref for _, _, ref in _references(type(config), file.data)]
            needs = [name for name in earlier if name in refs]
            steps.append(Step(file.name, config, needs, file))
        problems += sorted(mistakes, key=lambda problem: problem.line)
    problems += between_stages.problems(steps)
    return Recipe(folder.resolve().name, folder, steps), list(dict.fromkeys(problems))


def _comes_before(other: StageFile, file: StageFile) -> bool:
    """Whether a stage may be read: its file has a smaller number, or it is an earlier one of the same."""
    in_order = other.number < file.number
    return in_order and (other.number[0] < file.number[0] or other.path == file.path)


# -------------------------------------------------------------------------- overrides


def _apply(override: str, files: list[StageFile]) -> list[Problem]:
    """Change the files' data by one `S.key=value`."""
    place = f"--set {override}"
    target, equals, text = override.partition("=")
    name, *keys = target.split(".")
    if not equals or not keys or not all(keys):
        return [Problem(place, "", "expected S.key=value, such as 6_dpo.beta=0.2 or '*.seed=1'")]
    value, places, mistakes = parse(text, tuple(keys), lambda _: place)
    if mistakes:
        return mistakes
    if name == "*":
        targets = [file for file in files if _has_key(file, keys)]
        if not targets:
            return [Problem(place, "", f"no stage of the recipe has the key {'.'.join(keys)!r}")]
    else:
        match = _matching(name, [file.name for file in files])
        if isinstance(match, str):
            return [Problem(place, "", match)]
        targets = [file for file in files if file.name == match[0]]
    for file in targets:
        inner = file.data
        for depth, key in enumerate(keys[:-1], start=1):
            if inner.get(key) is None:
                inner[key] = {}
            inner = inner[key]
            if not isinstance(inner, dict):
                return [Problem(place, dotted(tuple(keys[:depth])), f"holds {inner!r}, not keys")]
        inner[keys[-1]] = value
        inside = tuple(keys)
        file.places = {loc: at for loc, at in file.places.items() if loc[: len(inside)] != inside}
        file.places |= places
        for depth in range(1, len(keys) + 1):
            file.places.setdefault(inside[:depth], place)
    return []


def _has_key(file: StageFile, keys: list[str]) -> bool:
    """Whether the file's kind of stage knows this key."""
    kind = STAGES.get(str(file.data.get("stage")))
    model = _model_at(kind, tuple(keys[:-1])) if kind else None
    return model is not None and keys[-1] in model.model_fields


def _matching(name: str, names: list[str]) -> list[str] | str:
    """The stage meant by a full name or by the part after its number, else what is wrong."""
    matches = [full for full in names if full == name] or [
        full for full in names if full.partition("_")[2] == name
    ]
    if len(matches) > 1:
        return f"{name!r} could be {' or '.join(matches)}; give the full name"
    return matches or f"there is no stage {name!r}{_suggestion(name, names)}; stages: {', '.join(names)}"


# -------------------------------------------------------------------------- values -> typed config


def _validate(file: StageFile) -> tuple[StageConfig | None, list[Problem]]:
    """The typed config of a file, or what keeps it from being one."""
    if not file.data:
        return None, []  # already reported as unreadable
    kind = file.data.get("stage")
    if not isinstance(kind, str) or kind not in STAGES:
        if "stage" not in file.data:
            return None, [file.problem(("stage",), f"required, missing; one of {', '.join(STAGES)}")]
        hint = _suggestion(str(kind), STAGES)
        return None, [file.problem(("stage",), f"{kind!r} is not one of {', '.join(STAGES)}{hint}")]
    try:
        return STAGES[kind].model_validate(file.data), []
    except ValidationError as error:
        details = error.errors()
    problems = [problem for detail in details for problem in _explain(file, STAGES[kind], detail)]
    mistaken = {detail["loc"][0] for detail in details if detail["loc"]}
    rest = {key: value for key, value in file.data.items() if key not in mistaken}
    try:  # what pydantic does not look at before every key is right: what keys say together
        return STAGES[kind].model_validate(rest), problems
    except ValidationError as error:
        together = [detail for detail in error.errors() if mistaken and detail["type"] == CONFLICTS]
        return None, problems + [
            problem for detail in together for problem in _explain(file, STAGES[kind], detail)
        ]


_EXPECTED = MappingProxyType(
    {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "string": "text; put it in quotes",
        "list": "a list",
        "dict": "keys and values",
        "model": "keys and values",
    }
)


def _explain(file: StageFile, config: type[BaseModel], error: ErrorDetails) -> list[Problem]:
    """A pydantic error in the recipe's words."""
    tagged = tuple(part for part in error["loc"] if part != "[key]")
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    loc = _place_in(file.data, tagged, kind == "missing")
    what = kind.split("_")[0]
    if kind == CONFLICTS:
        return [file.problem((*loc, conflict.key), conflict.message) for conflict in context["conflicts"]]
    if kind == "extra_forbidden":
        message = "unknown key" + _unknown_key_hint(str(loc[-1]), _model_at(config, tagged[:-1]), config)
    elif kind == "missing":
        message = "required, missing"
    elif kind == "literal_error":
        options = context["expected"].replace("'", "").replace(" or ", ", ")
        options = options.replace("True", "true").replace("False", "false")
        model = _model_at(config, tagged[:-1]) or _model_at(config, tagged[:-2])  # a key of a mapping
        renamed = model.renamed if model and issubclass(model, Config) else {}
        if str(value) in renamed:
            message = f"{value!r} is called {renamed[str(value)]!r} now"
        else:
            message = f"{value!r} is not one of {options}{_suggestion(str(value), options.split(', '))}"
    elif kind == "value_error":
        message = str(context["error"])
    elif what in _EXPECTED and kind.endswith(("_type", "_parsing", "_from_float")):
        message = f"expected {_EXPECTED[what]}, got {as_written(value)}"
    else:
        message = f"{error['msg'].removeprefix('Input ')}, got {value!r}"
    return [file.problem(loc, message)]


def _place_in(data: Any, loc: Loc, is_missing: bool) -> Loc:
    """A place without pydantic's notes on the member of a union that was meant."""
    place: list[str | int] = []
    for depth, part in enumerate(loc, start=1):
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            if not (is_missing and depth == len(loc)):
                continue
        place.append(part)
    return tuple(place)


def _unknown_key_hint(key: str, model: type[BaseModel] | None, config: type[BaseModel]) -> str:
    """Where an unknown key belongs, or which key was probably meant."""
    if model is None:
        return ""
    if issubclass(model, Config) and key in model.renamed:
        return f": it is called {model.renamed[key]!r} now"
    trl = model.trl_config if issubclass(model, StageConfig) else None
    if trl and key in known_names(trl):
        if reason := set_by_stage(key, config.model_fields):
            return f" (a name of TRL's: {reason})"
        if key in REFUSED:
            return f" (a name of TRL's that cannot be used: {REFUSED[key]})"
        return f" (a name of TRL's: put it under `trl:`, as trl.{key})"
    return _suggestion(key, model.model_fields)


def _model_at(config: type[BaseModel] | None, loc: Loc) -> type[BaseModel] | None:
    """The model that a place inside a config is validated by, if it is one."""
    annotation: Any = config
    for place, part in enumerate(loc):
        if isinstance(part, str) and not part.startswith("["):
            if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
                return None
            if part == annotation.__name__:
                continue
            info = annotation.model_fields.get(part)
            annotation = info.annotation if info else None
        models = _models(annotation)
        meant = [model for model in models if loc[place + 1 : place + 2] == (f"[{model.__name__}]",)]
        annotation = next(iter([*meant, *models]), None)
    return annotation


# -------------------------------------------------------------------------- references and TRL names


def _paths(value: str | Sequence[str | DataSetShare]) -> list[str]:
    """What a marked field names: a path, several, or data sets."""
    listed = [value] if isinstance(value, str) else value
    return [item if isinstance(item, str) else item.folder for item in listed]


def _references(config: type[BaseModel], data: dict[str, Any]) -> Iterator[tuple[Loc, Needs, str]]:
    """Every reference to another stage in a file's data, valid or not."""
    for key, info in config.model_fields.items():
        needs, value = mark_of(info, Needs), data.get(key)
        if needs and isinstance(value, str):
            yield (key,), needs, value
        elif needs and isinstance(value, list):
            yield from (((key, i), needs, ref) for i, ref in enumerate(value) if isinstance(ref, str))
        elif isinstance(value, dict):
            for inner in _models(info.annotation):
                if inner.model_fields.keys() & value.keys():
                    yield from (((key, *loc), needs, ref) for loc, needs, ref in _references(inner, value))


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation is made of."""
    return [part for part in parts(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]


def _check_references(
    file: StageFile, earlier: dict[str, StageFile], files: list[StageFile]
) -> list[Problem]:
    """References that lead nowhere, forward, or to the wrong kind of stage."""
    config = STAGES.get(str(file.data.get("stage")))
    problems = []
    for loc, needs, ref in _references(config, file.data) if config else ():
        message = None
        if "/" in ref:
            message = _foreign_problem(ref, needs)
        elif ref in earlier:
            kind = STAGES.get(str(earlier[ref].data.get("stage")))
            if kind and kind.produces != needs.kind:
                message = f"{ref!r} produces {kind.produces}, not {needs.kind}"
        elif ref in [other.name for other in files]:
            message = f"{ref!r} does not come before {file.path.stem!r}; only earlier stages can be used"
        elif needs.kind == "checkpoint":
            message = f"{ref!r} is neither a folder (./{ref}) nor a Hub id (owner/name)"
        else:
            named = {n: STAGES.get(str(f.data.get("stage"))) for n, f in earlier.items()}
            fitting = [n for n, c in named.items() if c and c.produces == needs.kind]
            listed = f"; earlier stages producing {needs.kind}: {', '.join(fitting) or 'none'}"
            message = f"there is no stage {ref!r}{_suggestion(ref, fitting)}{listed}"
        if message:
            problems.append(file.problem(loc, message))
    return problems


def _foreign_problem(ref: str, needs: Needs) -> str | None:
    """What is wrong with what comes from outside the recipe, named by path or Hub id."""
    if problem := _path_problem(ref):
        return problem
    folder = Path(ref).expanduser()
    if needs.kind in _FROM_OUTSIDE:
        written_by, wanted = _FROM_OUTSIDE[needs.kind]
        lacks = next((name for name in wanted if not (folder / name).is_file()), None)
        return f"there is no folder {ref!r} with {lacks} in it, {written_by}" if lacks else None
    if needs.kind not in ("policy", "checkpoint"):
        kinds = ", ".join(_FROM_OUTSIDE)
        return f"{ref!r} is a path, but only a model, {kinds} can come from outside the recipe"
    if folder.is_dir() or _HUB_ID.fullmatch(ref) and ref[0] not in ".~":
        return None
    return f"there is no folder {ref!r}, and it is not a Hub id (owner/name)"


def _path_problem(path: str) -> str | None:
    """Why text can be the path of nothing on any machine."""
    try:
        Path(path).expanduser().stat()
    except FileNotFoundError:
        return None  # not here, or not yet
    except (OSError, ValueError, RuntimeError) as error:
        shortened = path if len(path) < 100 else f"{path[:80]}..."
        return f"{shortened!r} can be no path: {getattr(error, 'strerror', None) or error}"
    return None


def _check_folders(file: StageFile, config: StageConfig) -> list[Problem]:
    """Folders and files of data whose names can be none."""
    problems = []
    for key, info in type(config).model_fields.items():
        value = getattr(config, key) if mark_of(info, Outside) else None
        for path in _paths(value) if value else ():
            if problem := _path_problem(path):
                problems.append(file.problem((key,), problem))
    return problems


def _check_trl(file: StageFile) -> list[Problem]:
    """Names under `trl:` that TRL does not know, that repeat a key of ours, or that cannot work."""
    config, given = STAGES.get(str(file.data.get("stage"))), file.data.get("trl")
    if config is None or config.trl_config is None or not isinstance(given, dict):
        return []
    messages = {
        name: problem_with(name, value, config.trl_config, config.model_fields)
        for name, value in given.items()
    }
    return [file.problem(("trl", name), message) for name, message in messages.items() if message]


def _check_facts(file: StageFile, config: StageConfig, earlier: dict[str, StageConfig]) -> list[Problem]:
    """A key that needs the facts of clips, where the corpus has none: a mixture, or one from outside."""
    needed, corpus = config.needs_facts(), str(file.data.get("corpus"))
    if needed is None or (corpus in earlier and earlier[corpus].has_facts):
        return []
    if "/" not in corpus and corpus not in earlier:
        return []  # reported where the reference is
    if _path_problem(corpus) or (Path(corpus).expanduser() / "phrasebook.yaml").exists():
        return []
    key, instead = needed
    return [file.problem((key,), f"needs the facts of every clip, and {corpus!r} has none: use `{instead}`")]


def _suggestion(wrong: str, known: Any) -> str:
    close = get_close_matches(wrong, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
