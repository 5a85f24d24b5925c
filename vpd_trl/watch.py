"""Warnings about a run that learns nothing."""

from __future__ import annotations

from typing import Any


class Watch:
    """
    Warns, with advice, when nothing is distilled or the teacher has not been trained for a while.

    Args:
        logger: Where warnings go.
        patience: Bad batches in a row before a warning; it comes again after as many more.
    """

    def __init__(self, logger: Any, patience: int = 3) -> None:
        self.logger = logger
        self.patience = patience
        self._uncovered = 0
        self._skipped = 0

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
