"""Alarms by hand-made rows, and throughput against the clock."""

import time
from types import SimpleNamespace

import pytest
from trl import SFTConfig

from align.models.chat import assistant, user
from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.run_folder.artifacts import StageFolder, read_metrics
from align.training.collate import SFTCollator
from align.training.data_loading import Rows
from align.training.methods import Schedule
from align.training.monitoring import Alarms, rollout_alarms
from align.training.run import arguments, fit
from align.training.trainers import AudioSFTTrainer
from align.training.tuning import Tuning

FLAT = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.1, 0.9]  # median 1.0, median deviation 0.075 -> sigma 0.111


def feed(alarms, rows, beta=0.1):
    """Log the rows one after the other; returns them as they were left."""
    args = SimpleNamespace(beta=beta)
    for step, row in enumerate(rows, start=1):
        state = SimpleNamespace(global_step=step, is_world_process_zero=True)
        alarms.on_log(args, state, None, logs=row)
    return rows


def losses(values):
    return [{"loss": value} for value in values]


def test_a_spike_is_told_once_with_step_and_what_to_do(capsys):
    alarms = Alarms()
    rows = feed(alarms, losses([*FLAT, 1.8, 2.4, 50.0]))
    assert rows[8] == {"loss": 1.8}  # z = 0.8 / 0.111 = 7.2
    assert rows[9]["alarm/loss_spike"] == pytest.approx(1.4 / (1.4826 * 0.1))  # of FLAT and 1.8
    assert rows[10] == {"loss": 50.0}
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1
    assert told[0].startswith("ALARM step 10: loss 2.4 where it was 1 ")
    assert "lower learning_rate" in told[0]


@pytest.mark.parametrize(
    "values",
    [
        [*FLAT[:7], 100.0],  # too early to know what is usual
        [*FLAT, 0.001],  # falling
        [3.0 * 0.97**i for i in range(60)],  # learning
        [1.0] * 20 + [1.0005],  # a spread of zero
    ],
    ids=["early", "falling", "learning", "flat"],
)
def test_what_is_no_spike(values):
    alarms = Alarms()
    feed(alarms, losses(values))
    assert alarms.raised == {}


def speeds(values):
    return [{"loss": 1.0, "examples_per_s": value} for value in values]


def test_slowness_is_told_after_three_rows():
    alarms = Alarms()
    rows = feed(alarms, speeds([10.0] * 8 + [4.0, 4.0, 9.0, 4.0, 4.0, 4.0, 4.0]))
    marked = [i for i, row in enumerate(rows) if "alarm/slow" in row]
    assert marked == [13]
    assert rows[13]["alarm/slow"] == pytest.approx(0.4)
    assert "step 14: 4 examples/s where it was 10" in alarms.raised["slow"]
    gentle = Alarms()
    feed(gentle, speeds([10.0] * 8 + [5.5] * 20))
    assert gentle.raised == {}


def test_falling_chosen_answers_are_told_in_nats():
    alarms = Alarms()
    falling = [{"loss": 0.5, "rewards/chosen": -0.2 * i} for i in range(12)]
    rows = feed(alarms, falling)  # at beta 0.1, -2 nats a row; the median of 8 rows passes -10 at row 9
    marked = [i for i, row in enumerate(rows) if "alarm/chosen_falls" in row]
    assert marked == [9]
    assert rows[9]["alarm/chosen_falls"] == pytest.approx(-11.0)
    assert "lost 11 nats against the reference" in alarms.raised["chosen_falls"]
    rising = Alarms()
    feed(rising, [{"loss": 0.5, "rewards/chosen": 0.2 * i} for i in range(30)])
    stronger = Alarms()
    feed(stronger, [{"loss": 0.5, "rewards/chosen": -0.2 * i} for i in range(12)], beta=1.0)
    assert rising.raised == stronger.raised == {}


ROLLOUTS = {
    "frac_reward_zero_std": 0.2,
    "entropy": 2.0,
    "completions/clipped_ratio": 0.0,
    "completions/mean_length": 10.0,
    "reward": 1.0,
    "reward/kind/closed": 1.0,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{}] * 10, {}),
        ([{"frac_reward_zero_std": 0.8}] * 2 + [{}] + [{"frac_reward_zero_std": 0.8}] * 2, {}),
        ([{}] + [{"frac_reward_zero_std": 0.8}] * 3, {"zero_variance": 0.8}),
        ([{}, {"entropy": 0.5}], {}),
        ([{}, {"entropy": 0.3}], {"entropy": 0.3}),
        ([{"completions/clipped_ratio": 0.05}], {}),
        ([{"completions/clipped_ratio": 0.06}], {"truncated": 0.06}),
        ([{}, {"completions/mean_length": 14.0}], {}),
        ([{}, {"completions/mean_length": 16.0}], {"length": 16.0}),
        ([{}] * 3 + [{"reward": 1.2, "reward/kind/closed": 0.8}] * 3, {"kind_closed": 0.8}),
        ([{}] * 3 + [{"reward": 0.8, "reward/kind/closed": 0.8}] * 3, {}),
        ([{}] * 3 + [{"reward": 1.2, "reward/kind/closed": None}] * 3, {}),
        ([{}] * 2 + [{"reward": 1.2, "reward/kind/closed": 0.8}] * 2, {}),
    ],
)
def test_alarms_about_rollouts(changes, expected):
    rows = [{"step": 1, "loss": 0.0}, *({**ROLLOUTS, "step": i, **own} for i, own in enumerate(changes))]
    alarms = {name: (value, sentence) for name, value, sentence in rollout_alarms(rows)}
    assert {name: value for name, (value, _) in alarms.items()} == pytest.approx(expected)
    assert all(f"step {len(changes) - 1}: " in sentence for _, sentence in alarms.values())


def test_rows_about_something_else_are_left_alone():
    alarms = Alarms()
    assert feed(alarms, [{"eval_score": 1.0}] * 3) == [{"eval_score": 1.0}] * 3


def test_a_run_logs_its_throughput_and_its_alarms(tiny, tmp_path, capsys):
    out = StageFolder(tmp_path, "2_sft", "fingerprint")
    out.open()
    processor = qwen2_audio.load_processor(tiny.policy)
    options = arguments(
        out.path,
        Schedule(12, 2, 1e-9, 20, 0),
        tuning=Tuning(),
        trl={"train_sampling_strategy": "sequential", "logging_steps": 1},
    )
    chat = [user("Is the tone high or low?", 1), assistant("The tone is high.")]
    trainer = AudioSFTTrainer(
        model=qwen2_audio.load_model(tiny.policy),
        args=SFTConfig(**options),
        train_dataset=Rows([{"messages": chat, "audios": ["3.wav"], "draw": i} for i in range(24)]),
        data_collator=SFTCollator(processor, ClipFeatures(processor, tiny.audio)),
        processing_class=processor,
    )
    stock = trainer.compute_loss

    def spoiled(*args, **kwargs):
        time.sleep(0.05)
        return stock(*args, **kwargs) * (20.0 if trainer.state.global_step == 10 else 1.0)

    trainer.compute_loss = spoiled
    metrics = fit(trainer, out)
    rows = read_metrics(out.path / "metrics.jsonl")
    assert [row["step"] for row in rows if "alarm/loss_spike" in row] == [11]
    n_tokens = rows[1]["num_tokens"] - rows[0]["num_tokens"]
    for row in rows[1:]:
        assert 0 < row["examples_per_s"] < 2 / 0.05
        assert row["tokens_per_s"] / row["examples_per_s"] == pytest.approx(n_tokens / 2)
        # 0.9 s of 20 ms frames: 45 frames, 11 tokens of 80 ms
        assert row["audio_s_per_s"] / row["examples_per_s"] == pytest.approx(0.88)
    assert metrics["examples_per_s"] == rows[-1]["examples_per_s"]
    shown = capsys.readouterr().out
    assert "tokens/s" in shown
    assert "audio s/s" in shown
    assert shown.count("ALARM") == 1
