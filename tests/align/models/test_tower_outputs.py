"""Outputs of a frozen tower on disk: the same bits whether found or made, killed writers, full disks."""

import logging
import multiprocessing
import os
import resource
import shutil
import time

import pytest
import torch

from align.models.features import ClipFeatures, SilentClips
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.clips import PackedClips, n_audio_tokens, pack_audio, stack_unpadded
from align.models.qwen2_audio.flops import cost_of
from align.models.qwen2_audio.packed import keep_tower_outputs, pack_for_inference
from align.models.tower_outputs import FOLDER, Outputs, TowerOutputs, digest

GB = 10**9
CPU = torch.device("cpu")
NAMES = [f"{i:064x}" for i in range(40)]


def outputs_of(number):
    """Some that tell which clip they are of."""
    draw = torch.Generator().manual_seed(number)
    return Outputs(torch.randn(75, 512, generator=draw), 300 + number)


def assert_same(found, number):
    assert found is not None
    assert found.n_frames == 300 + number
    assert torch.equal(found.vectors, outputs_of(number).vectors)


# -------------------------------------------------------------------------- the store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_put_is_found_in_its_dtype(tmp_path, dtype):
    vectors = outputs_of(3).vectors.to(dtype)
    TowerOutputs(tmp_path / "tower", GB).put(NAMES[3], Outputs(vectors, 303))
    found = TowerOutputs(tmp_path / "tower", GB).get(NAMES[3])
    assert found.n_frames == 303
    assert found.vectors.dtype == dtype
    assert torch.equal(found.vectors, vectors)
    assert TowerOutputs(tmp_path / "tower", GB).get(NAMES[4]) is None
    assert TowerOutputs(tmp_path / "another", GB).get(NAMES[3]) is None


def spoil_bit(path):
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def replace_by_another(path):
    shutil.copyfile(path.parents[1] / NAMES[1][:2] / f"{NAMES[1]}.safetensors", path)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [spoil_bit, cut, empty, replace_by_another, replace_by_folder])
def test_a_damaged_file_is_not_believed_and_is_made_again(tmp_path, spoil, caplog):
    tower_outputs = TowerOutputs(tmp_path / "tower", GB)
    for i in range(2):
        tower_outputs.put(NAMES[i], outputs_of(i))
    path = tmp_path / "tower" / "00" / f"{NAMES[0]}.safetensors"
    spoil(path)
    assert tower_outputs.get(NAMES[0]) is None
    assert "is damaged; it is made again" in caplog.text
    assert_same(tower_outputs.get(NAMES[1]), 1)
    if path.is_file():
        tower_outputs.put(NAMES[0], outputs_of(0))
        assert_same(tower_outputs.get(NAMES[0]), 0)


FORK = multiprocessing.get_context("fork")


def _write_for_ever(folder, begins):
    tower_outputs, outputs = TowerOutputs(folder, GB), [outputs_of(i) for i in range(40)]
    begins.set()
    while True:
        for name, own in zip(NAMES, outputs, strict=True):
            tower_outputs.put(name, own)


def test_a_killed_writer_leaves_nothing_damaged(tmp_path, caplog):
    folder = tmp_path / "tower"
    for attempt in range(3):
        begins = FORK.Event()
        writer = FORK.Process(target=_write_for_ever, args=(folder, begins))
        writer.start()
        assert begins.wait(60)
        time.sleep(0.1 + 0.013 * attempt)
        writer.kill()
        writer.join()
    tower_outputs = TowerOutputs(folder, GB)
    found = [tower_outputs.get(name) for name in NAMES]
    assert any(found)
    for number, own in enumerate(found):
        if own is not None:
            assert_same(own, number)
    assert not caplog.text
    left = list((folder / "partial").iterdir())
    for path in left:
        os.utime(path, (0, 0))
    tower_outputs.clean()
    assert not list((folder / "partial").iterdir())


def _write_and_read(folder, first):
    tower_outputs = TowerOutputs(folder, GB)
    for i in [*range(first, 40), *range(first)]:
        tower_outputs.put(NAMES[i], outputs_of(i))
        other = (i * 7) % 40
        if (found := tower_outputs.get(NAMES[other])) is not None:
            assert_same(found, other)


def test_two_processes_write_and_read_the_same_clips_at_once(tmp_path):
    workers = [FORK.Process(target=_write_and_read, args=(tmp_path / "t", first)) for first in (0, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    tower_outputs = TowerOutputs(tmp_path / "t", GB)
    for i in range(40):
        assert_same(tower_outputs.get(NAMES[i]), i)
    assert not list((tmp_path / "t" / "partial").iterdir())


def _write_into_little_room(folder):
    logging.basicConfig(filename=f"{folder}.log", force=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a file would have 154 kB
    tower_outputs = TowerOutputs(folder, GB)
    for i in range(3):
        tower_outputs.put(NAMES[i], outputs_of(i))
        assert tower_outputs.get(NAMES[i]) is None


def test_a_write_that_fails_is_said_once_and_stops_nothing(tmp_path):
    writer = FORK.Process(target=_write_into_little_room, args=(tmp_path / "t",))
    writer.start()
    writer.join()
    assert writer.exitcode == 0
    said = (tmp_path / "t.log").read_text()
    assert said.count("no more outputs of the audio tower are kept") == 1
    assert "File too large" in said
    assert [path for path in (tmp_path / "t").rglob("*") if path.is_file()] == []


def test_beyond_the_limit_other_towers_give_way_then_nothing_is_stored(tmp_path, caplog):
    old, older = TowerOutputs(tmp_path / "old", GB), TowerOutputs(tmp_path / "older", GB)
    for i in range(3):
        older.put(NAMES[i], outputs_of(i))
        old.put(NAMES[i], outputs_of(i))
    os.utime(older.folder, (1, 1))
    limited = TowerOutputs(tmp_path / "new", 850_000)  # five files
    for i in range(3):
        limited.put(NAMES[i], outputs_of(i))
    assert not older.folder.exists()
    assert not old.folder.exists()  # the third would have been the sixth
    assert not caplog.text
    for i in range(3, 9):
        limited.put(NAMES[i], outputs_of(i))
    assert [limited.get(NAMES[i]) is not None for i in range(9)] == [True] * 5 + [False] * 4
    assert caplog.text.count("0.00085 GB are full") == 1


def test_what_is_not_ours_stops_nothing(tmp_path, caplog):
    run = tmp_path / "file"
    run.mkdir()
    (run / FOLDER).write_text("of somebody else")
    tower_outputs = TowerOutputs(run / FOLDER / "tower", 10**6)
    tower_outputs.clean()
    assert tower_outputs.get(NAMES[0]) is None
    assert not caplog.text
    tower_outputs.put(NAMES[0], outputs_of(0))
    assert "no more outputs" in caplog.text

    tower_outputs = TowerOutputs(tmp_path / "run" / FOLDER / "tower", 10**6)
    (tower_outputs.folder / "partial" / "folder").mkdir(parents=True)
    os.utime(tower_outputs.folder / "partial" / "folder", (0, 0))
    tower_outputs.clean()
    large = tower_outputs.folder.parent / "large"  # cannot be removed as a folder of another tower
    large.write_bytes(bytes(10**6))
    tower_outputs.put(NAMES[0], outputs_of(0))
    assert large.exists()
    assert tower_outputs.get(NAMES[0]) is None


# -------------------------------------------------------------------------- in the packed backbone


@pytest.fixture(scope="module")
def policy(tmp_path_factory, tiny):
    """A packed model whose tower has enough parameters, and its processor."""
    processor = qwen2_audio.load_processor(tiny.policy)
    model = qwen2_audio.build_model(processor, d_model=160, heads=2, audio_layers=4, text_layers=1, seed=0)
    return pack_for_inference(model.eval()), processor


CLIPS = [f"{i}.wav" for i in range(4)]


def hidden(policy, root, rows, tower_outputs):
    """The batch of rows of clips, hidden states of it, and the gradient of the projector."""
    model, processor = policy
    clips = ClipFeatures(processor, root).per_row(rows, tower_outputs)
    audio_id = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    n_tokens = [sum(n_audio_tokens(clip.n_frames) for clip in own) for own in clips]
    ids = [[5, *[audio_id] * n, 7 + i] for i, n in enumerate(n_tokens)]
    batch = pack_audio(processor, ids, clips)
    model.zero_grad()
    states = model.model(**batch).last_hidden_state
    states.square().sum().backward()
    return batch, states.detach(), model.model.multi_modal_projector.linear.weight.grad.clone()


ROWS = [["0.wav"], ["1.wav", "2.wav"], ["0.wav"]]


def test_found_outputs_give_the_same_bits_as_those_just_made(policy, tiny, tmp_path):
    tower_outputs = keep_tower_outputs(policy[0], tmp_path)
    first, made, made_grad = hidden(policy, tiny.audio, ROWS, tower_outputs)
    second, found, found_grad = hidden(policy, tiny.audio, ROWS, tower_outputs)
    assert first["input_features"].shape[0] == 3  # 0.wav once
    assert "input_features" not in second
    assert torch.equal(made, found)
    assert torch.equal(made_grad, found_grad)
    partly, mixed, _ = hidden(policy, tiny.audio, [["3.wav"], ["2.wav"]], tower_outputs)
    assert partly["input_features"].shape[0] == 1
    _, others, _ = hidden(policy, tiny.audio, [["3.wav"], ["2.wav"]], tower_outputs)
    assert torch.equal(mixed, others)


def test_the_outputs_are_those_of_each_clip_alone(policy, tiny, tmp_path):
    """In a batch the last bits are others: matrix products of other sizes add up in another order."""
    model, processor = policy
    tower_outputs = keep_tower_outputs(model, tmp_path)
    hidden(policy, tiny.audio, ROWS, tower_outputs)
    features = ClipFeatures(processor, tiny.audio)
    for path in ("0.wav", "1.wav", "2.wav"):
        (clip,) = features([path])
        with torch.no_grad():
            alone = model.model._encode(
                stack_unpadded([clip])["input_features"], PackedClips.of([clip.n_frames])
            )
        assert torch.equal(tower_outputs.get(features.name(path)).vectors, alone)
    _, with_store, grad = hidden(policy, tiny.audio, ROWS, tower_outputs)
    _, without, twin_grad = hidden(policy, tiny.audio, ROWS, None)
    torch.testing.assert_close(with_store, without, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, twin_grad, rtol=1e-4, atol=1e-4)


def test_a_full_folder_changes_no_bit(policy, tiny, tmp_path):
    _, usual, _ = hidden(policy, tiny.audio, ROWS, keep_tower_outputs(policy[0], tmp_path))
    full = TowerOutputs(tmp_path / "full", 0)
    policy[0].model.tower_outputs = full
    for _ in range(2):
        batch, states, _ = hidden(policy, tiny.audio, ROWS, full)
        assert batch["input_features"].shape[0] == 3
        assert torch.equal(states, usual)


def test_useful_work_leaves_out_what_was_found(policy, tiny, tmp_path):
    model, processor = policy
    model.model.audio_tower.requires_grad_(False)
    tower_outputs, cost = keep_tower_outputs(model, tmp_path), cost_of(model)
    plain, made, found = (
        hidden(policy, tiny.audio, ROWS, where)[0]["packed"] for where in (None, tower_outputs, tower_outputs)
    )
    assert cost.of(made) == cost.of(plain)
    in_tower = cost.frame * plain.clips.n_encoded + cost.frame_pair * plain.clips.n_pairs
    assert cost.of(found) == pytest.approx(cost.of(plain) - in_tower)
    assert in_tower > 0


def test_names_tell_clips_and_ways_of_hearing_apart(policy, tiny, tmp_path):
    processor = policy[1]
    features = ClipFeatures(processor, tiny.audio)
    names = [features.name(path) for path in CLIPS]
    assert len(set(names)) == 4
    shutil.copyfile(tiny.audio / "0.wav", tmp_path / "same sound.wav")
    assert ClipFeatures(processor, tmp_path).name("same sound.wav") == names[0]
    assert SilentClips(processor, tiny.audio).name("0.wav") != names[0]
    other = qwen2_audio.build_processor(["a"], vocab_size=300, mel_bins=32, hop_length=160, clip_s=1)
    assert ClipFeatures(other, tiny.audio).name("0.wav") != names[0]


def test_a_tower_is_told_by_its_weights(policy, tiny, tmp_path):
    tower = policy[0].model.audio_tower
    before = digest(tower, CPU)
    assert digest(tower, CPU) == before
    with torch.no_grad():
        weight = tower.layers[2].fc1.bias
        weight[7] += 1e-6
        assert digest(tower, CPU) != before
        weight[7] -= 1e-6
    assert keep_tower_outputs(policy[0], tmp_path).folder.parent == tmp_path / FOLDER
    assert keep_tower_outputs(policy[0], None) is None
    small = pack_for_inference(qwen2_audio.load_model(tiny.policy))
    assert keep_tower_outputs(small, tmp_path) is None
    assert small.model.tower_outputs is None
