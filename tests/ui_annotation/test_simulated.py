"""Simulated annotators over the real API: honest without errors, blind to the order, sharing the work."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

import preference_data
from preference_data.schema import Completion, Prompt, stable_id
from preference_data.toy_world.phrasebook import Phrasebook
from tests.ui_annotation.conftest import ANNOTATORS
from ui_annotation import assignment, client, pull, push, simulated
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


class Office:
    """A workspace with two annotators and a pushed project."""

    def __init__(self, server, corpus, **draws):
        self.name, self.people = server.add_workspace(*ANNOTATORS), ANNOTATORS
        self.owner = client.connect(server.url, server.api_key("owner"))
        self.annotators = [client.connect(server.url, server.api_key(one)) for one in self.people]
        self.prompts, completions = world(corpus)
        options = {"per_prompt": 3, "overlap": 0.4, "retests": 0.1, "gold": 0.1, "seed": 0} | draws
        self.comparisons = assignment.draw(completions, self.prompts, **options)
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
        return sum(2 if one.everyone else 1 for one in self.comparisons)


def test_without_errors_the_truth_comes_back_and_the_work_is_shared(argilla_server, tmp_path):
    office = Office(argilla_server, tmp_path)
    told = []
    done = office.annotate(office.informed(), on_progress=lambda done, total: told.append((done, total)))
    assert done == office.wanted()
    assert told == [(i + 1, done) for i in range(done)]

    key = {one.id: one for one in office.comparisons}
    made = office.pull()
    assert Counter(one.comparison for one in made) == {
        one.id: 2 if one.everyone else 1 for one in office.comparisons
    }
    assert set(Counter(one.annotator for one in made)) == set(office.people)
    assert {one.heard for one in made} == {1.0}
    for one in made:
        truth = office.prompts[one.prompt_id].answer_gt
        texts = key[one.comparison].text_a, key[one.comparison].text_b
        if truth in texts:
            assert one.factuality == ("a" if texts[0] == truth else "b")
        else:
            assert one.factuality == "both_bad"
        if one.purpose == "gold":
            assert one.factuality == one.expected
        assert one.behaviour == ("tie" if LONG not in texts else "b" if texts[0] == LONG else "a")
        assert one.errors_a == (("invented_event",) if texts[0] == LONG else ())
    # where one judgement is wanted, the hash of the id says whose it is: nothing is done twice
    one_each = [one for one in made if not key[one.comparison].everyone]
    assert all(one.annotator == office.people[int(stable_id(one.comparison), 16) % 2] for one in one_each)

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
    before = {one.id: one for one in office.pull()}
    assert 20 <= len(before) < office.wanted()
    assert office.annotate(office.informed()) == office.wanted() - len(before)
    after = {one.id: one for one in office.pull()}
    assert len(after) == office.wanted()
    assert all(after[name].submitted_at == one.submitted_at for name, one in before.items())
    undisturbed.annotate(undisturbed.informed())
    said, same = ({one.comparison: one.factuality for one in each.pull()} for each in (office, undisturbed))
    assert said == same


def task(text_a, text_b):
    return simulated.Task("id", "external", ("/seven",), (0.2,), "Which word is spoken?", text_a, text_b)


def judged(judge, seeds=range(2000)):

    return [judge(task(RIGHT, WRONG), np.random.default_rng(seed)) for seed in seeds]


def knowing(tmp_path, error_rate):
    prompts, _ = world(tmp_path, n=1)
    return simulated.informed(prompts.values(), {"seven.wav": "/seven"}, PHRASEBOOK, error_rate=error_rate)


def test_errors_come_at_the_declared_rate(tmp_path):
    wrong = [one["factuality"] != "a" for one in judged(knowing(tmp_path, 0.4))]
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


def choose_at_random(seen, rng):
    """An annotator who does not care."""
    factuality, behaviour = rng.choice(["a", "b", "tie", "both_bad"], size=2)
    return {"factuality": str(factuality), "behaviour": str(behaviour)}


def always_a(seen, rng):
    """An annotator who always presses the first key."""
    return {"factuality": "a", "behaviour": "a"}


def test_those_who_do_not_listen_to_reason_can_be_found_out(argilla_server, tmp_path):
    office = Office(argilla_server, tmp_path, overlap=1.0, gold=0.5)
    office.annotators, (careless, stubborn) = office.annotators[:1], office.people
    office.annotate(choose_at_random)
    office.annotators = [client.connect(argilla_server.url, argilla_server.api_key(stubborn))]
    office.annotate(always_a)
    made = office.pull()
    assert all(one.factuality == "a" for one in made if one.annotator == stubborn)
    assert len({one.factuality for one in made if one.annotator == careless}) == 4
    gold = [one for one in made if one.purpose == "gold" and one.annotator == stubborn]
    right = sum(one.expected == "a" for one in gold) / len(gold)
    assert 0 < right < 1  # sides of gold are drawn by lot
