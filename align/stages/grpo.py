"""Reinforcement learning from rewards, on audio: GRPO (arXiv:2402.03300) and its kin through TRL.

A policy completes prompts, several times each; completions that are worth more than their group's mean become
likelier. Differs from the paper: rewards are facts, transcripts, choices or a judge's score, and the best
checkpoint on dev questions can be published. Reads: policy (also the reference), corpus. Writes: model/,
metrics.jsonl, reward.json (the identity of the reward, which the gate reads).
    align run recipes/demo_rl --only 3_grpo
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from align.generation.engine import Engine
from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.recipe.config.alignment import GRPOConfig
from align.run_folder.artifacts import REWARD, StageFolder, write_json
from align.stages.prompt_rows import prompt_rows
from align.stages.reward_of import reward_of
from align.stages.tuning import schedule_of, train_policy
from align.training import processes
from align.training.collate import task_row
from align.training.data_loading import Examples, Part
from align.training.grpo_trainer import Replay
from align.training.methods import group_relative_policy_optimisation
from align.training.preflight import check_clip_lengths, readable
from preference_data.audio.decode import SAMPLE_RATE
from preference_data.dataset.dataset import Dataset
from preference_data.schema import AudioClip, TaskExample


def run(config: GRPOConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Train on rewarded completions, choose a checkpoint; returns the last logged metrics and the choice."""
    corpus, policy = inputs[config.corpus], qwen2_audio.located(inputs[config.policy])
    processor = qwen2_audio.load_processor(policy)
    check_clip_lengths(Dataset(corpus).table(AudioClip), processor, max_bad_fraction=0.0)
    all_rows = list(prompt_rows(config.prompts, corpus, config.seed))
    if not all_rows:
        raise ValueError(f"{corpus} has no prompt of {config.prompts}: nothing to complete")
    rows = readable(all_rows, corpus, processor.feature_extractor.n_samples / SAMPLE_RATE, out.path)
    reward = reward_of(config.reward, corpus, out.final.parent, inputs)
    reward.check([row["record"] for row in rows])
    if processes.is_first():
        write_json(out.path / REWARD, reward.identity())
    schedule = schedule_of(config, config.steps)
    method = group_relative_policy_optimisation(
        rows,
        schedule,
        loss=config.loss,
        beta=config.beta,
        completions=config.answers,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        iterations=config.iterations,
        reward=reward,
        rollout_batch_size=config.rollout_batch_size,
        open_engine=_server_of(config, policy),
        replay=_replay(config, corpus),
    )
    metrics = train_policy(config, method, schedule, policy, processor, corpus, out)
    return {**metrics, "prompts": float(len(rows))}


def _replay(config: GRPOConfig, corpus: Path) -> Replay | None:
    """The corpus' pre-training targets, if the config wants them to be learned again."""
    if config.replay is None:
        return None
    row = partial(task_row, prompt_format=config.replay.prompt_format)
    parts = [Part(*part, row) for part in Dataset(corpus).parts(TaskExample)]
    return Replay(Examples(parts, config.steps * config.batch_size, config.seed), config.replay.weight)


def _server_of(config: GRPOConfig, policy: Path | str) -> Callable[[ClipFeatures], Engine] | None:
    """What starts a server that completes for the policy, if the config wants it."""
    if config.engine == "transformers":
        return None
    from align.generation.vllm.engine import VllmEngine
    from align.generation.vllm.server import ServerFailed, missing, training_problem

    training_gb = config.hardware.memory_gb if config.hardware else None
    if problem := missing() or training_problem(training_gb):
        raise ServerFailed(problem)
    return partial(VllmEngine, policy, training_gb=training_gb)
