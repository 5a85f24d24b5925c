"""The E-step: train the teacher to tell successes from failures (section 3.2 of the paper)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DistributedType

from .batch import Batch, loss_mask, rows_of
from .losses import bco_loss
from .metrics import Means
from .network import scoring_mode


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


class EStep:
    """
    Trains the teacher on a rollout batch by Binary Classifier Optimization.

    The batch comes as the micro-batches that the M-step will take, and is split further where the teacher's prompts
    are longer, so an E-step needs no more memory than an M-step (down to one row at a time). Class means, class counts
    and the reward shift are over all micro-batches of an update and all processes. Rollouts without feedback, without
    a score or without a token of their own are left out.

    Args:
        trainer: The trainer, ready but for the E-step.
    """

    def __init__(self, trainer: VPDTrainer) -> None:
        self.trainer = trainer
        self.args = trainer.args
        self.shift = RewardShift(self.args.reward_shift_momentum)
        self.last_counts = (0, 0)  # successes and failures of the last E-step, over all processes

    def run(self, micro_batches: list[Batch]) -> bool:
        """
        Run an E-step, and return whether it made at least one update.

        Runs between two optimizer steps of the student, with no gradients around; leaves none.
        """
        start = time.perf_counter()
        per_update = len(micro_batches)
        if self.args.e_step_batch_size is not None:
            processes = self.trainer.accelerator.num_processes
            per_update = self.args.e_step_batch_size // (self.args.per_device_train_batch_size * processes)
        updates = [self._split(micro_batches[i : i + per_update]) for i in range(0, len(micro_batches), per_update)]
        counts = [self._class_counts(update) for update in updates]
        self.last_counts = (sum(n for n, _ in counts), sum(n for _, n in counts))
        possible = [min(pair) >= self.args.e_step_min_per_class for pair in counts]

        if any(possible):
            # Both frozen at the start: the prior for the whole E-step (appendix A.4), the teacher for the first shift
            with self.trainer.prior.context():
                priors = [[self._logps(mb, teacher=False) for mb in update] for update in updates]
            with self.trainer.teacher.training_context():
                rewards = [
                    [self._reward(mb, self._logps(mb, teacher=True), prior) for mb, prior in zip(*pair, strict=True)]
                    for pair in zip(updates, priors, strict=True)
                ]
            for _ in range(self.args.e_step_epochs):
                for i, update in enumerate(updates):
                    if possible[i]:
                        rewards[i] = self._update(update, priors[i], rewards[i], counts[i])

        record = self.trainer._record
        record("e_step/positives", self.last_counts[0])
        record("e_step/negatives", self.last_counts[1])
        record("e_step/skipped", possible.count(False) / len(possible))
        record("time/e_step", time.perf_counter() - start)
        return any(possible)

    def _split(self, micro_batches: list[Batch]) -> list[Batch]:
        """
        Smaller micro-batches, so that none holds more tokens with the teacher's prompt than in the student's M-step.

        All processes split alike, as each backward pass may wait for the others.
        """

        def width(batch: Batch, prompt: str) -> int:
            return batch[prompt].size(1) + batch["completion_ids"].size(1)

        ratios = [width(batch, "teacher_prompt_ids") / width(batch, "prompt_ids") for batch in micro_batches]
        ratio = torch.tensor(max(ratios), device=self.trainer.accelerator.device)
        ratio = self.trainer.accelerator.gather(ratio).max().item()
        pieces = []
        for batch in micro_batches:
            rows = batch["completion_ids"].size(0)
            size = max(1, int(rows / max(ratio, 1.0)))
            pieces += [rows_of(batch, slice(i, i + size)) for i in range(0, rows, size)]
        return pieces

    def _update(
        self, micro_batches: list[Batch], priors: list[torch.Tensor], rewards: list[torch.Tensor], counts: tuple
    ) -> list[torch.Tensor]:
        """One optimizer update on the micro-batches; returns the implicit rewards of the forward pass."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        positive, negative = self._class_means(micro_batches, rewards)
        shift = self.shift.update(positive, negative)

        loss_sum = torch.zeros((), device=accelerator.device)
        new_rewards = []
        with self._own_accumulation(), self._learning_rate(), trainer.teacher.training_context():
            for i, (batch, prior) in enumerate(zip(micro_batches, priors, strict=True)):
                with self._gradient_sync(last=i == len(micro_batches) - 1):
                    logps = trainer.scorer.sampled_logps(trainer.model_wrapped, batch, teacher=True)
                    log_ratio = trainer.scorer.reduce(logps, prior, loss_mask(batch))
                    success = batch["outcome"] == 1
                    losses = bco_loss(log_ratio, success, temperature=self.args.bco_temperature, shift=shift)
                    # Each class has weight 1, whatever its size. Gradients are averaged over processes
                    weight = torch.where(success, 1 / counts[0], 1 / counts[1]) * self._eligible(batch)
                    loss = (losses * weight).sum()
                    accelerator.backward(loss * accelerator.num_processes)
                loss_sum += loss.detach()
                new_rewards.append(self.args.bco_temperature * log_ratio.detach())
            # Without a limit the norm is measured all the same
            limit = self.args.max_grad_norm if self.args.max_grad_norm > 0 else float("inf")
            grad_norm = accelerator.clip_grad_norm_(trainer.model_wrapped.parameters(), limit)
            trainer.optimizer.step()
            trainer.model_wrapped.zero_grad()

        positive, negative = self._class_means(micro_batches, new_rewards)
        trainer._record("e_step/loss", accelerator.reduce(loss_sum, reduction="sum").item())
        trainer._record("e_step/reward_margin", positive - negative)
        trainer._record("e_step/reward_shift", shift)
        trainer._record("e_step/grad_norm", float(grad_norm) if grad_norm is not None else float("nan"))
        return new_rewards

    def _eligible(self, batch: Batch) -> torch.Tensor:
        """Which rollouts (b,) take part."""
        return batch["has_feedback"] & (batch["outcome"] >= 0) & loss_mask(batch).any(-1)

    def _class_counts(self, micro_batches: list[Batch]) -> tuple[int, int]:
        """Numbers of eligible successes and failures, over all processes."""
        outcome = torch.cat([batch["outcome"].masked_fill(~self._eligible(batch), -1) for batch in micro_batches])
        counts = torch.stack([(outcome == 1).sum(), (outcome == 0).sum()])
        positives, negatives = self.trainer.accelerator.reduce(counts, reduction="sum").tolist()
        return positives, negatives

    def _class_means(self, micro_batches: list[Batch], rewards: list[torch.Tensor]) -> tuple[float, float]:
        """Mean implicit rewards of successes and of failures, over all processes."""
        means = Means()
        for batch, reward in zip(micro_batches, rewards, strict=True):
            eligible = self._eligible(batch)
            means.add("positive", reward, eligible & (batch["outcome"] == 1))
            means.add("negative", reward, eligible & (batch["outcome"] == 0))
        reduced = means.reduce(self.trainer.accelerator)
        return reduced["positive"][0], reduced["negative"][0]

    def _reward(self, batch: Batch, teacher_logps: torch.Tensor, prior_logps: torch.Tensor) -> torch.Tensor:
        """Implicit rewards ρ (b,). Eq. 7."""
        log_ratio = self.trainer.scorer.reduce(teacher_logps, prior_logps, loss_mask(batch))
        return self.args.bco_temperature * log_ratio

    def _logps(self, batch: Batch, *, teacher: bool) -> torch.Tensor:
        """Log-probabilities (b, T) of the sampled tokens under the teacher or the prior, without gradient."""
        with scoring_mode(self.trainer.model):
            return self.trainer.scorer.sampled_logps(self.trainer.model, batch, teacher=teacher)

    @contextmanager
    def _own_accumulation(self) -> Iterator[None]:
        """An accumulation window of the E-step's own; the student's flag comes back afterwards."""
        state = self.trainer.accelerator.gradient_state
        before = state.sync_gradients
        try:
            yield
        finally:
            state._set_sync_gradients(before)

    def _gradient_sync(self, *, last: bool) -> AbstractContextManager[Any]:
        """Reduce gradients over processes in the last backward pass of an update only, as transformers does."""
        accelerator = self.trainer.accelerator
        accelerator.gradient_state._set_sync_gradients(last)
        every = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        if last or every or accelerator.distributed_type == DistributedType.DEEPSPEED:
            return nullcontext()
        return accelerator.no_sync(self.trainer.model_wrapped)

    @contextmanager
    def _learning_rate(self) -> Iterator[None]:
        """The E-step's learning rate on the student's schedule."""
        if self.args.e_step_learning_rate is None:
            yield
            return
        scale = self.args.e_step_learning_rate / self.args.learning_rate
        groups = self.trainer.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * scale
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        return {"reward_shift": self.shift.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shift.value = state["reward_shift"]
