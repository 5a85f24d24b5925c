"""Whether what a program gave is what was expected."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any


# One way to read any text, as this is tried on megabytes that a program printed
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,6})?")
_LONGEST_FLOAT = 400  # characters of a number that is compared with a tolerance


def same_text(actual: str, expected: str, tolerance: float = 1e-6) -> bool:
    """
    Whether a program printed what was expected.

    Blanks at the ends of lines and empty lines at the beginning and the end don't count. In a line of numbers no other
    blanks count either; in any other line they do, as in a drawing. Whole numbers are equal if they are to the last
    digit, however long (5.0 equals 5); where the expected number is written with a point or an exponent, it may differ
    by `tolerance`. All else is equal if it is the same, upper and lower case included.

    Args:
        actual: What was printed.
        expected: What was expected.
        tolerance: Greatest difference of decimal numbers, absolute or relative to the greater of the two.
    """
    actual_lines, expected_lines = _lines(actual), _lines(expected)
    return len(actual_lines) == len(expected_lines) and all(
        one == other or _same_line(one, other, tolerance)
        for one, other in zip(actual_lines, expected_lines, strict=True)
    )


def _lines(text: str) -> list[str]:
    # Not `splitlines`, to which some control characters end lines too
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    start = next((i for i, line in enumerate(lines) if line), 0)
    return lines[start:]


def _same_line(actual: str, expected: str, tolerance: float) -> bool:
    actual_words, expected_words = actual.split(), expected.split()
    if len(actual_words) != len(expected_words):
        return False
    numbers = all(_NUMBER.fullmatch(word) for word in expected_words)
    if not numbers and re.findall(r"\s+", actual) != re.findall(r"\s+", expected):
        return False
    return all(_same_word(*words, tolerance) for words in zip(actual_words, expected_words, strict=True))


def _same_word(actual: str, expected: str, tolerance: float) -> bool:
    if actual == expected:
        return True
    if not (_NUMBER.fullmatch(actual) and _NUMBER.fullmatch(expected)):
        return False
    if Decimal(actual) == Decimal(expected):
        return True
    whole = re.fullmatch(r"[+-]?[0-9]+", expected) is not None
    if whole or max(len(actual), len(expected)) > _LONGEST_FLOAT:
        return False
    return _close(float(actual), float(expected), tolerance)


def same_value(actual: Any, expected: Any, tolerance: float = 1e-6) -> bool:
    """
    Whether a program returned what was expected.

    Lists and tuples are equal if their items are, and so are dictionaries with the same keys. Where the expected
    number is a `float`, it may differ by `tolerance`, and NaN equals NaN; integers are exact, so that no float that
    was rounded equals a long integer. A number equals no string.

    Args:
        actual: The value, plain data.
        expected: The expected value, plain data.
        tolerance: Greatest difference of floats, absolute or relative to the greater of the two.
    """

    def same(one: Any, other: Any) -> bool:
        return same_value(one, other, tolerance)

    if isinstance(expected, (list, tuple)):
        return isinstance(actual, (list, tuple)) and _all(same, actual, expected)
    if isinstance(expected, dict):
        if not isinstance(actual, dict) or actual.keys() != expected.keys():
            return False
        return all(same(actual[key], value) for key, value in expected.items())
    if isinstance(expected, float) and isinstance(actual, (int, float)) and not isinstance(actual, bool):
        try:
            return _close(float(actual), expected, tolerance)
        except OverflowError:  # an integer beyond all floats
            return False
    return bool(actual == expected)


def _all(same: Callable[[Any, Any], bool], actual: Any, expected: Any) -> bool:
    return len(actual) == len(expected) and all(same(*pair) for pair in zip(actual, expected, strict=True))


def _close(actual: float, expected: float, tolerance: float) -> bool:
    if math.isnan(expected):
        return math.isnan(actual)
    return math.isclose(actual, expected, rel_tol=tolerance, abs_tol=tolerance)
