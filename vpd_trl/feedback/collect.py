"""Calling feedback functions, whatever their form, and checking what they return."""

from __future__ import annotations

import asyncio
import atexit
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from trl.trainer.utils import (
    get_callable_name,
    is_async_callable,
    shutdown_event_loop_in_daemon,
    start_event_loop_in_daemon,
)

from .base import RESERVED_KEYWORDS, Feedback, FeedbackFn, Rollout, as_feedback, merge


class FeedbackCollector:
    """
    Calls the feedback functions on a rollout batch and merges what they say.

    Async functions run together, and beside the others, on an event loop of the collector's own thread, which lives as
    long as the process: clients that an `async` function keeps stay valid, and a loop that already runs (a notebook's)
    is left alone. So does what has an attribute `runs_on_a_thread` that is true: it must not ask the model.

    Args:
        feedback_fn: One feedback function or a list of them; of a list, the first non-blank text of each section wins.

    Raises:
        TypeError: If one of them is not callable.
        ValueError: If the list is empty.
    """

    def __init__(self, feedback_fn: FeedbackFn | Sequence[FeedbackFn]) -> None:
        functions: list[Any] = list(feedback_fn) if isinstance(feedback_fn, (list, tuple)) else [feedback_fn]
        if not functions:
            raise ValueError("feedback_fn is an empty list; pass at least one feedback function.")
        for function in functions:
            if not callable(function):
                raise TypeError(
                    f"feedback_fn must be a callable or a list of callables; got {type(function).__name__}. "
                    f"Functions that come with the library are in vpd_trl.feedback, e.g. SiblingFeedback()."
                )
        self.functions = functions
        self.names = [get_callable_name(function) for function in functions]
        self._accepts = [_accepted_keywords(function) for function in functions]
        self._columns = [set(getattr(function, "required_columns", ())) for function in functions]
        self._is_async = [is_async_callable(function) for function in functions]
        self._on_a_thread = [bool(getattr(function, "runs_on_a_thread", False)) for function in functions]
        self._running_loop: asyncio.AbstractEventLoop | None = None

    def check_columns(self, columns: Sequence[str]) -> None:
        """
        Check the dataset's columns against what the functions need.

        Raises:
            ValueError: If a column has a name that the trainer fills, or a required one is missing.
        """
        clashes = sorted(set(columns) & set(RESERVED_KEYWORDS))
        if clashes:
            raise ValueError(
                f"The dataset has columns {clashes}, but the trainer passes values of its own under these names to "
                f"feedback functions. Rename them; reserved are {', '.join(RESERVED_KEYWORDS)}."
            )
        available = set(columns) | set(RESERVED_KEYWORDS)
        for name, (_, required), needed in zip(self.names, self._accepts, self._columns, strict=True):
            missing = sorted((required - available) | (needed - set(columns)))
            if missing:
                raise ValueError(
                    f"The feedback function {name!r} needs {missing}, which the dataset has no columns for; it can "
                    f"have {', '.join(sorted(available - {'prompt'}))}."
                )

    def __call__(
        self, count: int, meanwhile: Callable[[Callable[[], bool]], None] | None = None, /, **kwargs: Any
    ) -> list[Feedback]:
        """
        The merged feedback of `count` rollouts.

        Args:
            count: How many entries each function must return.
            meanwhile: Called once nothing is left but to wait, with a function that says whether the wait is over.
            **kwargs: The keywords of [`FeedbackFn`].

        Raises:
            TypeError: If a function returns something else than a list of `str`, `Feedback` and `None`.
            ValueError: If the list has another length.
            Exception: Whatever a function raises, with its name in a note.
        """
        results: list[Any] = [None] * len(self.functions)
        running: dict[int, Any] = {}
        try:
            # What waits for others begins first, and waits while the rest works
            for i in sorted(range(len(self.functions)), key=lambda i: not (self._is_async[i] or self._on_a_thread[i])):
                call = self._bound(i, kwargs)
                if self._on_a_thread[i]:
                    results[i] = asyncio.to_thread(call)
                else:
                    with _named(self.names[i]):
                        results[i] = call()
                if inspect.isawaitable(results[i]):
                    running[i] = asyncio.run_coroutine_threadsafe(self._await(self.names[i], results[i]), self._loop())
            if running and meanwhile is not None:
                meanwhile(lambda: all(future.done() for future in running.values()))
            for i, future in running.items():
                results[i] = future.result()
        except BaseException:
            for future in running.values():
                future.cancel()
            raise
        checked = [self._check(name, result, count) for name, result in zip(self.names, results, strict=True)]
        return [merge(entries) for entries in zip(*checked, strict=True)]

    def _bound(self, i: int, kwargs: dict[str, Any]) -> Callable[[], Any]:
        """A function with those of the keywords that it takes."""
        accepted, _ = self._accepts[i]
        selected = kwargs if accepted is None else {key: kwargs[key] for key in accepted if key in kwargs}
        return partial(self.functions[i], **selected)

    @staticmethod
    async def _await(name: str, awaitable: Any) -> Any:
        with _named(name):
            return await awaitable

    def _loop(self) -> asyncio.AbstractEventLoop:
        if self._running_loop is None:
            thread, self._running_loop, ready = start_event_loop_in_daemon(name="vpd-trl-feedback")
            ready.wait()
            atexit.register(shutdown_event_loop_in_daemon, thread, self._running_loop)
        return self._running_loop

    @staticmethod
    def _check(name: str, result: Any, count: int) -> list[Feedback]:
        if isinstance(result, (str, bytes)) or not isinstance(result, Sequence):
            raise TypeError(
                f"The feedback function {name!r} returned {type(result).__name__}; expected a list with one entry per "
                f"rollout ({count} here), each a str, a Feedback or None."
            )
        if len(result) != count:
            raise ValueError(
                f"The feedback function {name!r} returned {len(result)} entries for {count} rollouts; expected one "
                "per rollout (None where there is no feedback)."
            )
        feedback = []
        for i, entry in enumerate(result):
            try:
                feedback.append(as_feedback(entry))
            except TypeError as error:
                raise TypeError(
                    f"The feedback function {name!r} must return str, Feedback or None for each rollout; {error} at "
                    f"position {i}."
                ) from None
        return feedback


class _named:
    """Adds the function's name to an exception that it raises."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if error is not None and hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"(raised by the feedback function {self.name!r})")


def _accepted_keywords(function: Callable[..., Any]) -> tuple[set[str] | None, set[str]]:
    """
    The keywords that a function takes (`None`: any) and those that it must be given.

    Raises:
        TypeError: If it has a positional-only parameter without a default.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin, a mock
        return None, set()
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise TypeError(
                f"The feedback function {get_callable_name(function)!r} is called with keywords, but its parameter "
                f"{parameter.name!r} is positional-only."
            )
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = {p.name for p in named if p.default is p.empty}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None, required
    return {p.name for p in named}, required


def group_siblings(rollouts: Sequence[Rollout], group_size: int, start: int, stop: int) -> list[list[Rollout]]:
    """
    The other rollouts of the group of each of `rollouts[start:stop]`.

    Consecutive runs of `group_size` rollouts are a group.
    """

    def others(i: int) -> list[Rollout]:
        first = i - i % group_size
        return [rollouts[j] for j in range(first, min(first + group_size, len(rollouts))) if j != i]

    return [others(i) for i in range(start, stop)]
