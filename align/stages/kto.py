"""Kahneman-Tversky optimisation (arXiv:2402.01306) through TRL, on audio.

A completion is good or bad on its own: a thumb up or down, "both bad", a reward beyond a threshold. The rarer
kind of label counts more, so that both kinds together count the same (`balance`). Differs from the paper:
labels may have weights, and the best checkpoint can be published. Reads: policy (also the reference), labels,
corpus. Writes: model/, metrics.jsonl.
    align run recipes/demo_rl --only 6_kto
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from align.models.qwen2_audio import model as qwen2_audio
from align.recipe.config.alignment import KTOConfig
from align.run_folder.artifacts import StageFolder
from align.stages.tuning import schedule_of, steps_of, train_policy
from align.training.collate import Row, label_row
from align.training.data_loading import hold_out
from align.training.methods import kahneman_tversky_optimisation
from align.training.preflight import check_clip_lengths, readable
from align.training.reference import ReferenceStore
from preference_data import store
from preference_data.audio.decode import SAMPLE_RATE
from preference_data.dataset.dataset import Dataset
from preference_data.schema import AudioClip, Label


def run(config: KTOConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Train on labels, choose a checkpoint; returns the last logged metrics, the choice, and the weights."""
    corpus, policy = inputs[config.corpus], qwen2_audio.located(inputs[config.policy])
    processor = qwen2_audio.load_processor(policy)
    check_clip_lengths(Dataset(corpus).table(AudioClip), processor, max_bad_fraction=0.0)
    brought = [label_row(label) for label in store.read(inputs[config.labels] / "labels.jsonl", Label)]
    labels = readable(brought, corpus, processor.feature_extractor.n_samples / SAMPLE_RATE, out.path)
    rows, held_out = hold_out(labels, config.held_out, config.seed)
    weights = balanced_weights(rows, config.balance)
    if held_out:
        balanced_weights(held_out, config.balance)
    schedule = schedule_of(config, steps_of(len(rows), config.epochs, config.batch_size))
    method = kahneman_tversky_optimisation(
        rows,
        schedule,
        loss=config.loss,
        beta=config.beta,
        desirable_weight=weights.desirable,
        undesirable_weight=weights.undesirable,
        reference=ReferenceStore.of_run(out.path.parent, labels, corpus),
        held_out=held_out,
    )
    metrics = train_policy(config, method, schedule, policy, processor, corpus, out)
    left_out = len(brought) - len(labels)
    counts = {"labels": float(len(rows)), "desirable": float(sum(row["label"] for row in rows))}
    return {
        **metrics,
        **counts,
        "held_out_labels": float(len(held_out)),
        "desirable_weight": weights.desirable,
        "undesirable_weight": weights.undesirable,
        **({"left_out_unreadable_audio": float(left_out)} if left_out else {}),
    }


class Weights(NamedTuple):
    """By which the losses of the two kinds of labels are multiplied."""

    desirable: float
    undesirable: float


def balanced_weights(rows: Sequence[Row], balance: float) -> Weights:
    """Weights with desirable x n_desirable = balance x undesirable x n_undesirable; the smaller one is 1.

    The n are sums of the labels' own weights (arXiv:2402.01306, section 4.2, equation 8).

    Raises:
        ValueError: one of the two kinds is missing.
    """
    desirable, undesirable = (
        math.fsum(row["weight"] for row in rows if row["label"] == label) for label in (True, False)
    )
    if not desirable or not undesirable:
        kind = "undesirable" if desirable else "desirable"
        raise ValueError(
            f"none of {len(rows)} labels is {kind}, but KTO needs both kinds, held out too: bring "
            "more labels, or move the thresholds of the labels stage"
        )
    ratio = balance * undesirable / desirable
    return Weights(max(1.0, ratio), max(1.0, 1 / ratio))
