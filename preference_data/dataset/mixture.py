"""Prepared data sets -> one corpus: their records, with the data set's name before ids and paths. No audio.

A data set is a folder with `source.json` ({"name": ..., "root": folder of its audio}), `clips.jsonl` and any
of `pretrain.jsonl`, `sft.jsonl`, `prompts.jsonl` (each of the four may be .parquet instead),
`quarantine.jsonl` and `{dev,test}/recognition.jsonl`. Paths of clips are relative to the root, which holds
files or tar shards and must stay where it is: it is read whenever clips are.

Every record is checked, and every clip looked for; some of each data set are decoded. Memory grows by about
40 bytes a record.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from preference_data import store
from preference_data.audio import decode
from preference_data.audio.clip_paths import SOURCE, SOURCES, BadAudio, ClipRoot
from preference_data.audio.decode import Quarantined
from preference_data.dataset import splits
from preference_data.dataset.fingerprints import Fingerprints, Labels, fingerprint
from preference_data.dataset.manifest import Manifest, open_manifest
from preference_data.dataset.mixing import Permutation, mixing_shares
from preference_data.dataset.sources import TABLES, Table, table_path
from preference_data.dataset.splits import SPLITS
from preference_data.schema import AudioClip, Chat, Prompt, Record, TaskExample

Row = dict[str, Any]
_KINDS: dict[Table, type[Record]] = {"pretrain": TaskExample, "sft": Chat, "prompts": Prompt}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_HELD_OUT = ("dev", "test")
_TOLD_EVERY = 1000
_DECODED = 100
"""Clips of a data set that are decoded here; of all the header was read when it was prepared."""


R = TypeVar("R", bound=Record)


class BadMixture(ValueError):
    """Data sets that cannot be mixed as they are; says which record of which and what to do."""


class DataSet(NamedTuple):
    """A part of a mixture: its folder, and its share of the draws. None: by its size and the temperature."""

    folder: Path
    share: float | None = None


class Mixed(NamedTuple):
    """What was written."""

    clips: dict[str, int]
    """Per split."""
    rows: dict[str, int]
    """Per table."""
    dropped: int
    """Records that speak of a quarantined clip."""
    quarantined: int
    hours: float
    speakers_on_both_sides: int
    """Heard in training and in dev or test: as their publishers have it, so it is told, not refused."""
    shares: dict[str, float]
    """Of the pre-training draws, per data set."""


class _Source(NamedTuple):
    name: str
    folder: Path
    root: Path
    share: float | None

    def inside(self, path: str) -> str:
        """A path of this data set as the mixture has it."""
        return f"{self.name}/{path}"


def mix(
    out: Path,
    data_sets: Sequence[DataSet],
    *,
    temperature: float,
    seed: int,
    max_duration_s: float,
    max_bad_fraction: float,
    on_progress: Callable[[int], object] | None = None,
) -> Mixed:
    """Write the mixed tables, `sources.json` and `quarantine.jsonl` into `out`.

    Args:
        out: the corpus' folder.
        data_sets: what to mix, in the order in which their rows will stand.
        temperature: see `mixing_shares`.
        seed: draws which clips are decoded.
        max_duration_s: longer clips are quarantined.
        max_bad_fraction: of a data set's clips may be missing, too long or unreadable.
        on_progress: called with the number of records read so far, now and then.

    Raises:
        BadMixture: a folder is no data set, a record or clip comes twice, a record speaks of an unknown or a
            held-out clip, a clip has changed since it was prepared, or too many are bad.
        Leak: the same audio is in two splits.
        BadRecord: a row is not as it should be.
    """
    sources = [_described(one) for one in data_sets]
    if twice := [name for name, n in Counter(source.name for source in sources).items() if n > 1]:
        raise BadMixture(f"two data sets are called {twice[0]!r}; change the name in one's {SOURCE}")
    mixing = _Mixing(out, sources, max_duration_s, max_bad_fraction, on_progress or (lambda done: None))
    mixing.write_sources(temperature)
    mixing.decode_some(seed)
    mixing.write_clips()
    mixing.write_tables()
    mixing.write_recognition()
    mixing.write_quarantine()
    mixing.write_sources(temperature)
    sizes = [mixing.rows[one.name]["pretrain"] for one in sources]
    given = [one.share for one in sources]
    shares = mixing_shares(sizes, given, temperature) if any(sizes) else [0.0] * len(sizes)
    return Mixed(
        dict(mixing.clips),
        {table: sum(counts[table] for counts in mixing.rows.values()) for table in ("clips", *_KINDS)},
        mixing.dropped,
        len(mixing.bad),
        mixing.seconds / 3600,
        mixing.speakers_on_both_sides,
        {one.name: share for one, share in zip(sources, shares, strict=True)},
    )


def _described(data: DataSet) -> _Source:
    path = data.folder / SOURCE
    if not path.is_file():
        raise BadMixture(f"{data.folder} is no prepared data set: it has no {SOURCE}; prepare it first")
    about: Any = json.loads(path.read_text(encoding="utf-8"))
    name, root = (about.get(key) if isinstance(about, dict) else None for key in ("name", "root"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadMixture(f"{path}: name {name!r} must be letters, digits, '_' and '-': paths begin with it")
    if not isinstance(root, str) or not (data.folder / root).is_dir():
        raise BadMixture(f"{path}: root {root!r} is no folder; it should hold the clips of {name}")
    return _Source(name, data.folder, (data.folder / root).resolve(), data.share)


class _Mixing:
    """What is known of all clips while records go by."""

    def __init__(
        self,
        out: Path,
        sources: Sequence[_Source],
        max_duration_s: float,
        max_bad_fraction: float,
        on_progress: Callable[[int], object],
    ) -> None:
        self.out, self.sources = out, sources
        self._on_progress, self._read = on_progress, 0
        self.max_duration_s, self.max_bad_fraction = max_duration_s, max_bad_fraction
        self.rows: dict[str, Counter[str]] = {source.name: Counter() for source in sources}
        self.clips: Counter[str] = Counter()
        self.seconds, self.dropped, self.speakers_on_both_sides = 0.0, 0, 0
        self.bad: dict[str, Quarantined] = {}
        self._ids, self._paths = Fingerprints(), Fingerprints()

    def write_sources(self, temperature: float) -> None:
        """Where paths lead from now on, and how many rows are whose, as far as they are written."""
        listed = [
            {"name": one.name, "root": str(one.root), "share": one.share, "rows": self._counted(one)}
            for one in self.sources
        ]
        about = {"temperature": temperature, "sources": listed}
        store.write_text(self.out / SOURCES, json.dumps(about, indent=1) + "\n")

    def _counted(self, source: _Source) -> dict[str, int]:
        return {name: self.rows[source.name][name] for name in TABLES}

    def decode_some(self, seed: int) -> None:
        """Decode some clips of each data set, drawn by chance; all must be what was prepared.

        Those that are refused are noted in `bad`.
        """
        some: dict[str, AudioClip] = {}
        for source in self.sources:
            clips = _clips_of(source)
            order = Permutation(len(clips), seed, source.name)
            drawn = (clips[order[i]] for i in range(min(_DECODED, len(clips))))
            some |= {source.inside(one.path): one for one in drawn if one.duration_s <= self.max_duration_s}
        asked = [(path, path) for path in some]
        good, bad = decode.audit(self.out, asked, max_duration_s=self.max_duration_s)
        for path, found in good.items():
            if found.sha256 != some[path].sha256:
                raise BadMixture(
                    f"clip {path!r} is not what was prepared: its sha256 is {found.sha256[:12]}…, recorded "
                    f"{some[path].sha256[:12]}…; prepare the data set again"
                )
        for source in self.sources:
            own = [one for one in bad if one.path.startswith(source.inside(""))]
            n = sum(path.startswith(source.inside("")) for path in some)
            self._refuse_many(len(own), n, source, *own[:3])
        self.bad = {one.path: one._replace(id=f"{one.path.split('/')[0]}/{some[one.path].id}") for one in bad}

    def write_clips(self) -> None:
        path = self.out / "clips.jsonl"
        store.write_rows(path, chain.from_iterable(map(self._clips, self.sources)))
        _refuse_repeated(path, "id", self._ids)
        _refuse_repeated(path, "path", self._paths)
        written = open_manifest(path, AudioClip)
        try:
            splits.check_audio(written)
        except splits.Leak as leak:
            raise splits.Leak(
                f"{leak}, e.g. by `align data prepare --keep-out` of the other data set"
            ) from leak
        self.speakers_on_both_sides = splits.speakers_on_both_sides(written)

    def _clips(self, source: _Source) -> Iterator[Row]:
        clips, root, n_bad = _clips_of(source), ClipRoot(self.out), 0
        for clip in self._told(clips):
            row = _renamed(clip.model_dump(mode="json"), source)
            problem = self.bad.get(row["path"]) or self._problem(
                root, clip.duration_s, row["id"], row["path"]
            )
            if problem:
                self.bad[row["path"]] = problem
                n_bad += 1
                self._refuse_many(n_bad, len(clips), source, problem)
                continue
            self.rows[source.name]["clips"] += 1
            self.clips[clip.split] += 1
            self.seconds += clip.duration_s
            self._ids.add(row["id"])
            self._paths.add(row["path"], SPLITS.index(clip.split))
            yield row

    def _problem(self, root: ClipRoot, duration_s: float, clip_id: str, path: str) -> Quarantined | None:
        """What is wrong with a clip, as far as its record and its place tell."""
        if duration_s > self.max_duration_s:
            detail = f"{duration_s:.1f} s, the limit is {self.max_duration_s:g} s; cut it"
            return Quarantined(clip_id, path, "too_long", detail)
        try:
            place = root.find(path)
        except BadAudio as error:
            return Quarantined(clip_id, path, error.code, error.detail)
        if isinstance(place, Path) and not place.is_file():
            return Quarantined(clip_id, path, "missing", "does not exist; prepare the data set again")
        return None

    def _refuse_many(self, n_bad: int, n: int, source: _Source, *examples: Quarantined) -> None:
        if n_bad > self.max_bad_fraction * n:
            shown = "; ".join(f"{one.path}: {one.code}: {one.detail}" for one in examples)
            raise BadMixture(
                f"{source.name}: {n_bad} or more of {n} clips are unusable (allowed max_bad_fraction="
                f"{self.max_bad_fraction:.1%}): {shown}; mend the data set, or raise max_bad_fraction"
            )

    def write_tables(self) -> None:
        splits_of = self._paths.labels()
        for table, kind in _KINDS.items():
            ids, path = Fingerprints(), self.out / f"{table}.jsonl"
            rows = (self._rows(source, table, kind, splits_of, ids) for source in self.sources)
            store.write_rows(path, chain.from_iterable(rows))
            _refuse_repeated(path, "id", ids)

    def _rows(
        self, source: _Source, table: Table, kind: type[Record], splits_of: Labels, ids: Fingerprints
    ) -> Iterator[Row]:
        path = table_path(source.folder, table)
        for record in self._told(open_manifest(path, kind)) if path else ():
            row = _renamed(record.model_dump(mode="json", exclude_defaults=True), source)
            for clip in row["audios"]:
                split = splits_of.get(clip)
                if split is None and clip not in self.bad:
                    raise BadMixture(f"{path}: record {record.id!r} speaks of {clip!r}, not in clips.jsonl")
                if split is not None and SPLITS[split] in _HELD_OUT:
                    raise BadMixture(f"{path}: record {record.id!r} teaches {clip!r}, a {SPLITS[split]} clip")
            if any(clip in self.bad for clip in row["audios"]):
                self.dropped += 1
                continue
            ids.add(row["id"])
            self.rows[source.name][table] += 1
            yield row

    def _told(self, records: Iterable[R]) -> Iterator[R]:
        """The same records, with the progress told."""
        for record in records:
            if self._read % _TOLD_EVERY == 0:
                self._on_progress(self._read)
            self._read += 1
            yield record

    def write_recognition(self) -> None:
        """Held-out utterances; their groups get the data set's name too."""
        for split in _HELD_OUT:
            rows = (
                {**row, "audio": source.inside(row["audio"]), "source": source.inside(row["source"])}
                for source in self.sources
                for row in _plain_rows(source.folder / split / "recognition.jsonl", "audio", "source")
                if source.inside(row["audio"]) not in self.bad
            )
            store.write_rows(self.out / split / "recognition.jsonl", rows)

    def write_quarantine(self) -> None:
        """What the data sets had left out already, and what was found here."""
        before = (
            {**row, "path": source.inside(row["path"])}
            for source in self.sources
            for row in _plain_rows(source.folder / "quarantine.jsonl", "path")
        )
        now = (one._asdict() for one in self.bad.values())
        store.write_rows(self.out / "quarantine.jsonl", chain(before, now))


def _clips_of(source: _Source) -> Manifest[AudioClip]:
    path = table_path(source.folder, "clips")
    if path is None:
        raise BadMixture(f"{source.folder} has no clips.jsonl; prepare the data set again")
    return open_manifest(path, AudioClip)


def _renamed(row: Row, source: _Source) -> Row:
    """A record's row with the data set's name before its id, speaker and paths."""
    for key in ("id", "path", "speaker"):
        if row.get(key) is not None:
            row[key] = source.inside(row[key])
    for part in (row, *row.get("turns", ())):
        if "audios" in part:
            part["audios"] = [source.inside(path) for path in part["audios"]]
    return row


def _plain_rows(path: Path, *keys: str) -> Iterator[Row]:
    """Rows that are no records, with text under `keys`; none if there is no such file."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise BadMixture(f"{path}:{number}: is not JSON ({error})") from error
            if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
                raise BadMixture(f"{path}:{number}: has no text under {', '.join(keys)}")
            yield row


def _refuse_repeated(path: Path, key: str, seen: Fingerprints) -> None:
    """Name the first row whose value under `key` came before."""
    suspects, met = seen.repeated(), set[str]()
    for row in _plain_rows(path, key) if suspects else ():
        if row[key] in met:
            raise BadMixture(
                f"{key} {row[key]!r} comes twice in {path.name}: {key}s are unique in a data set"
            )
        if fingerprint(row[key]) in suspects:
            met.add(row[key])
