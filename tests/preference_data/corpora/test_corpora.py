"""Every corpus becomes clips with true facts, in the right place, the same every time."""

import csv
import os
import shutil
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from preference_data.audio import decode
from preference_data.corpora import folder
from preference_data.corpora.catalog import phrasebook_of
from preference_data.dataset import splits
from preference_data.schema import AudioClip
from preference_data.toy_world import spoken_digits, synthetic
from preference_data.toy_world.phrasebook import Phrasebook
from preference_data.toy_world.spoken_digits import facts_of, laid_out, trimmed

RATE = decode.SAMPLE_RATE
SYNTHETIC = Phrasebook.load(phrasebook_of("synthetic", None))
DIGITS = Phrasebook.load(phrasebook_of("spoken_digits", None))
prepare_synthetic = partial(synthetic.prepare, phrasebook=SYNTHETIC)
prepare_digits = partial(spoken_digits.prepare, phrasebook=DIGITS)
ARCHIVE = Path(__file__).parents[4] / "shared" / "data" / "free-spoken-digit-dataset.tar.gz"


def check_files(out: Path, clips: list[AudioClip], corpus: str, book: Phrasebook) -> None:
    """What holds for the clips of any corpus."""
    assert len({clip.id for clip in clips}) == len({clip.path for clip in clips}) == len(clips)
    splits.check(clips)
    for clip in clips:
        info = decode.inspect(out / clip.path, max_duration_s=30)
        assert (info.sha256, info.format, info.sample_rate_hz) == (clip.sha256, "WAV/PCM_16", RATE)
        assert info.duration_s == clip.duration_s
        parent = f"audio/{clip.split}"
        if clip.split in ("dev", "test"):
            parent = f"{clip.split}/Chat/{book.task_of(clip.facts)}_{corpus}"
        assert clip.path == f"{parent}/{clip.id}.wav"
        assert set(clip.facts) <= set(book.slots)
        assert book.description(clip.facts)


# ------------------------------------------------------------------ synthetic world

COUNTS = {"train": 80, "preference": 20, "dev": 20, "test": 40}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, list[AudioClip]]:
    out = tmp_path_factory.mktemp("world")
    done: list[int] = []
    clips, _, _ = prepare_synthetic(out, counts=COUNTS, seed=3, on_progress=done.append)
    assert done == list(range(1, 161))
    return out, clips


def test_the_synthetic_world_has_all_categories_equally_often_and_voices_by_split(world):
    out, clips = world
    check_files(out, clips, "synthetic", SYNTHETIC)
    assert Counter(clip.split for clip in clips) == COUNTS
    for split in COUNTS:
        of = [clip for clip in clips if clip.split == split]
        speech = [clip for clip in of if "word" in clip.facts]
        assert len(speech) == len(of) / 2
        assert sum("background" in clip.facts for clip in of) == len(of) / 4
        assert sum("instrument" in clip.facts for clip in of) == len(of) / 4
        for clip in of:
            assert (clip.speaker is None) == ("word" not in clip.facts)
            if clip.speaker:
                assert clip.speaker in synthetic.VOICES[split][clip.facts["gender"]]


def test_clips_depend_on_seed_and_number_only(world, tmp_path):
    _, clips = world
    few, *_ = prepare_synthetic(tmp_path, counts={"train": 6, "test": 8}, seed=3)
    assert few == [c for c in clips if c.split == "train"][:6] + [c for c in clips if c.split == "test"][:8]
    other, *_ = prepare_synthetic(tmp_path, counts={"dev": 4}, seed=4)
    assert not {clip.sha256 for clip in other} & {clip.sha256 for clip in clips}


def test_a_clip_holds_as_many_sounds_as_its_facts_say(world):
    out, clips = world
    checked = 0
    for clip in clips:
        if clip.facts.get("event") not in ("beep", "clap", "knock"):
            continue
        samples = decode.load(out / clip.path, max_duration_s=3)
        blocks = np.abs(samples[: len(samples) // 160 * 160]).reshape(-1, 160).max(axis=1) > 0.03
        onsets = [t for t in np.flatnonzero(blocks) if not blocks[max(0, t - 15) : t].any()]
        assert len(onsets) == ["one", "two", "three", "four"].index(clip.facts["count"]) + 1, clip
        checked += 1
    assert checked >= 8


# --------------------------------------------------------------- spoken digits


def write_tone(path: Path, hz: float, duration_s: float = 0.4, rate: int = 8000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(duration_s * rate)) / rate
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hz * time), rate, subtype="PCM_16")


@pytest.fixture
def recordings(tmp_path) -> Path:
    """Four speakers, digit d at 300 + 100 d Hz plus a few Hz of speaker and take."""
    for digit in (0, 3, 7):
        for who, speaker in enumerate(("ann", "bob", "eve", "kim")):
            for take in (0, 4, 5, 6):
                name = f"{digit}_{speaker}_{take}.wav"
                write_tone(tmp_path / "fsdd" / "recordings" / name, 300 + 100 * digit + 5 * who + take)
    return tmp_path / "fsdd"


DIGIT_COUNTS = {"train": 30, "preference": 10, "dev": 5, "test": 5}
HELD_OUT = {"dev": ["eve"], "test": ["kim"]}


def test_digit_clips_keep_speakers_apart(recordings, tmp_path):
    out = tmp_path / "out"
    done: list[int] = []
    options = {"recordings": recordings, "counts": DIGIT_COUNTS, "held_out": HELD_OUT, "seed": 1}
    clips, bad, _ = prepare_digits(out, **options, on_progress=done.append)
    check_files(out, clips, "spoken_digits", DIGITS)
    assert done == list(range(1, 51))
    assert Counter((clip.split, clip.source) for clip in clips) == {
        ("train", "sequence"): 30,
        ("preference", "sequence"): 10,
        ("dev", "recording"): 12,
        ("dev", "sequence"): 5,
        ("test", "recording"): 12,
        ("test", "sequence"): 5,
    }
    assert {clip.speaker for clip in clips if clip.split in ("train", "preference")} == {"ann", "bob"}
    assert {clip.speaker for clip in clips if clip.split == "dev"} == {"eve"}
    singles = [clip for clip in clips if clip.source == "recording" and clip.split == "test"]
    assert Counter(clip.facts["digits"] for clip in singles) == {"zero": 4, "three": 4, "seven": 4}
    assert bad == []
    assert prepare_digits(tmp_path / "again", **options).clips == clips


def test_a_single_recording_is_heard_as_it_is(recordings, tmp_path):
    clips, _, _ = prepare_digits(tmp_path, recordings=recordings, counts={"test": 1}, held_out=HELD_OUT)
    clip = next(clip for clip in clips if clip.id == "spoken_digits-test-7_kim_6")
    samples = decode.load(tmp_path / clip.path, max_duration_s=3)
    spectrum = np.abs(np.fft.rfft(samples))
    assert np.argmax(spectrum) * RATE / len(samples) == pytest.approx(300 + 700 + 15 + 6, abs=3)


def test_clips_that_are_not_padded_are_the_beginning_of_those_that_are(recordings, tmp_path):
    made = {}
    for pad_to_s in (0, 1.5, 3):
        out = tmp_path / str(pad_to_s)
        clips, _, _ = prepare_digits(
            out,
            recordings=recordings,
            counts={"train": 6},
            held_out=HELD_OUT,
            pad_to_s=pad_to_s,
        )
        made[pad_to_s] = [decode.load(out / clip.path, max_duration_s=3) for clip in clips]
    assert {len(samples) for samples in made[3]} == {3 * RATE}
    for short, longer, whole in zip(*made.values(), strict=True):
        assert len(longer) == max(len(short), 1.5 * RATE)
        assert np.array_equal(short, whole[: len(short)])
        assert np.array_equal(longer, whole[: len(longer)])
    assert min(map(len, made[0])) < RATE


def test_facts_of_digits():
    assert facts_of([7, 2, 7]) == {
        "first": "seven",
        "second": "two",
        "third": "seven",
        "last": "seven",
        "count": "three",
        "digits": "seven two seven",
        "said": ["seven", "two"],
    }
    assert facts_of([0]) == {
        "first": "zero",
        "last": "zero",
        "count": "one",
        "digits": "zero",
        "said": ["zero"],
    }


def test_digits_that_would_not_fit_are_said_faster():
    rng = np.random.default_rng(0)
    for length_s in (0.3, 0.9, 1.2):
        buffer, n = laid_out([np.ones(int(length_s * RATE))] * 3, rng)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], buffer > 0.5, [0]])))
        starts, ends = edges[::2], edges[1::2]
        assert len(buffer) == 3 * RATE
        assert len(starts) == 3
        assert ends[-1] < 3 * RATE
        assert n == pytest.approx(min(3 * RATE, ends[-1] + 0.1 * RATE), abs=2)
        gaps_s = (starts[1:] - ends[:-1]) / RATE
        assert np.all(gaps_s > 0.045)
        said_s = (ends - starts) / RATE
        assert np.allclose(said_s, length_s if length_s < 1 and gaps_s[0] > 0.06 else said_s[0], atol=0.01)


def test_silence_around_a_digit_is_cut():
    samples = np.zeros(RATE)
    samples[RATE // 2 : RATE // 2 + 4800] = 0.25
    kept = trimmed(samples)
    assert kept.max() == 1
    assert 4800 <= len(kept) <= 4800 + 6 * 160
    assert trimmed(np.zeros(RATE)) is None
    assert trimmed(np.zeros(10)) is None


def test_bad_recordings_are_set_aside_with_their_reason(recordings, tmp_path):
    wavs = recordings / "recordings"
    (wavs / "0_ann_7.wav").write_bytes(b"")
    (wavs / "3_ann_8.wav").write_text("<html>not found</html>")
    (wavs / "7_bob_9.wav").symlink_to("gone.wav")
    write_tone(wavs / "7_ann_10.wav", 500, duration_s=4)
    write_tone(wavs / "seven_ann_11.wav", 500)
    soundfile.write(wavs / "0_ann_12.wav", np.zeros(4000), 8000)
    clips, bad, _ = prepare_digits(tmp_path, recordings=recordings, counts=DIGIT_COUNTS, held_out=HELD_OUT)
    assert len(clips) == 50 + 24
    assert {one.id: one.code for one in bad} == {
        "0_ann_12": "bad_level",
        "0_ann_7": "empty_file",
        "3_ann_8": "unreadable",
        "7_ann_10": "too_long",
        "7_bob_9": "missing",
        "seven_ann_11": "bad_path",
    }


LEFT_BEHIND = ("._0_ann_0.wav", ".ipynb_checkpoints/0_ann_0.wav", "__MACOSX/0_ann_0.wav", ".DS_Store")


def test_what_systems_leave_behind_is_no_recording(recordings, tmp_path):
    prepare = partial(prepare_digits, recordings=recordings, counts=DIGIT_COUNTS, held_out=HELD_OUT)
    expected = prepare(tmp_path / "before")
    for name in LEFT_BEHIND:
        (recordings / "recordings" / name).parent.mkdir(exist_ok=True)
        (recordings / "recordings" / name).write_bytes(b"\0\5\x16\7" * 40)
    assert prepare(tmp_path / "after") == expected


@pytest.mark.parametrize("ending", [".WAV", ".Wav", ".wAV"])
def test_endings_in_capital_letters_count(recordings, tmp_path, ending):
    prepare = partial(prepare_digits, recordings=recordings, counts=DIGIT_COUNTS, held_out=HELD_OUT)
    expected = prepare(tmp_path / "before")
    for path in (recordings / "recordings").glob("*_eve_*.wav"):
        path.rename(path.with_suffix(ending))
    assert prepare(tmp_path / "after") == expected


def test_unusable_digits_say_what_to_do(recordings, tmp_path):
    def prepare(**changes):
        options = {"recordings": recordings, "counts": DIGIT_COUNTS, "held_out": HELD_OUT}
        prepare_digits(tmp_path / "out", **{**options, **changes})

    with pytest.raises(ValueError, match="'zoe' must be .* ann, bob, eve, kim"):
        prepare(held_out={"dev": ["zoe"], "test": ["kim"]})
    with pytest.raises(ValueError, match="'kim' must be named once"):
        prepare(held_out={"dev": ["kim"], "test": ["kim"]})
    with pytest.raises(ValueError, match="no usable recording for dev"):
        prepare(held_out={"test": ["kim"]})
    with pytest.raises(ValueError, match="no usable recording for train"):
        prepare(held_out={"dev": ["ann", "bob"], "test": ["eve", "kim"]})
    with pytest.raises(ValueError, match="fetch https://github.com/Jakobovski"):
        prepare(recordings=tmp_path / "nowhere")
    (tmp_path / "digits.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match="unpack it \\(tar xzf digits.tar.gz\\)"):
        prepare(recordings=tmp_path / "digits.tar.gz")
    for path in (recordings / "recordings").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 48 recordings"):
        prepare()


@pytest.fixture(scope="module")
def real_recordings(tmp_path_factory) -> Path:
    if given := os.environ.get("AUDIO_ALIGN_FSDD"):
        return Path(given)
    if not ARCHIVE.is_file():
        pytest.skip(
            "the Free Spoken Digit Dataset is not here: set AUDIO_ALIGN_FSDD to its folder "
            f"(see preference_data/toy_world/spoken_digits.py), or put {ARCHIVE.name} into ../shared/data"
        )
    unpacked = tmp_path_factory.mktemp("fsdd")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(unpacked, filter="data")
    return next(unpacked.iterdir())


def test_the_real_recordings_are_all_usable(real_recordings, tmp_path):
    counts = {"train": 60, "preference": 20, "dev": 10, "test": 10}
    clips, bad, _ = prepare_digits(
        tmp_path, recordings=real_recordings, counts=counts, held_out={"dev": ["george"], "test": ["theo"]}
    )
    check_files(tmp_path, clips, "spoken_digits", DIGITS)
    assert bad == []
    singles = [clip for clip in clips if clip.source == "recording"]
    assert Counter((clip.speaker, clip.facts["digits"]) for clip in singles) == {
        (speaker, word): 50 for speaker in ("george", "theo") for word in spoken_digits.WORDS
    }
    learnt = {clip.speaker for clip in clips if clip.split in ("train", "preference")}
    assert learnt <= {"jackson", "lucas", "nicolas", "yweweler"}
    for clip in clips[:80]:
        assert np.abs(decode.load(tmp_path / clip.path, max_duration_s=3)).max() > 0.05


# ---------------------------------------------------------------- your folder


def prepare_folder(out: Path, recordings: Path, **options):
    phrasebook = Phrasebook.load(phrasebook_of("folder", recordings))
    return folder.prepare(out, phrasebook, recordings, max_duration_s=30.0, **options)


ROWS = [
    {"path": "a/one.wav", "speaker": "ann", "first": "one", "digits": "one", "said": "one"},
    {"path": "a/two.wav", "speaker": "ann", "first": "two", "digits": "two one", "said": "two|one"},
    {"path": "b one.flac", "speaker": "bob", "first": "one", "digits": "one", "said": "one"},
    {"path": "c.wav", "speaker": "eve", "first": "six", "digits": "six", "said": "six"},
]


def write_table(source: Path, rows: list[dict[str, str]]) -> None:
    with (source / "facts.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def mine(tmp_path) -> Path:
    source = tmp_path / "mine"
    for row in ROWS:
        write_tone(source / row["path"], 440, duration_s=0.5, rate=44100)
    stereo = np.zeros((8000, 2))
    stereo[:, 0] = 0.5
    soundfile.write(source / "c.wav", stereo, 16000)
    shutil.copyfile(phrasebook_of("spoken_digits", None), source / "phrasebook.yaml")
    write_table(source, ROWS)
    return source


def test_a_folder_of_your_own(mine, tmp_path):
    out, done = tmp_path / "out", []
    held_out = {"dev": ["bob"], "test": ["eve"]}
    clips, _, _ = prepare_folder(out, recordings=mine, held_out=held_out, on_progress=done.append)
    check_files(out, clips, "folder", Phrasebook.load(mine / "phrasebook.yaml"))
    assert done == [1, 2, 3, 4]
    by_speaker = {(clip.speaker, clip.facts["digits"]): clip for clip in clips}
    assert {clip.split for clip in clips if clip.speaker == "ann"} <= {"train", "preference"}
    assert by_speaker["bob", "one"].split == "dev"
    assert by_speaker["eve", "six"].split == "test"
    assert by_speaker["ann", "two one"].facts["said"] == ["two", "one"]
    assert by_speaker["ann", "one"].duration_s == pytest.approx(0.5, abs=0.001)
    mixed = decode.load(out / by_speaker["eve", "six"].path, max_duration_s=3)
    assert np.allclose(mixed, 0.25, atol=1e-3)  # two channels, one of them silent
    assert prepare_folder(tmp_path / "again", recordings=mine, held_out=held_out).clips == clips


@pytest.mark.parametrize("mark", [";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_as_excel_writes_it(mine, tmp_path, mark, encoding):
    expected = prepare_folder(tmp_path / "before", recordings=mine).clips
    table = mine / "facts.csv"
    table.write_text(table.read_text().replace(",", mark).replace("a/one.wav", '"a/one.wav"'), encoding)
    assert prepare_folder(tmp_path / "after", recordings=mine).clips == expected


def test_odd_recordings_of_a_folder_are_named(mine, tmp_path):
    left = np.sin(np.arange(16_000) * 0.1) / 2
    soundfile.write(mine / "c.wav", np.stack([left, -left], axis=1), 16_000)
    soundfile.write(mine / "a/two.wav", np.zeros(16_000), 16_000)
    clips, bad, odd = prepare_folder(tmp_path / "out", recordings=mine)
    assert len(clips) == 4
    assert bad == []
    assert {(one.path, one.code) for one in odd} == {("c.wav", "antiphase"), ("a/two.wav", "silent")}


def test_a_given_split_counts_and_a_fifth_of_the_rest_is_for_preferences(mine, tmp_path):
    rest = [{**ROWS[0], "path": f"{number}.wav", "split": ""} for number in range(60)]
    for row in rest:
        shutil.copyfile(mine / "c.wav", mine / row["path"])
    given = [{**row, "split": split} for row, split in zip(ROWS, ("test", "test", "dev", "dev"), strict=True)]
    write_table(mine, given + rest)
    clips, _, _ = prepare_folder(tmp_path / "out", recordings=mine)
    assert [clip.split for clip in clips[:4]] == ["test", "test", "dev", "dev"]
    shares = Counter(clip.split for clip in clips[4:])
    assert set(shares) == {"train", "preference"}
    assert 5 <= shares["preference"] <= 20  # of 60; 12 expected, 3.1 standard deviation


def test_unusable_recordings_of_a_folder_are_set_aside(mine, tmp_path):
    (mine / "c.wav").write_text("<html>")
    clips, bad, _ = prepare_folder(tmp_path / "out", recordings=mine)
    assert len(clips) == 3
    assert [(one.path, one.code) for one in bad] == [("c.wav", "unreadable")]
    for path in [*mine.rglob("*.wav"), *mine.rglob("*.flac")]:
        path.unlink()
    with pytest.raises(ValueError, match="none of the 4 recordings.*'a/one.wav': missing"):
        prepare_folder(tmp_path / "out", recordings=mine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": "ten"}, "facts.csv:3: column 'first': 'ten' is not a value of this slot; known: zero"),
        ({"digits": "two won"}, ":3: column 'digits': 'won' is not a value"),
        ({"said": "two|won"}, ":3: column 'said': 'won' is not a value"),
        ({"digits": ""}, ":3: no description template fits the facts"),
        ({"path": "../secret.wav"}, ":3: column 'path': '../secret.wav' is absolute or holds '..'"),
        ({"path": ""}, ":3: column 'path': '' is empty"),
        ({"path": "a/one.wav"}, "column 'path': 'a/one.wav' comes more than once"),
        ({"split": "valid"}, ":3: column 'split': 'valid' is not one of train, preference, dev, test"),
        (
            {"split": "train", "speaker": "bob"},
            ":3: column 'split': 'train', but speaker 'bob' is held out for dev",
        ),
        ({"frist": "x"}, ":1: column 'frist' is not a slot of the phrasebook; did you mean 'first'"),
    ],
)
def test_a_bad_table_names_line_column_and_value(mine, tmp_path, change, message):
    write_table(mine, [ROWS[0], {**ROWS[1], **change}, *ROWS[2:]])
    with pytest.raises(folder.BadFacts) as caught:
        prepare_folder(tmp_path / "out", recordings=mine, held_out={"dev": ["bob"]})
    assert message in str(caught.value)


def test_all_problems_of_a_table_are_told_at_once(mine, tmp_path):
    write_table(mine, [{**row, "first": "ten"} for row in ROWS])
    with pytest.raises(folder.BadFacts) as caught:
        prepare_folder(tmp_path / "out", recordings=mine, held_out={"test": ["zoe"]})
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert "nobody is called 'zoe'" in lines[4]


def test_a_folder_without_its_files_says_which(mine, tmp_path):
    def message(source: Path) -> str:
        with pytest.raises(ValueError) as caught:
            prepare_folder(tmp_path / "out", recordings=source)
        return str(caught.value)

    (mine / "facts.csv").write_text("path,speaker\nc.wav\n")
    assert "facts.csv:2: has fewer cells" in message(mine)
    (mine / "facts.csv").write_bytes(b"path,speaker\n\xff\xfe,x\n")
    assert "is not a CSV file in UTF-8" in message(mine)
    (mine / "facts.csv").write_text("file,speaker\n")
    assert "column 'path' is missing" in message(mine)
    (mine / "facts.csv").unlink()
    assert "facts.csv is missing" in message(mine)
    (mine / "phrasebook.yaml").unlink()
    assert "phrasebook.yaml, which says what can be asked" in message(mine)


def test_a_link_out_of_the_folder_is_refused(mine, tmp_path):
    write_tone(tmp_path / "outside.wav", 440)
    (mine / "c.wav").unlink()
    (mine / "c.wav").symlink_to(tmp_path / "outside.wav")
    with pytest.raises(folder.BadFacts, match=":5: column 'path': 'c.wav' is a link that leaves"):
        prepare_folder(tmp_path / "out", recordings=mine)
