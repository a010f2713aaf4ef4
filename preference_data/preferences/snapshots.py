"""Immutable snapshots of judgements: numbered, read-only folders, each named by the digest of its records."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from preference_data import store
from preference_data.schema import CHOICES, Judgement, comparison_id, stable_id
from preference_data.text_files import BadText, numbered_lines, parse_json


def versions(folder: Path) -> list[Path]:
    """The folders of all snapshots in `folder`, oldest first."""
    return sorted(path.parent for path in folder.glob("[0-9]*/judgements.jsonl"))  # reports lie beside them


def read(folders: Iterable[Path], texts: Mapping[str, str]) -> list[Judgement]:
    """The judgements of snapshots, each once: as the last of them has it.

    Args:
        folders: Of the snapshots, oldest first.
        texts: Of completions by id: judgements from before there were rankings do not hold them, and are
            left out where a completion is gone.

    Raises:
        BadRecord: naming file, line and field.
    """
    judgements: dict[str, Judgement] = {}
    for folder in folders:
        file = folder / "judgements.jsonl"
        try:
            for number, line in numbered_lines(file):
                if judgement := _parse(line, f"{file}:{number}", texts):
                    judgements[judgement.id] = judgement
        except BadText as error:
            raise store.BadRecord(str(error)) from error
    return list(judgements.values())


def _parse(line: bytes, place: str, texts: Mapping[str, str]) -> Judgement | None:
    """The judgement on a line of a snapshot; None where its completions are gone."""
    row = parse_json(line, place)
    if not isinstance(row, dict) or "completion_a" not in row:
        return store.parse(line, Judgement, place)
    choice = store.parse(line, _Choice, place)
    if not {choice.completion_a, choice.completion_b} <= texts.keys():
        return None
    return store.parse(json.dumps(_as_ranking(choice, texts)), Judgement, place)


class _Choice(BaseModel):
    """A judgement of two completions as it was kept until November 2026; what is not named is as today."""

    model_config = ConfigDict(frozen=True, extra="allow")

    prompt_id: str
    completion_a: str
    completion_b: str
    annotator: str
    factuality: Literal["a", "b", "tie", "both_bad"]
    behaviour: Literal["a", "b", "tie", "both_bad"]
    expected: Literal["a", "b", "tie", "both_bad"] | None = None
    errors_a: tuple[str, ...] = ()
    errors_b: tuple[str, ...] = ()
    retest_of: str | None = None


def _as_ranking(choice: _Choice, texts: Mapping[str, str]) -> dict[str, Any]:
    """The same judgement in today's form."""
    completions = choice.completion_a, choice.completion_b
    both = [texts[name] for name in completions]
    comparison = comparison_id(choice.prompt_id, both)
    errors = choice.errors_a, choice.errors_b
    rankings = {key: getattr(choice, key) for key in ("factuality", "behaviour", "expected")}
    return {
        **(choice.model_extra or {}),
        **{key: CHOICES[answer].model_dump() for key, answer in rankings.items() if answer},
        "id": stable_id(comparison, choice.annotator),
        "comparison": comparison,
        "prompt_id": choice.prompt_id,
        "completions": completions,
        "texts": both,
        "kind": "choice",
        "annotator": choice.annotator,
        "annotator_kind": "simulated" if choice.annotator.startswith("simulated-") else "person",
        "errors": errors if any(errors) else (),
        "about": choice.retest_of,
    }


def keep(folder: Path, judgements: Sequence[Judgement], *, url: str, datasets: Sequence[str]) -> Path:
    """Keep judgements as `<folder>/0001-<digest>/`, read-only; the same again makes no new version.

    Args:
        folder: Of all versions; made if it is not there.
        judgements: As `pull` gives them.
        url: Of the server they are from.
        datasets: Names of the datasets they are from.

    Returns:
        The folder of the version that holds exactly these.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(item.model_dump_json() + "\n" for item in sorted(judgements, key=lambda item: item.id))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    earlier = versions(folder)
    for version in earlier:
        if version.name.endswith(digest[:12]):
            return version
    number = 1 + max((int(path.name.split("-")[0]) for path in earlier), default=0)
    about = {
        "sha256": digest,
        "judgements": len(judgements),
        "annotators": dict(sorted(Counter(item.annotator for item in judgements).items())),
        "purposes": dict(sorted(Counter(item.purpose for item in judgements).items())),
        "server": url,
        "datasets": list(datasets),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return _write(
        folder,
        f"{number:04d}-{digest[:12]}",
        {
            "judgements.jsonl": lines,
            "snapshot.json": json.dumps(about, indent=1, ensure_ascii=False) + "\n",
        },
    )


def _write(folder: Path, name: str, files: Mapping[str, str]) -> Path:
    """Make a folder with read-only files in a single step."""
    partial = Path(tempfile.mkdtemp(dir=folder, prefix=".partial-"))
    try:
        for file, text in files.items():
            store.write_text(partial / file, text)
            (partial / file).chmod(0o444)
        partial.chmod(0o755)
        partial.rename(folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / name
