"""Direct preference optimisation (arXiv:2305.18290) through TRL, on audio.

Differs from the paper: every pair's loss is weighted by the objective's axes that prefer it, and the best
checkpoint is published, by dev questions about known facts or by held-out pairs, because DPO over-optimises
long before its training loss shows it. Reads: policy (also the reference), pairs, corpus. Writes: model/,
metrics.jsonl, left_out.jsonl (pairs about clips that cannot be read).
    align run recipes/demo --only 6_dpo
"""

from __future__ import annotations

from pathlib import Path

from align.models.qwen2_audio import model as qwen2_audio
from align.recipe.config.alignment import DPOConfig
from align.run_folder.artifacts import StageFolder
from align.stages.tuning import schedule_of, steps_of, train_policy
from align.training.collate import Row, pair_rows
from align.training.data_loading import hold_out
from align.training.lengths import Lengths
from align.training.methods import direct_preference_optimisation
from align.training.preflight import NotReady, check_clip_lengths, describe_beyond, readable
from align.training.reference import ReferenceStore
from preference_data.audio.decode import SAMPLE_RATE
from preference_data.dataset.dataset import Dataset
from preference_data.schema import AudioClip


def check(config: DPOConfig, inputs: dict[str, Path]) -> None:
    """Check data that are there before the run.

    Raises:
        NotReady, BadRecord, BadExample, BadDataset: a pair or a clip cannot be trained on.
    """
    corpus, policy = inputs[config.corpus], qwen2_audio.located(inputs[config.policy])
    processor = qwen2_audio.load_processor(policy)
    check_clip_lengths(Dataset(corpus).table(AudioClip), processor, max_bad_fraction=0.0)
    rows, lengths = _rows(config, inputs[config.pairs]), Lengths(corpus, processor)
    if message := describe_beyond(rows, lengths, qwen2_audio.context_of(policy)):
        raise NotReady(message)


def run(config: DPOConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Train on weighted pairs, choose a checkpoint; returns the last logged metrics and the choice."""
    corpus, policy = inputs[config.corpus], qwen2_audio.located(inputs[config.policy])
    processor = qwen2_audio.load_processor(policy)
    check_clip_lengths(Dataset(corpus).table(AudioClip), processor, max_bad_fraction=0.0)
    weighted = _rows(config, inputs[config.pairs])
    pairs = readable(weighted, corpus, processor.feature_extractor.n_samples / SAMPLE_RATE, out.path)
    rows, held_out = hold_out(pairs, config.held_out, config.seed)
    schedule = schedule_of(config, steps_of(len(rows), config.epochs, config.batch_size))
    method = direct_preference_optimisation(
        rows,
        schedule,
        loss=config.loss,
        beta=config.beta,
        reference=ReferenceStore.of_run(out.path.parent, pairs, corpus),
        held_out=held_out,
    )
    metrics = train_policy(config, method, schedule, policy, processor, corpus, out)
    left_out = len(weighted) - len(pairs)
    return {
        **metrics,
        "pairs": float(len(rows)),
        "held_out_pairs": float(len(held_out)),
        **({"left_out_unreadable_audio": float(left_out)} if left_out else {}),
    }


def _rows(config: DPOConfig, pairs: Path) -> list[Row]:
    """The weighted pairs. The `sft` loss has no pairs to weigh: all count 1."""
    rows = pair_rows(pairs, config.objective.weights)
    return [{**row, "weight": 1.0} for row in rows] if config.loss == "sft" else rows
