"""Datasets -> one mixed dataset: their records, each with its dataset's name before ids and paths. No audio.

The audio stays where it is, below the roots of the datasets, and is read there whenever clips are. Every
record is checked, and every clip looked for; some of each dataset are decoded. Memory grows by about 40
bytes a record.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

from preference_data import store
from preference_data.audio import decode
from preference_data.audio.clip_files import BadAudio, missing
from preference_data.audio.decode import Quarantined
from preference_data.dataset import splits
from preference_data.dataset.dataset import (
    DESCRIPTION,
    QUARANTINE,
    RECOGNITION,
    TABLES,
    Dataset,
    Row,
    describe,
    is_described,
    read_rows,
    with_paths,
)
from preference_data.dataset.fingerprints import Fingerprints, fingerprint
from preference_data.dataset.manifest import open_manifest
from preference_data.dataset.mixing import Permutation, mixing_shares
from preference_data.dataset.splits import HELD_OUT, SPLITS
from preference_data.schema import AudioClip, Chat, Prompt, Record, TaskExample

_KINDS: tuple[type[Record], ...] = (TaskExample, Chat, Prompt)
_TABLES = (TABLES[AudioClip], *(TABLES[kind] for kind in _KINDS))
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_PROGRESS_EVERY = 1000
_DECODED = 100
"""Clips of a dataset that are decoded here; of all the header was read when it was prepared."""

R = TypeVar("R", bound=Record)


class BadMixture(ValueError):
    """Data sets that cannot be mixed as they are; says which record of which and what to do."""


class MixturePart(NamedTuple):
    """A part of a mixture: its folder, and its share of the draws. None: by its size and the temperature."""

    folder: Path
    share: float | None = None


class _Part(NamedTuple):
    name: str
    dataset: Dataset
    root: Path
    share: float | None

    @property
    def licence(self) -> str | None:
        """Of clips that have none of their own."""
        licence = self.dataset.about.get("licence")
        return licence if isinstance(licence, str) else None

    def prefixed(self, path: str) -> str:
        """A path of this dataset as the mixture has it."""
        return f"{self.name}/{path}"


def mix(
    out: Path,
    data_sets: Sequence[MixturePart],
    *,
    temperature: float,
    seed: int,
    max_duration_s: float,
    max_bad_fraction: float,
    on_progress: Callable[[int], object] = lambda done: None,
) -> dict[str, float]:
    """Write the mixed dataset into `out`; returns counts of what was written, and shares of the draws.

    Args:
        out: the corpus' folder.
        data_sets: what to mix, in the order in which their rows will stand.
        temperature: see `mixing_shares`.
        seed: draws which clips are decoded.
        max_duration_s: longer clips are quarantined.
        max_bad_fraction: of a dataset's clips may be missing, too long or unreadable.
        on_progress: called with the number of records read so far, now and then.

    Raises:
        BadMixture: a folder is not a dataset, a record or clip comes twice, a record names an unknown or a
            held-out clip, a clip has changed since it was prepared, or too many are bad.
        Leak: the same audio is in two splits.
        BadRecord: a row is not as it should be.
    """
    parts = [_opened(item) for item in data_sets]
    if twice := [name for name, n in Counter(part.name for part in parts).items() if n > 1]:
        raise BadMixture(f"two datasets are called {twice[0]!r}; change the name in one's {DESCRIPTION}")
    mixing = _Mixing(out, parts, max_duration_s, max_bad_fraction, on_progress)
    mixing.decode_some(seed)
    mixing.write_clips()
    mixing.write_tables()
    mixing.write_recognition()
    mixing.write_quarantine()
    describe(out, {"temperature": temperature, "parts": [mixing.described(part) for part in parts]})
    return mixing.metrics(temperature)


def _opened(data: MixturePart) -> _Part:
    if not is_described(data.folder):
        raise BadMixture(f"{data.folder} is not a dataset: it has no {DESCRIPTION}; prepare it first")
    dataset = Dataset(data.folder)
    path, name, root = data.folder / DESCRIPTION, dataset.about.get("name"), dataset.about.get("root")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadMixture(f"{path}: name {name!r} must be letters, digits, '_' and '-': paths begin with it")
    if not isinstance(root, str) or not (data.folder / root).is_dir():
        raise BadMixture(f"{path}: root {root!r} is not a folder; it should hold the clips of {name}")
    if dataset.path_of(AudioClip) is None:
        raise BadMixture(f"{data.folder} has no clips.jsonl; prepare the dataset again")
    return _Part(name, dataset, (data.folder / root).resolve(), data.share)


class _Mixing:
    """Writes the mixture, and keeps what must be known of all clips while records go by."""

    def __init__(
        self,
        out: Path,
        parts: Sequence[_Part],
        max_duration_s: float,
        max_bad_fraction: float,
        on_progress: Callable[[int], object],
    ) -> None:
        self.out, self.parts = out, parts
        self._on_progress, self._read = on_progress, 0
        self.max_duration_s, self.max_bad_fraction = max_duration_s, max_bad_fraction
        self.rows: dict[str, Counter[str]] = {part.name: Counter() for part in parts}
        self.clips: Counter[str] = Counter()
        self.seconds, self.dropped, self.speakers_on_both_sides = 0.0, 0, 0
        self.bad: dict[str, Quarantined] = {}
        self._ids, self._paths = Fingerprints(), Fingerprints()
        self._mixed = Dataset(out, {"parts": [self.described(part) for part in parts]})

    def described(self, part: _Part) -> Row:
        """Where paths of a part lead, and how many rows are its own, as far as they are written."""
        rows = {table: self.rows[part.name][table] for table in _TABLES}
        return {"name": part.name, "root": str(part.root), "share": part.share, "rows": rows}

    def metrics(self, temperature: float) -> dict[str, float]:
        """Clips per split, rows per table, shares of the pre-training draws per dataset, and totals."""
        sizes = [self.rows[part.name]["pretrain"] for part in self.parts]
        given = [part.share for part in self.parts]
        shares = mixing_shares(sizes, given, temperature) if any(sizes) else [0.0] * len(sizes)
        return {
            **{f"clips_{split}": float(n) for split, n in sorted(self.clips.items())},
            **{f"rows_{table}": float(sum(n[table] for n in self.rows.values())) for table in _TABLES},
            **{f"share_{part.name}": share for part, share in zip(self.parts, shares, strict=True)},
            "hours": self.seconds / 3600,
            "quarantined": float(len(self.bad)),
            "dropped": float(self.dropped),  # records that name a quarantined clip
            # heard in training and held out, as their publishers have it: counted, not refused
            "speakers_on_both_sides": float(self.speakers_on_both_sides),
        }

    def decode_some(self, seed: int) -> None:
        """Decode some clips of each dataset, drawn by chance; all must be what was prepared.

        Those that are refused are noted in `bad`.
        """
        some: dict[str, AudioClip] = {}
        for part in self.parts:
            clips = part.dataset.records(AudioClip)
            order = Permutation(len(clips), seed, part.name)
            drawn = (clips[order[i]] for i in range(min(_DECODED, len(clips))))
            some |= {
                part.prefixed(clip.path): clip for clip in drawn if clip.duration_s <= self.max_duration_s
            }
        paths = [(path, path) for path in some]
        good, bad = decode.audit(self._mixed.find, paths, max_duration_s=self.max_duration_s)
        for path, info in good.items():
            if info.sha256 != some[path].sha256:
                raise BadMixture(
                    f"clip {path!r} is not what was prepared: its sha256 is {info.sha256[:12]}…, recorded "
                    f"{some[path].sha256[:12]}…; prepare the dataset again"
                )
        for part in self.parts:
            own = [item for item in bad if item.path.startswith(part.prefixed(""))]
            n = sum(path.startswith(part.prefixed("")) for path in some)
            self._refuse_many(len(own), n, part, *own[:3])
        self.bad = {
            item.path: item._replace(id=f"{item.path.split('/')[0]}/{some[item.path].id}") for item in bad
        }

    def write_clips(self) -> None:
        path = self.out / "clips.jsonl"
        store.write_rows(path, chain.from_iterable(map(self._clips, self.parts)))
        _refuse_repeated(path, "id", self._ids)
        _refuse_repeated(path, "path", self._paths)
        written = open_manifest(path, AudioClip)
        try:
            splits.check_audio(written)
        except splits.Leak as leak:
            raise splits.Leak(
                f"{leak}, e.g. by `align data prepare --keep-out` of the other dataset"
            ) from leak
        self.speakers_on_both_sides = splits.speakers_on_both_sides(written)

    def _clips(self, part: _Part) -> Iterator[Row]:
        clips, n_bad = part.dataset.records(AudioClip), 0
        for clip in self._counted(clips):
            row = _prefixed(clip.model_dump(mode="json"), part)
            if licence := clip.licence or part.licence:
                row["licence"] = licence
            problem = self.bad.get(row["path"]) or self._problem(clip.duration_s, row["id"], row["path"])
            if problem:
                self.bad[row["path"]] = problem
                n_bad += 1
                self._refuse_many(n_bad, len(clips), part, problem)
                continue
            self.rows[part.name]["clips"] += 1
            self.clips[clip.split] += 1
            self.seconds += clip.duration_s
            self._ids.add(row["id"])
            self._paths.add(row["path"], SPLITS.index(clip.split))
            yield row

    def _problem(self, duration_s: float, clip_id: str, path: str) -> Quarantined | None:
        """A problem of a clip, as far as its record and its place show."""
        if duration_s > self.max_duration_s:
            detail = f"{decode.beyond(duration_s, self.max_duration_s)}; cut it"
            return Quarantined(clip_id, path, "too_long", detail)
        try:
            place = self._mixed.find(path)
        except BadAudio as error:
            return Quarantined(clip_id, path, error.code, error.detail)
        if isinstance(place, Path) and not place.is_file():
            return Quarantined(clip_id, path, "missing", missing(place).detail)
        return None

    def _refuse_many(self, n_bad: int, n: int, part: _Part, *examples: Quarantined) -> None:
        if n_bad > self.max_bad_fraction * n:
            named = "; ".join(f"{item.path}: {item.code}: {item.detail}" for item in examples)
            raise BadMixture(
                f"{part.name}: {n_bad} or more of {n} clips are unusable (allowed max_bad_fraction="
                f"{self.max_bad_fraction:.1%}): {named}; mend the dataset, or raise max_bad_fraction"
                f"{decode.advice_on_length(examples)}"
            )

    def write_tables(self) -> None:
        split_of = self._paths.label_of()
        for kind in _KINDS:
            ids, path = Fingerprints(), self.out / f"{TABLES[kind]}.jsonl"
            rows = (self._rows(part, kind, split_of, ids) for part in self.parts)
            store.write_rows(path, chain.from_iterable(rows))
            _refuse_repeated(path, "id", ids)

    def _rows(
        self, part: _Part, kind: type[Record], split_of: Callable[[str], int | None], ids: Fingerprints
    ) -> Iterator[Row]:
        path = part.dataset.path_of(kind)
        for record in self._counted(part.dataset.records(kind)):
            row = _prefixed(record.model_dump(mode="json", exclude_defaults=True), part)
            for clip in row["audios"]:
                split = split_of(clip)
                if split is None and clip not in self.bad:
                    raise BadMixture(f"{path}: record {record.id!r} names {clip!r}, not in clips.jsonl")
                if split is not None and SPLITS[split] in HELD_OUT:
                    raise BadMixture(f"{path}: record {record.id!r} teaches {clip!r}, a {SPLITS[split]} clip")
            if any(clip in self.bad for clip in row["audios"]):
                self.dropped += 1
                continue
            ids.add(row["id"])
            self.rows[part.name][TABLES[kind]] += 1
            yield row

    def _counted(self, records: Iterable[R]) -> Iterator[R]:
        """The same records; progress is reported as they go by."""
        for record in records:
            if self._read % _PROGRESS_EVERY == 0:
                self._on_progress(self._read)
            self._read += 1
            yield record

    def write_recognition(self) -> None:
        """Held-out utterances; their groups get the dataset's name too."""
        for name in RECOGNITION.values():
            rows = (
                {**with_paths(row, part.prefixed), "source": part.prefixed(row["source"])}
                for part in self.parts
                for row in read_rows(part.dataset.folder / name, "audio", "source")
                if part.prefixed(row["audio"]) not in self.bad
            )
            store.write_rows(self.out / name, rows)

    def write_quarantine(self) -> None:
        """Rows that the datasets had left out already, and those left out here."""
        before = (
            with_paths(row, part.prefixed)
            for part in self.parts
            for row in read_rows(part.dataset.folder / QUARANTINE, "path")
        )
        now = (item._asdict() for item in self.bad.values())
        store.write_rows(self.out / QUARANTINE, chain(before, now))


def _prefixed(row: Row, part: _Part) -> Row:
    """A record's row with the dataset's name before its id, speaker and paths."""
    named = {key: part.prefixed(row[key]) for key in ("id", "speaker") if row.get(key) is not None}
    return {**with_paths(row, part.prefixed), **named}


def _refuse_repeated(path: Path, key: str, fingerprints: Fingerprints) -> None:
    """Name the first row whose value under `key` came before."""
    suspects, before = fingerprints.repeated(), set[str]()
    for row in read_rows(path, key) if suspects else ():
        if row[key] in before:
            raise BadMixture(f"{key} {row[key]!r} comes twice in {path.name}: {key}s are unique in a dataset")
        if fingerprint(row[key]) in suspects:
            before.add(row[key])
