"""Every check before training: passes what is right, and finds out what is wrong."""

import re

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import Qwen2AudioForConditionalGeneration
from trl import DPOConfig, SFTConfig

from align.kernels.attention import BACKENDS
from align.models.chat import assistant, user
from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.packed import pack
from align.run_folder.artifacts import StageFolder
from align.training import preflight
from align.training.collate import PreferenceCollator, SFTCollator
from align.training.data_loading import Rows
from align.training.methods import Schedule
from align.training.preflight import NotReady, PackingIsWrong, Preflight, compare_packing
from align.training.run import arguments, fit
from align.training.trainers import AudioDPOTrainer, AudioSFTTrainer
from align.training.tuning import Tuning
from preference_data.schema import AudioClip

QUESTION = "Is the tone high or low?"
CHATS = [
    {
        "messages": [user(QUESTION, 1), assistant("The tone is high."), user("Sure?"), assistant("Yes.")],
        "prompt": None,
        "completion": None,
        "audios": ["0.wav"],
        "draw": 0,
    },
    {
        "messages": None,
        "prompt": "<|audio_bos|><|AUDIO|><|audio_eos|>Generate the caption in English:",
        "completion": "A low to\u0301ne.",
        "audios": ["1.wav"],
        "draw": 1,
    },
    {
        "messages": [user("Hello"), assistant("Hi <there> |x|.")],
        "prompt": None,
        "completion": None,
        "audios": [],
        "draw": 2,
    },
]
PAIRS = [
    {
        "prompt": QUESTION,
        "chosen": "high",
        "rejected": "The tone is low.",
        "audios": ["0.wav"],
        "weight": 1.0,
    },
    {"prompt": QUESTION, "chosen": "A low tone.", "rejected": "", "audios": ["1.wav"], "weight": 1.0},
]


@pytest.fixture
def processor(tiny):
    return qwen2_audio.load_processor(tiny.policy)


@pytest.fixture
def collate(tiny, processor):
    return SFTCollator(processor, ClipFeatures(processor, tiny.audio))


@pytest.fixture
def model(tiny):
    return qwen2_audio.load_model(tiny.policy)


def out_folder(tmp_path):
    out = StageFolder(tmp_path, "2_sft", "fingerprint")
    out.open()
    return out


def sft_trainer(tiny, out, model, processor, rows=CHATS):
    options = arguments(
        out.path,
        Schedule(2, 1, 1e-3, 2, 0),
        tuning=Tuning(),
        trl={},
    )
    return AudioSFTTrainer(
        model=model,
        args=SFTConfig(**options),
        train_dataset=Rows(rows),
        data_collator=SFTCollator(processor, ClipFeatures(processor, tiny.audio)),
        processing_class=processor,
    )


# -------------------------------------------------------------------------- audio


def test_audio_that_reaches_the_model_passes_and_draws_nothing(model, collate):
    model.train()
    before = torch.get_rng_state()
    preflight.check_audio(model, collate([CHATS[0]]))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("packed", [False, True], ids=["stock", "packed"])
def test_a_dead_projector_is_found_out(model, collate, packed):
    collate.packed = packed
    if packed:
        pack(model)
    preflight.check_audio(model, collate([CHATS[0]]))
    with torch.no_grad():
        model.model.multi_modal_projector.linear.weight.zero_()
    with pytest.raises(NotReady, match="audio does not reach the model: with silence .* changes by 0 "):
        preflight.check_audio(model, collate([CHATS[0]]))


def test_a_batch_without_its_features_is_found_out(model, collate):
    batch = collate([CHATS[0]])
    del batch["input_features"]
    with pytest.raises(NotReady, match="its batch holds no input_features"):
        preflight.check_audio(model, batch)


# -------------------------------------------------------------------------- labels


def test_labels_are_the_assistants_words(collate, processor):
    preflight.check_labels(collate(CHATS), CHATS, processor)


def test_labels_of_pairs_are_both_answers(tiny, processor):
    collate = PreferenceCollator(processor, ClipFeatures(processor, tiny.audio))
    batch = collate(PAIRS)
    preflight.check_labels(batch, PAIRS, processor)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
    with pytest.raises(NotReady, match="example 0: the loss is on 'high<|im_end|>', the assistant's words"):
        preflight.check_labels(batch, swapped, processor)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda labels, ids: labels.copy_(ids), "example 0: the loss is on '<|im_start|>system"),
        (lambda labels, ids: labels[1].fill_(-100), "example 1 has no label at all"),
        (lambda labels, ids: labels.copy_(labels.roll(1, dims=1)), "example 0: the loss is on"),
    ],
    ids=["prompt too", "none", "one token late"],
)
def test_wrong_labels_are_found_out(collate, processor, spoil, message):
    batch = collate(CHATS)
    spoil(batch["labels"], batch["input_ids"])
    with pytest.raises(NotReady) as caught:
        preflight.check_labels(batch, CHATS, processor)
    assert message in str(caught.value)


def test_a_template_without_generation_marks_is_found_out(collate, processor):
    template = processor.chat_template
    processor.chat_template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert processor.chat_template != template
    with pytest.raises(NotReady, match="example 0 has no label at all"):
        preflight.check_labels(collate(CHATS), CHATS, processor)


# -------------------------------------------------------------------------- frozen


def test_transformers_unfreezing_of_the_positions_is_found_out(tiny, model):
    preflight.check_frozen(model, [""])
    stock = Qwen2AudioForConditionalGeneration.from_pretrained(tiny.policy)
    with pytest.raises(NotReady, match=r"should be frozen: model\.audio_tower\.embed_positions\.weight;"):
        preflight.check_frozen(stock, [""])


def test_only_the_modules_that_learn_may_learn(model):
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    preflight.check_frozen(model, ["model.multi_modal_projector"])
    with pytest.raises(NotReady, match=r"should be trained: lm_head\.weight, model\.language_model"):
        preflight.check_frozen(model, ["model.multi_modal_projector", "model.language_model", "lm_head"])
    model.lm_head.requires_grad_(True)
    with pytest.raises(NotReady, match=r"should be frozen: lm_head\.weight; .* trained: nothing"):
        preflight.check_frozen(model, ["model.multi_modal_projector"])


def test_with_adapters_only_they_may_learn(model):
    target = r"model\.language_model\.layers\.\d+\.self_attn\.q_proj"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=target))
    preflight.check_frozen(adapted, [""])
    adapted.base_model.model.lm_head.requires_grad_(True)
    with pytest.raises(NotReady, match="should be frozen: base_model.model.lm_head.weight"):
        preflight.check_frozen(adapted, [""])


# -------------------------------------------------------------------------- clips and disk


def clip(split, duration_s):
    return AudioClip(id="c", path=f"{split}.wav", split=split, duration_s=duration_s, sha256="0" * 64)


def test_clips_longer_than_the_model_hears_are_found_out(processor):
    preflight.check_clip_lengths([clip("train", 1.0), clip("test", 9.0)], processor, 0.0)
    preflight.check_clip_lengths([], processor, 0.0)
    clips = [clip("train", 1.3), clip("train", 1.2), *[clip("preference", 0.5)] * 8]
    told = r"2 of 10 clips are longer than the 1 s that the model hears, such as train\.wav with 1\.3 s"
    with pytest.raises(NotReady, match=told):
        preflight.check_clip_lengths(clips, processor, 0.1)
    preflight.check_clip_lengths(clips, processor, 0.2)


def test_a_disk_too_small_for_two_checkpoints_is_found_out(tmp_path):
    preflight.check_disk(tmp_path / "not" / "there" / "yet", 1000)
    with pytest.raises(NotReady, match=r"two checkpoints of 1000000\.0 GB do not fit"):
        preflight.check_disk(tmp_path, 10**15)


def test_the_estimate_of_a_checkpoint_is_what_one_takes(tiny, tmp_path, model, processor):
    out = out_folder(tmp_path)
    trainer = sft_trainer(tiny, out, model, processor)
    expected = preflight.checkpoint_bytes(trainer.model, in_deepspeed=False)
    n = sum(p.numel() for p in model.parameters())
    positions = model.model.audio_tower.embed_positions.weight.numel()
    assert expected == 12 * (n - positions)
    assert preflight.checkpoint_bytes(trainer.model, in_deepspeed=True) == 16 * (n - positions)
    fit(trainer, out)
    saved = out.path / "checkpoints" / "checkpoint-2"
    real = sum((saved / name).stat().st_size for name in ("model.safetensors", "optimizer.pt"))
    assert real == pytest.approx(expected, rel=0.12)  # 30,000 parameters: the files' headers count


# -------------------------------------------------------------------------- as the trainers run it


def test_a_trainer_that_is_not_ready_takes_no_step(tiny, tmp_path, model, processor):
    out = out_folder(tmp_path)
    trainer = sft_trainer(tiny, out, model, processor)
    with torch.no_grad():
        model.model.multi_modal_projector.linear.weight.zero_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NotReady, match="audio does not reach"):
        fit(trainer, out)
    assert trainer.state.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not (out.path / "metrics.jsonl").exists()


def dpo_trainer(tiny, folder, model, processor, *, packed):
    options = arguments(
        folder,
        Schedule(1, 2, 1e-3, 1, 0),
        tuning=Tuning(),
        trl={},
    )
    return AudioDPOTrainer(
        model=pack(model) if packed else model,
        ref_model=qwen2_audio.load_model(tiny.policy),
        args=DPOConfig(**options),
        train_dataset=Rows(PAIRS),
        data_collator=PreferenceCollator(processor, ClipFeatures(processor, tiny.audio), packed),
        processing_class=processor,
    )


def test_text_alone_and_pairs_pass_too(tiny, tmp_path, model, processor):
    fit(
        sft_trainer(tiny, out_folder(tmp_path / "text"), model, processor, [CHATS[2]] * 2),
        out_folder(tmp_path),
    )
    trainer = dpo_trainer(tiny, tmp_path / "pairs", model, processor, packed=False)
    Preflight(trainer, [""], "6_dpo").on_train_begin(trainer.args, trainer.state, trainer.control)


# -------------------------------------------------------------------------- packed and padded


def test_the_first_batch_is_computed_both_ways(tiny, tmp_path, model, processor, capsys):
    trainer = dpo_trainer(tiny, tmp_path, model, processor, packed=True)
    before = torch.get_rng_state()
    Preflight(trainer, [""], "6_dpo").on_train_begin(trainer.args, trainer.state, trainer.control)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    told = re.search(r"6_dpo  a forward pass takes .* predictions differ by (.*)\n", capsys.readouterr().out)
    assert 0 < float(told[1]) < 1e-5  # not the same computation twice


def test_a_packed_path_that_is_wrong_is_found_out(tiny, tmp_path, model, processor, monkeypatch):
    """Every segment sees all that lies before it in the packed row."""
    trainer = dpo_trainer(tiny, tmp_path, model, processor, packed=True)
    compare_packing(trainer.model, trainer.data_collator, PAIRS, torch.float32)

    def without_the_tree(query, key, value, sees, scale=None):
        return F.scaled_dot_product_attention(query, key, value, is_causal=sees.causal, scale=scale)

    monkeypatch.setitem(BACKENDS, "split", without_the_tree)
    with pytest.raises(PackingIsWrong, match="predictions differ by .* Set packed: false"):
        compare_packing(trainer.model, trainer.data_collator, PAIRS, torch.float32)
