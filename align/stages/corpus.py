"""Prepare a corpus: audio, records, and an evaluation set in AIR-Bench's layout.

Every file is decoded once here. Bad ones are quarantined with a reason; too many stop the run before
any training. Writes clips.jsonl, pretrain.jsonl, sft.jsonl, prompts.jsonl, quarantine.jsonl,
phrasebook.yaml, and {dev,test}/Chat/ with {dev,test}/recognition.jsonl. A mixture of prepared data sets has
no phrasebook and no Chat/, and sources.json in addition.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

from align.recipe.config.corpus import CorpusConfig
from align.run_folder.artifacts import StageFolder
from align.run_folder.progress import Progress
from preference_data import store
from preference_data.audio import decode
from preference_data.corpora import corpus_module, phrasebook_of
from preference_data.dataset import mixture, splits
from preference_data.schema import AudioClip, Chat
from preference_data.toy_world import examples
from preference_data.toy_world.phrasebook import Phrasebook


def run(config: CorpusConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Make, check and describe the clips; returns counts."""
    return _mix(config, out) if config.corpus == "mixture" else _make(config, out)


def _mix(config: CorpusConfig, out: StageFolder) -> dict[str, float]:
    with Progress(f"{out.name} records", 0) as progress:
        mixed = mixture.mix(
            out.path,
            [mixture.DataSet(Path(one.folder).expanduser(), one.share) for one in config.sources],
            temperature=config.temperature,
            seed=config.seed,
            max_duration_s=config.max_duration_s,
            max_bad_fraction=config.max_bad_fraction,
            on_progress=progress.update,
        )
    return {
        **{f"clips_{split}": float(n) for split, n in sorted(mixed.clips.items())},
        **{f"rows_{table}": float(n) for table, n in mixed.rows.items()},
        **{f"share_{name}": share for name, share in mixed.shares.items()},
        "hours": mixed.hours,
        "quarantined": float(mixed.quarantined),
        "dropped": float(mixed.dropped),
        "speakers_on_both_sides": float(mixed.speakers_on_both_sides),
    }


def _make(config: CorpusConfig, out: StageFolder) -> dict[str, float]:
    source = Path(config.dir).expanduser() if config.dir else None
    counts = config.clips.model_dump() if config.clips else None
    shutil.copyfile(phrasebook_of(config.corpus, source), out.path / "phrasebook.yaml")
    phrasebook = Phrasebook.load(out.path / "phrasebook.yaml")
    with Progress(out.name, sum(counts.values()) if counts else 0) as progress:
        clips = corpus_module(config.corpus).prepare(
            out.path,
            source=source,
            counts=counts,
            held_out=config.held_out,
            seed=config.seed,
            on_progress=progress.update,
        )
    clips, bad = _without_bad_audio(config, out.path, clips)
    splits.check(clips)
    store.write(out.path / "clips.jsonl", clips)
    chats = _write_records(config, out.path, clips, phrasebook)
    defects = Counter(turn.defect for chat in chats for turn in chat.turns)
    answers = sum(defects.values())
    per_split = Counter(clip.split for clip in clips)
    return {
        **{f"clips_{split}": float(n) for split, n in sorted(per_split.items())},
        "quarantined": float(bad),
        "speakers": float(len({clip.speaker for clip in clips if clip.speaker})),
        "defect_rate_declared": config.defect_rate,
        "defect_rate_actual": 1 - defects[None] / answers,
        **{f"defect_{name}": n / answers for name, n in sorted(defects.items(), key=str) if name},
    }


def _without_bad_audio(
    config: CorpusConfig, root: Path, clips: list[AudioClip]
) -> tuple[list[AudioClip], int]:
    already = root / "quarantine.jsonl"
    before = already.read_text(encoding="utf-8").splitlines() if already.exists() else []
    found, bad = decode.audit(
        root, [(clip.id, clip.path) for clip in clips], max_duration_s=config.max_duration_s
    )
    rows = before + [json.dumps(one._asdict(), ensure_ascii=False) for one in bad]
    store.write_text(already, "".join(row + "\n" for row in rows))
    share = len(rows) / max(1, len(clips) + len(before))
    if share > config.max_bad_fraction:
        examples_of_bad = "; ".join(rows[:3])
        raise ValueError(
            f"{len(rows)} of {len(clips) + len(before)} audio files are unusable ({share:.1%}, allowed "
            f"max_bad_fraction={config.max_bad_fraction:.1%}): {examples_of_bad}. Mend or remove them, or "
            f"raise max_bad_fraction; the full list is in {already}"
        )
    return [clip for clip in clips if clip.id in found], len(rows)


def _write_records(
    config: CorpusConfig, root: Path, clips: list[AudioClip], phrasebook: Phrasebook
) -> list[Chat]:
    of = {split: [c for c in clips if c.split == split] for split in ("train", "preference", "dev", "test")}
    chats = examples.chats(
        of["train"],
        phrasebook,
        chats_per_clip=config.chats_per_clip,
        turns=config.turns_per_chat,
        defect_rate=config.defect_rate,
        seed=config.seed,
    )
    store.write(root / "sft.jsonl", chats)
    store.write(root / "pretrain.jsonl", examples.transcripts(of["train"], phrasebook))
    store.write(root / "prompts.jsonl", examples.prompts(of["preference"], phrasebook, config.seed))
    for split in ("dev", "test"):
        examples.write_air_bench(root / split, of[split], phrasebook, config.corpus, config.seed)
        examples.write_recognition(root / split / "recognition.jsonl", of[split], phrasebook)
    return chats
