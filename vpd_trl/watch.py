"""Warnings about a run that learns nothing, or is about to unlearn."""

from __future__ import annotations

from typing import Any


# Nats per end of a success, and steps in a row: in the paper in miniature less than this in 5 steps preceded every
# collapse, by 10 steps or more (examples/paper_in_miniature)
FADING_END = -0.01
FADING_STEPS = 5


class Watch:
    """
    Warns, with advice, when nothing is distilled, the teacher has not been trained for a while, or answers lose their
    ends.

    Args:
        logger: Where warnings go.
        patience: Bad batches in a row before a warning; it comes again after as many more.
    """

    def __init__(self, logger: Any, patience: int = 3) -> None:
        self.logger = logger
        self.patience = patience
        self._uncovered = 0
        self._skipped = 0
        self._fading = 0

    def coverage(self, share: float) -> None:
        """Take note of the share of rollouts with feedback in a batch."""
        self._uncovered = self._uncovered + 1 if share == 0 else 0
        if self._uncovered and self._uncovered % self.patience == 0:
            self.logger.warning(
                f"No rollout had feedback in the last {self._uncovered} batches, so nothing was learned from them. "
                "Check that the feedback function returns text (column 'feedback' with log_completions=True). Siblings "
                "need at least two successes in a group for a success, one for a failure: try easier prompts, more "
                "num_generations, a lower success_threshold or feedback that needs no success."
            )

    def e_step(self, *, ran: bool, successes: int, failures: int) -> None:
        """Take note of an E-step that was due."""
        self._skipped = 0 if ran else self._skipped + 1
        if self._skipped and self._skipped % self.patience == 0:
            self.logger.warning(
                f"The last {self._skipped} E-steps were skipped, so the teacher was not trained; the last one had "
                f"{successes} successes and {failures} failures with feedback, and needs e_step_min_per_class of each. "
                "Without successes, try easier prompts or a lower success_threshold; without failures, harder prompts; "
                "if only one class has feedback, make the feedback function speak of both; larger batches help too."
            )

    def ends(self, log_ratio: float) -> None:
        """Take note of `teacher/log_ratio_end` of a step in which successes ended; warns once until it recovers."""
        self._fading = self._fading + 1 if log_ratio < FADING_END else 0
        if self._fading == FADING_STEPS:
            self.logger.warning(
                f"For {self._fading} steps the M-step's target has been less inclined than the student to end a right "
                f"answer (teacher/log_ratio_end, now {log_ratio:.3f} nats). A teacher that shares the student's weights "
                "then draws both on until no answer ends: watch completions/clipped_ratio. Lower teacher_temperature "
                "or learning_rate, or use teacher='ema' or 'lora'."
            )
