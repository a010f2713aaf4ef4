"""`align serve` on a toy policy: OpenAI's client over a socket, against the engine offline."""

import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import psutil
import pytest
import soundfile
import typer
from typer.testing import CliRunner

from align.cli import serve
from align.evaluation.benchmarks.air_bench import Item, write_answers
from align.evaluation.benchmarks.wer import without_tags
from align.generation.engine import Decoding, Request
from align.generation.transformers_engine import TransformersEngine
from align.models.features import ClipFeatures
from align.models.qwen2_audio.model import load_processor
from align.serving.responses import timed_words
from preference_data.prompts.prompts import pretraining_prompt
from tests.align.serving.server_process import ALIGN, KEY, Served, clip, refusal, serving, text, user

QUESTION = "Is the tone high or low?"
GREEDY = {"model": "policy", "temperature": 0, "max_tokens": 12}


def test_words_stand_between_their_stamps():
    assert timed_words("<|sil|><|0.54|>hello<|0.86|> world<|1.17|>") == [
        {"word": "hello", "start": 0.54, "end": 0.86},
        {"word": "world", "start": 0.86, "end": 1.17},
    ]
    for answer in ("hello world", "", "a<|0.50|>b<|0.40|>", "<|0.50|>"):
        assert timed_words(answer) is None


@pytest.fixture(scope="module")
def served(toy):
    with serving(toy) as server:
        yield server


@pytest.fixture(scope="module")
def offline(toy, tiny):
    """The engine in this process."""
    return TransformersEngine(toy, ClipFeatures(load_processor(toy), tiny.audio))


def complete(engine, request, decoding):
    return next(engine.complete({0: request}, decoding, 0))[1][0]


def chat(served, *messages, **options):
    return served.client().chat.completions.create(messages=list(messages), **{**GREEDY, **options})


def streamed(served, *messages, **options):
    """The text, the finish reasons and the chunks of a stream."""
    chunks = list(chat(served, *messages, stream=True, **options))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    pieces = [choice.delta.content or "" for choice in choices]
    return "".join(pieces), [c.finish_reason for c in choices if c.finish_reason], chunks


# -------------------------------------------------------------------------- answers


def test_a_chat_about_a_clip_is_the_engine_s_greedy_completion_streamed_or_not(served, offline, tiny):
    for name in ("0.wav", "1.wav"):
        whole = complete(offline, Request(QUESTION, (name,)), Decoding(12))
        message = user(clip(tiny.audio / name), text(QUESTION))
        answer = chat(served, message)
        assert answer.choices[0].message.content == whole.text
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == len(whole.token_ids)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(whole.token_ids)
        said, finish, chunks = streamed(served, message, stream_options={"include_usage": True})
        assert (said, finish) == (whole.text, ["stop"])
        assert chunks[-1].usage == answer.usage
        assert len([c for c in chunks if c.choices and c.choices[0].delta.content]) > 3  # piece by piece
    assert whole.text == "The tone is low."
    cut = chat(served, message, max_tokens=3)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 3


def test_draws_are_a_function_of_the_seed(served, tiny):
    ask = user(clip(tiny.audio / "0.wav"), text("Generate the caption in English: low"))
    hot = {"temperature": 1.8, "seed": 5}
    first = chat(served, ask, **hot).choices[0].message.content
    with ThreadPoolExecutor(6) as pool:  # whatever is drawn beside it
        others = [pool.submit(chat, served, ask, temperature=1.8, seed=seed) for seed in range(12)]
        answers = [other.result() for other in others]
    texts = [answer.choices[0].message.content for answer in answers]
    assert texts[5] == first == streamed(served, ask, **hot)[0]
    assert len(set(texts)) > 3
    unseeded = chat(served, ask, temperature=1.8)
    again = chat(served, ask, temperature=1.8, seed=unseeded.seed)
    assert again.choices[0].message.content == unseeded.choices[0].message.content


def test_several_turns_and_clips_are_the_prompt_that_training_makes(served, offline, tiny):
    """Token by token: the second turn's answer is the argmax after the conversation's own ids."""
    messages = [
        {"role": "system", "content": "Be brief."},
        user(clip(tiny.audio / "0.wav"), text(QUESTION)),
        {"role": "assistant", "content": "The tone is high.", "refusal": None},
        user(clip(tiny.audio / "1.wav"), clip(tiny.audio / "2.wav"), text("high?")),
    ]
    processor = offline.processor
    audio = [
        [{"type": "audio"}, {"type": "text", "text": QUESTION}],
        [{"type": "audio"}, {"type": "audio"}, {"type": "text", "text": "high?"}],
    ]
    rendered = processor.apply_chat_template(
        [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": audio[0]},
            {"role": "assistant", "content": [{"type": "text", "text": "The tone is high."}]},
            {"role": "user", "content": audio[1]},
        ],
        add_generation_prompt=True,
        tokenize=False,
    )
    clips = offline.clips(["0.wav", "1.wav", "2.wav"])
    plain = Request(rendered, ("0.wav", "1.wav", "2.wav"), plain=True)
    whole = complete(offline, plain, Decoding(12))
    answer = chat(served, *messages)
    expected = processor.tokenizer.decode(whole.token_ids, skip_special_tokens=True).strip()
    assert answer.choices[0].message.content == expected
    assert answer.usage.prompt_tokens == len(offline.encode(plain, clips).ids)
    assert rendered.count("<|AUDIO|>") == 3
    assert "Audio 3: " in rendered


def test_a_transcript_is_asked_for_as_in_pre_training(served, offline, tiny):
    question = pretraining_prompt("transcribe", 1, "sentences", audio_language="en")
    whole = complete(offline, Request(question, ("1.wav",), plain=True), Decoding(2048))
    client = served.client()
    with (tiny.audio / "1.wav").open("rb") as file:
        said = client.audio.transcriptions.create(model="policy", file=file, language="en")
    assert said.text == whole.text
    words = {"model": "policy", "file": ("a.wav", (tiny.audio / "1.wav").read_bytes())}
    assert client.audio.transcriptions.create(**words, response_format="text") == whole.text + "\n"
    events = list(client.audio.transcriptions.create(**words, stream=True))
    assert events[-1].text == whole.text
    assert "".join(event.delta for event in events[:-1]) == whole.text
    question = pretraining_prompt("transcribe_words", 1, "sentences", audio_language="en")
    stamped = complete(offline, Request(question, ("1.wav",), plain=True), Decoding(2048)).text
    verbose = {"response_format": "verbose_json", "timestamp_granularities": ["word"], "language": "en"}
    timed = client.audio.transcriptions.create(**words, **verbose)
    assert timed.text == without_tags(stamped).strip()
    assert float(timed.duration) == pytest.approx(0.5)
    assert timed.words is None  # the toy has never learned stamps
    own = complete(
        offline,
        Request(
            "<|audio_bos|><|AUDIO|><|audio_eos|>Generate the caption in English:", ("1.wav",), plain=True
        ),
        Decoding(2048),
    )
    prompted = client.audio.transcriptions.create(**words, prompt="Generate the caption in English:")
    assert prompted.text == own.text
    for wrong, param in (({"language": "xx"}, "language"), ({"prompt": "<|im_end|>"}, "prompt")):
        with pytest.raises(openai.BadRequestError) as error:
            client.audio.transcriptions.create(**words, **wrong)
        assert error.value.param == param


def test_a_stop_text_ends_the_answer_before_it_is_said(served, tiny):
    ask = user(clip(tiny.audio / "0.wav"), text(QUESTION))
    for stop, said in ((" is", "The tone"), ([".", "tone"], "The"), ("never", "The tone is high.")):
        assert chat(served, ask, stop=stop).choices[0].message.content == said
        assert streamed(served, ask, stop=stop)[:2] == (said, ["stop"])


def test_models_are_listed(served):
    client = served.client()
    assert [model.id for model in client.models.list()] == ["policy"]
    assert client.models.retrieve("policy").owned_by == "align"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_align_judge_works_against_it(served, tmp_path):
    """The toy says nothing that is a rating: every reply counts as unusable, and none as unanswered."""
    path = tmp_path / "answers.jsonl"
    item = Item("a", "a.wav", "What is heard?", "A dog.", "a dog barks", "sound_QA", "made")
    write_answers(path, [item], ["A dog."])
    words = ["judge", str(path), "--judge-url", served.url, "--judge-model", "policy"]
    words += ["--out", str(tmp_path / "out"), "--parameter", "max_tokens=20"]
    done = subprocess.run(
        [ALIGN, *words],
        env={**os.environ, "ALIGN_JUDGE_API_KEY": KEY},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "invalid 1" in done.stdout, done.stdout


# -------------------------------------------------------------------------- refusals


def test_a_wrong_key_is_401_and_says_so_before_the_body(served):
    for sent in (b"", b"Bearer", b"Bearer wrong", b"Bearer test-keyx", b"Bearer test-ke", b"Bearer \xff\xfe"):
        answer = httpx.get(served.url + "/models", headers={"Authorization": sent})
        assert refusal(answer, 401)["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        served.client().with_options(api_key="wrong").models.list()
    assert httpx.get(served.root + "/docs").status_code == 401
    assert httpx.get(served.root + "/health").json()["status"] == "ready"


def test_200_mb_are_refused_before_they_are_read(served):
    host, port = served.root.removeprefix("http://").split(":")
    size = 200 * 10**6
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        connection.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    before = psutil.Process(served.pid).memory_info().rss
    with pytest.raises(openai.APIStatusError) as error:
        chat(served, user(text("a" * size)))
    assert error.value.status_code == 413
    assert "67,108,864 bytes" in error.value.message

    def endless():
        for _ in range(200):
            yield b" " * 10**6

    try:  # without a length; the connection may break before the client has sent all
        assert refusal(served.post("/chat/completions", content=endless()), 413)
    except httpx.TransportError:
        pass
    assert psutil.Process(served.pid).memory_info().rss - before < 150 * 10**6
    assert chat(served, user(text(QUESTION))).choices


def broken_clips(tiny, tmp_path):
    """Bytes of clips that are refused, by the word that says why."""
    whole = (tiny.audio / "3.wav").read_bytes()
    soundfile.write(tmp_path / "long.wav", np.zeros(40_000), 16_000)
    nan = np.full(8000, np.nan, np.float32)
    soundfile.write(tmp_path / "nan.wav", nan, 16_000, subtype="FLOAT")
    return {
        "unreadable": b"#EXTM3U\nhttp://127.0.0.1:9/a.wav",
        "truncated": whole[: len(whole) // 2],
        "empty_file": b"",
        "too_long": (tmp_path / "long.wav").read_bytes(),
        "non_finite": (tmp_path / "nan.wav").read_bytes(),
    }


def test_a_bad_clip_is_named_by_its_message_and_part(served, tiny, tmp_path):
    good = clip(tiny.audio / "0.wav")
    for reason, content in broken_clips(tiny, tmp_path).items():
        (tmp_path / "bad").write_bytes(content)
        turns = [user(good, text("a")), {"role": "assistant", "content": "b"}]
        body = {**GREEDY, "messages": [*turns, user(text("c"), good, clip(tmp_path / "bad"))]}
        error = refusal(served.post("/chat/completions", json=body))
        assert error["param"] == "messages[2].content[2]"
        assert error["code"] == reason
        form = {"data": {"model": "policy"}, "files": {"file": content}}
        assert refusal(served.post("/audio/transcriptions", **form))["code"] == reason
    body["messages"][2]["content"][2]["input_audio"]["data"] = "no base64"
    assert "base64" in refusal(served.post("/chat/completions", json=body))["message"]


BAD_REQUESTS = {
    "not JSON": ({"content": b"{"}, None),
    "a list": ({"json": []}, None),
    "deep": ({"content": b"[" * 100_000}, None),
    "no messages": ({"json": {"model": "policy"}}, "messages"),
    "an unknown parameter": ({"temprature": 1}, "temprature"),
    "a parameter that we do not have": ({"n": 3}, "n"),
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "a text for a number": ({"temperature": "1"}, "temperature"),
    "NaN": ({"content": b'{"temperature": NaN}'}, None),
    "too hot": ({"temperature": 3}, "temperature"),
    "too many tokens": ({"max_tokens": 100_000}, "max_tokens"),
    "an assistant at the end": ({"messages": [{"role": "assistant", "content": "a"}]}, "messages[0].role"),
    "a role of vLLM's": ({"messages": [{"role": "plain", "content": "a"}]}, "messages[0].role"),
    "an address": (
        {"messages": [user({"type": "audio_url", "audio_url": {"url": "file:///etc/passwd"}})]},
        "messages[0].content[0].type",
    ),
    "a steering text": ({"messages": [user(text("a"), text("<|im_end|>"))]}, "messages[0].content[1]"),
    "half a character": ({"content": rb'{"messages": "\ud800"}'}, None),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_what_a_request_may_not_be_is_said_with_its_place(served, case):
    parts, param = BAD_REQUESTS[case]
    if not {"content", "json"} & parts.keys():
        parts = {"json": {"model": "policy", "messages": [user(text("a"))], **parts}}
    assert refusal(served.post("/chat/completions", **parts))["param"] == param


def test_other_limits(served, tiny):
    one = clip(tiny.audio / "0.wav")
    many = {"json": {**GREEDY, "messages": [user(*[one] * 9)]}}
    assert refusal(served.post("/chat/completions", **many))["param"] == "messages[0].content[8]"
    long = {"json": {**GREEDY, "messages": [user(text("high? " * 900))]}}
    error = refusal(served.post("/chat/completions", **long))
    assert error["code"] == "context_length_exceeded"
    assert "1,024" in error["message"]
    other = {"json": {**GREEDY, "model": "gpt-4o", "messages": [user(text("a"))]}}
    assert refusal(served.post("/chat/completions", **other), 404)["code"] == "model_not_found"
    assert refusal(served.post("/nothing"), 404)
    neutral = {"n": 1, "user": "me", "metadata": {}, "logit_bias": {}, "response_format": {"type": "text"}}
    assert chat(served, user(text(QUESTION)), **neutral).choices


HOSTILE = [
    "<script>alert(1)</script>",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ 7*7 }}",
    "Audio 1: ",
    "\x00\x1b[2J",
    "data: [DONE]\n\n",
    "' OR 1=1 --",
    "\u202e\u2028\u2029\ufeff",
    "😀" * 50,
    "../../etc/passwd",
]


def test_hostile_texts_are_read_as_characters(served, offline):
    for words in HOSTILE:
        whole = complete(offline, Request(words, ()), Decoding(12))
        assert chat(served, user(text(words))).choices[0].message.content == whole.text
        assert streamed(served, user(text(words)))[0] == whole.text


# -------------------------------------------------------------------------- many clients, and their end


@pytest.mark.alone
def test_16_clients_at_once_get_their_own_answers_and_metrics_count_them(served, offline, tiny):
    names = [f"{i % 4}.wav" for i in range(16)]
    questions = [QUESTION, "high?", "Generate the caption in English:"]
    cases = [(q, name) for q in questions for name in names[:4]]
    expected = {case: complete(offline, Request(case[0], (case[1],)), Decoding(12)).text for case in cases}
    name = 'align_requests_total{route="/v1/chat/completions",status="200"}'
    before, tokens = served.metric(name), served.metric("align_completion_tokens_total")
    deadline = time.monotonic() + 5

    def work(worker):
        done, drawn = 0, 0
        while time.monotonic() < deadline:
            question, name = cases[(worker + done) % len(cases)]
            message = user(clip(tiny.audio / name), text(question))
            if worker % 2:
                assert streamed(served, message)[0] == expected[question, name]
            else:
                answer = chat(served, message)
                assert answer.choices[0].message.content == expected[question, name]
                drawn += answer.usage.completion_tokens
            done += 1
        return done, drawn

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(work, range(16)))
    assert all(done for done, _ in results)
    assert served.metric(name) - before == sum(done for done, _ in results)
    assert served.metric("align_completion_tokens_total") - tokens > sum(drawn for _, drawn in results)
    served.settle()
    assert 'status="5' not in httpx.get(served.root + "/metrics").text


def test_a_client_that_leaves_costs_no_more_tokens(served, tiny):
    """An answer of thousands of tokens, at top temperature so that it does not end by itself soon."""
    before = served.metric("align_completion_tokens_total")
    message = user(clip(tiny.audio / "0.wav"), text(QUESTION))
    with served.client().chat.completions.create(
        messages=[message], model="policy", temperature=2, top_p=1, seed=1, max_tokens=900, stream=True
    ) as stream:
        next(iter(stream))
    served.settle()
    time.sleep(0.5)
    drawn = served.metric("align_completion_tokens_total")
    time.sleep(1)
    assert served.metric("align_completion_tokens_total") == drawn
    assert drawn - before < 900


def test_killed_it_leaves_nothing_behind_and_the_same_command_serves_again(toy, tiny):
    served = Served(toy)
    assert httpx.get(served.root + "/health").status_code in (200, 503)  # it listens while it loads
    served.expect(r"(?m)^ready$")
    message = user(clip(tiny.audio / "0.wav"), text(QUESTION))
    said = chat(served, message).choices[0].message.content
    family = served.family()
    assert len(family) > 2  # decoders
    served.kill()
    served.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    port = served.root.rpartition(":")[2]
    with serving(toy, port=port) as again:
        assert again.root == served.root
        assert chat(again, message).choices[0].message.content == said


def test_ctrl_c_ends_it_in_order_and_a_key_is_made_where_none_is_given(toy):
    served = Served(toy, key=None)
    served.key = served.expect(r"key (align-\S{40,}) \(shown once")[1]
    served.expect(r"(?m)^ready$")
    assert [model.id for model in served.client().models.list()] == ["policy"]
    family = served.family()
    served.kill(signal.SIGINT)
    assert served.wait() == 0
    assert not psutil.wait_procs(family[1:], timeout=20)[1]


def test_loading_is_said_while_it_lasts_and_a_policy_that_cannot_be_loaded_ends_the_command(tiny, tmp_path):
    (tmp_path / "p").mkdir()
    for file in tiny.policy.iterdir():
        (tmp_path / "p" / file.name).symlink_to(file)
    (tmp_path / "p" / "model.safetensors").unlink()
    (tmp_path / "p" / "model.safetensors").write_bytes(b"no weights")
    done = subprocess.run(
        [ALIGN, "serve", str(tmp_path / "p"), "--port", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "cannot be loaded" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_engine_that_dies_is_told_by_health(tiny, tmp_path):
    """The weights know fewer tokens than the tokenizer: the first such token ends the engine."""
    policy = shrunk(tiny.policy, tmp_path / "p")
    with serving(policy) as served:
        assert httpx.get(served.root + "/health").json()["status"] == "ready"
        answer = served.post("/chat/completions", json={**GREEDY, "messages": [user(text("a"))]})
        assert refusal(answer, 503)["code"] == "unavailable"
        health = httpx.get(served.root + "/health")
        assert health.status_code == 503
        assert health.json()["status"] == "died"
        assert "IndexError" in health.json()["reason"]
        assert served.metric("align_engine_ready") == 0
        answer = served.post("/chat/completions", json={**GREEDY, "messages": [user(text("a"))]})
        assert refusal(answer, 503)


def shrunk(policy, to):
    """A copy of a saved policy with embeddings for a few tokens only."""
    from align.models.qwen2_audio.model import load_model, save

    model = load_model(policy)
    model.resize_token_embeddings(8)
    save(model, load_processor(policy), to)
    return to


def test_a_taken_port_and_a_missing_policy_are_named(served, toy, tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_SERVE_API_KEY", KEY)
    app = typer.Typer()
    app.command()(serve.serve)
    port = served.root.rpartition(":")[2]
    taken = CliRunner().invoke(app, [str(toy), "--port", port])
    assert taken.exit_code == 1
    assert f"127.0.0.1:{port}: Address already in use; choose another --port" in taken.output
    gone = CliRunner().invoke(app, [str(tmp_path / "no")])
    assert gone.exit_code == 2
    assert "there is no such folder" in gone.output
    monkeypatch.setenv("ALIGN_SERVE_API_KEY", KEY + "\n")
    assert CliRunner().invoke(app, [str(toy)]).exit_code == 2
