"""What a feedback function takes and gives."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Feedback:
    """
    Feedback on one rollout: what its teacher sees and its student doesn't.

    Attributes:
        solution: A correct solution, for the solution section of the teacher's prompt.
        critique: A text about the rollout, for the critique section.

    Blank text counts as none. Feedback without any text is false, and the rollout is then left out of both steps.
    """

    solution: str | None = None
    critique: str | None = None

    def __post_init__(self) -> None:
        for name in ("solution", "critique"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"Feedback.{name} must be a string or None; got {type(value).__name__}.")

    def __bool__(self) -> bool:
        return any(text and text.strip() for text in (self.solution, self.critique))


@dataclass(frozen=True)
class Rollout:
    """
    What a feedback function can learn of another rollout of the same group.

    Attributes:
        text: Its answer as text, thinking removed (unless `strip_thinking=False`); with tools, their calls and results
            too.
        reward: Its reward, the weighted sum over the reward functions; `None` if none of them scored it.
        success: Whether the reward is at least `success_threshold`.
    """

    text: str
    reward: float | None
    success: bool


class Generated(str):
    """
    A text that the student was asked for: a `str`, and how it ended.

    Where the prompt ended with an opened `<think>`, the text starts with that tag.

    Attributes:
        finished: Whether the student ended it itself, with one of the model's end-of-sequence tokens. False where it
            ran into `max_completion_length`, and, with an empty text, where the prompt was too long to be answered.
    """

    finished: bool

    def __new__(cls, text: str = "", finished: bool = True) -> Generated:
        self = super().__new__(cls, text)
        self.finished = finished
        return self


FeedbackList = Sequence["str | Feedback | None"]


@runtime_checkable
class FeedbackFn(Protocol):
    """
    The form of a feedback function: a function, `async` function, callable object or `functools.partial`.

    It is called with keywords, once per process and rollout batch, and returns one entry per rollout: a `str` is a
    critique, a [`Feedback`] may fill both sections of the teacher's prompt, `None` or blank text means no feedback.
    It may name just the keywords it needs, or take the rest as `**kwargs`. With N rollouts on this process:

    Args:
        prompts (`list`): The N prompts, strings or conversations, each repeated for every rollout of its group.
        completions (`list`): The N completions, as a reward function gets them.
        rewards (`list[float | None]`): The weighted sum over the reward functions; `None` where none scored.
        completion_ids (`list[list[int]]`): The sampled token ids.
        texts (`list[str]`): The completions as text, thinking removed; with tools, their calls and results too.
        successes (`list[bool]`): Whether each reward is at least `success_threshold`.
        siblings (`list[list[Rollout]]`): The other rollouts of each one's group, also those on other processes.
        generate (`Callable[[list], list[Generated]]`): Samples one answer per prompt from the current student through
            the trainer's own engine and sampling settings. With several processes all of them must call it equally
            often; the list may be empty. An answer is a `str` that knows whether it is `finished` ([`Generated`]).
        special_tokens (`SpecialTokens`): `escape` makes the special tokens in a text harmless, `fill` fills a template
            with such texts: for prompts that show what a model or somebody else wrote.
        environments (`list | None`): The environment of each rollout, with `environment_factory`.
        trainer_state (`~transformers.TrainerState`): The trainer's state.
        log_extra (`Callable[[str, list], None]`): Adds a column to the completions table.
        log_metric (`Callable[[str, float], None]`): Logs a number.
        **kwargs: Every other column of the dataset, a list of N values each.

    Columns that it needs are known from its signature. A callable object whose columns have configurable names says
    them in an attribute `required_columns`. A data set that lacks one is refused when the trainer is made.
    """

    def __call__(
        self, prompts: list[Any], completions: list[Any], rewards: list[float | None], **kwargs: Any
    ) -> FeedbackList | Awaitable[FeedbackList]: ...


# Keywords that the trainer fills: dataset columns may not have these names
RESERVED_KEYWORDS = (
    "prompts",
    "completions",
    "rewards",
    "completion_ids",
    "texts",
    "successes",
    "siblings",
    "generate",
    "special_tokens",
    "environments",
    "trainer_state",
    "log_extra",
    "log_metric",
)


def as_feedback(entry: Any) -> Feedback:
    """
    An entry of a feedback function's list as a [`Feedback`], empty for `None` and blank text.

    Raises:
        TypeError: If it is of another type.
    """
    if entry is None:
        return Feedback()
    if isinstance(entry, Feedback):
        return entry
    if isinstance(entry, str):
        return Feedback(critique=entry)
    raise TypeError(f"got {type(entry).__name__}")


def merge(entries: Sequence[Feedback]) -> Feedback:
    """One feedback out of several: in each section the first that is not blank."""

    def first(texts: list[str | None]) -> str | None:
        return next((text for text in texts if text and text.strip()), None)

    return Feedback(solution=first([e.solution for e in entries]), critique=first([e.critique for e in entries]))
