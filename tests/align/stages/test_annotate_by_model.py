"""A model judges beside people: it is used as far as it agrees with them, and people's share falls.

People's judgements come as a snapshot, so that no annotation server is needed; the judge is behind a socket.
"""

import json
from io import BytesIO
from math import sqrt

import numpy as np
import pytest
import soundfile

from align.recipe.config.preference import AnnotateConfig, LabelsConfig, PairsConfig
from align.run_folder.artifacts import StageFolder, read_json
from align.stages import annotate, labels, model_judgements, pairs
from preference_data import store
from preference_data.preferences.model_agreement import ModelDisagrees
from preference_data.schema import AudioClip, Completion, Judgement, PreferencePair, Ranking
from tests.align.evaluation import comparing_judges as judges
from tests.align.evaluation.openai_server import serving

N = 60
STAGE = {"stage": "annotate", "completions": "3_sample", "corpus": "0_corpus", "comparisons_per_prompt": 1}
PAIRS = {"stage": "pairs", "completions": "3_sample", "annotations": "4_annotate"}


@pytest.fixture
def inputs(tmp_path):
    """Sixty tones, a question about each, and two completions of it."""
    folders = {"0_corpus": tmp_path / "0_corpus", "3_sample": tmp_path / "3_sample"}
    for folder in folders.values():
        folder.mkdir()
    for i in range(N):
        (folders["0_corpus"] / f"{i}.wav").write_bytes(judges.tone(i))
    clips = [
        AudioClip(id=f"{i}", path=f"{i}.wav", split="preference", duration_s=0.2, sha256=f"{i:064x}")
        for i in range(N)
    ]
    store.write(folders["0_corpus"] / "clips.jsonl", clips)
    store.write(folders["3_sample"] / "prompts.jsonl", judges.prompts(N).values())
    completions = [
        Completion(id=f"p{i}-{n}", prompt_id=f"p{i}", index=n, text=text, policy="x")
        for i in range(N)
        for n, text in enumerate(judges.comparison(i).texts)
    ]
    store.write(folders["3_sample"] / "completions.jsonl", completions)
    return folders


def stage_folder(inputs):
    out = StageFolder(inputs["0_corpus"].parent / "runs/mine", "4_annotate", "f" * 64)
    out.path.mkdir(parents=True, exist_ok=True)
    return out


def by_a_person(comparison):
    """Ann, who hears what is high and what is low."""
    wav = judges.tone(int(comparison.prompt_id[1:]))
    right = [judges.is_right(text, wav) for text in comparison.texts]
    ranking = Ranking(ranks=tuple(1 if own else 2 for own in right))
    copied = ("prompt_id", "completions", "texts", "purpose", "about", "expected")
    return Judgement(
        id=f"{comparison.id}-ann",
        comparison=comparison.id,
        kind="choice",
        annotator="ann",
        annotator_kind="person",
        factuality=ranking,
        behaviour=ranking,
        heard=1.0,
        **{name: getattr(comparison, name) for name in copied},
    )


def annotated(inputs, behave, share=0.5):
    """The stage's folder, its metrics and the judge's requests; Ann has judged what people judge."""
    people = {**STAGE, "by": "people", "overlap": 0.0, "people_share": share}
    out = stage_folder(inputs)
    with serving(behave) as server:
        people["judge"] = {"model": "ear", "url": server.url, "hears": True}
        project = annotate.make_project(AnnotateConfig(**people), inputs, out)
        snapshot = inputs["0_corpus"].parent / "snapshot"
        store.write(snapshot / "judgements.jsonl", [by_a_person(item) for item in project.open()])
        metrics = annotate.run(AnnotateConfig(**people, snapshot=str(snapshot)), inputs, out)
        return out.path, metrics, server.requests


def paired(inputs, folder, config=PairsConfig, module=pairs, **keys):
    out = StageFolder(inputs["0_corpus"].parent, "5_pairs", "f" * 64)
    out.path.mkdir(exist_ok=True)
    metrics = module.run(config(**PAIRS | keys), {**inputs, "4_annotate": folder}, out)
    return out.path, metrics


@pytest.mark.parametrize(
    ("behave", "bias"),
    [(judges.deaf, "longer"), (judges.first_place, "first_place"), (judges.at_chance, None)],
    ids=["deaf", "first place", "chance"],
)
def test_a_judge_that_does_not_listen_is_refused_with_the_figure(inputs, behave, bias):
    folder, metrics, _ = annotated(inputs, behave)
    report = read_json(folder / "model.json")
    share = report["agreement"]["axes"]["factuality"]["share"]
    assert share["low"] < 0.6
    assert metrics["model_agreement_factuality"] == share["value"]
    figure = f"factuality: it agrees with {share['value']:.3f} .* n {share['n']}"
    with pytest.raises(ModelDisagrees, match=figure):
        paired(inputs, folder)
    with pytest.raises(ModelDisagrees, match=figure):
        paired(inputs, folder, LabelsConfig, labels, stage="labels")
    if bias:
        assert report["biases"]["model"][bias]["value"] == 1.0
    assert abs(report["biases"]["people"]["longer"]["value"] - 0.5) < 0.25


def test_a_good_judge_is_used_where_people_have_not_judged(inputs):
    folder, metrics, requests = annotated(inputs, judges.hearing)
    report = read_json(folder / "model.json")
    assert report["agreement"]["overall"]["share"]["value"] == 1.0
    assert report["biases"]["model"]["flips"]["value"] == 0.0
    assert report["replies"] == {"used": 2 * N}
    assert len(requests) == 2 * N
    judgements = store.read(folder / "judgements.jsonl", Judgement)
    of_model = [item for item in judgements if item.annotator_kind == "model"]
    of_ann = [item for item in judgements if item.annotator == "ann" and item.purpose == "comparison"]
    assert len(of_model) == N
    assert abs(len(of_ann) - 0.5 * N) < 3 * sqrt(0.25 * N)
    out, counts = paired(inputs, folder)
    built = store.read(out / "pairs.jsonl", PreferencePair)
    assert len(built) == 2 * N
    for pair in built:
        assert judges.is_right(pair.chosen, judges.tone(int(pair.prompt_id[1:])))
    alone = [pair for pair in built if pair.annotators == ("ear",)]
    assert len(alone) == 2 * (N - len(of_ann))
    assert counts["model_unused_factuality"] == counts["model_unused_behaviour"] == 0


def test_what_arrives_is_the_clip(inputs):
    _, _, requests = annotated(inputs, judges.hearing)
    for request in requests[:10]:
        number = int(request.text.split("Question ")[1].split(":")[0])
        heard, rate = soundfile.read(BytesIO(request.wavs[0]))
        sent, _ = soundfile.read(BytesIO(judges.tone(number)))
        assert rate == 16_000
        assert np.abs(heard - sent).max() < 2 / 2**15


def test_people_share_is_a_lot_for_each_comparison(inputs):
    """A larger share holds the smaller one; retests go with what they repeat; by: model leaves nobody any."""
    keys = {**STAGE, "by": "people", "judge": {"model": "m", "url": "http://a/v1", "hears": True}}
    asked = {}
    for share in (0.2, 0.5, 1.0):
        project = annotate.make_project(
            AnnotateConfig(**keys, people_share=share, retests=0.5), inputs, stage_folder(inputs)
        )
        asked[share] = {item.id for item in project.open()}
        by_id = {item.id: item for item in project.comparisons}
        for name in asked[share]:
            assert by_id[name].about is None or by_id[name].about in asked[share]
        for item in project.comparisons:
            assert item.about is None or (item.id in asked[share]) == (item.about in asked[share])
        n = len(project.comparisons)
        assert abs(len(asked[share]) - share * n) <= 4 * sqrt(share * (1 - share) * n)
    assert asked[0.2] < asked[0.5] < asked[1.0]
    alone = AnnotateConfig(**keys | {"by": "model"})
    assert annotate.make_project(alone, inputs, stage_folder(inputs)).open() == []


def test_a_model_alone_needs_evidence_or_a_recipe_that_wants_none(inputs):
    out = stage_folder(inputs)
    with serving(judges.hearing) as server:
        judge = {"model": "ear", "url": server.url, "hears": True}
        annotate.run(AnnotateConfig(**STAGE, by="model", judge=judge), inputs, out)
    assert json.loads((out.path / "model.json").read_text())["agreement"]["overall"]["share"] is None
    with pytest.raises(ModelDisagrees, match="nothing to compare it with"):
        paired(inputs, out.path)
    folder, _ = paired(inputs, out.path, min_model_agreement=0.0)
    assert len(store.read(folder / "pairs.jsonl", PreferencePair)) == 2 * N
    assert model_judgements.read_report(out.path)["hears"] is True
