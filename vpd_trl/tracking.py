"""The completions table where TRL has none for a tracker, or none that can be read."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from .markdown import cell, table
from .text import text_of
from .tools import trajectory_text


if TYPE_CHECKING:
    from .trainer import VPDTrainer


# Of the completions table in one entry of TensorBoard's event file, which holds every entry of the run
MOST_ROWS = 32


class CompletionsTable(TrainerCallback):
    """
    With `log_completions=True`, brings the completions table to TensorBoard, and as text to Trackio.

    TRL hands the table to Weights & Biases and Trackio after the metrics, prints it and writes it to `completions/`. It
    has nothing for TensorBoard, which gets each table once, and Trackio shows no more of a conversation than that it is an object.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: VPDTrainer) -> None:
        self.trainer = trainer
        self._written = ""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if not (state.is_world_process_zero and trainer.log_completions):
            return
        if "trackio" in (args.report_to or ()):
            for column in ("prompt", "completion"):
                texts = list(map(as_text, trainer._logs[column]))
                trainer._logs[column].clear()
                trainer._logs[column].extend(texts)
        boards = [c for c in trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback) and c.tb_writer]
        text = completions_table(trainer._logs) if boards else ""
        if text == self._written:  # evaluation and the end of the run log, too, with no new rollouts
            return
        self._written = text
        for board in boards:
            board.tb_writer.add_text("completions", text, state.global_step)


def completions_table(logs: dict[str, Any]) -> str:
    """
    The first rollouts of the completions table, in Markdown; empty if there are none.

    Args:
        logs: TRL's record of the last rollouts.
    """
    columns = {
        "prompt": map(as_text, logs["prompt"]),
        "completion": map(as_text, logs["completion"]),
        **logs["rewards"],
        **logs["extra"],
        "advantage": logs["advantages"],
    }
    rows = [list(map(_cell, row)) for row in islice(zip(*columns.values(), strict=False), MOST_ROWS)]
    return table([cell(name) for name in columns], rows) if rows else ""


def as_text(messages: str | list[dict[str, Any]]) -> str:
    """A prompt or a completion as text, with calls of tools; of a conversation of several turns with their roles."""
    if isinstance(messages, str):
        return messages
    texts = [
        trajectory_text([message], thinking=True)
        if message.get("role") == "assistant"
        else text_of(message.get("content"))
        for message in messages
    ]
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"{message['role']}: {text}" for message, text in zip(messages, texts, strict=True))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else cell(value)
