"""Clips inside tar files; hostile tar files."""

import io
import json
import random
import tarfile
import time

import numpy as np
import pytest
import soundfile

from preference_data.audio import decode, tar_shards
from preference_data.audio.clip_files import BadAudio
from preference_data.audio.tar_shards import BadShard, write_shards
from preference_data.dataset.dataset import Dataset


def flac(i, subtype="PCM_16", format="FLAC"):
    tone = 0.3 * np.sin(2 * np.pi * (200 + 50 * i) * np.arange(8000) / 16_000)
    file = io.BytesIO()
    soundfile.write(file, tone.astype(np.float32), 16_000, format=format, subtype=subtype)
    return file.getvalue()


def samples(n):
    return [(f"clip{i}", {"flac": flac(i), "json": json.dumps({"i": i}).encode()}) for i in range(n)]


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_what_is_written_is_read_back_by_name(tmp_path):
    written = dict(write_shards(tmp_path, samples(10), max_bytes=40_000))
    assert len(set(written.values())) > 1
    assert sorted(set(written.values())) == sorted(path.name for path in tmp_path.glob("*.tar"))
    for i in (7, 0, 9):
        shard = tmp_path / written[f"clip{i}"]
        assert tar_shards.find(shard, f"clip{i}.flac").read() == flac(i)
        assert json.loads(tar_shards.find(shard, f"clip{i}.json").read()) == {"i": i}
    with tarfile.open(tmp_path / written["clip3"]) as tar:  # anyone's tar reads it too
        assert tar.extractfile("clip3.flac").read() == flac(3)


def test_the_same_samples_give_the_same_bytes(tmp_path):
    list(write_shards(tmp_path / "a", samples(3)))
    list(write_shards(tmp_path / "b", samples(3)))
    assert (tmp_path / "a/shard-00000.tar").read_bytes() == (tmp_path / "b/shard-00000.tar").read_bytes()


def test_a_killed_writer_leaves_no_half_shard(tmp_path):
    def dying():
        yield from samples(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(write_shards(tmp_path, dying()))
    assert list(tmp_path.glob("*.tar")) == []


@pytest.mark.parametrize("key", ["", "a.b", "../x", "a/b", "a\0b"])
def test_keys_that_are_no_keys(tmp_path, key):
    with pytest.raises(ValueError, match="key"):
        list(write_shards(tmp_path, [(key, {"flac": b"x"})]))


def test_the_index_is_made_once_and_anew_for_another_shard(tmp_path):
    shard = tar_of(tmp_path / "a.tar", [("x.flac", b"one")])
    assert tar_shards.find(shard, "x.flac").read() == b"one"
    (kept,) = tmp_path.glob(".a.tar.*.npy")
    made = kept.stat().st_mtime_ns
    tar_shards._index_of.cache_clear()
    assert tar_shards.find(shard, "x.flac").read() == b"one"
    assert kept.stat().st_mtime_ns == made
    tar_of(shard, [("y.flac", b"two"), ("x.flac", b"three")])
    assert tar_shards.find(shard, "x.flac").read() == b"three"


def test_clips_in_a_shard_are_clips_like_any_other(tmp_path):
    tar_of(tmp_path / "s.tar", [("x.flac", flac(1)), ("x.wav", flac(1, format="WAV"))])
    (tmp_path / "x.flac").write_bytes(flac(1))
    (tmp_path / "x.wav").write_bytes(flac(1, format="WAV"))
    root = Dataset(tmp_path)
    for name in ("x.flac", "x.wav"):
        alone, member = root.find(name), root.find(f"s.tar/{name}")
        assert np.array_equal(*(decode.load(clip, max_duration_s=1) for clip in (alone, member)))
        assert decode.inspect(alone, max_duration_s=1) == decode.inspect(member, max_duration_s=1)


def test_refusals_of_members_bear_the_usual_codes(tmp_path):
    tar_of(
        tmp_path / "s.tar",
        [
            ("page.flac", b"<html>"),
            ("none.flac", b""),
            ("half.wav", flac(1, format="WAV")[:9000]),
            ("whole.wav", flac(1, format="WAV")),
        ],
    )
    root = Dataset(tmp_path)
    codes = {}
    for name in ("page.flac", "none.flac", "half.wav", "absent.flac"):
        with pytest.raises(BadAudio) as caught:
            decode.load(root.find(f"s.tar/{name}"), max_duration_s=1)
        codes[name] = caught.value.code
        assert "s.tar" in str(caught.value)
    assert codes == {
        "page.flac": "unreadable",
        "none.flac": "empty_file",
        "half.wav": "truncated",
        "absent.flac": "missing",
    }
    with pytest.raises(BadAudio, match="too_long"):
        decode.load(Dataset(tmp_path).find("s.tar/whole.wav"), max_duration_s=0.1)


def test_an_audit_looks_into_shards(tmp_path):
    tar_of(tmp_path / "s.tar", [("a.flac", flac(1)), ("b.flac", b"<html>")])
    clips = [("a", "s.tar/a.flac"), ("b", "s.tar/b.flac")]
    good, bad = decode.audit(Dataset(tmp_path).find, clips, max_duration_s=1)
    assert list(good) == ["a"]
    assert [(one.id, one.code) for one in bad] == [("b", "unreadable")]


# -------------------------------------------------------------------------- hostile


def test_names_are_never_paths(tmp_path):
    (tmp_path / "secret.flac").write_bytes(b"secret")
    (tmp_path / "in").mkdir()
    tar_of(tmp_path / "in/s.tar", [("../secret.flac", flac(1)), ("/etc/passwd", flac(2))])
    root = Dataset(tmp_path / "in")
    for path in ("s.tar/../secret.flac", "../secret.flac", "s.tar/../../secret.flac"):
        with pytest.raises(BadAudio, match="outside_root"):
            root.find(path)
    assert root.find("s.tar//etc/passwd").read() == flac(2)
    assert tar_shards.find(tmp_path / "in/s.tar", "../secret.flac").read() == flac(1)  # only a name


def test_links_devices_and_folders_are_no_members(tmp_path):
    link, hard, device, folder = (tarfile.TarInfo(name) for name in ("l.flac", "h.flac", "d.flac", "f.flac"))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "x.flac"
    device.type, folder.type = tarfile.CHRTYPE, tarfile.DIRTYPE
    shard = tar_of(
        tmp_path / "s.tar", [("x.flac", b"x"), (link, b""), (hard, b""), (device, b""), (folder, b"")]
    )
    assert tar_shards.find(shard, "x.flac").read() == b"x"
    for name in ("l.flac", "h.flac", "d.flac", "f.flac"):
        with pytest.raises(BadShard, match="no member"):
            tar_shards.find(shard, name)


def test_two_members_of_one_name(tmp_path):
    shard = tar_of(tmp_path / "s.tar", [("x.flac", b"1"), ("x.flac", b"2")])
    with pytest.raises(BadShard, match="two members"):
        tar_shards.find(shard, "x.flac")


def test_a_shard_that_stops_in_the_middle(tmp_path):
    shard = tar_of(tmp_path / "s.tar", [("a.flac", flac(1)), ("b.flac", flac(2))])
    shard.write_bytes(shard.read_bytes()[: 512 + len(flac(1)) + 2000])
    with pytest.raises(BadAudio, match="unreadable.*stops in the middle"):
        Dataset(tmp_path).find("s.tar/a.flac")


def test_what_is_no_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"PK\x03\x04" * 1000)
    with tarfile.open(tmp_path / "b.tar", "w:gz"):
        pass
    for name in ("a.tar", "b.tar"):
        with pytest.raises(BadShard, match="not a plain tar file"):
            tar_shards.find(tmp_path / name, "x.flac")


def test_a_folder_called_tar_is_a_folder(tmp_path):
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "x.tar/a.flac").write_bytes(flac(1))
    assert len(decode.load(Dataset(tmp_path).find("x.tar/a.flac"), max_duration_s=1)) == 8000


def with_checksum(header):
    """The checksum of a tar header, without which damage is seen at once."""
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return header


def test_damaged_headers_end_in_time_and_as_refusals(tmp_path):
    whole = tar_of(tmp_path / "s.tar", [(f"{i}.flac", flac(i)) for i in range(4)])
    with tarfile.open(whole) as tar:
        headers = [member.offset for member in tar]
    draw = random.Random(0)
    outcomes = set()
    for n in range(200):
        damaged = bytearray(whole.read_bytes())
        at = draw.choice(headers)
        for _ in range(draw.randint(1, 6)):
            place = draw.choice([draw.randint(124, 135), 156, draw.randint(0, 511)])  # size, type, anything
            damaged[at + place] = draw.choice([0, 0x30, 0x37, 0x4C, 0x78, 0x80, 0xFF, draw.randint(0, 255)])
        damaged[at : at + 512] = with_checksum(damaged[at : at + 512])
        path = tmp_path / f"{n}.tar"
        path.write_bytes(damaged)
        begun = time.process_time()
        try:
            outcomes.add(len(tar_shards.find(path, "2.flac").read()) > 0)
        except BadShard as error:
            outcomes.add(str(error)[:12])
        assert time.process_time() - begun < 2
    assert len(outcomes) > 2


def test_a_negative_size_does_not_lead_round_in_circles(tmp_path):
    """CVE-2025-8194: tarfile of this Python goes back to the same header for ever."""
    data = bytearray(tar_of(tmp_path / "s.tar", [("a.flac", b"x" * 600), ("b.flac", b"y")]).read_bytes())
    data[124:136] = b"\xff" * 9 + (-1024).to_bytes(3, "big", signed=True)  # base-256, of the first header
    data[:512] = with_checksum(data[:512])
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(BadShard):
        tar_shards.find(tmp_path / "s.tar", "a.flac")
