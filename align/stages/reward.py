"""A reward model of preference pairs (arXiv:2203.02155, eq. 1), which hears the clips that they are about.

A policy with a scalar head learns by TRL's RewardTrainer to give the chosen completion more than the
rejected one. Differs from the paper: every pair's loss is weighted by the objective's axes that prefer it,
and what does not listen, or only counts characters, is refused by held-out pairs before anything is trained
on it. Reads: policy, pairs, corpus. Writes: model/, metrics.jsonl, held_out.json (accuracy, calibration).
    align run recipes/demo_rl --only 6_reward
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio import reward_model
from align.recipe.config.alignment import RewardModelConfig
from align.rewards.model import RewardModelReward
from align.rewards.pair_accuracy import pair_accuracy
from align.run_folder.artifacts import StageFolder, plain_values, write_json
from align.stages.tuning import schedule_of, steps_of, tuning_of
from align.training import processes
from align.training import run as training
from align.training.collate import pair_rows
from align.training.data_loading import hold_out
from align.training.methods import reward_modelling
from align.training.preflight import check_clip_lengths, readable
from preference_data.audio.decode import SAMPLE_RATE
from preference_data.dataset.dataset import Dataset
from preference_data.schema import AudioClip

_REPORT = "held_out.json"


class BadRewardModel(RuntimeError):
    """Held-out pairs show that a reward model does not do what it is for."""


def run(config: RewardModelConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Train on weighted pairs; returns the last logged metrics and those of held-out pairs.

    Raises:
        BadRewardModel: it is not above the config's minima; the stage is not finished.
    """
    corpus, policy = inputs[config.corpus], qwen2_audio.located(inputs[config.policy])
    processor = qwen2_audio.load_processor(policy)
    check_clip_lengths(Dataset(corpus).table(AudioClip), processor, max_bad_fraction=0.0)
    weighted = pair_rows(inputs[config.pairs], config.objective.weights)
    pairs = readable(weighted, corpus, processor.feature_extractor.n_samples / SAMPLE_RATE, out.path)
    rows, held_out = hold_out(pairs, config.held_out, config.seed)
    schedule = schedule_of(config, steps_of(len(rows), config.epochs, config.batch_size))
    method = reward_modelling(rows, schedule, held_out)
    metrics = training.train(
        method,
        method.load(policy),
        processor,
        corpus,
        out,
        schedule=schedule,
        tuning=replace(tuning_of(config), new_modules=(reward_model.HEAD,)),
        trl=config.trl,
        base=policy,
    )
    if processes.is_first():
        reward = RewardModelReward(out.path / "model", corpus, run=out.path.parent)
        result = pair_accuracy(reward, held_out, config.seed)
        write_json(out.path / _REPORT, plain_values(result._asdict()))
        metrics |= result.metrics
        minima = config.min_accuracy, config.min_accuracy_over_shuffled
        if shortcomings := result.shortcomings(*minima):
            raise BadRewardModel(
                f"this reward model is refused, and nothing is published: {'; '.join(shortcomings)}. See "
                f"{out.path / _REPORT}; bring more pairs or train longer, or lower that key"
            )
    return {**metrics, "pairs": float(len(rows)), "held_out_pairs": float(len(held_out))}
