"""The evaluate stage's report, from given texts: with the judge by facts, and with a judge model."""

import json
from pathlib import Path

import numpy as np
import pytest

import preference_data
from align.evaluation import judged_answers
from align.evaluation.benchmarks import air_bench, tasks
from align.evaluation.benchmarks.air_bench import Item
from align.evaluation.benchmarks.rows import Utterance
from align.evaluation.judges.endpoint import Endpoint
from align.evaluation.judges.facts import FactJudge
from align.evaluation.judges.llm_judge import LLMJudge
from align.generation.engine import Completion
from align.recipe.config.evaluation import EvaluateConfig, JudgeModel
from align.run_folder.artifacts import StageFolder
from align.stages import evaluate
from preference_data.toy_world.phrasebook import Phrasebook
from tests.align.evaluation.openai_server import judge, serving

PHRASEBOOK = Path(preference_data.__file__).parent / "toy_world" / "phrasebooks" / "synthetic.yaml"
FACTS = [
    {"word": "seven", "gender": "man"},
    {"event": "bell", "count": "two"},
    {"instrument": "piano", "direction": "rising", "tempo": "fast"},
]
CONFIG = EvaluateConfig(
    stage="evaluate", corpus="0_corpus", policies=["2_sft", "6_dpo"], before="2_sft", after="6_dpo"
)


@pytest.fixture(scope="module")
def questions():
    """24 questions, one of them without a usable clip, and one utterance; beside them wrong answers."""
    book, rng = Phrasebook.load(PHRASEBOOK), np.random.default_rng(0)
    items, wrong = [], []
    for i in range(24):
        facts = FACTS[i % 3]
        question = book.ask(facts, rng)
        meta, task = json.dumps(facts), book.task_of(facts)
        items.append(Item(f"q{i}", f"{i}.wav", question.text, question.reference, meta, task, "synthetic"))
        wrong.append(book.spoil(question, facts, rng)[0])
    given = evaluate._Questions(
        Path("corpus"),
        "test/",
        items,
        air_bench.Audit(items[:-1], [], {}),
        [
            evaluate._Recognition(
                "recognised",
                "recognition.jsonl",
                "recognition",
                tasks.Rows(Path("corpus"), [Utterance("u.wav", "p", "one", "s")], []),
            )
        ],
    )
    return given, wrong[:-1]


def report(questions, folder, judge):
    """The parts of `scores.json` that rest on the policies' texts."""
    given, wrong = questions
    right = [item.answer_gt for item in given.audit.usable]
    answers = {"2_sft": [w if i % 2 else r for i, (w, r) in enumerate(zip(wrong, right, strict=True))]}
    answers["6_dpo"] = right
    texts = {
        policy: {
            "answers": own,
            "shuffled": [*own[1:], own[0]],
            "recognised": ["one" if own is right else "two"],
        }
        for policy, own in answers.items()
    }
    completions = {
        policy: [[Completion(text, [1, 2], [-0.1, -0.3])] for text in own] for policy, own in answers.items()
    }
    completions["2_sft"][0] = []  # its clip could not be read
    out = StageFolder(folder, "7_evaluate", "x")
    out.open()
    judged = {
        policy: evaluate._judge_answers(policy, given, own, judge, out) for policy, own in completions.items()
    }
    policies = {
        policy: evaluate._scores(policy, given, own, judged[policy], judge, "7_evaluate")
        for policy, own in texts.items()
    }
    return out, policies, evaluate._comparisons(CONFIG, given, texts, judged)


def test_by_facts(questions, tmp_path):
    out, policies, comparisons = report(questions, tmp_path, FactJudge(PHRASEBOOK))
    after = policies["6_dpo"]
    assert (after["overall"]["factuality"], after["overall"]["score"], after["overall"]["n"]) == (1, 10, 23)
    assert after["shuffled_audio"]["factuality"] < 1
    assert (after["ratings"]["n"], after["ratings"]["states"]["missing"]) == (24, 1)
    assert list(after["categories"]) == list(comparisons["by_category"]) == ["speech", "sound", "music"]
    kinds = {"absent", "closed", "describe", "one_word"}
    assert set(after["kinds"]) == set(comparisons["by_kind"]) <= kinds
    assert after["kinds"]["absent"]["absent_accuracy"] == 1
    metrics = ["factuality", "behaviour", "fact_accuracy", "absent_accuracy", "score"]
    assert list(comparisons["comparison"]) == metrics
    assert (after["overall"]["entropy"], after["overall"]["foreign"]) == (pytest.approx(0.2), 0)
    gain = comparisons["comparison"]["factuality"]
    assert gain["delta"] == pytest.approx(1 - policies["2_sft"]["overall"]["factuality"])
    assert set(gain) == {"before", "after", "delta", "ci_low", "ci_high", "n"}
    assert after["recognition"] == {"s": {"exact": 1.0, "wer": 0.0, "n": 1}}
    assert comparisons["recognition_comparison"]["s"]["wer"]["delta"] == -1
    rows = judged_answers.read(out.path / "items/6_dpo.jsonl")
    assert rows["q0"].audio.startswith("test/Chat/")
    assert rows["q0"].entropy == pytest.approx(0.2)
    assert judged_answers.read(out.path / "items/2_sft.jsonl")["q0"].entropy is None
    assert len(air_bench.read_answers(out.path / "answers/6_dpo.jsonl")) == 23
    json.dumps([policies, comparisons], allow_nan=False)


@pytest.mark.parametrize(
    ("judge_model", "words"),
    [
        ({"url": "http://a/v1", "parameters": {"messages": []}}, "messages is set by us"),
        ({"url": "http://a/v1", "parameters": {"stream": True}}, "stream is set by us"),
        ({"parameters": {"top_p": 0.9}}, "without a url is greedy"),
        ({"parameters": {"temperature": 1}}, "without a url is greedy"),
    ],
)
def test_parameters_that_a_judge_cannot_take_are_refused_in_the_recipe(judge_model, words):
    with pytest.raises(ValueError, match=words):
        JudgeModel(model="m", **judge_model)
    JudgeModel(model="m", parameters={"max_tokens": 99, "temperature": 0})
    JudgeModel(model="m", url="http://a/v1", parameters={"max_tokens": None, "top_p": 0.9})


def test_by_a_judge_model(questions, tmp_path):
    with serving(judge(lambda text: 1 + text.count("e") % 9)) as server:
        llm_judge = LLMJudge(Endpoint(server.url, "m"), tmp_path / "replies.jsonl", canary_items=3)
        out, policies, comparisons = report(questions, tmp_path, llm_judge)
        about = llm_judge.describe(questions[0].audit.usable)
    after = policies["6_dpo"]
    assert set(after["overall"]) == {"score", "words", "distinct", "entropy", "foreign", "n"}
    assert set(after["kinds"]) == set(comparisons["by_kind"]) == {"speech_QA", "sound_QA", "music_QA"}
    assert list(comparisons["by_kind"]["music_QA"]) == ["score"]
    assert after["ratings"]["overall"] == pytest.approx(after["overall"]["score"])
    assert list(comparisons["comparison"]) == ["score"]
    rows = judged_answers.read(out.path / "items/6_dpo.jsonl").values()
    assert all(row.score == 1 + row.response.count("e") % 9 for row in rows)
    assert all(len(row.replies) == 2 for row in rows)
    assert about["canary_worst"]["points"] >= about["canary_uplift"]
    assert tasks.score("recognition", [], []) == {}
