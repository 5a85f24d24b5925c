"""Rollouts are scored while their feedback is on its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from trl.trainer.utils import pad

from .batch import Batch, loss_mask, rows_of


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
        self._generated: dict[str, list[list[int]]] = {}
        self._found: tuple[torch.Tensor, torch.Tensor] | None = None  # (N, T), and which rows (N,) it is of

    def generated(self, prompt_ids: list[list[int]], completion_ids: list[list[int]], own: list | None) -> None:
        """
        Take note of N rollouts.

        Args:
            prompt_ids, completion_ids: Their token ids.
            own: 1 for tokens of completions that were sampled, 0 for those of tools; `None`: there are no tools.
        """
        self._generated = {"prompt": prompt_ids, "completion": completion_ids}
        if own is not None:
            self._generated["tool"] = own
        self._found = None

    def __call__(self, over: Callable[[], bool]) -> None:
        """Score rollouts, those of like length together, until the wait is over."""
        if over() or not self._wanted():
            return
        batch, trainer = self._as_batch(), self.trainer
        own = loss_mask(batch).sum(1)
        lengths = batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)
        logps = torch.zeros(batch["completion_ids"].shape, device=own.device)
        scored = torch.zeros(len(own), dtype=torch.bool, device=own.device)
        self._found = logps, scored
        order = lengths.argsort(descending=True)
        for rows in order[own[order] > 0].split(trainer.args.per_device_train_batch_size):
            if over():
                return
            with trainer.annotator.generating:  # an async function may ask the same network for text
                logps[rows] = trainer.scorer.frozen_logps(rows_of(batch, rows)).to(logps.dtype)
            scored[rows] = True

    def put_into(self, batch: Batch) -> None:
        """Give a rollout batch what has been scored of it."""
        if self._found is not None:
            logps, scored = self._found
            width = batch["completion_ids"].size(1) - logps.size(1)  # TRL's padding
            batch |= {"student_logps": torch.nn.functional.pad(logps, (0, width)), "is_scored": scored}
        self._generated, self._found = {}, None

    def _wanted(self) -> bool:
        """Whether log-probabilities of these rollouts will be asked for, and can be computed here and now."""
        trainer, args = self.trainer, self.trainer.args
        if trainer.engine.gathers_weights or trainer._is_vlm or args.trl_scores_rollouts:
            return False
        if args.weighs_importance or (trainer.parts.shapes_advantages and trainer.shape_advantages.mix > 0):
            return True
        # An E-step that waits for the end of an accumulation window has another student
        at_once = trainer._step % args.gradient_accumulation_steps == 0
        return trainer.parts.refines_teacher and trainer.prior.is_student and trainer.e_step_is_due and at_once

    def _as_batch(self) -> Batch:
        """The rollouts as TRL will put them into tensors."""
        device, tokenizer = self.trainer.accelerator.device, self.trainer._tokenizer
        ends = {*self.trainer.eos_token_ids, tokenizer.pad_token_id}
        batch = {}
        for name, rows in self._generated.items():
            ids = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
            side = "left" if name == "prompt" else "right"
            if name == "tool":
                batch["tool_mask"] = pad(ids, padding_value=0, padding_side=side)
                continue
            mask = [torch.ones_like(row) for row in ids]
            if name == "completion" and self.trainer.mask_truncated_completions:
                mask = [m * int(bool(row) and row[-1] in ends) for m, row in zip(mask, rows, strict=True)]
            batch[f"{name}_ids"] = pad(ids, padding_value=tokenizer.pad_token_id, padding_side=side)
            batch[f"{name}_mask"] = pad(mask, padding_value=0, padding_side=side)
        return batch
