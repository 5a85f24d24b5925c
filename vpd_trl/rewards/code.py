"""The reward of a program: whether it passes the tests."""

from __future__ import annotations

from typing import Any

from ..sandbox.outcome import Status
from ..sandbox.runner import CodeRunner, default_runner


class CodeReward:
    """
    The reward of programs: 1 for one that passes all tests of its row, hidden ones too, else 0.

    A row without tests has no reward, nor has a program that was not run, through no fault of its own: the deadline
    of the batch, or a sandbox that could not start.

    Example:

    ```python
    >>> from vpd_trl.feedback import ExecutionFeedback
    >>> from vpd_trl.rewards import CodeReward
    >>> from vpd_trl.sandbox import CodeRunner, Limits, Sandbox

    >>> runner = CodeRunner(Sandbox(limits=Limits(cpu_seconds=2.0)))
    >>> reward, feedback = CodeReward(runner), ExecutionFeedback(runner)  # each program runs once
    ```

    Args:
        runner ([`~vpd_trl.sandbox.CodeRunner`], *optional*):
            Runs the programs. `None`: the one that `code_reward` and `ExecutionFeedback()` use.
        partial (`bool`, *optional*, defaults to `False`):
            Whether the reward is the share of tests that passed. Tests that were not run, after a time-out, count as
            failed.

    Raises:
        SandboxUnavailable: If there is no bubblewrap here and no runner was passed.
        TypeError: If an argument is not one of these.
    """

    def __init__(self, runner: CodeRunner | None = None, partial: bool = False) -> None:
        if runner is not None and not isinstance(runner, CodeRunner):
            raise TypeError(f"runner must be a CodeRunner or None; got {type(runner).__name__}.")
        if not isinstance(partial, bool):
            raise TypeError(f"partial must be True or False; got {partial!r}.")
        self.runner = default_runner() if runner is None else runner
        self.partial = partial
        self.__name__ = "code_reward"

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        tests = self.runner.tests(columns)
        outcomes = self.runner.outcomes(prompts, completions, tests, columns.get("trainer_state"))
        return [
            None
            if outcome is None or outcome.status is Status.NOT_RUN
            else outcome.share
            if self.partial
            else float(outcome.passed)
            for outcome in outcomes
        ]


def code_reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
    """
    1 for a program that passes all tests in the column `tests`, else 0; see [`CodeReward`] for another column, limits
    or isolation, and [`~vpd_trl.sandbox.parse_tests`] for what the column holds.

    Args:
        prompts: The prompts, one per completion.
        completions: The completions, strings or conversations.
        **columns: The data set's columns, `tests` among them.

    Raises:
        SandboxUnavailable: If there is no bubblewrap here.
        ValueError, TypeError: If the column is missing, or holds something else than tests.
    """
    return CodeReward()(prompts, completions, **columns)
