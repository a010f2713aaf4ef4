"""`align export`: adapters merged, names as on the Hub, checked by a fresh Python with plain transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import typer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from align.cli import export
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio import portable
from align.models.qwen2_audio.model import hub_name
from align.models.shards import weights_sha256
from align.release.policy_files import NoPolicy, find, saved_model
from align.release.registry import Holder, Registry

app = typer.Typer()
app.command()(export.export)
RANK, ALPHA = 2, 6
NOBODY = Holder(None, None, None)
TARGET = r"model\.language_model\.layers\.\d+\.self_attn\.(q|v)_proj|model\.multi_modal_projector\.linear"


@pytest.fixture
def runs(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    import gated_run

    return gated_run


def mangle(folder):
    """Give the language model's tensors the names that saving a ZeRO-3 run gives them."""
    weights = load_file(folder / "model.safetensors")
    prefix = "language_model.model."
    renamed = {name.replace(prefix, prefix + "model.", 1): tensor for name, tensor in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})


def save_adapter(base, folder, seed):
    """A LoRA adapter with weights that are not zero."""
    model = get_peft_model(
        qwen2_audio.load_model(base), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGET)
    )
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(folder)


def policy_stage(runs, run, name, kind, needs, fill, **config):
    runs.stage(run, name, kind, needs, fill, **config)
    return run / name


def lora_run(runs, tiny, run):
    """2_sft holds a whole model with mangled names, 3_dpo and 4_dpo only adapters."""

    def sft(folder):
        shutil.copytree(tiny.policy, folder / "model")
        mangle(folder / "model")

    policy_stage(runs, run, "2_sft", "sft", [], sft)
    for seed, (name, base) in enumerate([("3_dpo", "2_sft"), ("4_dpo", "3_dpo")]):
        policy_stage(
            runs,
            run,
            name,
            "dpo",
            [base],
            lambda folder, seed=seed: save_adapter(tiny.policy, folder / "adapter", seed),
            policy=base,
        )
    return run


def by_hand(weights, adapter):
    """W + alpha / r B A, adapter by adapter."""
    merged = dict(weights)
    lora = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in lora if name.endswith("lora_A.weight")]:
        target = hub_name(name.removeprefix("base_model.model.").replace(".lora_A", ""))
        b = lora[name.replace("lora_A", "lora_B")]
        merged[target] = merged[target] + ALPHA / RANK * b @ lora[name]
    return merged


def test_adapters_are_merged_and_names_are_those_of_the_hub(runs, tiny, tmp_path):
    run = lora_run(runs, tiny, tmp_path / "runs" / "toy")
    done = CliRunner().invoke(app, [str(run), "--to", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "toy/4_dpo" in done.output
    assert "2 adapters merged" in done.output

    original = load_file(tiny.policy / "model.safetensors")
    expected = by_hand(by_hand(original, run / "3_dpo/adapter"), run / "4_dpo/adapter")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert set(exported) == set(original)
    changed = {name for name in original if not torch.equal(original[name], exported[name])}
    assert changed == {
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.model.layers.0.self_attn.v_proj.weight",
        "multi_modal_projector.linear.weight",
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(exported[name], tensor, rtol=1e-5, atol=1e-6, msg=name)

    (tmp_path / "scratch").mkdir()
    served = saved_model(find(str(run), "unused", tmp_path), tmp_path / "scratch")
    for name, tensor in load_file(served / "model.safetensors").items():
        assert torch.equal(tensor, exported[name]), name

    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"preprocessor_config.json", "chat_template.jinja", "generation_config.json"} <= files
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2AudioForConditionalGeneration"]
    assert config["text_config"]["rope_theta"] == 10_000
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It has not been evaluated." in card
    assert "clips of up to 1 s" in card
    assert not list(tmp_path.glob(".partial-*"))


def test_a_registered_champion_is_exported_and_changed_files_are_refused(
    runs, tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    registry = Registry(f"sqlite:///{tmp_path}/runs/mlflow.db", "toy")
    tags = {
        "weights.sha256": weights_sha256(tiny.policy),
        "gate.verdict": "pass",
        "judge.name": "facts",
        "dataset.0_corpus": "abc",
    }
    version = registry.register(tiny.policy, tags, None)
    registry.move("champion", version, expected=registry.holder("champion"), why="test")
    done = CliRunner().invoke(app, ["models:/toy@champion", "--to", "out"])
    assert done.exit_code == 0, done.output
    exported = load_file("out/model.safetensors")
    for name, tensor in load_file(tiny.policy / "model.safetensors").items():
        assert torch.equal(exported[name], tensor), name
    card = Path("out/README.md").read_text()
    assert "Gate: pass. Judge: facts." in card
    assert "| 0_corpus | abc |" in card

    uri = registry.uri
    only = find("champion", uri, tmp_path)
    assert only.name == "models:/toy@champion"
    assert weights_sha256(only.model) == tags["weights.sha256"]
    assert saved_model(only, tmp_path) == only.model
    other = Registry(uri, "other")
    with pytest.raises(NoPolicy, match="0 models"):
        find("champion", f"sqlite:///{tmp_path}/runs/empty.db", tmp_path)
    other.move("champion", other.register(tiny.policy, tags, None), expected=NOBODY, why="test")
    with pytest.raises(NoPolicy, match="2 models .* models:/other@champion, models:/toy@champion"):
        find("champion", uri, tmp_path)

    nobody = CliRunner().invoke(app, ["models:/toy@nobody", "--to", "other"])
    assert (nobody.exit_code, Path("other").exists()) == (1, False)
    stored = next(tmp_path.glob("runs/mlartifacts/**/model.safetensors"))
    save_file({"a": torch.zeros(1)}, stored, {"format": "pt"})
    changed = CliRunner().invoke(app, ["models:/toy@champion", "--to", "other"])
    assert (changed.exit_code, Path("other").exists()) == (1, False)


def test_a_folder_that_says_something_else_is_found_out(tiny, tmp_path):
    model, processor = portable.merged(tiny.policy, []), qwen2_audio.load_processor(tiny.policy)
    (tmp_path / "out").mkdir()
    portable.write(model, processor, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["audio_tower.conv1.weight"] *= 1.5
    lost = weights.pop("multi_modal_projector.linear.bias")
    assert lost.shape == (32,)
    save_file(weights, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    (tmp_path / "scratch").mkdir()
    with pytest.raises(portable.DoesNotLoad, match="multi_modal_projector.linear.bias") as caught:
        portable.verify(model, processor, tmp_path / "out", tmp_path / "scratch")
    differs = float(str(caught.value).partition("differ by ")[2].split()[0])
    assert differs > 0.01


def test_an_export_that_fails_its_check_leaves_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(portable, "_ALONE", tmp_path / "no_such_script.py")
    done = CliRunner().invoke(app, [str(tiny.policy), "--to", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------- which policy is meant


def test_of_a_run_the_promoted_policy_then_the_candidate_then_the_last(runs, tmp_path):
    run = runs.make(tmp_path / "toy")

    def meant(named=run):
        return find(str(named), "unused", tmp_path).model

    assert meant(run / "2_sft") == run / "2_sft" / "model"
    assert meant(run / "2_sft" / "model") == run / "2_sft" / "model"
    runs.stage(run, "6_later", "sft", ["2_sft"], runs.weights(3.0))
    assert meant() == run / "6_later" / "model"
    runs.gate(run)
    assert meant() == run / "6_dpo" / "model"
    runs.stage(run, "9_promote", "promote", ["2_sft"], runs.text("promotion.json", "{}"), policy="2_sft")
    assert meant() == run / "2_sft" / "model"


def test_the_card_tells_verdict_intervals_data_and_neutralises_text(runs, tmp_path):
    from align.release import model_card

    judge = {"name": "llm", "model": "judge|<script>alert(1)</script>\nx", "shares_ground_truth": False}
    run = runs.make(tmp_path / "toy", scores=runs.scores(judge=judge))
    runs.gate(run)
    card = model_card.write(find(str(run), "unused", tmp_path), 30.0, 8_397_094_912, "Checked.")
    assert "8,397,094,912 parameters" in card
    assert "| 6_dpo | dpo |" in card
    assert "| 0_corpus |" in card
    assert "| factuality |  |  | +0.100 to +0.400 |" in card
    assert "Gate: **fail**" in card or "Gate: **inconclusive**" in card or "Gate: **pass**" in card
    assert "clips longer than 30 s" in card
    assert "<script" not in card
    assert "judge\\|&lt;script>" in card


def test_the_card_tells_the_licences_of_the_data_sets(runs, tmp_path):
    from align.release import model_card

    (tmp_path / "libri").mkdir()
    (tmp_path / "libri" / "dataset.json").write_text('{"name": "librispeech", "licence": "CC BY 4.0"}')
    folders = [{"folder": str(tmp_path / "libri"), "share": None}, {"folder": "gone", "share": None}]
    run = tmp_path / "toy"
    runs.stage(run, "0_corpus", "corpus", [], runs.text("clips.jsonl", ""), sources=folders)
    runs.stage(run, "1_pretrain", "pretrain", ["0_corpus"], runs.weights(1.0))
    card = model_card.write(find(str(run), "unused", tmp_path), 30.0, 1, "Checked.")
    assert "| librispeech | CC BY 4.0 |" in card
    assert "| gone | unknown |" in card


def test_what_is_no_policy_is_refused_with_the_next_step(runs, tiny, tmp_path):
    out = ["--to", str(tmp_path / "out")]
    nowhere = CliRunner().invoke(app, ["nowhere", *out])
    assert (nowhere.exit_code, "no such folder" in nowhere.output) == (2, True)
    (tmp_path / "empty").mkdir()
    empty = CliRunner().invoke(app, [str(tmp_path / "empty"), *out])
    assert (empty.exit_code, "align run RECIPE" in empty.output) == (2, True)
    (tmp_path / "out").mkdir()
    there = CliRunner().invoke(app, [str(tiny.policy), *out])
    assert (there.exit_code, "is there already" in there.output) == (2, True)
    runs.stage(tmp_path / "run", "5_pairs", "pairs", [], runs.text("pairs.jsonl", "{}"))
    with pytest.raises(NoPolicy, match="neither model/ nor adapter/"):
        find(str(tmp_path / "run" / "5_pairs"), "unused", tmp_path)


def test_a_pickled_adapter_is_not_read(tiny, tmp_path):
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors"):
        portable.merged(tiny.policy, [tmp_path])
