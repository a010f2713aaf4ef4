"""`align serve --engine vllm`: the same routes, answers and refusals in front of a real vLLM server."""

import os
import signal
from pathlib import Path

import httpx
import psutil
import pytest

from align.generation.engine import Decoding, Request
from align.generation.transformers_engine import TransformersEngine
from align.models.features import ClipFeatures
from align.models.qwen2_audio.model import load_processor
from preference_data.prompts.prompts import pretraining_prompt
from tests.align.generation.vllm_world import NEEDS_VLLM, is_vllm, make_policy
from tests.align.serving.server_process import Served, clip, refusal, text, user

pytestmark = NEEDS_VLLM
QUESTION = "Is the tone high or low?"


@pytest.fixture(scope="module")
def policy(tiny, tmp_path_factory):
    return make_policy(tiny.audio, tmp_path_factory.mktemp("vllm") / "policy")


@pytest.fixture(scope="module")
def offline(policy, tiny):
    return TransformersEngine(policy, ClipFeatures(load_processor(policy), tiny.audio))


@pytest.fixture(scope="module")
def served(policy):
    server = Served(policy, "--engine", "vllm")
    yield server
    if psutil.pid_exists(server.pid):
        server.kill(signal.SIGTERM)
    server.wait()


def complete(engine, request, n=12):
    return next(engine.complete({0: request}, Decoding(n), 0))[1][0]


def chat(served, *messages, **options):
    options = {"model": "policy", "temperature": 0, "max_tokens": 12, **options}
    return served.client().chat.completions.create(messages=list(messages), **options)


def test_it_says_that_it_loads_and_then_that_it_is_ready(served):
    health = httpx.get(served.root + "/health")
    assert (health.status_code, health.json()["status"]) == (503, "loading")
    body = {"model": "policy", "messages": [user(text("a"))]}
    assert refusal(served.post("/chat/completions", json=body), 503)
    served.expect(r"(?m)^ready$", within_s=600)
    assert httpx.get(served.root + "/health").json()["status"] == "ready"


def test_greedy_answers_and_transcripts_are_those_of_the_transformers_engine(served, offline, tiny):
    for name in ("0.wav", "1.wav"):
        whole = complete(offline, Request(QUESTION, (name,)))
        message = user(clip(tiny.audio / name), text(QUESTION))
        answer = chat(served, message)
        assert answer.choices[0].message.content == whole.text
        assert answer.usage.completion_tokens == len(whole.token_ids)
        chunks = chat(served, message, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.text
    two = Request("high?", ("0.wav", "1.wav"))
    message = user(clip(tiny.audio / "0.wav"), clip(tiny.audio / "1.wav"), text("high?"))
    assert chat(served, message).choices[0].message.content == complete(offline, two).text
    question = pretraining_prompt("transcribe", 1, "sentences", audio_language="en")
    plain = complete(offline, Request(question, ("1.wav",), plain=True), 24)
    words = {"model": "policy", "file": ("a.wav", (tiny.audio / "1.wav").read_bytes())}
    said = served.client().audio.transcriptions.create(**words, language="en").text
    assert said.startswith(plain.text)


def test_two_turns_are_one_conversation(served, offline, tiny):
    """Against a plain text that is the conversation as the chat template writes it."""
    parts = [
        {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": "The tone is high."}]},
        {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "high?"}]},
    ]
    rendered = offline.processor.apply_chat_template(parts, add_generation_prompt=True, tokenize=False)
    whole = complete(offline, Request(rendered, ("0.wav", "1.wav"), plain=True))
    answer = chat(
        served,
        user(clip(tiny.audio / "0.wav"), text(QUESTION)),
        {"role": "assistant", "content": "The tone is high."},
        user(clip(tiny.audio / "1.wav"), text("high?")),
    )
    tokenizer = offline.processor.tokenizer
    expected = tokenizer.decode(whole.token_ids, skip_special_tokens=True).strip()
    assert answer.choices[0].message.content == expected
    assert answer.usage.completion_tokens == len(whole.token_ids)


def test_a_bad_clip_and_a_seeded_draw(served, tiny, tmp_path):
    (tmp_path / "bad").write_bytes(b"RIFF")
    body = {"model": "policy", "messages": [user(clip(tmp_path / "bad"))]}
    assert refusal(served.post("/chat/completions", json=body))["param"] == "messages[0].content[0]"
    ask = user(clip(tiny.audio / "0.wav"), text("Generate the caption in English: low"))
    drawn = [
        chat(served, ask, temperature=1.8, seed=seed).choices[0].message.content for seed in (1, 2, 1, 3)
    ]
    assert drawn[0] == drawn[2]
    assert len(set(drawn)) > 1


def test_a_dead_vllm_is_told_by_health_and_a_killed_front_leaves_none(served):
    vllm = [process for process in served.family() if is_vllm(process)]
    assert len(vllm) > 1
    os.kill(vllm[0].pid, signal.SIGKILL)
    psutil.wait_procs(vllm[:1], timeout=30)
    health = httpx.get(served.root + "/health")
    assert (health.status_code, health.json()["status"]) == (503, "died")
    body = {"model": "policy", "messages": [user(text("a"))]}
    assert refusal(served.post("/chat/completions", json=body), 503)
    assert served.metric("align_engine_ready") == 0
    family = served.family()
    served.kill()
    assert not psutil.wait_procs([*family, *vllm], timeout=60)[1]


def test_a_front_that_is_killed_while_vllm_starts_leaves_none(policy):
    server = Served(policy, "--engine", "vllm")
    while not (vllm := [process for process in server.family() if is_vllm(process)]):
        assert server._process.poll() is None, server.lines
    family = server.family()
    server.kill()
    server.wait()
    assert not psutil.wait_procs([*family, *vllm], timeout=120)[1]


def test_a_policy_that_vllm_cannot_take_ends_the_command_with_the_reason(tiny):
    """Its heads are too narrow for vLLM's attention on a CPU."""
    server = Served(Path(tiny.policy), "--engine", "vllm")
    assert server.wait(300) == 1
    assert any("attention heads 16 wide" in line for line in server.lines), server.lines
