"""A task: rows to prompts, and what scores a completion, speaks of it and measures a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from datasets import Dataset

from ..evaluation import Evaluation, Sampling
from ..feedback import SelfCritiqueFeedback, SiblingFeedback


FEEDBACK_SOURCES = ("environment", "siblings", "self_critique")


class Task(ABC):
    """
    What a trainer and an evaluation need of a task.

    A subclass says how rows become prompts ([`load`]) and what scores completions (`reward_funcs`); the rest has
    defaults.

    ```python
    >>> from vpd_trl import VPDConfig, VPDTrainer
    >>> from vpd_trl.tasks import load_task

    >>> task = load_task("sciknoweval", domain="biology")
    >>> trainer = VPDTrainer(
    ...     "Qwen/Qwen3-1.7B",
    ...     reward_funcs=task.reward_funcs,
    ...     feedback_fn=task.feedback("siblings"),
    ...     args=VPDConfig(output_dir="qwen3-biology"),
    ...     train_dataset=task.load("train"),
    ...     evaluation=task.evaluation(),
    ... )
    ```

    Attributes:
        name: Of the task, in logs and results.
        train_split: The split that is trained on; `None` if there is none.
        test_splits: The splits that models are evaluated on.
        samples: k of the paper's evaluation.
        feedback_source: Where feedback comes from unless told otherwise: one of `"environment"`, `"siblings"` and
            `"self_critique"`.
        answer_column: The column with the reference answer, for self-critique; `None` if there is none.
        saved_columns: The columns that an evaluation saves beside each problem's samples; `None`: all but the prompt.
    """

    name: ClassVar[str]
    train_split: str | None = "train"
    test_splits: tuple[str, ...] = ("test",)
    samples: int = 16
    feedback_source: str = "siblings"
    answer_column: str | None = "answer"
    saved_columns: tuple[str, ...] | None = None

    @abstractmethod
    def load(self, split: str) -> Dataset:
        """
        The rows of a split: the column `prompt`, and what the reward and feedback functions need.

        Raises:
            ValueError: If there is no such split.
        """

    @property
    @abstractmethod
    def reward_funcs(self) -> Callable | Sequence[Callable]:
        """The reward functions, in TRL's form. Each success must be worth at least `success_threshold`."""

    @property
    def hub_dataset(self) -> str | None:
        """The name on the Hub of the data set that is trained on, for model cards; `None` if it is not from there."""
        return None

    @property
    def environment_feedback(self) -> Callable | None:
        """The feedback function that speaks for the task's environment; `None` if it has nothing to say."""
        return None

    @property
    def answer_fn(self) -> Callable[[str], str | None] | None:
        """Finds the answer in a completion's text, for majority@k; `None` for tasks without short answers."""
        return None

    def feedback(self, source: str | None = None) -> Callable:
        """
        The feedback function of a source.

        Args:
            source: `"environment"`, `"siblings"` or `"self_critique"`; `None`: `feedback_source`.

        Raises:
            ValueError: If there is no such source, or the task doesn't have it.
        """
        source = self.feedback_source if source is None else source
        if source == "siblings":
            return SiblingFeedback()
        if source == "self_critique" and self.answer_column is not None:
            return SelfCritiqueFeedback(answer_column=self.answer_column)
        if source == "environment" and self.environment_feedback is not None:
            return self.environment_feedback
        if source not in FEEDBACK_SOURCES:
            raise ValueError(f"feedback must be one of {', '.join(FEEDBACK_SOURCES)}; got {source!r}.")
        reason = "no reference answers" if source == "self_critique" else "an environment that says nothing"
        raise ValueError(f"The task {self.name} has {reason}, so feedback can't be {source!r}.")

    def evaluation(
        self,
        *,
        k: int | None = None,
        sampling: Sampling | None = None,
        splits: Sequence[str] | None = None,
        limit: int | None = None,
        **options: Any,
    ) -> Evaluation | dict[str, Evaluation]:
        """
        The paper's evaluation of the task: one, or one per split by name if there are several.

        Args:
            k: Samples per problem; `None`: `samples`.
            sampling: How they are sampled; `None`: as in the paper.
            splits: The splits; `None`: `test_splits`.
            limit: Evaluate on this many problems, the first ones of each split; `None`: all.
            **options: Passed to [`~vpd_trl.evaluation.Evaluation`].

        Raises:
            ValueError: If a split is unknown, or a number is out of its range.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1; got {limit}.")
        names = list(self.test_splits if splits is None else splits)
        if not names:
            raise ValueError(f"splits is empty; the task {self.name} has {', '.join(self.test_splits)}.")
        evaluations = {}
        for split in names:
            rows = self.load(split)
            if limit is not None:
                rows = rows.select(range(min(limit, len(rows))))
            evaluations[split] = Evaluation(
                rows,
                self.reward_funcs,
                k=self.samples if k is None else k,
                sampling=sampling,
                answer_fn=self.answer_fn,
                name=self.name if len(names) == 1 else split,
                **{"save_columns": self.saved_columns, **options},
            )
        return evaluations[names[0]] if len(names) == 1 else evaluations

    def _check_split(self, split: str) -> None:
        known = [name for name in (self.train_split, *self.test_splits) if name is not None]
        if split not in known:
            raise ValueError(f"The task {self.name} has the splits {', '.join(known)}; got {split!r}.")
