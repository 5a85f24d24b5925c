"""What TRL leaves out of a tracker."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from .markdown import cell, table
from .text import text_of


if TYPE_CHECKING:
    from .trainer import VPDTrainer


# Of the completions table in one entry of TensorBoard's event file, which holds every entry of the run
MOST_ROWS = 32


class CompletionsToTensorBoard(TrainerCallback):
    """
    With `log_completions=True`, puts the completions table into TensorBoard as text.

    TRL hands it to Weights & Biases and Trackio, prints it and writes it to `completions/`, but has nothing for
    TensorBoard.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: VPDTrainer) -> None:
        self.trainer = trainer

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if not (state.is_world_process_zero and trainer.log_completions):
            return
        boards = [c for c in trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback) and c.tb_writer]
        text = completions_table(trainer._logs) if boards else ""
        for board in boards if text else []:
            board.tb_writer.add_text("completions", text, state.global_step)


def completions_table(logs: dict[str, Any]) -> str:
    """
    The first rollouts of the completions table, in Markdown; empty if there are none.

    Args:
        logs: TRL's record of the last rollouts.
    """
    columns = {
        "prompt": map(_text, logs["prompt"]),
        "completion": map(_text, logs["completion"]),
        **logs["rewards"],
        **logs["extra"],
        "advantage": logs["advantages"],
    }
    rows = [list(map(_cell, row)) for row in islice(zip(*columns.values(), strict=False), MOST_ROWS)]
    return table([cell(name) for name in columns], rows) if rows else ""


def _text(messages: str | list[dict[str, Any]]) -> str:
    """A prompt or a completion; the turns of a conversation with their roles, if it has several."""
    if isinstance(messages, str):
        return messages
    texts = [text_of(message.get("content")) for message in messages]
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"{message['role']}: {text}" for message, text in zip(messages, texts, strict=True))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else cell(value)
