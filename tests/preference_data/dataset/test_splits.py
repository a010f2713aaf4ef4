"""No clip and no benchmark speaker on both sides of a split."""

import pytest

from preference_data.dataset.splits import Leak, check
from preference_data.schema import AudioClip


def clip(name: str, split: str, *, speaker: str | None = None, audio: str = "") -> AudioClip:
    sha256 = (audio or name).encode().hex().rjust(64, "0")
    return AudioClip(id=name, path=f"{name}.wav", split=split, duration_s=1, sha256=sha256, speaker=speaker)


def test_train_and_preference_share_speakers_and_unknown_speakers_are_nobody():
    check([])
    check(
        [
            clip("a", "train", speaker="ann"),
            clip("b", "preference", speaker="ann"),
            clip("c", "dev", speaker="bob"),
            clip("d", "test", speaker="eve"),
            clip("e", "test"),
            clip("f", "train"),
            clip("g", "train", audio="f"),
        ]
    )


def test_the_same_audio_in_two_splits_names_both_records():
    with pytest.raises(Leak, match="'a' \\(train\\) and 'b' \\(preference\\) are the same audio"):
        check([clip("a", "train", audio="x"), clip("b", "preference", audio="x")])


@pytest.mark.parametrize("other", ["train", "preference", "dev"])
def test_a_speaker_of_the_test_split_is_heard_nowhere_else(other):
    clips = [clip("a", other, speaker="ann"), clip("b", "test", speaker="ann")]
    for order in (clips, clips[::-1]):
        with pytest.raises(Leak, match="speaker 'ann'") as caught:
            check(order)
        assert "'a'" in str(caught.value)
        assert "'b'" in str(caught.value)


def test_a_speaker_of_dev_is_not_in_training():
    with pytest.raises(Leak, match="'b' \\(dev\\) and 'a' \\(train\\)"):
        check([clip("a", "train", speaker="ann"), clip("b", "dev", speaker="ann")])
