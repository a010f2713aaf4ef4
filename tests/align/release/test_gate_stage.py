"""The gate on a run folder of real files: contamination, the champion, and what is written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

import preference_data
from align.evaluation.benchmarks import air_bench
from align.evaluation.benchmarks.air_bench import Item
from align.evaluation.judges.facts import FactJudge
from align.generation.engine import Completion
from align.recipe.config.evaluation import EvaluateConfig, Thresholds
from align.release.registry import RegistryDown
from align.release.verdict import checks, decide
from align.run_folder.artifacts import StageFolder, read_manifest
from align.stages import evaluate
from align.stages.gate import unfinished_share
from preference_data import store
from preference_data.audio import acoustic, contamination
from preference_data.audio.contamination import Clip, Contamination
from preference_data.schema import AudioClip
from preference_data.toy_world.phrasebook import Phrasebook

PHRASEBOOK = Path(preference_data.__file__).parent / "toy_world" / "phrasebooks" / "synthetic.yaml"


@pytest.fixture
def gated(monkeypatch):
    """The module that makes runs, with a registry beside each run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    import gated_run

    return gated_run


@pytest.mark.parametrize("asks", [False, True])
def test_rewards_by_the_judge_are_found_behind_the_candidate(gated, tmp_path, asks):
    """A policy that was rewarded by facts, and then trained further on pairs."""
    run = gated.make(tmp_path / "run")
    shutil.rmtree(run / "6_dpo")
    shutil.rmtree(run / "2_sft")

    def rewarded(folder):
        gated.weights(1.0)(folder)
        (folder / "reward.json").write_text(json.dumps({"rewards": [{"kind": "facts", "judge": "facts"}]}))

    gated.stage(run, "2_sft", "grpo", ["0_corpus"], rewarded)
    gated.stage(run, "6_dpo", "dpo", ["0_corpus", "2_sft", "5_pairs"], gated.weights(2.0))
    gated.evaluate(run)
    verdict = gated.gate(run, model_name=None, independent_judge=asks)
    assert verdict["rewards"] == {"2_sft": {"rewards": [{"kind": "facts", "judge": "facts"}]}}
    [check] = [check for check in verdict["checks"] if check["name"] == "independent judge"]
    assert "facts also gave the rewards of 2_sft" in check["reason"]
    assert verdict["verdict"] == ("fail" if asks else "pass"), verdict["reasons"]


@pytest.mark.parametrize(
    ("rewards", "chosen", "score", "verdict", "rise"),
    [
        ([0.2, 0.4, 0.6], None, (0.2, 0.9), "pass", (0.2, 0.6)),
        ([0.2, 0.4, 0.6], None, (-0.9, -0.2), "fail", (0.2, 0.6)),
        ([0.2, 0.4, 0.1], 20.0, (-0.9, -0.2), "fail", (0.2, 0.4)),  # the checkpoint of step 20 was published
        ([0.2, 0.4, 0.1], None, (-0.9, -0.2), "pass", (0.2, 0.1)),
        ([0.2, 0.4, 0.6], 10.0, (0.2, 0.9), "fail", None),
        ([], None, (0.2, 0.9), "fail", None),
    ],
)
def test_a_reward_that_rose_while_the_judges_score_fell_is_refused(
    gated, tmp_path, rewards, chosen, score, verdict, rise
):
    scores = gated.scores(comparison__score=dict(zip(("ci_low", "ci_high"), score, strict=True)))
    run = gated.make(tmp_path / "run", scores=scores)
    shutil.rmtree(run / "6_dpo")

    def rewarded(folder):
        gated.weights(2.0)(folder)
        (folder / "reward.json").write_text(json.dumps({"rewards": [{"kind": "length"}]}))
        rows = [{"step": 10 * i, "reward": value} for i, value in enumerate(rewards, 1)]
        rows.insert(1, {"step": 10, "dev/score": 5.0})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    metrics = {"chosen_step": chosen} if chosen else {}
    gated.stage(run, "6_dpo", "grpo", ["0_corpus", "2_sft"], rewarded, metrics)
    found = gated.gate(run, model_name=None)
    assert found["verdict"] == verdict, found["reasons"]
    assert found["reward_rises"] == {"6_dpo": rise and {"first": rise[0], "last": rise[1]}}
    if verdict == "fail":
        assert [reason.partition(":")[0] for reason in found["reasons"]] == ["proxy gap"]
    gated.evaluate(
        run, scores | {"before": "6_dpo", "after": "2_sft"}
    )  # what the baseline earned is no matter
    assert gated.gate(run, model_name=None, min_audio_effect=None)["reward_rises"] == {}


def test_simulated_annotators_are_no_independent_judge(gated, tmp_path):
    run = gated.make(tmp_path / "run")
    shutil.rmtree(run / "4_annotate")
    gated.stage(
        run, "4_annotate", "annotate", ["0_corpus"], gated.text("judgements.jsonl", "{}"), by="simulated"
    )
    verdict = gated.gate(run, model_name=None, independent_judge=True)
    assert verdict["reasons"] == ["independent judge: facts also gave the rewards of 4_annotate"]
    assert gated.gate(run, model_name=None)["verdict"] == "pass"


@pytest.mark.parametrize(
    ("judge", "name"),
    [
        ({"model": "owner/ear", "url": "http://a/v1", "hears": True}, "owner/ear"),
        ({"model": "models/reader", "hears": False}, "reader"),
    ],
)
def test_a_model_that_judged_the_comparisons_is_no_independent_judge(gated, tmp_path, judge, name):
    scores = gated.scores(judge={"name": f"{name} (strict)", "model": name, "shares_ground_truth": False})
    run = gated.make(tmp_path / "run", scores=scores)
    shutil.rmtree(run / "4_annotate")
    written = gated.text("judgements.jsonl", "{}")
    gated.stage(run, "4_annotate", "annotate", ["0_corpus"], written, by="model", judge=judge)
    for asks in (True, False):
        verdict = gated.gate(run, model_name=None, independent_judge=asks)
        [check] = [check for check in verdict["checks"] if check["name"] == "independent judge"]
        assert f"{name} (strict) also gave the rewards of 4_annotate" in check["reason"]
        assert check["passed"] is not asks


# -------------------------------------------------------------------------- contamination


def test_audio_is_the_same_by_bytes_by_samples_and_by_sound(gated, tmp_path):
    gated.tone(tmp_path / "b.wav", 440)
    gated.tone(tmp_path / "other.wav", 450)
    samples, rate = soundfile.read(tmp_path / "b.wav", dtype="float32")
    (tmp_path / "copy.wav").write_bytes((tmp_path / "b.wav").read_bytes())
    soundfile.write(tmp_path / "flac.flac", samples, rate, subtype="PCM_16")
    soundfile.write(tmp_path / "float.wav", samples, rate, subtype="FLOAT")
    soundfile.write(tmp_path / "stereo.wav", np.stack([samples, samples], 1), rate, subtype="PCM_24")
    soundfile.write(tmp_path / "quieter.wav", samples * 0.9, rate)
    soundfile.write(tmp_path / "cut.wav", samples[:-1], rate)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    trained = {path.name: Clip(path) for path in sorted(tmp_path.iterdir()) if path.name != "b.wav"}
    seen = []
    found = contamination.find({"b.wav": Clip(tmp_path / "b.wav")}, trained, on_progress=seen.append)
    assert {(one.trained, one.by) for one in found.overlaps} == {
        ("copy.wav", "bytes"),
        ("flac.flac", "samples"),
        ("float.wav", "samples"),
        ("stereo.wav", "samples"),
        ("quieter.wav", "sound"),
        ("cut.wav", "sound"),
    }
    assert (found.heard, found.alike, found.n_benchmark, found.n_trained) == (1, 0, 1, 8)
    assert found.unreadable == ("broken.wav: unreadable",)
    assert seen == list(range(1, 10))


def test_a_clean_run_passes_and_the_verdict_tells_what_it_rests_on(gated, tmp_path):
    run = gated.make(tmp_path / "run")
    found = gated.gate(run)
    assert found["verdict"] == "pass", found["reasons"]
    assert found["champion"] == {"version": None, "weights": None, "move": None}
    assert found["registry"] == {"model_name": gated.MODEL, "alias": "champion"}
    assert found["contamination"] == {
        "benchmark_clips": 4,
        "trained_clips": 5,
        "heard": 0,
        "alike": 0,
        "cannot_find": acoustic.CANNOT_FIND,
        "overlaps": [],
        "unreadable": [],
        "unknown_training_data": [],
        "changed_corpora": [],
    }
    assert found["weights"]["6_dpo"] != found["weights"]["2_sft"]
    assert read_manifest(run / "8_gate")["metrics"]["checks_fail"] == 0


@pytest.mark.parametrize(("name", "by"), [("again.wav", "bytes"), ("again.flac", "samples")])
def test_a_benchmark_clip_among_the_trained_ones_fails(gated, tmp_path, name, by):
    def corpus(folder):
        gated.corpus(folder)
        clips = store.read(folder / "clips.jsonl", AudioClip)
        clip, copied = folder / "test/Chat/speech_QA_made/2.wav", folder / "audio/preference" / name
        if copied.suffix == clip.suffix:
            copied.write_bytes(clip.read_bytes())
        else:
            soundfile.write(copied, *soundfile.read(clip))
        path = f"audio/preference/{name}"
        more = AudioClip(id="more", path=path, split="preference", duration_s=0.2, sha256="0" * 64)
        store.write(folder / "clips.jsonl", [*clips, more])

    found = gated.gate(gated.make(tmp_path / "run", corpus=corpus), model_name=None)
    assert found["verdict"] == "fail"
    assert found["contamination"]["overlaps"] == [
        {
            "benchmark": "test/Chat/speech_QA_made/2.wav",
            "trained": f"0_corpus/audio/preference/{name}",
            "by": by,
        }
    ]
    assert "contamination: 1 of 4 benchmark clips" in found["reasons"][0]


def test_a_re_encoded_benchmark_clip_among_the_trained_ones_is_told_apart(gated, tmp_path):
    def corpus(folder):
        gated.corpus(folder)
        clips = store.read(folder / "clips.jsonl", AudioClip)
        samples, rate = soundfile.read(folder / "test/Chat/speech_QA_made/2.wav", dtype="float32")
        copied = folder / "audio/preference/again.ogg"
        soundfile.write(copied, np.pad(samples / 2, (1600, 0)), rate, format="OGG", subtype="VORBIS")
        path = "audio/preference/again.ogg"
        more = AudioClip(id="more", path=path, split="preference", duration_s=0.3, sha256="0" * 64)
        store.write(folder / "clips.jsonl", [*clips, more])

    found = gated.gate(gated.make(tmp_path / "run", corpus=corpus), model_name=None)
    assert found["verdict"] == "fail"
    assert (found["contamination"]["heard"], found["contamination"]["alike"]) == (0, 1)
    assert found["contamination"]["overlaps"][0]["by"] == "sound"
    assert found["reasons"][0].startswith("contamination by sound: 1 of 4 benchmark clips")


def test_a_training_clip_that_is_gone_or_a_corpus_that_changed_fails(gated, tmp_path):
    run = gated.make(tmp_path / "run")
    (run / "0_corpus/audio/train/1.wav").unlink()
    found = gated.gate(run, model_name=None)
    assert found["reasons"] == [
        "contamination: not measured: 1 clips cannot be read, e.g. 0_corpus/audio/train/1.wav: missing"
    ]

    def other(folder):
        gated.corpus(folder)
        (folder / "more.txt").write_text("other")

    gated.stage(run, "0_corpus", "corpus", [], other)
    found = gated.gate(run, model_name=None)
    assert found["reasons"] == ["contamination: not measured: a corpus has changed since it was used"]
    assert found["contamination"]["changed_corpora"] == ["0_corpus"]


# -------------------------------------------------------------------------- the registry


def test_without_mlflow_there_is_no_verdict(gated, tmp_path, monkeypatch):
    run = gated.make(tmp_path / "run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    with pytest.raises(RegistryDown, match="MLFLOW_TRACKING_URI") as caught:
        gated.gate(run)
    assert "secret" not in str(caught.value)
    assert not (run / "8_gate").exists()
    assert gated.gate(run, model_name=None)["verdict"] == "pass"  # who asks for no champion needs no MLflow


# -------------------------------------------------------------------------- collapse, as answers


@pytest.fixture(scope="module")
def questions():
    """600 questions on made facts, and what a policy with the demo's habits answers to them."""
    book, rng = Phrasebook.load(PHRASEBOOK), np.random.default_rng(0)
    made = [
        {"word": "seven", "gender": "man"},
        {"word": "tiger", "gender": "woman"},
        {"event": "bell", "count": "two"},
        {"event": "knock", "count": "four"},
        {"instrument": "piano", "direction": "rising", "tempo": "fast"},
        {"instrument": "flute", "direction": "falling", "tempo": "slow"},
    ]
    items, references, spoiled = [], [], []
    for i in range(600):
        facts = made[i % len(made)]
        asked = book.ask(facts, rng)
        task = book.task_of(facts)
        items.append(Item(f"q{i}", f"{i}.wav", asked.text, asked.reference, json.dumps(facts), task, "made"))
        references.append(asked.reference)
        spoiled.append(book.spoil(asked, facts, rng)[0])
    return items, references, spoiled


def evaluated(questions, folder, candidate, baseline, logp):
    """scores.json as the evaluation writes it, from completions through the real fact judge."""
    items, _, _ = questions
    given = evaluate._Questions(Path("corpus"), "test/", items, air_bench.Audit(items, [], {}), [])
    judge, out = FactJudge(PHRASEBOOK), StageFolder(folder, "7_evaluate", "x")
    out.open()
    said = {"sft": (baseline, -0.4), "dpo": (candidate, logp)}
    texts = {policy: {"answers": own, "shuffled": [*own[1:], own[0]]} for policy, (own, _) in said.items()}
    answers = {
        policy: evaluate._judge_answers(
            policy, given, [[Completion(text, [1], [logp])] for text in own], judge, out
        )
        for policy, (own, logp) in said.items()
    }
    return {
        "before": "sft",
        "after": "dpo",
        "judge": judge.describe(items),
        "policies": {
            policy: evaluate._scores(policy, given, own, answers[policy], judge, "7_evaluate")
            for policy, own in texts.items()
        },
        **evaluate._comparisons(CONFIG, given, texts, answers),
    }


CONFIG = EvaluateConfig(
    stage="evaluate", corpus="0_corpus", policies=["sft", "dpo"], before="sft", after="dpo"
)
RL_LIMITS = {
    "kind_margins": {"behaviour": 0.1},
    "max_under_abstention_rise": 0.1,
    "max_kind_length_ratio": 1.5,
    "min_entropy_ratio": 0.1,
    "max_foreign_rise": 0.02,
}


def outcome(questions, folder, spoil, logp=-0.2, limits=RL_LIMITS):
    """The verdict on a candidate whose i-th answer is `spoil(i, good answer)`."""
    _, references, spoiled = questions
    baseline = [spoiled[i] if i % 2 else references[i] for i in range(len(references))]
    better = [spoiled[i] if i % 5 == 1 else references[i] for i in range(len(references))]
    candidate = [spoil(i, text) for i, text in enumerate(better)]
    return decide(
        checks(
            evaluated(questions, folder, candidate, baseline, logp),
            Thresholds(judge=None, **limits).model_dump(),
            unfinished={"sft": unfinished_share(baseline), "dpo": unfinished_share(candidate)},
            contamination=Contamination((), 600, 5000, ()),
            champion=None,
        )
    )


def test_a_better_candidate_passes(questions, tmp_path):
    found = outcome(questions, tmp_path, lambda i, text: text)
    assert found.verdict == "pass", found.reasons


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda i, text: "There is no music." if i % 8 == 0 else text, "over-abstention"),
        (lambda i, text: " ".join(text.split()[:2]), "shortest length ratio"),
        (lambda i, text: f"{text} The" if i % 8 == 0 else text, "rise of unfinished answers"),
        (lambda i, text: f"{text} {text} {text}", "length ratio"),
        (lambda i, text: "The speaker says seven.", "distinct answers"),
        (lambda i, text: "钢琴在演奏。" if i % 16 == 0 else text, "rise of foreign answers"),
    ],
    ids=["over-abstention", "short", "fragments", "repetition", "one answer", "another language"],
)
def test_each_collapse_is_caught_by_its_own_sign(questions, tmp_path, spoil, reason):
    found = outcome(questions, tmp_path, spoil)
    assert found.verdict == "fail"
    assert any(one.startswith(reason) for one in found.reasons), found.reasons


@pytest.mark.parametrize(
    ("is_of_kind", "spoil", "reasons"),
    [
        (
            lambda text: text.startswith("There is no"),
            lambda good, bad: bad,  # a value for a thing that is not there
            ["behaviour on absent", "under-abstention"],
        ),
        (
            lambda text: " " not in text,
            lambda good, bad: bad,  # a sentence where one word was asked for
            ["behaviour on one_word", "length ratio on one_word"],
        ),
        (
            lambda text: text.startswith("There is no"),
            lambda good, bad: f"{good} {good}",
            ["behaviour on absent", "length ratio on absent"],
        ),
    ],
    ids=["absent answered", "form ignored", "absent long"],
)
def test_what_one_kind_loses_while_the_others_gain_is_seen(questions, tmp_path, is_of_kind, spoil, reasons):
    _, references, spoiled = questions

    def candidate(i, text):
        good = references[i]
        return spoil(good, spoiled[i]) if is_of_kind(good) else good

    few = {"min_distinct_ratio": 0.1}  # all that is right says fewer different things than what is made up
    assert outcome(questions, tmp_path, candidate, limits=few).verdict == "pass"
    found = outcome(questions, tmp_path, candidate, limits=RL_LIMITS | few)
    assert found.verdict == "fail"
    assert [reason.partition(":")[0] for reason in found.reasons] == reasons


def test_a_policy_that_is_sure_of_a_single_sentence_is_refused(questions, tmp_path):
    found = outcome(questions, tmp_path, lambda i, text: "The speaker says seven.", logp=-0.001)
    signs = {one.partition(":")[0] for one in found.reasons}
    assert {"distinct answers", "entropy ratio", "under-abstention", "audio effect"} <= signs
