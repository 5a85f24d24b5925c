"""Scoring completions with reward functions, called as a trainer calls them."""

from __future__ import annotations

import asyncio
import atexit
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerState
from trl.trainer.utils import get_callable_name, shutdown_event_loop_in_daemon, start_event_loop_in_daemon

from ..prompts import Prompt
from .engines import Sample


# What reward functions are given beside the columns of the data set
_KEYWORDS = ("prompts", "completions", "trainer_state", "log_extra", "log_metric", "environments")
# Columns that TRL keeps to itself
_DROPPED = ("prompt", "completion", "completion_ids")


class Grader:
    """
    Calls the reward functions on all samples of some problems and adds their rewards up.

    Async functions run together on an event loop of the grader's own thread, so clients that one keeps stay valid.

    Args:
        reward_funcs: One reward function in TRL's form or a list of them, plain or `async`.
        weights: One per function; `None`: 1 each.

    Raises:
        TypeError: If one of them is not a function, such as a reward model.
        ValueError: If there are none, or not as many weights.
    """

    def __init__(self, reward_funcs: Callable | Sequence[Callable], weights: Sequence[float] | None = None) -> None:
        self.functions: list[Any] = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        if not self.functions:
            raise ValueError("reward_funcs is an empty list; pass at least one reward function.")
        for function in self.functions:
            if not callable(function) or hasattr(function, "parameters"):
                raise TypeError(
                    f"An evaluation needs reward functions, callables in TRL's form; got {type(function).__name__}. Put "
                    "a reward model into a function."
                )
        self.names = [get_callable_name(function) for function in self.functions]
        self.options = [_options(function) for function in self.functions]
        self.weights = [1.0] * len(self.functions) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.functions):
            raise ValueError(f"There are {len(self.functions)} reward functions but {len(self.weights)} weights.")
        self._loop: asyncio.AbstractEventLoop | None = None

    @staticmethod
    def check_columns(columns: Sequence[str]) -> None:
        """
        Check the data set's columns.

        Raises:
            ValueError: If there is no column `prompt`, or one has a name that reward functions get something else by.
        """
        if "prompt" not in columns:
            raise ValueError(f"The data set needs a column 'prompt'; it has {', '.join(columns) or 'none'}.")
        clashes = sorted(set(columns) & set(_KEYWORDS))
        if clashes:
            raise ValueError(
                f"The data set has columns {clashes}, names by which reward functions get something else. Rename them."
            )

    def __call__(
        self, rows: Sequence[dict[str, Any]], samples: Sequence[Sequence[Sample]], trainer_state: TrainerState | None
    ) -> list[list[float | None]]:
        """
        Score the samples of P problems.

        Args:
            rows: (P,) rows of the data set.
            samples: (P, k) completions.
            trainer_state: Passed on; a new one if `None`.

        Returns:
            (P, k) weighted sums of the rewards; `None` where no function scored a sample.

        Raises:
            TypeError, ValueError: If a function returns something else than one number or `None` per sample.
            Exception: Whatever a function raises.
        """
        if not rows:
            return []
        repeated = [(row, sample) for row, group in zip(rows, samples, strict=True) for sample in group]
        kwargs: dict[str, Any] = {name: [row[name] for row, _ in repeated] for name in rows[0] if name not in _DROPPED}
        kwargs |= {
            "prompts": [row["prompt"] for row, _ in repeated],
            "completions": [completion_of(row["prompt"], sample.text) for row, sample in repeated],
            "completion_ids": [list(sample.ids) for _, sample in repeated],
            "trainer_state": TrainerState() if trainer_state is None else trainer_state,
            "log_extra": lambda column, values: None,
            "log_metric": lambda name, value: None,
        }
        results = self._finished([function(**kwargs) for function in self.functions])
        rewards = [_as_rewards(name, result, len(repeated)) for name, result in zip(self.names, results, strict=True)]
        totals = iter([self._total(values) for values in zip(*rewards, strict=True)])
        return [[next(totals) for _ in group] for group in samples]

    def _total(self, rewards: Sequence[float | None]) -> float | None:
        scored = [weight * reward for weight, reward in zip(self.weights, rewards, strict=True) if reward is not None]
        return sum(scored) if scored else None

    def _finished(self, results: list[Any]) -> list[Any]:
        """The results, those that are awaitable awaited."""
        waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
        if not waiting:
            return results
        if self._loop is None:
            thread, self._loop, ready = start_event_loop_in_daemon(name="vpd-trl-evaluation")
            ready.wait()
            atexit.register(shutdown_event_loop_in_daemon, thread, self._loop)

        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*(results[i] for i in waiting))

        for i, result in zip(
            waiting, asyncio.run_coroutine_threadsafe(all_of_them(), self._loop).result(), strict=True
        ):
            results[i] = result
        return results


def completion_of(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    """A completion as reward functions get it: a string after a string, a message after a conversation."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _as_rewards(name: str, result: Any, count: int) -> list[float | None]:
    if isinstance(result, (str, bytes)) or not hasattr(result, "__len__"):
        raise TypeError(
            f"The reward function {name!r} returned {type(result).__name__}; expected a list of {count} numbers."
        )
    if len(result) != count:
        raise ValueError(f"The reward function {name!r} returned {len(result)} rewards for {count} completions.")
    rewards = [None if reward is None else float(reward) for reward in result]
    if any(reward is not None and math.isinf(reward) for reward in rewards):
        raise ValueError(f"The reward function {name!r} returned an infinite reward, which has no mean.")
    return [None if reward is None or math.isnan(reward) else reward for reward in rewards]


def _options(function: Any) -> dict[str, Any]:
    """The flags and texts that a reward function's object, or its `functools.partial`, was made with."""
    given = getattr(function, "keywords", None) or getattr(function, "__dict__", {})
    return {
        name: value
        for name, value in sorted(given.items())
        if not name.startswith("_") and isinstance(value, (bool, str))
    }
