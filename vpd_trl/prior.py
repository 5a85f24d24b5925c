"""
The prior of the implicit reward: what a rollout's probability under the teacher is compared with.

An object here knows where its log-probabilities come from, and what a checkpoint must hold. The E-step never asks which
one it has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .batch import Batch, loss_mask
from .teacher import WeightSnapshot


if TYPE_CHECKING:
    from .trainer import VPDTrainer


class DynamicPrior:
    """
    The prior is the student at the start of each E-step (the paper's form).

    Args:
        trainer: The trainer, with its model.
    """

    # Whether it is the student as it is when rollouts have been sampled, computed by a forward pass
    is_student = True

    def __init__(self, trainer: VPDTrainer) -> None:
        self.trainer = trainer

    def begin(self) -> None:
        """Called, once or again, when training begins and the weights are where they stay."""

    def check(self, batch: Batch) -> None:
        """
        Check that a rollout batch has what the prior needs.

        Raises:
            ValueError: If it has not.
        """

    def logps(self, batches: list[Batch], *, fresh: bool) -> list[torch.Tensor]:
        """
        Log-probabilities (b, T) of the rollouts in each batch, without gradient or dropout, 0 where the loss mask is 0.

        Args:
            batches: The rollouts.
            fresh: Whether the student's weights are still those that the rollouts were sampled with.
        """
        scorer = self.trainer.scorer
        if not fresh:
            return [scorer.frozen_logps(batch) for batch in batches]
        return [scorer.student_logps(batch, torch.arange(len(batch["completion_ids"]))) for batch in batches]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class SamplingPrior(DynamicPrior):
    """
    The prior is the student that sampled the rollouts, by the log-probabilities that vLLM reports of its samples.

    It takes no forward pass, and differs from a dynamic one by the rounding of two engines.
    """

    is_student = False

    def check(self, batch: Batch) -> None:
        if "sampling_per_token_logps" not in batch:
            raise ValueError(
                "prior='sampling' needs the log-probabilities of samples, and the rollouts came without any. Let "
                "rollout_func return them as 'logprobs', or use prior='dynamic'."
            )

    def logps(self, batches: list[Batch], *, fresh: bool) -> list[torch.Tensor]:
        """As `DynamicPrior.logps`; batches with a token that vLLM has no number for take the pass all the same."""
        return [self._logps(batch, fresh=fresh) for batch in batches]

    def _logps(self, batch: Batch, *, fresh: bool) -> torch.Tensor:
        mask, sampled = loss_mask(batch).bool(), batch["sampling_per_token_logps"]
        unknown = sampled.isnan() & mask
        missing = unknown.any().long()
        if self.trainer.engine.gathers_weights:  # then all processes make the pass
            missing = self.trainer.accelerator.reduce(missing, reduction="sum")
        if missing:
            (computed,) = super().logps([batch], fresh=fresh)
            sampled = torch.where(unknown, computed.to(sampled.dtype), sampled)
        return torch.where(mask, sampled, 0.0)


class FixedPrior(DynamicPrior):
    """
    The prior is the student before training (the paper's ablation, appendix D.6).

    For an adapter it is the adapter as it was passed to the trainer, trained or new.
    """

    is_student = False

    def __init__(self, trainer: VPDTrainer) -> None:
        super().__init__(trainer)
        self.initial = WeightSnapshot(trainer.model, trainer.engine)

    def begin(self) -> None:
        self.initial.take()

    def logps(self, batches: list[Batch], *, fresh: bool) -> list[torch.Tensor]:
        with self.initial.swapped_in():
            return super().logps(batches, fresh=False)

    def state_dict(self) -> dict[str, Any]:
        return {"initial": self.initial.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.initial.load_state_dict(state["initial"])


def make_prior(trainer: VPDTrainer) -> DynamicPrior:
    """The prior that `VPDConfig.prior` names; without an E-step, which alone has one, there is nothing to keep."""
    kinds = {"dynamic": DynamicPrior, "fixed": FixedPrior, "sampling": SamplingPrior}
    return kinds[trainer.args.prior if trainer.parts.refines_teacher else "dynamic"](trainer)
