"""Decide whether the candidate may be promoted. Only wires: `release/verdict.py` decides.

Reads: evaluation. Writes: verdict.json.
    align run recipes/demo --only 8_gate
"""

from __future__ import annotations

from pathlib import Path

from align.artifacts import StageFolder, read_json, write_json
from align.config import GateConfig
from align.release import verdict


def run(config: GateConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Write the verdict; returns how many checks had which outcome."""
    scores = read_json(inputs[config.evaluation] / "scores.json")
    decided = verdict.decide(verdict.checks(scores, config.thresholds.model_dump()))
    write_json(
        out.path / "verdict.json",
        {
            "verdict": decided.verdict,
            "reasons": decided.reasons,
            "split": scores["split"],
            "candidate": scores["after"],
            "checks": [{**check._asdict(), "passed": check.outcome == "pass"} for check in decided.checks],
        },
    )
    outcomes = [check.outcome for check in decided.checks]
    return {
        f"checks_{outcome}": float(outcomes.count(outcome)) for outcome in ("pass", "fail", "inconclusive")
    }
