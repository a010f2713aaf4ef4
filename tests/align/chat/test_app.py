"""The routes over a socket: who may ask, what a turn and a vote may say, and what is kept on disk."""

import base64
import json

import httpx
import pytest
import soundfile

from align.serving.requests import Limits
from preference_data import store
from preference_data.audio.clip_files import find_below
from preference_data.audio.decode import load
from preference_data.schema import Comparison, Completion, Judgement, Prompt
from tests.align.chat.stand_in import KEY, STAMPED, chatting
from tests.align.serving.server_process import clip, refusal, text, user

LIMITS = Limits(body_bytes=1 << 20)
NAMES = ("before", "after")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run") / "chat"


@pytest.fixture(scope="module")
def client(tiny, folder):
    with chatting(tiny.policy, folder, *NAMES, limits=LIMITS) as url, _client(url) as own:
        yield own


@pytest.fixture(scope="module")
def alone(tiny):
    """One policy, and nowhere to keep anything."""
    with chatting(tiny.policy, None, "only", limits=LIMITS) as url, _client(url) as own:
        yield own


def _client(url):
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)


def begin(client, *messages):
    body = {"model": "policy", "messages": list(messages), "seed": 1}
    return client.post("/api/turns", content=json.dumps(body))


def answer(client, turn, place):
    """The text of an answer."""
    streamed = client.post(f"/api/turns/{turn}/answers/{place}").text
    events = [json.loads(line.removeprefix("data: ")) for line in streamed.split("\n\n") if line]
    assert events[-1]["finish"] == "stop"
    return "".join(event.get("text", "") for event in events)


def answered(client, *messages, places=(0, 1)):
    turn = begin(client, *messages).json()["id"]
    return turn, [answer(client, turn, place) for place in places]


def vote(client, turn, **said):
    return client.put(f"/api/turns/{turn}/vote", content=json.dumps(said))


# -------------------------------------------------------------------------- who may ask


def test_the_page_needs_no_key_and_everything_else_does(client):
    for route in ("/", "/chat.js", "/chat.css", "/microphone.js"):
        shown = httpx.get(f"{client.base_url}{route}")
        assert shown.status_code == 200
        policy = shown.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert KEY not in shown.text
    for route in (
        "/api/about",
        "/api/kept",
        "/api/turns/x/names",
        "/health",
        "/metrics",
        "/../align/chat/app.py",
    ):
        assert httpx.get(f"{client.base_url}{route}").status_code == 401
    wrong = {"Authorization": "Bearer wrong"}
    assert refusal(httpx.get(f"{client.base_url}/api/about", headers=wrong), 401)


def test_other_names_and_other_pages_are_refused(client):
    port = client.base_url.port
    for host, status in ((f"evil.example:{port}", 400), (f"localhost:{port}", 200)):
        assert client.get("/api/about", headers={"Host": host}).status_code == status
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": f"http://127.0.0.1:{port + 1}"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert refusal(client.post("/api/turns", headers=headers), 403)
        assert client.get("/", headers=headers).status_code == 403
    own = {"Origin": f"http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"}
    assert client.get("/api/about", headers=own).status_code == 200


def test_a_large_body_and_a_bad_clip_are_refused(client, tiny):
    assert refusal(client.post("/api/turns", content=b"x" * (LIMITS.body_bytes + 1)), 413)
    bad = base64.b64encode(b"not audio").decode()
    part = {"type": "input_audio", "input_audio": {"data": bad, "format": "wav"}}
    assert refusal(begin(client, user(part)))["param"] == "messages[0].content[0]"
    sound = clip(tiny.audio / "0.wav")
    assert "before its text" in refusal(begin(client, user(text("a"), sound)))["message"]
    assert "take turns" in refusal(begin(client, user(sound), user(text("b"))))["message"]
    assert "neither a text nor a clip" in refusal(begin(client, user(text(" "))))["message"]


# -------------------------------------------------------------------------- blind


def test_the_order_is_drawn_for_each_turn_and_names_come_with_the_vote(client):
    orders = set()
    for _ in range(12):
        turn, texts = answered(client, user(text("high")))
        assert client.get(f"/api/turns/{turn}/names").json() == {"names": None, "same": False}
        names = vote(client, turn, better="a").json()["names"]
        assert dict(zip(names, texts, strict=True)) == {"before": "high", "after": "1 high"}
        orders.add(tuple(names))
    assert len(orders) == 2
    assert "first vote" in refusal(vote(client, turn, better="b"), 409)["message"]
    assert vote(client, turn, better="a", thumbs=[True, False]).status_code == 200


def test_votes_on_what_cannot_be_judged_are_refused(client, alone):
    turn = begin(client, user(text("low"))).json()["id"]
    assert "whole" in refusal(vote(client, turn, better="a"), 409)["message"]
    answer(client, turn, 0)
    assert "whole" in refusal(vote(client, turn, better="a"), 409)["message"]
    assert refusal(client.post(f"/api/turns/{turn}/answers/0"), 409)  # no second time
    assert refusal(client.post(f"/api/turns/{turn}/answers/2"), 404)
    answer(client, turn, 1)
    for said, param in (
        ({}, "better"),
        ({"thumbs": [True, None]}, "better"),
        ({"thumbs": [True]}, "thumbs"),
        ({"better": "c"}, "better"),
        ({"better": "a", "heard": 2}, "heard"),
        ({"better": "a", "other": 1}, "other"),
    ):
        assert refusal(vote(client, turn, **said))["param"] == param
    assert refusal(vote(client, "x", better="a"), 404)
    turn, _ = answered(alone, user(text("low")), places=(0,))
    assert "single answer" in refusal(vote(alone, turn, better="a"))["message"]
    assert refusal(vote(alone, turn, thumbs=[None]))["param"] == "thumbs"
    assert refusal(vote(alone, turn, thumbs=[True], keep=True))["param"] == "keep"
    assert vote(alone, turn, thumbs=[True]).json() == {"names": ["only"], "kept": None}
    assert alone.get("/api/kept").status_code == 404


def test_two_equal_answers_have_no_better_one(tiny, tmp_path):
    with (
        chatting(tiny.policy, tmp_path / "chat", *NAMES, limits=LIMITS, differ=False) as url,
        _client(url) as own,
    ):
        turn, texts = answered(own, user(text("high")))
        assert texts == ["high", "high"]
        shown = own.get(f"/api/turns/{turn}/names").json()
        assert sorted(shown["names"]) == sorted(NAMES)
        assert shown["same"]
        assert "the same" in refusal(vote(own, turn, better="a"))["message"]
        assert vote(own, turn, thumbs=[False, False], keep=True).json()["kept"]
    (kept,) = store.read(tmp_path / "chat" / "judgements.jsonl", Judgement)
    assert (kept.kind, kept.texts, kept.thumbs) == ("rating", ("high",), (False,))
    assert store.read(tmp_path / "chat" / "comparisons.jsonl", Comparison) == []


# -------------------------------------------------------------------------- kept


def test_a_vote_is_kept_with_its_clips_and_goes_without_a_trace(client, folder, tiny):
    first, second = clip(tiny.audio / "0.wav"), clip(tiny.audio / "1.wav")
    chat = [user(first), {"role": "assistant", "content": "high"}, user(second, text("and this?"))]
    turn, texts = answered(client, *chat)
    assert vote(client, turn, better="b", about="factuality", heard=0.9).json()["kept"] is None
    assert not folder.exists()
    said = {"better": "b", "about": "factuality", "heard": 0.9, "thumbs": [None, True], "keep": True}
    name = vote(client, turn, **said).json()["kept"]
    assert vote(client, turn, **said).json()["kept"] == name  # the same again is the same
    (kept,) = store.read(folder / "judgements.jsonl", Judgement)
    assert (kept.id, list(kept.texts), kept.kind) == (name, texts, "choice")
    assert kept.factuality.ranks == (2, 1)
    assert kept.behaviour is None
    assert (kept.thumbs, kept.heard, kept.annotator, kept.annotator_kind) == (
        (None, True),
        0.9,
        "ann",
        "person",
    )
    (comparison,) = store.read(folder / "comparisons.jsonl", Comparison)
    assert (comparison.id, comparison.texts) == (kept.comparison, kept.texts)
    by_id = {item.id: item for item in store.read(folder / "completions.jsonl", Completion)}
    names = client.get(f"/api/turns/{turn}/names").json()["names"]
    assert [by_id[item].policy[0] for item in kept.completions] == [str(NAMES.index(name)) for name in names]
    (prompt,) = store.read(folder / "prompts.jsonl", Prompt)
    assert (prompt.history[0].answer, prompt.question) == ("high", "and this?")
    for path, original in zip(prompt.audios, ("0.wav", "1.wav"), strict=True):
        expected, _ = soundfile.read(tiny.audio / original, dtype="float32")
        assert (load(find_below(folder, path), max_duration_s=1) == expected).all()  # every bit

    (row,) = client.get("/api/kept").json()["kept"]
    assert (row["id"], row["texts"], row["names"]) == (name, texts, names)
    stored = client.get(f"/api/kept/{row['clips'][0]}")
    assert stored.content == (folder / row["clips"][0]).read_bytes()
    assert client.get("/api/kept/clips/..%2Fjudgements.jsonl").status_code == 404

    other, _ = answered(client, user(first, text("again")))
    vote(client, other, better="both_bad", keep=True)
    assert client.delete(f"/api/kept/{name}").status_code == 200
    assert refusal(client.delete(f"/api/kept/{name}"), 404)
    (kept,) = store.read(folder / "judgements.jsonl", Judgement)
    assert kept.behaviour.all_bad
    assert [path.name for path in (folder / "clips").iterdir()] == [prompt.audios[0].removeprefix("clips/")]
    for file in folder.glob("*.json*"):
        assert "and this?" not in file.read_text()
    client.delete(f"/api/kept/{kept.id}")
    assert client.get("/api/kept").json() == {"kept": []}
    assert list((folder / "clips").iterdir()) == []


def test_words_come_with_their_times(alone, tiny):
    form = {"model": "policy", "response_format": "verbose_json", "timestamp_granularities[]": "word"}
    with (tiny.audio / "3.wav").open("rb") as file:
        words = alone.post("/api/words", data=form, files={"file": file}).json()["words"]
    assert STAMPED.startswith("the<|0.20|>")
    assert words[:2] == [
        {"word": "the", "start": 0.0, "end": 0.2},
        {"word": "tone", "start": 0.2, "end": 0.45},
    ]


def test_what_keeping_would_destroy_is_refused(tiny, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("")
    with pytest.raises(FileExistsError, match="made by something else"), chatting(tiny.policy, tmp_path, "a"):
        pass


def test_a_damaged_folder_is_explained(tiny, tmp_path):
    keep = tmp_path / "chat"
    with chatting(tiny.policy, keep, "only") as url, _client(url) as own:
        turn, _ = answered(own, user(text("high")), places=(0,))
        name = vote(own, turn, thumbs=[True], keep=True).json()["kept"]
        (keep / "prompts.jsonl").rename(tmp_path / "prompts.jsonl")
        for answered_with in (own.get("/api/kept"), own.delete(f"/api/kept/{name}")):
            assert "prompts.jsonl" in refusal(answered_with, 500)["message"]
        (tmp_path / "prompts.jsonl").rename(keep / "prompts.jsonl")
        (keep / ".lock").unlink()
        (keep / ".lock").mkdir()
        assert "Is a directory" in refusal(own.delete(f"/api/kept/{name}"), 500)["message"]
