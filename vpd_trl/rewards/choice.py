"""Rewards of multiple-choice questions."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ..text import strip_thinking
from .choice_text import settled_choice
from .inputs import ANSWER_TAG, answer_texts, check_reward_arguments, is_missing, reference_answers


_REFERENCE = re.compile(r"\(?([A-Za-z])[).:]?")


def extract_choice(text: str, choices: str | Sequence[str] = "ABCD", *, strict: bool = False) -> str | None:
    """
    The choice that a text settles on, as an upper-case letter, or `None` if there is none.

    The last commitment counts: "the answer is B", "Answer: B", "I'd go with B", "B is the best choice", a box
    (`\\boxed{B}`), an `<answer>` tag. Without any, hints count, as long as they agree: "B is correct", "it's B", a
    first or last line that is only "B" or "B) copper". Negations, suppositions, questions, several choices at once
    ("A or C"), the second best and lists of the options settle nothing, what is taken back ("No, that's wrong.") does
    so no longer, and a letter in words ("vitamin C", "a car") is no choice.
    Where a text is unclear, no choice is found rather than a wrong one. Words are read in English, and the commonest
    statements in Chinese. Thinking (`<think>…</think>`) is not read.

    Args:
        text (`str`):
            The text of a completion.
        choices (`str` or sequence of `str`, *optional*, defaults to `"ABCD"`):
            The letters of the choices, at least two.
        strict (`bool`, *optional*, defaults to `False`):
            Whether only the last `<answer>X</answer>` counts, X being exactly one of the choices.

    Raises:
        ValueError: If the choices are not different letters.
    """
    letters = _letters(choices)
    text = strip_thinking(text)
    if not strict:
        return settled_choice(text, letters)
    answers = ANSWER_TAG.findall(text)
    answer = answers[-1].strip() if answers else ""
    return answer if len(answer) == 1 and answer in letters else None


class ChoiceReward:
    """
    Reward of multiple-choice questions: 1 if the completion settles on the right choice, else 0.

    [`extract_choice`] finds the choice. `choice_reward` is `ChoiceReward()`. A row whose answer is `None` gets no
    reward (`None`), so that data sets of several tasks can be mixed.

    Adds the found choices to the table of completions as `choice`, and logs `rewards/{name}/answered`, the share of
    completions in which one was found.

    Args:
        choices (`str` or sequence of `str`, *optional*, defaults to `"ABCD"`):
            The letters of the choices.
        strict (`bool`, *optional*, defaults to `False`):
            Whether only the last `<answer>X</answer>` counts, as in SDPO's reward for SciKnowEval, instead of
            anything that a reader would take for an answer.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column of the data set that holds the right choice: a letter of either case, also as "(B)", "B." or "B)".
            Numbers are refused, since some data sets count from 0 and some from 1.
        opens_thinking (`bool`, *optional*, defaults to `False`):
            Whether the chat template ends the prompt inside a `<think>` block, as those of some thinking models do. A
            completion without `</think>` then has no answer. String prompts that end with `<think>` are recognised.
        name (`str`, *optional*, defaults to `"choice_reward"`):
            Name in logs.

    Raises:
        ValueError, TypeError: If an argument is not one of these.
    """

    def __init__(
        self,
        choices: str | Sequence[str] = "ABCD",
        strict: bool = False,
        answer_column: str = "answer",
        opens_thinking: bool = False,
        name: str = "choice_reward",
    ) -> None:
        check_reward_arguments(answer_column, name, strict=strict, opens_thinking=opens_thinking)
        self.choices = _letters(choices)
        self.strict = strict
        self.answer_column = answer_column
        self.opens_thinking = opens_thinking
        self.required_columns = (answer_column,)
        self.__name__ = name

    def __call__(
        self,
        completions: Sequence[Any],
        answer: Sequence[str | None] | None = None,
        *,
        prompts: Sequence[Any] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        given = reference_answers(self.__name__, self.answer_column, answer, columns, len(completions))
        right = [self._right(row, value) for row, value in enumerate(given)]
        texts = answer_texts(completions, prompts, self.opens_thinking)
        found = [extract_choice(text, self.choices, strict=self.strict) for text in texts]
        if log_extra is not None:
            log_extra("choice", found)
        if log_metric is not None:
            for choice, letter in zip(found, right, strict=True):
                if letter is not None:
                    log_metric(f"rewards/{self.__name__}/answered", float(choice is not None))
        return [None if r is None else float(f == r) for f, r in zip(found, right, strict=True)]

    def _right(self, row: int, value: Any) -> str | None:
        """The right choice as an upper-case letter, `None` if the row has none."""
        if is_missing(value):
            return None
        match = _REFERENCE.fullmatch(value.strip()) if isinstance(value, str) else None
        letter = match[1].upper() if match else ""
        if not letter or letter not in self.choices:
            raise ValueError(
                f"{self.__name__} needs one of the letters {', '.join(self.choices)} in the column "
                f"{self.answer_column!r}; row {row} of the batch has {value!r}. Other choices are set by "
                "ChoiceReward(choices=...). An index can be made a letter by data_set.map, e.g. 'ABCD'[index]."
            )
        return letter


def _letters(choices: str | Sequence[str]) -> str:
    letters = [c.upper() if isinstance(c, str) else "" for c in choices]
    single = all(len(c) == 1 and c.isascii() and c.isalpha() for c in letters)
    if len(letters) < 2 or not single or len(set(letters)) < len(letters):
        raise ValueError(f"choices must be at least two different letters, such as 'ABCD'; got {choices!r}.")
    return "".join(letters)


choice_reward = ChoiceReward()
