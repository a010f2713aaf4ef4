"""Batches are kept, resumed and shared out; what comes out does not depend on any of it."""

import os
from functools import partial

import pytest
import ray

from align.generation.complete import RequestSet, complete_all, first_texts
from align.generation.engine import Decoding, Request
from align.generation.transformers_engine import TransformersEngine
from align.models.features import ClipFeatures
from align.models.qwen2_audio.model import load_processor

DRAWN = Decoding(max_new_tokens=8, temperature=1.0, completions=2)


@pytest.fixture
def make_engine(toy, tiny):
    return partial(TransformersEngine, toy, ClipFeatures(load_processor(toy), tiny.audio))


@pytest.fixture
def sets(toy, tiny):
    """Two sets whose clips lie in different folders."""
    clips = ClipFeatures(load_processor(toy), tiny.audio)
    other = ClipFeatures(load_processor(toy), tiny.audio.parent)
    asked = ["Is the tone high or low?", "high?"]
    return [
        RequestSet("chats", clips, [Request(asked[i % 2], (f"{i % 4}.wav",)) for i in range(7)]),
        RequestSet("others", other, [Request(asked[i % 2], (f"audio/{i}.wav",)) for i in range(3)]),
    ]


class Interrupted(Exception):
    """Raised in the middle of a run."""


def run(make_engine, sets, folder=None, *, batch_size=3, seed=0, **more):
    return complete_all(make_engine, sets, DRAWN, seed=seed, batch_size=batch_size, folder=folder, **more)


def tokens(found):
    return {name: [[c.token_ids for c in group] for group in groups] for name, groups in found.items()}


def test_an_interrupted_run_goes_on_and_ends_with_the_same(make_engine, sets, tmp_path):
    whole = run(make_engine, sets)
    assert [len(whole["chats"]), len(whole["others"]), len(whole["chats"][0])] == [7, 3, 2]
    assert first_texts(whole["others"]) == [group[0].text for group in whole["others"]]

    def stop(done):
        if done >= 6:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(make_engine, sets, tmp_path, on_progress=stop)
    assert [path.name for path in sorted((tmp_path / "chats").iterdir())] == [
        "00000000.json",
        "00000003.json",
    ]
    counted, made = [], []

    def counting():
        engine = make_engine()
        complete = engine.complete
        engine.complete = lambda numbered, *rest: made.append(list(numbered)) or complete(numbered, *rest)
        return engine

    assert run(counting, sets, tmp_path, on_progress=counted.append) == whole
    assert made == [[6], [0, 1, 2]]
    assert counted == [6, 7, 10]
    assert run(None, sets, tmp_path) == whole  # nothing is missing: no engine is made


def test_batch_size_does_not_matter_even_in_the_middle(make_engine, sets, tmp_path):
    whole = run(make_engine, sets)
    assert tokens(run(make_engine, sets, batch_size=1)) == tokens(whole)

    def stop(done):
        if done >= 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(make_engine, sets, tmp_path, on_progress=stop)
    assert tokens(run(make_engine, sets, tmp_path, batch_size=5)) == tokens(whole)
    assert run(None, sets, tmp_path)["chats"][0] == whole["chats"][0]


def test_another_seed_draws_others(make_engine, sets):
    assert tokens(run(make_engine, sets, seed=1)) != tokens(run(make_engine, sets))


def noting_gpus(folder, make_engine):
    """An engine, and a file named by the GPUs that its process may see."""
    (folder / os.environ.get("CUDA_VISIBLE_DEVICES", "all")).touch()
    return make_engine()


@pytest.mark.slow
def test_the_number_of_workers_does_not_matter_and_each_has_its_own_gpu(make_engine, sets, tmp_path):
    """Two Ray actors; the cluster says that it has GPUs, this process, as on a cluster's head, has none."""
    whole = run(make_engine, sets)
    counted = []
    seen = tmp_path / "seen"
    seen.mkdir()
    ray.init(num_gpus=2, include_dashboard=False, log_to_driver=False)
    noting = partial(noting_gpus, seen, make_engine)
    found = run(noting, sets, tmp_path, workers=3, on_progress=counted.append)
    assert tokens(found) == tokens(whole)
    assert counted[-1] == 10
    assert run(None, sets, tmp_path) == found
    assert sorted(path.name for path in seen.iterdir()) == ["0", "1"]
