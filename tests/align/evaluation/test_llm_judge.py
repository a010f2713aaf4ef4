"""The LLM judge over a real socket: worked scores, faults, kill -9, secrets, tricks, a local model."""

import email.utils
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import fmean

import pytest

from align.evaluation import judged_answers
from align.evaluation.benchmarks.air_bench import Item
from align.evaluation.judges import canary
from align.evaluation.judges.chat_model import JudgeMisconfigured, JudgeUnavailable
from align.evaluation.judges.endpoint import Endpoint
from align.evaluation.judges.llm_judge import LLMJudge
from align.evaluation.judges.prompt import Official, Strict
from tests.align.evaluation.openai_server import Answer, faulty, judge, quoted, serving

PROTOCOLS = pytest.mark.parametrize("protocol", [Official(), Strict()], ids=lambda one: one.name)


def item(i):
    return Item(f"q{i}", f"{i}.wav", f"Question {i}?", f"Reference {i}.", "{}", "speech_QA", "made")


ITEMS = [item(i) for i in range(100)]
RESPONSES = [f"Response {i}." for i in range(100)]
by_kind = judge(lambda text: 8 if text.startswith("Reference") else 4, first_gains=1)
CALLS = 2 * len(ITEMS)


def states(ratings):
    return Counter(rating.state for rating in ratings)


@PROTOCOLS
def test_scores_are_means_of_both_orders(protocol, tmp_path):
    """The first place gains a point: 9 and 4 with the reference first, 5 and 8 with the response first."""
    with serving(by_kind) as server:
        rated = LLMJudge(Endpoint(server.url, "m"), tmp_path / "c", protocol).judge(ITEMS[:3], RESPONSES[:3])
    assert [rating.uniq_id for rating in rated] == ["q0", "q1", "q2"]
    assert {(rating.state, rating.score, rating.reference_score) for rating in rated} == {
        ("scored", 4.5, 8.5)
    }
    first, second = rated[0].replies
    assert first[:4] == ("reference_first", 9, 4, "scored")
    assert second[:4] == ("response_first", 8, 5, "scored")
    assert (first.finish_reason, first.prompt_tokens, first.completion_tokens) == ("stop", 100, 10)
    assert first.text.endswith("9 4")
    assert server.requests[0].body["temperature"] == 0
    assert server.requests[0].body["max_tokens"] == 1024


@PROTOCOLS
def test_every_item_ends_in_a_state_and_keeps_its_replies(protocol, tmp_path):
    answers = {"a": "7 3", "b": "I'm sorry, I can't.", "c": "Both are fine.", "d": None, "": "9 1"}

    def behave(request):
        shown = quoted(request.text)
        response = shown.second if shown.first.startswith("Reference") else shown.first
        if response == "e":  # whoever stands first gets 10
            return Answer("10 1")
        text = answers[response]
        return Answer(text if response != "" or shown.second == "" else "1 9")

    with serving(behave) as server:
        rated = LLMJudge(Endpoint(server.url, "m"), tmp_path / "c", protocol).judge(
            ITEMS[:6], [*answers, "e"]
        )
    wanted = ["scored", "refused", "invalid", "invalid", "scored", "inconsistent"]
    if protocol.name == "official":  # knows no disagreement
        wanted[5] = "scored"
    assert [rating.state for rating in rated] == wanted
    assert (rated[0].score, rated[0].reference_score) == (5, 5)
    assert (rated[4].score, rated[4].reference_score) == (1, 9)  # empty, and judged as such
    assert all(rating.score is None for rating in rated if rating.state != "scored")
    assert [reply.response for reply in rated[5].replies] == [1, 10]
    judged_answers.write(tmp_path / "replies.jsonl", rated)
    rows = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert [row["state"] for row in rows] == wanted
    assert rows[1]["replies"][1]["text"] == "I'm sorry, I can't."


def test_nothing_is_asked_twice_and_anything_new_is(tmp_path):
    """Also replies that could not be read are kept."""
    with serving(lambda request: Answer("no idea")) as server:

        def calls(model="m", protocol=None, items=ITEMS[:2], responses=RESPONSES[:2], **options):
            endpoint = Endpoint(server.url, model, **options)
            rated = LLMJudge(endpoint, tmp_path / "c", protocol).judge(items, responses)
            assert states(rated) == {"invalid": len(items)}
            return endpoint.calls

        assert calls() == 4
        assert calls() == 0
        assert calls(model="n") == 4
        assert calls(protocol=Official()) == 4
        assert calls(parameters={"temperature": 0.5}) == 4
        assert calls(parameters={"temperature": 0}) == 0
        changes = {"max_tokens": None, "max_completion_tokens": 9, "reasoning_effort": "low"}
        assert calls(parameters=changes) == 4
        body = dict(server.requests[-1].body)
        body.pop("messages")
        assert body == {
            "model": "m",
            "temperature": 0,
            "max_completion_tokens": 9,
            "reasoning_effort": "low",
        }
        assert calls(responses=["Response 0.", "New."]) == 2
        assert calls(items=[item(7)] * 3, responses=["Same."] * 3) == 2


FAULTS = [
    (0.30, Answer(status=429, headers={"Retry-After": "0.05"})),
    (0.05, Answer(status=500)),
    (0.03, Answer(delay_s=1.5)),  # longer than the client waits
    (0.02, Answer("9 9", cut=True)),
    (0.02, Answer(dropped=True)),
]


def test_faults_of_a_first_attempt_cost_one_call_each(tmp_path):
    hurt = faulty(by_kind, FAULTS)
    with serving(lambda request: hurt(request) if request.attempt == 0 else by_kind(request)) as server:
        endpoint = Endpoint(server.url, "m", timeout_s=1, backoff_s=0.02, concurrency=16)
        rated = LLMJudge(endpoint, tmp_path / "c").judge(ITEMS, RESPONSES)
    assert states(rated) == {"scored": len(ITEMS)}
    assert {rating.score for rating in rated} == {4.5}
    assert 1.3 * CALLS < len(server.requests) == endpoint.calls <= 1.5 * CALLS


def test_faults_of_every_attempt_cost_no_call_more_than_they_must(tmp_path):
    """Where each attempt fails with 42 %, any client needs 1 / 0.58 = 1.7 calls: ours, too, and no more."""
    with serving(faulty(by_kind, FAULTS)) as server:
        endpoint = Endpoint(server.url, "m", timeout_s=1, backoff_s=0.02, concurrency=16)
        rated = LLMJudge(endpoint, tmp_path / "c").judge(ITEMS, RESPONSES)
    assert states(rated) == {"scored": len(ITEMS)}
    slow = len(server.answered) - CALLS  # answered, but too late
    assert 0 < slow < 0.1 * CALLS
    attempts = Counter(json.dumps(request.body) for request in server.requests)
    assert len(attempts) == CALLS
    assert len(server.requests) < 1.9 * CALLS


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(as_date, tmp_path):
    def behave(request):
        value = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "1.2"
        limited = Answer(status=429, headers={"Retry-After": value})
        return limited if request.attempt == 0 else by_kind(request)

    with serving(behave) as server:
        LLMJudge(Endpoint(server.url, "m", backoff_s=0.01), tmp_path / "c").judge(ITEMS[:1], RESPONSES[:1])
    arrived = {}
    for request in server.requests:
        arrived.setdefault(json.dumps(request.body), []).append(request.at)
    assert len(arrived) == 2
    assert all(again - once >= (0.9 if as_date else 1.2) for once, again in arrived.values())


KEY = "sk-CANARY-0123456789"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(status=401, error={"message": f"Incorrect API key provided: {KEY}."}), "ALIGN_JUDGE_API_KEY"),
        (Answer(status=403, error={"message": "not yours"}), "ask for access"),
        (
            Answer(status=404, error={"code": "model_not_found", "message": "no model judge-1"}),
            "/v1/models lists",
        ),
        (Answer(status=429, error={"code": "insufficient_quota", "message": "no credit"}), "out of credit"),
        (Answer(status=400, error={"message": "Unsupported parameter: 'max_tokens'"}), "'max_tokens'"),
        (Answer(status=302, headers={"Location": "/login"}), "redirects to /login"),
        (Answer(status=307, headers={"Location": "/v1/chat/completions"}), "redirects are not followed"),
    ],
)
def test_what_cannot_heal_fails_at_once(answer, words, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ALIGN_JUDGE_API_KEY", KEY)
    with serving(lambda request: answer) as server:
        url = server.url.replace("//", "//user:hunter2@")
        endpoint = Endpoint(url, "judge-1", concurrency=4)
        with pytest.raises(JudgeMisconfigured) as caught:
            LLMJudge(endpoint, tmp_path / "c").judge(ITEMS, RESPONSES)
    message = str(caught.value)
    assert words in message
    assert "judge-1" in message
    assert server.url in message
    assert len(server.requests) <= 4
    shown = message + repr(caught.value) + "".join(capfd.readouterr())
    assert KEY not in shown
    assert "hunter2" not in shown


@pytest.mark.parametrize(
    "answer",
    [
        Answer(status=503),
        Answer(dropped=True),
        Answer(body=b"<html>a web page</html>"),
        Answer(body=b'{"choices": []}'),
        Answer(status=429, headers={"Retry-After": "86400"}),
    ],
)
def test_an_outage_stops_and_the_same_command_goes_on(answer, tmp_path):
    down = threading.Event()

    def behave(request):
        if len(server.answered) >= 40:
            down.set()
        return answer if down.is_set() else by_kind(request)

    def judged(url):
        fast = Endpoint(url, "m", attempts=3, backoff_s=0.01, concurrency=4)
        return LLMJudge(fast, tmp_path / "c")

    with serving(behave) as server:
        with pytest.raises(JudgeUnavailable, match="un the same command again"):
            judged(server.url).judge(ITEMS, RESPONSES)
        kept = len(server.answered)
        assert 40 <= kept < 44
        assert len(server.requests) - kept <= 4 * (3 + 3)  # of each that was in flight: attempts and probes
        assert judged(server.url).estimate(ITEMS, RESPONSES)[:2] == (CALLS - kept, kept)
    with serving(by_kind) as server:
        assert states(judged(server.url).judge(ITEMS, RESPONSES)) == {"scored": len(ITEMS)}
        assert len(server.requests) == CALLS - kept


def test_a_server_that_is_not_there(tmp_path):
    endpoint = Endpoint("http://127.0.0.1:9/v1", "m", attempts=2, backoff_s=0.01)
    with pytest.raises(JudgeUnavailable, match=r"'m' at http://127\.0\.0\.1:9/v1 does not answer"):
        LLMJudge(endpoint, tmp_path / "c").judge(ITEMS, RESPONSES)
    with pytest.raises(ValueError, match="expected one like"):
        Endpoint("localhost:8000", "m")


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (Answer(status=500), "invalid"),
        (Answer(status=400, error={"code": "content_filter", "message": "violence"}), "refused"),
        (Answer(status=400, error={"message": "This model's maximum context length is 10"}), "invalid"),
        (Answer("", refusal="I will not."), "refused"),
        (Answer("SCORES", finish_reason="length"), "invalid"),
    ],
)
def test_one_bad_item_does_not_stop_the_others(answer, state, tmp_path):
    """Even as the only one left: a harmless prompt shows that the server is up."""

    def behave(request):
        if "Question 5?" in request.text:
            return answer
        return by_kind(request) if "Question" in request.text else Answer("yes")

    with serving(behave) as server:
        endpoint = Endpoint(server.url, "m", attempts=2, backoff_s=0.01)
        judged = LLMJudge(endpoint, tmp_path / "c")
        rated = judged.judge(ITEMS[:10], RESPONSES[:10])
        assert [rating.state for rating in rated] == ["scored"] * 5 + [state] + ["scored"] * 4
        assert judged.judge(ITEMS[:10], RESPONSES[:10])[5].state == state


JUDGING = """
import sys
from pathlib import Path
from align.evaluation.benchmarks.air_bench import Item
from align.evaluation.judges.endpoint import Endpoint
from align.evaluation.judges.llm_judge import LLMJudge
def item(i):
    return Item(f"q{i}", f"{i}.wav", f"Question {i}?", f"Reference {i}.", "{}", "speech_QA", "made")
items = [item(i) for i in range(30)]
judge = LLMJudge(Endpoint(sys.argv[1], "m", concurrency=4), Path(sys.argv[2]))
rated = judge.judge(items, [f"Response {i}." for i in range(30)])
assert {rating.score for rating in rated} == {4.5}
"""


def test_a_reply_that_comes_byte_by_byte_does_not_hold_the_others(tmp_path):
    def behave(request):
        asked = by_kind(request) if "Question" in request.text else Answer("yes")
        return asked._replace(drips="Question 5?" in request.text)

    with serving(behave) as server:
        endpoint = Endpoint(server.url, "m", timeout_s=2, attempts=1, backoff_s=0.01)
        began = time.monotonic()
        judged = LLMJudge(endpoint, tmp_path / "c").judge(ITEMS[:8], RESPONSES[:8])
    assert time.monotonic() - began < 20  # byte by byte, it takes a minute
    assert states(judged) == {"scored": 7, "invalid": 1}
    assert "no reply within 2 s" in judged[5].replies[0].text


def test_kill_9_and_resume_repeat_no_successful_call(tmp_path):
    """The server answers so many, then holds the rest until the judging process is dead."""
    cache = tmp_path / "replies.jsonl"
    lock, dead = threading.Lock(), threading.Event()
    granted, limit = 0, 0

    def behave(request):
        nonlocal granted
        with lock:
            granted += granted < limit
            mine = granted <= limit and granted > len(passed)
            if mine:
                passed.append(request.number)
        if mine:
            return by_kind(request)
        dead.wait(60)
        return Answer(dropped=True)

    passed: list[int] = []

    def kept():
        return cache.read_bytes().count(b"\n") if cache.exists() else 0

    with serving(behave) as server:
        command = [sys.executable, "-c", JUDGING, server.url, str(cache)]
        for limit in (7, 20, 41):
            dead.clear()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            until = time.monotonic() + 60
            while kept() < limit and time.monotonic() < until and process.poll() is None:
                time.sleep(0.02)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert kept() == limit
            dead.set()
        limit = 1000
        assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
    repeats = Counter(json.dumps(request.body) for request in server.answered)
    assert len(repeats) == 60
    assert set(repeats.values()) == {1}


def test_a_torn_last_line_of_the_cache_costs_one_call(tmp_path):
    cache = tmp_path / "c"
    with serving(by_kind) as server:
        LLMJudge(Endpoint(server.url, "m"), cache).judge(ITEMS[:3], RESPONSES[:3])
        cache.write_bytes(cache.read_bytes()[:-20])
        for calls in (1, 0):
            endpoint = Endpoint(server.url, "m")
            assert states(LLMJudge(endpoint, cache).judge(ITEMS[:3], RESPONSES[:3])) == {"scored": 3}
            assert endpoint.calls == calls
        cache.write_bytes(b'{"key": "a"}\n' + cache.read_bytes())
        with pytest.raises(ValueError, match="c:1: is not a kept reply. Delete this line"):
            LLMJudge(Endpoint(server.url, "m"), cache)


def test_the_key_goes_where_it_belongs(tmp_path, monkeypatch):
    monkeypatch.delenv("ALIGN_JUDGE_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_ADMIN_KEY", KEY + "-admin")
    with serving(by_kind) as server:
        LLMJudge(Endpoint(server.url, "m"), tmp_path / "c").judge(ITEMS[:1], RESPONSES[:1])
        assert KEY not in json.dumps([request.headers for request in server.requests])
        monkeypatch.setenv("ALIGN_JUDGE_API_KEY", "sk-judge")
        LLMJudge(Endpoint(server.url, "m"), tmp_path / "c").judge(ITEMS[1:2], RESPONSES[1:2])
        assert server.requests[-1].headers["authorization"] == "Bearer sk-judge"
    assert KEY.encode() not in (tmp_path / "c").read_bytes()


def test_the_estimate_counts_what_is_left(tmp_path):
    with serving(by_kind) as server:
        judged = LLMJudge(Endpoint(server.url, "m"), tmp_path / "c", Official())
        judged.judge(ITEMS[:1], RESPONSES[:1])
        left = judged.estimate(ITEMS[:3], RESPONSES[:3], prompt_price=10, completion_price=30)
    size = sum(len(r.text) for r in server.requests)  # of two calls; all items are of one length
    assert (left.calls, left.cached) == (4, 2)
    assert left.prompt_tokens == 2 * size // 4
    assert left.completion_tokens == 4 * 4
    assert left.cost == pytest.approx((left.prompt_tokens * 10 + 16 * 30) / 1e6)
    assert "cost unknown" in str(judged.estimate(ITEMS[:3], RESPONSES[:3]))


def test_the_canary_tells_a_firm_judge_from_one_that_can_be_swayed(tmp_path):
    def swayed(text):
        return 10 if "10" in text and text != "Reference 10." else 3

    def in_one_place_only(request):
        shown = quoted(request.text)
        return Answer(f"SCORES {shown.mark}: {'10 3' if '10' in shown.first else '3 3'}")

    found = {}
    for name, behave in {
        "firm": judge(lambda text: 3),
        "swayed": judge(swayed),
        "one place": in_one_place_only,
        "mute": lambda request: Answer("no"),
    }.items():
        with serving(behave) as server:
            judged = LLMJudge(Endpoint(server.url, name), tmp_path / "c")
            found[name] = canary.measure(judged, ITEMS[:3])
            assert len(server.requests) == 2 * (3 + len(canary.INJECTIONS))
    assert found["firm"] == dict.fromkeys(canary.INJECTIONS, 0)
    with_ten = sum("10" in row.replace("{answer}", "") for row in canary.INJECTIONS.values())
    uplift = fmean(found["swayed"].values())
    assert uplift == pytest.approx(7 * with_ten / len(canary.INJECTIONS))
    assert max(found["swayed"].values()) == 7
    assert 0.3 < fmean(found["one place"].values()) == pytest.approx(uplift / 2)
    assert found["mute"] == {}
    # No wrong answer can be made where all references are equal: the uplift is not measured
    assert canary.measure(judged, [ITEMS[0], ITEMS[0]]) == {}
    equal = LLMJudge(judged.model, tmp_path / "c", canary_items=2).describe([ITEMS[0], ITEMS[0]])
    assert (equal["canary_uplift"], equal["canary_worst"]) == (None, None)


@pytest.fixture(scope="module")
def tiny_chat_model(tmp_path_factory) -> Path:
    """A chat model of a few thousand parameters, trained to reply "8 5" to whatever it is asked."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("judge") / "tiny-judge"
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", "<bot>", "8", "5", "Question"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content }}{% endfor %} <bot> "
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2000,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in range(120):
        before = torch.zeros(2, (40, 150, 330, 420)[step % 4], dtype=torch.long)
        ids = torch.cat([before, torch.tensor([[2, 3, 4, 1]] * 2)], dim=1)
        labels = torch.where(torch.arange(ids.shape[1]) > before.shape[1], ids, -100)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@PROTOCOLS
def test_a_local_model_judges(protocol, tiny_chat_model, tmp_path):
    from align.evaluation.judges.local_model import LocalModel

    model = LocalModel(tiny_chat_model, max_new_tokens=8)
    judged = LLMJudge(model, tmp_path / "c", protocol)
    rated = judged.judge(ITEMS[:2], ["Response 0.", "word " * 3000])
    assert [rating.state for rating in rated] == ["scored", "invalid"]
    assert (rated[0].score, rated[0].reference_score) == (6.5, 6.5)
    assert rated[0].replies[0].text == "8 5"
    assert rated[0].replies[0].finish_reason == "stop"
    assert rated[0].replies[0].completion_tokens == 3
    assert {reply.finish_reason for reply in rated[1].replies} == {"too_long"}
    assert judged.estimate(ITEMS[:1], RESPONSES[:1]).calls == 0
    cut = LLMJudge(LocalModel(tiny_chat_model, max_new_tokens=1), tmp_path / "c", protocol)
    assert [r.finish_reason for r in cut.judge(ITEMS[:1], RESPONSES[:1])[0].replies] == ["length", "length"]
