"""Two processes train as one does: same losses, same data, same files; stopped and resumed, bit for bit.

All cases run in one group of two gloo processes, started once (DeepSpeed compiles an op on first use).
Which case covers which pair of properties; those in brackets are `slow`:

             all parameters         low rank       stock model    tight memory       resumed
    ddp      sft, pretrain (dpo)    dpo (sft)      dpo (sft)      sft                sft (dpo low rank)
    zero2    sft (frozen), dpo      sft                                              sft (frozen)
    zero3    sft (dpo)              dpo (sft)      sft            dpo (sft)          dpo low rank (sft)
"""

import os
import shutil
import subprocess
import sys
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2AudioForConditionalGeneration

from align.run_folder.artifacts import read_json, read_metrics
from align.training.checkpoints import CannotResume, checkpoints, is_whole, step_of
from tests.align.training import tiny_training
from tests.align.training.tiny_training import rows_of, stage, weights
from tests.compiler import CAN_COMPILE, need_compiler, possible

pytestmark = [pytest.mark.timeout(1500)]
STRATEGIES = ("ddp", "zero2", "zero3")
CASES = (
    *("sft-ddp", "pretrain-ddp", "dpo-ddp-lora", "dpo-ddp-stock", "sft-ddp-tight"),
    *("sft-zero2-frozen", "dpo-zero2", "sft-zero2-lora"),
    *("sft-zero3", "dpo-zero3-lora", "sft-zero3-stock", "dpo-zero3-tight-lora"),
)
RARE_CASES = (
    *("dpo-ddp", "sft-ddp-lora", "sft-ddp-stock"),
    *("dpo-zero3", "sft-zero3-lora", "sft-zero3-tight", "dpo-zero3-once", "sft-zero3-frozen"),
)
RESUMED = ("sft-ddp", "sft-zero2-frozen", "dpo-zero3-lora")
RARELY_RESUMED = ("dpo-ddp-lora", "sft-zero3-frozen")
STOPPED_IN = 7


def kind_of(case):
    """The case in one process, with all the memory there is."""
    return "-".join(word for word in case.split("-") if word not in (*STRATEGIES, "tight"))


def parameters(cases, rare):
    return [*cases, *(pytest.param(case, marks=pytest.mark.slow) for case in rare)]


def those(is_wanted):
    return parameters(filter(is_wanted, CASES), filter(is_wanted, RARE_CASES))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def world(root):
    return tiny_training.make_world(root / "world")


@pytest.fixture(scope="module")
def alone(root, world):
    """Folder of a kind trained in one process."""

    @cache
    def train(kind):
        folder = root / "alone" / kind
        folder.mkdir(parents=True)
        tiny_training.trace(folder / "trace-0.jsonl")
        tiny_training.run_here(tiny_training.make_config(kind), world, folder)
        return folder

    return train


@pytest.fixture(scope="module")
def log_of(root, world):
    """Log of the two processes that run the frequent or the rare cases, some of them stopped and resumed."""

    @cache
    def run(name):
        cases, resumed = (CASES, RESUMED) if name == "often" else (RARE_CASES, RARELY_RESUMED)
        wanted = possible([*cases, *(f"{case}@{STOPPED_IN}" for case in resumed)])
        # zero3 last: it patches torch's linear layers
        in_order = [case for strategy in STRATEGIES for case in wanted if strategy in case]
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [*program, tiny_training.__file__, str(world), str(root / "two"), *in_order]
        path = root / f"{name}.txt"
        with path.open("w") as log:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=env, timeout=1400, check=False
            )
        assert done.returncode == 0, path.read_text()[-4000:]
        return path.read_text()

    return run


@pytest.fixture(scope="module")
def together(root, log_of):
    """Folder of a case trained on two processes; of one stopped and resumed with `-resumed` at its end."""

    def finished(case):
        if "zero" in case:
            need_compiler()
        log_of("often" if case in (*CASES, *(f"{case}-resumed" for case in RESUMED)) else "rare")
        assert (root / "two" / case / "finished").exists()
        return root / "two" / case

    return finished


@pytest.mark.parametrize("case", those(lambda case: case.startswith("dpo") and "once" not in case))
def test_held_out_pairs_are_each_evaluated_once(alone, together, case):
    """Three pairs over two processes: one of them has a pair that does not count."""
    found = [
        [row for row in read_metrics(stage(folder) / "metrics.jsonl") if "held_out/loss" in row]
        for folder in (alone(kind_of(case)), together(case))
    ]
    assert [row["step"] for row in found[0]] == [row["step"] for row in found[1]] == [10, 20]
    for one, two in zip(*found, strict=True):
        assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("case", parameters(CASES, RARE_CASES))
def test_two_processes_take_the_same_twenty_steps_as_one(alone, together, case):
    one, two = alone(kind_of(case)), together(case)
    a, b = (rows_of(folder) for folder in (one, two))
    assert [row["step"] for row in a] == [row["step"] for row in b] == list(range(1, 21))
    for x, y in zip(a, b, strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-5), x["step"]
        assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=1e-5), x["step"]
    assert a[0]["loss"] > 1.02 * a[-1]["loss"]  # they did learn
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_two_processes_without_memory_took_their_steps_in_two_micro_batches_each(together, log_of):
    folder = together("sft-ddp-tight")
    log = log_of("often")
    assert log.count("stage: does not fit 3.0 GB") == (2 if CAN_COMPILE else 1)
    assert "2 of 3 layers checkpointed" in log
    assert len((folder / "trace-1.jsonl").read_text().splitlines()) == 2 * 20


@pytest.mark.parametrize("case", those(lambda case: case.startswith("dpo")))
def test_every_strategy_has_the_reference_of_one_process(alone, together, case):
    """Each process computes its share, before the model is divided; what was known is not asked again."""
    one, two = (
        {path.name: read_json(path) for path in (folder / ".reference").iterdir()}
        for folder in (alone(kind_of(case)), together(case))
    )
    assert one.keys() == two.keys()  # weights, rows, clips, template and dtype are the same
    assert len(one) == (1 if "once" in case else 2)  # to train on, and held out
    for digest, columns in one.items():
        for name, logps in columns.items():
            assert two[digest][name] == pytest.approx(logps, rel=1e-6), name


@pytest.mark.parametrize("name", parameters(["often"], ["rare"]))
def test_the_preflight_listens_under_every_strategy(log_of, name):
    """Also in DPO under DeepSpeed, whose engine is the only one. A stopped and resumed run looks twice."""
    cases, resumed = (CASES, RESUMED) if name == "often" else (RARE_CASES, RARELY_RESUMED)
    started = possible([*cases]) + 2 * possible([*resumed])
    compared = log_of(name).count("a forward pass takes")
    assert compared == len([case for case in started if "stock" not in case])


@pytest.mark.parametrize("case", those(lambda case: "-ddp" in case and "tight" not in case))
def test_the_processes_share_the_rows_of_one_and_sometimes_one_has_no_audio(alone, together, case):
    two = together(case)
    a, b = tiny_training.read_trace(alone(kind_of(case)), 1), tiny_training.read_trace(two, 2)
    # Each step's rows are dealt to the two by their length, so they stand in another order
    assert {step: sorted(rows) for step, (rows, _) in a.items()} == {
        step: sorted(rows) for step, (rows, _) in b.items()
    }
    if case.startswith("pretrain"):
        return  # every target has a clip
    per_rank = [tiny_training.read_trace_of(two, rank) for rank in range(2)]
    silent = [[not per_rank[rank][step]["clips"] for rank in range(2)] for step in range(1, 21)]
    assert [True, False] in silent
    assert [False, True] in silent


@pytest.mark.parametrize("case", parameters(RESUMED, RARELY_RESUMED))
def test_stopped_and_resumed_is_bit_equal(together, case):
    undisturbed, resumed = together(case), together(f"{case}-resumed")
    for name, value in weights(undisturbed).items():
        assert torch.equal(weights(resumed)[name], value), name
    a, b = (read_metrics(stage(folder) / "metrics.jsonl") for folder in (undisturbed, resumed))
    keep = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "held_out/loss", "held_out/margin")
    assert [[row.get(k) for k in keep] for row in a] == [[row.get(k) for k in keep] for row in b]
    assert tiny_training.read_trace(undisturbed, 2) == tiny_training.read_trace(resumed, 2)
    if case.startswith("dpo"):  # the reference was computed once, of the pairs to train on and those held out
        assert len(list((resumed / ".reference").iterdir())) == 2


@pytest.mark.parametrize("case", parameters(["sft-ddp"], ["dpo-ddp-lora"]))
def test_a_run_of_two_processes_resumes_in_one_with_the_same_rows(root, world, together, case):
    kind, undisturbed = kind_of(case), together(case)
    folder = root / f"{case}-two-to-one"
    shutil.copytree(together(f"{case}-resumed").with_name(f"{case}-stopped"), folder)
    before = step_of(checkpoints(stage(folder) / "checkpoints")[-1])
    assert before == STOPPED_IN
    (folder / "trace-1.jsonl").unlink()
    tiny_training.trace(folder / "trace-0.jsonl")
    tiny_training.run_here(tiny_training.make_config(kind), world, folder)
    rows = tiny_training.read_trace(undisturbed, 2)
    here = tiny_training.read_trace(folder, 1)
    for step in range(before + 1, tiny_training.STEPS + 1):
        assert sorted(here[step][0]) == sorted(rows[step][0]), step
    for name, value in weights(undisturbed).items():
        torch.testing.assert_close(weights(folder)[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_parts_of_an_optimizer_are_not_handed_to_another_number_of_processes(root, world, together):
    folder = root / "zero2-to-one"
    shutil.copytree(together("sft-zero2-frozen-resumed").with_name("sft-zero2-frozen-stopped"), folder)
    with pytest.raises(CannotResume, match=r"set .*strategy|set it back to zero2"):
        tiny_training.run_here(tiny_training.make_config("sft"), world, folder)


def test_a_zero3_run_ends_as_a_plain_checkpoint_with_equal_logits(world, together):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = stage(together("sft-zero3"))
    names = set(load_file(folder / "model" / "model.safetensors"))
    assert names == set(load_file(world / "policy" / "model" / "model.safetensors"))
    assert {"language_model.lm_head.weight", "language_model.model.norm.weight"} <= names
    assert all(n.startswith(("audio_tower.", "language_model.", "multi_modal_projector.")) for n in names)
    assert not any("model.model.model" in name for name in names)
    plain = Qwen2AudioForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
    # DeepSpeed's own way to put its parts together, by module names
    theirs = Qwen2AudioForConditionalGeneration(plain.config)
    learned = get_fp32_state_dict_from_zero_checkpoint(checkpoints(folder / "checkpoints")[-1])
    positions = "model.audio_tower.embed_positions.weight"  # never learned, so written once beside it
    missing = theirs.load_state_dict(learned, strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == ([positions], [])
    frozen = load_file(folder / "checkpoints" / "frozen" / "model.safetensors")
    theirs.get_parameter(positions).data.copy_(frozen["audio_tower.embed_positions.weight"])
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        assert torch.equal(plain.eval()(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("case", ["sft-ddp", "sft-zero2-frozen", "sft-zero3", "dpo-zero3-lora"])
def test_checkpoints_are_whole_down_to_each_ranks_part(together, tmp_path, case):
    last = checkpoints(stage(together(case)) / "checkpoints")[-1]
    assert is_whole(last)
    manifest = read_json(last / "manifest.json")
    assert manifest["workers"] == 2
    listed = set(manifest["files"])
    present = {str(path.relative_to(last)) for path in last.rglob("*") if path.is_file()}
    assert listed == present - {"manifest.json"}
    if "zero" in case:
        parts = [name for name in listed if name.startswith("global_step20/")]
        assert len([name for name in parts if "optim_states" in name]) == 2
        copy = tmp_path / last.name
        shutil.copytree(last, copy)
        with (copy / parts[-1]).open("r+b") as file:
            file.seek(100)
            file.write(b"\xff\xff\xff")
        assert not is_whole(copy)
    assert sorted({path.name for path in last.parent.iterdir()} - {"frozen"}) == [last.name]


def test_deepspeeds_parts_hold_no_frozen_weight(together):
    saved = stage(together("sft-zero2-frozen")) / "checkpoints"
    part = torch.load(saved / "checkpoint-20/global_step20/mp_rank_00_model_states.pt", weights_only=False)
    assert part["module"]
    assert not any("audio_tower" in name for name in part["module"])
    assert not part["frozen_param_fragments"]
    frozen = load_file(saved / "frozen" / "model.safetensors")
    policy = load_file(stage(together("sft-zero2-frozen")) / "model" / "model.safetensors")
    assert all(torch.equal(policy[name], value) for name, value in frozen.items())
    assert {name for name in policy if name.startswith("audio_tower.")} == frozen.keys()


@pytest.mark.parametrize("case", ["sft-zero2-lora", "dpo-zero3-lora"])
def test_low_rank_updates_are_saved_alone_and_merged(world, together, case):
    from peft import PeftModel

    folder = stage(together(case))
    base = Qwen2AudioForConditionalGeneration.from_pretrained(world / "policy" / "model", dtype=torch.float32)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        before = base.eval()(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()(input_ids=ids).logits
        plain = Qwen2AudioForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
        torch.testing.assert_close(plain.eval()(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, before, atol=1e-4)
    old, new = (
        load_file(world / "policy" / "model" / "model.safetensors"),
        load_file(folder / "model" / "model.safetensors"),
    )
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(name.startswith(("language_model.model.layers", "multi_modal_projector")) for name in changed)
    assert any(name.startswith("multi_modal_projector") for name in changed)
