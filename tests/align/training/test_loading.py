"""From manifests to batches: in workers as without them, with bad clips replaced, losses told apart."""

import json
import math
import shutil
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader
from trl import SFTConfig

from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.run_folder.artifacts import Interrupted, StageFolder, read_metrics, stop_requested
from align.training.augmentation import Augmentation
from align.training.collate import SFTCollator
from align.training.data_loading import ABOUT, Examples, Part, ReplacingCollator, loader_arguments
from align.training.methods import Schedule
from align.training.monitoring import TaskLosses, TooManyBadClips
from align.training.run import arguments, fit
from align.training.trainers import AudioSFTTrainer
from align.training.tuning import Tuning
from preference_data import store
from preference_data.audio.clip_files import BadAudio
from preference_data.dataset.manifest import open_manifest
from preference_data.schema import TaskExample


def row(example, prompt):
    text = f"<|audio_bos|><|AUDIO|><|audio_eos|>{prompt}"
    return {"messages": None, "prompt": text, "completion": example.text, "audios": list(example.audios)}


def feed(policy, audio, folder, n, clips=4):
    """Examples of two sources with a task each, and what collates them."""
    parts = []
    for name, task, text in (("one", "caption", "A low tone."), ("two", "transcribe", "The tone is high.")):
        path = folder / f"{name}.jsonl"
        store.write(
            path,
            [TaskExample(id=f"{i}", audios=(f"{i}.wav",), task=task, text=text) for i in range(clips)],
        )
        parts.append(Part(name, open_manifest(path, TaskExample), 0.5, partial(row, prompt="Caption:")))
    processor = qwen2_audio.load_processor(policy)
    examples = Examples(parts, n, seed=0)
    collator = SFTCollator(processor, ClipFeatures(processor, audio), Augmentation(gain=0.2, time_mask=4))
    return examples, ReplacingCollator(collator, examples)


@pytest.fixture
def audio(tiny, tmp_path):
    """A copy of the clips that a test may break."""
    return shutil.copytree(tiny.audio, tmp_path / "audio")


def batches(examples, collator, **loading):
    return list(DataLoader(examples, batch_size=4, collate_fn=collator, **loading))


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]


def test_workers_make_the_same_batches(tiny, tmp_path):
    examples, collator = feed(tiny.policy, tiny.audio, tmp_path, 12)
    alone = batches(examples, collator)
    how = loader_arguments({"dataloader_num_workers": 2})["dataloader_multiprocessing_context"]
    by_workers = batches(examples, collator, num_workers=2, multiprocessing_context=how)
    assert len(alone) == len(by_workers) == 3
    for left, right in zip(alone, by_workers, strict=True):
        assert_same(left, right)


def test_a_broken_clip_gives_way_to_the_next_of_its_source(tiny, audio, tmp_path):
    examples, collator = feed(tiny.policy, audio, tmp_path, 16)
    (audio / "1.wav").write_bytes(b"<html>404</html>")
    (audio / "2.wav").unlink()
    found = batches(examples, collator)
    rows = [examples[n] for n in range(16)]
    broken = [n for n in range(16) if rows[n]["audios"][0] in ("1.wav", "2.wav")]
    assert len(broken) >= 4
    told = [text for batch in found for text in batch[ABOUT]["replaced"]]
    tries = sum(2 if rows[n]["audios"] == ["1.wav"] else 1 for n in broken)  # 1 -> 2 -> 3
    assert len(told) == tries
    assert any("missing" in text for text in told)
    assert any("git" not in text and "unreadable" in text for text in told)
    assert [source for batch in found for source in batch[ABOUT]["sources"]] == [r["source"] for r in rows]
    again = batches(examples, feed(tiny.policy, audio, tmp_path, 16)[1])
    for left, right in zip(found, again, strict=True):
        assert_same(left, right)
    for path in audio.iterdir():
        path.unlink()
    with pytest.raises(BadAudio, match="missing"):
        batches(*feed(tiny.policy, audio, tmp_path, 4))


def test_loader_settings(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loader_arguments({}) == {"dataloader_num_workers": 0}
    two = {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "forkserver"}
    assert loader_arguments({"dataloader_num_workers": 2}) == two


# -------------------------------------------------------------------------- tally


def about(tasks, replaced=()):
    return {"tasks": tasks, "sources": [""] * len(tasks), "replaced": list(replaced)}


def test_losses_are_told_per_task_by_token():
    tally = TaskLosses()
    log_probs = torch.tensor([[-1.0, -3.0, 0.0], [-2.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    tally.add(about(["caption", "transcribe"]), log_probs, mask)
    tally.add(about(["caption"]), torch.tensor([[-5.0]]), torch.tensor([[1]]))
    assert tally.take() == {"loss/task/caption": 3.0, "loss/task/transcribe": 2.0}
    assert tally.take() == {}


def test_too_many_bad_clips_stop_the_run():
    tally = TaskLosses()
    one = torch.zeros(100, 1), torch.ones(100, 1)
    tally.add(about(["caption"] * 100, ["x.wav: missing"] * 10), *one)
    assert tally.take()["replaced_clips"] == 10  # as many as 1 % of 1000 would be
    tally.add(about(["caption"] * 100, ["y.wav: missing"]), *one)
    with pytest.raises(TooManyBadClips, match=r"11 clips of 200 .*1\.0%.*y\.wav: missing"):
        tally.take()


# -------------------------------------------------------------------------- a run


def trainer(tiny, out, tmp_path, **passed_on):
    examples, collator = feed(tiny.policy, tiny.audio, tmp_path, 8 * 4)
    loading = {**loader_arguments(passed_on), **passed_on}
    options = arguments(
        out.path,
        Schedule(8, 4, 1e-2, 2, 0),
        tuning=Tuning(),
        trl={"train_sampling_strategy": "sequential", "logging_steps": 1, **loading},
    )
    return AudioSFTTrainer(
        model=qwen2_audio.load_model(tiny.policy),
        args=SFTConfig(**options),
        train_dataset=examples,
        data_collator=collator,
        processing_class=qwen2_audio.load_processor(tiny.policy),
    )


def folder(path):
    out = StageFolder(path, "1_pretrain", "fingerprint")
    out.open()
    return out


def test_stopped_and_resumed_with_accumulation_the_weights_are_those_of_the_undisturbed_run(tiny, tmp_path):
    one, other = folder(tmp_path / "one"), folder(tmp_path / "other")
    whole = trainer(tiny, one, tmp_path)
    fit(whole, one)
    first = trainer(tiny, other, tmp_path)
    stepped = first.training_step

    def stop_at_3(*args, **kwargs):
        if first.state.global_step == 3:
            stop_requested.set()
        return stepped(*args, **kwargs)

    first.training_step = stop_at_3
    with pytest.raises(Interrupted):
        fit(first, other)
    stop_requested.clear()
    second = trainer(tiny, other, tmp_path)
    fit(second, other)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    rows, resumed = (read_metrics(path.path / "metrics.jsonl") for path in (one, other))
    assert [r["loss"] for r in rows] == [r["loss"] for r in resumed]
    last = rows[-1]
    assert {name for name in last if name.startswith("loss/")} == {
        "loss/task/caption",
        "loss/task/transcribe",
        "loss/source/one",
        "loss/source/two",
    }
    assert min(last["loss/task/caption"], last["loss/task/transcribe"]) <= last["loss"]
    assert last["loss"] <= max(last["loss/task/caption"], last["loss/task/transcribe"])
    assert all(math.isfinite(value) for value in json.loads(json.dumps(last)).values())
