"""Any bytes become a request or a refusal, never another error."""

import base64
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.serving.errors import ApiError
from align.serving.requests import Limits, read_chat, read_conversation, read_form

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = "model messages stream stop seed temperature top_p max_tokens n tools role content type text".split()
BODIES = st.fixed_dictionaries(
    {"model": st.just("policy"), "messages": st.just([{"role": "user", "content": "a"}]) | JSON},
    optional={key: JSON for key in KEYS[2:]},
)

ON_A_BUSY_MACHINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@ON_A_BUSY_MACHINE
@given(st.binary(max_size=200) | BODIES.map(lambda body: json.dumps(body).encode()))
def test_any_body_is_a_conversation_or_a_refusal_with_a_reason(body):
    result = outcome(body)
    if isinstance(result, ApiError):
        assert result.message
        assert result.status in (400, 404)
    else:
        assert result.messages[-1]["role"] == "user"


def outcome(body):
    try:
        return read_conversation(read_chat(body), Limits())
    except ApiError as error:
        return error


@ON_A_BUSY_MACHINE
@given(
    st.binary(max_size=300), st.sampled_from(["multipart/form-data; boundary=x", "text/plain", "", "a/b;"])
)
def test_any_form_is_refused_with_a_reason(body, content_type):
    with pytest.raises(ApiError):
        read_form(body, content_type)


def form(*parts):
    return (
        b"".join(b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % part for part in parts)
        + b"--x--\r\n"
    )


def test_a_form_is_read_and_its_mistakes_are_named():
    model, file = (b"model", b"", b"policy"), (b"file", b'; filename="a.wav"', b"\r\n--y\r\n\0")
    kind = "multipart/form-data; boundary=x"
    request, clip = read_form(form(model, file, (b"temperature", b"", b"0.5")), kind)
    assert (request.temperature, clip.content) == (0.5, b"\r\n--y\r\n\0")
    for parts, param in [
        ((model,), "file"),
        ((file,), "model"),
        ((model, file, file), "file"),
        ((model, model, file), "model"),
        ((model, file, (b"temperature", b"", b"warm")), "temperature"),
        ((model, file, (b"response_format", b"", b"srt")), "response_format"),
        ((model, file, (b"colour", b"", b"red")), "colour"),
        ((model, file, (b"other", b'; filename="b"', b"")), "other"),
    ]:
        with pytest.raises(ApiError) as error:
            read_form(form(*parts), kind)
        assert error.value.param == param


def test_clips_stand_in_order_and_in_users_messages_only():
    def clip(content):
        data = base64.b64encode(content).decode()
        return {"type": "input_audio", "input_audio": {"data": data, "format": "mp3"}}

    def read(*messages):
        return read_conversation(
            read_chat(json.dumps({"model": "policy", "messages": messages}).encode()), Limits()
        )

    turns = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [clip(b"1"), {"type": "text", "text": "t"}, clip(b"2")]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": [clip(b"3")]},
    ]
    messages, clips = read(*turns)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert [part["type"] for part in messages[1]["content"]] == ["audio", "text", "audio"]
    assert [received.content for received in clips] == [b"1", b"2", b"3"]
    assert clips[2].name == "messages[3].content[0]"
    with pytest.raises(ApiError, match=r"messages\[0\].content\[0\]: clips stand in the user's"):
        read({"role": "assistant", "content": [clip(b"1")]}, turns[-1])
