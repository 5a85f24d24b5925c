"""The E-step: train the teacher to tell successes from failures (section 3.2 of the paper)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .batch import Batch, concatenated, loss_mask, rows_of
from .lengths import row_lengths, within_budget
from .losses import bco_loss
from .metrics import Means


if TYPE_CHECKING:
    from .trainer import VPDTrainer


class RewardShift:
    """
    The reward shift δ: a moving average of ½ (E₊[ρ] + E₋[ρ]). Eq. 9.

    Args:
        momentum: m of δ ← m · δ + (1 − m) · batch value. The first batch sets δ.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.value: float | None = None

    def update(self, positive_mean: float, negative_mean: float) -> float:
        """Take in the mean implicit rewards of both classes over all processes, and return the new δ."""
        batch = (positive_mean + negative_mean) / 2
        self.value = batch if self.value is None else self.momentum * self.value + (1 - self.momentum) * batch
        return self.value


@dataclass
class _Update:
    """
    The rollouts of one optimizer update of the E-step, in the pieces that they go through the network in.

    Attributes:
        micro_batches: The pieces of this process, with a boolean `eligible` (b,): a piece that fills up has no such row.
        positives: Eligible successes, over all processes.
        negatives: Eligible failures, over all processes.
        priors: The prior's log-probabilities (b, T) for each micro-batch, frozen.
        rewards: The latest implicit rewards (b,) for each micro-batch; none before the first pass of the teacher.
    """

    micro_batches: list[Batch]
    positives: int
    negatives: int
    priors: list[torch.Tensor] = field(default_factory=list)
    rewards: list[torch.Tensor] = field(default_factory=list)


class EStep:
    """
    Trains the teacher on a rollout batch by Binary Classifier Optimization.

    The batch comes as the micro-batches that the M-step will take. Rollouts without feedback, without a score or
    without a token of their own are left out, and those of like length go through the network together, so many at a
    time that an E-step needs no more memory than an M-step (down to one row). Class means, class counts and the reward
    shift are over all rollouts of an update and all processes.

    Args:
        trainer: The trainer, ready but for the E-step.
    """

    def __init__(self, trainer: VPDTrainer) -> None:
        self.trainer = trainer
        self.args = trainer.args
        self.shift = RewardShift(self.args.reward_shift_momentum)
        self.last_counts = (0, 0)  # successes and failures of the last E-step, over all processes

    def run(self, micro_batches: list[Batch], *, fresh: bool = False) -> bool:
        """
        Run an E-step, and return whether it made at least one update.

        Runs between two optimizer steps of the student, with no gradients around; leaves none.

        Args:
            micro_batches: The rollout batch.
            fresh: Whether the student's weights are still those that the rollouts were sampled and scored with.
        """
        start = time.perf_counter()
        per_update = len(micro_batches)
        if self.args.e_step_batch_size is not None:
            processes = self.trainer.accelerator.num_processes
            per_update = self.args.e_step_batch_size // (self.args.per_device_train_batch_size * processes)
        groups = [micro_batches[i : i + per_update] for i in range(0, len(micro_batches), per_update)]
        updates = [self._prepare(group) for group in groups]
        self.last_counts = (sum(u.positives for u in updates), sum(u.negatives for u in updates))
        possible = [u for u in updates if min(u.positives, u.negatives) >= self.args.e_step_min_per_class]

        # Both frozen at the start: the prior for the whole E-step (appendix A.4), the teacher for the first shift
        priors = iter(self.trainer.prior.logps([b for u in possible for b in u.micro_batches], fresh=fresh))
        for u in possible:
            u.priors = [next(priors) for _ in u.micro_batches]
        if self.args.reward_shift == "batch" or self.shift.value is None:
            with self.trainer.teacher.training_context():
                for u in possible:
                    u.rewards = [
                        self._reward(batch, self.trainer.scorer.frozen_logps(batch, teacher=True), prior)
                        for batch, prior in zip(u.micro_batches, u.priors, strict=True)
                    ]
        for _ in range(self.args.e_step_epochs):
            for u in possible:
                self._update(u)

        record = self.trainer._record
        record("e_step/positives", self.last_counts[0])
        record("e_step/negatives", self.last_counts[1])
        record("e_step/skipped", (len(updates) - len(possible)) / len(updates))
        record("time/e_step", time.perf_counter() - start)
        return bool(possible)

    def measured(self, success_ratio: float, failure_ratio: float) -> None:
        """
        Take in what an M-step has found, for a running reward shift.

        Args:
            success_ratio, failure_ratio: Mean log-ratios of the teacher over the student, nats; NaN without any.
        """
        means = self.args.bco_temperature * success_ratio, self.args.bco_temperature * failure_ratio
        if self.args.reward_shift == "running" and all(map(math.isfinite, means)):
            self.shift.update(*means)

    def _prepare(self, micro_batches: list[Batch]) -> _Update:
        """An update on these micro-batches, with its class counts."""
        rows = concatenated(micro_batches)
        rows["eligible"] = rows["has_feedback"] & (rows["outcome"] >= 0) & loss_mask(rows).any(-1)
        return _Update(self._split(rows, len(micro_batches[0]["completion_ids"])), *self._class_counts(rows))

    def _split(self, rows: Batch, micro_batch_size: int) -> list[Batch]:
        """
        The eligible rows in pieces that hold no more tokens with the teacher's prompt than a micro-batch in an M-step.

        All processes have equally many pieces, as each backward pass may wait for the others.
        """
        accelerator = self.trainer.accelerator
        eligible = rows["eligible"].nonzero().squeeze(-1)
        lengths = row_lengths(rows, teacher=True) - 1  # the last token predicts nothing
        order = eligible[lengths[eligible].argsort(descending=True, stable=True)]
        longest = int(accelerator.gather(row_lengths(rows, teacher=False).max()).max()) - 1
        sizes = within_budget(lengths[order].tolist(), micro_batch_size * longest, micro_batch_size)
        count = int(accelerator.gather(torch.tensor(len(sizes), device=accelerator.device)).max())
        pieces = [rows_of(rows, part) for part in order.split(sizes)]
        while len(pieces) < count:
            # A row that counts for nothing, and of which one token goes through the network
            filler = rows_of(rows, slice(0, 1))
            pieces.append(filler | {name: torch.zeros_like(filler[name]) for name in ("eligible", "completion_mask")})
        return pieces

    def _update(self, update: _Update) -> None:
        """One optimizer update; leaves the implicit rewards of its forward pass in it."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        if update.rewards:
            self.shift.update(*self._class_means(update))
        shift, update.rewards = self.shift.value, []
        assert shift is not None

        loss_sum = torch.zeros((), device=accelerator.device)
        with trainer.teacher.training_context():
            for i, (batch, prior) in enumerate(zip(update.micro_batches, update.priors, strict=True)):
                with trainer.teacher.accumulate(last=i == len(update.micro_batches) - 1):
                    logps = trainer.scorer.sampled_logps(trainer.teacher.trained_model, batch, teacher=True)
                    log_ratio = trainer.scorer.reduce(logps, prior, loss_mask(batch))
                    success = batch["outcome"] == 1
                    losses = bco_loss(log_ratio, success, temperature=self.args.bco_temperature, shift=shift)
                    # Each class has weight 1, whatever its size. Gradients are averaged over processes
                    weight = torch.where(success, 1 / update.positives, 1 / update.negatives) * batch["eligible"]
                    loss = (losses * weight).sum()
                    trainer.teacher.backward(loss * accelerator.num_processes)
                loss_sum += loss.detach()
                update.rewards.append(self.args.bco_temperature * log_ratio.detach())
            grad_norm = trainer.teacher.update()

        positive, negative = self._class_means(update)
        trainer._record("e_step/loss", accelerator.reduce(loss_sum, reduction="sum").item())
        trainer._record("e_step/reward_margin", positive - negative)
        trainer._record("e_step/reward_shift", shift)
        trainer._record("e_step/grad_norm", grad_norm)

    def _class_counts(self, rows: Batch) -> tuple[int, int]:
        """Numbers of eligible successes and failures, over all processes."""
        outcome = rows["outcome"].masked_fill(~rows["eligible"], -1)
        counts = torch.stack([(outcome == 1).sum(), (outcome == 0).sum()])
        positives, negatives = self.trainer.accelerator.reduce(counts, reduction="sum").tolist()
        return positives, negatives

    def _class_means(self, update: _Update) -> tuple[float, float]:
        """Mean implicit rewards of successes and of failures, over all processes."""
        means = Means()
        for batch, reward in zip(update.micro_batches, update.rewards, strict=True):
            means.add_by_outcome(reward, batch["outcome"], batch["eligible"])
        reduced = means.reduce(self.trainer.accelerator)
        return reduced["successes"][0], reduced["failures"][0]

    def _reward(self, batch: Batch, teacher_logps: torch.Tensor, prior_logps: torch.Tensor) -> torch.Tensor:
        """Implicit rewards ρ (b,). Eq. 7."""
        log_ratio = self.trainer.scorer.reduce(teacher_logps, prior_logps, loss_mask(batch))
        return self.args.bco_temperature * log_ratio

    def state_dict(self) -> dict[str, Any]:
        return {"reward_shift": self.shift.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shift.value = state["reward_shift"]
