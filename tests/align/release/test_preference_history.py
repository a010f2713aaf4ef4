"""What the card of published preferences says about judges and rules; and TRL reads the rows."""

import numpy as np
import soundfile
from datasets import Audio, load_dataset
from trl.data_utils import is_conversational

from align.release.preference_history import history_of
from align.run_folder.artifacts import read_json, write_json
from preference_data import store
from preference_data.interchange import hub_folder
from preference_data.preferences import quality
from preference_data.schema import PreferencePair
from tests.preference_data.votes import judged


def judgement(n, annotator):
    factuality = "b" if n == 3 and annotator == "ann" else "a"
    texts = (f"a{n}", f"b{n}")
    return judged(texts, factuality, "a" if n % 2 else "b", annotator, prompt_id=f"p{n}", comparison=f"c{n}")


def run_folder(run):
    """A pairs stage of two annotators' judgements, and one of a judge's scores."""
    judgements = [judgement(n, name) for n in range(12) for name in ("ann", "bob")]
    measured = quality.assess(judgements, min_heard=0.8, seed=0)
    for stage, config in {
        "4_annotate": {"by": "people"},
        "5_pairs": {"annotations": "4_annotate", "min_agreement": 0.75, "min_alpha": None, "margin": 0.0},
        "5_scored": {"scores": "4_score", "min_agreement": 0.75, "opponents": "worst", "margin": 0.1},
    }.items():
        write_json(run / stage / "manifest.json", {"output_digest": "x", "config": config})
    store.write_text(run / "4_annotate/quality.json", measured.model_dump_json())
    left_out = [
        {"rule": rule, "left_out": n, "of": "judgements"} for rule, n in (("min_gold", 7), ("exclude", 0))
    ]
    write_json(run / "5_pairs/rules.json", {"counted": 1017, "rules": left_out})
    write_json(run / "4_score/reward.json", {"rewards": [{"kind": "judge", "judge": "judge-7b"}]})
    return measured.alpha["factuality"]


def test_a_run_says_who_judged_and_by_which_rules(tmp_path):
    alpha = run_folder(tmp_path)
    text = "\n".join(history_of(tmp_path / "5_pairs/pairs.jsonl"))
    assert "Rules: min_agreement 0.75." in text
    assert "1,017 judgements count; left out: min_gold 7." in text
    assert "2 annotators, 24 judgements; one counts where at least 80% of the clip was played." in text
    assert f"| factuality | {alpha.value:.2f} [{alpha.low:.2f}, {alpha.high:.2f}] | 12 |" in text
    outside = tmp_path / "other/5_pairs"  # judgements of another folder, such as `align chat` keeps: no stage
    write_json(
        outside / "manifest.json", {"output_digest": "x", "config": {"annotations": f"{tmp_path}/chat"}}
    )
    write_json(tmp_path / "chat/quality.json", read_json(tmp_path / "4_annotate/quality.json"))
    assert "2 annotators, 24 judgements" in "\n".join(history_of(outside / "pairs.jsonl"))
    scored = "\n".join(history_of(tmp_path / "5_scored/pairs.jsonl"))
    assert "Rules: opponents worst, margin 0.1." in scored
    assert "No person judged: a reward scored the completions (judge judge-7b)." in scored
    assert history_of(tmp_path / "elsewhere.jsonl") == []


def test_a_model_that_judged_is_named_with_its_agreement(tmp_path):
    run_folder(tmp_path)
    share = {"value": 0.9, "low": 0.8, "high": 0.95, "n": 60}
    model = {"judge": "ear", "hears": True, "judged": 1200, "agreement": {"overall": {"share": share}}}
    write_json(tmp_path / "4_annotate/model.json", model)
    text = "\n".join(history_of(tmp_path / "5_pairs/pairs.jsonl"))
    assert (
        "The model ear (hears the clips) judged 1,200 comparisons; it agrees with 90% [80%, 95%], n 60"
        in text
    )
    alone = quality.assess([], min_heard=0.8, seed=0)
    store.write_text(tmp_path / "4_annotate/quality.json", alone.model_dump_json())
    model |= {"hears": False, "agreement": {"overall": {"share": None}}}
    write_json(tmp_path / "4_annotate/model.json", model)
    text = "\n".join(history_of(tmp_path / "5_pairs/pairs.jsonl"))
    assert "(cannot hear and reads references)" in text
    assert "nobody else judged these" in text
    assert "0 annotators" not in text


def test_trl_reads_the_rows(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(800, np.float32), 16_000)
    said = {"question": "What?", "chosen": "A.", "rejected": "B.", "axis": "factuality", "agreement": 1.0}
    pair = PreferencePair(id="p", prompt_id="q", audios=("a.wav",), **said)
    store.write(tmp_path / "pairs.jsonl", [pair])
    hub_folder.write(tmp_path / "pairs.jsonl", tmp_path, tmp_path / "out", history=["Judged by Ann."])
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    (row,) = rows.cast_column("audios", [Audio(decode=False)])
    assert is_conversational(row)
    assert set(row) >= {"prompt", "chosen", "rejected"}
    assert "Judged by Ann." in (tmp_path / "out/README.md").read_text()
