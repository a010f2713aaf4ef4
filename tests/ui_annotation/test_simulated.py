"""Simulated annotators over the real API: honest without errors, blind to the order, sharing the work."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

import preference_data
from preference_data.schema import CHOICES, Completion, Prompt, stable_id
from preference_data.toy_world.phrasebook import Phrasebook
from tests.ui_annotation.conftest import ANNOTATORS
from ui_annotation import assignment, client, pull, push, simulated
from ui_annotation.assignment import Rates
from ui_annotation.project import Project

PHRASEBOOK = Phrasebook.load(
    Path(preference_data.__file__).parent / "toy_world" / "phrasebooks" / "synthetic.yaml"
)
RIGHT, WRONG, LONG = (
    "The speaker says seven.",
    "The speaker says tiger.",
    "The speaker says seven. The flute plays.",
)
OTHER = "The speaker says water."


def world(corpus, n=10):
    """Prompts on two clips, in turn: one says "seven", the other "water"."""
    for i, word in enumerate(("seven", "water")):
        soundfile.write(corpus / f"{word}.wav", [0.1 * i] * 3_200, 16_000)
    words = ["seven" if i % 2 == 0 else "water" for i in range(n)]
    prompts = {
        f"p{i}": Prompt(
            id=f"p{i}",
            audios=(f"{word}.wav",),
            question="Which word is spoken?",
            answer_gt=f"The speaker says {word}.",
            meta_info=json.dumps({"word": word, "gender": "man"}),
            task_name="speech_QA",
        )
        for i, word in enumerate(words)
    }
    completions = [
        Completion(id=f"{name}-{j}", prompt_id=name, index=j, text=text, policy="x")
        for i, name in enumerate(prompts)
        for j, text in enumerate([RIGHT if words[i] == "seven" else OTHER, WRONG, LONG])
    ]
    return prompts, completions


def is_true(prompt, text):
    facts = json.loads(prompt.meta_info)
    return PHRASEBOOK.assess(text, PHRASEBOOK.question(prompt.question, facts), facts).factual


class Office:
    """A workspace with two annotators and a pushed project."""

    def __init__(self, server, corpus, **draws):
        self.name, self.people = server.add_workspace(*ANNOTATORS), ANNOTATORS
        self.owner = client.connect(server.url, server.api_key("owner"))
        self.annotators = [client.connect(server.url, server.api_key(item)) for item in self.people]
        self.prompts, completions = world(corpus)
        options = {"size": 2, "per_prompt": 3, "overlap": 0.4, "rates": Rates(0.1, 0.1), "seed": 0} | draws
        self.comparisons = assignment.draw(completions, self.prompts, **options, is_true=is_true)
        self.project = Project("s", self.name, self.comparisons, self.prompts, corpus, 2)
        self.pushed = push.push(self.owner, self.project)

    def informed(self, error_rate=0.0):
        return simulated.informed(self.prompts.values(), self.pushed.media, PHRASEBOOK, error_rate=error_rate)

    def annotate(self, judge, **more):
        return simulated.annotate(
            self.annotators, workspace=self.name, datasets=self.pushed.datasets, judge=judge, seed=0, **more
        )

    def pull(self):
        return pull.pull(self.owner, self.project)

    def wanted(self):
        return sum(2 if item.everyone else 1 for item in self.comparisons)


def test_without_errors_the_truth_comes_back_and_the_work_is_shared(argilla_server, tmp_path):
    office = Office(argilla_server, tmp_path)
    told = []
    done = office.annotate(office.informed(), on_progress=lambda done, total: told.append((done, total)))
    assert done == office.wanted()
    assert told == [(i + 1, done) for i in range(done)]

    key = {item.id: item for item in office.comparisons}
    made = office.pull()
    assert Counter(item.comparison for item in made) == {
        item.id: 2 if item.everyone else 1 for item in office.comparisons
    }
    assert set(Counter(item.annotator for item in made)) == set(office.people)
    assert {item.heard for item in made} == {1.0}
    for item in made:
        truth = office.prompts[item.prompt_id].answer_gt
        texts = key[item.comparison].texts
        right = "both_bad" if truth not in texts else "a" if texts[0] == truth else "b"
        assert item.factuality == CHOICES[right]
        if item.purpose == "gold":
            assert item.factuality == item.expected
        assert item.behaviour == CHOICES["tie" if LONG not in texts else "b" if texts[0] == LONG else "a"]
        invented = tuple(("invented_event",) if text == LONG else () for text in texts)
        assert item.errors == (invented if LONG in texts else ())
    # where one judgement is wanted, the hash of the id says whose it is: nothing is done twice
    one_each = [item for item in made if not key[item.comparison].everyone]
    assert all(item.annotator == office.people[int(stable_id(item.comparison), 16) % 2] for item in one_each)

    assert office.annotate(office.informed()) == 0  # the queues are empty


def test_killed_and_repeated_it_goes_on_and_says_the_same(argilla_server, tmp_path, monkeypatch):
    office, undisturbed = (Office(argilla_server, tmp_path) for _ in range(2))
    monkeypatch.setattr(simulated, "_SUBMITTED_AT_ONCE", 5)

    class Killed(Exception):
        pass

    def stop(done, total):
        if done == 20:
            raise Killed

    with pytest.raises(Killed):
        office.annotate(office.informed(), on_progress=stop)
    before = {item.id: item for item in office.pull()}
    assert 20 <= len(before) < office.wanted()
    assert office.annotate(office.informed()) == office.wanted() - len(before)
    after = {item.id: item for item in office.pull()}
    assert len(after) == office.wanted()
    assert all(after[name].submitted_at == item.submitted_at for name, item in before.items())
    undisturbed.annotate(undisturbed.informed())
    said, same = (
        {item.comparison: item.factuality for item in each.pull()} for each in (office, undisturbed)
    )
    assert said == same


def task(*texts):
    return simulated.Task("id", "external", ("/seven",), (0.2,), "Which word is spoken?", texts)


def judged(judge, seeds=range(2000)):

    return [judge(task(RIGHT, WRONG), np.random.default_rng(seed)) for seed in seeds]


def knowing(tmp_path, error_rate):
    prompts, _ = world(tmp_path, n=1)
    return simulated.informed(prompts.values(), {"seven.wav": "/seven"}, PHRASEBOOK, error_rate=error_rate)


def test_errors_come_at_the_declared_rate(tmp_path):
    wrong = [item["factuality"] != "a" for item in judged(knowing(tmp_path, 0.4))]
    # one random choice in four is right by luck
    assert sum(wrong) / len(wrong) == pytest.approx(0.4 * 3 / 4, abs=0.04)


def test_optional_answers_are_given_where_the_phrasebook_can_tell(tmp_path):

    judge = knowing(tmp_path, 0.0)
    said = judge(task(LONG, "The speaker is a man."), np.random.default_rng(0))
    assert said == {
        "factuality": "both_bad",
        "behaviour": "b",
        "errors_a": ["invented_event"],
        "errors_b": ["omission"],
    }


def test_several_are_ranked(tmp_path):
    def ranks(*given):
        return [{"value": place, "rank": rank} for place, rank in zip("abc", given, strict=True)]

    judge = knowing(tmp_path, 0.0)
    said = judge(task(WRONG, RIGHT, LONG), np.random.default_rng(0))
    assert said == {"factuality": ranks(2, 1, 2), "behaviour": ranks(1, 1, 2), "errors_c": ["invented_event"]}
    said = judge(task(WRONG, OTHER, WRONG), np.random.default_rng(0))
    assert said == {"factuality": ranks(2, 2, 2), "behaviour": ranks(1, 1, 1), "all_bad": ["factuality"]}


def choose_at_random(seen, rng):
    """An annotator who does not care."""
    factuality, behaviour = rng.choice(["a", "b", "tie", "both_bad"], size=2)
    return {"factuality": str(factuality), "behaviour": str(behaviour)}


def always_a(seen, rng):
    """An annotator who always presses the first key."""
    return {"factuality": "a", "behaviour": "a"}


def test_those_who_do_not_listen_to_reason_can_be_found_out(argilla_server, tmp_path):
    office = Office(argilla_server, tmp_path, per_prompt=1, overlap=1.0, rates=Rates(0.1, 0.8))
    office.annotators, (careless, stubborn) = office.annotators[:1], office.people
    office.annotate(choose_at_random)
    office.annotators = [client.connect(argilla_server.url, argilla_server.api_key(stubborn))]
    office.annotate(always_a)
    made = office.pull()
    assert all(item.factuality == CHOICES["a"] for item in made if item.annotator == stubborn)
    assert len({item.factuality for item in made if item.annotator == careless}) == 4
    gold = [item for item in made if item.purpose == "gold" and item.annotator == stubborn]
    right = sum(item.expected == CHOICES["a"] for item in gold) / len(gold)
    assert 0 < right < 1  # sides of gold are drawn by lot
