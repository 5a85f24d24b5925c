"""What reward functions get, and what they read of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..text import answer_text


ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def check_reward_arguments(answer_column: Any, name: Any, **switches: Any) -> None:
    """
    Check the arguments that reward functions share.

    Raises:
        ValueError: If a name is empty or no string.
        TypeError: If a switch is not True or False.
    """
    for key, value in (("answer_column", answer_column), ("name", name)):
        if not isinstance(value, str) or not value:
            raise ValueError(f"{key} must be a text that is not empty; got {value!r}.")
    for key, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{key} must be True or False; got {value!r}.")


def answer_texts(completions: Sequence[Any], prompts: Sequence[Any] | None, opens_thinking: bool) -> list[str]:
    """
    The texts of completions, thinking removed.

    Args:
        completions: Strings, or conversations whose last assistant message counts.
        prompts: Their prompts, if known. A string that ends with `<think>` has opened a block of thinking.
        opens_thinking: Whether every prompt has.
    """
    return [
        answer_text(None if prompts is None else prompts[i], completion, opens_thinking=opens_thinking)
        for i, completion in enumerate(completions)
    ]


def reference_answers(
    name: str, column: str, answer: Sequence[Any] | None, columns: dict[str, Any], count: int
) -> Sequence[Any]:
    """
    The reference answers of `count` rows: the argument `answer`, or the column of another name.

    Raises:
        ValueError: If there are none, or not one per completion.
    """
    given = answer if column == "answer" else columns.get(column)
    if given is None:
        raise ValueError(f"{name} needs the data set's column {column!r}, which holds the reference answers.")
    if isinstance(given, str) or len(given) != count:
        got = repr(given) if isinstance(given, str) else f"{len(given)} answers"
        raise ValueError(f"{name} needs one reference answer per completion, {count} in all; got {got}.")
    return given


def is_missing(answer: Any) -> bool:
    """Whether a reference answer is `None` or NaN, as in rows of another task."""
    return answer is None or (isinstance(answer, float) and answer != answer)
