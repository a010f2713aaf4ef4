"""Speech from espeak-ng, through ctypes on the library inside the wheel `espeakng-loader`.

espeak-ng is one synthesiser per process: calls are serialised by a lock, and what an utterance sounds
like does not depend on what was said before it.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache

import espeakng_loader
import numpy as np
from scipy.signal import resample_poly

from preference_data.synth import SAMPLE_RATE, Samples

_RETRIEVAL = 1  # espeak_AUDIO_OUTPUT: hand the samples to the callback instead of playing them
_RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER
_UTF8 = 1
_NATIVE_RATE = 22_050
_SILENCE = 0.004
_MARGIN = 200  # samples kept around the audible part
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class SpeechError(RuntimeError):
    """The synthesiser did not start, does not know a voice, or said nothing."""


class _Synthesiser:
    """The loaded library, the voice it speaks with, and the samples of the current utterance."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.voice = ""
        self.blocks: list[np.ndarray] = []
        self.lock = threading.Lock()
        self.callback = _CALLBACK(self._collect)  # kept: the library calls it as long as it lives
        rate = self.library.espeak_Initialize(_RETRIEVAL, 0, espeakng_loader.get_data_path().encode(), 0)
        if rate != _NATIVE_RATE:
            raise SpeechError(
                f"espeak-ng reports {rate} Hz instead of {_NATIVE_RATE}: its data in "
                f"{espeakng_loader.get_data_path()} is missing or broken; reinstall espeakng-loader"
            )
        self.library.espeak_SetSynthCallback(self.callback)
        self.library.espeak_Synth.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]

    def _collect(self, samples: ctypes._Pointer[ctypes.c_short], n: int, _events: int) -> int:
        if samples and n > 0:
            self.blocks.append(np.ctypeslib.as_array(samples, (n,)).copy())
        return 0

    def use(self, voice: str) -> None:
        """Switch voice; costs about 15 ms, ten times a short word."""
        if voice == self.voice:
            return
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise SpeechError(f"espeak-ng has no voice {voice!r}")
        self.voice = voice

    def render(self, text: str) -> np.ndarray:
        """int16 samples at the native rate."""
        self.blocks.clear()
        data = text.encode() + b"\0"
        self.library.espeak_Synth(data, len(data), 0, 1, 0, _UTF8, None, None)
        self.library.espeak_Synchronize()
        return np.concatenate(self.blocks) if self.blocks else np.zeros(0, np.int16)


@cache
def _synthesiser() -> _Synthesiser:
    return _Synthesiser()


def say(text: str, voice: str, *, rate: int = 170, pitch: int = 50, pitch_range: int = 50) -> Samples:
    """Speak a text, without the silence around it.

    Args:
        text: what to say.
        voice: a language and a variant, such as "en-us+f3".
        rate: words a minute, 80..450.
        pitch: base pitch, 0..100.
        pitch_range: liveliness of the pitch, 0..100.

    Raises:
        SpeechError: the voice is unknown, or nothing audible came out.
    """
    synthesiser = _synthesiser()
    with synthesiser.lock:
        synthesiser.use(voice)
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, pitch_range)):
            synthesiser.library.espeak_SetParameter(parameter, value, 0)
        samples = synthesiser.render(text).astype(np.float32) / 32768
    audible = np.flatnonzero(np.abs(samples) > _SILENCE)
    if not len(audible):
        raise SpeechError(f"voice {voice!r} said nothing for {text!r}")
    samples = samples[max(0, audible[0] - _MARGIN) : audible[-1] + _MARGIN]
    return resample_poly(samples, SAMPLE_RATE // 50, _NATIVE_RATE // 50).astype(np.float32)
