"""The reference's log-probs: TRL's own numbers, computed once for what they depend on."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.packed import pack
from align.run_folder.artifacts import sha256_file
from align.training.collate import PreferenceCollator
from align.training.data_loading import Rows
from align.training.methods import Schedule
from align.training.reference import ReferenceStore, batches_of, processor_digest
from align.training.run import arguments
from align.training.trainers import AudioDPOTrainer
from align.training.tuning import Tuning

NAMES = AudioDPOTrainer.logp_columns
QUESTION = "Is the tone high or low?"
ROWS = [
    {"prompt": QUESTION, "chosen": "The tone is high.", "rejected": "low", "audios": ["0.wav"]},
    {"prompt": QUESTION, "chosen": "The tone is low.", "rejected": "A low tone.", "audios": ["1.wav"]},
    {"prompt": "high?", "chosen": "low", "rejected": "The tone is high.", "audios": ["2.wav", "1.wav"]},
    {"prompt": "user?", "chosen": "assistant", "rejected": "system", "audios": []},
    {"prompt": QUESTION, "chosen": "high", "rejected": "", "audios": ["3.wav"]},
]


def store_of(tiny, folder):
    return ReferenceStore(folder, {path.name: sha256_file(path) for path in tiny.audio.iterdir()})


def make_trainer(tiny, folder, store=None, rows=ROWS, packed=True, lora=False, spoil=None, **passed_on):
    processor, model = qwen2_audio.load_processor(tiny.policy), qwen2_audio.load_model(tiny.policy)
    if spoil:
        spoil(model, processor)
    passed_on = {"precompute_ref_log_probs": True, **passed_on}
    options = arguments(
        folder,
        Schedule(2, 2, 1e-3, 1, 0),
        tuning=Tuning(),
        trl=passed_on,
    )
    target = r".*q_proj|.*linear"
    return AudioDPOTrainer(
        model=pack(model) if packed else model,
        args=DPOConfig(**options),
        train_dataset=Rows([{"weight": 1.0, **row} for row in rows]),
        data_collator=PreferenceCollator(processor, ClipFeatures(processor, tiny.audio), packed),
        processing_class=processor,
        peft_config=LoraConfig(r=2, target_modules=target, lora_dropout=0.5) if lora else None,
        reference=store,
    )


def logps(trainer):
    return torch.tensor([trainer.train_dataset.columns[name] for name in NAMES])


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("packed", [False, True], ids=["stock", "packed"])
def test_the_numbers_are_those_that_trl_computes(tiny, tmp_path, packed, lora):
    trainer = make_trainer(tiny, tmp_path, packed=packed, lora=lora)
    if lora:
        with torch.no_grad():  # a new adapter changes nothing: it must be off, not new
            for name, weight in trainer.model.named_parameters():
                if "lora_B" in name:
                    weight.fill_(0.1)
    rows = Dataset.from_list(trainer.train_dataset.dataset.rows)
    theirs = DPOTrainer._precompute_ref_logps(trainer, rows, "train", 2)
    torch.testing.assert_close(
        logps(trainer), torch.tensor([theirs[name] for name in NAMES]), rtol=1e-6, atol=1e-6
    )
    assert logps(trainer).max() < -1


def test_what_is_known_is_read_and_not_computed(tiny, tmp_path):
    store = store_of(tiny, tmp_path / "store")
    first = make_trainer(tiny, tmp_path, store)
    (saved,) = store.folder.iterdir()
    assert json.loads(saved.read_text())[NAMES[0]] == first.train_dataset.columns[NAMES[0]]
    saved.write_text(json.dumps({name: [-7.0] * 5 for name in NAMES}))
    reweighed = [{**row, "weight": 2.0} for row in ROWS]
    again = make_trainer(tiny, tmp_path, store, reweighed, per_device_train_batch_size=1, beta=0.5)
    assert (logps(again) == -7).all()


def other_weights(model, processor):
    with torch.no_grad():
        model.model.language_model.norm.weight[0] += 0.01


def other_template(model, processor):
    processor.chat_template = processor.chat_template.replace("helpful", "kind")


OTHERS = {
    "weights": {"spoil": other_weights},
    "template": {"spoil": other_template},
    "answer": {"rows": [*ROWS[:4], {**ROWS[4], "rejected": "low"}]},
    "order": {"rows": ROWS[::-1]},
    "path": {"packed": False},
    "ld_alpha": {"ld_alpha": 0.5},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_depends_on_something_else_is_computed_anew(tiny, tmp_path, what):
    store = store_of(tiny, tmp_path / "store")
    make_trainer(tiny, tmp_path, store)
    make_trainer(tiny, tmp_path, store, **OTHERS[what])
    assert len(list(store.folder.iterdir())) == 2


def test_a_clip_that_has_changed_under_its_name_is_heard_anew(tiny, tmp_path):
    store = store_of(tiny, tmp_path / "store")
    make_trainer(tiny, tmp_path, store)
    make_trainer(tiny, tmp_path, ReferenceStore(store.folder, {**store.clips, "0.wav": "0" * 64}))
    make_trainer(tiny, tmp_path, ReferenceStore(store.folder, {**store.clips, "not used.wav": "0" * 64}))
    assert len(list(store.folder.iterdir())) == 2


def test_the_features_are_part_of_how_rows_are_read(tiny):
    processor = qwen2_audio.load_processor(tiny.policy)
    before = processor_digest(processor)
    assert processor_digest(qwen2_audio.load_processor(tiny.policy)) == before
    processor.feature_extractor.hop_length *= 2
    assert processor_digest(processor) != before


def test_every_rank_makes_as_many_passes():
    shares = [batches_of(rank, 3, n=9, size=2) for rank in range(3)]
    assert shares[0] == [range(0, 2), range(6, 8)]
    assert shares[1] == [range(2, 4), range(8, 9)]
    assert shares[2] == [range(4, 6), range(8, 9)]  # none is left for it
