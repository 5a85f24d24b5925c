"""The M-step: move the student to the teacher on the student's own rollouts (section 3.3 of the paper)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from .batch import Batch, loss_mask, rows_of
from .losses import sharpened_logps
from .metrics import Means
from .scoring import on_mask


if TYPE_CHECKING:
    from .trainer import VPDTrainer


# Log-probability, nats, above which the student is sure of a token
CONFIDENT = math.log(0.9)


class MStep:
    """
    The student's divergence to the teacher as a loss. Eq. 10.

    Args:
        trainer: The trainer, with its scorer.
    """

    def __init__(self, trainer: VPDTrainer) -> None:
        self.trainer = trainer
        self.args = trainer.args
        self._means = Means()

    def loss(self, model: Any, inputs: Batch) -> torch.Tensor:
        """
        The loss () of a micro-batch, nats: it adds up over the micro-batches of an accumulation window.

        Rollouts without feedback go through no network and add 0.
        """
        rows = inputs["has_feedback"].nonzero().squeeze(-1)
        if not len(rows):  # take part with a row that counts for nothing: other processes wait for the gradients
            rows = torch.zeros(1, dtype=torch.long, device=rows.device)
        batch = rows_of(inputs, rows)
        mask = loss_mask(batch).bool() & batch["has_feedback"].unsqueeze(-1)  # (b, T)

        found = self.trainer.scorer.distill(model, batch, mask)
        self._means.add("m_step/divergence", found.divergence)
        self._means.add("entropy", found.entropy)
        self._add_log_ratios(found.teacher_logps, found.student_logps, batch, mask)

        # The denominator is of the whole rollout batch on all processes; each micro-batch is one of
        # `steps_per_generation` on each of them, and their gradients are averaged over processes and added up
        trainer = self.trainer
        window = trainer.current_gradient_accumulation_steps / self.args.steps_per_generation
        denominator = inputs["m_step_denominator"].clamp(min=1.0) * window / trainer.accelerator.num_processes
        return found.loss / denominator

    def _add_log_ratios(
        self, teacher_logps: torch.Tensor, student_logps: torch.Tensor, batch: Batch, mask: torch.Tensor
    ) -> None:
        """Take note of log q − log π, from log-probabilities (n,) of the tokens of `mask` (B, T)."""
        outcome = batch["outcome"]
        log_ratio = self.trainer.scorer.reduce(on_mask(teacher_logps, mask), on_mask(student_logps, mask), mask)
        self._means.add_by_outcome(log_ratio, outcome, mask.any(-1))
        # What of a success the M-step takes back: its target against the student, on tokens that the student is sure of
        taken = sharpened_logps(teacher_logps, self.args.target_temperature) - student_logps
        success = (outcome == 1).unsqueeze(-1).expand_as(mask)[mask]
        ends = torch.isin(batch["completion_ids"][mask], torch.tensor(self.trainer.eos_token_ids, device=mask.device))
        self._means.add("ended", on_mask(ends.float(), mask).any(-1).float(), mask.any(-1))
        self._means.add("teacher/log_ratio_confident", taken, success & (student_logps > CONFIDENT))
        self._means.add("teacher/log_ratio_end", taken, success & ends)

    def log(self) -> None:
        """Record the metrics of an optimizer step; all processes take part."""
        means = self._means.reduce(self.trainer.accelerator)
        if not means:
            return
        successes, failures = means.pop("successes"), means.pop("failures")
        ended, _ = means.pop("ended")
        self.trainer._record("m_step/tokens", means["m_step/divergence"][1])
        self.trainer._record("teacher/log_ratio_margin", successes[0] - failures[0])
        self.trainer.e_step.measured(successes[0], failures[0])
        if self.trainer.args.rl_weight:
            del means["entropy"]  # TRL records it over all rollouts
        for name, (value, _) in means.items():
            self.trainer._record(name, value)
        end, count = means["teacher/log_ratio_end"]
        if count:
            self.trainer._watch.ends(end, ended)
