import numpy as np
import pytest
import soundfile

from preference_data.audio import decode


def frames_only(tmp_path, rate, mode, channels=1):
    n = 3 * rate
    rng = np.random.default_rng(0)
    x = 0.2 * np.sin(np.arange(n) * 0.05) * (np.arange(n) > n // 2) + 0.001 * rng.standard_normal(n)
    path = tmp_path / "whole.mp3"
    soundfile.write(
        path, np.tile(x[:, None], channels), rate, format="MP3", bitrate_mode=mode, compression_level=0.5
    )
    content = path.read_bytes()
    return path, content[content.index(content[:2], 4) :]


@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000])
def test_read_whole(tmp_path, rate, mode, channels):
    path, body = frames_only(tmp_path, rate, mode, channels)
    bare = tmp_path / "bare.mp3"
    for tag in (b"", b"TAG" + bytes(125)):
        bare.write_bytes(body + tag)
        with decode._opened(bare, 60) as (f, s):
            got = decode._decode(bare, s)
        want, _ = soundfile.read(path, always_2d=True, dtype="float32")
        delay = len(got) - len(want)
        assert 0 <= delay < 2400
        # the encoder's delay stands before the sound; find it
        shifts = [
            d
            for d in range(0, 1200)
            if np.abs(
                got[d + len(want) // 2 : d + len(want) // 2 + 800]
                - want[len(want) // 2 : len(want) // 2 + 800]
            ).max()
            < 1e-5
        ]
        assert len(shifts) == 1, shifts
        d = shifts[0]
        m = min(len(want), len(got) - d)
        assert m >= len(want) - 1
        assert np.abs(got[d : d + m][3000:-1] - want[:m][3000:-1]).max() < 1e-5
    bare.write_bytes(body[:-10])
    with pytest.raises(decode.BadAudio, match="unknown_length"):
        decode.inspect(bare, max_duration_s=60)
