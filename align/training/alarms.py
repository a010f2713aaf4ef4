"""Signs that a run goes wrong, told once each, with the step and what to do. Nothing is stopped.

A loss that jumps far out of its recent spread; training that becomes much slower than it was; and, in DPO,
answers that lose probability though people chose them, while the rejected ones lose more: the margin grows
and the policy drifts to words nobody wrote (arXiv:2402.13228). What must stop a run, a loss that
is no number, is in `checkpoints`.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_WINDOW = 50
"""Logged rows that count as recent."""
_ENOUGH = 8
"""Rows before anything is said."""
_SPIKE = 8.0
"""Robust z-score: deviations of 1.4826 x the median absolute one. At 8, a heavy tail says nothing."""
_SLOW = 0.5
"""Of the recent median speed, three rows in a row."""
_SLOW_ROWS = 3
_FALL_NATS = 10.0
"""That a chosen answer may lose on average against the reference: it is then 20,000 times less likely."""


class Alarms(TrainerCallback):
    """Adds `alarm/...` to the logged row that raises one, and keeps the sentence in `said`.

    Rows are read before others log them, so it must be the first callback that reads them. A resumed run
    starts to look anew.
    """

    def __init__(self) -> None:
        self.said: dict[str, str] = {}
        """Alarm -> what was told, in the order it was."""
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._speeds: deque[float] = deque(maxlen=_WINDOW)
        self._chosen: deque[float] = deque(maxlen=_ENOUGH)
        self._slow = 0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at one row of metrics."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        step = state.global_step
        found = {"loss_spike": self._spike(step, logs["loss"])}
        if "examples_per_s" in logs:
            found["slow"] = self._slower(step, logs["examples_per_s"])
        if "rewards/chosen" in logs:
            found["chosen_falls"] = self._falls(step, logs["rewards/chosen"] / args.beta)
        for name, alarm in found.items():
            if alarm is not None and name not in self.said:
                value, sentence = alarm
                self.said[name] = sentence
                logs[f"alarm/{name}"] = value
                if state.is_world_process_zero:
                    print(f"ALARM {sentence}", flush=True)

    def _spike(self, step: int, loss: float) -> tuple[float, str] | None:
        """A loss far above the recent ones; falling is no alarm."""
        recent = list(self._losses)
        self._losses.append(loss)
        if len(recent) < _ENOUGH:
            return None
        middle = median(recent)
        spread = 1.4826 * median(abs(one - middle) for one in recent)
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
        usual = median(self._speeds) if len(self._speeds) >= _ENOUGH else None
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
        """Chosen answers much less likely than by the reference; `gain` in nats: reward over beta."""
        self._chosen.append(gain)
        now = median(self._chosen)
        if len(self._chosen) < _ENOUGH or now > -_FALL_NATS:
            return None
        return now, (
            f"step {step}: the chosen answers lost {-now:.3g} nats against the reference; the margin grows "
            "only because the rejected ones lose more. Raise beta, lower learning_rate, or train for fewer "
            "epochs"
        )
