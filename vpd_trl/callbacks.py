"""When the trainer acts between the student's optimizer steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from . import state


if TYPE_CHECKING:
    from .trainer import VPDTrainer


class OptimizerSteps(TrainerCallback):
    """
    Opens and closes each optimizer step of the student.

    It is the one place outside gradient accumulation and outside `no_sync`, so the E-step can run there.
    """

    def __init__(self, trainer: VPDTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        state.begin(self.trainer)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._open_optimizer_step()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._close_optimizer_step()
