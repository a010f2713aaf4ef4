"""Tags learn while the language model is frozen: their rows alone; the others stay, bit for bit."""

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from align.run_folder.artifacts import read_metrics
from preference_data.prompts.prompts import all_tags
from tests.align.training import tiny_training
from tests.compiler import need_compiler, possible

pytestmark = [pytest.mark.timeout(600)]
TABLES = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
CASES = [f"pretrain-{strategy}-tags" for strategy in ("ddp", "zero2", "zero3")]
BOTH = (*CASES, "alone")


@pytest.fixture(scope="module")
def root(programs, tmp_path_factory):
    """Six steps of weight decay and Adam: in this process, and on two."""
    root = tmp_path_factory.mktemp("tags")
    world = tiny_training.make_world(root / "world")
    (root / "alone").mkdir()
    tiny_training.run_here(tiny_training.make_config("pretrain-tags", steps=6), world, root / "alone")
    cases = possible(CASES)
    programs.run_ranks(2, tiny_training.__file__, str(world), str(root), *cases, STEPS="6", SAVE_STEPS="3")
    return root


def stage(root, case):
    if "zero" in case:
        need_compiler()
    return root / case / ".partial-stage"


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def token_rows(tokenizer):
    """Rows of the embeddings that are to learn."""
    tags, vocabulary = all_tags("tags_released"), tokenizer.get_vocab()
    names = {"<|audio_bos|>", "<|audio_eos|>", *tags.prompt, *tags.answer} & set(vocabulary)
    return sorted(vocabulary[name] for name in names)


@pytest.mark.parametrize("case", BOTH)
def test_the_new_rows_learn_and_nothing_else_of_the_language_model_moves(root, case):
    out, policy = stage(root, case), root / "world" / "policy" / "model"
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    before, after = load_file(policy / "model.safetensors"), weights(out)
    new = token_rows(tokenizer)
    is_old = torch.ones(len(before[TABLES[0]]), dtype=torch.bool)
    is_old[new] = False
    assert is_old.sum() > 100
    for name in TABLES:
        assert torch.equal(after[name][is_old], before[name][is_old]), name
    head, asked = TABLES[1], tokenizer.convert_tokens_to_ids(["<|startofanalysis|>", "<|audio_bos|>"])
    assert (after[head][new] != before[head][new]).any(1).all()  # all: none of them is the answer
    assert (after[TABLES[0]][asked] != before[TABLES[0]][asked]).any(1).all()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in moved if name.startswith("language_model.")} == set(TABLES)
    assert any(name.startswith("multi_modal_projector.") for name in moved)
    assert not any(name.startswith("audio_tower.") for name in moved)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_does(root, case):
    one, two = (read_metrics(stage(root, name) / "metrics.jsonl") for name in ("alone", case))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    assert [row["grad_norm"] for row in two] == pytest.approx([row["grad_norm"] for row in one], rel=1e-5)
    for name, value in weights(root / "alone" / ".partial-stage").items():
        torch.testing.assert_close(weights(root / case / ".partial-stage")[name], value, rtol=1e-4, atol=1e-5)


def test_decay_would_move_the_old_rows(root, tmp_path, monkeypatch):
    """What the exception from weight decay is there for."""
    from align.training.tuning import Tuning

    monkeypatch.setattr(Tuning, "undecayed", frozenset())
    tiny_training.run_here(tiny_training.make_config("pretrain-tags", steps=6), root / "world", tmp_path)
    kept, moved = weights(root / "alone" / ".partial-stage"), weights(tmp_path / ".partial-stage")
    tokenizer = AutoTokenizer.from_pretrained(root / "world" / "policy" / "model")
    words = sorted(set(range(len(tokenizer))) - set(token_rows(tokenizer)))
    old = load_file(root / "world" / "policy" / "model" / "model.safetensors")[TABLES[0]]
    assert torch.equal(kept[TABLES[0]][words], old[words])
    assert not torch.equal(moved[TABLES[0]][words], old[words])


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("pretrain", {"train": ["language_model", "new_tokens"]}, "language_model holds new_tokens already"),
        ("sft", {"train": ["new_tokens"]}, "new_tokens are learned in pretrain only"),
        (
            "pretrain",
            {"train": ["new_tokens"], "hardware": {"strategy": "fsdp2"}},
            "take ddp, zero2 or zero3",
        ),
    ],
)
def test_where_it_makes_no_sense_it_is_refused(case, changes, message):
    with pytest.raises(ValidationError, match=message):
        tiny_training.make_config(case, **changes)
