"""Which datasets a run's annotators work on, and what of earlier judgements they are not asked again."""

import re

import pytest

from align.recipe.config.preference import AnnotateConfig
from align.run_folder.artifacts import StageFolder
from align.stages import annotate
from align.stages.annotate import make_project
from preference_data import store
from preference_data.preferences import snapshots
from preference_data.schema import AXES, AudioClip, Comparison, Completion, Judgement, Prompt, comparison_id
from ui_annotation import assignment

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
    comparisons = {item.id for item in before.comparisons if item.purpose == "comparison"}
    assert comparisons <= {item.id for item in after.comparisons}


def test_runs_that_share_a_server_share_no_dataset(inputs):
    names = {project(inputs).name, project(inputs, run="runs/other").name}
    (inputs["0_corpus"] / "clips.jsonl").write_text("\n")
    names.add(project(inputs).name)
    assert len(names) == 3


def test_run_folders_whose_names_argilla_would_cut_or_change_share_no_dataset(inputs):
    runs = ["a b", "a-b", "a.b", "ä", "ö", "x" * 60, "x" * 61, "x" * 60 + "y"]
    names = {project(inputs, run=f"runs/{run}").name for run in runs}
    assert len(names) == len(runs)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name)


def test_simulated_annotators_start_anew_with_each_recipe(inputs):
    first, other = (project(inputs, fingerprint=mark, by="simulated") for mark in ("a" * 64, "b" * 64))
    assert first.name != other.name
    assert first.workspace == "audio-simulated"


def judged(comparisons, annotators=("ann", "bob")):
    """By everyone who has to."""
    return [
        assignment.unblind(item, name, dict.fromkeys(AXES, "a"), heard=1.0)
        for item in comparisons
        for name in (annotators if item.everyone else annotators[:1])
    ]


def snapshot(folder, judgements):
    return str(snapshots.keep(folder, judgements, url="http://another", datasets=["d"]))


def test_with_a_snapshot_of_everything_no_server_is_needed(inputs, tmp_path):
    """Neither another seed, nor fewer controls, nor another order of the completions asks anything again."""
    before = judged(project(inputs, retests=0.2).comparisons)
    named = snapshot(tmp_path / "elsewhere" / "snapshots", before)
    completions = inputs["3_sample"] / "completions.jsonl"
    store.write(completions, store.read(completions, Completion)[::-1])
    config = AnnotateConfig(**PEOPLE | {"seed": 5, "retests": 0.1, "snapshot": named})
    out = StageFolder(tmp_path / "runs" / "demo", "4_annotate", "f" * 64)
    out.open()
    metrics = annotate.run(config, inputs, out)
    assert not (tmp_path / "runs" / "demo" / "argilla").exists()
    assert (metrics["comparisons"], metrics["retests"], metrics["judgements"]) == (11, 1, 14)
    assert metrics["earlier_unused"] == len(before) - 14  # of retests that are not drawn now
    comparisons = store.read(out.path / "comparisons.jsonl", Comparison)
    of = {item.id: item for item in before}
    for item in store.read(out.path / "judgements.jsonl", Judgement):
        assert item == of[item.id]  # who, what, when, and for what it was asked
        assert item.comparison in {comparison.id for comparison in comparisons}
    assert (out.path / "quality.html").exists()


def test_what_a_snapshot_lacks_is_open(inputs, tmp_path):
    before = judged(project(inputs).comparisons)
    lacking = next(item for item in before if item.annotator == "bob")
    named = snapshot(tmp_path, [item for item in before if item.id != lacking.id])
    assert [item.id for item in project(inputs, snapshot=named).open()] == [lacking.comparison]


def test_peoples_judgements_of_this_run_count_without_a_name_and_simulated_never(inputs, tmp_path):
    first = project(inputs)
    snapshot(tmp_path / "runs" / "demo" / "snapshots", judged(first.comparisons))
    assert project(inputs, seed=3).open() == []
    assert len(project(inputs, run="runs/other", seed=3).open()) == len(first.comparisons)
    simulated = [
        item.model_copy(update={"annotator_kind": "simulated"}) for item in judged(first.comparisons)
    ]
    snapshot(tmp_path / "runs" / "third" / "snapshots", simulated)
    assert len(project(inputs, run="runs/third").open()) == len(first.comparisons)


@pytest.mark.parametrize("changed", [{"prompt_id": "elsewhere"}, {"texts": ("a", "c")}], ids=str)
def test_a_snapshot_of_other_completions_is_refused(inputs, tmp_path, changed):
    """All of it: of one that has anything of these the rest is counted as unused."""
    before = judged(project(inputs, overlap=0.0, retests=0.0).comparisons)
    others = []
    for item in before:
        other = item.model_copy(update=changed)
        name = comparison_id(other.prompt_id, other.texts)
        others.append(other.model_copy(update={"comparison": name, "id": f"{item.id}-other"}))
    named = snapshot(tmp_path / "other", others)
    with pytest.raises(annotate.OtherSnapshot, match=f"{named}: none of its 10 judgements.*remove the key"):
        project(inputs, snapshot=named)
    with pytest.raises(annotate.OtherSnapshot, match="none of its 0 judgements"):
        project(inputs, snapshot=snapshot(tmp_path / "empty", []))
    assert len(project(inputs, snapshot=snapshot(tmp_path / "both", [*others, before[0]])).earlier) == 11


def test_only_what_counts_is_brought_to_the_adjudicator(inputs):
    """Who did not listen, or called the clip unusable, has no vote that another could contradict."""
    drawn = project(inputs, overlap=1.0, retests=0.0)
    config = AnnotateConfig(**PEOPLE, adjudicator="eve")
    ann, bob = (
        [assignment.unblind(item, name, dict.fromkeys(AXES, side), heard=1.0) for item in drawn.comparisons]
        for name, side in (("ann", "a"), ("bob", "b"))
    )
    assert len(annotate.review_project(config, drawn, [*ann, *bob]).comparisons) == 10
    for unlike in ({"heard": 0.5}, {"heard": None}, {"audio_unusable": True}):
        uncounted = [item.model_copy(update=unlike) for item in bob]
        assert annotate.review_project(config, drawn, [*ann, *uncounted]).comparisons == []
