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
from typing import Any

from preference_data import store
from preference_data.schema import CHOICES, Judgement, comparison_id, stable_id
from preference_data.text_files import numbered_lines


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
        for number, line in numbered_lines(file):
            place = f"{file}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise store.BadRecord(f"{place}: is not JSON: {error}") from None
            if "completion_a" in row:
                if not {row["completion_a"], row["completion_b"]} <= texts.keys():
                    continue
                line = json.dumps(_as_ranking(row, texts)).encode()
            judgement = store.parse(line, Judgement, place)
            judgements[judgement.id] = judgement
    return list(judgements.values())


def _as_ranking(row: dict[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """A judgement of two completions as it was kept until November 2026, in today's form."""
    completions = row.pop("completion_a"), row.pop("completion_b")
    both = [texts[name] for name in completions]
    comparison = comparison_id(row["prompt_id"], both)
    errors = [row.pop("errors_a", ()), row.pop("errors_b", ())]
    rankings = ("factuality", "behaviour", "expected")
    about = row.pop("retest_of", None)
    return {
        **row,
        **{key: CHOICES[row[key]].model_dump() for key in rankings if row.get(key)},
        "id": stable_id(comparison, row["annotator"]),
        "comparison": comparison,
        "completions": completions,
        "texts": both,
        "kind": "choice",
        "annotator_kind": "simulated" if row["annotator"].startswith("simulated-") else "person",
        "errors": errors if any(errors) else (),
        "about": about,
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
