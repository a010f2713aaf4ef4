"""Prepare a corpus: audio, records, and an evaluation set in AIR-Bench's layout.

Every recording is decoded once here. Bad ones are quarantined with a reason; too many stop the run before any
training. Writes a dataset (`preference_data.dataset.dataset` describes its files), phrasebook.yaml and
{dev,test}/Chat/. A manifest of one's own audio has no phrasebook, a mixture of datasets has no Chat/ either.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from align.recipe.config.corpus import CorpusConfig
from align.run_folder.artifacts import StageFolder
from align.run_folder.progress import Progress
from preference_data import store
from preference_data.audio.decode import Quarantined, advice_on_length
from preference_data.corpora import folder, manifest
from preference_data.corpora.catalog import phrasebook_of
from preference_data.dataset import mixture, splits
from preference_data.dataset.dataset import QUARANTINE, RECOGNITION, WARNINGS, RecordWriter, describe
from preference_data.schema import AudioClip, Chat
from preference_data.toy_world import examples, spoken_digits, synthetic
from preference_data.toy_world.clip_files import PreparedClips
from preference_data.toy_world.phrasebook import Phrasebook


def run(config: CorpusConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Make, check and describe the clips; returns counts."""
    match config.corpus:
        case "mixture":
            return _mix(config, out)
        case "manifest":
            return _read_manifest(config, out)
        case _:
            return _prepare(config, out)


def _read_manifest(config: CorpusConfig, out: StageFolder) -> dict[str, float]:
    path = Path(config.manifest or "").expanduser()
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", path.resolve().name.split(".")[0]).strip("-_")[:40]
    rules = manifest.Rules(
        name=name or "manifest",
        questions=manifest.read_questions(Path(config.questions).expanduser()) if config.questions else (),
        **{key: getattr(config, key) for key in manifest.Rules._fields if key not in ("name", "questions")},
    )
    root = Path(config.audio_root).expanduser() if config.audio_root else None
    with Progress(f"{out.name} clips", 0, out.path) as progress:
        return manifest.prepare(
            out.path, path, rules, audio_root=root, by=config.check, on_progress=progress.update
        )


def _mix(config: CorpusConfig, out: StageFolder) -> dict[str, float]:
    with Progress(f"{out.name} records", 0, out.path) as progress:
        return mixture.mix(
            out.path,
            [mixture.MixturePart(Path(item.folder).expanduser(), item.share) for item in config.sources],
            temperature=config.temperature,
            seed=config.seed,
            max_duration_s=config.max_duration_s,
            max_bad_fraction=config.max_bad_fraction,
            on_progress=progress.update,
        )


def _prepare(config: CorpusConfig, out: StageFolder) -> dict[str, float]:
    recordings = Path(config.dir or "").expanduser()
    shutil.copyfile(phrasebook_of(config.corpus, recordings), out.path / "phrasebook.yaml")
    phrasebook = Phrasebook.load(out.path / "phrasebook.yaml")
    n_clips = sum(config.clips.model_dump().values()) if config.clips else 0
    with Progress(out.name, n_clips, out.path) as progress:
        clips, bad, odd = _prepared(config, out.path, phrasebook, recordings, progress.update)
    if odd:
        store.write_rows(out.path / WARNINGS, [item._asdict() for item in odd])
    _refuse_many(len(clips) + len(bad), bad, config.max_bad_fraction, out.path)
    splits.check(clips)
    chats = _write(config, out.path, clips, bad, phrasebook)
    defects = Counter(turn.defect for chat in chats for turn in chat.turns)
    answers = sum(defects.values())
    per_split = Counter(clip.split for clip in clips)
    return {
        **{f"clips_{split}": float(n) for split, n in sorted(per_split.items())},
        "quarantined": float(len(bad)),
        **{code: float(n) for code, n in sorted(Counter(item.code for item in odd).items())},
        "speakers": float(len({clip.speaker for clip in clips if clip.speaker})),
        "defect_rate_declared": config.defect_rate,
        "defect_rate_actual": 1 - defects[None] / answers,
        **{f"defect_{name}": n / answers for name, n in sorted(defects.items(), key=str) if name},
    }


def _prepared(
    config: CorpusConfig,
    out: Path,
    phrasebook: Phrasebook,
    recordings: Path,
    on_progress: Callable[[int], None],
) -> PreparedClips:
    """Make the clips, their audio below `out`. The config refuses keys that a corpus has no use for."""
    counts = config.clips.model_dump() if config.clips else {}
    if config.corpus == "synthetic":
        return synthetic.prepare(out, phrasebook, counts=counts, seed=config.seed, on_progress=on_progress)
    prepare = (
        partial(spoken_digits.prepare, counts=counts, pad_to_s=config.pad_to_s)
        if config.corpus == "spoken_digits"
        else partial(folder.prepare, max_duration_s=config.max_duration_s)
    )
    held_out: splits.HeldOut = {
        split: names for split, names in config.held_out.items() if not isinstance(names, float)
    }
    return prepare(out, phrasebook, recordings, held_out=held_out, seed=config.seed, on_progress=on_progress)


def _refuse_many(n: int, bad: list[Quarantined], max_bad_fraction: float, root: Path) -> None:
    if len(bad) / max(1, n) > max_bad_fraction:
        store.write_rows(root / QUARANTINE, [item._asdict() for item in bad])
        examples_of_bad = "; ".join(f"{item.path}: {item.code}: {item.detail}" for item in bad[:3])
        raise ValueError(
            f"{len(bad)} of {n} audio files are unusable ({len(bad) / n:.1%}, allowed max_bad_fraction="
            f"{max_bad_fraction:.1%}): {examples_of_bad}. Mend or remove them, or raise "
            f"max_bad_fraction; the full list is in {root / QUARANTINE}{advice_on_length(bad)}"
        )


def _write(
    config: CorpusConfig,
    root: Path,
    clips: list[AudioClip],
    bad: list[Quarantined],
    phrasebook: Phrasebook,
) -> list[Chat]:
    """Write the dataset and the evaluation sets; returns the chats."""
    of = {split: [c for c in clips if c.split == split] for split in splits.SPLITS}
    chats = examples.chats(
        of["train"],
        phrasebook,
        chats_per_clip=config.chats_per_clip,
        turns=config.turns_per_chat,
        defect_rate=config.defect_rate,
        seed=config.seed,
    )
    with RecordWriter(root) as writer:
        for record in (
            *clips,
            *chats,
            *examples.transcripts(of["train"], phrasebook),
            *examples.prompts(of["preference"], phrasebook, config.seed),
        ):
            writer.add(record)
        for split, name in RECOGNITION.items():
            for row in examples.recognition_rows(of[split], phrasebook):
                writer.add_row(name, row)
        for item in bad:
            writer.add_row(QUARANTINE, item._asdict())
    for split in splits.HELD_OUT:
        examples.write_air_bench(root / split, of[split], phrasebook, config.corpus, config.seed)
    describe(root, {"name": config.corpus, "root": "."})
    return chats
