"""Errors as real services word them, over a real socket: what each means, and what it costs.

The bodies are in `provider_errors.yaml`.
"""

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from align.evaluation.benchmarks.air_bench import Item
from align.evaluation.judges.chat_model import JudgeMisconfigured
from align.evaluation.judges.chat_response import ServerError, read_response
from align.evaluation.judges.endpoint import Endpoint
from align.evaluation.judges.llm_judge import LLMJudge
from align.evaluation.judges.prompt import Official
from tests.align.evaluation.openai_server import Answer, judge, quoted, serving


class Row(NamedTuple):
    meaning: str
    name: str
    status: int
    body: bytes


ROWS = [
    Row(meaning, name, status, body.encode())
    for meaning, rows in yaml.safe_load(
        Path(__file__).with_name("provider_errors.yaml").read_text(encoding="utf-8")
    ).items()
    for name, (status, body) in rows.items()
]
ROWS.append(Row("unreadable", "nested", 200, b"[" * 200_000))
ROWS.append(Row("unreadable", "nested, whole", 200, b"[" * 900 + b"1" + b"]" * 900))


def rows(*meanings):
    return [row for row in ROWS if row.meaning in meanings]


def each(*meanings):
    named = [pytest.param(row, id=f"{row.meaning}: {row.name}") for row in rows(*meanings)]
    return pytest.mark.parametrize("row", named)


def answer(row):
    return Answer(status=row.status, body=row.body)


def rejection(message):
    return Answer(status=400, error={"message": message, "type": "invalid_request_error"})


@each(*{row.meaning for row in ROWS})
def test_every_provider_is_understood(row):
    with pytest.raises(ServerError) as caught:
        read_response(row.status, {}, row.body)
    assert caught.value.meaning == row.meaning, caught.value.words


@pytest.mark.parametrize(
    ("message", "finish_reason", "text", "reason"),
    [
        ({"content": [{"type": "text", "text": "8 "}, {"type": "text", "text": "2"}]}, "stop", "8 2", "stop"),
        ({"content": [{"type": "thinking", "thinking": ["Hm"]}, {"text": "8 2"}]}, "stop", "8 2", "stop"),
        ({"content": ["8 ", {"text": "2"}, {"type": "image_url", "image_url": {}}]}, "eos", "8 2", "eos"),
        ({"content": {"type": "output_text", "text": "8 2"}}, "STOP", "8 2", "stop"),
        ({"content": None, "reasoning": "Perhaps 8 2"}, "length", "<think>Perhaps 8 2", "length"),
        ({"content": "", "reasoning_content": "Perhaps 8 2"}, "MAX_TOKENS", "<think>Perhaps 8 2", "length"),
        ({"content": "8 2", "reasoning_content": "Perhaps"}, "stop", "8 2", "stop"),
        ({"content": None}, "model_context_window_exceeded", "", "length"),
        ({"content": None}, "content_filter: RECITATION", "", "content_filter"),
        ({"content": "8 2"}, "SAFETY", "8 2", "content_filter"),
        ({"content": ""}, "sensitive", "", "content_filter"),
        ({"content": None, "refusal": "I will not."}, "stop", "I will not.", "refusal"),
        ({"content": "8 2\ud800"}, None, "8 2?", None),
    ],
)  # fmt: skip
def test_a_reply_in_every_form(message, finish_reason, text, reason):
    body = {"choices": [{"message": message, "finish_reason": finish_reason}], "error": None, "usage": None}
    assert read_response(200, {}, json.dumps(body).encode()) == (text, reason, 0, 0)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "text", "type", "finish_reason", "usage", "error", "code"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(ANYTHING, ANYTHING, ANYTHING, st.sampled_from([200, 400, 429, 500]), st.text(max_size=9))
def test_no_body_crashes_the_reading(whole, message, choice, status, header):
    for body in (whole, {"choices": [{"message": message}]}, {"choices": [choice], "error": message}):
        with suppress(ServerError):
            reply = read_response(status, {"retry-after": header}, json.dumps(body).encode())
            assert isinstance(reply.text.encode(), bytes)


def item(i):
    return Item(f"q{i}", f"{i}.wav", f"Question {i}?", f"Reference {i}.", "{}", "speech_QA", "made")


ITEMS, RESPONSES = [item(i) for i in range(20)], ["Answer."] * 20
by_kind = judge(lambda text: 8 if text.startswith("Reference") else 4)


def number(request):
    return int(request.text.partition("Question ")[2].partition("?")[0])


def test_each_error_costs_its_own_items_alone(tmp_path):
    """One call of each order where the item is turned away, two where the first attempt failed, 1.5 at most
    over all: three items in five have an error, and as many answers come at once."""
    unknown = [row for row in rows("rejected") if row.name == "nobody's"]
    permanent = [*rows("too_long", "filtered"), *unknown]
    passing = rows("busy", "unreadable")
    faulty = [*permanent, *passing]
    items = [item(i) for i in range(2 * len(faulty))]

    def behave(request):
        if "Question" not in request.text:  # the harmless prompt
            return Answer("yes")
        i, healthy = divmod(number(request), 2)
        if not healthy and (i < len(permanent) or request.attempt == 0):
            return answer(faulty[i])
        return by_kind(request)

    with serving(behave) as server:
        endpoint = Endpoint(server.url, "m", backoff_s=0.01, concurrency=16)
        judged = LLMJudge(endpoint, tmp_path / "c", Official()).judge(items, ["Answer."] * len(items))
    for i, rating in enumerate(judged):
        row = faulty[i // 2]
        if i % 2 or row in passing:
            assert (rating.state, rating.score) == ("scored", 4), row
        else:
            assert rating.state == ("refused" if row.meaning == "filtered" else "invalid"), row
            assert all(reply.text.startswith(f"HTTP {row.status}, ") for reply in rating.replies), row
    assert len(server.requests) == endpoint.calls <= 2 * len(items) + 2 * len(passing) + 1
    assert endpoint.calls < 1.5 * 2 * len(items)
    assert max(Counter(json.dumps(request.body) for request in server.requests).values()) == 2


@each("no_credit", "no_access")
def test_without_credit_or_access_the_first_answer_stops(row, tmp_path):
    with serving(lambda request: answer(row)) as server:
        model = LLMJudge(Endpoint(server.url, "m", concurrency=2), tmp_path / "c")
        with pytest.raises(JudgeMisconfigured) as stopped:
            model.judge(ITEMS, RESPONSES)
        assert len(server.requests) <= 2
    words = str(stopped.value)
    assert ("out of credit" in words) == (row.meaning == "no_credit")
    assert max(row.body.decode().split('"'), key=len)[:40] in words


@pytest.mark.parametrize(
    ("parameters", "refusal", "advice"),
    [
        (
            {},
            "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
            "--parameter max_tokens=null --parameter max_completion_tokens=1024 .in a recipe judge: ",
        ),
        ({}, "max_tokens is too large: 1024. This model supports 512.", "--parameter max_tokens=null"),
        (
            {},
            "Unsupported value: 'temperature' does not support 0 with this model.",
            "--parameter temperature=null",
        ),
        ({"logprobs": True}, "This model does not support logprobs", "--parameter logprobs=null"),
        ({}, "Purple", "mend it as the server says"),
    ],
)
def test_a_parameter_that_is_refused_is_named_with_its_remedy(parameters, refusal, advice, tmp_path):
    with serving(lambda request: rejection(refusal)) as server:
        endpoint = Endpoint(server.url, "m", parameters=parameters, concurrency=2, backoff_s=0.01)
        with pytest.raises(JudgeMisconfigured, match=advice) as stopped:
            LLMJudge(endpoint, tmp_path / "c").judge(ITEMS, RESPONSES)
        assert len(server.requests) <= 3  # the first two, and a harmless prompt
    assert refusal.rstrip(".") in str(stopped.value)


@pytest.mark.parametrize("finish_reason", ["length", "stop"])
@pytest.mark.parametrize(("cut", "n_stopped"), [(20, 6), (1, None)])
def test_a_judge_that_never_answers_is_stopped_and_one_empty_reply_is_not(
    cut, n_stopped, finish_reason, tmp_path
):
    message = {"content": None, "reasoning_content": "Perhaps"}
    thinking = json.dumps({"choices": [{"finish_reason": finish_reason, "message": message}]}).encode()

    def behave(request):
        return Answer(body=thinking) if number(request) < cut else by_kind(request)

    with serving(behave) as server:
        model = LLMJudge(Endpoint(server.url, "m", concurrency=2), tmp_path / "c")
        if n_stopped:
            with pytest.raises(JudgeMisconfigured, match="raise max_tokens, --parameter max_tokens=4096"):
                model.judge(ITEMS, RESPONSES)
            assert len(server.requests) <= n_stopped
        else:
            states = [rating.state for rating in model.judge(ITEMS, RESPONSES)]
            assert states == ["invalid"] * cut + ["scored"] * (20 - cut)


def test_a_thinking_judge_scores_under_official(tmp_path):
    def behave(request):
        first = quoted(request.text).first
        return Answer(f"<think>First {first} Perhaps\n9 9?</think>\n\n{by_kind(request).text}")

    with serving(behave) as server:
        judged = LLMJudge(Endpoint(server.url, "m"), tmp_path / "c", Official())
        [rating] = judged.judge(ITEMS[:1], RESPONSES[:1])
    assert (rating.state, rating.score, rating.reference_score) == ("scored", 4, 8)
