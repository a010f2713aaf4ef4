"""GRPO's loss and all gradients against arithmetic done by hand, row by row, unpadded; and its rollouts."""

import itertools
import re
from functools import partial
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from trl import GRPOConfig

from align.generation.engine import Decoding, request_of
from align.generation.transformers_engine import TransformersEngine
from align.models.chat import encode_prompt, expand_audio
from align.models.features import ClipFeatures, stack
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.clips import n_audio_tokens
from align.models.qwen2_audio.model import hub_name
from align.models.qwen2_audio.packed import pack
from align.rewards.rules import TranscriptReward
from align.training.checkpoints import live_policy
from align.training.collate import SFTCollator, prompt_row, task_row
from align.training.data_loading import Examples, Part
from align.training.grpo_trainer import Replay
from align.training.methods import Schedule, group_relative_policy_optimisation
from align.training.run import arguments
from align.training.tuning import LoRA, Tuning
from preference_data.schema import Prompt, TaskExample, Turn
from tests.align.generation import toy_policy
from tests.conftest import Tiny

G, T, PROMPTS = 4, 6, 4
LORA = LoRA(4, 8, 0.0, r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj")


class Letters:
    """Rewards for letters and for length: two parts that random completions get different values of."""

    weights = {"vowels": 1.0, "short": 0.5}

    def check(self, prompts):
        pass

    def score(self, prompts, completions):
        vowels = [len(re.findall("[aeiou]", text.lower())) / 4 for text in completions]
        return {"vowels": vowels, "short": [1 / (1 + len(text)) for text in completions]}

    def identity(self):
        return {"kind": "letters"}


def prompts(two_clips=False):
    """Two prompts with a clip, one of text alone; or rows of two clips, the first of the same one twice."""
    clips = [(0,), (1,), (), (2,)] if not two_clips else [(0, 0), (1, 2), (2, 1), (3,)]
    return [
        Prompt(
            id=f"p{i}",
            audios=tuple(f"{clip}.wav" for clip in own),
            question=question,
            answer_gt="The tone is high.",
            meta_info="",
            task_name="speech_QA",
        )
        for i, (own, question) in enumerate(
            zip(clips, ["Is the tone high or low?", "high?", "Say it.", "low"], strict=True)
        )
    ]


def conversations():
    """Those of two clips, but that the first one comes with an earlier turn."""
    return [
        record.model_copy(
            update={"history": (Turn(question="high?", answer="high", audios=record.audios[:1]),)}
        )
        for record in prompts(two_clips=True)
    ]


def make_trainer(
    tiny,
    folder,
    *,
    records=None,
    reward=None,
    packed=True,
    lora=None,
    micro_batches=1,
    steps=2,
    method=(),
    **trl,
):
    """A trainer; `method` has what differs from plain GRPO, `trl` arguments of TRL's."""
    processor, model = qwen2_audio.load_processor(tiny.policy), qwen2_audio.load_model(tiny.policy)
    schedule, tuning = Schedule(steps, PROMPTS, 1e-3, 1, 0), Tuning(lora=lora, packed=packed)
    plain = {"loss": "grpo", "beta": 0.0, "completions": G, "temperature": 1.0, "iterations": 1}
    own = group_relative_policy_optimisation(
        [prompt_row(record, f"kind{i % 2}") for i, record in enumerate(records or prompts())],
        schedule,
        reward=reward or Letters(),
        rollout_batch_size=3,
        **{**plain, "max_new_tokens": T, **dict(method)},
    )
    options = arguments(
        folder,
        schedule,
        tuning=tuning,
        micro_batches=micro_batches,
        sequences=own.sequences,
        trl={**own.trl, **trl},
    )
    trainer = own.trainer(
        model=pack(model) if packed else model,
        args=GRPOConfig(**options),
        train_dataset=own.examples,
        data_collator=own.collator(processor, ClipFeatures(processor, tiny.audio), packed),
        processing_class=processor,
        peft_config=tuning.peft_config,
    )
    trainer.current_gradient_accumulation_steps = micro_batches
    trainer._meter.begin(0, torch.device("cpu"))
    return trainer


def generate(trainer):
    """The micro-batches of the first generation."""
    trainer.model.train()
    rows = list(itertools.islice(trainer._get_train_sampler(), trainer.args.generation_batch_size))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in rows])
    trainer._prepare_inputs(batch)
    return trainer._buffered_inputs


def perturb(model):
    """Move the policy, so that ratios leave 1 and the KL 0."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape, generator=draw))


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def relative(a, b):
    assert a.keys() == b.keys()
    difference = sum(float((a[name] - b[name]).double().pow(2).sum()) for name in b) ** 0.5
    return difference / sum(float(b[name].double().pow(2).sum()) for name in b) ** 0.5


# -------------------------------------------------------------------------- by hand


def log_p(model, processor, features, row, temperature):
    """log p of the completion's tokens (A,), one row alone: the slow and obvious way."""
    record, completion = row
    clips = features(record.audios)
    prompt = expand_audio(
        encode_prompt(processor, toy_policy.messages(request_of(record))),
        [n_audio_tokens(clip.n_frames) for clip in clips],
        processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    ids = torch.tensor([prompt.ids + completion])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **stack(clips)).logits[0]
    scores = (logits[len(prompt.ids) - 1 : -1] / temperature).log_softmax(-1)
    return scores.gather(-1, torch.tensor(completion)[:, None])[:, 0]


def drawn(trainer):
    """The completions of a generation: a list of token ids for each prompt's record."""
    groups = {}
    for batch in trainer._buffered_inputs:
        fields = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        for prompt, mask, completion, own in zip(*(batch[name] for name in fields), strict=True):
            groups.setdefault(tuple(prompt[mask == 1].tolist()), []).append(completion[own == 1].tolist())
    named = {tuple(trainer._prompt_ids(row["request"])): row["record"] for row in trainer.train_dataset.rows}
    return {named[key].id: (named[key], completions) for key, completions in groups.items()}


def loss_by_hand(trainer, policy, before, reference):
    """GRPO (arXiv:2402.03300, equation 3) and its kin over a generation; `before` has drawn it."""
    args, processor = trainer.args, trainer.processing_class
    features, terms = trainer.clip_ids.collator.features, []
    for record, completions in drawn(trainer).values():
        texts = [processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in completions]
        parts = Letters().score([record] * G, texts)
        rewards = torch.tensor([v + s / 2 for v, s in zip(parts["vowels"], parts["short"], strict=True)])
        assert len(rewards) == G
        advantages = rewards - rewards.mean()
        if args.scale_rewards == "group":
            advantages = advantages / (rewards.std() + 1e-4)
        for advantage, ids in zip(advantages, completions, strict=True):
            row = (record, ids)
            now = log_p(policy, processor, features, row, args.temperature)
            with torch.no_grad():
                then = log_p(before, processor, features, row, args.temperature)
                anchor = log_p(reference, processor, features, row, args.temperature)
            ratio = (now - (then if args.num_iterations > 1 else now.detach())).exp()
            if args.loss_type == "cispo":
                loss = -ratio.clamp(max=args.epsilon_high).detach() * advantage * now
            else:
                high = args.epsilon if args.epsilon_high is None else args.epsilon_high
                clipped = ratio.clamp(1 - args.epsilon, 1 + high)
                loss = -torch.min(ratio * advantage, clipped * advantage)
            if args.beta:
                kl = (anchor - now).exp() - (anchor - now) - 1
                loss = loss + args.beta * kl * (ratio if args.use_bias_correction_kl else 1)
            terms.append(loss)
    match args.loss_type:
        case "grpo":
            return torch.stack([term.mean() for term in terms]).mean()
        case "dr_grpo":
            return torch.cat(terms).sum() / (len(terms) * T)
        case _:
            return torch.cat(terms).mean()


def step(trainer):
    """The loss of a step, summed over its micro-batches, and all gradients."""
    batches = generate(trainer)
    perturb(trainer.model)
    losses = [trainer.compute_loss(trainer.model, dict(batch)) for batch in batches]
    torch.stack(losses).sum().backward()
    return sum(float(loss.detach()) for loss in losses), gradients(trainer.model)


def twin(tiny):
    policy = qwen2_audio.load_model(tiny.policy)
    perturb(policy)
    return policy


TWICE = {"iterations": 2}
SETTINGS = [
    ({"loss": "grpo", **TWICE}, {"micro_batches": 2}),
    ({"loss": "grpo", **TWICE, "beta": 0.1, "temperature": 0.7}, {"use_bias_correction_kl": False}),
    ({"loss": "dr_grpo", **TWICE, "beta": 0.04}, {"micro_batches": 2}),
    ({"loss": "dapo", **TWICE, "temperature": 1.3}, {"micro_batches": 2, "epsilon_high": 0.28}),
    ({"loss": "dapo"}, {}),
    ({"loss": "cispo", **TWICE}, {"micro_batches": 2}),
    ({"loss": "rloo", **TWICE}, {}),
    ({"loss": "dapo", **TWICE, "beta": 0.1}, {"records": prompts(two_clips=True)}),
    ({"loss": "grpo", **TWICE, "beta": 0.1}, {"records": conversations()}),
    ({"loss": "grpo", **TWICE, "beta": 0.1}, {"packed": False}),
]


@pytest.mark.parametrize(("method", "settings"), SETTINGS, ids=lambda part: "-".join(map(str, part)))
def test_loss_and_all_gradients_equal_hand_arithmetic(tiny, tmp_path, method, settings):
    trainer = make_trainer(tiny, tmp_path, method=method, **settings)
    loss, ours = step(trainer)
    before, policy = qwen2_audio.load_model(tiny.policy), twin(tiny)
    slow = loss_by_hand(trainer, policy, before, before)
    slow.backward()
    assert loss == pytest.approx(float(slow.detach()), abs=1e-6)
    assert relative(ours, gradients(policy)) < 1e-5


def test_low_rank_updates_have_the_policy_without_them_as_reference(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, lora=LORA, method={"beta": 0.1, **TWICE})
    loss, ours = step(trainer)
    before = qwen2_audio.load_model(tiny.policy)
    trainer.model.zero_grad()
    slow = loss_by_hand(trainer, trainer.model, before, before)
    slow.backward()
    assert trainer.ref_model is None
    assert {"lora_A" in name or "lora_B" in name for name in ours} == {True}
    assert loss == pytest.approx(float(slow.detach()), abs=1e-6)
    assert relative(ours, gradients(trainer.model)) < 1e-5


def test_an_engine_gets_the_weights_that_are_published_in_the_end(tiny, tmp_path):
    """Low-rank updates merged, bit for bit; the model that learns is left as it is."""
    trainer = make_trainer(tiny, tmp_path / "out", lora=LORA)
    perturb(trainer.model)
    learned = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with live_policy(trainer.model, tmp_path) as folder:
        sent = load_file(folder / "model.safetensors")
    assert not folder.exists()
    assert all(torch.equal(value, learned[name]) for name, value in trainer.model.state_dict().items())
    whole = trainer.model.merge_and_unload().state_dict()
    assert sent.keys() == {hub_name(name) for name in whole}
    assert all(torch.equal(value, sent[hub_name(name)]) for name, value in whole.items())


def test_rloo_is_dr_grpo_times_a_factor(tiny, tmp_path):
    """Leave-one-out advantages on whole completions (arXiv:2402.14740), times (G - 1) / (G T)."""
    trainer = make_trainer(tiny, tmp_path, method={"loss": "rloo"})
    _, ours = step(trainer)
    policy, terms = twin(tiny), []
    for record, completions in drawn(trainer).values():
        decode = trainer.processing_class.tokenizer.decode
        parts = Letters().score(
            [record] * G, [decode(ids, skip_special_tokens=True).strip() for ids in completions]
        )
        rewards = [v + s / 2 for v, s in zip(parts["vowels"], parts["short"], strict=True)]
        for i, ids in enumerate(completions):
            others = rewards[:i] + rewards[i + 1 :]
            advantage = rewards[i] - sum(others) / len(others)
            features = trainer.clip_ids.collator.features
            terms.append(
                -advantage * log_p(policy, trainer.processing_class, features, (record, ids), 1.0).sum()
            )
    torch.stack(terms).mean().backward()
    factor = (G - 1) / (G * T)
    assert relative(ours, {name: factor * value for name, value in gradients(policy).items()}) < 1e-5


def test_best_of_raises_the_first_best_of_each_group_that_differs(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, method={"loss": "best_of"})
    rewards = torch.tensor([[0.2, 0.9, 0.9, 0.1], [0.5, 0.5, 0.5, 0.5]])
    found = trainer.group_advantages(rewards - rewards.mean(1, keepdim=True))
    assert found.tolist() == [[0, 4, 0, 0], [0, 0, 0, 0]]
    [batch] = generate(trainer)
    assert sorted(batch["advantages"].tolist()) == [0] * (PROMPTS * (G - 1)) + [G] * PROMPTS


@pytest.mark.parametrize(("micro_batches", "packed"), [(1, True), (2, True), (2, False)])
def test_replayed_targets_add_the_mean_of_their_own_losses(tiny, tmp_path, micro_batches, packed):
    texts = ["A low tone.", "High.", "A high tone and then another one.", "Low.", "It is low."]
    records = [
        TaskExample(id=str(i), audios=(f"{i % 4}.wav",), task="caption", text=text)
        for i, text in enumerate(texts)
    ]
    parts = [Part("targets", records, 1.0, partial(task_row, prompt_format="sentences"))]
    examples = Examples(parts, 2 * PROMPTS, seed=3)

    def trained(replay, folder):
        trainer = make_trainer(
            tiny, folder, micro_batches=micro_batches, packed=packed, method={"replay": replay}
        )
        trainer.model.train()
        trainer.state.global_step = 1
        numbers = list(itertools.islice(trainer._get_train_sampler(), trainer.args.generation_batch_size))
        batch = trainer.data_collator([trainer.train_dataset[n] for n in numbers])
        loss = sum(float(trainer.training_step(trainer.model, batch, None)) for _ in range(micro_batches))
        return trainer, loss, gradients(trainer.model)

    plain, loss, without = trained(None, tmp_path / "plain")
    _, loss_with, both = trained(Replay(examples, 0.3), tmp_path / "replay")
    model, processor = qwen2_audio.load_model(tiny.policy), plain.processing_class
    collate = SFTCollator(processor, plain.clip_ids.collator.features, packed=False)
    losses = []
    for number in range(PROMPTS, 2 * PROMPTS):
        row = collate([examples[number]])
        labels = row.pop("labels")
        losses.append(cross_entropy(model(**row).logits[0, :-1], labels[0, 1:]))
    slow = 0.3 * torch.stack(losses).mean()
    slow.backward()
    assert loss_with - loss == pytest.approx(float(slow.detach()), abs=1e-6)
    added = {name: both[name] - without[name] for name in both}
    assert relative(added, gradients(model)) < 1e-5


def test_a_policy_learns_what_it_is_rewarded_for(tiny, tmp_path):
    """A policy that says which tone it hears half as well as it could, rewarded for the right words."""
    toy_policy.train(tiny.policy, tiny.audio, tmp_path / "policy", steps=30)
    own = Tiny(tmp_path / "policy", tiny.audio)
    asked = [
        Prompt(
            id=f"p{i}",
            audios=(f"{i}.wav",),
            question="Is the tone high or low?",
            answer_gt=f"The tone is {'low' if i % 2 else 'high'}.",
            meta_info="",
            task_name="sound_QA",
        )
        for i in range(4)
    ]
    trainer = make_trainer(
        own,
        tmp_path / "out",
        records=asked,
        reward=TranscriptReward("en"),
        steps=25,
        method={"loss": "dapo", "completions": 8, "max_new_tokens": 10},
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
    )
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert len(rewards) == 25
    assert fmean(rewards[-6:]) > fmean(rewards[:6]) + 0.1


# -------------------------------------------------------------------------- rollouts


def completions_of(trainer, order=None):
    """Token ids of a step's completions, by place and number."""
    rows = [trainer.train_dataset[i] for i in order or range(PROMPTS)]
    groups = trainer._complete(rows)
    return {row["draw"]: [c.token_ids for c in group] for row, group in zip(rows, groups, strict=True)}


def test_completions_follow_from_weights_seed_and_place_alone(tiny, tmp_path):
    one = make_trainer(tiny, tmp_path / "a")
    torch.manual_seed(1)
    all_at_once = completions_of(one)
    one._rollout_batch_size = 1
    torch.manual_seed(2)
    assert completions_of(one, order=[2, 0, 3, 1]) == all_at_once
    engine = TransformersEngine(tiny.policy, ClipFeatures(one.processing_class, tiny.audio))
    requests = {i: one.train_dataset[i]["request"] for i in range(PROMPTS)}
    decoding = Decoding(T, 1.0, completions=G, suppress=(one.clip_ids.audio_id,))
    expected = dict(engine.complete(requests, decoding, seed=0))
    assert {n: [c.token_ids for c in group] for n, group in expected.items()} == all_at_once
    assert len({tuple(ids) for group in all_at_once.values() for ids in group}) == PROMPTS * G
    other = make_trainer(tiny, tmp_path / "b", seed=1)
    assert completions_of(other) != all_at_once


def test_a_clip_is_never_drawn(tiny, tmp_path):
    """<|AUDIO|> by far the likeliest token: a completion that held one would have no clip to hear."""
    trainer = make_trainer(tiny, tmp_path)
    audio_id = trainer.clip_ids.audio_id
    head = trainer.model.lm_head.weight
    with torch.no_grad():
        head[audio_id] = 0
        head.mul_(0.01)
        trainer.model.model.language_model.norm.weight.fill_(1.0)
        head[audio_id] = 10 * head.abs().max() * torch.sign(torch.randn(head.shape[1]))
    assert audio_id not in [t for group in completions_of(trainer).values() for ids in group for t in ids]


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_groups_stay_whole_in_micro_batches(tiny, tmp_path, micro_batches):
    """Each prompt is then computed once; TRL's shuffle would put its rows into all micro-batches."""
    trainer = make_trainer(tiny, tmp_path, micro_batches=micro_batches)
    batches = generate(trainer)
    distinct = [len({tuple(ids.tolist()) for ids in batch["prompt_ids"]}) for batch in batches]
    assert distinct == [PROMPTS // micro_batches] * micro_batches


def test_rows_name_their_clips_through_any_order_and_padding(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, records=prompts(two_clips=True))
    ids = [trainer._prompt_ids(row["request"]) for row in trainer.train_dataset.rows]
    width = max(map(len, ids)) + 2
    for pad in (lambda row: [0] * (width - len(row)) + row, lambda row: row + [0] * (width - len(row))):
        rows = torch.tensor([pad(row) for row in reversed(ids)])
        mask = torch.tensor([pad([1] * len(row)) for row in reversed(ids)])
        batch = trainer.clip_ids.batch(rows, mask)
        named = [trainer.clip_ids._clips(row[own == 1]) for row, own in zip(rows, mask, strict=True)]
        assert named == [row["audios"] for row in reversed(trainer.train_dataset.rows)]
        assert batch["input_ids"].max() < trainer.clip_ids.vocabulary
        assert len(batch["input_features"]) == 4  # each clip once
        packed = batch["packed"]
        assert torch.equal(packed.tokens[packed.index][mask == 1], batch["input_ids"][mask == 1])
