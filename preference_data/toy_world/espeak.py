"""Speech from espeak-ng, through ctypes on the library inside the wheel `espeakng-loader`."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import NamedTuple

import espeakng_loader
import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from preference_data.audio.decode import SAMPLE_RATE
from preference_data.toy_world.sounds import Samples

_SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: samples go to the callback, in the calling thread; the
# asynchronous mode is ten times slower and lets a change of voice overtake an utterance
_PARAMETERS = (1, 3, 4)  # espeak_PARAMETER: rate, pitch, range
_UTF8 = 1
_NATIVE_RATE = 22_050
_SILENCE = 0.004
_MARGIN = 200  # samples kept around the audible part
_VARIANTS = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class SpeechError(RuntimeError):
    """The synthesiser did not start, does not know a voice, or was silent."""


class Utterance(NamedTuple):
    """A text to speak, and how.

    `voice` is a language and a variant, such as "en-us+f3"; `rate` words a minute, 80..450; `pitch` and
    `pitch_range`, the liveliness of the pitch, are 0..100.
    """

    text: str
    voice: str
    rate: int = 170
    pitch: int = 50
    pitch_range: int = 50


class _Synthesiser:
    """The loaded library, the voice it speaks with, and the samples of the current utterance."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.voice = ""
        self.blocks: list[np.ndarray] = []
        self.callback = _CALLBACK(self._collect)  # kept: the library calls it as long as it lives
        data = espeakng_loader.get_data_path()
        rate = self.library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), 0)
        if rate != _NATIVE_RATE:
            raise SpeechError(
                f"espeak-ng answers {rate} instead of {_NATIVE_RATE} Hz: its data in {data} is missing "
                "or broken; reinstall espeakng-loader"
            )
        self.library.espeak_ng_SetRandSeed(1)  # breathy voices are noise, seeded by the time otherwise
        self.library.espeak_SetSynthCallback(self.callback)
        # text, size, position, position type, end position, flags, identifier, user data
        self.library.espeak_Synth.argtypes = [
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int),
            *(ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p),
        ]

    def _collect(self, samples: ctypes._Pointer[ctypes.c_short], n: int, _events: int) -> int:
        if samples and n > 0:
            self.blocks.append(np.ctypeslib.as_array(samples, (n,)).copy())
        return 0

    def use(self, voice: str) -> None:
        """Switch voice; costs about 15 ms, far more than a word of the current voice."""
        if voice == self.voice:
            return
        variant = voice.partition("+")[2]  # espeak-ng would pass over one that it does not know
        unknown = variant and not (_VARIANTS / variant).is_file()
        if unknown or self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise SpeechError(f"espeak-ng has no voice {voice!r}; its variants are the files of {_VARIANTS}")
        self.voice = voice

    def render(self, utterance: Utterance) -> NDArray[np.int16]:
        """Samples at the native rate."""
        self.use(utterance.voice)
        for parameter, value in zip(_PARAMETERS, utterance[2:], strict=True):
            self.library.espeak_SetParameter(parameter, value, 0)
        self.blocks.clear()
        data = utterance.text.encode() + b"\0"
        self.library.espeak_Synth(data, len(data), 0, 1, 0, _UTF8, None, None)
        return np.concatenate(self.blocks) if self.blocks else np.zeros(0, np.int16)


@cache
def _synthesiser() -> _Synthesiser:
    return _Synthesiser()


def say(utterance: Utterance) -> Samples:
    """Speak in this process, in one thread at a time, without the silence around the text.

    Raises:
        SpeechError: the voice is unknown, or nothing audible came out.
    """
    native = _synthesiser().render(utterance)
    samples = native.astype(np.float32) / 32768
    audible = np.flatnonzero(np.abs(samples) > _SILENCE)
    if not len(audible):
        raise SpeechError(f"voice {utterance.voice!r} said nothing for {utterance.text!r}")
    samples = samples[max(0, audible[0] - _MARGIN) : audible[-1] + _MARGIN]
    return resample_poly(samples, SAMPLE_RATE // 50, _NATIVE_RATE // 50).astype(np.float32)


def say_all(utterances: Sequence[Utterance]) -> list[Samples]:
    """Speak in a fresh process, which makes the samples the same every time.

    Within one process they are not: espeak-ng's flutter and breath run on from one utterance to the
    next. List the utterances voice by voice; switching takes longer than speaking.

    Raises:
        SpeechError: see `say`.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
        try:
            return list(process.map(say, utterances, chunksize=max(1, len(utterances))))
        except BrokenProcessPool as error:
            raise SpeechError(f"the speech process died: {error}") from error
