"""LiveCodeBench: problems of programming contests (Jain et al., 2403.07974)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal

from datasets import Dataset, Features, List, Value

from ..feedback import ExecutionFeedback
from ..rewards import CodeReward
from ..sandbox import CodeRunner, Limits, Sandbox
from .base import Task
from .packed_tests import half_of, sandbox_tests, unpack_tests
from .sources import Source, value_of


FIRST, LAST = "2025-02-01", "2025-04-30"  # contests of version 6
SOURCE = Source(
    "livecodebench/code_generation_lite",
    file="test6.jsonl",  # what version 6 added
    columns=(
        "question_id",
        "question_content",
        "contest_date",
        "difficulty",
        "starter_code",
        "public_test_cases",
        "private_test_cases",
        "metadata",
    ),
)
LIMITS = Limits(cpu_seconds=6.0, memory=1 << 30)
BATCH_SECONDS = 1800.0  # a program can have dozens of tests of up to 6 s
FEATURES = Features(
    {
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        "tests": Value("large_string"),  # together they can be more than Arrow's short offsets reach
        "question_id": Value("string"),
        "contest_date": Value("string"),
        "difficulty": Value("string"),
    }
)

SCRIPT = "Write a Python program that reads the input from standard input and prints the answer to standard output."
FUNCTION = "Complete the following Python code. Keep the names of the class, the method and its arguments."
REQUEST = (
    "Think about the approach first. End with the whole program in one block of code fenced by ```python and ```."
)


class LiveCodeBench(Task):
    """
    Contest problems from February to April 2025, with the feedback of a sandbox that runs the programs.

    As in SDPO, one trains on the problems that one evaluates on, but not on all that they are tested with: the split
    `"train"` has the public tests and half of each problem's hidden ones, always the same half, the split `"test"` all
    hidden ones. So numbers on it say how well training finds programs for these problems, not how well a model
    would do on others. (A problem without hidden tests has its public ones in both splits.)

    The rewards and the feedback run each program once, in a sandbox, with 6 s of processor time and 1 GiB of memory
    for each test. Feedback shows public tests; of a failure in a hidden one it says no more than that.

    Rows have the columns `prompt` (conversation), `tests` (JSON, see [`~vpd_trl.sandbox.parse_tests`]),
    `question_id`, `contest_date` (day) and `difficulty`. There are no reference answers, so no self-critique.

    Args:
        show_hidden: Whether feedback shows the hidden tests of the training split too, as SDPO's does.
        isolation: Of the sandbox, "bubblewrap" or "limits"; see [`~vpd_trl.sandbox.Sandbox`].
        path: A file, or a folder of files, in the data set's own columns, instead of the Hub's data set.
        revision: A branch, tag or commit of the Hub's data set; `None`: the newest.
    """

    name = "livecodebench"
    samples = 4
    feedback_source = "environment"
    answer_column = None
    saved_columns = ("question_id", "contest_date", "difficulty")  # the tests would be most of the results

    def __init__(
        self,
        show_hidden: bool = False,
        isolation: Literal["bubblewrap", "limits"] = "bubblewrap",
        path: str | os.PathLike[str] | None = None,
        revision: str | None = None,
    ) -> None:
        self.show_hidden, self.isolation, self.path, self.revision = show_hidden, isolation, path, revision

    def load(self, split: str) -> Dataset:
        """
        The rows of `"train"` or `"test"`: the same problems, with other tests.

        Raises:
            ValueError: If there is no such split, a column is missing or a value of another kind, no problem is left,
                or a problem's tests can't be read.
            FileNotFoundError: If there are no files at `path`.
        """
        self._check_split(split)
        rows = SOURCE.load(self.path, self.revision)
        days = [_day(date) for date in rows["contest_date"]]
        kept = [i for i, day in enumerate(days) if FIRST <= day <= LAST]
        if not kept:
            raise ValueError(
                f"Of {len(rows)} problems none is of a contest from {FIRST} to {LAST}; they are from "
                f"{min(days, default='never')} to {max(days, default='never')}."
            )
        return rows.select(kept).map(
            _problem,
            fn_kwargs={"split": split},
            remove_columns=list(SOURCE.columns),
            features=FEATURES,
            writer_batch_size=8,
            desc=f"LiveCodeBench, {split}",
        )

    @cached_property
    def runner(self) -> CodeRunner:
        """
        What runs the programs, for the reward and the feedback.

        Raises:
            SandboxUnavailable: If there is no such isolation here.
        """
        return CodeRunner(Sandbox(isolation=self.isolation, limits=LIMITS, batch_seconds=BATCH_SECONDS))

    @property
    def hub_dataset(self) -> str | None:
        return SOURCE.repo if self.path is None else None

    @cached_property
    def reward_funcs(self) -> Callable:
        """1 for a program that passes all tests of its row, else 0."""
        return CodeReward(self.runner)

    @cached_property
    def environment_feedback(self) -> Callable:
        """How the program fared in the tests."""
        return ExecutionFeedback(self.runner, show_hidden=self.show_hidden)


def _day(date: Any) -> str:
    return str(date)[:10]  # of "2025-02-01T00:00:00", and of the datetime that readers of JSON make of it


def _problem(row: Mapping[str, Any], split: str) -> dict[str, Any]:
    place = f"Problem {row['question_id']}"
    content = value_of(row, "question_content", "a text that is not empty", place).strip()
    starter = value_of(row, "starter_code", "a text", place).rstrip()
    packed = [value_of(row, name, "a text", place) for name in ("public_test_cases", "private_test_cases")]
    text = "{}" if row["metadata"] is None else value_of(row, "metadata", "a text", place) or "{}"
    try:
        metadata = json.loads(text)
        if not isinstance(metadata, dict):
            raise ValueError(f"metadata must be the JSON of a dictionary; got {text!r:.200}.")
        function = metadata.get("func_name")
        if function is not None:
            value_of(metadata, "func_name", "a text", "metadata")
        public, hidden = map(unpack_tests, packed)
        if split == "train":
            hidden = half_of(hidden, row["question_id"])
        tests = sandbox_tests(public if split == "train" or not hidden else [], hidden, function)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    task = SCRIPT if function is None else f"{FUNCTION}\n\n```python\n{starter}\n```"
    return {
        "prompt": [{"role": "user", "content": f"{content}\n\n{task}\n\n{REQUEST}"}],
        "tests": tests,
        "question_id": row["question_id"],
        "contest_date": _day(row["contest_date"]),
        "difficulty": row["difficulty"],
    }
