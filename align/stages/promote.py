"""Register the candidate in MLflow and move an alias to it, after a passing gate.

Nothing is taken on trust: the verdict, the evaluation, the weights and the champion must still be those of
the gate's decision, else nothing moves and the message names the change.
Reads: policy, verdict and the evaluation behind it, the run's mlflow.json. Writes: promotion.json.
    align run recipes/demo --only 9_promote
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from align.models.qwen2_audio.model import located
from align.models.shards import weights_sha256
from align.recipe.config.evaluation import PromoteConfig
from align.release.ancestry import complete_ancestry, resolve
from align.release.registry import CANDIDATE, WEIGHTS, Holder, NotPromoted, Registry
from align.run_folder.artifacts import (
    MANIFEST,
    StageFolder,
    foreign_digest,
    read_json,
    read_manifest,
    sha256_file,
    write_json,
)
from align.run_folder.tracking import Links, read_links, tracking_uri


class GateClosed(NotPromoted):
    """The gate did not pass; `verdict` is its word."""

    def __init__(self, message: str, verdict: str) -> None:
        super().__init__(message)
        self.verdict = verdict


class Promotion(NamedTuple):
    """The registered version. `previous` held the alias before; None: nobody, or it was only registered."""

    version: int
    previous: int | None
    tags: dict[str, str]


def run(config: PromoteConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Promote; returns the version number.

    Raises:
        NotPromoted: the gate did not pass this candidate, or something has changed since it decided.
        RegistryDown: MLflow does not answer.
    """
    gate = inputs[config.verdict]
    done = promote(gate, config.policy, model_name=config.model_name, alias=config.alias)
    promotion = {"name": config.model_name, "alias": config.alias, **done._asdict()}
    write_json(out.path / "promotion.json", promotion)
    return {"version": float(done.version)}


def promote(gate: Path, policy: str, *, model_name: str, alias: str) -> Promotion:
    """Check that nothing has changed since the gate, register the policy and move the alias.

    May be repeated, also after a failure half-way.

    Args:
        gate: the finished gate's folder.
        policy: the policy as the recipe names it.
        model_name: the registered model.
        alias: what to move; `candidate` only registers.

    Raises:
        NotPromoted: naming what has changed.
        RegistryDown: MLflow does not answer.
    """
    decision = _passing(gate, policy)
    _refuse_changed_evaluation(gate, policy)
    model = resolve(gate.parent, policy)
    _refuse_changed_weights(model, policy, decision)
    registry = Registry(tracking_uri(gate.parent), model_name)
    expected = _expected(registry, decision, alias)
    links = read_links(gate.parent)
    tags = _tags(gate, model, decision, links)
    version = registry.register(Path(located(model)), tags, links.runs.get(policy))
    if alias == CANDIDATE:
        return Promotion(version, None, tags)
    try:
        before = registry.move(alias, version, expected=expected, why=f"verdict {tags['gate.digest'][:16]}")
    except NotPromoted as error:
        raise NotPromoted(
            f"{error}. Version {version} stays {CANDIDATE}. To decide anew: rm -r {gate}, then run the "
            "recipe again (with `model_name` in the gate's file: it notes whom the candidate would replace)"
        ) from error
    return Promotion(version, before.version, tags)


# -------------------------------------------------------------------------- has anything changed?


def _passing(gate: Path, policy: str) -> dict[str, Any]:
    """The verdict, if it is whole, of this policy, and a pass."""
    manifest = read_manifest(gate)
    if sha256_file(gate / "verdict.json") != manifest["outputs"]["verdict.json"]:
        raise NotPromoted(f"{gate / 'verdict.json'} is not what the gate wrote; make it again: rm -r {gate}")
    decision: dict[str, Any] = read_json(gate / "verdict.json")
    if decision["candidate"] != policy:
        raise NotPromoted(
            f"{gate.name} judged {decision['candidate']}, not {policy}: {policy} is not promoted"
        )
    if decision["verdict"] != "pass":
        raise GateClosed(
            f"{policy} is not promoted: {gate.name} says {decision['verdict'].upper()} "
            f"({'; '.join(decision['reasons'])})",
            decision["verdict"],
        )
    return decision


def _refuse_changed_evaluation(gate: Path, policy: str) -> None:
    """The evaluation must be the one that was judged, and the policy the one that was evaluated."""
    judged = read_manifest(gate)
    evaluation = gate.parent / judged["config"]["evaluation"]
    evaluated = read_manifest(evaluation)
    again = f"run the recipe again from {evaluation.name}"
    if judged["inputs"][evaluation.name] != evaluated["output_digest"]:
        raise NotPromoted(f"{evaluation} was made again after {gate.name} had judged it; {again}")
    if sha256_file(evaluation / "scores.json") != evaluated["outputs"]["scores.json"]:
        raise NotPromoted(f"{evaluation / 'scores.json'} is not what the evaluation wrote; {again}")
    model = resolve(gate.parent, policy)
    now = foreign_digest(policy) if "/" in policy else read_manifest(model)["output_digest"]
    if evaluated["inputs"][policy] != now:
        raise NotPromoted(f"{model} was made again after {evaluation.name} had scored it; {again}")


def _refuse_changed_weights(model: Path, policy: str, decision: dict[str, Any]) -> None:
    """The files must be those of the manifest; without one, the weights those that the gate hashed."""
    if (model / MANIFEST).exists():
        written = read_manifest(model)["outputs"]
        files = [name for name in written if name.startswith("model/")]
        for name in files:
            path = model / name
            if not path.exists() or sha256_file(path) != written[name]:
                raise NotPromoted(
                    f"{path} has changed since {model.name} was made: its weights were not judged"
                )
        extra = {str(path.relative_to(model)) for path in (model / "model").rglob("*.safetensors")} - {*files}
        if extra:
            raise NotPromoted(f"{model / min(extra)} was added after {model.name} had been made")
    elif weights_sha256(located(model)) != decision.get("weights", {}).get(policy):
        raise NotPromoted(f"the weights in {model} have changed since the gate judged them")


def _expected(registry: Registry, decision: dict[str, Any], alias: str) -> Holder:
    """The holder of the alias at the gate's decision; nobody, if no registered model was named to it."""
    noted = decision.get("registry", {})
    name, judged_alias = noted.get("model_name"), noted.get("alias", alias)
    if name is not None and name != registry.name:
        raise NotPromoted(f"the gate compared with {name!r}, not with {registry}: name one model in both")
    if alias != judged_alias:
        return registry.holder(alias)  # the gate says nothing about this alias
    return Holder(**decision["champion"]) if decision.get("champion") else Holder(None, None, None)


# -------------------------------------------------------------------------- the version's tags


def _tags(gate: Path, model: Path, decision: dict[str, Any], links: Links) -> dict[str, str]:
    """The evidence of the decision as the version's tags; unknown values have no tag."""
    judged = read_manifest(gate)
    evaluation = gate.parent / judged["config"]["evaluation"]
    judge = read_json(evaluation / "scores.json").get("judge", {})
    history = complete_ancestry(model) if (model / MANIFEST).exists() else None
    tags = {
        "gate.verdict": decision["verdict"],
        "gate.digest": judged["output_digest"],
        "gate.thresholds_sha256": decision.get("thresholds_sha256"),
        "gate.run": links.runs.get(gate.name),
        "evaluation.digest": judged["inputs"][evaluation.name],
        "judge.name": judge.get("name"),
        "judge.model": judge.get("model"),
        "judge.prompt_sha256": judge.get("prompt_sha256"),
        "policy.digest": read_manifest(model)["output_digest"] if history else None,
        "run.parent": links.run_id,
        WEIGHTS: weights_sha256(located(model)),
    }
    datasets = history.datasets() if history else {}
    tags |= {f"dataset.{name.replace('/', '.')}": digest for name, digest in datasets.items()}
    return {key: str(value) for key, value in tags.items() if value is not None}
