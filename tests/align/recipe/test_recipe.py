import dataclasses
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from align.execution.plan import reads
from align.recipe import between_stages
from align.recipe.config.base import result_keys
from align.recipe.config.stages import STAGES
from align.recipe.config.training import TRL_WITHOUT_EFFECT
from align.recipe.recipe import RecipeError, load
from align.recipe.trl_names import INSTEAD, REFUSED, known_names

CORPUS = "stage: corpus\ncorpus: folder\ndir: recordings\n"
PRETRAIN = "stage: pretrain\ncorpus: 1_corpus\nmodel: {d_model: 64}\nsteps: 5\nbatch_size: 2\n"
SFT = "stage: sft\ncorpus: 1_corpus\npolicy: 2_pretrain\nsteps: 5\nbatch_size: 2\nlearning_rate: 5e-7\n"
SAMPLE = "stage: sample\npolicy: 3_sft\ncorpus: 1_corpus\n"
ANNOTATE = "stage: annotate\ncompletions: 4_sample\ncorpus: 1_corpus\n"
PAIRS = "stage: pairs\ncompletions: 4_sample\nannotations: 5_annotate\n"
DPO = (
    "stage: dpo\ncorpus: 1_corpus\npolicy: 3_sft\npairs: 6_pairs\n"
    "learning_rate: 1e-5\nbatch_size: 4\nobjective:\n  factuality: 1\n"
)
GOOD = {
    "1_corpus": CORPUS,
    "2_pretrain": PRETRAIN + "learning_rate: 1e-3\n",
    "3_sft": SFT,
    "4_sample": SAMPLE,
    "5_annotate": ANNOTATE,
    "6_pairs": PAIRS,
    "7_chosen_only": DPO + "loss: sft\n",
    "7_dpo": DPO,
}


@pytest.fixture
def write(tmp_path):
    def write(**changed):
        folder = tmp_path / "toy"
        folder.mkdir(exist_ok=True)
        for name, text in {**GOOD, **{key.removeprefix("s"): text for key, text in changed.items()}}.items():
            (folder / f"{name}.yaml").write_text(text)
        return folder

    return write


def problems(folder, *overrides):
    """What is wrong, as `file:line: ...` with the folder left out."""
    with pytest.raises(RecipeError) as caught:
        load(folder, list(overrides))
    return [str(problem).removeprefix(f"{folder}/") for problem in caught.value.problems]


def test_steps_come_in_order_with_what_they_need(write):
    recipe = load(
        write(
            s10_evaluate="stage: evaluate\ncorpus: 1_corpus\npolicies: [3_sft, 7_dpo, o/hub]\n"
            "before: 3_sft\nafter: 7_dpo\n"
        )
    )
    assert recipe.name == "toy"
    assert [step.name for step in recipe.steps] == [*GOOD, "10_evaluate"]
    needs = {step.name: step.needs for step in recipe.steps}
    assert needs["1_corpus"] == []
    assert needs["7_dpo"] == ["1_corpus", "3_sft", "6_pairs"]
    assert needs["10_evaluate"] == ["1_corpus", "3_sft", "7_dpo"]
    assert recipe.steps[-1].foreign == ["o/hub"]


def test_a_number_that_yaml_reads_as_text_is_converted(write):
    # YAML 1.1 wants 5.0e-7; PyYAML reads 5e-7 as a string.
    assert load(write()).step("3_sft").config.learning_rate == 5e-7


def test_values_of_the_wrong_type_and_out_of_bounds(write):
    bad = (
        SFT.replace("steps: 5", "steps: many")
        .replace("5e-7", "-1")
        .replace("batch_size: 2", "batch_size: 2.5")
    )
    assert problems(write(s3_sft=bad)) == [
        "3_sft.yaml:4: steps: expected a whole number, got 'many'",
        "3_sft.yaml:5: batch_size: expected a whole number, got 2.5",
        "3_sft.yaml:6: learning_rate: should be greater than 0, got -1",
    ]


def test_unknown_keys_suggest_the_known_one_at_their_depth(write):
    bad = DPO.replace("factuality: 1", "factuality: 1\n  behavior: 0.5") + "bta: 0.2\n"
    assert problems(write(s7_dpo=bad)) == [
        "7_dpo.yaml:9: objective.behavior: unknown key (did you mean 'behaviour'?)",
        "7_dpo.yaml:10: bta: unknown key (did you mean 'beta'?)",
    ]


def test_missing_keys_and_unknown_kinds(write):
    assert problems(write(s4_sample="stage: sampel\n")) == [
        f"4_sample.yaml:1: stage: 'sampel' is not one of {', '.join(STAGES)} (did you mean 'sample'?)"
    ]
    assert problems(write(s4_sample="stage: sample\ncorpus: 1_corpus\n")) == [
        "4_sample.yaml:1: policy: required, missing"
    ]
    assert problems(write(s4_sample="policy: 3_sft\n"))[0].startswith("4_sample.yaml:1: stage: required")


def test_a_choice_suggests_the_nearest_option(write):
    [problem] = problems(write(s7_dpo=DPO + "loss: sigmod\n"))
    assert problem.startswith("7_dpo.yaml:9: loss: 'sigmod' is not one of sigmoid, ipo, ")
    assert problem.endswith("(did you mean 'sigmoid'?)")


def test_a_rule_over_several_keys_is_reported_where_the_block_is(write):
    bad = DPO.replace("factuality: 1", "{factuality: 0, behaviour: 0}").replace(
        "objective:\n  ", "objective: "
    )
    [problem] = problems(write(s7_dpo=bad))
    assert problem.startswith("7_dpo.yaml:7: objective.factuality: is 0, and so is behaviour")


LATE = "does not come before '7_dpo'; only earlier stages can be used"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("4_sample", "'4_sample' produces completions, not pairs"),
        ("8_late", f"'8_late' {LATE}"),
        ("7_chosen_only", f"'7_chosen_only' {LATE}"),
        (
            "6_pair",
            "there is no stage '6_pair' (did you mean '6_pairs'?); earlier stages producing pairs: 6_pairs",
        ),
        (
            "some/pairs",
            "there is no folder 'some/pairs' with pairs.jsonl in it, as `align data import` writes",
        ),
    ],
)
def test_references_that_do_not_lead_to_an_earlier_stage_of_the_kind(write, pairs, message):
    folder = write(s7_dpo=DPO.replace("6_pairs", pairs), s8_late=PAIRS)
    assert problems(folder) == [f"7_dpo.yaml:4: pairs: {message}"]


def test_judgements_kept_of_chats_stand_for_the_stages_that_make_such_files(tmp_path):
    kept, recipe = tmp_path / "chat", tmp_path / "recipe"
    recipe.mkdir()
    pairs = f"stage: pairs\ncompletions: {kept}\nannotations: {kept}\n"
    (recipe / "5_pairs.yaml").write_text(pairs)
    missing = f"there is no folder '{kept}' with {{}} in it, as `align chat` keeps"
    assert problems(recipe) == [
        f"5_pairs.yaml:2: completions: {missing.format('completions.jsonl')}",
        f"5_pairs.yaml:3: annotations: {missing.format('judgements.jsonl')}",
    ]
    kept.mkdir()
    for name in ("completions.jsonl", "judgements.jsonl"):
        (kept / name).touch()
    assert problems(recipe) == [
        f"5_pairs.yaml:2: completions: {missing.format('prompts.jsonl')}",
        f"5_pairs.yaml:3: annotations: {missing.format('quality.json')}",
    ]
    for name in ("prompts.jsonl", "quality.json"):
        (kept / name).touch()
    assert load(recipe).steps[0].foreign == [str(kept)]


def test_a_wrong_reference_inside_a_list_names_its_place(write):
    evaluate = (
        "stage: evaluate\ncorpus: 1_corpus\nbefore: 3_sft\nafter: 7_dpo\n"
        "policies:\n  - 3_sft\n  - 7_dpo\n  - 6_pairs\n"
    )
    assert problems(write(s8_evaluate=evaluate)) == [
        "8_evaluate.yaml:8: policies[2]: '6_pairs' produces pairs, not policy"
    ]


REWARD = (
    "stage: reward\ncorpus: 1_corpus\npolicy: 3_sft\npairs: 6_pairs\nlearning_rate: 1e-5\nbatch_size: 4\n"
)
SCORE = "stage: score\ncompletions: 4_sample\ncorpus: 1_corpus\nreward: {model: 7_reward}\n"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("7_dpo", "8_score.reward.model: '7_dpo' produces policy, not reward_model"),
        ("{stage: 7_dpo}", "8_score.reward.model.stage: '7_dpo' produces policy, not reward_model"),
        ("7_rewrd", "there is no stage '7_rewrd' (did you mean '7_reward'?)"),
        ("{weight: 2}", "reward.model.stage: required, missing"),
        ("{stage: 7_reward, wieght: 2}", "wieght: unknown key (did you mean 'weight'?)"),
    ],
)
def test_a_reward_names_the_stage_of_its_model_inside_its_block(write, model, message):
    recipe = load(
        write(s7_reward=REWARD, s8_score=SCORE), ["8_score.reward.model={stage: 7_reward, weight: 2}"]
    )
    assert recipe.step("8_score").needs == ["1_corpus", "4_sample", "7_reward"]
    assert message.removeprefix("8_score.") in problems(recipe.folder, f"8_score.reward.model={model}")[0]


def test_a_policy_may_come_from_a_folder_or_the_hub_but_not_from_nowhere(write, tmp_path):
    here = SFT.replace("2_pretrain", str(tmp_path))
    assert load(write(s3_sft=here)).step("3_sft").foreign == [str(tmp_path)]
    assert load(write(s3_sft=SFT.replace("2_pretrain", "Qwen/Qwen2-Audio-7B"))).step("3_sft").needs == [
        "1_corpus"
    ]
    [problem] = problems(write(s3_sft=SFT.replace("2_pretrain", "./nowhere")))
    assert (
        problem == "3_sft.yaml:3: policy: there is no folder './nowhere', and it is not a Hub id (owner/name)"
    )


def test_names_for_trl_are_checked(write):
    trl = "trl:\n  warmup_stepz: 3\n  num_train_epochs: 2\n  loss_type: ipo\n  seed: 3\n  weight_decay: 0.1\n"
    assert problems(write(s7_dpo=DPO + trl)) == [
        "7_dpo.yaml:10: trl.warmup_stepz: trl.DPOConfig has no such name (did you mean 'warmup_steps'?)",
        "7_dpo.yaml:11: trl.num_train_epochs: set by the stage; use epochs instead",
        "7_dpo.yaml:12: trl.loss_type: set by the stage; use loss instead",
        "7_dpo.yaml:13: trl.seed: set by the stage; use seed instead",
    ]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("save_only_model: true", "cannot be used: a killed run would resume without its optimizer"),
        ("push_to_hub: true", "cannot be used: models are published by `align export`"),
        ("hub_strategy: end", "cannot be used: models are published by `align export`"),
        ("load_best_model_at_end: true", "set by the stage; use choose instead"),
        ("auto_find_batch_size: true", "set by the stage; use batch_size instead"),
        ("torch_compile: true", "cannot be used: it replaces the model's forward"),
        ("eval_on_start: true", "cannot be used: the stage decides what is held out"),
        ("optim: adamw_torhc", "'adamw_torhc' is not one of transformers' (did you mean 'adamw_torch'?)"),
        ("lr_scheduler_type: reduce_lr_on_plateau", "'reduce_lr_on_plateau' cannot be used"),
    ],
)
def test_names_for_trl_that_cannot_work_are_refused_with_the_reason(write, given, reason):
    [problem] = problems(write(s7_dpo=DPO + f"trl: {{{given}}}\n"))
    assert problem.startswith(f"7_dpo.yaml:9: trl.{given.partition(':')[0]}: {reason}")


def test_exo_pair_needs_the_smoothing_without_which_trl_refuses_it(write):
    [problem] = problems(write(s7_dpo=DPO + "loss: exo_pair\n"))
    assert problem.endswith("loss: exo_pair needs trl: {label_smoothing: ...} above 0; its paper takes 1e-3")
    load(write(s7_dpo=DPO + "loss: exo_pair\ntrl: {label_smoothing: 0.001}\n"))


def as_text(value, number):
    return f"{value!r} (YAML 1.1 takes it for {number}): write it plainly, without quotes"


SPLIT = "cannot be split evenly over hardware.workers ({}) times trl.gradient_accumulation_steps ({})"
AT_LEAST_1 = "trl.{}: must be from 1 to 1e+09, got {}"


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("steps: 010", "steps: expected a whole number, got " + as_text("010", 8)),
        ("steps: 1:30", "steps: expected a whole number, got " + as_text("1:30", 90)),
        ("steps: 1_000", "steps: expected a whole number, got " + as_text("1_000", 1000)),
        ("steps: 0x1F", "steps: expected a whole number, got " + as_text("0x1F", 31)),
        ("steps: yes", "steps: expected a whole number, got " + as_text("yes", True)),
        ("steps: '5'", "steps: expected a whole number, got " + as_text("5", 5)),
        ("steps: true", "steps: expected a whole number, got true"),
        ("steps: ~", "steps: expected a whole number, got null"),
        ("steps: .inf", "steps: expected a whole number, got inf"),
        ("steps: 1" + 30 * "0", "steps: 1" + 30 * "0" + " is beyond what can be counted; the most is 2^53"),
        ("learning_rate: on", "learning_rate: expected a number, got " + as_text("on", True)),
        ("learning_rate: 1_0.5", "learning_rate: expected a number, got " + as_text("1_0.5", 10.5)),
        ("learning_rate: 20:30.5", "learning_rate: expected a number, got " + as_text("20:30.5", 1230.5)),
        ("learning_rate: nan", "learning_rate: expected a number, got 'nan'"),
        ("learning_rate: .nan", "learning_rate: should be a finite number, got nan"),
        ("learning_rate: 1e999", "learning_rate: should be a finite number, got inf"),
        ("learning_rate: 0", "learning_rate: should be greater than 0, got 0"),
        ("max_bad_fraction: 1.5", "max_bad_fraction: should be less than or equal to 1, got 1.5"),
        ("packed: yes", "packed: 'yes' is not one of true, false, split, varlen, dense"),
        ("seed: -1", "seed: should be greater than or equal to 0, got -1"),
        ("seed: 1" + 20 * "0", "seed: should be less than 4294967296, got 1" + 20 * "0"),
        ("trl: {warmup_steps: 010}", "trl.warmup_steps: expected a number, got " + as_text("010", 8)),
        ("trl: {weight_decay: off}", "trl.weight_decay: expected a number, got " + as_text("off", False)),
        ("trl: {adam_epsilon: .inf}", "trl.adam_epsilon: expected a finite number, got inf"),
        ("trl: {weight_decay: -0.1}", "trl.weight_decay: must be from 0 to 1e+06, got -0.1"),
        ("trl: {max_grad_norm: hello}", "trl.max_grad_norm: expected a number, got 'hello'"),
        ("trl: {bf16: 'no'}", "trl.bf16: expected true or false or null, got " + as_text("no", False)),
        ("trl: {include_num_input_tokens_seen: some}",
         "trl.include_num_input_tokens_seen: 'some' is not one of all, non_padding, no"),
        ("trl: {optim: [a]}", "trl.optim: expected text, got ['a']"),
        ("trl: {lr_scheduler_type: 3}", "trl.lr_scheduler_type: expected text, got 3"),
        ("trl: {logging_strategy: never}", "trl.logging_strategy: 'never' is not one of transformers'"),
        ("trl: {gradient_accumulation_steps: 0}", AT_LEAST_1.format("gradient_accumulation_steps", 0)),
        ("trl: {dataloader_prefetch_factor: -2}", AT_LEAST_1.format("dataloader_prefetch_factor", -2)),
        ("trl: {gradient_accumulation_steps: 4}", "batch_size: 2 " + SPLIT.format(1, 4)),
        ("lora: {target: 'q_proj('}",
         "lora.target: 'q_proj(' is not a regular expression: missing ), unterminated subpattern at position"
         " 6"),
        ("lora: {target: q_proj}", "lora.target: 'q_proj' matches no layer as a whole, such as "
         "model.language_model.layers.0.self_attn.q_proj"),
        ("lora: {target: lm_head}",
         "lora.target: 'lm_head' hits lm_head, whose adapter TRL would never train"),
        ("hardware: {workers: 3}", "batch_size: 2 " + SPLIT.format(3, 1)),
        ("trl: {loss_type: dft}", "trl.loss_type: set by the stage"),
        ("filters: {min_answer_chars: 9, max_answer_chars: 3}",
         "filters.max_answer_chars: 3 is less than min_answer_chars (9): no chat would be left"),
    ],
)  # fmt: skip
def test_values_that_would_fail_hours_later(write, written, problem):
    key = written.partition(":")[0]
    kept = "".join(line for line in SFT.splitlines(keepends=True) if not line.startswith(f"{key}:"))
    [in_file] = problems(write(s3_sft=kept + written + "\n"))
    assert in_file.partition(": ")[2] == problem
    override = "3_sft." + written.replace(": ", "=", 1)
    [in_override] = problems(write(s3_sft=SFT), override)
    assert in_override.removeprefix(f"--set {override}: ").endswith(problem)


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ("{d_model: 33, heads: 2}", "d_model: 33 is not a multiple of 2 x heads (2)"),
        ("{d_model: 130, heads: 4}", "d_model: 130 is not a multiple of 2 x heads (4)"),
        ("{d_model: 30, heads: 5, mel_bins: 4}", "mel_bins: should be greater than or equal to 16, got 4"),
        ("{d_model: 64, heads: 128}", "d_model: 64 is not a multiple of 2 x heads (128)"),
        ("{hop_length: 640}", "hop_length: 640 makes 75 frames of 3 s at 16 kHz: the audio tower needs an"),
        ("{hop_length: 24000}", "hop_length: 24000 makes 2 frames of 3 s at 16 kHz: the audio tower needs"),
    ],
)
def test_small_models_that_cannot_be_built(write, shape, problem):
    [message] = problems(write(s2_pretrain=PRETRAIN.replace("{d_model: 64}", shape) + "learning_rate: 1\n"))
    assert message.startswith(f"2_pretrain.yaml:3: model.{problem}")


MADE = "stage: corpus\ncorpus: synthetic\nclips: {train: 1, preference: 1, dev: 1, test: 1}\n"
DIGITS = MADE.replace("synthetic", "spoken_digits\ndir: recordings")


@pytest.mark.parametrize(
    ("corpus", "overrides", "problem"),
    [
        (MADE, ["2_pretrain.model.clip_s=1"], "clips of 1_corpus last 3 s, but the model hears 1 s: set "),
        (DIGITS, ["2_pretrain.model.clip_s=2"], "clips of 1_corpus last 3 s, but the model hears 2 s: set "),
        (
            DIGITS,
            ["2_pretrain.model={audio: o/whisper, text: o/qwen, clip_s: 3}"],
            "the model hears 3 s and needs silence behind a clip: set 2_pretrain.model.clip_s to 4 or more",
        ),
        (MADE, ["1_corpus.max_duration_s=1"], "clips of 'synthetic' last 3 s: must allow that, is 1"),
        (
            MADE,
            ["2_pretrain.curriculum=[{steps: 9, slot: colour, values: [red]}]"],
            "clips of 1_corpus have no fact 'colour'; known: ",
        ),
        (
            MADE,
            ["2_pretrain.curriculum=[{steps: 9, slot: word, values: [stop, zero]}]"],
            "no word of 1_corpus is 'zero'; known: ",
        ),
    ],
)
def test_what_stages_say_together(write, corpus, overrides, problem):
    told = problems(write(s1_corpus=corpus), *overrides)
    assert problem in told[0]
    load(write(s1_corpus=corpus), ["2_pretrain.model.clip_s=3"])


JUDGE = "5_annotate.judge={model: ear, url: 'http://127.0.0.1:8000/v1', hears: true}"


@pytest.mark.parametrize(
    ("overrides", "problem", "mended"),
    [
        (
            ["4_sample.completions_per_prompt=2", "5_annotate.completions_per_comparison=3"],
            "completions_per_comparison: 4_sample draws 2 completions of a prompt, fewer than 3: lower this ",
            "4_sample.completions_per_prompt=3",
        ),
        (
            ["5_annotate.gold=0", "6_pairs.min_gold=0.7"],
            "min_gold: has no effect: 5_annotate asks no gold (gold: 0); raise that, or remove this key",
            "5_annotate.gold=0.1",
        ),
        (
            ["6_pairs.min_model_agreement=0.7"],
            "min_model_agreement: has no effect: no model judges in 5_annotate; give it a judge, or remove",
            JUDGE,
        ),
        (
            ["5_annotate.by=model", JUDGE, "5_annotate.gold=0"],
            "min_model_agreement: 0.6 cannot be reached: 'ear' judges alone in 5_annotate, and there is",
            "6_pairs.min_model_agreement=0",
        ),
        (
            ["6_pairs.exclude=[simulated-3]"],
            "exclude: nobody called 'simulated-3' judges in 5_annotate; those who do: simulated-1",
            "5_annotate.annotators=3",
        ),
        (
            ["6_pairs.exclude=[ann]"],
            "exclude: nobody called 'ann' judges in 5_annotate; those who do: simulated-1, simulated-2",
            "5_annotate.by=people",
        ),
        (
            ["6_pairs.annotator_weights=dawid_skene", "5_annotate.gold=0"],
            "annotator_weights: dawid_skene needs gold or 3 annotators, and 5_annotate has no gold",
            "5_annotate.annotators=3",
        ),
    ],
)
def test_rules_that_can_say_nothing_about_who_annotates(write, overrides, problem, mended):
    [message] = problems(write(s1_corpus=MADE), *overrides)
    assert problem in message
    load(write(), [*overrides, mended])


def test_what_a_later_stage_trains_and_an_earlier_one_froze_is_named(write):
    def thawed(*overrides):
        return between_stages.thawed_parts(load(write(), list(overrides)).steps)

    assert thawed() == []
    assert thawed("2_pretrain.train=[projector]") == []
    assert thawed("2_pretrain.train=[projector]", "3_sft.train=[projector, language_model]") == [
        "3_sft trains language_model, which 2_pretrain kept frozen"
    ]
    assert thawed("3_sft.train=[projector]", "7_dpo.lora={}", "7_chosen_only.train=[projector]") == []


def test_what_learns_is_inherited_from_the_stage_that_a_policy_comes_from(write):
    def train(*overrides):
        steps = load(write(), list(overrides)).steps
        return {step.name: step.config.train for step in steps if hasattr(step.config, "train")}

    assert set(train().values()) == {None}
    every = train("2_pretrain.train=[projector]")
    assert every == dict.fromkeys(every, ["projector"])
    own = train("2_pretrain.train=[projector]", "7_dpo.train=[language_model]")
    assert own == {**every, "7_dpo": ["language_model"]}
    adapted = train("2_pretrain.train=[projector]", "3_sft.lora={}")  # which trains nothing of the model
    assert adapted == {**every, "3_sft": None}
    assert problems(write(), "2_pretrain.train=[projector, new_tokens]")[0] == (
        "3_sft.yaml:1: stage: train must be given: 2_pretrain trains new_tokens, which are learned in "
        "pretrain only"
    )


def test_inherited_parts_count_as_if_they_were_written(write):
    inherited = load(write(), ["2_pretrain.train=[projector]"]).step("3_sft").config
    written = load(write(), ["3_sft.train=[projector]"]).step("3_sft").config
    assert result_keys(inherited) == result_keys(written)


def test_no_mistake_hides_another(write):
    twice = "steps: 6\nseed: -1\ntrl: {optim: adam, max_length: 3}\nbtch_size: 3\nhardware: {workers: 3}\n"
    aliases = "top_p: &p 2\ntemperature: *p\n1: x\nseed: !!str 1\nworkers: 0\n"
    folder = write(s3_sft=SFT + twice, s4_sample=SAMPLE + aliases, s6_pairs="stage: pairs\n\tx: 1\n")
    told = "\n".join(problems(folder, "7_dpo.bta=1", "7_dpo.trl={optim: sgd, optim: x}"))
    assert told.replace(f"{folder}/", "").splitlines() == [
        "--set 7_dpo.trl={optim: sgd, optim: x}: trl.optim: written twice, first at "
        "--set 7_dpo.trl={optim: sgd, optim: x}",
        "3_sft.yaml:5: batch_size: 2 " + SPLIT.format(3, 1),
        "3_sft.yaml:7: steps: written twice, first at 3_sft.yaml:4",
        "3_sft.yaml:8: seed: should be greater than or equal to 0, got -1",
        "3_sft.yaml:9: trl.optim: 'adam' is not one of transformers' (did you mean 'adalomo'?)",
        "3_sft.yaml:9: trl.max_length: cannot be used: answers are never cut",
        "3_sft.yaml:10: btch_size: unknown key (did you mean 'batch_size'?)",
        "4_sample.yaml:4: top_p: should be less than or equal to 1, got 2",
        "4_sample.yaml:5: temperature: anchors (&, *) are not supported in recipes; write the value out",
        "4_sample.yaml:6: 1: a key must be text; put it in quotes",
        "4_sample.yaml:7: seed: tags (tag:yaml.org,2002:str) are not supported in recipes; "
        "write the value plainly",
        "4_sample.yaml:8: workers: should be greater than or equal to 1, got 0",
        "6_pairs.yaml:2: not YAML: found character '\\t' that cannot start any token; indent with spaces",
        "--set 7_dpo.bta=1: bta: unknown key (did you mean 'beta'?)",
    ]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: path.mkdir(), ": cannot be read: Is a directory"),
        (lambda path: path.symlink_to("nowhere"), ": cannot be read: No such file or directory"),
        (lambda path: path.symlink_to(path.name), ": cannot be read: Too many levels of symbolic links"),
        (lambda path: path.write_bytes(b"stage: sft\n\xff\xfe\x00"), ":1: is not text in UTF-8"),
        (lambda path: path.write_text("stage: sft\n", "utf-16"), ":1: is not text in UTF-8"),
        (lambda path: path.write_text("stage: sft\nx: \0\n"), ":2: not YAML: holds the character '\\x00'"),
        (lambda path: path.write_text("a: " + 20_000 * "["), ":1: not a stage file: its brackets are nested"),
        (
            lambda path: path.write_text("a: " + 20_000 * "{b: "),
            ":1: not a stage file: its brackets are nested",
        ),
        (lambda path: path.write_text(""), ":1: expected keys and values, such as `stage: sft`"),
        (lambda path: path.write_text("# nothing\n---\n"), ":1: expected keys and values"),
        (lambda path: path.write_text("- stage: sft\n"), ":1: expected keys and values"),
        (lambda path: path.write_text("stage: sft\n---\nstage: sft\n"), ":2: not YAML: but found another"),
        (lambda path: path.write_text("seed: !!bool maybe\n"), ":1: seed: tags (tag:yaml.org,2002:bool)"),
        (lambda path: path.write_text("? [a]\n: x\n"), ":1: ?: a key must be text"),
        (lambda path: path.write_text("&a [*a]\n"), ":1: [0]: anchors (&, *) are not supported"),
    ],
)
def test_what_is_no_stage_file_is_named_beside_the_other_mistakes(write, make, problem):
    folder = write(s3_sft=SFT + "bta: 1\n")
    make(folder / "8_x.yaml")
    told = problems(folder)
    assert "3_sft.yaml:7: bta: unknown key" in told[0]
    assert told[1].startswith(f"8_x.yaml{problem}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(write):
    folder = write()
    (folder / "3_sft.yaml").chmod(0)
    assert "3_sft.yaml: cannot be read: Permission denied" in problems(folder)


def test_keys_and_values_of_older_recipes_are_told_their_new_names(write):
    assert problems(write(s2_pretrain=PRETRAIN + "learning_rate: 1\ndialect: tags_released\n")) == [
        "2_pretrain.yaml:7: dialect: unknown key: it is called 'prompt_format' now"
    ]
    made_world = "stage: corpus\ncorpus: made_world\nclips: {train: 1, preference: 1, dev: 1, test: 1}\n"
    assert problems(write(s1_corpus=made_world)) == [
        "1_corpus.yaml:2: corpus: 'made_world' is called 'synthetic' now"
    ]
    gate = "stage: gate\nevaluation: 7_evaluate\nthresholds:\n  "
    assert problems(write(s8_gate=gate + "max_asked_loss: 0.1\n"))[1:] == [
        "8_gate.yaml:4: thresholds.max_asked_loss: unknown key: it is called 'max_fact_accuracy_loss' now"
    ]
    assert problems(write(s8_gate=gate + "category_margins: {asked: 0.1}\n"))[1:] == [
        "8_gate.yaml:4: thresholds.category_margins.asked: 'asked' is called 'fact_accuracy' now"
    ]


def test_every_stage_declares_itself_and_has_a_file_of_its_name():
    for kind, config in STAGES.items():
        assert config.kind() == kind
        assert config.produces
        assert (find_spec(f"align.stages.{kind}") is not None) == (kind != "rounds")  # it stands for others
        assert config.trl_config is None or known_names(config.trl_config)


def test_save_steps_count_where_a_checkpoint_is_chosen_among_them(write):
    def keys(*overrides):
        return result_keys(load(write(), list(overrides)).step("7_dpo").config)

    assert keys("7_dpo.save_steps=7") == keys()
    assert keys("7_dpo.choose={}", "7_dpo.save_steps=7") != keys("7_dpo.choose={}")
    assert keys("7_dpo.trl={logging_steps: 1}") == keys()
    assert keys("7_dpo.trl={logging_steps: 1, weight_decay: 1}") == keys("7_dpo.trl={weight_decay: 1}")
    assert keys("7_dpo.beta=0.1") == keys()
    assert keys("7_dpo.beta=0.2") != keys()
    assert keys("7_dpo.seed=1") != keys()


def test_a_name_of_trls_at_the_top_is_sent_where_it_belongs(write):
    keys = "weight_decay: 0.1\nper_device_train_batch_size: 2\nmax_length: 512\n"
    assert problems(write(s7_dpo=DPO + keys)) == [
        "7_dpo.yaml:9: weight_decay: unknown key (a name of TRL's: put it under `trl:`, as trl.weight_decay)",
        "7_dpo.yaml:10: per_device_train_batch_size: unknown key (a name of TRL's: set by the stage; "
        "use batch_size instead)",
        "7_dpo.yaml:11: max_length: unknown key (a name of TRL's that cannot be used: answers are never cut)",
    ]


TRL_CONFIGS = sorted({config.trl_config for config in STAGES.values() if config.trl_config})


@pytest.mark.parametrize("name", TRL_CONFIGS)
def test_names_read_from_source_are_those_of_the_class(name):
    import trl

    public = {
        field.name for field in dataclasses.fields(getattr(trl, name)) if not field.name.startswith("_")
    }
    assert known_names(name).keys() == public
    everything = {known for config in TRL_CONFIGS for known in known_names(config)}
    assert INSTEAD.keys() | REFUSED.keys() | TRL_WITHOUT_EFFECT <= everything
    assert not INSTEAD.keys() & REFUSED.keys()
    assert not TRL_WITHOUT_EFFECT & (INSTEAD.keys() | REFUSED.keys())


def test_trls_own_vllm_is_refused_and_ours_named(write):
    grpo = "stage: grpo\npolicy: 3_sft\ncorpus: 1_corpus\nreward: {choice: {}}\nsteps: 1\nbatch_size: 4\n"
    grpo += "learning_rate: 1.0e-5\nengine: vllm\ntrl: {use_vllm: true, vllm_mode: server}\n"
    told = problems(write(s7_grpo=grpo))
    assert [line.partition(": ")[2] for line in told] == [
        f"trl.{name}: cannot be used: TRL's own vLLM hears no audio and shares our environment; say engine: "
        "vllm in the stage"
        for name in ("use_vllm", "vllm_mode")
    ]
    of_trl = {name for name in known_names("GRPOConfig") if "vllm" in name}
    assert {REFUSED[name] for name in of_trl} == {REFUSED["use_vllm"]}


def test_broken_files_are_all_reported(write):
    folder = write(
        s3_sft=SFT + "steps: 6\n", s4_sample="stage: [sample\n", s6_annotate="", s6_pairs="a: &x 1\nb: *x\n"
    )
    (folder / "dpo.yaml").write_text(DPO)
    (folder / "8_gate.yml").write_text("stage: gate\n")
    (folder / "notes.md").write_text("not a stage")
    found = "\n".join(problems(folder))
    assert "3_sft.yaml:7: steps: written twice, first at " in found
    assert "4_sample.yaml:2: not YAML: " in found
    assert "6_annotate.yaml:1: expected keys and values, such as `stage: sft`" in found
    assert "6_pairs.yaml:2: b: anchors (&, *) are not supported" in found
    assert "dpo.yaml: a stage file is named N_name.yaml, such as 2_sft.yaml" in found
    assert "8_gate.yml: a stage file is named N_name.yaml" in found


def test_a_tag_that_would_run_code_is_refused(write):
    [problem, *_] = problems(write(s3_sft="stage: !!python/object/apply:os.system ['touch owned']\n"))
    assert problem.startswith("3_sft.yaml:1: stage: tags (tag:yaml.org,2002:python/object/apply:os.system)")


def test_an_empty_and_an_absent_folder(tmp_path):
    assert problems(tmp_path) == [f"{tmp_path}: holds no stage files (N_name.yaml)"]
    assert "is not a folder" in problems(tmp_path / "none")[0]


def test_overrides_by_full_name_short_name_and_star(write):
    recipe = load(
        write(),
        [
            "7_dpo.beta=0.3",
            "dpo.objective.behaviour=2",
            "*.seed=5",
            "sft.trl={weight_decay: 0.1}",
            "*.batch_size=8",
        ],
    )
    dpo = recipe.step("dpo").config
    assert (dpo.beta, dpo.objective.behaviour, dpo.objective.factuality) == (0.3, 2.0, 1.0)
    assert {step.config.seed for step in recipe.steps} == {5}
    assert recipe.step("3_sft").config.trl == {"weight_decay": 0.1}
    assert recipe.step("7_chosen_only").config.batch_size == 8
    assert recipe.step("4_sample").config.batch_size == 8
    assert recipe.step("7_chosen_only").config.beta == 0.1


def test_wrong_overrides_are_reported_like_the_rest(write):
    folder = write(s8_dpo=DPO)
    given = ["dpo.beta=1", "9_x.seed=1", "seed=1", "3_sft.steps=no", "7_dpo.lss=ipo", "*.nothing=1"]
    assert problems(folder, *given, "3_sft.seed.x=1") == [
        "--set dpo.beta=1: 'dpo' could be 7_dpo or 8_dpo; give the full name",
        "--set 9_x.seed=1: there is no stage '9_x'; stages: " + ", ".join([*GOOD, "8_dpo"]),
        "--set seed=1: expected S.key=value, such as 6_dpo.beta=0.2 or '*.seed=1'",
        "--set *.nothing=1: no stage of the recipe has the key 'nothing'",
        "--set 3_sft.seed.x=1: seed: expected a whole number, got {'x': 1}",
        "--set 3_sft.steps=no: steps: expected a whole number, got 'no' (YAML 1.1 takes it for False): "
        "write it plainly, without quotes",
        "--set 7_dpo.lss=ipo: lss: unknown key (did you mean 'loss'?)",
    ]


def test_checking_imports_neither_torch_nor_trl(write):
    folder = write(s7_dpo=DPO + "trl: {weight_decay: 0.1}\n")
    code = (
        "import sys, pathlib; from align.recipe.recipe import load; load(pathlib.Path(sys.argv[1])); "
        "print([m for m in ('torch', 'trl', 'transformers', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
    assert Path(folder).is_dir()


ASSEMBLE = (
    PRETRAIN.replace("{d_model: 64}", "{audio: openai/whisper-tiny, text: ./qwen}") + "learning_rate: 1\n"
)


def test_a_model_to_start_from_is_a_shape_two_models_or_one(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen").mkdir()
    recipe = load(write(s2_pretrain=ASSEMBLE))
    assert recipe.step("2_pretrain").foreign == ["./qwen", "openai/whisper-tiny"]
    assert recipe.step("2_pretrain").config.model.audio == "openai/whisper-tiny"
    again = load(write(), ["2_pretrain.model=owner/released"]).step("2_pretrain")
    assert (again.config.model, again.foreign) == ("owner/released", ["owner/released"])
    further = PRETRAIN.replace("{d_model: 64}", "2_pretrain") + "learning_rate: 1\n"
    assert load(write(s3_further=further)).step("3_further").needs == ["1_corpus", "2_pretrain"]
    assert load(write()).step("2_pretrain").foreign == []


def test_mistakes_in_the_model_to_start_from_are_told_where_they_are(write):
    def told(model):
        return problems(write(s2_pretrain=PRETRAIN.replace("{d_model: 64}", model) + "learning_rate: 1\n"))

    assert told("{d_modl: 64}") == ["2_pretrain.yaml:3: model.d_modl: unknown key (did you mean 'd_model'?)"]
    assert told("{d_model: 1}") == [
        "2_pretrain.yaml:3: model.d_model: should be greater than or equal to 16, got 1"
    ]
    assert told("{audio: o/w, txt: o/q}") == [
        "2_pretrain.yaml:3: model.text: required, missing",
        "2_pretrain.yaml:3: model.txt: unknown key (did you mean 'text'?)",
    ]
    assert told("{audio: whisper, text: ./nowhere}") == [
        "2_pretrain.yaml:3: model.audio: 'whisper' is neither a folder (./whisper) nor a Hub id (owner/name)",
        "2_pretrain.yaml:3: model.text: there is no folder './nowhere', and it is not a Hub id (owner/name)",
    ]
    assert told("9_none")[0].startswith("2_pretrain.yaml:3: model: there is no stage '9_none'")
    assert told("1_corpus") == ["2_pretrain.yaml:3: model: '1_corpus' produces corpus, not policy"]


# -------------------------------------------------------------------------- mixtures


MIXTURE = "stage: corpus\ncorpus: mixture\nsources: [{folder: data/a}, {folder: data/b, share: 0.3}]\n"


SCORE = "stage: score\ncompletions: 4_sample\ncorpus: 1_corpus\nreward: {wer: {}}\n"
SELECT = "scores: 5_score\nmax_comparisons: 10\nselect: "


def test_annotators_are_asked_what_scores_of_the_same_completions_select(write):
    folder = write(s5_score=SCORE, s6_annotate=ANNOTATE + SELECT + "disagreement\n")
    assert load(folder).step("6_annotate").needs == ["1_corpus", "4_sample", "5_score"]
    write(s4_other=SAMPLE, s5_score=SCORE.replace("4_sample", "4_other"))
    other = ANNOTATE + SELECT + "uncertainty\n"
    assert problems(write(s6_annotate=other)) == [
        "6_annotate.yaml:4: scores: '5_score' is made of '4_other', and completions is '4_sample': both must "
        "be the same"
    ]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ("select: disagreement\nmax_comparisons: 9\n", ["scores: required with select: disagreement"]),
        ("select: uncertainty\nscores: 5_score\n", ["max_comparisons: required with select: uncertainty"]),
        ("near_tie: 0.1\n", ["near_tie: has no effect with select: random"]),
        ("scores: 5_score\nselect: random\n", ["scores: has no effect with select: random"]),
        ("select: surprise\n", ["select: 'surprise' is not one of random, disagreement, uncertainty"]),
        ("max_comparisons: 0\n", ["max_comparisons: should be greater than or equal to 1"]),
    ],
)
def test_keys_of_a_selection_that_cannot_work(write, keys, told):
    said = problems(write(s5_score=SCORE, s6_annotate=ANNOTATE + keys))
    assert len(said) == len(told)
    assert all(words in line for words, line in zip(told, said, strict=True))


def test_what_asks_for_facts_is_refused_on_a_mixture_which_has_none(write):
    with pytest.raises(RecipeError) as caught:
        load(write(s1_corpus=MIXTURE, s7_dpo=DPO + "choose: {questions: 5}\n"))
    told = str(caught.value)
    assert "5_annotate.yaml" in told
    assert "use `by: people`" in told
    assert "7_dpo.yaml:9: choose: needs the facts of every clip, and '1_corpus' has none" in told
    load(write(s1_corpus=MIXTURE, s5_annotate=ANNOTATE + "by: people\n", s7_dpo=DPO))


def test_a_mixture_is_made_again_when_records_change_but_not_for_an_index_beside_a_shard(write, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset.json").write_text("{}")
        (tmp_path / name / "clips.jsonl").write_text("{}\n")
    mixture = MIXTURE.replace("data/", f"{tmp_path}/")
    recipe = load(write(s1_corpus=mixture, s5_annotate=ANNOTATE + "by: people\n", s7_dpo=DPO))
    corpus = recipe.step("1_corpus")
    assert corpus.folders == [f"{tmp_path}/a", f"{tmp_path}/b"]
    before = reads(corpus, {}).data
    (tmp_path / "a" / ".shard-00000.tar.0123.npy").write_bytes(b"x")
    assert reads(corpus, {}).data == before
    (tmp_path / "a" / "clips.jsonl").write_text("{}\n{}\n")
    after = reads(corpus, {}).data
    assert after != before
    assert after[f"{tmp_path}/b"] == before[f"{tmp_path}/b"]


def test_another_snapshot_in_the_same_place_is_another_input(write, tmp_path, monkeypatch):
    """And its place may begin with ~, as that of other data."""
    monkeypatch.setenv("HOME", str(tmp_path))
    snapshot = tmp_path / "0001-abc"
    snapshot.mkdir()
    (snapshot / "judgements.jsonl").write_text("")
    steps = load(write(s1_corpus=MADE), ["5_annotate.snapshot=~/0001-abc"]).steps
    annotate = next(step for step in steps if step.name == "5_annotate")
    digests = dict.fromkeys(annotate.needs, "0")
    before = reads(annotate, digests)
    assert reads(annotate, digests) == before
    (snapshot / "judgements.jsonl").write_text("\n")
    assert reads(annotate, digests) != before
