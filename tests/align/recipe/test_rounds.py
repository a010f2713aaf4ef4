"""Rounds written once: the stages that they become, and where their mistakes are reported."""

import re

import pytest

from align.recipe.recipe import RecipeError, load

BEFORE = {
    "0_corpus": "stage: corpus\ncorpus: synthetic\nclips: {train: 8, preference: 4, dev: 4, test: 4}\n",
    "1_pretrain": "stage: pretrain\nmodel: {}\ncorpus: 0_corpus\nsteps: 2\nbatch_size: 2\n"
    "learning_rate: 1.0e-3\n",
}
ROUNDS = """stage: rounds
rounds: 2
policy: 1_pretrain
corpus: 0_corpus
seed: 5
sample: {completions_per_prompt: 8}
score:
  reward: {facts: {}}
pairs: {margin: 0.1}
dpo:
  beta: 0.2
  batch_size: 2
  learning_rate: 1.0e-5
  epochs: 1
"""
AFTER = """stage: evaluate
corpus: 0_corpus
policies: [1_pretrain, 2_rounds]
before: 1_pretrain
after: 2_rounds
judge: facts
"""


@pytest.fixture
def read(tmp_path):
    def read(rounds, *overrides):
        for name, text in {**BEFORE, "2_rounds": rounds, "3_evaluate": AFTER}.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return load(tmp_path, list(overrides))

    return read


def test_every_round_starts_from_the_last_policy(read):
    recipe = read(ROUNDS)
    assert [step.name for step in recipe.steps] == [
        "0_corpus",
        "1_pretrain",
        *(f"2_rounds_1_{kind}" for kind in ("sample", "score", "pairs", "dpo")),
        *(f"2_rounds_2_{kind}" for kind in ("sample", "score", "pairs")),
        "2_rounds",
        "3_evaluate",
    ]
    configs = {step.name: step.config for step in recipe.steps}
    assert configs["2_rounds_1_sample"].policy == configs["2_rounds_1_dpo"].policy == "1_pretrain"
    assert configs["2_rounds_2_sample"].policy == configs["2_rounds"].policy == "2_rounds_1_dpo"
    assert configs["2_rounds"].pairs == "2_rounds_2_pairs"
    assert configs["2_rounds_2_pairs"].scores == "2_rounds_2_score"
    assert [configs[f"2_rounds_{n}_sample"].seed for n in (1, 2)] == [5, 6]
    assert configs["2_rounds"].beta == 0.2
    assert configs["2_rounds_1_sample"].completions_per_prompt == 8
    assert recipe.step("3_evaluate").needs == ["0_corpus", "1_pretrain", "2_rounds"]


def test_one_key_of_all_rounds_is_overridden_at_once(read):
    recipe = read(ROUNDS, "2_rounds.dpo.beta=0.5", "2_rounds.rounds=1", "*.seed=1")
    assert [step.name for step in recipe.steps][-2:] == ["2_rounds", "3_evaluate"]
    assert (recipe.step("2_rounds").config.beta, recipe.step("2_rounds").config.seed) == (0.5, 1)


LATER = {
    "5_sample": "stage: sample\npolicy: 1_pretrain\ncorpus: 0_corpus\n",
    "5_score": "stage: score\ncompletions: 2_rounds_1_sample\ncorpus: 0_corpus\nreward: {facts: {}}\n",
    "6_pairs": "stage: pairs\ncompletions: 2_rounds_1_sample\nscores: 5_score\n",
    "6_grpo": "stage: grpo\npolicy: 2_rounds\ncorpus: 0_corpus\nreward: {wer: {}}\nsteps: 2\nbatch_size: 2\n"
    "learning_rate: 1.0e-5\n",
    "7_dpo": "stage: dpo\npolicy: 2_rounds\npairs: 6_pairs\ncorpus: 0_corpus\nbatch_size: 2\n"
    "learning_rate: 1.0e-5\n",
    "8_gate": "stage: gate\nevaluation: 3_evaluate\n",
    "9_promote": "stage: promote\npolicy: 2_rounds\nverdict: 8_gate\nmodel_name: toy\n",
    "0_other": BEFORE["0_corpus"],
}


@pytest.mark.parametrize(
    ("stage", "written", "mistaken", "problem"),
    [
        ("6_pairs", "", "", None),
        ("6_pairs", "2_rounds_1_sample", "5_sample",
         "scores: '5_score' is made of '2_rounds_1_sample', and completions is '5_sample'"),
        ("6_pairs", "5_score", "2_rounds_2_score", "'2_rounds_2_score' is made of '2_rounds_2_sample', and"),
        ("5_score", "0_corpus", "0_other",
         "completions: '2_rounds_1_sample' is made of '0_corpus', and corpus"),
        ("7_dpo", "0_corpus", "0_other", "pairs: '6_pairs' is made of '0_corpus', and corpus is '0_other'"),
        ("9_promote", "2_rounds", "7_dpo", "policy: 8_gate decides on '2_rounds' (after of 3_evaluate), not"),
        ("7_dpo", "policy: 2_rounds", "policy: 7_dpo", "policy: '7_dpo' does not come before '7_dpo'"),
        ("6_grpo", "steps: 2\n", "steps: 2\nprompts:\n", "prompts: expected keys and values, got null"),
        ("6_grpo", "steps: 2\n", "steps: 2\nprompts: [corpus]\n", "prompts: expected keys and values, got ["),
        ("2_rounds_1_score", "", LATER["5_score"],
         "2_rounds.yaml:7: score: stands for a stage 2_rounds_1_score,"),
        ("2_z", "", LATER["5_sample"].replace("1_pretrain", "2_rounds"), "'2_rounds' does not come before"),
    ],
)  # fmt: skip
def test_stages_that_do_not_go_together(read, tmp_path, stage, written, mistaken, problem):
    files = {**LATER, stage: LATER.get(stage, "").replace(written, mistaken, 1)}
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    if problem is None:
        assert len(read(ROUNDS).steps) == 19
        return
    with pytest.raises(RecipeError, match=re.escape(problem)):
        read(ROUNDS)


@pytest.mark.parametrize(
    ("written", "mistaken", "problem"),
    [
        ("beta:", "betta:", "11: dpo.betta: unknown key (did you mean 'beta'?)"),
        ("beta: 0.2", "beta: high", "11: dpo.beta: expected a number, got 'high'"),
        ("  beta: 0.2\n", "  beta: 0.2\n  seed: 1\n", "10: dpo: seed is set by the round; remove it"),
        ("  batch_size: 2\n", "", "10: dpo.batch_size: required, missing"),
        ("facts: {}", "bonus: {}", "8: score.reward.bonus: unknown key"),
        ("rounds: 2", "rounds: 0", "2: rounds: "),
        ("rounds: 2", "rounds: 1000000000", "2: rounds: should be less than or equal to 100"),
        ("policy: 1_pretrain", "policy: 2_rounds", "3: policy: '2_rounds' does not come before '2_rounds'"),
        ("policy: 1_pretrain", "policy: 1_pre", "3: policy: there is no stage '1_pre'"),
    ],
)
def test_a_mistake_is_reported_once_at_its_line(read, written, mistaken, problem):
    with pytest.raises(RecipeError) as error:
        read(ROUNDS.replace(written, mistaken))
    assert f"2_rounds.yaml:{problem}" in str(error.value)
    assert len(error.value.problems) == 1
