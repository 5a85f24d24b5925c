r"""Mathematics: DAPO's problems to train on (Yu et al., 2503.14476), competitions and MATH-500 to test on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from decimal import Decimal
from functools import cached_property
from itertools import chain
from typing import Any

from datasets import Dataset

from ..rewards import MathReward, extract_math_answer
from ..rewards.math_text import normal_form, words_of
from .base import Task
from .sources import Source, value_of


SOURCES = {
    "train": Source(
        "BytedTsinghua-SIA/DAPO-Math-17k", columns=("prompt", "reward_model"), split="train", name="train"
    ),
    "math500": Source("HuggingFaceH4/MATH-500", columns=("problem", "answer"), name="math500"),
    "aime24": Source("HuggingFaceH4/aime_2024", columns=("problem", "answer"), split="train", name="aime24"),
    "aime25": Source("math-ai/aime25", columns=("problem", "answer"), name="aime25"),
    "amc23": Source("math-ai/amc23", columns=("question", "answer"), name="amc23"),
}
REQUEST = "Reason step by step, then state the final answer once, as \\boxed{…}."

# DAPO's prompts ask for a last line "Answer: …", which is not what is graded here
_DAPO_OPENING = re.compile(r"\s*Solve the following math problem step by step\.[^\n]*\n+")
_DAPO_CLOSING = re.compile(r"\s*Remember to put your answer on its own line after [^\n]*\s*$")


class Mathematics(Task):
    r"""
    Competition problems with short answers in a box.

    The split `"train"` is DAPO-Math-17k; its 1.8 million rows are some 17,000 problems a hundred times over, of which
    each is taken once, and without the instructions around it. `"math500"`, `"aime24"`, `"aime25"` and `"amc23"` are
    test splits. All are asked in the same words, for an answer in `\boxed{}`.

    Rows have the columns `prompt` (conversation) and `answer`.

    Args:
        strict: Whether only a box counts as an answer, as in the paper.
        path: A folder instead of the Hub's data sets: for each split that is loaded a file such as `train.parquet` or
            `math500.jsonl`, or a folder of files with that name, in the columns of the data set.
        revision: A branch, tag or commit of a Hub's data set, by split, such as `{"train": "refs/convert/parquet"}`;
            `None`: the newest ones.

    Raises:
        ValueError: If `revision` names a split that there is not.
        ImportError: If math-verify is not installed.
    """

    name = "math"
    test_splits = ("math500", "aime24", "aime25", "amc23")
    samples = 4

    def __init__(
        self,
        strict: bool = True,
        path: str | os.PathLike[str] | None = None,
        revision: dict[str, str] | None = None,
    ) -> None:
        self.strict, self.path, self.revision = strict, path, dict(revision or {})
        for split in self.revision:
            self._check_split(split)

    def load(self, split: str) -> Dataset:
        """
        The rows of a split.

        Raises:
            ValueError: If there is no such split, a column is missing, a value is of another kind (a reference answer
                is a number or a text), or there are no rows.
            FileNotFoundError: If there are no files of the split at `path`.
        """
        self._check_split(split)
        source = SOURCES[split]
        rows = source.load(self.path, self.revision.get(split))
        place = f"{self.path or source.repo}, split {split}"
        pairs = _dapo_pairs(rows, place) if split == "train" else _pairs(rows, source.columns, place)
        if not pairs:
            raise ValueError(f"There are no problems in the rows of {place}.")
        return Dataset.from_list([_row(problem, answer) for problem, answer in pairs])

    @property
    def hub_dataset(self) -> str | None:
        return SOURCES["train"].repo if self.path is None else None

    @cached_property
    def reward_funcs(self) -> Callable:
        """1 for an answer that equals the reference, else 0."""
        return MathReward(strict=self.strict)

    @property
    def answer_fn(self) -> Callable[[str], str | None]:
        """The answer that a text states, in a form in which the commonest ways to write the same are the same."""
        return self._answer

    def _answer(self, text: str) -> str | None:
        found = extract_math_answer(text, strict=self.strict)
        return None if found is None else normal_answer(found)


def normal_answer(answer: str) -> str:
    r"""
    An answer in a form for a majority's votes: `\dfrac{1}{2}`, `\frac 12` and `1/2` are one, as are `007` and `7.0`.

    What is equal only by calculation (`\sqrt{4}` and `2`) stays apart.

    Args:
        answer: The answer, without its box.
    """
    words = words_of(answer)
    if words is not None:
        return words
    text = normal_form(answer)
    text = re.sub(r"\\(?:left|right|displaystyle|limits)(?![a-zA-Z])|\\[,;:! ]|\\?\$|~|\\quad", "", text)
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*\{\s*(\w+)\s*\}\s*\{\s*(\w+)\s*\}", r"\1/\2", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "", text)
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{\s*([^{}]*?)\s*\}", r"\1", text)
    text = re.sub(r"\s+", "", text).replace("\\%", "%")
    if re.fullmatch(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
        text = text.replace(",", "")
    if re.fullmatch(r"[+-]?(?:\d+\.?\d*|\.\d+)", text):
        text = f"{Decimal(text).normalize():f}" if len(text) < 28 else text
    return "0" if text == "-0" else text


def _row(problem: str, answer: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": f"{problem.strip()}\n\n{REQUEST}"}], "answer": str(answer)}


def _pairs(rows: Dataset, columns: tuple[str, ...], place: str) -> list[tuple[str, Any]]:
    kinds = ("a text that is not empty", "a number or a text")
    problems, answers = (
        [value_of(row, column, kind, f"Row {i} of {place}") for i, row in enumerate(rows)]
        for column, kind in zip(columns, kinds, strict=True)
    )
    return list(zip(problems, answers, strict=True))


def _dapo_pairs(rows: Dataset, place: str) -> list[tuple[str, Any]]:
    """Problems and answers of DAPO-Math, each once, in the order of their first appearance."""
    found: dict[str, Any] = {}
    batches = rows.iter(batch_size=10_000)
    columns = chain.from_iterable(zip(batch["prompt"], batch["reward_model"], strict=True) for batch in batches)
    for i, (prompt, reward_model) in enumerate(columns):
        row, where = {"prompt": prompt, "reward_model": reward_model}, f"Row {i} of {place}"
        message = value_of(row, "prompt", "a list of messages", where)[-1]
        text = value_of(message, "content", "a text that is not empty", f"{where}: prompt")
        if text not in found:
            graded = value_of(row, "reward_model", "a dictionary", where)
            found[text] = value_of(graded, "ground_truth", "a number or a text", f"{where}: reward_model")
    return [(_DAPO_CLOSING.sub("", _DAPO_OPENING.sub("", text, count=1)), answer) for text, answer in found.items()]
