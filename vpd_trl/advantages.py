"""Per-token advantages from the teacher, for the hybrids that leave the loss to GRPO (appendix B.3 of the paper)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .batch import Batch, loss_mask, rows_of
from .losses import reshaped_advantages, reweighted_advantages
from .metrics import Means


if TYPE_CHECKING:
    from .trainer import VPDTrainer


class AdvantageShaper:
    """
    Turns the advantages of a rollout batch, one per rollout, into one per token.

    Args:
        trainer: The trainer, with its scorer and teacher.
    """

    def __init__(self, trainer: VPDTrainer) -> None:
        self.trainer = trainer
        self.args = trainer.args

    @property
    def mix(self) -> float:
        """λ at this point of training; `"linear"` takes it to 0 at the end."""
        state = self.trainer.state
        if self.args.advantage_mix_decay == "constant":
            return self.args.advantage_mix
        return self.args.advantage_mix * max(0.0, 1 - state.global_step / max(state.max_steps, 1))

    def __call__(self, batch: Batch) -> torch.Tensor:
        """
        The advantages (N, T) of N rollouts, or TRL's own (N,) where λ is 0.

        The teacher's log-ratio Δ is 0 for rollouts without feedback.
        """
        mix, advantages = self.mix, batch["advantages"]
        self.trainer._record("advantages/mix", mix)
        if mix == 0.0:
            return advantages
        log_ratio = self._log_ratio(batch)  # (N, T)
        if self.args.method == "advantage_reshaping":
            return reshaped_advantages(advantages, log_ratio, mix=mix)
        return reweighted_advantages(advantages, log_ratio, mix=mix, clip=self.args.advantage_weight_clip)

    def _log_ratio(self, batch: Batch) -> torch.Tensor:
        """Δ (N, T): log q − log π of the sampled tokens, 0 on the others and where there is no feedback."""
        scorer, mask = self.trainer.scorer, loss_mask(batch) * batch["has_feedback"].unsqueeze(-1)
        log_ratio = torch.zeros(mask.shape, device=mask.device)
        rows = scorer.rows_to_score(batch)
        student_logps = scorer.sampling_logps(batch)
        if len(rows):
            with self.trainer.teacher.target_context():
                teacher_logps = scorer.frozen_logps(rows_of(batch, rows), teacher=True)
            log_ratio[rows] = (teacher_logps - student_logps[rows]).to(log_ratio.dtype)
        log_ratio = torch.where(mask > 0, log_ratio, 0.0)
        self._log(log_ratio, batch, mask)
        return log_ratio

    def _log(self, log_ratio: torch.Tensor, batch: Batch, mask: torch.Tensor) -> None:
        means = Means()
        total = self.trainer.scorer.reduce(log_ratio, torch.zeros_like(log_ratio), mask)  # (N,)
        means.add_by_outcome(total, batch["outcome"], mask.any(-1))
        means.add("advantages/log_ratio", log_ratio.abs(), mask)
        reduced = means.reduce(self.trainer.accelerator)
        self.trainer._record("advantages/log_ratio", reduced["advantages/log_ratio"][0])
        self.trainer._record("teacher/log_ratio_margin", reduced["successes"][0] - reduced["failures"][0])
