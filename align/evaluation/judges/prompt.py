"""The judge's prompt, and which scores its reply gives: the official way, and ours.

Both give a judge the clip's description, the question and two answers, one of them the reference, and
want two scores from 1 to 10. JUDGE.md lists where each differs from the official scripts.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from align.evaluation.benchmarks.air_bench import Item
from align.evaluation.judged_answers import Order, State
from align.evaluation.judges.chat_model import FILTERED, UNANSWERED, Message

OFFICIAL_PROMPT = Path(__file__).with_name("judge_prompt.txt")
STRICT_PROMPT = Path(__file__).with_name("judge_prompt_strict.txt")
_SLOT = re.compile(r"\{(\w+)\}")
REFUSED = ("content_filter", "refusal", FILTERED)
_UNUSABLE = (*UNANSWERED, *REFUSED)


class JudgePrompt(NamedTuple):
    """One order's prompt. `mark` and `response` are needed again to read the reply."""

    messages: tuple[Message, ...]
    mark: str
    response: str


class Reading(NamedTuple):
    """The scores of the first and the second answer, None unless `state` is "scored"."""

    state: State
    first: float | None = None
    second: float | None = None


class Official:
    """Scores as the official scripts intend: one user message, replies of exactly two whole numbers.

    Nothing keeps an answer from forging delimiters or speaking to the judge.
    """

    name = "official"
    max_disagreement = float("inf")
    """Points between the two orders' scores of one response above which the item is inconsistent."""
    expected_tokens = 4
    """Tokens of a usual reply, for cost estimates."""

    def __init__(self) -> None:
        self.template = OFFICIAL_PROMPT.read_text(encoding="utf-8").rstrip("\n")
        self.prompt_sha256 = hashlib.sha256(self.template.encode()).hexdigest()

    def write(self, item: Item, response: str, order: Order) -> JudgePrompt:
        """The prompt for one item in one order."""
        content = fill(self.template, _slots(item, response, order))
        return JudgePrompt(({"role": "user", "content": content},), "", response)

    def read(self, prompt: JudgePrompt, text: str, finish_reason: str | None) -> Reading:
        """Two integers with one space between them, none above 10; zero counts. Never raises."""
        answer = without_thought(text)
        parts = (answer or "").strip().replace("\n", "").split(" ")
        if finish_reason not in _UNUSABLE and len(parts) == 2:
            try:
                first, second = map(int, parts)
            except ValueError:
                return _unscored(answer, finish_reason)
            if max(first, second) <= 10:
                return Reading("scored", float(first), float(second))
        return _unscored(answer, finish_reason)


class Strict:
    """Ours: answers are quoted between marks they cannot know, and scores come from the judge's last line.

    The mark is a hash over everything quoted. No text can hold its own hash, so no answer can close its
    quotation or forge the score line, yet equal items give equal prompts, which the cache needs.
    """

    name = "strict"
    max_disagreement = 4.0
    expected_tokens = 120

    def __init__(self) -> None:
        text = STRICT_PROMPT.read_text(encoding="utf-8")
        self.system, self.user = text.rstrip("\n").split("\n=== user ===\n")
        self.prompt_sha256 = hashlib.sha256(text.encode()).hexdigest()

    def write(self, item: Item, response: str, order: Order) -> JudgePrompt:
        """The prompt for one item in one order."""
        quoted = {name: visible(defused(value)) for name, value in _slots(item, response, order).items()}
        slots = {**quoted, "mark": unguessable_mark(tuple(quoted.values()))}
        messages: tuple[Message, ...] = (
            {"role": "system", "content": fill(self.system, slots)},
            {"role": "user", "content": fill(self.user, slots)},
        )
        return JudgePrompt(messages, slots["mark"], response)

    def read(self, prompt: JudgePrompt, text: str, finish_reason: str | None) -> Reading:
        """The scores of the judge's own last line, 1 to 10 each; a cut reply has none. Never raises."""
        if finish_reason == "length":
            return Reading("invalid")
        answer = without_thought(text)
        scores = _last_line_scores(answer, prompt) if answer and finish_reason not in _UNUSABLE else None
        if scores is None:
            return _unscored(answer, finish_reason)
        if not all(1 <= score <= 10 for score in scores):
            return Reading("invalid")
        return Reading("scored", *scores)


JudgeProtocol = Official | Strict


_THOUGHT = r"(?:\w+:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|analysis|reflection|scratchpad)"
_THOUGHT_BEGINS = re.compile(
    rf"<{_THOUGHT}(?:\s[^<>]*)?>|\[THINK\]|◁think▷|<\|START_THINKING\|>"
    r"|<\|channel\|>(?!final)|\Aanalysis(?=[a-z])",
    re.IGNORECASE,
)
_THOUGHT_ENDS = re.compile(
    rf"</{_THOUGHT}>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>"
    r"|<\|channel\|>final.*?<\|message\|>|\Aanalysis.*assistantfinal",  # gpt-oss, and without its marks
    re.IGNORECASE | re.DOTALL,
)
_ANSWER_MARKS = re.compile(
    r"</?(?:answer|response|final|output|s)>|\[(?:BEGIN|END) FINAL RESPONSE\]|<\|\w+\|>", re.IGNORECASE
)


def without_thought(text: str) -> str | None:
    """What a reply says after its thought, in any model's marks; None where that never ends.

    A thought may lack its beginning, which many chat templates hold already.
    """
    ends = [end.end() for end in _THOUGHT_ENDS.finditer(text)]
    answer = text[ends[-1] :] if ends else text
    return None if _THOUGHT_BEGINS.search(answer) else _ANSWER_MARKS.sub("", answer)


def opens_thought(prompt: str) -> str:
    """The mark with which a rendered prompt ends if it has begun the reply's thought, else ""."""
    begins = list(_THOUGHT_BEGINS.finditer(prompt))
    return begins[-1][0] if begins and not prompt[begins[-1].end() :].strip() else ""


_SCORE = r"([0-9]{1,3}(?:\.[0-9]{1,6})?)(?:\s*/\s*10)?"
_PAIR = rf"{_SCORE}(?:\s*[,;]\s*|\s+){_SCORE}"
_BARE = re.compile(rf"(?:SCORES\s*:\s*)?{_PAIR}", re.IGNORECASE)
_JSON = re.compile(rf'\{{\s*"assistant_1"\s*:\s*{_SCORE}\s*,\s*"assistant_2"\s*:\s*{_SCORE}\s*\}}')
_REFUSAL = re.compile(
    r"\b(?:i(?:['\u2019]m| am) (?:sorry|unable|not able)|i (?:can(?:['\u2019]t|not)|won['\u2019]t|will not)"
    r"|(?:cannot|can['\u2019]t|unable to) (?:assist|help|comply|rate|judge|provide))\b",
    re.IGNORECASE,
)


def _last_line_scores(text: str, prompt: JudgePrompt) -> tuple[float, float] | None:
    """Scores a reply ends with.

    With the mark they are the judge's own for certain. Without it, they count only where the response
    holds nothing that a judge quoting it could end on by chance.
    """
    lines = [line for line in (re.sub("[*`]", "", raw).strip() for raw in text.split("\n")) if line]
    if not lines:
        return None
    own = rf"SCORES\s*{prompt.mark}\s*:\s*{_PAIR}\.?"
    scores = re.fullmatch(own, re.sub("[<>]", "", lines[-1]), re.IGNORECASE)
    if not scores and not _could_be_echoed(prompt.response):
        scores = (
            re.fullmatch(_PAIR, " ".join(lines[-2:] if len(lines) == 2 else lines[-1:]))
            or _BARE.fullmatch(lines[-1])
            or re.fullmatch(rf"(?:json\s)?{_JSON.pattern}", " ".join(lines))
            or _JSON.fullmatch(lines[-1])
        )
    return (float(scores[1]), float(scores[2])) if scores else None


def _could_be_echoed(response: str) -> bool:
    plain = unicodedata.normalize("NFKC", response)
    return bool(re.search(_PAIR, plain) or "assistant_1" in plain)


def _unscored(answer: str | None, finish_reason: str | None) -> Reading:
    if finish_reason in REFUSED:
        return Reading("refused")
    if answer is None or finish_reason in UNANSWERED:
        return Reading("invalid")
    return Reading("refused" if _REFUSAL.search(answer) else "invalid")


def _slots(item: Item, response: str, order: Order) -> dict[str, str]:
    first, second = item.answer_gt, response
    if order == "response_first":
        first, second = second, first
    slots = {"meta_info": item.meta_info, "question": item.question, "first": first, "second": second}
    return {name: encodable(value) for name, value in slots.items()}


def fill(template: str, slots: Mapping[str, str]) -> str:
    """Fill all slots in one pass: slots inside of values stay as they are."""
    return _SLOT.sub(lambda slot: slots[slot[1]], template)


def encodable(text: str) -> str:
    """The text with lone surrogates, which no request can carry, as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def defused(text: str) -> str:
    """The text with the special tokens of chat templates (<|im_end|>, </s>, [INST], ...) broken by a space.

    Servers of open models read them also inside of a message, where they would start a turn.
    """
    return re.sub(r"<(?=[^\s<=\d])|\[(?=/?[A-Z_]+\])", r"\g<0> ", text)


def visible(text: str) -> str:
    """The text with control and invisible characters written as <U+XXXX>, so that they hide nothing.

    Line feeds, tabs and the joiners that scripts need stay.
    """
    kept = "\n\t\u200c\u200d"
    return "".join(
        f"<U+{ord(c):04X}>" if c not in kept and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") else c
        for c in text.replace("\r\n", "\n")
    )


def unguessable_mark(quoted: Sequence[str]) -> str:
    """16 hex digits that occur in none of the texts."""
    digest = hashlib.sha256("\0".join(quoted).encode())
    while any(digest.hexdigest()[:16] in text for text in quoted):
        digest.update(b"again")
    return digest.hexdigest()[:16]
