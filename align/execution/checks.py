"""What is known before a run beyond a recipe's own text: TRL's arguments, models and data on disk, the Hub.

`align check` and `align run` begin with it. Stages that are finished in the run folder are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from align.execution.plan import survey
from align.planning.budget import shape_of
from align.planning.estimate import UnknownShape
from align.planning.foreign_models import hub_problem, model_problems
from align.recipe.config.alignment import DPOConfig, GRPOConfig
from align.recipe.config.evaluation import ChatModel
from align.recipe.config.preference import AnnotateConfig
from align.recipe.config.training import Filters, Hardware, SFTConfig, TrainingConfig
from align.recipe.recipe import Recipe, RecipeError, Step, read
from align.recipe.stage_file import Problem
from align.recipe.trl_names import problem_with
from align.run_folder.artifacts import MANIFEST
from preference_data.preferences import snapshots

_STEPS = 1000
"""Of a stage whose length is not known before it runs."""


def load_checked(
    folder: Path, overrides: list[str] | None, run_folder: Callable[[Recipe], Path]
) -> tuple[Recipe, Path]:
    """A recipe of which nothing is known that would make its run fail, and its run folder.

    Raises:
        RecipeError: with every problem of every file.
    """
    recipe, problems = read(folder, overrides)
    run = run_folder(recipe)
    for step in recipe.steps if problems else _unfinished(recipe, run):
        problems += [*model_problems(step, recipe.corpus_of(step)), *_refused_by_trl(step)]
        problems += [*_judge_problems(step), *_engine_problems(step, recipe), *_data_problems(step, run)]
        problems += _snapshot_problems(step)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return recipe, run


def check_data(recipe: Recipe, run: Path, chosen: list[Step]) -> list[Problem]:
    """Refuse a run of the `chosen` steps whose data are not here; returns what is said of absent models.

    Raises:
        RecipeError: naming the folders and files.
    """
    steps = [step for step in _unfinished(recipe, run) if step in chosen]
    if problems := missing_data(steps):
        raise RecipeError(problems)
    return unreachable_models(steps)


def _unfinished(recipe: Recipe, run: Path) -> list[Step]:
    """The steps that a run would work on."""
    if not run.is_dir():
        return recipe.steps  # and the data are not gone through
    return [standing.step for standing in survey(recipe, run) if standing.state != "done"]


def missing_data(steps: list[Step]) -> list[Problem]:
    """Folders and files of data that steps read and that are not here."""
    missing = [
        (step, [path for path in step.folders if not Path(path).expanduser().exists()]) for step in steps
    ]
    return [
        Problem(str(step.file), "", f"data are not here, and a run needs them: {', '.join(paths)}")
        for step, paths in missing
        if paths
    ]


def unreachable_models(steps: list[Step]) -> list[Problem]:
    """Models named by a Hub id that are not on this machine, and what the Hub says of them."""
    named: dict[str, Step] = {}
    for step in steps:
        for ref in step.foreign_models:
            named.setdefault(ref, step)
    problems = ((step, hub_problem(ref)) for ref, step in named.items())
    return [Problem(str(step.file), "", problem) for step, problem in problems if problem]


def _refused_by_trl(step: Step) -> Iterator[Problem]:
    """Values under `trl:` that TRL, transformers or torch refuse, in the words of their errors."""
    config = step.config
    if not isinstance(config, TrainingConfig) or config.trl_config is None:
        return
    fields, trl = type(config).model_fields, config.trl
    sound = {name: trl[name] for name in trl if not problem_with(name, trl[name], config.trl_config, fields)}
    if not sound:
        return  # what the stage sets itself is bounded by its own keys
    import trl as trl_library  # takes seconds, with torch

    from align.training.argument_check import refused_arguments

    refused = refused_arguments(
        getattr(trl_library, config.trl_config),
        sound,
        {
            "learning_rate": config.learning_rate,
            "max_steps": config.n_examples // config.batch_size if config.n_examples else _STEPS,
        },
        is_for_gpus=config.hardware is not None and config.hardware.device != "cpu",
    )
    for name, message in refused.items():
        yield step.source.problem(("trl", name), message)


def _judge_problems(step: Step) -> Iterator[Problem]:
    """Judge models that cannot be used: a URL or parameters that are none, a folder without a model."""
    reward = getattr(step.config, "reward", None)
    judge = reward.judge if reward else getattr(step.config, "judge", None)
    if not isinstance(judge, ChatModel):
        return
    from align.evaluation.judges.chat_model import local_max_tokens  # with the client below it takes a second

    try:
        if judge.url is None:
            local_max_tokens(judge.parameters)
            if not (Path(judge.model).expanduser() / "config.json").is_file():
                raise FileNotFoundError(
                    f"there is no model in the folder {judge.model!r}; a server's needs url"
                )
        else:
            from align.evaluation.judges.endpoint import Endpoint

            Endpoint(judge.url, judge.model, parameters=judge.parameters)
    except (ValueError, OSError, RuntimeError) as error:
        yield step.source.problem((*(["reward"] if reward else []), "judge"), str(error))


def _engine_problems(step: Step, recipe: Recipe) -> Iterator[Problem]:
    """Why vLLM cannot complete prompts here; of a cluster that others run only policies can be known."""
    config = step.config
    if getattr(config, "engine", None) != "vllm":
        return
    from align.generation.vllm.server import missing, training_problem, width_problem  # seconds, with torch

    hardware: Hardware | None = getattr(config, "hardware", None)
    is_here = hardware is None or hardware.address is None
    if is_here and (problem := missing()):
        yield step.source.problem(("engine",), problem)
    training_gb = hardware.memory_gb if hardware else None
    if is_here and isinstance(config, GRPOConfig) and (problem := training_problem(training_gb)):
        yield step.source.problem(("engine",), problem)
    for policy in getattr(config, "policies", [getattr(config, "policy", "")]):
        with suppress(UnknownShape, OSError):
            if problem := width_problem(shape_of(policy, recipe).head_width):
                yield step.source.problem(("engine",), f"{policy} has {problem}")


def _data_problems(step: Step, run: Path) -> Iterator[Problem]:
    """Examples that cannot be trained on, where the policy and the data are there before the run."""
    config = step.config
    if not isinstance(config, DPOConfig | SFTConfig) or getattr(config, "filters", Filters()) != Filters():
        return  # filters may leave out what is wrong
    inputs = {name: run / name for name in step.needs if (run / name / MANIFEST).is_file()}
    inputs |= {ref: Path(ref).expanduser() for ref in step.foreign if Path(ref).expanduser().is_dir()}
    if len(inputs) < len({*step.needs, *step.foreign}):
        return
    try:
        import_module(f"align.stages.{config.kind()}").check(config, inputs)
    except (ValueError, OSError) as error:
        yield Problem(str(step.file), "", str(error))


def _snapshot_problems(step: Step) -> Iterator[Problem]:
    """Earlier judgements that cannot be read; of which completions they are is known when these are there."""
    config = step.config
    if not isinstance(config, AnnotateConfig) or not config.snapshot:
        return
    try:
        snapshots.read([Path(config.snapshot).expanduser()], {})
    except (ValueError, OSError) as error:
        yield step.source.problem(("snapshot",), str(error))
