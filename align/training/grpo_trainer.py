"""TRL's GRPOTrainer on audio: our engine draws completions, our rewards score them, the backbone is packed.

Losses, advantages, KL, clipping and metrics stay TRL's (arXiv:2402.03300, equation 3).

The policy itself draws, or an engine in a process of its own that gets the policy's weights before each
batch of completions. Old log-probs are the policy's own in either case, so with `iterations` 1 all ratios are
1, and what the engine computes differently shows in nothing but which completions are drawn. In float32 that
is nothing to correct: vLLM's log-probs are within 1e-4 of ours, so that a completion of 100 tokens is at most
1 % likelier to come from it. Logged are `sampling/sampling_logp_difference/mean` and `/max`, TRL's names for
|log p of the engine - ours| of the drawn tokens (at temperature 1: an engine's are those before temperature).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from align.generation.engine import Completion, Decoding, Engine, Request
from align.generation.transformers_engine import LiveEngine
from align.models.answer_head import answers_only
from align.models.features import ClipFeatures
from align.models.qwen2_audio.packed import is_packed, pack_for_inference
from align.rewards.reward import Parts, Reward
from align.training.checkpoints import live_policy
from align.training.clip_ids import ClipIds
from align.training.collate import Row, SFTCollator
from align.training.data_loading import ABOUT, Examples, ReplacingCollator
from align.training.library_fixes import FixedGRPOTrainer
from align.training.monitoring import LogpDifference, RewardByKind, TaskLosses
from align.training.processes import eval_mode
from align.training.trainers import AudioTrainer


class Replay(NamedTuple):
    """Targets whose next-token loss, times `weight`, is added to each step's (arXiv:2203.02155, equation 2).

    A step of B prompts has B of them, by their number: those of step s are s B to s B + B - 1.
    """

    examples: Examples
    weight: float


class AudioGRPOTrainer(AudioTrainer, FixedGRPOTrainer):
    """GRPO over `collate.prompt_row`s in the order of their `draw`, which decides what is drawn.

    Completion i of a prompt is a function of the weights, the seed, the prompt's place in the training, and
    i: not of torch's random state, of the process that completes it, or of what is completed beside it.
    """

    def __init__(
        self,
        *args: Any,
        data_collator: SFTCollator,
        reward: Reward,
        rollout_batch_size: int = 128,
        open_engine: Callable[[ClipFeatures], Engine] | None = None,
        replay: Replay | None = None,
        **kwargs: Any,
    ) -> None:
        """TRL's arguments; `rollout_batch_size` prompts are completed at a time.

        `open_engine` starts an engine that completes in the policy's place, when the first prompts come;
        `replay` is learned beside the reward.
        """
        self._replay, self._target_losses = replay, TaskLosses()
        self.reward, self._rollout_batch_size = reward, rollout_batch_size
        self._open_engine = open_engine
        self._engine: Engine | None = None
        super().__init__(
            *args,
            reward_funcs=[_part(name) for name in reward.weights],
            rollout_func=lambda prompts, trainer: self._roll_out(prompts),
            **kwargs,
        )
        self.data_collator, self._collate = _as_prompts, data_collator
        self.pack_reference()
        inner = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        if not is_packed(inner):  # only the batches of the loss are stock ones
            pack_for_inference(inner)
        self._live = LiveEngine(
            inner, self.processing_class, data_collator.features, data_collator.tower_outputs
        )
        prompts: Any = self.train_dataset
        paths = sorted({path for row in prompts.rows for path in row["audios"]})
        self.clip_ids = ClipIds(data_collator, paths, inner.get_input_embeddings().num_embeddings)
        self._by_kind, self._difference = RewardByKind(), LogpDifference()

    def with_clips(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """`model`, but of rows whose ids name their clips."""

        def forward(*, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **more: Any) -> Any:
            batch = {**self.clip_ids.batch(input_ids, attention_mask), "labels": labels}
            if torch.is_grad_enabled():
                self._meter.add(batch, self.num_generations)
            return answers_only(model)(**batch, **more)

        return forward

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end, from a checkpoint or from the start; an engine that was started ends with it."""
        try:
            super().train_from(checkpoint)
        finally:
            if self._engine is not None:
                self._engine.close()

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, and that of what is replayed.

        Notes how far an engine's log-probs are from those of the policy that it stands for.
        """
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        drawn = inputs.get("sampling_per_token_logps")
        if drawn is not None and self.state.global_step % self.num_iterations == 0:  # the weights are those
            self._difference.add((self.policy_logps - drawn)[inputs["completion_mask"] == 1])
        if self._replay is not None and self.model.training:
            loss = loss + self._replay.weight * self._replay_loss(model, self._replay.examples)
        return loss

    def _replay_loss(self, model: Any, examples: Examples) -> Tensor:
        """This micro-batch's part of the mean over a step's targets of their tokens' mean loss."""
        n = self.args.per_device_train_batch_size // self.num_generations
        parts, world = self.current_gradient_accumulation_steps, self.accelerator.num_processes
        place = (self.state.global_step * parts + self._step % parts) * world + self.accelerator.process_index
        rows = [examples[number] for number in range(place * n, (place + 1) * n)]
        batch = send_to_device(ReplacingCollator(self._collate, examples)(rows), self.accelerator.device)
        about = batch.pop(ABOUT)
        self._meter.add(batch)
        with self.accelerator.autocast():
            outputs = answers_only(model)(**batch, use_cache=False, fused_lm_head=True)
        mask = batch["labels"][:, 1:] != -100
        log_probs = outputs.log_probs * mask
        self._target_losses.add(about, log_probs, mask)
        self._check_finite(log_probs.detach().sum()[None])
        return -(log_probs.sum(-1) / mask.sum(-1)).sum() / (n * parts)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the reward by kind of prompt, an engine's differences, and replayed tasks' losses."""
        if "loss" in logs:
            logs = {**logs, **self._by_kind.take(), **self._difference.take(), **self._target_losses.take()}
        super().log(logs, *args, **kwargs)

    # ---------------------------------------------------------------- completions and their rewards

    def _roll_out(self, prompts: Sequence[Row]) -> dict[str, Any]:
        """Completions of rows as TRL repeats them, G times each in a row, with the parts of their rewards."""
        g = self.num_generations
        rows = prompts[::g]
        groups = self._complete(rows)
        records = [row["record"] for row in rows for _ in range(g)]
        texts = [completion.text for group in groups for completion in group]
        parts = self.reward.score(records, texts)
        self._by_kind.add([row["kind"] for row in rows for _ in range(g)], self._total(parts))
        ids = [self._prompt_ids(row["request"]) for row in rows]
        completions = [completion for group in groups for completion in group]
        return {
            "prompt_ids": [prompt for prompt in ids for _ in range(g)],
            "completion_ids": [completion.token_ids for completion in completions],
            "logprobs": [completion.logps for completion in completions]
            if self._engine and self.temperature == 1
            else None,
            "parts": [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)],
        }

    def _complete(self, rows: Sequence[Row]) -> list[list[Completion]]:
        """G completions of each row's prompt by the policy as it is now."""
        # A drawn <|AUDIO|> would have no clip
        decoding = Decoding(
            self.max_completion_length,
            self.temperature,
            completions=self.num_generations,
            suppress=(self.clip_ids.audio_id,),
        )
        groups: dict[int, list[Completion]] = {}
        engine = self._current_engine()
        with eval_mode(self.model, self.accelerator.device), self.accelerator.autocast():
            for start in range(0, len(rows), self._rollout_batch_size):
                part = rows[start : start + self._rollout_batch_size]
                numbered = {row["draw"]: row["request"] for row in part}
                groups |= dict(engine.complete(numbered, decoding, self.args.seed))
        return [groups[row["draw"]] for row in rows]

    def _current_engine(self) -> Engine | LiveEngine:
        """What completes as the policy does now."""
        if self._open_engine is None:
            return self._live
        if self._engine is None:
            self._engine = self._open_engine(self._live.clips)
        with live_policy(self.accelerator.unwrap_model(self.model), Path(self.args.output_dir)) as weights:
            self._engine.load(weights)
        return self._engine

    def _prompt_ids(self, request: Request) -> list[int]:
        clips = self._live.clips(request.audios, self._live.tower_outputs)
        return self.clip_ids.name(self._live.encode(request, clips).ids, request.audios)

    def _total(self, parts: Parts) -> list[float]:
        """Rewards as TRL adds them up: a part that says nothing counts 0."""
        weighed = [[(v or 0.0) * self.reward.weights[name] for v in values] for name, values in parts.items()]
        return [sum(values) for values in zip(*weighed, strict=True)]


class BestOfTrainer(AudioGRPOTrainer):
    """The control: raise the likelihood of the best completion of each group (RAFT, arXiv:2304.06767).

    The first of equals is it; a group whose completions are all worth the same teaches nothing.
    """

    def group_advantages(self, advantages: Tensor) -> Tensor:
        """G for the best completion, so that the mean over a group is 1; else 0."""
        best = torch.zeros_like(advantages).scatter(
            1, advantages.argmax(1, keepdim=True), advantages.shape[1]
        )
        return best * (advantages.amax(1, keepdim=True) > advantages.amin(1, keepdim=True))


def _as_prompts(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """Rows as TRL's GRPO wants them: it hands a `prompt` to our rollouts and reads nothing of it."""
    return [{"prompt": row} for row in rows]


def _part(name: str) -> Callable[..., list[float | None]]:
    """The reward function of TRL's that gives a part, under its name."""

    def values(*, parts: Sequence[Mapping[str, float | None]], **_: Any) -> list[float | None]:
        return [own[name] for own in parts]

    values.__name__ = name
    return values
