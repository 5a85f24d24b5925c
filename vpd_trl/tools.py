"""Rollouts that use tools (TRL's `tools` and `environment_factory`): how prompts are rendered, how trajectories read."""

from __future__ import annotations

import json
import re
import textwrap
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


# What begins a call and its result. Names in it have no brackets or spaces
_MARK = re.compile(r"\[(?=(?:call|[^\s\[\]]+ returned)\])")


def trajectory_text(completion: str | list[dict[str, Any]], *, thinking: bool, opened: bool = False) -> str:
    """
    A completion as text: the answer, or where tools were called the calls, their results and the answers in order.

    A line that begins with `[call]` is a call, one that begins with `[name returned]` a result, which goes on in the
    indented lines below. No answer, argument or result can forge one: a space stands behind the bracket of theirs.

    Args:
        completion: A string, or messages as TRL gives them to reward functions. Only messages have tools.
        thinking: Whether `<think>` blocks stay.
        opened: Whether the prompt ended within such a block.
    """

    def shown(text: str, first: bool) -> str:
        return text if thinking else strip_thinking(text, opened=opened and first)

    if isinstance(completion, str):
        return shown(completion, True)
    if not any(m.get("tool_calls") or m.get("role") == "tool" for m in completion):
        return _without_marks(shown(completion_text(completion), True))
    parts = []
    for i, message in enumerate(completion):
        text = text_of(message.get("content"))
        if message.get("role") == "tool":
            parts.append(_result(message.get("name") or "tool", text))
        else:
            # Not indented, as the rest of a result is
            parts.append(_without_marks(shown(text, i == 0)).strip())
            parts += [f"[call] {_call(call)}" for call in message.get("tool_calls") or ()]
    # JSON of the model's may name half of a character, which no tokenizer and no file takes
    return "\n".join(part for part in parts if part).encode("utf-8", "backslashreplace").decode()


def _without_marks(text: str) -> str:
    return _MARK.sub("[ ", text)


def _result(name: str, text: str) -> str:
    name = re.sub(r"[\s\[\]]+", "_", name)  # the model has chosen it
    text = _without_marks(text).rstrip()
    shown = "\n" + textwrap.indent(text, " " * 4) if len(text.splitlines()) > 1 else f" {text}"
    return f"[{name} returned]{shown}"


def _call(call: dict[str, Any]) -> str:
    """A call in one line."""
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, dict):
        arguments = ", ".join(
            f"{name}={json.dumps(value, default=str, ensure_ascii=False)}" for name, value in arguments.items()
        )
    return _without_marks(" ".join(f"{function.get('name')}({arguments})".splitlines()))
