"""Chinese texts with their figures written out, as the normaliser of the reports' evaluation writes them.

A restatement of the rules of SpeechIO's cn_tn.py (github.com/speechio/chinese_text_normalization), with the
settings of evaluate_asr.py of QwenLM/Qwen2-Audio. The words of a number are those of cn2an. In this order:

    dates               2008年8月8日   二零零八年八月八日; only years of 19.., 20.., 0., 8., 9.
    money, round sums   1200多元       一千两百多元; 3.5亿  三点五亿
    telephone numbers   13800138000    digit by digit, without country code's + and area code's hyphen
    fractions           3/4            四分之三
    per cent            62.5%          百分之六十二点五
    with measure words  1500米         一千五百米
    4 to 32 digits      2046           digit by digit
    what is left        15, 3.5        十五, 三点五

Where ours differs on purpose:
    - The script replaces the first text that looks like a match: in "250和5个" it reads 二五零, because "5个"
      first stands in 250. Ours replaces the match.
    - What stands at once after a date, or one character after a telephone number, the script reads by a later
      rule ("2008年2009年" as two thousand and nine).
    - A number of 10**12 and more with a measure word is written with 万亿, not 兆.
    - Several zeros alone are read digit by digit; the script leaves nothing of "00".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from importlib import import_module

_NUMBER = r"\d+(?:\.\d+)?"
_ROUND = "亿|千万|百万|万|千|百"
_MONEY = f"(?:(?:{_ROUND})?[元块]|{_ROUND}|[角毛分])"
_MEASURE_WORD = (
    "(?:[千毫微]克|[千分厘毫]米|"
    "[丈世丘丝两个丸代令件伏位冬出刀分刻勺匹升单卮厘双叠口只合名周啖回场块坡堂堆墙壳壶夏夜天头季客"
    "家寸对寻尺尾层山岁岭常幢年座张忽户手扎打担挑捆撮支斗斛斤日旬时春曲更月本条杯板枝根桶棵毫江泡"
    "溪炮煲片瓶盆盏盒盘石砣碗碟秋秒程窠笼管箩箱篮簋粒纪线罐网罗群脚腔袋袭课贯贴跳身辆辈道里针钟钧"
    "钱钵铢铺锅锱阙队阵面页顶颗首])"
)


def written_out(text: str) -> str:
    """A text with all of its figures in Chinese characters."""
    text = re.sub(r"\d", lambda match: str(int(match[0])), text)  # full-width ones
    for pattern, write in _RULES:
        text = re.sub(pattern, write, text)
    return text


def _digits(text: str) -> str:
    """Digit by digit; what is no digit goes."""
    return "".join("零一二三四五六七八九"[int(char)] for char in text if char.isdigit())


def _number(text: str) -> str:
    """A whole or decimal number in words: 两 before 百, 千, 万 and 亿, 二 before 十 and alone."""
    whole, point, decimals = text.partition(".")
    if len(whole) > _LONGEST or not whole.strip("0"):
        words = _digits(whole)
    else:
        words = _an2cn()(whole.lstrip("0"))
        words = "零" + re.sub("^十", "一十", words) if whole[0] == "0" else words
        words = re.sub("(?<![零一二三四五六七八九十])二(?=[百千万亿])", "两", words)
    return words + ("点" + _digits(decimals) if point else "")


_LONGEST = 16  # digits: cn2an knows no more


@cache
def _an2cn() -> Callable[[str], str]:
    """Loaded where there is Chinese: it takes a third of a second."""
    function: Callable[[str], str] = import_module("cn2an").an2cn
    return function


def _date(match: re.Match[str]) -> str:
    year, month, day = match["year"], match["month"], match["day"]
    return (
        (f"{_digits(year)}年" if year else "")
        + (f"{_number(month)}月" if month else "")
        + (_number(day) if day else "")
    )


def _fraction(match: re.Match[str]) -> str:
    return f"{_number(match[2])}分之{_number(match[1])}"


_RULES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (
        r"(?<!\d)(?=\d+[年月])(?:(?P<year>[089]\d|(?:19|20)\d\d)年)?"
        r"(?:(?P<month>\d\d?)月(?:(?P<day>\d\d?)(?=[日号]))?)?",
        _date,
    ),
    (rf"(?<!\d){_NUMBER}(?=[多余几]?{_MONEY})", lambda match: _number(match[0])),
    (r"(?<!\d)(?:\+?86)?1(?:[38]\d|5[0-35-9]|7[678]|9[89])\d{8}(?!\d)", lambda match: _digits(match[0])),
    (r"(?<!\d)(?:0(?:10|2[1-3]|[3-9]\d\d)-?)?[1-9]\d{6,7}(?!\d)", lambda match: _digits(match[0])),
    (r"(?<!\d)(\d+)/(\d+)", _fraction),
    (rf"(?<!\d)({_NUMBER})[%％]", lambda match: f"百分之{_number(match[1])}"),
    (rf"(?<!\d){_NUMBER}(?=[多余几]?{_MEASURE_WORD})", lambda match: _number(match[0])),
    (r"\d{4,32}", lambda match: _digits(match[0])),
    (_NUMBER, lambda match: _number(match[0])),
    ("(?<=[a-zA-Z])二(?=[a-zA-Z])", lambda match: "2"),  # B2B, O2O
)
