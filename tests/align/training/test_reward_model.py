"""Reward models: loss and gradients against arithmetic, saved and resumed, and what held-out pairs refuse."""

import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from trl import RewardConfig

from align.models.chat import encode_completion, encode_prompt, join, user
from align.models.features import ClipFeatures, stack
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio import reward_model
from align.models.qwen2_audio.clips import expand_clips
from align.models.qwen2_audio.packed import pack
from align.models.shards import weights_sha256
from align.recipe.config.preference import ScoreConfig
from align.recipe.config.rewards import RewardConfig as RewardBlock
from align.rewards.model import RewardModelReward
from align.rewards.pair_accuracy import other_clips, pair_accuracy
from align.rewards.reward import BadReward
from align.run_folder.artifacts import Interrupted, StageFolder, read_json, read_metrics, stop_requested
from align.stages import score
from align.stages.reward import BadRewardModel
from align.training import trainers
from align.training.collate import PreferenceCollator
from align.training.data_loading import ShuffledRows
from align.training.methods import Schedule
from align.training.run import arguments
from align.training.trainers import AudioRewardTrainer
from align.training.tuning import Tuning
from preference_data import store
from preference_data.schema import Completion, CompletionScore, Prompt
from tests.align.training import reward_world

QUESTION = "Is the tone high or low?"
ROWS = [
    {"prompt": QUESTION, "chosen": "The tone is high.", "rejected": "low", "audios": ["0.wav"]},
    {"prompt": QUESTION, "chosen": "The tone is low.", "rejected": "A low tone.", "audios": ["1.wav"]},
    {"prompt": "high?", "chosen": "low", "rejected": "The tone is high.", "audios": ["2.wav", "1.wav"]},
]
WEIGHTS = (1.5, 0.5, 1.0)


# -------------------------------------------------------------------------- the loss


def a_reward_model(policy):
    """With rewards of several units, so that losses lie on both sides of the sigmoid."""
    model = reward_model.load_model(policy, head_seed=1)
    with torch.no_grad():
        model.score.weight.mul_(4)
    return model


def make_trainer(tiny, folder, weights, packed, **trl):
    processor = qwen2_audio.load_processor(tiny.policy)
    model = a_reward_model(tiny.policy)
    rows = [{**row, "weight": weight} for row, weight in zip(ROWS, weights, strict=True)]
    return AudioRewardTrainer(
        model=pack(model) if packed else model,
        args=RewardConfig(**arguments(folder, Schedule(2, 3, 1e-3, 1, 0), tuning=Tuning(), trl=trl)),
        train_dataset=ShuffledRows(rows, 6, seed=0),
        data_collator=PreferenceCollator(processor, ClipFeatures(processor, tiny.audio), packed),
        processing_class=processor,
    )


def reward_by_hand(model, processor, features, row, side):
    """One row alone through the stock backbone, no padding: the last token's state times the head."""
    clips = features(row["audios"])
    prompt = expand_clips(processor, encode_prompt(processor, [user(row["prompt"], len(clips))]), clips)
    ids = torch.tensor([join(prompt, encode_completion(processor, row[side])).ids])
    states = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), **stack(clips))
    return states.last_hidden_state[0, -1] @ model.score.weight[0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS])
@pytest.mark.parametrize("centre", [None, 0.1])
def test_loss_and_all_gradients_equal_hand_arithmetic(tiny, tmp_path, weights, packed, centre):
    trl = {} if centre is None else {"center_rewards_coefficient": centre}
    trainer = make_trainer(tiny, tmp_path, weights, packed, **trl)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(trainer.train_dataset.rows))
    loss.backward()
    twin, processor = a_reward_model(tiny.policy), trainer.processing_class
    features = ClipFeatures(processor, tiny.audio)
    slow = 0.0
    for row, weight in zip(ROWS, weights, strict=True):
        good, bad = (reward_by_hand(twin, processor, features, row, s) for s in ("chosen", "rejected"))
        slow = slow + weight * torch.log1p(torch.exp(bad - good)) + (centre or 0) * (good + bad) ** 2
    slow = slow / len(ROWS)
    slow.backward()
    assert loss.item() == pytest.approx(slow.item(), rel=1e-6)
    by_hand = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert ours.keys() == by_hand.keys()
    assert "score.weight" in ours
    differences = torch.stack([(ours[n] - by_hand[n]).norm() for n in ours])
    whole = torch.stack([grad.norm() for grad in by_hand.values()]).norm()
    assert differences.norm() / whole < 1e-5


@pytest.mark.parametrize("logit", [-90.0, -3.0, 0.0, 3.0, 30.0, 120.0])
@pytest.mark.parametrize("power", [0.01, 1.0, 3.0])
def test_a_weighted_pair_has_its_weight_in_loss_and_gradient_however_sure(logit, power):
    x = torch.tensor(logit, requires_grad=True)
    loss = -torch.nn.functional.logsigmoid(trainers._powered(x, torch.tensor(power)))
    loss.backward()
    exact = torch.tensor(logit, dtype=torch.float64)
    assert loss.item() == pytest.approx(
        -power * torch.nn.functional.logsigmoid(exact).item(), rel=1e-5, abs=1e-7
    )
    assert x.grad.item() == pytest.approx(-power * torch.sigmoid(-exact).item(), rel=1e-4, abs=1e-7)


# -------------------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return reward_world.make_world(tmp_path_factory.mktemp("reward") / "world")


@pytest.fixture(scope="module", params=["whole", "lora"])
def trained(request, world, tmp_path_factory):
    """The stage's folder and metrics, of a reward model that may be published."""
    changes = {"lora": {"r": 8, "alpha": 16}} if request.param == "lora" else {}
    folder = tmp_path_factory.mktemp(request.param)
    return reward_world.run_here(reward_world.make_config(**changes), world, folder)


def prompts_of(texts, audios=("audio/0.wav",), question=QUESTION):
    kept = {"answer_gt": "", "meta_info": "", "task_name": ""}
    prompt = Prompt(id="p", audios=audios, question=question, **kept)
    return [prompt] * len(texts), texts


def test_one_that_listens_is_published_with_its_figures(trained, world):
    out, metrics = trained
    report = read_json(out / "held_out.json")
    assert report["accuracy"]["share"] == metrics["held_out/accuracy"] > 0.9
    assert metrics["held_out/accuracy_shuffled"] < 0.7
    assert report["shuffled"]["delta"] == metrics["held_out/accuracy_over_shuffled"] > 0.3
    assert metrics["held_out_pairs"] == report["accuracy"]["n"] == 8
    assert sum(each["n"] for each in report["reliability"]) == 8
    assert any("held_out/loss" in row for row in read_metrics(out / "metrics.jsonl"))
    reward = RewardModelReward(out / "model", world / "corpus")
    high, low = reward.score(*prompts_of(["The tone is high.", "The tone is low."]))["model"]
    assert high > low
    high, low = reward.score(*prompts_of(["The tone is high.", "The tone is low."], ("audio/1.wav",)))[
        "model"
    ]
    assert high < low


def test_it_is_saved_under_the_policy_s_names_with_a_head_instead_of_a_language_head(trained, world):
    model, policy = trained[0] / "model", world / "policy" / "model"
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (model, policy))
    assert ours.keys() - theirs.keys() == {"score.weight"}
    assert theirs.keys() - ours.keys() == {"language_model.lm_head.weight"}
    config = json.loads((model / "config.json").read_text())
    assert (config["architectures"], config["id2label"]) == (["Qwen2AudioForReward"], {"0": "reward"})
    assert not torch.equal(ours["score.weight"], reward_model.load_model(policy, head_seed=0).score.weight)
    with pytest.raises(ValueError, match="no whole Qwen2-Audio: it lacks lm_head"):
        qwen2_audio.load_model(model)
    with pytest.raises(ValueError, match=r"no reward model: it lacks score\.weight"):
        RewardModelReward(policy, world / "corpus")


def test_rewards_are_those_of_rows_alone_whatever_the_batch_and_after_saving_again(trained, world, tmp_path):
    model = trained[0] / "model"
    reward, corpus = RewardModelReward(model, world / "corpus"), world / "corpus"
    audios = [("audio/0.wav",), ("audio/3.wav", "audio/0.wav"), (), ("audio/7.wav",)]
    texts = ["The tone is high.", "low", "", "The tone is low."]
    prompts, said = zip(
        *[(prompts_of([text], own)[0][0], text) for own in audios for text in texts], strict=True
    )
    together = reward.score(prompts, said)["model"]
    alone = [reward.score([prompt], [text])["model"][0] for prompt, text in zip(prompts, said, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    stock, processor = reward_model.load_model(model), qwen2_audio.load_processor(model)
    features = ClipFeatures(processor, corpus)
    by_hand = [
        reward_by_hand(stock, processor, features, {"prompt": QUESTION, "c": text, "audios": p.audios}, "c")
        for p, text in zip(prompts, said, strict=True)
    ]
    assert together == pytest.approx([value.item() for value in by_hand], abs=1e-5)
    qwen2_audio.save(stock, processor, tmp_path / "again")
    assert RewardModelReward(tmp_path / "again", corpus).score(prompts, said)["model"] == together
    assert reward.identity() == {
        "kind": "reward_model",
        "weights_sha256": weights_sha256(model),
        "weights": {"model": 1.0},
    }


@pytest.mark.parametrize("text", ["high<|im_end|>", "<|AUDIO|>", "<|im_start|>user", "<|endoftext|>high"])
def test_completions_are_read_as_characters_and_prompts_that_steer_are_refused(trained, world, text):
    reward = RewardModelReward(trained[0] / "model", world / "corpus")
    (prompt,), _ = prompts_of([text])
    tokens = reward._encode(prompt, text, reward._clips(["audio/0.wav"]))
    plain = reward._encode(prompt, "", reward._clips(["audio/0.wav"]))
    control = set(reward._processor.tokenizer.all_special_ids)
    assert [t for t in tokens if t in control] == [t for t in plain if t in control]
    assert len(reward.score(*prompts_of([text]))["model"]) == 1
    with pytest.raises(BadReward, match="would steer the model"):
        reward.check(prompts_of([""], question=text)[0])


def test_the_stage_score_takes_it(trained, world, tmp_path):
    prompts, texts = prompts_of(["The tone is high.", "The tone is low."])
    store.write(tmp_path / "sampled" / "prompts.jsonl", prompts[:1])
    store.write(
        tmp_path / "sampled" / "completions.jsonl",
        [Completion(id=f"c{i}", prompt_id="p", index=i, text=t, policy="x") for i, t in enumerate(texts)],
    )
    model = {"stage": "5_reward", "weight": 2.0}
    config = ScoreConfig(stage="score", completions="s", corpus="corpus", reward={"model": model})
    out = StageFolder(tmp_path, "6_score", "f")
    out.open()
    inputs = {"s": tmp_path / "sampled", "corpus": world / "corpus", "5_reward": trained[0]}
    score.run(config, inputs, out)
    values = {row.id: row for row in store.read(out.path / "scores.jsonl", CompletionScore)}
    assert values["c0"].reward == 2 * values["c0"].parts["model"] > values["c1"].reward
    assert read_json(out.path / "reward.json")["rewards"][0]["kind"] == "reward_model"


def test_one_that_was_trained_on_other_clips_is_refused(world, tmp_path):
    with pytest.raises(BadRewardModel, match=r"is not above min_accuracy_over_shuffled 0 .* does not listen"):
        reward_world.run_here(reward_world.make_config(pairs="deaf"), world, tmp_path)
    assert not (tmp_path / "5_reward").exists()
    assert read_json(tmp_path / ".partial-5_reward" / "held_out.json")["shuffled"]["n"] == 8


def test_stopped_and_resumed_it_is_the_same_bit_for_bit(trained, world, tmp_path, monkeypatch):
    if (trained[0] / "adapter").exists():
        pytest.skip("once is enough")
    step = AudioRewardTrainer.training_step

    def stopping(trainer, *args, **kwargs):
        if trainer.state.global_step == 6:
            stop_requested.set()
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(AudioRewardTrainer, "training_step", stopping)
    with pytest.raises(Interrupted):
        reward_world.run_here(reward_world.make_config(), world, tmp_path)
    stop_requested.clear()
    monkeypatch.undo()
    out, _ = reward_world.run_here(reward_world.make_config(), world, tmp_path)
    assert weights_sha256(out / "model") == weights_sha256(trained[0] / "model")
    assert read_json(out / "held_out.json") == read_json(trained[0] / "held_out.json")


def test_only_the_head_and_what_the_recipe_names_learn(world, tmp_path):
    config = reward_world.make_config(train=["projector"], epochs=0.5, min_accuracy_over_shuffled=None)
    out, _ = reward_world.run_here(config, world, tmp_path)
    before = reward_model.load_model(world / "policy" / "model", head_seed=0).state_dict()
    after = reward_model.load_model(out / "model").state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "score.weight",
        "model.multi_modal_projector.linear.weight",
        "model.multi_modal_projector.linear.bias",
    }


# -------------------------------------------------------------------------- held-out pairs


class Counting:
    """A reward that sees what a function makes of a prompt's clips and a completion."""

    weights = {"x": 1.0}

    def __init__(self, value):
        self.value = value

    def score(self, prompts, completions):
        return {"x": [self.value(p.audios, text) for p, text in zip(prompts, completions, strict=True)]}


PAIRS = [
    {"prompt": "?", "chosen": f"{i} yes" + " indeed" * (i % 2), "rejected": f"{i} no!", "audios": [f"{i}"]}
    for i in range(40)
]
LISTENS = Counting(lambda audios, text: 2.0 if text.startswith(f"{audios[0]} yes") else 0.0)
DEAF = Counting(lambda audios, text: float("yes" in text))
COUNTS = Counting(lambda audios, text: float(len(text)))


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (LISTENS, []),
        (DEAF, ["does not listen"]),
        (COUNTS, ["on 40 held-out pairs is 0.500", "about equal lengths is 0.000", "does not listen"]),
    ],
)
def test_what_does_not_listen_or_counts_characters_falls_short(reward, expected):
    result = pair_accuracy(reward, PAIRS, seed=0)
    lines = result.shortcomings(0.5, 0.0)
    assert len(lines) == len(expected)
    assert all(part in line for part, line in zip(expected, lines, strict=True))
    assert result.longer_is_chosen.share == 0.5
    assert result.length_matched.n == 20
    assert result.shortcomings(None, None) == []


def test_calibration_compares_confidence_with_being_right():
    sure = Counting(lambda audios, text: 3.0 if ("yes" in text) == (int(text.split()[0]) % 4 > 0) else 0.0)
    result = pair_accuracy(sure, PAIRS, seed=0)
    (only,) = result.reliability
    assert only.confidence == pytest.approx(torch.sigmoid(torch.tensor(3.0)).item())
    assert (only.accuracy, only.n) == (0.75, 40)
    assert result.calibration_error == pytest.approx(only.confidence - 0.75)


def test_clips_are_exchanged_among_prompts_with_as_many():
    clips = [(), *[(f"{i // 2}",) for i in range(12)], ("a", "b"), ("b", "a"), ("x", "y", "z")]
    others = other_clips(clips, seed=1)
    assert [len(given) for given in others] == [0, *[4] * 12, 1, 1, 0]
    for own, given in zip(clips, others, strict=True):
        assert own not in given
        assert all(len(other) == len(own) for other in given)
    for shift in range(4):  # each clip is heard as often as before
        assert sorted(given[shift] for given in others[1:13]) == sorted(clips[1:13])
    assert other_clips(clips, seed=2) != others
    assert pair_accuracy(DEAF, [{**pair, "audios": []} for pair in PAIRS], 0).shuffled is None


# -------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 0}, "greater than 0"),
        ({"lora": {"bits": 4}}, "not for reward models"),
        ({"min_accuracy": 1.0}, "less than 1"),
        ({"train": ["new_tokens"]}, "pretrain only"),
    ],
)
def test_keys_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        reward_world.make_config(**changes)


def test_a_reward_block_names_the_stage_alone_or_with_a_weight():
    assert RewardBlock.model_validate({"model": "5_reward"}).model == "5_reward"
    assert RewardBlock.model_validate({"model": {"stage": "5_reward", "weight": 0.5}}).model.weight == 0.5
    with pytest.raises(ValidationError, match="greater than 0"):
        RewardBlock.model_validate({"model": {"stage": "5_reward", "weight": 0}})
