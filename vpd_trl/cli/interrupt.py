"""Ctrl-C and SIGTERM: the current step is finished, a checkpoint written, and the run ends."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback


# One Ctrl-C can arrive twice: from the terminal, and from the launcher of several processes
SAME_SIGNAL_SECONDS = 3.0


class StopSignal(TrainerCallback):
    """
    Stops training after the step in which a signal came, with a checkpoint.

    A second signal, more than `SAME_SIGNAL_SECONDS` later, raises `KeyboardInterrupt` at once. Of several processes any
    one may get the signal; they agree at the end of each step, so all stop and save after the same one.

    Attributes:
        stopped: Whether training was stopped by a signal.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.accelerator: Any = None
        self._arrived: float | None = None

    @contextmanager
    def listening(self, accelerator: Any) -> Iterator[None]:
        """Signals are taken within this block; before and after it they do what they did."""
        self.accelerator = accelerator
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._arrived is None:
            self._arrived = now
            if self.accelerator.is_main_process:
                print(
                    f"\nvpd-trl: {signal.Signals(number).name}: finishing this step, then saving a checkpoint. Once "
                    "more stops at once.",
                    file=sys.stderr,
                    flush=True,
                )
        elif now - self._arrived > SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self._asked():
            self.stopped = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        # An evaluation can be longer than many steps
        if self._asked():
            self.stopped = True
            control.should_save = control.should_training_stop = True
        return control

    def _asked(self) -> bool:
        asked = self._arrived is not None
        if self.accelerator.num_processes == 1:
            return asked
        flag = torch.tensor(int(asked), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())
