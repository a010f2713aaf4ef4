"""Which datasets a run's annotators work on: its own, and the same whatever harmless key changes."""

import pytest

from align.recipe.config.preference import AnnotateConfig
from align.run_folder.artifacts import StageFolder
from align.stages.annotate import make_project
from preference_data import store
from preference_data.schema import AudioClip, Completion, Prompt

PEOPLE = {"by": "people", "completions": "3_sample", "corpus": "0_corpus", "stage": "annotate", "seed": 0}


@pytest.fixture
def inputs(tmp_path):
    folders = {"0_corpus": tmp_path / "0_corpus", "3_sample": tmp_path / "3_sample"}
    prompts = [
        Prompt(id=f"p{i}", audios=("a.wav",), question="?", answer_gt=str(i), meta_info="{}", task_name="t")
        for i in range(10)
    ]
    completions = [
        Completion(id=f"{prompt.id}{text}", prompt_id=prompt.id, index=i, text=text, policy="x")
        for prompt in prompts
        for i, text in enumerate("ab")
    ]
    store.write(folders["3_sample"] / "prompts.jsonl", prompts)
    store.write(folders["3_sample"] / "completions.jsonl", completions)
    clip = AudioClip(id="a", path="a.wav", split="train", duration_s=1, sha256="0" * 64)
    store.write(folders["0_corpus"] / "clips.jsonl", [clip])
    return folders


def project(inputs, run="runs/demo", fingerprint="f" * 64, **changed):
    return make_project(
        AnnotateConfig(**PEOPLE | changed),
        inputs,
        StageFolder(inputs["0_corpus"].parent / run, "4_annotate", fingerprint),
    )


@pytest.mark.parametrize(
    "changed",
    [{"retests": 0.5}, {"overlap": 0.9}, {"enough": 0.5}, {"min_heard": 0.5}, {"annotators": 3}],
    ids=str,
)
def test_people_go_on_where_they_were(inputs, changed):
    before, after = project(inputs), project(inputs, fingerprint="another", **changed)
    assert after.name == before.name
    comparisons = {one.id for one in before.comparisons if one.purpose == "comparison"}
    assert comparisons <= {one.id for one in after.comparisons}


def test_runs_that_share_a_server_share_no_dataset(inputs):
    names = {project(inputs).name, project(inputs, run="runs/other").name}
    (inputs["0_corpus"] / "clips.jsonl").write_text("\n")
    names.add(project(inputs).name)
    assert len(names) == 3


def test_simulated_annotators_start_anew_with_each_recipe(inputs):
    one, other = (project(inputs, fingerprint=mark, by="simulated") for mark in ("a" * 64, "b" * 64))
    assert one.name != other.name
    assert one.workspace == "audio-simulated"
