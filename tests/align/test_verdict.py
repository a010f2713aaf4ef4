"""The gate's decision: fail-closed, and the worst check wins."""

import copy

from align.release.verdict import checks, decide

THRESHOLDS = {
    "min_questions": 500,
    "factuality_gain": 0.0,
    "behaviour_gain": 0.0,
    "max_over_abstention": 0.05,
    "max_asked_loss": 0.03,
    "min_audio_effect": 0.1,
    "max_length_ratio": 1.5,
    "min_distinct_ratio": 0.5,
}
GOOD = {
    "before": "2_sft",
    "after": "6_dpo",
    "policies": {
        "2_sft": {"overall": {"factuality": 0.65, "asked": 0.80, "words": 5.0, "distinct": 200, "n": 640}},
        "6_dpo": {
            "overall": {
                "factuality": 0.75,
                "asked": 0.79,
                "words": 4.5,
                "distinct": 180,
                "n": 640,
                "over_abstention": 0.01,
            },
            "shuffled_audio": {"factuality": 0.2},
        },
    },
    "comparison": {
        "factuality": {"ci_low": 0.05, "ci_high": 0.15},
        "behaviour": {"ci_low": 0.02, "ci_high": 0.10},
    },
}


def verdict_with(**changes):
    scores = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *parents, key = path.split("__")
        node = scores
        for name in parents:
            node = node[{"dpo": "6_dpo", "sft": "2_sft"}.get(name, name)]
        if value is None:
            del node[key]
        else:
            node[key] = value
    return decide(checks(scores, THRESHOLDS))


def test_a_good_candidate_passes():
    assert verdict_with().verdict == "pass"


def test_an_interval_containing_no_gain_is_inconclusive():
    decided = verdict_with(comparison__factuality={"ci_low": -0.01, "ci_high": 0.05})
    assert decided.verdict == "inconclusive"
    assert decided.reasons == ["factuality: 95 % interval of the difference [-0.010, +0.050] contains +0.000"]


def test_a_loss_fails():
    assert verdict_with(comparison__behaviour={"ci_low": -0.09, "ci_high": -0.01}).verdict == "fail"


def test_each_limit_can_fail_alone():
    for change in (
        {"policies__dpo__overall__n": 499},
        {"policies__dpo__overall__over_abstention": 0.06},
        {"policies__dpo__overall__asked": 0.76},
        {"policies__dpo__overall__words": 8.0},
        {"policies__dpo__overall__distinct": 90},
        {"policies__dpo__shuffled_audio__factuality": 0.7},
    ):
        decided = verdict_with(**change)
        assert decided.verdict == "fail", change
        assert len(decided.reasons) == 1, change


def test_what_was_not_measured_does_not_pass():
    for missing in (
        "policies__dpo__overall",
        "policies__dpo__shuffled_audio",
        "comparison__factuality",
        "policies__sft__overall",
        "policies__dpo__overall__over_abstention",
    ):
        decided = verdict_with(**{missing: None})
        assert decided.verdict == "fail", missing
        assert "not measured" in decided.reasons[0]
    assert decide([]).verdict == "fail"


def test_a_failure_outweighs_an_inconclusive_check():
    decided = verdict_with(
        comparison__factuality={"ci_low": -0.01, "ci_high": 0.05},
        policies__dpo__overall__over_abstention=0.5,
    )
    assert decided.verdict == "fail"
