"""Names that nearly fit, and links as the Hub's cache has them."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

from preference_data.audio import decode
from preference_data.audio.clip_files import BadAudio, list_files, resolve_inside

SILENCE = np.zeros(16_000, "float32")


def refusal(root: Path, relative: str) -> BadAudio:
    with pytest.raises(BadAudio) as caught:
        decode.inspect(resolve_inside(root, relative), max_duration_s=30)
    return caught.value


@pytest.mark.parametrize(
    ("there", "named", "hint"),
    [
        ("clips/a.wav", "clips/A.WAV", "'a.wav' does, which differs in capital and small letters"),
        ("clips/A.Wav", "clips/a.wav", "'A.Wav' does, which differs in capital and small letters"),
        ("Clips/x/a.wav", "clips/x/a.wav", "'Clips' does, which differs in capital and small letters"),
        ("STRASSE.wav", "straße.wav", "'STRASSE.wav' does, which differs in capital and small letters"),
        ("clips/a.wav", "clips\\a.wav", "with '/' for '\\'"),
        ("a/b/c.wav", "a\\b\\c.wav", "with '/' for '\\'"),
        ("clips/a.wav", "clips/b.wav", "check the manifest and the root"),
        ("a.wav", "none/b/a.wav", "check the manifest and the root"),
    ],
)
def test_missing_file_is_told_from_one_that_is_nearly_named_so(
    tmp_path: Path, there: str, named: str, hint: str
) -> None:
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(tmp_path / there, SILENCE, 16_000, format="WAV")
    if (tmp_path / named).exists():
        pytest.skip("this file system takes both names for one")
    error = refusal(tmp_path, named)
    assert error.code == "missing"
    assert hint in error.detail


@pytest.mark.parametrize("name", ["Müller.wav", "Ångström é.wav", "한국어.wav"])
@pytest.mark.parametrize(("on_disk", "in_manifest"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_unicode_forms_are_told_apart(tmp_path: Path, name: str, on_disk: str, in_manifest: str) -> None:
    soundfile.write(tmp_path / unicodedata.normalize(on_disk, name), SILENCE, 16_000)
    if (tmp_path / unicodedata.normalize(in_manifest, name)).exists():
        pytest.skip("this file system takes both names for one")
    error = refusal(tmp_path, unicodedata.normalize(in_manifest, name))
    assert "another Unicode form (NFC or NFD)" in error.detail


@pytest.mark.parametrize("path", ["C:\\data\\a.wav", "d:/a.wav"])
def test_path_of_windows_is_absolute(tmp_path: Path, path: str) -> None:
    assert refusal(tmp_path, path).code == "outside_root"


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A data set as `huggingface_hub.snapshot_download` keeps it, beside another one."""
    for name in ("datasets--us--clips", "datasets--them--secret"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        soundfile.write(tmp_path / name / "blobs" / "0abc", SILENCE, 16_000, format="FLAC")
    folder = tmp_path / "datasets--us--clips/snapshots/1f2e"
    (folder / "audio").mkdir(parents=True)
    (folder / "audio/a b.flac").symlink_to("../../../blobs/0abc")
    (folder / "top.flac").symlink_to("../../blobs/0abc")
    (folder / "other.flac").symlink_to("../../../datasets--them--secret/blobs/0abc")
    (folder / "out.flac").symlink_to("/etc/hostname")
    return folder


@pytest.mark.parametrize("root", [".", "audio", "..", "../.."])
def test_snapshot_of_the_hub_is_a_root(snapshot: Path, root: str) -> None:
    file = Path(os.path.relpath(snapshot / "audio/a b.flac", snapshot / root))
    if ".." in file.parts:
        pytest.fail("not below this root")
    assert decode.inspect(resolve_inside(snapshot / root, str(file)), max_duration_s=2).frames == 16_000


def test_link_is_followed_to_blobs_of_its_own_snapshot_only(snapshot: Path, tmp_path: Path) -> None:
    clip = resolve_inside(snapshot, "top.flac")
    assert isinstance(clip, Path)
    assert clip.name == "top.flac"  # messages name it, not its blob
    assert refusal(snapshot, "out.flac").code == "outside_root"
    assert "hf download --local-dir" in refusal(snapshot, "other.flac").detail
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "a.flac").symlink_to("../datasets--us--clips/blobs/0abc")
    assert "hf download --local-dir" in refusal(copy, "a.flac").detail


def test_files_are_listed_whatever_the_case_of_their_ending(tmp_path: Path) -> None:
    for name in (
        "b.WAV",
        "a.wav",
        "._a.wav",
        "__MACOSX/a.wav",
        ".ipynb_checkpoints/a.wav",
        "x/c.Wav",
        "d.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listed = [path.relative_to(tmp_path).as_posix() for path in list_files(tmp_path, "**/*", {".wav"})]
    assert listed == ["a.wav", "b.WAV", "x/c.Wav"]
