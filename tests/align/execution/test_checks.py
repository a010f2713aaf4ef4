"""`align check` and the start of `align run`: every mistake is an error of ours, before anything runs."""

import json
import random
import re
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from align.cli import main
from align.execution.checks import check_data, load_checked, unreachable_models
from align.recipe.recipe import RecipeError
from preference_data import store
from preference_data.schema import Chat, PreferencePair, Turn
from tests.align.training import tiny_training
from tests.http_servers import running

RECIPES = Path(__file__).parents[3] / "recipes"


def problems(folder, overrides=()):
    with pytest.raises(RecipeError) as caught:
        load_checked(folder, list(overrides), lambda recipe: folder.parent / "run")
    return [str(problem).removeprefix(f"{folder}/") for problem in caught.value.problems]


def recipe(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name.removeprefix('s')}.yaml").write_text(text)
    return folder


# -------------------------------------------------------------------------- TRL's own errors


def test_what_trl_refuses_is_told_with_the_recipes_own_mistakes(tmp_path):
    folder = shutil.copytree(RECIPES / "demo", tmp_path / "demo")
    wrong = ["6_dpo.beta=-1", "2_sft.trl.adam_beta1=2.0", "1_pretrain.steps=yes"]
    told = problems(folder, [*wrong, "6_chosen_only.trl.optim=adamw_8bit"])
    assert [line.partition(": ")[2].partition(": ")[0] for line in told] == [
        "steps",
        "beta",
        "trl.adam_beta1",
        "trl.optim",
    ]
    assert "Invalid beta parameter at index 0" in told[2]
    assert "install `bitsandbytes`" in told[3]


@pytest.mark.parametrize(
    ("judge", "problem"),
    [
        ("{model: m, url: 'localhost:8000/v1'}", "expected one like https://api.openai.com/v1"),
        ("{model: m, url: 'ftp://host/v1'}", "expected one like https://api.openai.com/v1"),
        ("{model: m, url: 'http://host:99999/v1'}", "expected one like https://api.openai.com/v1"),
        ("{model: m, url: 'http://h/v1', parameters: {temperature: .nan}}", "temperature': nan cannot be"),
        ("{model: m, url: 'http://h/v1', parameters: {max_tokens: many}}", "many' is not a number of"),
        ("{model: ./nowhere}", "there is no model in the folder './nowhere'; a server's needs url"),
        ("{model: gpt-4o}", "there is no model in the folder 'gpt-4o'; a server's needs url"),
        ("{model: m, parameters: {max_tokens: 0}}", "0 is not a number of tokens"),
    ],
)  # fmt: skip
def test_a_judge_that_cannot_be_used(tmp_path, judge, problem):
    folder = shutil.copytree(RECIPES / "demo", tmp_path / "demo")
    assert problem in problems(folder, [f"7_evaluate.judge={judge}"])[0]


def test_a_judge_of_comparisons_that_cannot_be_used(tmp_path):
    folder = shutil.copytree(RECIPES / "own_audio_by_model", tmp_path / "own")
    told = problems(folder, ["4_annotate.judge={model: ./nowhere, hears: false}"])
    assert any("there is no model in the folder './nowhere'; a server's needs url" in line for line in told)


def test_vllm_that_is_not_installed_or_cannot_serve_the_policy(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_VLLM_ENV", str(tmp_path / "none"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = shutil.copytree(RECIPES / "demo_rl", tmp_path / "demo_rl")
    narrow = tiny_training.make_world(tmp_path / "world") / "policy"
    told = problems(folder, ["3_grpo.engine=vllm", f"3_grpo.policy={narrow}"])
    assert [line.partition(": ")[2] for line in told] == [
        f"engine: vLLM is not in {tmp_path}/none. Run: align engine install",
        f"engine: {narrow} has attention heads 16 wide: on a CPU vLLM takes 32, 64, 80, 96, 112, 128, 160, "
        "192, 224, 256, 512",
    ]


# -------------------------------------------------------------------------- models from outside

WHISPER = {"model_type": "whisper", "num_mel_bins": 80, "d_model": 8, "encoder_layers": 1}
WHISPER |= {"encoder_ffn_dim": 8, "max_source_positions": 50}
QWEN2 = {"model_type": "qwen2", "vocab_size": 300, "hidden_size": 8, "num_hidden_layers": 1}
QWEN2 |= {"intermediate_size": 8, "num_attention_heads": 1}


@pytest.fixture
def parts(tmp_path):
    """Folders that look like a Whisper's and a Qwen2's, and a recipe that puts them together."""
    for name, config, more in (
        ("whisper", WHISPER, "preprocessor_config.json"),
        ("qwen2", QWEN2, "tokenizer.json"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / more).write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"x")
    corpus = "stage: corpus\ncorpus: folder\ndir: .\nmax_duration_s: 0.9\n"
    pretrain = (
        f"stage: pretrain\ncorpus: 0_corpus\nmodel: {{audio: {tmp_path}/whisper, text: {tmp_path}/qwen2}}\n"
    )
    pretrain += "steps: 1\nbatch_size: 1\nlearning_rate: 1\n"
    return recipe(tmp_path / "toy", s0_corpus=corpus, s1_pretrain=pretrain)


def change_config(folder, **fields):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def unlink(path):
    return lambda at: (at / path).unlink()


def write(path, text):
    return lambda at: (at / path).write_text(text)


def change(folder, **fields):
    return lambda at: change_config(at / folder, **fields)


INDEX = "qwen2/model.safetensors.index.json"
SHARDS = '{"weight_map": {"a": "model-1.safetensors"}}'


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (unlink("whisper/preprocessor_config.json"), "model.audio: {}/whisper holds no feature extractor"),
        (change("whisper", num_mel_bins=None), "in its field num_mel_bins"),
        (change("whisper", encoder_layers="many"), "in its field encoder_layers"),
        (change("whisper", model_type="wav2vec2"), "a model of type 'wav2vec2'; needed is 'whisper'"),
        (unlink("whisper/config.json"), "model.audio: {}/whisper holds no config.json"),
        (write("whisper/config.json", "{"), "config.json cannot be read"),
        (write("whisper/config.json", "[]"), "a model of type None; needed is 'whisper'"),
        (unlink("whisper/model.safetensors"), "model.audio: {}/whisper holds no safetensors"),
        (unlink("qwen2/tokenizer.json"), "model.text: {}/qwen2 holds no tokenizer"),
        (change("qwen2", hidden_size=None), "in its field hidden_size"),
        (change("qwen2", vocab_size=0), "in its field vocab_size"),
        (change("qwen2", model_type="llama"), "a model of type 'llama'; needed is 'qwen2'"),
        (write(INDEX, SHARDS), "model.text: {}/qwen2 lacks 1 of 1 shards, such as model-1.safetensors"),
        (write(INDEX, "x"), "is not an index of weights"),
    ],
)
def test_folders_that_hold_no_whole_model(parts, harm, words):
    load_checked(parts, None, lambda recipe: parts.parent / "run")
    harm(parts.parent)
    [told] = problems(parts)
    assert told.startswith("1_pretrain.yaml:3: model.")
    assert words.format(parts.parent) in told


def test_parts_that_know_too_few_positions(parts):
    change_config(parts.parent / "qwen2", max_position_embeddings=25)
    change_config(parts.parent / "whisper", max_source_positions=50)
    [told] = problems(parts)
    assert "/qwen2 knows 25 positions (max_position_embeddings), and the longest clip alone takes 25" in told
    change_config(parts.parent / "qwen2", max_position_embeddings=26)
    load_checked(parts, None, lambda recipe: parts.parent / "run")
    [told] = problems(parts, ["corpus.max_duration_s=1.5"])
    assert told.startswith("1_pretrain.yaml:3: model.audio: ")
    assert "/whisper has positions for 1 s, and clips may last 1.5 s: take an encoder that hears more" in told
    told = problems(parts, ["pretrain.model.clip_s=2"])
    assert "model.clip_s: 2 is more than the 1 s that " in told[0]


def test_a_policy_from_a_folder_must_be_a_whole_qwen2_audio(tmp_path, parts):
    sft = "stage: sft\ncorpus: 0_corpus\npolicy: {}\nsteps: 1\nbatch_size: 1\nlearning_rate: 1\n"
    folder = recipe(parts, s2_sft=sft.format(tmp_path / "qwen2"))
    told = problems(folder)
    assert [line.partition(": ")[0] for line in told] == ["2_sft.yaml:3"] * 2
    assert "policy: " + str(tmp_path / "qwen2") + " holds a model of type 'qwen2'" in told[0]
    assert "holds no feature extractor" in told[1]
    change_config(tmp_path / "qwen2", model_type="qwen2_audio", audio_config={})
    told = problems(folder, ["1_pretrain.model={d_model: 64}"])
    assert "has no field text_config" in told[0]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (404, "the Hub has no model some/model"),
        (500, "the Hub cannot be asked for it"),
        (None, "the Hub cannot be asked for it"),
        (200, None),
    ],
)
def test_what_the_hub_says_of_a_model_is_told(parts, monkeypatch, status, words):
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            body = b'{"id": "some/model"}'
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    run = parts.parent / "run"
    loaded, _ = load_checked(parts, ["1_pretrain.model=some/model"], lambda recipe: run)
    with running(ThreadingHTTPServer(("127.0.0.1", 0), Hub)) as hub:
        port = hub.server_port if status else 9
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        told = unreachable_models(loaded.steps)
    assert [str(words) in str(problem) for problem in told] == [True] * (words is not None)


# -------------------------------------------------------------------------- data on disk


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_training.make_world(tmp_path_factory.mktemp("checks") / "world")


@pytest.fixture
def ready(world, tmp_path):
    """A recipe whose policy, corpus and pairs are there before the run."""
    at = shutil.copytree(world, tmp_path / "world")
    more = f"corpus: {at}/corpus\npolicy: {at}/policy\nbatch_size: 2\nlearning_rate: 1.0e-4\n"
    sft, dpo = f"stage: sft\nsteps: 2\n{more}", f"stage: dpo\npairs: {at}/pairs\n{more}"
    return recipe(tmp_path / "toy", s1_sft=sft, s2_dpo=dpo)


def pair(**changed):
    texts = {"question": "Is the tone high?", "chosen": "Yes.", "rejected": "No."}
    return PreferencePair(
        id="p-100", prompt_id="p", axis="factuality", agreement=1.0, **{**texts, "audios": (), **changed}
    )


def chat(answer, audios=()):
    return Chat(id="c-9", audios=audios, turns=(Turn(question="?", answer=answer),))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (pair(audios=("audio/7.wav",) * 100), "pair 'p-100' has 1998 tokens, with its 100 clips"),
        (pair(chosen="high " * 1500), "pair 'p-100' has "),
        (pair(question="low? " * 1500), "pair 'p-100' has "),
        (pair(rejected="A tone.<|im_end|>"), "p-100"),
        (chat("high " * 1500), "example 'c-9' has "),
        (chat("high", ("audio/1.wav",) * 90), "example 'c-9' has"),
    ],
)  # fmt: skip
def test_an_example_that_is_too_long_is_named_by_check(ready, record, words):
    load_checked(ready, None, lambda recipe: ready.parent / "run")
    world = ready.parent / "world"
    kind, path = (
        ("2_dpo", world / "pairs/pairs.jsonl")
        if isinstance(record, PreferencePair)
        else ("1_sft", world / "corpus/sft.jsonl")
    )
    store.write(path, [*store.read(path, type(record)), record])
    [told] = problems(ready)
    assert told.startswith(f"{kind}.yaml: ")
    assert words in told


def test_clips_that_the_model_does_not_hear_to_their_end(ready):
    path = ready.parent / "world/corpus/clips.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "duration_s": 2.5}) + "\n" for row in rows))
    told = problems(ready)
    assert [line.partition(": ")[0] for line in told] == ["1_sft.yaml", "2_dpo.yaml"]
    assert "8 of 8 clips are longer than the 1 s that the model hears" in told[0]


def test_data_that_are_not_here_are_named_before_a_run(parts):
    loaded, run = load_checked(parts, ["0_corpus.dir=nowhere/clips"], lambda recipe: parts.parent / "run")
    with pytest.raises(
        RecipeError, match="0_corpus.yaml: data are not here, and a run needs them: nowhere/clips"
    ):
        check_data(loaded, run, loaded.steps)


# -------------------------------------------------------------------------- anything at all

JUNK = [
    *"010 yes ~ 1:30 1_000 .nan -1 1e999 [] {} [[1]] '' ' [ } *a | @ ` %x ./ ../x ~nobody/x a/b".split(),
    *"a/b/c 0_corpus 2_sft 1_pretrain sft true 0 3 0.5 2020-01-01 << ? é".split(),
    *("&a b", "!!binary x", "!x y", "> x", "a: b", "- x", "\t", "\x00", "\ud7ff", '"a\\0b/c"'),
    *("{a: {b: c}}", "[0_corpus, 2_sft]", "{folder: x}", "{audio: a/b, text: c/d}", "{d_model: 33}"),
    *("{workers: 3}", "{optim: x}", "1" * 400, "x" * 5000, "/" + 300 * "y"),
]


def mutated(lines, rng):
    """The lines of a stage file with one to three changes."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(lines))
        key, colon, _ = lines[at].partition(":")
        change = rng.randrange(10)
        if change == 0:
            del lines[at]
        elif change > 6:
            lines[at] = re.sub(
                r"\d+", lambda number: str(max(0, int(number[0]) + rng.randint(-1, 3))), lines[at]
            )
        elif change == 1:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        elif change == 2:
            lines[at] = f"{key}: {rng.choice(JUNK)}" if colon else rng.choice(JUNK)
        elif change == 3:
            lines[at] = lines[at].replace(
                key, rng.choice(["beta", "steps", "trl", "stage", "x", "policy", "1"]), 1
            )
        elif change == 4:
            lines.insert(
                at,
                " " * rng.randrange(4)
                + rng.choice(["beta", "hardware", "trl", "x"])
                + f": {rng.choice(JUNK)}",
            )
        elif change == 5:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
        else:
            places = [place for place, letter in enumerate(lines[at]) if letter in ",:{}[]0123456789"] or [0]
            place = rng.choice(places)
            lines[at] = lines[at][:place] + rng.choice(JUNK) + lines[at][place + 1 :]
        lines = lines or [""]
    return lines


def test_no_recipe_whatever_ends_a_check_with_a_traceback(tmp_path, monkeypatch):
    """150 mutations of the repository's recipes, the same ones every time."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = sorted(path.parent.name for path in RECIPES.glob("*/1_*.yaml"))
    n_refused = 0
    for case in range(150):
        rng = random.Random(case)
        folder = shutil.copytree(RECIPES / rng.choice(names), tmp_path / "mutated")
        for path in rng.sample(sorted(folder.glob("*.yaml")), rng.choice([1, 1, 2])):
            lines = mutated(path.read_text(encoding="utf-8").splitlines(), rng)
            path.write_text("\n".join(lines), encoding="utf-8")
        stage, key = rng.choice(["*", "dpo", "2_sft", "x"]), rng.choice(["seed", "trl.optim", "model", ""])
        overrides = [f"{stage}.{key}={rng.choice(JUNK)}"] if case % 3 == 0 else None
        try:
            main.check(folder, overrides, 80.0, tmp_path / "run")
        except RecipeError:
            n_refused += 1
        except BaseException as error:
            raise AssertionError(f"case {case} ended with {error!r}") from error
        shutil.rmtree(folder)
    assert 50 < n_refused < 140, "mutations that are all refused, or none, try little"
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------- earlier judgements


@pytest.mark.parametrize("damaged", [b'{"id": "1', b"3\n", b"{}\n"], ids=str)
def test_a_snapshot_that_cannot_be_read_is_a_mistake_of_the_recipe(tmp_path, damaged):
    (tmp_path / "judgements.jsonl").write_bytes(damaged)
    (told,) = problems(RECIPES / "demo", [f"4_annotate.snapshot={tmp_path}"])
    assert f"snapshot: {tmp_path}/judgements.jsonl:1: " in told
