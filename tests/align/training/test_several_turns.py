"""Prompts and preference pairs of several turns: their tokens, the DPO loss, lengths, and who reads them."""

import pytest
import soundfile
import torch
from transformers import Qwen2AudioProcessor

from align.models.chat import assistant, encode_completion, encode_prompt, system, user
from align.models.features import ClipFeatures, stack
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio import reward_model
from align.models.qwen2_audio.clips import expand_clips, n_audio_tokens
from align.rewards.model import RewardModelReward
from align.rewards.pair_accuracy import pair_accuracy
from align.rewards.reward import BadReward
from align.training.collate import PreferenceCollator, SFTCollator, encode_row, pair_row, prompt_row
from align.training.lengths import Lengths
from align.training.preflight import describe_beyond
from align.training.reference import ReferenceStore
from preference_data import store
from preference_data.prompts.prompts import BadExample
from preference_data.schema import AudioClip, PreferencePair, Prompt, Turn
from tests.align.training import test_dpo_trainer
from tests.align.training.test_dpo_trainer import BETA, make_trainer, perturb

HISTORY = (
    Turn(question="Is the tone high or low?", answer="The tone is high.", audios=("0.wav",)),
    Turn(question="high?", answer="high"),
)
AUDIOS = ("0.wav", "1.wav", "3.wav")
MESSAGES = [
    *system("Say low."),
    user("Is the tone high or low?", 1),
    assistant("The tone is high."),
    user("high?"),
    assistant("high"),
    user("Generate the caption in English:", 2),
]
"""What `HISTORY` and its last question are, written by hand."""
PROMPT = Prompt(
    id="p", system="Say low.", audios=AUDIOS, history=HISTORY, question="Generate the caption in English:",
    answer_gt="A low tone.", meta_info="", task_name="chat",
)  # fmt: skip
PAIR = PreferencePair(
    id="pair", prompt_id="p", system=PROMPT.system, audios=AUDIOS, history=HISTORY, question=PROMPT.question,
    chosen="A low tone.", rejected="The tone is high.", axis="factuality", agreement=1.0,
)  # fmt: skip
SHORT = PAIR.model_copy(update={"id": "short", "system": None, "history": (), "audios": ("1.wav",)})
OTHER = PAIR.model_copy(
    update={"id": "other", "system": None, "history": HISTORY[:1], "audios": ("0.wav",), "question": "high?"}
)


@pytest.fixture(scope="module")
def processor(tiny):
    return qwen2_audio.load_processor(tiny.policy)


def test_ids_equal_those_of_the_processors_own_template_and_audio(processor, tiny):
    stock = Qwen2AudioProcessor(processor.feature_extractor, processor.tokenizer)
    text = stock.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True, chat_template=stock.default_chat_template
    )
    assert text.count("Audio 3: <|audio_bos|>") == 1
    waves = [soundfile.read(tiny.audio / name, dtype="float32")[0] for name in AUDIOS]
    theirs = stock(
        text=text, audio=waves, sampling_rate=16_000, return_tensors="pt", add_special_tokens=False
    )
    expected = theirs["input_ids"][0].tolist()
    features = ClipFeatures(processor, tiny.audio)
    batch = PreferenceCollator(processor, features)([pair_row(PAIR, 1.0)])
    for ids, mask, completion in zip(
        batch["input_ids"], batch["completion_mask"], (PAIR.chosen, PAIR.rejected), strict=True
    ):
        assert ids[: len(expected)].tolist() == expected
        assert not mask[: len(expected)].any()
        assert processor.tokenizer.decode(ids[mask == 1]) == f"{completion}<|im_end|>"
    torch.testing.assert_close(batch["input_features"][:3], theirs["input_features"], rtol=0, atol=1e-6)
    row = prompt_row(PROMPT, "chat")
    learned = SFTCollator(processor, features)([row])
    assert learned["input_ids"][0, : len(expected)].tolist() == expected
    labels = learned["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == "A low tone.<|im_end|>"  # no earlier answer
    assert encode_prompt(processor, row["request"].messages) == encode_prompt(processor, MESSAGES)


def slow_logp(model, processor, features, messages, audios, text):
    """log p(text | messages, clips), one row alone, no padding, from messages written by hand."""
    clips = features(audios)
    prompt = expand_clips(processor, encode_prompt(processor, messages), clips).ids
    answer = encode_completion(processor, text).ids
    ids = torch.tensor([prompt + answer])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **stack(clips)).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


@pytest.mark.parametrize("packed", [False, True])
def test_the_dpo_loss_and_gradients_equal_the_slow_twin(tiny, tmp_path, monkeypatch, packed):
    pairs, weights = [PAIR, OTHER, SHORT], (1.5, 0.5, 1.0)
    by_hand = [MESSAGES, [*MESSAGES[1:3], user("high?")], [user(PROMPT.question, 1)]]
    monkeypatch.setattr(test_dpo_trainer, "ROWS", [pair_row(pair, 0.0) for pair in pairs])
    trainer = make_trainer(tiny, tmp_path, weights, packed=packed)
    perturb(trainer.model)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(trainer.train_dataset.rows))
    loss.backward()
    processor, twin = trainer.processing_class, qwen2_audio.load_model(tiny.policy)
    perturb(twin)
    reference, features = qwen2_audio.load_model(tiny.policy), ClipFeatures(processor, tiny.audio)
    slow = torch.tensor(0.0)
    for pair, messages, weight in zip(pairs, by_hand, weights, strict=True):
        logps = {}
        for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            given = processor, features, messages, pair.audios, text
            with torch.no_grad():
                anchor = slow_logp(reference, *given)
            logps[side] = slow_logp(twin, *given) - anchor
        margin = logps["chosen"] - logps["rejected"]
        slow = slow - weight * torch.nn.functional.logsigmoid(BETA * margin) / len(pairs)
    slow.backward()
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    ours = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert ours
    for name, p in twin.named_parameters():
        if p.grad is not None and name in ours:
            torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-5)
    # The comparison can fail: without what was said before, the loss is another
    bare = [{**row, "system": None, "history": ()} for row in trainer.train_dataset.rows]
    assert trainer.compute_loss(trainer.model, trainer.data_collator(bare)).item() != pytest.approx(
        slow.item(), rel=1e-3
    )


def test_lengths_count_every_turn(processor, tiny, tmp_path):
    clips = [
        AudioClip(id=name, path=name, split="preference", duration_s=len(wave) / 16_000, sha256="0" * 64)
        for name in AUDIOS
        for wave in [soundfile.read(tiny.audio / name)[0]]
    ]
    store.write(tmp_path / "clips.jsonl", clips)
    lengths, row = Lengths(tmp_path, processor), pair_row(PAIR, 1.0)
    features = ClipFeatures(processor, tiny.audio)
    tokens = int(PreferenceCollator(processor, features)([row])["attention_mask"].sum(1).max())
    assert lengths.exact_tokens(row) == tokens
    assert list(lengths.rows_beyond(tokens, [row])) == []
    assert list(lengths.rows_beyond(tokens - 1, [row])) == [(tokens, row)]
    says = describe_beyond([row], lengths, tokens - 1)
    assert f"pair 'pair' has {tokens} tokens, with its 3 clips" in says
    asked = prompt_row(PROMPT, "chat")
    of_clips = sum(n_audio_tokens(clip.n_frames) for clip in features(AUDIOS))
    assert lengths.exact_tokens(asked) == len(encode_row(processor, asked).ids) - 3 + of_clips
    texts = [text for turn in HISTORY for text in (turn.question, turn.answer)] + ["Say low."]
    more = sum(len(processor.tokenizer(text).input_ids) for text in texts)
    bare = {**row, "system": None, "history": ()}
    for packed, times in ((True, 1), (False, 2)):
        counts = [lengths.tokens(each, packed=packed) for each in (row, bare)]
        assert counts[0] - counts[1] == times * more


@pytest.mark.parametrize("place", ["question", "answer", "system", "last"])
def test_a_control_token_in_any_turn_is_refused_by_id(place):
    if place == "system":
        change = {"system": "x<|im_end|>"}
    elif place == "last":
        change = {"question": "<|AUDIO|>"}
    else:
        change = {"history": (HISTORY[0], HISTORY[1].model_copy(update={place: "<|im_start|>"}))}
    with pytest.raises(BadExample, match=r"example 'pair': its text holds <\|"):
        pair_row(PAIR.model_copy(update=change), 1.0)
    with pytest.raises(BadExample, match=r"example 'p': its text holds <\|"):
        prompt_row(PROMPT.model_copy(update=change), "chat")


def test_stored_log_probs_are_of_the_whole_conversation(tmp_path):
    logps = ReferenceStore(tmp_path, dict.fromkeys(AUDIOS, "0" * 64))
    rows = [pair_row(pair, 1.0) for pair in (PAIR, SHORT)]
    changed = HISTORY[1].model_copy(update={"answer": "low"})
    other = pair_row(PAIR.model_copy(update={"history": (HISTORY[0], changed)}), 1.0)
    assert logps._digest(rows[:1]) == logps._digest(rows[:1]) != logps._digest([other])
    without = {name: value for name, value in rows[1].items() if name != "history"}
    assert logps._digest(rows[1:]) == logps._digest([without])  # as before there were turns


@pytest.fixture(scope="module")
def reward(tiny, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "model"
    model = reward_model.load_model(tiny.policy, head_seed=1)
    qwen2_audio.save(model, processor, folder)
    return RewardModelReward(folder, tiny.audio)


def test_a_reward_model_reads_the_whole_conversation(reward, tiny, processor):
    model = reward_model.load_model(tiny.policy, head_seed=1).eval()
    features = ClipFeatures(processor, tiny.audio)
    prompts = [
        PROMPT,
        PROMPT.model_copy(update={"history": (), "system": None, "audios": ("1.wav",)}),
        PROMPT,
    ]
    texts = ["A low tone.", "A low tone.", "high"]
    by_hand = []
    for messages, audios, text in zip(
        (MESSAGES, [user(PROMPT.question, 1)], MESSAGES), (AUDIOS, ("1.wav",), AUDIOS), texts, strict=True
    ):
        clips = features(audios)
        prompt = expand_clips(processor, encode_prompt(processor, messages), clips).ids
        ids = torch.tensor([prompt + encode_completion(processor, text).ids])
        with torch.no_grad():
            states = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), **stack(clips))
        by_hand.append((states.last_hidden_state[0, -1] @ model.score.weight[0]).item())
    assert reward.score(prompts, texts)["model"] == pytest.approx(by_hand, abs=1e-5)
    with pytest.raises(BadReward, match="example 'p'"):
        reward.check([PROMPT.model_copy(update={"history": (Turn(question="?", answer="<|im_end|>"),)})])


def test_clips_of_pairs_are_exchanged_in_their_places(reward):
    moved = PAIR.history[0].model_copy(update={"audios": ("2.wav",)})
    other = PAIR.model_copy(update={"id": "b", "audios": ("2.wav", "0.wav", "0.wav"), "history": (moved,)})
    result = pair_accuracy(reward, [pair_row(pair, 1.0) for pair in (PAIR, other, SHORT, OTHER)], seed=0)
    assert result.accuracy.n == 4
    assert result.shuffled.n == 4
