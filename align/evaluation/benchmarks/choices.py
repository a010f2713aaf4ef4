"""Which choice an answer to a multiple-choice question names: a letter in any common wrapping, or its text.

An answer that names two choices, declines, or never ends its thought names none. A letter counts only where
it cannot be a word: "A dog barks" names no choice.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence

LETTERS = "ABCD"
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
_SAYS = re.compile(  # what follows, up to the end of the sentence, is the answer
    rf"\b(?:answer|ans|option|choice|response|letter|guess)\b['’]?\s*"
    rf"(?:(?:is|was|(?:would|should|must){_SURELY} be)\b{_SURELY}\s*:?|[:.=\-–—]|(?=[A-D]\b|[b-d]\b|\())"
    r"|\b(?:choose|chose|pick|select(?:ed)?|go with|i (?:think|believe)"
    r"|probably|likely|would say|should be|(?:it|this|that)(?:['’]s|\s+is))\b\s*:?"
    r"|答案?\s*(?:应该|应当|应)?\s*[是为為选選:]+|[选選][择擇项項]?\s*[:是为為]?|(?:应该|应当|我?认为)是|####",
    re.IGNORECASE,
)
_IS_RIGHT = re.compile(
    r"(?:^|[\s(])([A-D])\)?\s*(?:选项|選項)?\s*(?:(?:is|was)\s+(?:the\s+)?(?:correct|right|best|true|answer)\b"
    r"|(?:是|为|為)?(?:正确|正確|对的|對的))"
)
_NEGATED = re.compile(
    r"(?:\b(?:not|never|cannot|nor|neither|doubt|unsure|unclear|wrong|incorrect|which|whether|if)\b|n['’]t\b"
    r"|[不别別没沒非未])[^.!?;。！？；,，\n]*$",
    re.IGNORECASE,
)
_LETTER = re.compile(  # the mark tells a letter from a word
    r"[^\w.!?。]*(?:(?:option|choice|letter|选项|選項)\s*)?[\s(\['‘]*(?P<letter>[A-Da-d])(?!['’]?[A-Za-z0-9?])"
    r"(?P<mark>[\])'’]*\s*[.):,;\]。、!>|]|\s*选项|\s*選項|[\])'’]+|\s+[-–—]|\s*\n|[^\w?]*$"
    r"|\s+(?=(?:because|since|is (?:correct|right))\b))?(?P<rest>.*)",
    re.DOTALL,
)
_ARTICLE = re.compile(r"[Aa]\s+[A-Za-z]")
_LISTED = re.compile(
    r"[\s)\]]*(?:,|;|/|&|、|\bor\b|\band\b|或者?|和|与|與|还是|還是)\s*[选選(]?\s*([A-D])\b(?!\s+[a-z])",
    re.IGNORECASE,
)
_MARKED = re.compile(r"(?<!\w)([A-D])(?:[.):]|$)")


def read_choice(response: str, choices: Sequence[str]) -> str | None:
    """The letter of the only choice that an answer names; None where it names none, or more than one.

    Args:
        response: what a policy said.
        choices: the texts of A to D; one that was not offered is empty.
    """
    text = _after_thought(unicodedata.normalize("NFKC", html.unescape(response)))
    if text is None:
        return None
    if len(text) > 2 * _LONGEST:
        text = f"{text[:_LONGEST]}\n{text[-_LONGEST:]}"
    tagged = [match[2] or match[3] or "" for match in _TAGGED.finditer(text)]
    parts = tagged or [text]
    letters = {letter for part in parts for letter in _named(_from_json(part), choices)}
    offered = [letter for letter in letters if choices[LETTERS.index(letter)]]
    return offered[0] if len(letters) == 1 and offered else None


def chosen(choices: Sequence[str], response: str) -> str | None:
    """The only one of two to four choices that an answer names, as `read_choice` reads it."""
    texts = (*choices, *[""] * (len(LETTERS) - len(choices)))
    letter = read_choice(response, texts)
    return None if letter is None else texts[LETTERS.index(letter)]


def _after_thought(text: str) -> str | None:
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
        return texts | _letter(text, choices, must_be_marked=True)
    text = _STYLE.sub("", text).strip()
    letters = set(_letter(text, choices, must_be_marked=True))
    if letters:
        letters |= set(_MARKED.findall(text))
    for line in text.split("\n"):
        if re.fullmatch(r"[\s(\[]*[A-D][\s)\].。,]*", line):
            letters |= set(re.findall("[A-D]", line))
    for rest in _assertions(text):
        texts = _by_sentence(rest, choices)
        letters |= texts | _letter(rest, choices, must_be_marked=bool(texts))
    return letters | {match[1] for match in _IS_RIGHT.finditer(text) if not _is_negated(text, match.start())}


def _assertions(text: str) -> Iterator[str]:
    """What follows every "the answer is" that is not negated; "the answer is a" may have been cut short."""
    for match in _SAYS.finditer(text):
        rest = text[match.end() : match.end() + _CLAUSE]
        is_cut = rest.strip() == "a" and match[0].rstrip()[-1].isalpha()
        if not is_cut and not _is_negated(text, match.start()):
            yield rest


def _is_negated(text: str, start: int) -> bool:
    return bool(_NEGATED.search(text[max(0, start - _CLAUSE) : start]))


def _letter(text: str, choices: Sequence[str], *, must_be_marked: bool) -> set[str]:
    """The letter at the start of a text, with those listed beside it and the choice spelled out after it."""
    match = _LETTER.match(text)
    if match is None:
        return set()
    letter, spelled = match["letter"].upper(), _by_sentence(match["rest"], choices)
    is_bare = match["mark"] is None and spelled != {letter}
    if is_bare and (must_be_marked or _ARTICLE.match(text, match.start("letter"))):
        return set()
    listed = _LISTED.match(text, match.end("letter"))
    return {letter, *spelled, *([listed[1].upper()] if listed else [])}


def _by_sentence(text: str, choices: Sequence[str]) -> set[str]:
    """The choices that a text, or its first sentence, says and nothing else."""
    return _by_text(text, choices) or _by_text(re.split(r"(?<=\w)[.!?](?:\s|$)|[。！？\n]", text)[0], choices)


def _by_text(text: str, choices: Sequence[str]) -> set[str]:
    """The choices whose text this is: letter by letter, else but for case, punctuation and the article."""
    offered = [(letter, choice) for letter, choice in zip(LETTERS, choices, strict=True) if choice]
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
