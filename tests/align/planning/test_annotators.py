"""Hours that a recipe asks of people, before the run and from what a run has left."""

import pytest

from align.planning import annotators
from align.recipe.recipe import load
from preference_data import store
from preference_data.preferences.working_time import ENOUGH
from preference_data.schema import AudioClip, Judgement, Prompt

FILES = {
    "0_corpus": "stage: corpus\ncorpus: synthetic\nclips: {train: 9, preference: 100, dev: 9, test: 9}\n",
    "1_sample": "stage: sample\npolicy: owner/base\ncorpus: 0_corpus\ncompletions_per_prompt: 2\n",
    "2_annotate": "stage: annotate\ncompletions: 1_sample\ncorpus: 0_corpus\nby: people\nannotators: 3\n",
}


@pytest.fixture
def recipe(tmp_path):
    def recipe(*overrides, **changed):
        for name, text in {**FILES, **{key.removeprefix("s"): text for key, text in changed.items()}}.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return load(tmp_path, list(overrides))

    return recipe


def line(recipe, run):
    found = [text for step in recipe.steps for text in annotators.lines(step, recipe, run)]
    assert len(found) <= 1
    return "".join(found)


def test_made_clips_are_counted_before_the_run(recipe, tmp_path):
    """70 pairs, 7 retests, 4 gold (of 3.5) for one; 30, 3, 2 (of 1.5) for three: 81 + 105 judgements."""
    text = line(recipe(), tmp_path / "run")
    assert text.startswith("2_annotate: up to 186 judgements, 1.2 h of annotators' time: 9 min of clips")
    assert text.endswith("10 s per completion to read and decide (assumed, not measured)")
    # 7 comparisons and 1 retest for one, 3 for three
    fewer = line(recipe("2_annotate.max_comparisons=10"), tmp_path / "run")
    judge = "2_annotate.judge={model: m, url: 'http://a/v1', hears: true}"
    half = line(
        recipe("2_annotate.max_comparisons=20", "2_annotate.people_share=0.5", judge), tmp_path / "run"
    )
    assert half == fewer
    assert fewer.startswith("2_annotate: up to 17 judgements")
    # of three there are three pairs, and one comparison of all three
    pairs = recipe("1_sample.completions_per_prompt=3", "2_annotate.overlap=0")
    assert "up to 345 judgements" in line(pairs, tmp_path / "run")
    ranked = recipe(
        "1_sample.completions_per_prompt=3", "2_annotate.overlap=0", "2_annotate.completions_per_comparison=3"
    )
    assert "up to 115 judgements, 1.1 h" in line(ranked, tmp_path / "run")  # of 3 s and 3 times 10 s
    assert line(recipe("2_annotate.by=simulated"), tmp_path / "run") == ""


def test_of_own_recordings_it_is_told_what_is_not_known(recipe, tmp_path):
    corpus = "stage: corpus\ncorpus: folder\ndir: recordings\nmax_duration_s: 18\n"
    text = line(recipe(s0_corpus=corpus), tmp_path / "run")
    assert text.startswith("2_annotate: up to 1,840 judgements, 19.4 h of annotators' time: 9.2 h of clips")
    assert text.endswith(
        "; of 1,000 prompts, for their number is not known yet; clips are taken to last 18 s"
    )


def test_what_a_run_has_left_comes_before_assumptions(recipe, tmp_path):
    """Forty prompts about clips of 5 s, judged at 9 s: 2 s per completion beside the clip."""
    run = tmp_path / "run"
    unused = {"question": "?", "answer_gt": "", "meta_info": "{}", "task_name": "t"}
    prompts = [Prompt(id=f"p{i}", audios=(f"{i}.wav",), **unused) for i in range(40)]
    clips = [
        AudioClip(id=f"c{i}", path=f"{i}.wav", split="preference", duration_s=5, sha256="0" * 64)
        for i in range(50)
    ]
    judgements = [
        Judgement(
            id=f"j{i}", comparison="c", prompt_id="p0", completions=("a", "b"), texts=("a", "b"),
            kind="choice", annotator="ann", annotator_kind="person", seconds=9.0,
        )
        for i in range(ENOUGH)
    ]  # fmt: skip
    store.write(run / "1_sample/prompts.jsonl", prompts)
    store.write(run / "0_corpus/clips.jsonl", clips)
    store.write(run / "snapshots/0001-x/judgements.jsonl", judgements)
    assert "up to 186 judgements" in line(recipe(), run)  # not finished
    for name in ("0_corpus", "1_sample"):
        (run / name / "manifest.json").write_text("{}")
    text = line(recipe(), run)
    # 28 comparisons, 3 retests and 1 gold for one; 12, 1 and 1 for three: 32 + 42 judgements, each of 9 s
    assert text == (
        "2_annotate: up to 74 judgements, 11 min of annotators' time: 6 min of clips, each played once a "
        f"judgement, and 2 s per completion to read and decide (median of {ENOUGH} earlier judgements)"
    )
