"""Which choice an answer to a multiple-choice question names: a letter in any common wrapping, or its text.

An answer that names two choices, declines, or never ends its thought names none. A letter counts only where
it cannot be a word: "A dog barks" names no choice.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

LETTERS = "ABCD"
ALL_LETTERS = "ABCDEFGHIJ"
"""Those of benchmarks with more choices."""
_LONGEST, _CLAUSE = 2000, 300  # characters: looked at from either end of an answer, and around an assertion

_THOUGHT = r"(?:<{}(?:think|thinking|thought|reasoning)>|\[{}THINK\]|◁{}think▷)"
_BEGINS = re.compile(_THOUGHT.format("", "", ""), re.IGNORECASE)
_ENDS = re.compile(
    _THOUGHT.format("/", "/", "/") + r"|<\|channel\|>final.{0,40}?<\|message\|>", re.IGNORECASE | re.DOTALL
)
_TAGGED = re.compile(
    r"<(answer|final_answer|final|choice|option|response)>(.*?)(?:</\1>|\Z)|\\f?boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}",
    re.IGNORECASE | re.DOTALL,
)
_STYLE = re.compile(  # and what a tokenizer adds
    r"\\(?:text|textbf|mathrm|mathbf|rm)\b|<\|[^<>|]*\|>|</?s>|[*_`$\"“”„«»「」『』【】《》〈〉{}\\]"
)
_ANSWER_KEYS = ("answer", "final_answer", "choice", "option", "letter", "prediction", "答案", "选项")

_SURELY = r"(?:\s+(?:most likely|likely|probably|clearly|indeed|definitely|therefore|thus))?"
_NEGATED = re.compile(
    r"(?:\b(?:not|never|cannot|nor|neither|doubt|unsure|unclear|wrong|incorrect|which|whether|if)\b|n['’]t\b"
    r"|[不别別没沒非未])[^.!?;。！？；,，\n]*$",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"[AaI]\s+[A-Za-z]")  # "I" is a word too


class _Patterns(NamedTuple):
    """What names a choice, where choices are called by the letters up to a last one."""

    says: re.Pattern[str]
    """What follows, up to the end of the sentence, is the answer."""
    is_right: re.Pattern[str]
    letter: re.Pattern[str]
    """The mark tells a letter from a word."""
    listed: re.Pattern[str]
    marked: re.Pattern[str]
    alone: re.Pattern[str]
    """A line of letters."""


@cache
def _patterns(last: str) -> _Patterns:
    upper, lower = f"A-{last}", f"-{last.lower()}"
    return _Patterns(
        says=re.compile(
            rf"\b(?:answer|ans|option|choice|response|letter|guess)\b['’]?\s*"
            rf"(?:(?:is|was|(?:would|should|must){_SURELY} be)\b{_SURELY}\s*:?|[:.=\-–—]"
            rf"|(?=[{upper}]\b|[b{lower}]\b|\())"
            r"|\b(?:choose|chose|pick|select(?:ed)?|go with|i (?:think|believe)"
            r"|probably|likely|would say|should be|(?:it|this|that)(?:['’]s|\s+is))\b\s*:?"
            r"|答案?\s*(?:应该|应当|应)?\s*[是为為选選:]+|[选選][择擇项項]?\s*[:是为為]?|(?:应该|应当|我?认为)是|####",
            re.IGNORECASE,
        ),
        is_right=re.compile(
            rf"(?:^|[\s(])([{upper}])\)?\s*(?:选项|選項)?\s*"
            r"(?:(?:is|was)\s+(?:the\s+)?(?:correct|right|best|true|answer)\b"
            r"|(?:是|为|為)?(?:正确|正確|对的|對的))"
        ),
        letter=re.compile(
            r"[^\w.!?。]*(?:(?:option|choice|letter|选项|選項)\s*)?[\s(\['‘]*"
            rf"(?P<letter>[{upper}a{lower}])(?!['’]?[A-Za-z0-9?])"
            r"(?P<mark>[\])'’]*\s*[.):,;\]。、!>|]|\s*选项|\s*選項|[\])'’]+|\s+[-–—]|\s*\n|[^\w?]*$"
            r"|\s+(?=(?:because|since|is (?:correct|right))\b))?(?P<rest>.*)",
            re.DOTALL,
        ),
        listed=re.compile(
            r"[\s)\]]*(?:,|;|/|&|、|\bor\b|\band\b|或者?|和|与|與|还是|還是)\s*[选選(]?\s*"
            rf"([{upper}])\b(?!\s+[a-z])",
            re.IGNORECASE,
        ),
        marked=re.compile(rf"(?<!\w)([{upper}])(?:[.):]|$)"),
        alone=re.compile(rf"[\s(\[]*([{upper}])[\s)\].。,]*"),
    )


def _patterns_of(choices: Sequence[str]) -> _Patterns:
    """An answer may name a letter up to D that was not offered."""
    return _patterns(ALL_LETTERS[max(len(LETTERS), len(choices)) - 1])


def read_choice(response: str, choices: Sequence[str]) -> str | None:
    """The letter of the only choice that an answer names; None where it names none, or more than one.

    Args:
        response: what a policy said.
        choices: the texts of A to D, or of as many letters as there are; one that was not offered is empty.
    """
    letters = _letters_named(response, choices)
    return letters.pop() if len(letters) == 1 and all(_texts(letters, choices)) else None


def chosen(choices: Sequence[str], response: str) -> str | None:
    """The text of the only choice that an answer names, as `read_choice` reads it.

    Choices of the same text are the same choice.
    """
    texts = _texts(_letters_named(response, choices), choices)
    return (texts.pop() or None) if len(texts) == 1 else None


def _texts(letters: Iterable[str], choices: Sequence[str]) -> set[str]:
    """The texts of choices; of what was not offered the empty one."""
    texts = dict(zip(ALL_LETTERS, choices, strict=False))
    return {texts.get(letter, "") for letter in letters}


def _letters_named(response: str, choices: Sequence[str]) -> set[str]:
    """Every letter that an answer names, also of what was not offered."""
    text = after_thought(unicodedata.normalize("NFKC", html.unescape(response)))
    if text is None:
        return set()
    if len(text) > 2 * _LONGEST:
        text = f"{text[:_LONGEST]}\n{text[-_LONGEST:]}"
    tagged = [match[2] or match[3] or "" for match in _TAGGED.finditer(text)]
    return {letter for part in tagged or [text] for letter in _named(_from_json(part), choices)}


def after_thought(text: str) -> str | None:
    """What an answer says after its thought, whose beginning its prompt may hold; None if it never ends."""
    ends = [match.end() for match in _ENDS.finditer(text)]
    answer = text[ends[-1] :] if ends else text
    return None if _BEGINS.search(answer) else answer


def _from_json(text: str) -> str:
    """The answer in a JSON object, also in a fence; any other text as it is."""
    match = re.search(r"\{[^{}]*\}", text)
    try:
        row = json.loads(match[0]) if match else None
    except ValueError:
        return text
    values = {key.casefold(): value for key, value in row.items()} if isinstance(row, dict) else {}
    return next((values[key] for key in _ANSWER_KEYS if isinstance(values.get(key), str)), text)


def _named(text: str, choices: Sequence[str]) -> set[str]:
    """Every letter that a text names: by the text of a choice, or by letters marked as the answer."""
    if texts := _by_text(text, choices):
        is_verbatim = len(text.strip()) > 1 and text.strip() in map(str.strip, choices)
        # "A:7/1" is a chord, where a choice says so, and not the first choice
        return texts if is_verbatim else texts | _letter(text, choices, must_be_marked=True)
    text = _STYLE.sub("", text).strip()
    patterns = _patterns_of(choices)
    letters = set(_letter(text, choices, must_be_marked=True))
    if letters:
        letters |= set(patterns.marked.findall(text))
    letters |= {match[1] for line in text.split("\n") if (match := patterns.alone.fullmatch(line))}
    for rest in _assertions(text, patterns):
        texts = _by_sentence(rest, choices)
        letters |= texts | _letter(rest, choices, must_be_marked=bool(texts))
    return letters | {
        match[1] for match in patterns.is_right.finditer(text) if not _is_negated(text, match.start())
    }


def _assertions(text: str, patterns: _Patterns) -> Iterator[str]:
    """What follows every "the answer is" that is not negated; "the answer is a" may have been cut short."""
    for match in patterns.says.finditer(text):
        rest = text[match.end() : match.end() + _CLAUSE]
        is_cut = rest.strip() == "a" and match[0].rstrip()[-1].isalpha()
        if not is_cut and not _is_negated(text, match.start()):
            yield rest


def _is_negated(text: str, start: int) -> bool:
    return bool(_NEGATED.search(text[max(0, start - _CLAUSE) : start]))


def _letter(text: str, choices: Sequence[str], *, must_be_marked: bool) -> set[str]:
    """The letter at the start of a text, with those listed beside it and the choice spelled out after it."""
    patterns = _patterns_of(choices)
    match = patterns.letter.match(text)
    if match is None:
        return set()
    letter, spelled = match["letter"].upper(), _by_sentence(match["rest"], choices)
    is_bare = match["mark"] is None and spelled != {letter}
    if is_bare and (must_be_marked or _ARTICLE.match(text, match.start("letter"))):
        return set()
    listed = patterns.listed.match(text, match.end("letter"))
    return {letter, *spelled, *([listed[1].upper()] if listed else [])}


def _by_sentence(text: str, choices: Sequence[str]) -> set[str]:
    """The choices that a text, or its first sentence, says and nothing else."""
    return _by_text(text, choices) or _by_text(re.split(r"(?<=\w)[.!?](?:\s|$)|[。！？\n]", text)[0], choices)


def _by_text(text: str, choices: Sequence[str]) -> set[str]:
    """The choices whose text this is: letter by letter, else but for case, punctuation and the article."""
    offered = [(letter, choice) for letter, choice in zip(ALL_LETTERS, choices, strict=False) if choice]
    for same in (str.strip, plain):
        wanted = same(text)
        if letters := {letter for letter, choice in offered if wanted and same(choice) == wanted}:
            return letters
    return set()


def plain(text: str) -> str:
    """Lower case, single blanks, no punctuation, no article before; signs, marks and emoji stay."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(" " if unicodedata.category(char)[0] == "P" else char for char in plain)
    return re.sub(r"^(?:the|a|an) (?=\S)", "", " ".join(kept.split()))
