"""Judges of comparisons behind `openai_server`: good, deaf, first-place, at chance; and what they judge.

The world: clips are tones of 200 Hz or 2500 Hz, and a completion is right where it says which. Every other
right completion is the shorter one, so that length tells nothing.
"""

import hashlib
import json
import re
from collections.abc import Callable
from io import BytesIO
from typing import NamedTuple

import numpy as np
import soundfile

from preference_data.schema import Comparison, Prompt
from tests.align.evaluation.openai_server import Answer, Behaviour, Request


class Compared(NamedTuple):
    """What a request wants compared: the texts in the order of the prompt, its mark, and its clips."""

    texts: list[str]
    mark: str
    wavs: list[bytes]


def compared(request: Request) -> Compared:
    """As a judge reads it that follows the rules: the mark of the last line, and what stands between it."""
    text = request.text
    mark = re.search(r'its "mark" is "([0-9a-f]{16})"\.\Z', text)[1]
    quoted = re.findall(
        rf"^<<{mark}\n(.*?)\n{mark}>>$", text.split("\n[Answer 1]\n")[1], re.MULTILINE | re.DOTALL
    )
    return Compared(quoted, mark, request.wavs)


def ranks_of(values: list[float]) -> list[int]:
    """1 for the largest; equal values have equal ranks."""
    distinct = sorted(set(values), reverse=True)
    return [1 + distinct.index(value) for value in values]


def ranking(value: Callable[[str, Compared], float]) -> Behaviour:
    """Ranks completions by a value on both axes."""

    def behave(request: Request) -> Answer:
        if "[Answer 1]" not in request.text:
            return Answer("yes")
        own = compared(request)
        ranks = ranks_of([value(text, own) for text in own.texts])
        axis = {"ranks": ranks, "all_bad": False}
        return Answer(json.dumps({"mark": own.mark, "reason": "", "factuality": axis, "behaviour": axis}))

    return behave


def is_high(wav: bytes) -> bool:
    wave, rate = soundfile.read(BytesIO(wav))
    return np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave) > 1000


def is_right(text: str, wav: bytes) -> bool:
    return ("high" if is_high(wav) else "low") in text


hearing = ranking(lambda text, own: is_right(text, own.wavs[0]))
deaf = ranking(lambda text, own: len(text))
first_place = ranking(lambda text, own: -own.texts.index(text))
at_chance = ranking(lambda text, own: hashlib.sha256(text.encode() + own.wavs[0]).digest()[0])


def tone(number: int) -> bytes:
    """A WAV of 0.2 s, its own for each number: low if the number is even."""
    t = np.arange(3200 + number) / 16_000
    wave = 0.4 * np.sin(2 * np.pi * (2500 if number % 2 else 200) * t)
    wav = BytesIO()
    soundfile.write(wav, wave, 16_000, format="WAV", subtype="PCM_16")
    return wav.getvalue()


def prompts(n: int) -> dict[str, Prompt]:
    made = [
        Prompt(
            id=f"p{i}",
            audios=(f"{i}.wav",),
            question=f"Question {i}: is the tone high or low?",
            answer_gt=f"It is {'high' if i % 2 else 'low'}.",
            meta_info="{}",
            task_name="tones",
        )
        for i in range(n)
    ]
    return {prompt.id: prompt for prompt in made}


def comparison(i: int, texts: tuple[str, ...] | None = None, **more) -> Comparison:
    right, wrong = ("high", "low") if i % 2 else ("low", "high")
    if i // 2 % 2:
        answers = (f"It is {right}, number {i}.", f"It is a tone that is {wrong}, number {i}.")
    else:
        answers = (f"It is a tone that is {right}, number {i}.", f"It is {wrong}, number {i}.")
    texts = texts or (answers if i // 4 % 2 else answers[::-1])
    return Comparison(
        id=f"c{i}",
        prompt_id=f"p{i}",
        completions=tuple(f"p{i}-{n}" for n in range(len(texts))),
        texts=texts,
        everyone=False,
        **more,
    )
