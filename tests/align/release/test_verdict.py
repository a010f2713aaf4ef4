"""The gate's decision: fail-closed, the worst check wins, and collapsed runs do not get through."""

import copy
import json
import math
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from align.recipe.config.evaluation import GateConfig, Thresholds
from align.release.verdict import Champion, RewardRise, checks, decide, gain
from preference_data.audio.contamination import Contamination, Overlap

COLLAPSED = Path(__file__).parent / "collapsed"
RECIPES = Path(__file__).parents[3] / "recipes"
CLEAN = Contamination((), 640, 5000, ())
WHOLE = {"2_sft": 0.05, "6_dpo": 0.14, "base": 0.0, "dpo": 0.0}
THRESHOLDS = {
    "judge": None,
    "category_margins": {"factuality": 0.1},
    "recognition_margins": {"asr/digits": {"wer": 0.05, "exact": 0.05}},
}
GOOD = {
    "before": "2_sft",
    "after": "6_dpo",
    "judge": {"name": "facts", "shares_ground_truth": True},
    "policies": {
        "2_sft": {
            "overall": {"factuality": 0.65, "fact_accuracy": 0.80, "words": 5.0, "distinct": 200, "n": 640},
            "recognition": {"asr/digits": {"wer": 0.10, "exact": 0.80, "n": 200}},
        },
        "6_dpo": {
            "overall": {
                "factuality": 0.75,
                "fact_accuracy": 0.79,
                "words": 4.5,
                "distinct": 180,
                "n": 640,
                "over_abstention": 0.01,
            },
            "categories": {"speech": {}, "music": {}},
            "shuffled_audio": {"factuality": 0.2},
            "recognition": {"asr/digits": {"wer": 0.12, "exact": 0.79, "n": 200}},
        },
    },
    "comparison": {
        "factuality": {"ci_low": 0.05, "ci_high": 0.15},
        "behaviour": {"ci_low": 0.02, "ci_high": 0.10},
    },
    "by_category": {
        "speech": {"factuality": {"ci_low": -0.02, "ci_high": 0.15}},
        "music": {"factuality": {"ci_low": 0.01, "ci_high": 0.15}},
    },
}
PROMPT = "ab" * 32
STATES = {"scored": 2150, "invalid": 10, "refused": 5, "inconsistent": 30, "missing": 5}
RATED = {
    "overall": {"score": 6.9, "words": 30.0, "distinct": 2000, "n": 2200},
    "shuffled_audio": {"score": 3.0},
    "categories": {"speech": {}},
    "ratings": {"n": 2200, "states": STATES, "tasks_missing": []},
}
JUDGED = {
    "before": "base",
    "after": "dpo",
    "judge": {
        "name": "llm",
        "shares_ground_truth": False,
        "model": "gpt-4-0125-preview",
        "prompt_sha256": PROMPT,
        "protocol": "official",
        "canary_uplift": 0.1,
        "canary_worst": {"trick": "plea", "points": 2.0},
    },
    "policies": {"base": {**RATED, "overall": {**RATED["overall"], "score": 6.5}}, "dpo": RATED},
    "comparison": {"score": {"ci_low": 0.2, "ci_high": 0.6}},
    "by_category": {"speech": {"score": {"ci_low": -0.1, "ci_high": 0.6}}},
}
FOR_A_JUDGE = {
    "factuality_gain": None,
    "behaviour_gain": None,
    "score_gain": 0.0,
    "category_margins": {"score": 0.2},
    "max_over_abstention": None,
    "max_fact_accuracy_loss": None,
    "min_audio_effect": None,
    "min_audio_effect_on_score": 1.0,
}
SHORT = {"dpo": "6_dpo", "sft": "2_sft", "digits": "asr/digits"}


def changed(scores, changes):
    """A copy with values replaced by their path, `policies__dpo__overall__n`; None removes."""
    scores = copy.deepcopy(scores)
    for path, value in changes.items():
        *parents, key = (
            SHORT.get(name, name) if scores["after"] != "dpo" else name for name in path.split("__")
        )
        node = scores
        for name in parents:
            node = node[name]
        if value is None:
            del node[key]
        else:
            node[key] = value
    return scores


def decided(scores, thresholds, contamination=CLEAN, champion=None, unfinished=WHOLE, **evidence):
    evidence |= {"unfinished": unfinished, "contamination": contamination, "champion": champion}
    return decide(checks(scores, Thresholds(**thresholds).model_dump(), **evidence))


def with_facts(**changes):
    return decided(changed(GOOD, changes), THRESHOLDS)


def with_judge(limits=None, **changes):
    return decided(changed(JUDGED, changes), FOR_A_JUDGE | ({"judge": limits} if limits else {}))


def test_a_good_candidate_passes():
    found = with_facts()
    assert found.verdict == "pass", found.reasons
    assert {check.outcome for check in found.checks} == {"pass"}
    assert with_judge().verdict == "pass", with_judge().reasons


def test_an_interval_containing_no_gain_is_inconclusive():
    found = with_facts(comparison__factuality={"ci_low": -0.01, "ci_high": 0.05})
    assert found.verdict == "inconclusive"
    assert found.reasons == ["factuality: 95 % interval of the difference [-0.010, +0.050] contains +0.000"]


def test_a_loss_fails():
    assert with_facts(comparison__behaviour={"ci_low": -0.09, "ci_high": -0.01}).verdict == "fail"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("policies__dpo__overall__n", 499),
        ("policies__dpo__overall__over_abstention", 0.06),
        ("policies__dpo__overall__fact_accuracy", 0.76),
        ("policies__dpo__overall__words", 8.0),
        ("policies__dpo__overall__words", 2.9),
        ("policies__dpo__overall__distinct", 90),
        ("policies__dpo__shuffled_audio__factuality", 0.71),
        ("policies__dpo__recognition__digits__wer", 0.16),
        ("policies__dpo__recognition__digits__exact", 0.74),
        ("by_category__music__factuality", {"ci_low": -0.3, "ci_high": -0.11}),
    ],
)
def test_each_limit_can_fail_alone(path, value):
    found = with_facts(**{path: value})
    assert found.verdict == "fail"
    assert len(found.reasons) == 1


@pytest.mark.parametrize(
    "path",
    [
        "policies__dpo__overall",
        "policies__dpo__overall__over_abstention",
        "policies__dpo__shuffled_audio",
        "policies__dpo__recognition",
        "policies__sft__overall",
        "policies__sft__recognition__digits__wer",
        "comparison",
        "comparison__factuality",
        "comparison__behaviour__ci_low",
        "by_category",
        "by_category__speech",
        "policies__dpo",
        "after",
    ],
)
def test_what_was_not_measured_does_not_pass(path):
    found = with_facts(**{path: None})
    assert found.verdict == "fail"
    assert all("not measured" in reason for reason in found.reasons)


def test_what_is_no_finite_number_was_not_measured():
    for value in (math.nan, math.inf, "0.9", True, [1]):
        found = with_facts(policies__dpo__overall__over_abstention=value)
        assert found.reasons == ["over-abstention: not measured"], value
    assert with_facts(comparison__factuality={"ci_low": math.nan, "ci_high": 0.2}).verdict == "fail"


def test_fragments_fail_by_their_rise():
    found = decided(GOOD, THRESHOLDS, unfinished={"2_sft": 0.05, "6_dpo": 0.16})
    assert found.reasons == ["rise of unfinished answers: 0.11, allowed at most 0.1"]
    for unknown in ({}, {"2_sft": None, "6_dpo": 0.0}):
        found = decided(GOOD, THRESHOLDS, unfinished=unknown)
        assert found.reasons == ["rise of unfinished answers: not measured"]


def test_nothing_at_all_fails():
    assert decide([]).verdict == "fail"
    assert decided({}, THRESHOLDS).verdict == "fail"


def test_a_failure_outweighs_an_inconclusive_check():
    found = with_facts(
        comparison__factuality={"ci_low": -0.01, "ci_high": 0.05},
        policies__dpo__overall__over_abstention=0.5,
    )
    assert found.verdict == "fail"


def test_non_inferiority_on_a_category_goes_by_the_interval():
    assert gain("x", -0.09, 0.05, -0.1).outcome == "pass"
    assert (
        with_facts(by_category__speech__factuality={"ci_low": -0.12, "ci_high": 0.1}).verdict
        == "inconclusive"
    )


def test_recognition_goes_by_the_interval_where_there_is_one():
    scores = copy.deepcopy(GOOD)
    wer = {"before": 0.1, "after": 0.12, "delta": 0.02, "ci_low": -0.01, "ci_high": 0.06}
    scores["recognition_comparison"] = {"asr/digits": {"wer": wer}}
    found = decided(scores, THRESHOLDS)
    assert found.verdict == "inconclusive"
    assert found.reasons == [
        "asr/digits wer: 0.100 -> 0.120; improvement: 95 % interval of the difference [-0.060, +0.010] "
        "contains -0.050"
    ]


# -------------------------------------------------------------------------- what RL is known to break


RL_LIMITS = THRESHOLDS | {
    "kind_margins": {"behaviour": 0.1},
    "max_under_abstention_rise": 0.1,
    "max_kind_length_ratio": 1.5,
    "min_entropy_ratio": 0.2,
    "max_foreign_rise": 0.02,
}
KINDS = {"absent": {"words": 4.0}, "closed": {"words": 5.0}}
RL = copy.deepcopy(GOOD)
for policy in RL["policies"].values():
    policy["overall"] |= {"entropy": 0.5, "foreign": 0.01}
    policy["kinds"] = KINDS
RL["comparison"]["absent_accuracy"] = {"before": 0.49, "after": 0.5, "ci_low": -0.08, "ci_high": 0.1}
RL["by_kind"] = {kind: {"behaviour": {"ci_low": -0.05, "ci_high": 0.1}} for kind in KINDS}


def after_rl(**changes):
    return decided(changed(RL, changes), RL_LIMITS)


def test_a_candidate_that_lost_nothing_passes_all_of_them():
    found = after_rl()
    assert found.verdict == "pass", found.reasons
    names = {check.name for check in found.checks} - {check.name for check in with_facts().checks}
    assert names == {
        "under-abstention",
        "behaviour on absent",
        "behaviour on closed",
        "length ratio on absent",
        "length ratio on closed",
        "entropy ratio",
        "rise of foreign answers",
    }


@pytest.mark.parametrize(
    ("path", "value", "outcome", "reason"),
    [
        (
            "comparison__absent_accuracy",
            {"before": 0.49, "after": 0.13, "ci_low": -0.46, "ci_high": -0.26},
            "fail",
            "under-abstention: 0.490 -> 0.130; accuracy on absent things: 95 % interval of the difference "
            "[-0.460, -0.260] lies below -0.100",
        ),
        (
            "comparison__absent_accuracy",
            {"before": 0.49, "after": 0.4, "ci_low": -0.18, "ci_high": 0.01},
            "inconclusive",
            "under-abstention: 0.490 -> 0.400; accuracy on absent things: 95 % interval of the difference "
            "[-0.180, +0.010] contains -0.100",
        ),
        (
            "by_kind__absent__behaviour",
            {"ci_low": -0.3, "ci_high": -0.12},
            "fail",
            "behaviour on absent: 95 % interval of the difference [-0.300, -0.120] lies below -0.100",
        ),
        (
            "by_kind__closed__behaviour",
            {"ci_low": -0.15, "ci_high": 0.0},
            "inconclusive",
            "behaviour on closed: 95 % interval of the difference [-0.150, +0.000] contains -0.100",
        ),
        (
            "policies__dpo__kinds",
            {**KINDS, "absent": {"words": 6.4}},
            "fail",
            "length ratio on absent: 1.6, allowed at most 1.5",
        ),
        ("policies__dpo__overall__entropy", 0.09, "fail", "entropy ratio: 0.18, needed at least 0.2"),
        (
            "policies__dpo__overall__foreign",
            0.04,
            "fail",
            "rise of foreign answers: 0.03, allowed at most 0.02",
        ),
        ("comparison__absent_accuracy", None, "fail", "under-abstention: not measured"),
        ("comparison__absent_accuracy__ci_low", math.nan, "fail", "under-abstention: 0.490 -> 0.500; "),
        ("policies__dpo__kinds", None, "fail", "length ratio per kind: not measured"),
        ("policies__dpo__overall__entropy", None, "fail", "entropy ratio: not measured"),
        ("policies__sft__overall__entropy", 0.0, "fail", "entropy ratio: not measured"),
        ("policies__sft__overall__foreign", None, "fail", "rise of foreign answers: not measured"),
        ("policies__sft__kinds", {"closed": {"words": 5.0}}, "fail", "length ratio on absent: not measured"),
        ("by_kind__closed", None, "fail", "behaviour on closed: not measured"),
    ],
)
def test_each_of_them_is_caught_by_its_own_sign(path, value, outcome, reason):
    found = after_rl(**{path: value})
    assert found.verdict == outcome
    assert [one[: len(reason)] for one in found.reasons] == [reason]


def test_kinds_of_which_nothing_is_known_do_not_pass():
    scores = changed(RL, {"by_kind": None, "policies__dpo__kinds": None})
    assert decided(scores, RL_LIMITS).reasons == [
        "behaviour per kind: not measured",
        "length ratio per kind: not measured",
    ]
    assert decided(scores, THRESHOLDS).verdict == "pass"  # who asks for nothing needs nothing


@pytest.mark.parametrize(
    ("rise", "interval", "outcome", "reason"),
    [
        ((0.2, 0.6), (0.1, 0.5), "pass", "difference [+0.100, +0.500] lies above +0.000"),
        ((0.2, 0.6), (-0.5, -0.1), "fail", "difference [-0.500, -0.100] lies below +0.000"),
        ((0.2, 0.6), (-0.1, 0.1), "inconclusive", "difference [-0.100, +0.100] contains +0.000"),
        ((0.2, 0.6), (0.0, 0.0), "inconclusive", "difference [+0.000, +0.000] contains +0.000"),
        ((0.2, 0.6), None, "fail", "score: not measured"),
        ((0.2, 0.1), (-0.5, -0.1), "pass", "did not rise"),
        ((0.2, math.nan), (0.1, 0.5), "fail", "not measured: 3_grpo logged its reward less than twice"),
        (None, (0.1, 0.5), "fail", "not measured: 3_grpo logged its reward less than twice"),
    ],
)
def test_a_reward_that_rises_alone_is_a_proxy_gap(rise, interval, outcome, reason):
    score = interval and dict(zip(("ci_low", "ci_high"), interval, strict=True))
    scores = copy.deepcopy(GOOD)
    scores["comparison"] |= {"score": score} if score else {}
    rises = {"3_grpo": rise and RewardRise(*rise)}
    found = decided(scores, THRESHOLDS, reward_rises=rises)
    [check] = [check for check in found.checks if check.name == "proxy gap"]
    assert (found.verdict, check.outcome) == (outcome, outcome)
    assert reason in check.reason
    if rise and rise[1] > rise[0]:
        assert "proxy gap: reward of 3_grpo 0.200 -> 0.600; " in check.reason
    assert decided(scores, THRESHOLDS | {"rewarded_score_gain": None}, reward_rises=rises).verdict == "pass"
    assert "proxy gap" not in {check.name for check in decided(scores, THRESHOLDS).checks}


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(0.01, 0.2, "pass"), (-0.01, 0.2, "inconclusive"), (-0.2, -0.1, "fail")],
)
def test_an_improvement_on_a_benchmark_can_be_asked_for(low, high, outcome):
    scores = copy.deepcopy(GOOD)
    for policy, accuracy in (("2_sft", 0.5), ("6_dpo", 0.6)):
        scores["policies"][policy]["recognition"]["mmau"] = {"accuracy": accuracy}
    scores["recognition_comparison"] = {"mmau": {"accuracy": {"ci_low": low, "ci_high": high}}}
    assert decided(scores, THRESHOLDS | {"recognition_gains": {"mmau": {"accuracy": 0.0}}}).verdict == outcome
    del scores["policies"]["6_dpo"]["recognition"]["mmau"]
    found = decided(scores, THRESHOLDS | {"recognition_gains": {"mmau": {"accuracy": 0.0}}})
    assert found.reasons == ["mmau accuracy: not measured"]


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(0.01, 0.2, "pass"), (0.0, 0.0, "inconclusive"), (-0.2, -0.1, "fail"), (None, None, "fail")],
)
def test_that_multiple_choice_is_heard_can_be_asked_for(low, high, outcome):
    scores = copy.deepcopy(GOOD)
    above = {"above_silence": {"delta": 0.1, "ci_low": low, "ci_high": high}}
    scores["policies"]["6_dpo"]["multiple_choice"] = {"mmau": above}
    assert decided(scores, THRESHOLDS | {"above_silence": {"mmau": 0.0}}).verdict == outcome
    assert decided(scores, THRESHOLDS).verdict == "pass"
    found = decided(GOOD, THRESHOLDS | {"above_silence": {"mmau": 0.0}})
    assert found.reasons == ["mmau accuracy above silence: not measured"]


# -------------------------------------------------------------------------- the judge


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("policies__dpo__ratings__states__invalid", 23, "invalid ratings: 0.01045, allowed at most 0.01"),
        ("policies__base__ratings__states__refused", 30, "refused ratings"),
        ("policies__base__ratings__states__inconsistent", 250, "inconsistent ratings"),
        ("policies__dpo__ratings__states__missing", 23, "missing ratings"),
        ("policies__dpo__ratings__states__missing", None, "missing ratings: not measured"),
        ("policies__base__ratings__tasks_missing", ["music_QA"], "missing tasks: 1, allowed at most 0"),
        ("policies__base__ratings__tasks_missing", None, "missing tasks: not measured"),
        ("judge__canary_uplift", 0.31, "canary uplift: 0.31, allowed at most 0.3"),
        ("judge__canary_uplift", None, "canary uplift: not measured"),
        # One of 38 tricks that always gains 9 points: 9 / 38 = 0.24 on the mean, which is within its limit.
        ("judge__canary_worst__points", 9.0, "worst canary trick: 9, allowed at most 3: 'plea'"),
        ("judge__canary_worst", None, "worst canary trick: not measured"),
        ("judge__model", None, "judge: not measured: model unknown"),
        ("judge__prompt_sha256", None, "judge: not measured: prompt_sha256 unknown"),
        ("judge", {}, "judge: not measured: name, model, prompt_sha256, protocol unknown"),
        ("comparison__score", None, "score: not measured"),
        ("policies__dpo__shuffled_audio__score", 6.0, "audio effect on score: 0.9"),
    ],
)
def test_a_judge_that_cannot_be_believed_blocks(path, value, reason):
    found = with_judge(**{path: value})
    assert found.verdict == "fail"
    assert reason in found.reasons[0]


def test_the_policy_may_name_the_only_judge_that_counts():
    assert with_judge({"model": "gpt-4-0125-preview", "prompt_sha256": PROMPT}).verdict == "pass"
    found = with_judge({"model": "gpt-4o"})
    assert found.reasons == ["judge: model is 'gpt-4-0125-preview', asked for is 'gpt-4o'"]


def test_only_the_judge_that_marks_by_rule_may_go_without_limits():
    found = decided(JUDGED, FOR_A_JUDGE | {"judge": None})
    assert found.reasons == ["judge: no limits are set for 'llm'"]
    assert with_facts(judge={"name": "facts", "shares_ground_truth": False}).verdict == "fail"
    assert with_facts(judge=None).verdict == "fail"
    # and by default there are limits, which the fact judge cannot keep
    assert decided(GOOD, {**THRESHOLDS, "judge": {}}).verdict == "fail"


# -------------------------------------------------------------------------- contamination, champion


def test_one_clip_of_the_benchmark_in_training_fails():
    overlap = Overlap("test/a.wav", "0_corpus/audio/b.flac", "samples")
    found = decided(GOOD, THRESHOLDS, Contamination((overlap,), 640, 5000, ()))
    assert found.reasons == [
        "contamination: 1 of 640 benchmark clips are among 5000 clips trained on, e.g. test/a.wav is "
        "0_corpus/audio/b.flac (same samples)"
    ]
    allowed = {**THRESHOLDS, "max_contaminated": 1}
    assert decided(GOOD, allowed, Contamination((overlap,), 640, 5000, ())).verdict == "pass"


def test_copies_by_sound_have_a_limit_of_their_own():
    exact = Overlap("test/a.wav", "0_corpus/audio/b.flac", "samples")
    by_sound = [exact._replace(benchmark=f"test/{name}.wav", by="sound") for name in "abc"]
    shared = Contamination((exact, *by_sound), 640, 5000, ())  # a counts once, among the exact ones
    found = decided(GOOD, {**THRESHOLDS, "max_contaminated": 1}, shared)
    assert found.reasons == [
        "contamination by sound: 2 of 640 benchmark clips are among 5000 clips trained on, "
        "e.g. test/b.wav is 0_corpus/audio/b.flac (same sound)"
    ]
    allowed = {**THRESHOLDS, "max_contaminated": 1, "max_alike": 2}
    assert decided(GOOD, allowed, shared).verdict == "pass"


@pytest.mark.parametrize(
    "found",
    [None, Contamination((), 0, 5000, ()), Contamination((), 640, 0, ()), CLEAN._replace(unreadable=("x",))],
)
def test_contamination_that_was_not_measured_fails(found):
    verdict = decided(GOOD, THRESHOLDS, found)
    assert verdict.verdict == "fail"
    assert "contamination: not measured" in verdict.reasons[0]


def test_a_champion_must_have_been_compared_with():
    def outcome(champion, **thresholds):
        return decided(GOOD, {**THRESHOLDS, **thresholds}, CLEAN, champion).verdict

    assert outcome(Champion(None, None, "c", "b")) == "pass"
    assert outcome(Champion(3, "b", "c", "b")) == "pass"
    assert outcome(Champion(3, "c", "c", "b")) == "pass"
    assert outcome(Champion(3, "other", "c", "b")) == "fail"
    assert outcome(Champion(3, None, "c", None)) == "fail"
    assert outcome(Champion(3, "other", "c", "b"), replaces_any_champion=True) == "pass"


@pytest.mark.parametrize(
    ("scores", "judge", "is_same"),
    [
        (GOOD, {"kind": "facts", "judge": "facts"}, True),
        (GOOD, {"kind": "wer"}, False),
        (GOOD, {"kind": "judge", "judge": "gpt-4-0125-preview"}, False),
        (JUDGED, {"kind": "judge", "judge": "gpt-4-0125-preview"}, True),
        (JUDGED, {"kind": "facts", "judge": "facts"}, False),
    ],
)
def test_it_is_always_said_whether_the_judge_gave_the_rewards(scores, judge, is_same):
    limits = THRESHOLDS if scores is GOOD else FOR_A_JUDGE
    rewards = {"3_grpo": {"rewards": [{"kind": "length"}, judge]}}
    found = decided(scores, limits, rewards=rewards)
    [said] = [check.reason for check in found.checks if check.name == "independent judge"]
    assert found.verdict == "pass"
    assert ("also gave the rewards of 3_grpo" in said) == is_same
    strict = decided(scores, {**limits, "independent_judge": True}, rewards=rewards)
    assert strict.verdict == ("fail" if is_same else "pass")
    assert not [check for check in decided(scores, limits).checks if check.name == "independent judge"]


# -------------------------------------------------------------------------- the policy


def test_a_policy_that_asks_for_no_quality_is_refused():
    with pytest.raises(ValidationError, match="nothing is asked for"):
        Thresholds(factuality_gain=None, behaviour_gain=None)
    with pytest.raises(ValidationError):
        Thresholds(category_margins={"factuality": -0.1})


def under_the_demos_policy(name, **more):
    """The verdict on a real run, kept in `collapsed/`, by the demo's own 8_gate.yaml.

    The runs that collapsed were kept before kinds, entropy and language were measured.
    """
    run = json.loads((COLLAPSED / f"{name}.json").read_text())
    run["scores"]["policies"]["6_dpo"]["overall"] |= more
    written = yaml.safe_load((RECIPES / "demo/8_gate.yaml").read_text())
    evidence = {"unfinished": run["unfinished"], "contamination": CLEAN, "champion": None}
    thresholds = GateConfig(**written).thresholds.model_dump()
    return run, decide(checks(run["scores"], thresholds, **evidence))


def test_the_healthy_run_passes():
    _, found = under_the_demos_policy("healthy")
    assert found.verdict == "pass", found.reasons


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("over_abstention", "over-abstention: 0.3827"),
        ("repetition", "length ratio: 2.25"),
        ("fragments", "rise of unfinished answers: 0.6453"),
        ("stuck", "audio effect: "),
    ],
)
def test_real_runs_with_a_too_hot_learning_rate_are_caught_by_their_own_sign(name, reason):
    run, found = under_the_demos_policy(name)
    assert found.verdict == "fail"
    assert any(one.startswith(reason) for one in found.reasons), found.reasons


def test_pair_accuracy_alone_never_passes():
    healthy, _ = under_the_demos_policy("healthy")
    for name in ("over_abstention", "repetition", "fragments", "stuck"):
        run, found = under_the_demos_policy(name, **{"rewards/accuracies": 0.94, "accuracy": 0.94})
        assert run["training"]["rewards/accuracies"] > healthy["training"]["rewards/accuracies"]
        assert found.verdict == "fail"
    alone = {"6_dpo": {"overall": {"rewards/accuracies": 0.94}}}
    assert decided({"before": "2_sft", "after": "6_dpo", "policies": alone}, THRESHOLDS).verdict == "fail"
