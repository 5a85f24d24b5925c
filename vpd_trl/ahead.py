"""Rollouts are scored while their feedback is on its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from trl.trainer.utils import pad

from .batch import Batch, rows_of


if TYPE_CHECKING:
    from .trainer import VPDTrainer


class ScoringAhead:
    """
    Computes the student's log-probabilities of rollouts that will be asked for, for as long as feedback functions wait.

    Which rollouts get feedback isn't known then, so that some may be scored for nothing: no longer than the wait, and
    one micro-batch.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: VPDTrainer) -> None:
        self.trainer = trainer
        self._generated: Batch = {}
        self._logps: torch.Tensor | None = None

    def generated(self, prompt_ids: list[list[int]], completion_ids: list[list[int]], own: list | None) -> None:
        """
        Take note of N rollouts.

        Args:
            prompt_ids, completion_ids: Their token ids.
            own: 1 for tokens of completions that were sampled, 0 for those of tools; `None`: there are no tools.
        """
        lists = {"prompt_ids": prompt_ids, "completion_ids": completion_ids}
        if own is not None:
            lists["tool_mask"] = own
        self._generated, self._logps = lists, None

    def __call__(self, over: Callable[[], bool]) -> None:
        """Score rollouts, those of like length together, until the wait is over."""
        if over() or not self._wanted():
            return
        batch, trainer = self._as_batch(), self.trainer
        lengths = batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)
        self._logps = torch.zeros(batch["completion_ids"].shape, device=lengths.device)
        self._scored = torch.zeros(len(lengths), dtype=torch.bool, device=lengths.device)
        for rows in lengths.argsort(descending=True).split(trainer.args.per_device_train_batch_size):
            if over():
                return
            with trainer.annotator.generating:  # an async function may ask the same network for text
                logps = trainer.scorer.frozen_logps(rows_of(batch, rows))
            self._logps[rows] = logps.to(self._logps.dtype)
            self._scored[rows] = True

    def put_into(self, batch: Batch) -> None:
        """Give a rollout batch what has been scored of it."""
        if self._logps is not None:
            width = batch["completion_ids"].size(1) - self._logps.size(1)  # TRL's padding
            batch["student_logps"] = torch.nn.functional.pad(self._logps, (0, width))
            batch["is_scored"] = self._scored
        self._generated, self._logps = {}, None

    def _wanted(self) -> bool:
        """Whether log-probabilities of these rollouts will be asked for, and can be computed here and now."""
        trainer = self.trainer
        if trainer.engine.gathers_weights or trainer._is_vlm or trainer.args.trl_scores_rollouts:
            return False
        e_step = trainer.parts.refines_teacher and trainer.prior.is_student and trainer.e_step_is_due
        return (
            e_step
            or trainer.args.weighs_importance
            or (trainer.parts.shapes_advantages and trainer.shape_advantages.mix > 0)
        )

    def _as_batch(self) -> Batch:
        device = self.trainer.accelerator.device
        batch = {}
        for name, rows in self._generated.items():
            tensors = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
            side = "left" if name == "prompt_ids" else "right"
            value = self.trainer._tokenizer.pad_token_id if name.endswith("ids") else 0
            batch[name] = pad(tensors, padding_value=value, padding_side=side)
            if name.endswith("ids"):
                mask = [torch.ones_like(row) for row in tensors]
                batch[name.replace("ids", "mask")] = pad(mask, padding_value=0, padding_side=side)
        return batch
