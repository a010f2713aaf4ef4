"""Metrics of a training beside TRL's: loss by task, throughput, useful work, and alarms.

Only too many unreadable clips stop a run here; a loss that is not a number does in `trainers`.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import (
    Qwen2AudioProcessor,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from align.models.answer_head import is_completion
from align.models.packing import PackedBatch
from align.models.qwen2_audio.flops import Cost, gemm_peak
from preference_data.audio.decode import SAMPLE_RATE

log = logging.getLogger(__name__)
_MIN_EXAMPLES = 1000
"""Until so many examples were trained on, as many bad clips are let through as of this number would be."""
_LISTED = 5
"""Unreadable clips that a message names."""
_FRAMES_PER_TOKEN = 4
"""Convolution by 2, then pooling by 2."""
_WINDOW = 50
"""Logged rows that count as recent."""
_MIN_ROWS = 8
"""Rows before the first alarm."""
_SPIKE = 8.0
"""Robust z-score: deviations of 1.4826 x the median absolute one. At 8, a heavy tail raises no alarm."""
_SLOW = 0.5
"""Share of the recent median speed, for `_SLOW_ROWS` rows in a row."""
_SLOW_ROWS = 3
_LATEST = 3
"""Rows that an alarm about rollouts needs."""
_ZERO_VARIANCE, _TRUNCATED, _LONGER, _ENTROPY, _KIND = 0.7, 0.05, 1.5, 0.2, 0.1
"""Share of groups of equal rewards; share of truncated completions; their length and their entropy, over
those at the start; share of its reward that a kind of prompt loses while the whole gains."""
_FALL_NATS = 10.0
"""A chosen completion may lose so much on average: it is then 20,000 times less likely than before."""


class TooManyBadClips(ValueError):
    """More clips cannot be read than the recipe allows."""


class TaskLosses:
    """Loss by task and by source, and how many clips had to be replaced, between two rows of the log."""

    def __init__(self, max_bad_fraction: float = 0.01) -> None:
        self.max_bad_fraction = max_bad_fraction
        self._examples = self._bad = 0
        self._batches: list[tuple[Mapping[str, Sequence[str]], Tensor, Tensor]] = []

    def add(self, about: Mapping[str, Sequence[str]], log_probs: Tensor, mask: Tensor) -> None:
        """Add a batch: `log_probs` (B, T) of its targets, 0 and `mask` 0 elsewhere. Waits for no device."""
        self._batches.append((about, log_probs.detach().float().sum(-1), mask.sum(-1)))

    def take(self) -> dict[str, float]:
        """Mean loss per token since the last call, by task and, with several sources, by source.

        All processes must call it at once; their sums are added up.

        Raises:
            TooManyBadClips: on all of them.
        """
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        replaced: list[str] = []
        n = 0
        for about, log_probs, tokens in self._batches:
            both = torch.stack([-log_probs.double(), tokens.double()], dim=-1).cpu()
            for task, source, row in zip(about["tasks"], about["sources"], both, strict=True):
                sums[f"loss/task/{task}"] += row
                if source:
                    sums[f"loss/source/{source}"] += row
            replaced += about["replaced"]
            n += len(about["tasks"])
        self._batches.clear()
        mine = {"sums": {name: pair.tolist() for name, pair in sums.items()}, "replaced": replaced, "n": n}
        return self._over_all(gather_object([mine]))

    def _over_all(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        replaced = [text for part in parts for text in part["replaced"]]
        self._examples += sum(part["n"] for part in parts)
        self._bad += len(replaced)
        if replaced:
            log.warning("%d clips could not be read and were replaced: %s", len(replaced), replaced[:_LISTED])
        if self._bad > self.max_bad_fraction * max(self._examples, _MIN_EXAMPLES):
            raise TooManyBadClips(
                f"{self._bad} clips of {self._examples} examples could not be read (allowed max_bad_fraction="
                f"{self.max_bad_fraction:.1%} since this process began), the last: {replaced[:_LISTED]}; "
                "mend the corpus, or raise max_bad_fraction"
            )
        losses = {}
        for name in sorted({name for part in parts for name in part["sums"]}):
            pairs = [part["sums"][name] for part in parts if name in part["sums"]]
            losses[name] = sum(loss for loss, _ in pairs) / max(1.0, sum(tokens for _, tokens in pairs))
        return {**losses, "replaced_clips": float(self._bad)} if self._bad else losses


class RewardByKind:
    """Mean reward by kind of prompt between two rows of the log."""

    def __init__(self) -> None:
        self._rewards: dict[str, list[float]] = defaultdict(list)

    def add(self, kinds: Sequence[str], rewards: Sequence[float]) -> None:
        """Add completions' rewards."""
        for kind, reward in zip(kinds, rewards, strict=True):
            self._rewards[kind].append(reward)

    def take(self) -> dict[str, float]:
        """The means since the last call; all processes must call it at once. A lone kind is the whole."""
        sums = {kind: (sum(rewards), len(rewards)) for kind, rewards in self._rewards.items()}
        self._rewards.clear()
        parts = gather_object([sums])
        kinds = sorted({kind for part in parts for kind in part})
        totals = {
            kind: [sum(n) for n in zip(*(p[kind] for p in parts if kind in p), strict=True)] for kind in kinds
        }
        means = {f"reward/kind/{kind}": total / n for kind, (total, n) in totals.items()}
        return means if len(means) > 1 else {}


class LogpDifference:
    """How far the log-probs of an engine that draws for the policy are from the policy's own."""

    def __init__(self) -> None:
        self._sum, self._tokens, self._max = 0.0, 0, 0.0

    def add(self, differences: Tensor) -> None:
        """Add those of drawn tokens (N,)."""
        sizes = differences.abs()
        self._sum, self._tokens = self._sum + sizes.sum().item(), self._tokens + len(sizes)
        self._max = max(self._max, sizes.max().item())

    def take(self) -> dict[str, float]:
        """Mean and maximum since the last call, under TRL's names; all processes must call it at once."""
        sums, tokens, largest = zip(*gather_object([(self._sum, self._tokens, self._max)]), strict=True)
        self._sum, self._tokens, self._max = 0.0, 0, 0.0
        if not sum(tokens):
            return {}
        name = "sampling/sampling_logp_difference"
        return {f"{name}/mean": sum(sums) / sum(tokens), f"{name}/max": max(largest)}


class StepMeter:
    """Throughput and useful work between two rows of the log.

    `examples_per_s`, `tokens_per_s` and `audio_s_per_s` are over all processes; tokens are those of the rows,
    padding aside, and audio is what they hear: a clip of both completions of a pair counts twice. `flops` are
    this device's useful FLOPs (see `qwen2_audio.flops`) per optimizer step, of packed batches; `mfu`, on a
    GPU, is them per second of wall time over the rate of a large matrix product measured at the start. The
    first row of a process counts its warming up.
    """

    def __init__(self, processor: Qwen2AudioProcessor, cost: Cost, dtype: torch.dtype) -> None:
        self._audio_token = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
        self._s_per_token = _FRAMES_PER_TOKEN * processor.feature_extractor.hop_length / SAMPLE_RATE
        self._cost, self._dtype = cost, dtype
        self._peak: float | None = None
        self._counts: Tensor | None = None
        """Examples, tokens, audio tokens and FLOPs, on the device, so that counting never waits for it."""
        self._since = (0, 0.0)

    def begin(self, step: int, device: torch.device) -> None:
        """Start the clock before a micro-batch of the optimizer step after `step`, if it stands still."""
        if self._counts is None:
            if self._peak is None and device.type == "cuda":
                self._peak = gemm_peak(device, self._dtype)
            self._since = (step, time.monotonic())
            self._counts = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, batch: Mapping[str, Any], completions: int = 1) -> None:
        """Count a micro-batch after `begin`, of so many rows for each example."""
        assert self._counts is not None
        ids, mask = batch["input_ids"], batch["attention_mask"]
        of_examples = next((batch[name] for name in ("pair_weight", "label") if name in batch), None)
        n = len(ids) // completions if of_examples is None else len(of_examples)
        examples = ids.new_tensor(n)
        flops = torch.zeros((), dtype=torch.float64, device=ids.device)
        if isinstance(batch.get("packed"), PackedBatch):
            scored = is_completion(batch)[:, 1:].sum().double()
            flops = self._cost.of(batch["packed"]) + self._cost.scored * scored
        counts = (examples, mask.sum(), (ids == self._audio_token).sum(), flops)
        self._counts += torch.stack([count.double() for count in counts])

    def take(self, step: int, accelerator: Accelerator) -> dict[str, float]:
        """The figures since the last call; all processes must call it at once."""
        if self._counts is None:
            return {}
        seconds = time.monotonic() - self._since[1]
        flops = self._counts[3].item()
        examples, tokens, audio, _ = (accelerator.reduce(self._counts, reduction="sum") / seconds).tolist()
        figures = {
            "examples_per_s": examples,
            "tokens_per_s": tokens,
            "audio_s_per_s": audio * self._s_per_token,
        }
        if flops and step > self._since[0]:
            figures["flops"] = flops / (step - self._since[0])
            if self._peak is not None:
                figures["mfu"] = flops / seconds / self._peak
        self._counts = None
        return figures


class Alarms(TrainerCallback):
    """Adds `alarm/...` to the logged row that raises one, prints it once each, and keeps it in `raised`.

    A loss that jumps far out of its recent spread; training that becomes much slower; in DPO, chosen
    completions that lose probability while the rejected ones lose more: the margin grows and the policy
    drifts to words nobody wrote (arXiv:2402.13228); and those of `rollout_alarms`.

    It must be the first callback that reads the rows, because it adds to them. A resumed run starts anew.
    """

    def __init__(self) -> None:
        self.raised: dict[str, str] = {}
        """Alarm -> its sentence, in the order of the alarms."""
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._speeds: deque[float] = deque(maxlen=_WINDOW)
        self._chosen: deque[float] = deque(maxlen=_MIN_ROWS)
        self._slow = 0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check one row of metrics."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        step = state.global_step
        alarms = {"loss_spike": self._spike(step, logs["loss"])}
        if "examples_per_s" in logs:
            alarms["slow"] = self._slower(step, logs["examples_per_s"])
        if "rewards/chosen" in logs:
            alarms["chosen_falls"] = self._falls(step, logs["rewards/chosen"] / args.beta)
        if "frac_reward_zero_std" in logs:
            alarms |= {name: (value, text) for name, value, text in rollout_alarms(state.log_history)}
        for name, alarm in alarms.items():
            if alarm is not None and name not in self.raised:
                value, sentence = alarm
                self.raised[name] = sentence
                logs[f"alarm/{name}"] = value
                if state.is_world_process_zero:
                    print(f"ALARM {sentence}", flush=True)

    def _spike(self, step: int, loss: float) -> tuple[float, str] | None:
        """A loss far above the recent ones; a falling loss is not an alarm."""
        recent = list(self._losses)
        self._losses.append(loss)
        if len(recent) < _MIN_ROWS:
            return None
        middle = median(recent)
        spread = 1.4826 * median(abs(value - middle) for value in recent)
        score = (loss - middle) / max(spread, 1e-3 * abs(middle), 1e-8)
        if score < _SPIKE:
            return None
        return score, (
            f"step {step}: loss {loss:.4g} where it was {middle:.4g} (robust z-score {score:.0f}). If it "
            "does not come back in a few steps: stop, lower learning_rate or max_grad_norm, and look at that "
            "step's data"
        )

    def _slower(self, step: int, speed: float) -> tuple[float, str] | None:
        """Much slower than it was, for several rows."""
        usual = median(self._speeds) if len(self._speeds) >= _MIN_ROWS else None
        self._slow = self._slow + 1 if usual is not None and speed < _SLOW * usual else 0
        if not self._slow:
            self._speeds.append(speed)  # a slow stretch must not become what is usual
        if usual is None or self._slow < _SLOW_ROWS:
            return None
        return speed / usual, (
            f"step {step}: {speed:.3g} examples/s where it was {usual:.3g}. Look for another job on the "
            "machine, a throttled GPU (nvidia-smi), slow storage, or clips that became longer"
        )

    def _falls(self, step: int, gain: float) -> tuple[float, str] | None:
        """Chosen completions much less likely than by the reference; `gain` in nats: reward over beta."""
        self._chosen.append(gain)
        now = median(self._chosen)
        if len(self._chosen) < _MIN_ROWS or now > -_FALL_NATS:
            return None
        return now, (
            f"step {step}: the chosen completions lost {-now:.3g} nats against the reference; the margin "
            "grows only because the rejected ones lose more. Raise beta, lower learning_rate, or train fewer "
            "epochs"
        )


def rollout_alarms(history: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float, str]]:
    """Name, value and sentence of each alarm of a training on rewards.

    By all rows that it has logged, those before a resume too.
    """
    rows = [row for row in history if "frac_reward_zero_std" in row]
    first, last = rows[0], rows[-1]
    step = f"step {last['step']}"
    zero = [row["frac_reward_zero_std"] for row in rows[-_LATEST:]]
    if len(zero) == _LATEST and min(zero) > _ZERO_VARIANCE:
        yield (
            "zero_variance",
            zero[-1],
            f"{step}: in {zero[-1]:.0%} of the groups all completions are worth the same, which "
            "teaches nothing. Take other prompts (these are too easy or too hard), or more answers",
        )
    if (entropy := last["entropy"]) < _ENTROPY * first["entropy"]:
        yield (
            "entropy",
            entropy,
            f"{step}: entropy fell from {first['entropy']:.3g} to {entropy:.3g} nats a token: the "
            "policy explores no more. Lower learning_rate, raise beta, or set trl: {entropy_coef: ...}",
        )
    if (cut := last["completions/clipped_ratio"]) > _TRUNCATED:
        yield (
            "truncated",
            cut,
            f"{step}: {cut:.0%} of the completions are cut at max_new_tokens. Raise it, or reward brevity "
            "(reward: {length: ...})",
        )
    length, start = last["completions/mean_length"], first["completions/mean_length"]
    if length > _LONGER * start:
        yield (
            "length",
            length,
            f"{step}: completions have {length:.3g} tokens where they had {start:.3g}: is length "
            "rewarded? Take reward: {length: ...}, or loss: dr_grpo",
        )
    kinds = sorted({key for row in rows for key in row if key.startswith("reward/kind/")})
    whole = _ends(rows, "reward")
    for key, own in ((key, _ends(rows, key)) for key in kinds):
        if whole and own and whole[1] > whole[0] and own[1] < own[0] - _KIND * abs(own[0]):
            kind = key.removeprefix("reward/kind/")
            yield (
                f"kind_{kind}",
                own[1],
                f"{step}: the reward of {kind} prompts fell from {own[0]:.3g} to {own[1]:.3g} while the "
                f"whole rose from {whole[0]:.3g} to {whole[1]:.3g}. Take more of these prompts into the mix",
            )


def _ends(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float] | None:
    """The mean of a metric over the first rows and over the last; None as long as they are the same rows."""
    ends = [
        [row[key] for row in end if row.get(key) is not None] for end in (rows[:_LATEST], rows[-_LATEST:])
    ]
    if len(rows) < 2 * _LATEST or not all(ends):
        return None
    return fmean(ends[0]), fmean(ends[1])
