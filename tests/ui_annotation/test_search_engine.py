import threading
import uuid

import argilla as rg
import httpx
import pytest

from ui_annotation import render

ANNOTATORS = ("annotator-1", "annotator-2")
CHOICES = ["a", "b", "tie"]
FIELDS = ("audio", "prompt", "response_a", "response_b")
TEXTS = [
    # prompt, answer A, answer B
    ("What is heard?", "A dog barks twice.", "A piano plays while a dog barks."),
    ("What is heard?", "A piano plays and a siren wails.", "Someone sings."),
    ("What's the word?", "The word is seven.", 'It says "eleven" & <twelve>; lt.'),
    ("Who speaks?", "A woman whispers.", "Dogs, barking? A bark, I think."),
    ("Noise in the café?", "Cups clatter.", "Rain falls on a tin roof."),
    ("A long one?", "First line.\nSecond line, pre-recorded.", "Nothing."),
]

MARKUP = ["white", "space", "style", "div", "src", "wav", "media", "controls", "34", "quot"]
ODD_QUERIES = ['a"b OR (x) NEAR(', '"', "''", "*", "-", "|", "a AND OR NOT", "{body}: ^x", "body:piano", "\0"]
ODD_QUERIES += ["\\", "%_", "\N{DOG}", "_", "'; DROP TABLE records; --"]
ODD_QUERIES += ["odd " * 3000, "odd|even " * 1000, "odd " + "-what | -even " * 1000]


class Searched:
    """The server, as its people search it."""

    def __init__(self, argilla_server):
        self._as = {name: argilla_server.client(name) for name in ("owner", *ANNOTATORS)}
        self.sdk = rg.Argilla(api_url=argilla_server.url, api_key=argilla_server.api_key("owner"))

    def call(self, method, path, who="owner", **options):
        """The answer's JSON; anything but 2xx fails."""
        answer = self._as[who].request(method, f"/api/v1{path}", **options)
        assert answer.is_success, (method, path, answer.status_code, answer.text)
        return answer.json() if answer.content else None

    def search(self, dataset, *, who="owner", text=None, field=None, where=(), sort=(), **page):
        body = {"query": {}}
        if text is not None:
            body["query"]["text"] = {"q": text, "field": field}
        if where:
            body["filters"] = {"and": list(where)}
        if sort:
            body["sort"] = [{"scope": scope, "order": order} for scope, order in sort]
        mine = "" if who == "owner" else "me/"
        return self.call("POST", f"/{mine}datasets/{dataset.id}/records/search", who, json=body, params=page)

    def found(self, dataset, **wanted):
        """The names of the records found, in their order."""
        answer = self.search(dataset, **wanted)
        names = [item["record"]["external_id"] for item in answer["items"]]
        assert answer["total"] == len(names)
        return names

    def records(self, dataset):
        """Names -> the server's ids."""
        page = self.call("GET", f"/datasets/{dataset.id}/records", params={"limit": 1000})
        return {item["external_id"]: item["id"] for item in page["items"]}

    def answer(self, record, who, status="submitted", choice="a", stars=3):
        values = {"choice": {"value": choice}, "stars": {"value": stars}}
        answered = {"values": values, "status": status}
        return self.call("POST", f"/records/{record}/responses", who, json=answered)


@pytest.fixture(scope="module")
def server(argilla_server):
    return Searched(argilla_server)


def make_dataset(server):
    settings = rg.Settings(
        fields=[rg.TextField(name, use_markdown=True) for name in FIELDS],
        questions=[
            rg.LabelQuestion("choice", labels=CHOICES),
            rg.RatingQuestion("stars", values=[1, 2, 3, 4, 5]),
        ],
        metadata=[
            rg.TermsMetadataProperty("task"),
            rg.FloatMetadataProperty("seconds"),
            rg.IntegerMetadataProperty("turn"),
        ],
        vectors=[rg.VectorField("meaning", dimensions=2)],
        distribution=rg.TaskDistribution(min_submitted=2),
    )
    name = f"search-{uuid.uuid4()}"
    return rg.Dataset(name, workspace="audio", settings=settings, client=server.sdk).create()


def make_record(name, prompt, a, b, **rest):
    fields = {"prompt": prompt, "response_a": a, "response_b": b}
    fields = {key: render.verbatim(text) for key, text in fields.items()}
    player = render.players([("/media/audio/" + "0" * 64 + ".wav", 12.5)])
    return rg.Record(id=name, fields={"audio": player, **fields}, **rest)


@pytest.fixture(scope="module")
def dataset(server):
    """Six records, answered by nobody; the tests that share it change nothing."""
    made = make_dataset(server)
    records = []
    for i, texts in enumerate(TEXTS):
        known = {"task": ["asr", "aqa", "s2tt"][i % 3], "seconds": 1.5 * i, "turn": i}
        judged = rg.Suggestion("choice", CHOICES[i % 3], score=i / 10, agent=f"judge-{i % 2}")
        rest = {"metadata": known if i < 5 else {}, "suggestions": [judged] if i > 0 else []}
        records.append(make_record(f"r{i}", *texts, **rest))
    made.records.log(records)
    return made


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("piano", {"r0", "r1"}),
        ("PIANO dog", {"r0"}),
        ("heard seven", set()),
        ("heard sings", {"r1"}),  # words of two fields
        ("siren | whispers", {"r1", "r3"}),
        ("piano -siren", {"r0"}),
        ("-piano -word", {"r3", "r4", "r5"}),
        ('"barks dog"', set()),
        ('-"dog barks" piano', {"r1"}),
        ('"what\'s the word"', {"r2"}),
        ('"eleven twelve"', {"r2"}),
        ("bark", {"r3"}),
        ("bark*", {"r0", "r3"}),
        ("cafe", {"r4"}),
        ('"line second"', {"r5"}),
        ("lt", {"r2"}),  # written so by a person: an escape is no word
    ],
)
def test_finds_words_phrases_and_prefixes(server, dataset, text, names):
    assert set(server.found(dataset, text=text)) == names


@pytest.mark.parametrize("markup", MARKUP)
def test_what_a_field_is_marked_up_with_is_not_found(server, dataset, markup):
    assert server.found(dataset, text=markup) == []


def test_finds_words_in_one_field(server, dataset):
    assert set(server.found(dataset, text="piano", field="response_a")) == {"r1"}
    assert server.found(dataset, text="heard sings", field="prompt") == []
    assert set(server.found(dataset, text="-piano", field="response_b")) == {"r1", "r2", "r3", "r4", "r5"}


def test_the_best_match_comes_first(server, dataset):
    scores = [item["query_score"] for item in server.search(dataset, text="dog | piano | sings")["items"]]
    assert server.found(dataset, text="dog | piano | sings")[0] in ("r0", "r1")
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] > 0


@pytest.mark.parametrize("text", ODD_QUERIES, ids=range(len(ODD_QUERIES)))
def test_odd_queries_find_nothing_and_break_nothing(server, dataset, text):
    assert server.found(dataset, text=text) == []
    assert server.found(dataset, text=text, who=ANNOTATORS[0]) == []


def scope(entity, **rest):
    return {"entity": entity, **rest}


def terms(where, *values):
    return {"type": "terms", "scope": where, "values": list(values)}


def within(where, **bounds):
    return {"type": "range", "scope": where, **bounds}


TASK = scope("metadata", metadata_property="task")
SECONDS = scope("metadata", metadata_property="seconds")
TURN = scope("metadata", metadata_property="turn")
CHOICE = scope("suggestion", question="choice")
MINE = scope("response", property="status")
INSERTED = scope("record", property="inserted_at")


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ([terms(TASK, "asr")], {"r0", "r3"}),
        ([terms(TASK, "asr", "aqa")], {"r0", "r1", "r3", "r4"}),
        ([terms(TASK, "asr"), terms(TURN, "3", "4")], {"r3"}),
        ([terms(scope("record", property="status"), "pending")], {"r0", "r1", "r2", "r3", "r4", "r5"}),
        ([terms(scope("record", property="status"), "completed")], set()),
        ([terms(scope("record", property="external_id"), "r2")], {"r2"}),
    ],
)
def test_filters(server, dataset, where, names):
    assert set(server.found(dataset, where=where)) == names
    assert set(server.found(dataset, where=where, who=ANNOTATORS[0])) == names


def test_filters_beside_a_text(server, dataset):
    assert server.found(dataset, text="piano", where=[terms(TASK, "aqa")]) == ["r1"]


@pytest.mark.parametrize(
    ("sort", "names"),
    [
        ([], "r0 r1 r2 r3 r4 r5"),
        ([(SECONDS, "desc")], "r4 r3 r2 r1 r0 r5"),  # without a value: last, both ways
        ([(SECONDS, "asc")], "r0 r1 r2 r3 r4 r5"),
        ([(TASK, "asc"), (TURN, "desc")], "r4 r1 r3 r0 r2 r5"),
        ([(scope("record", property="external_id"), "desc")], "r5 r4 r3 r2 r1 r0"),
        ([(INSERTED, "asc")], "r0 r1 r2 r3 r4 r5"),
    ],
)
def test_sorts(server, dataset, sort, names):
    assert server.found(dataset, sort=sort) == names.split()


def test_metadata_metrics(server, dataset):
    properties = server.call("GET", f"/me/datasets/{dataset.id}/metadata-properties")["items"]
    (task,) = (item["id"] for item in properties if item["name"] == "task")
    counts = [{"term": "aqa", "count": 2}, {"term": "asr", "count": 2}, {"term": "s2tt", "count": 1}]
    metrics = server.call("GET", f"/metadata-properties/{task}/metrics")
    assert metrics == {"type": "terms", "total": 5, "values": counts}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"query": {"vector": {"name": "meaning", "value": [1, 0]}}}, "does not search by vectors"),
        ({"filters": {"and": [within(SECONDS, ge=1.5)]}}, "knows no filter"),
        ({"filters": {"and": [terms(CHOICE, "b")]}}, "knows no filter"),
        ({"filters": {"and": [terms(scope("record", property="inserted_at"), "x")]}}, "knows no filter"),
        ({"sort": [{"scope": CHOICE, "order": "asc"}]}, "knows no sort"),
    ],
    ids=str,
)
def test_what_none_of_our_datasets_has_is_refused_in_words(server, dataset, body, why):
    with pytest.raises(AssertionError, match=rf"422.*{why}.*ARGILLA_SEARCH_ENGINE"):
        server.call("POST", f"/datasets/{dataset.id}/records/search", json=body)


def test_metrics_of_numbers_are_refused_in_words(server, dataset):
    properties = server.call("GET", f"/me/datasets/{dataset.id}/metadata-properties")["items"]
    (turn,) = (item["id"] for item in properties if item["name"] == "turn")
    with pytest.raises(AssertionError, match=r"422.*no numbers in metadata.*ARGILLA_SEARCH_ENGINE"):
        server.call("GET", f"/metadata-properties/{turn}/metrics")


def test_responses_progress_and_each_annotators_own_queue(server):
    dataset = make_dataset(server)
    dataset.records.log([make_record(f"r{i}", *TEXTS[i]) for i in range(4)])
    ids = server.records(dataset)
    one, two = ANNOTATORS
    server.answer(ids["r0"], one, stars=5)
    server.answer(ids["r0"], two, stars=2)
    server.answer(ids["r1"], one, choice="b", stars=1)
    server.answer(ids["r2"], two, status="draft")

    def mine(who, *statuses):
        return set(server.found(dataset, who=who, where=[terms(MINE, *statuses)]))

    assert mine(one, "pending") == {"r2", "r3"}
    assert mine(two, "pending") == {"r1", "r3"}
    assert mine(one, "submitted") == {"r0", "r1"}
    assert mine(two, "submitted") == {"r0"}
    assert mine(two, "pending", "draft") == {"r1", "r2", "r3"}
    assert mine(two, "discarded") == set()
    assert set(server.found(dataset, where=[terms(MINE, "pending")])) == {"r3"}  # of anybody
    assert set(server.found(dataset, where=[terms(scope("response", question="choice"), "b")])) == {"r1"}
    stars = scope("response", question="stars")
    assert set(server.found(dataset, where=[terms(stars, "5", "2")], who=one)) == {"r0"}
    assert server.found(dataset, where=[terms(scope("record", property="status"), "completed")]) == ["r0"]

    progress = server.call("GET", f"/datasets/{dataset.id}/progress")
    assert (progress["total"], progress["completed"], progress["pending"]) == (4, 1, 3)
    metrics = server.call("GET", f"/me/datasets/{dataset.id}/metrics", two)["responses"]
    assert metrics == {"total": 4, "submitted": 1, "discarded": 0, "draft": 1, "pending": 2}
    dataset.delete()


def test_each_annotators_order_is_his_own_and_stays(server):
    dataset = make_dataset(server)
    names = [f"r{i}" for i in range(60)]
    dataset.records.log([make_record(name, *TEXTS[0]) for name in names])

    def queue(who):
        pages = [server.search(dataset, who=who, limit=7, offset=start) for start in range(0, 60, 7)]
        assert {page["total"] for page in pages} == {60}
        return [item["record"]["external_id"] for page in pages for item in page["items"]]

    first, second = map(queue, ANNOTATORS)
    assert sorted(first) == sorted(second) == sorted(names)  # none twice, none missing
    assert queue(ANNOTATORS[0]) == first
    assert len({tuple(names), tuple(first), tuple(second)}) == 3
    dataset.records.log([make_record(f"r{i}", *TEXTS[1]) for i in range(60, 80)])
    later = server.found(dataset, who=ANNOTATORS[0], limit=80)
    assert [name for name in later if name in names] == first  # newcomers go in between
    dataset.delete()


def test_a_search_follows_updates_and_deletions(server):
    dataset = make_dataset(server)
    dataset.records.log([make_record(f"r{i}", *TEXTS[i]) for i in range(6)])
    ids = server.records(dataset)
    dataset.records.log([make_record("r1", "What is heard?", "A violin.", "Someone sings.")])
    assert server.found(dataset, text="violin") == ["r1"]
    assert server.found(dataset, text="siren") == []
    server.call("PATCH", f"/records/{ids['r1']}", json={"metadata": {"task": "asr"}})
    assert server.found(dataset, text="violin", where=[terms(TASK, "asr")]) == ["r1"]
    server.call("DELETE", f"/datasets/{dataset.id}/records", params={"ids": f"{ids['r0']},{ids['r1']}"})
    assert server.found(dataset, text="violin | dog") == []
    assert len(server.found(dataset, text="what* | who* | noise | long")) == 4
    dataset.delete()


def test_twelve_clients_while_records_are_logged(server):
    """Two annotators in six browsers each, while the owner logs: nothing fails and nothing is lost."""
    dataset = make_dataset(server)
    dataset.records.log([make_record(f"r{i}", *TEXTS[i % 6]) for i in range(144)])
    ids = list(server.records(dataset).values())
    failures = []

    def annotate(who, share):
        try:
            for turn, record in enumerate(share):
                server.answer(record, who)
                if turn % 3 == 0:
                    wanted = {"text": "piano"} if turn % 2 else {"where": [terms(MINE, "pending")]}
                    server.search(dataset, who=who, limit=10, **wanted)
        except (AssertionError, httpx.HTTPError) as failure:
            failures.append(failure)

    clients = [
        threading.Thread(target=annotate, args=(who, ids[part::6])) for who in ANNOTATORS for part in range(6)
    ]
    for client in clients:
        client.start()
    dataset.records.log([make_record(f"r{i}", *TEXTS[i % 6]) for i in range(144, 1144)])
    for client in clients:
        client.join()

    assert failures == []
    progress = server.call("GET", f"/datasets/{dataset.id}/progress")
    assert (progress["total"], progress["completed"], progress["pending"]) == (1144, 144, 1000)
    for who in ANNOTATORS:
        metrics = server.call("GET", f"/me/datasets/{dataset.id}/metrics", who)["responses"]
        assert (metrics["submitted"], metrics["pending"]) == (144, 1000)
    assert server.search(dataset, text="-absent", limit=1)["total"] == 1144
    dataset.delete()
