"""SciKnowEval: multiple-choice questions of four sciences (Feng et al., 2406.09098)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from datasets import Dataset

from ..rewards import ChoiceReward, extract_choice
from .base import Task
from .sources import Source, split_rows, value_of


DOMAINS = {"biology": "Biology", "chemistry": "Chemistry", "material": "Material", "physics": "Physics"}
LEVEL = "L3"
TYPES = ("mcq-4-choices", "mcq-2-choices")
LETTERS = "ABCD"
SOURCE = Source(
    "hicai-zju/SciKnowEval",
    configuration="v2",  # the one that there is; its only split is called test
    columns=("question", "choices", "answerKey", "type", "domain", "details"),
)

SYSTEM = (
    "You answer multiple-choice questions. Exactly one option is right. Write your thoughts first and your choice "
    "last, in this form:\n"
    "<reasoning>\nyour thoughts\n</reasoning>\n<answer>\nLETTER\n</answer>\n"
    "Between the answer tags there is the letter of one option and nothing else."
)
REQUEST = "Think step by step."


class SciKnowEval(Task):
    """
    Questions of one domain at SciKnowEval's reasoning level (L3), nine tenths to train on and one tenth to test on.

    The data set has a test split alone. As in SDPO, its questions with two or four options are divided at random with
    seed 42, domain by domain: 450/50 questions of biology, 1,890/210 of chemistry, 841/94 of materials and 720/80 of
    physics, as that code counts them.

    Rows have the columns `prompt` (conversation), `answer` (a letter) and `domain`.

    Args:
        domain: `"biology"`, `"chemistry"`, `"material"` or `"physics"`.
        strict: Whether only the letter in the last `<answer>` tag counts, as in SDPO, instead of anything that a
            reader would take for an answer. A model that doesn't know the form yet learns sooner without.
        path: A file, or a folder of files, in the data set's own columns, instead of the Hub's data set.
        revision: A branch, tag or commit of the Hub's data set; `None`: the newest.

    Raises:
        ValueError: If the domain is unknown.
        TypeError: If `strict` is not True or False.
    """

    name = "sciknoweval"
    samples = 16

    def __init__(
        self,
        domain: str,
        strict: bool = True,
        path: str | os.PathLike[str] | None = None,
        revision: str | None = None,
    ) -> None:
        if domain not in DOMAINS:
            raise ValueError(f"domain must be one of {', '.join(DOMAINS)}; got {domain!r}.")
        self.domain, self.strict, self.path, self.revision = domain, strict, path, revision
        self._reward = ChoiceReward(LETTERS, strict=strict)

    def load(self, split: str) -> Dataset:
        """
        The rows of `"train"` or `"test"`.

        Raises:
            ValueError: If there is no such split, a column is missing or a value of another kind, no question is left,
                or one has no right option.
            FileNotFoundError: If there are no files at `path`.
        """
        self._check_split(split)
        return split_rows(self._questions, test_share=0.1, seed=42, split=split)

    @cached_property
    def _questions(self) -> Dataset:
        rows = SOURCE.load(self.path, self.revision)
        places = [f"Row {i} of {self.path or SOURCE.repo}" for i in range(len(rows))]
        kept = [(row, place) for row, place in zip(rows, places, strict=True) if self._is_wanted(row, place)]
        if not kept:
            domains = sorted({str(row["domain"]) for row in rows})
            raise ValueError(
                f"Of {len(rows)} rows none is of the domain {DOMAINS[self.domain]}, level {LEVEL} and type "
                f"{' or '.join(TYPES)}; the domains there are {', '.join(domains) or 'none'}."
            )
        return Dataset.from_list([_question(row, place) for row, place in kept])

    def _is_wanted(self, row: Mapping[str, Any], place: str) -> bool:
        level = None if row["details"] is None else value_of(row, "details", "a dictionary", place).get("level")
        return row["domain"] == DOMAINS[self.domain] and level == LEVEL and row["type"] in TYPES

    @property
    def hub_dataset(self) -> str | None:
        return SOURCE.repo if self.path is None else None

    @property
    def reward_funcs(self) -> Callable:
        """1 for the right letter, else 0."""
        return self._reward

    @property
    def answer_fn(self) -> Callable[[str], str | None]:
        """The letter that a text settles on, read as the reward reads it."""
        return self._letter

    def _letter(self, text: str) -> str | None:
        return extract_choice(text, LETTERS, strict=self.strict)


def _question(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    question = value_of(row, "question", "a text that is not empty", place)
    choices = value_of(row, "choices", "a dictionary", place)
    labels, texts = (value_of(choices, name, "a list of texts", f"{place}: choices") for name in ("label", "text"))
    answer = row["answerKey"]
    if answer not in labels or len(labels) != len(texts) or not set(labels) <= set(LETTERS):
        raise ValueError(
            f"{place}: a question needs options with the letters {', '.join(LETTERS)}, one of them as answerKey; it "
            f"has the labels {labels}, {len(texts)} texts and the answerKey {answer!r}: {question[:200]!r}."
        )
    options = "\n".join(f"{label}: {text}" for label, text in zip(labels, texts, strict=True))
    user = f"{question}\n\n{options}\n\n{REQUEST}"
    return {
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}],
        "answer": answer,
        "domain": row["domain"],
    }
