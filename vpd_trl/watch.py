"""Warnings about a run that learns nothing, or is about to unlearn."""

from __future__ import annotations

from typing import Any


# A step whose `teacher/log_ratio_end` is below this, nats, may be one of many that take the end from answers
FADING_END = -0.01
FADING_STEPS = 5


def fading(ended: list[float]) -> bool:
    """
    Whether answers lose their ends, from the share of rollouts that ended in each step since the target was less
    inclined to end than the student: nothing was won in that time, or a tenth lost.
    """
    return ended[-1] <= ended[0] or ended[-1] <= max(ended) - 0.1


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
        self._ended: list[float] = []  # since the target has been less inclined to end than the student
        self._warned_of_ends = False

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

    def ends(self, log_ratio: float, ended: float) -> None:
        """
        Take note of `teacher/log_ratio_end` and the share of rollouts that ended, of a step in which successes ended.

        Warns once until it recovers.
        """
        if log_ratio >= FADING_END:
            self._ended, self._warned_of_ends = [], False
            return
        self._ended.append(ended)
        if len(self._ended) >= FADING_STEPS and fading(self._ended) and not self._warned_of_ends:
            self._warned_of_ends = True
            self.logger.warning(
                f"For {len(self._ended)} steps the M-step's target has been less inclined than the student to end a "
                f"right answer (teacher/log_ratio_end, now {log_ratio:.3f} nats), and {ended:.0%} of the rollouts end. "
                "A teacher that shares the student's weights then draws both on until no answer ends: watch "
                "completions/clipped_ratio. Lower teacher_temperature or learning_rate, use teacher='ema' or 'lora', "
                "or make rewards and feedback speak of answers that don't end."
            )
