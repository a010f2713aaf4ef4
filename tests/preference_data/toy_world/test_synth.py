"""Made audio is what its facts say: voices by their pitch, melodies by their notes, events by number."""

import numpy as np
import pytest

from preference_data.audio.decode import SAMPLE_RATE
from preference_data.toy_world import espeak, sounds
from preference_data.toy_world.synthetic import VOICES

CAST = sorted({(voice, gender) for by in VOICES.values() for gender, names in by.items() for voice in names})


def pitch_hz(samples: np.ndarray) -> float:
    """Median over voiced frames of the autocorrelation's peak between 70 and 400 Hz."""
    found = []
    for start in range(0, len(samples) - 800, 400):
        frame = samples[start : start + 800].astype(float)
        self_similarity = np.correlate(frame, frame, "full")[799:]
        lag = 40 + int(np.argmax(self_similarity[40:230]))
        if frame.std() > 0.02 and self_similarity[lag] > 0.5 * self_similarity[0]:
            found.append(SAMPLE_RATE / lag)
    return float(np.median(found))


@pytest.mark.parametrize(("voice", "gender"), CAST)
def test_a_voice_can_be_heard_and_has_its_pitch(voice, gender):
    spoken = [espeak.say(espeak.Utterance(word, f"en-us+{voice}")) for word in ("hello", "seven", "banana")]
    for samples in spoken:
        assert samples.dtype == np.float32
        assert 0.25 < len(samples) / SAMPLE_RATE < 0.8
        assert np.sqrt(np.mean(samples**2)) > 0.02
    pitch = np.median([pitch_hz(samples) for samples in spoken])
    assert (pitch < 135) == (gender == "man"), f"{pitch:.0f} Hz"


def test_speech_is_the_same_every_time_also_breathy_and_fluttering():
    utterances = [
        espeak.Utterance(word, f"en-us+{v}") for v in ("f2", "m1", "f5") for word in ("stop", "water")
    ]
    once, twice = espeak.say_all(utterances), espeak.say_all(utterances)
    assert len(once) == len(utterances)
    for first, second in zip(once, twice, strict=True):
        np.testing.assert_array_equal(first, second)
    assert espeak.say_all([]) == []


def test_faster_speech_is_shorter():
    slow, fast = (espeak.say(espeak.Utterance("orange", "en-us+m1", rate=rate)) for rate in (120, 240))
    assert len(fast) < 0.75 * len(slow)


@pytest.mark.parametrize("speak", [espeak.say, lambda u: espeak.say_all([u])])
@pytest.mark.parametrize(
    ("utterance", "message"),
    [
        (espeak.Utterance("hello", "en-us+nobody"), "no voice 'en-us\\+nobody'"),
        (espeak.Utterance("hello", "elvish"), "no voice 'elvish'"),
        (espeak.Utterance("", "en-us"), "said nothing for ''"),
    ],
)
def test_what_cannot_be_said_is_named(speak, utterance, message):
    with pytest.raises(espeak.SpeechError, match=message):
        speak(utterance)


def loudest_hz(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 1 << 16))
    return float(np.argmax(spectrum) * SAMPLE_RATE / (1 << 16))


@pytest.mark.parametrize("instrument", ["flute", "piano"])
@pytest.mark.parametrize("tempo", ["fast", "slow"])
@pytest.mark.parametrize("direction", ["rising", "falling"])
def test_a_melody_goes_where_it_should(instrument, direction, tempo):
    for seed in range(10):
        samples = sounds.melody(3.0, instrument, direction, tempo, np.random.default_rng(seed))
        audible = np.flatnonzero(np.abs(samples) > 1e-4)
        note = int(0.15 * SAMPLE_RATE)
        first, last = samples[audible[0] :][:note], samples[: audible[-1]][-note:]
        assert (loudest_hz(first) < loudest_hz(last)) == (direction == "rising")
        length_s = (audible[-1] - audible[0]) / SAMPLE_RATE
        # fast: at most 6 * 0.26 s; slow: at least 3 * 0.5 s (the last note rings 15 % longer)
        assert 0.7 < length_s < 1.65 if tempo == "fast" else 1.5 < length_s < 2.75


@pytest.mark.parametrize(
    ("name", "make"),
    [
        *sounds.EVENTS.items(),
        *((name, lambda rng, play=play: play(300.0, 0.5, rng)) for name, play in sounds.INSTRUMENTS.items()),
        *((name, lambda rng, make=make: make(3.0, rng)) for name, make in sounds.BACKGROUNDS.items()),
    ],
)
def test_every_sound_is_audible_varies_and_follows_its_generator(name, make):
    first, again, other = (make(np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert 0.02 < np.abs(first).max() < 1.2
    if name not in ("piano", "organ"):  # these two depend on pitch and length only
        assert len(first) != len(other) or not np.array_equal(first, other)


def test_a_sound_beyond_the_end_is_cut():
    buffer = np.zeros(SAMPLE_RATE)
    sounds.add(buffer, np.ones(SAMPLE_RATE), 0.75)
    sounds.add(buffer, np.ones(10), 1.5)
    assert buffer.sum() == SAMPLE_RATE / 4
