"""Feedback functions that are written for one rollout."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from trl.trainer.utils import get_callable_name, is_async_callable

from .base import Feedback


# What the trainer passes for all rollouts, and what a function of one rollout calls its own part
_SINGULAR = {
    "prompts": "prompt",
    "completions": "completion",
    "rewards": "reward",
    "completion_ids": "completion_ids",
    "texts": "text",
    "successes": "success",
    "siblings": "siblings",
    "environments": "environment",
}
_SHARED = ("special_tokens", "trainer_state", "log_metric")
_NOT_FOR_ONE = ("generate", "log_extra")


class EachRollout:
    """
    Asks a function about each rollout by itself, many at a time: what waits for one second a rollout takes about one
    second for `max_concurrency` rollouts of a process.

    Example:

    ```python
    >>> def look_up(text, answer):  # one rollout's; may be `async`
    ...     return None if text == answer else wiki.explain(answer)

    >>> feedback_fn = EachRollout(look_up, max_concurrency=16)
    ```

    Args:
        function (`Callable`):
            A function, or an `async` one, of one rollout that returns a `str`, a [`Feedback`] or `None`. It names what
            it needs of `prompt`, `completion`, `reward`, `completion_ids`, `text`, `success`, `siblings`,
            `environment`, `special_tokens`, `trainer_state`, `log_metric` and the columns of the data set. A plain
            function runs on several threads at a time, so it must not change what it shares with itself.
        max_concurrency (`int`, *optional*, defaults to `256`):
            Most calls at a time.

    Raises:
        TypeError: If it is not callable, or takes keywords that are not named.
        ValueError: If it asks for what only a function of the whole batch can have (`generate`, `log_extra`), or
            `max_concurrency` is not a positive whole number.
    """

    def __init__(self, function: Callable[..., Any], max_concurrency: int = 256) -> None:
        if not callable(function):
            raise TypeError(f"EachRollout takes a function of one rollout; got {type(function).__name__}.")
        if isinstance(max_concurrency, bool) or not isinstance(max_concurrency, int) or max_concurrency < 1:
            raise ValueError(f"max_concurrency must be a whole number of at least 1; got {max_concurrency!r}.")
        self.function = function
        self.max_concurrency = max_concurrency
        self.__name__ = get_callable_name(function)
        parameters = inspect.signature(function).parameters.values()
        if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in parameters):
            raise TypeError(
                f"{self.__name__!r} must name each keyword that it takes, such as text and answer, so that it is known "
                f"which columns it needs; got {inspect.signature(function)}."
            )
        self._names = [p.name for p in parameters]
        refused = sorted({*_NOT_FOR_ONE, *(set(_SINGULAR) - set(_SINGULAR.values()))} & set(self._names))
        if refused:
            raise ValueError(
                f"{self.__name__!r} is asked about one rollout, so it can't have {', '.join(refused)}; it can have "
                f"{', '.join((*_SINGULAR.values(), *_SHARED))} and columns of the data set."
            )
        known = {*_SINGULAR.values(), *_SHARED}
        needed = [p.name for p in parameters if p.default is p.empty]
        self.required_columns = tuple(name for name in needed if name not in known)

    async def __call__(self, prompts: list[Any], **kwargs: Any) -> list[str | Feedback | None]:
        available = {_SINGULAR.get(name, name): values for name, values in {"prompts": prompts, **kwargs}.items()}
        names = [name for name in self._names if available.get(name) is not None]
        rows = [
            {name: available[name] if name in _SHARED else available[name][i] for name in names}
            for i in range(len(prompts))
        ]
        is_async = is_async_callable(self.function)
        return await (self._awaited(rows) if is_async else self._on_threads(rows))

    async def _awaited(self, rows: list[dict[str, Any]]) -> list[Any]:
        limit = asyncio.Semaphore(self.max_concurrency)

        async def ask(row: dict[str, Any]) -> Any:
            async with limit:
                return await self.function(**row)

        return await asyncio.gather(*map(ask, rows))

    async def _on_threads(self, rows: list[dict[str, Any]]) -> list[Any]:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(min(self.max_concurrency, max(len(rows), 1))) as pool:
            return await asyncio.gather(*(loop.run_in_executor(pool, partial(self.function, **row)) for row in rows))
