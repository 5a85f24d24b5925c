"""Whether a text gives the reference answer away."""

from __future__ import annotations

import re
from functools import lru_cache


# Letters and digits go on with a word, but for scripts written without spaces: in "选B" the B stands alone
_WORD = r"[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
_NOT_AFTER_WORD = f"(?<!{_WORD})(?<!{_WORD}_)"
_NOT_BEFORE_WORD = f"(?!_?{_WORD})"
# "B-cell", "A-D", "20 °C": no choice of B, A or C
_NOT_AFTER_HYPHEN, _NOT_BEFORE_HYPHEN = f"(?<!{_WORD}-)(?<!°)(?<!° )", f"(?!-{_WORD})"
# 12 is not in 5.12, 1,012 or 5/12; nor, where a number begins, in -12 or .12
_NOT_IN_NUMBER_BEFORE = r"(?<!\d[.,/])(?<!^[-−.])(?<![\s(\[{=<>:,$*][-−.])"
# 12 is not in 123, 12.5, 12,000, 12/5, 12e5 or 12th, but it is in 12kg
_NOT_IN_NUMBER_AFTER = r"(?!\d)(?![.,/]\d)(?!e[-+]?\d)(?!(?:st|nd|rd|th)\b)"


def contains_answer(text: str, answer: str | float | None) -> bool:
    """
    Whether a text holds the reference answer verbatim, as a word or number of its own.

    The answer "B" is in "(B)" and "it is B.", not in "Because" or "B-cells"; 12 is in "= 12." and "12kg", not in
    "312", "12.5" or "1,200". Case doesn't count, except for single letters: "a car" does not tell that the answer is
    "A". (A sentence that starts with the article does: "A car" can't be told from it.) Any white space equals any other.

    Args:
        text: The text.
        answer: The reference answer, a string or a number. No text contains an empty one.

    Raises:
        TypeError: If the answer is neither.
    """
    pattern = _pattern(answer_text(answer))
    return pattern is not None and pattern.search(text) is not None


def redact_answer(text: str, answer: str | float | None, replacement: str = "[…]") -> str:
    """The text with a replacement in every place where `contains_answer` finds the answer."""
    pattern = _pattern(answer_text(answer))
    return text if pattern is None else pattern.sub(lambda _: replacement, text)


def answer_text(answer: str | float | None) -> str:
    """
    A reference answer as text; empty for `None`, NaN and blank text.

    Raises:
        TypeError: If it is neither a string nor a number.
    """
    if answer is None or answer != answer:
        return ""
    if isinstance(answer, (str, int, float)):
        return str(answer).strip()
    raise TypeError(f"A reference answer must be a string, a number or None; got {type(answer).__name__}.")


@lru_cache(maxsize=1024)
def _pattern(answer: str) -> re.Pattern[str] | None:
    if not answer:
        return None
    letter = len(answer) == 1 and answer.isalpha()
    before, after = "", ""
    if answer[0].isalnum():
        before = _NOT_AFTER_WORD + (_NOT_AFTER_HYPHEN if letter else "")
    if answer[0].isdecimal():
        before += _NOT_IN_NUMBER_BEFORE
    elif re.match(r"[-−+.]\d", answer):  # a sign, not the operator in "5-12"
        before = rf"(?<![)\]}}])(?<!{_WORD})"
    number = re.fullmatch(r"[-−+]?[\d.,/]+", answer) is not None
    if answer[-1].isalnum() and not number:  # a unit may follow a number
        after = _NOT_BEFORE_WORD + (_NOT_BEFORE_HYPHEN if letter else "")
    if answer[-1].isdecimal():
        after += _NOT_IN_NUMBER_AFTER
    body = r"\s+".join(map(re.escape, answer.split()))
    return re.compile(before + body + after, flags=0 if letter else re.IGNORECASE)
