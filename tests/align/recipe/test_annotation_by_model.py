"""What a recipe may say about a model that judges, alone or beside people."""

import pytest

from align.recipe.config.base import result_keys
from align.recipe.config.preference import AnnotateConfig, LabelsConfig, PairsConfig

STAGE = {"stage": "annotate", "completions": "3_sample", "corpus": "0_corpus"}
JUDGE = {"model": "ear", "url": "http://127.0.0.1:8000/v1", "hears": True}


@pytest.mark.parametrize(
    "keys",
    [
        {"by": "model", "judge": JUDGE},
        {"by": "model", "judge": {"model": "models/judge", "hears": False}},
        {"by": "people", "judge": JUDGE},
        {"by": "people", "judge": JUDGE, "people_share": 0.2},
        {"by": "simulated", "judge": JUDGE, "people_share": 0.5},
        {"by": "people", "people_share": 1.0},
    ],
    ids=str,
)
def test_a_model_judges_alone_or_beside_people(keys):
    AnnotateConfig(**STAGE, **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"by": "model"}, "judge: by: model needs judge"),
        ({"by": "people", "people_share": 0.5}, "people_share: 0.5 leaves comparisons that nobody judges"),
        ({"by": "model", "judge": JUDGE, "people_share": 0.5}, "people_share: has no effect with by: model"),
        ({"by": "model", "judge": JUDGE, "server": "http://a"}, "server: has no effect with by: model"),
        ({"by": "model", "judge": JUDGE, "adjudicator": "ann"}, "has no effect with by: model"),
        ({"by": "people", "judge": JUDGE, "people_share": 0.0}, "greater than 0"),
        ({"by": "model", "judge": {"model": "m", "url": "http://a/v1"}}, "hears"),
        ({"by": "model", "judge": {"model": "folder", "hears": True}}, "without a url reads text alone"),
        ({"by": "model", "judge": JUDGE | {"protocol": "strict"}}, "protocol"),
        ({"by": "model", "judge": JUDGE | {"parameters": {"n": 2}}}, "n is set by us"),
    ],
    ids=str,
)
def test_what_cannot_be(keys, message):
    with pytest.raises(ValueError, match=message):
        AnnotateConfig(**STAGE, **keys)


def test_the_plan_says_who_judges():
    alone = AnnotateConfig(**STAGE, by="model", judge=JUDGE).describe_work({})
    assert alone == "up to 3 comparisons per prompt; all judged by ear in both orders"
    beside = AnnotateConfig(**STAGE, by="people", judge=JUDGE, people_share=0.2).describe_work({})
    assert beside == f"{alone}; 20% by people, 30% judged by all 2"


def test_how_many_requests_are_in_flight_does_not_change_the_result():
    one, other = (AnnotateConfig(**STAGE, by="model", judge=JUDGE | {"concurrency": n}) for n in (1, 8))
    assert result_keys(one) == result_keys(other)
    deaf = AnnotateConfig(**STAGE, by="model", judge=JUDGE | {"hears": False})
    assert result_keys(one) != result_keys(deaf)


def test_who_is_excluded_is_a_list_in_yaml():
    keys = {"stage": "pairs", "completions": "3_sample", "annotations": "4_annotate"}
    assert PairsConfig(**keys, exclude=["ear"]).exclude == ["ear"]


@pytest.mark.parametrize("config", [PairsConfig, LabelsConfig])
def test_the_bound_is_for_judgements(config):
    keys = {"stage": config.kind(), "completions": "3_sample"}
    assert config(**keys, annotations="4_annotate").min_model_agreement == 0.6
    more = {"good_from": 1.0} if config is LabelsConfig else {}
    with pytest.raises(ValueError, match="min_model_agreement: has no effect with scores"):
        config(**keys, **more, scores="4_score", min_model_agreement=0.7)
