"""Register the candidate in MLflow and move an alias to it, after a passing gate.

Reads: policy, verdict, the run's mlflow.json. Writes: promotion.json.
    align run recipes/demo --only 9_promote
"""

from __future__ import annotations

from pathlib import Path

from align.artifacts import StageFolder, read_json, read_manifest, write_json
from align.config import PromoteConfig
from align.models.qwen2_audio import weights_sha256
from align.release import registry


def run(config: PromoteConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Promote; returns the version number.

    Raises:
        ValueError: the gate did not pass this candidate.
    """
    decided = read_json(inputs[config.verdict] / "verdict.json")
    if decided["verdict"] != "pass" or decided["candidate"] != config.policy:
        raise ValueError(
            f"{config.policy} is not promoted: {config.verdict} judged {decided['candidate']} "
            f"{decided['verdict'].upper()} ({'; '.join(decided['reasons'])})"
        )
    tracked = read_json(out.final.parent / "mlflow.json")
    tags = {
        "gate.verdict": decided["verdict"],
        "gate.digest": read_manifest(inputs[config.verdict])["output_digest"],
        "policy.digest": read_manifest(inputs[config.policy])["output_digest"],
        "weights.sha256": weights_sha256(inputs[config.policy] / "model"),
    }
    version = registry.promote(
        inputs[config.policy] / "model",
        model_name=config.model_name,
        alias=config.alias,
        tags=tags,
        tracking_uri=tracked["tracking_uri"],
        run_id=tracked["runs"].get(config.policy),
    )
    write_json(out.path / "promotion.json", {"name": config.model_name, "version": version, "tags": tags})
    return {"version": float(version)}
