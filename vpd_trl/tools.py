"""Rollouts that use tools (TRL's `tools` and `environment_factory`): how prompts are rendered, how trajectories read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .text import completion_text, strip_thinking, text_of


if TYPE_CHECKING:
    from .trainer import VPDTrainer


@contextmanager
def tools_of(trainer: VPDTrainer, rows: Sequence[int]) -> Iterator[None]:
    """
    While prompts of some rows of the latest rollout batch are rendered.

    Each has the tools of its own environment in it. TRL looks them up in the order of the whole batch.
    """
    if trainer.environment_factories is None:  # the same tools for all
        yield
        return
    environments = trainer._batch_environments
    trainer._batch_environments = [environments[row] for row in rows]
    try:
        yield
    finally:
        trainer._batch_environments = environments


@contextmanager
def without_tools(trainer: VPDTrainer) -> Iterator[None]:
    """While the student is asked something else than the task, in which it has no tools to call."""
    tools, factories = trainer.tools, trainer.environment_factories
    trainer.tools, trainer.environment_factories = [], None
    try:
        yield
    finally:
        trainer.tools, trainer.environment_factories = tools, factories


def trajectory_text(completion: str | list[dict[str, Any]], *, thinking: bool, opened: bool = False) -> str:
    """
    A completion as text: the answer, or where tools were called the calls, their results and the answers in order.

    Args:
        completion: A string, or messages as TRL gives them to reward functions.
        thinking: Whether `<think>` blocks stay.
        opened: Whether the prompt ended within such a block.
    """

    def shown(text: str, first: bool) -> str:
        return text if thinking else strip_thinking(text, opened=opened and first)

    if isinstance(completion, str) or not any(m.get("tool_calls") or m.get("role") == "tool" for m in completion):
        return shown(completion_text(completion), True)
    parts = []
    for i, message in enumerate(completion):
        text = text_of(message.get("content"))
        if message.get("role") == "tool":
            parts.append(f"[{message.get('name', 'tool')} returned] {text}")
        else:
            parts += [shown(text, i == 0), *(f"[call] {_call(call)}" for call in message.get("tool_calls") or ())]
    return "\n".join(part for part in parts if part.strip())


def _call(call: dict[str, Any]) -> str:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, dict):
        arguments = ", ".join(f"{name}={json.dumps(value, default=str)}" for name, value in arguments.items())
    return f"{function.get('name')}({arguments})"
