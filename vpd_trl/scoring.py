"""Student and teacher on a batch: log-probabilities of its tokens, and the divergence between the two."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from trl.models.utils import _ForwardRedirection

from .batch import IMAGES, TOKEN_TYPES, Batch, loss_mask, pieces_of, rows_of
from .distillation import Comparison, Distillation, distill
from .lengths import CPU_PASS_COST, GPU_PASS_COST, compact, of_like_length, up_to_targets
from .losses import Head, importance_ratio, sequence_log_ratio
from .network import (
    at_head,
    has_dropout,
    hidden_states,
    positions_are_relative,
    recomputes_reentrantly,
    scoring_mode,
)


if TYPE_CHECKING:
    from .trainer import VPDTrainer


class Scorer:
    """
    Runs the network on the rows of a batch, as student or as teacher.

    Everything goes through the wrapper's `forward`, which prepares the reduction of gradients over processes. The
    head is applied to the tokens of the loss mask alone, on every device.

    Args:
        trainer: The trainer, with its model and teacher.
    """

    def __init__(self, trainer: VPDTrainer) -> None:
        self.trainer = trainer
        self.args = trainer.args
        self.compare = Comparison.of(trainer.args)
        self._redirect = _ForwardRedirection()

    def sampled_logps(self, model: Any, batch: Batch, *, teacher: bool) -> torch.Tensor:
        """
        Log-probabilities (B, T) of the sampled tokens at the sampling temperature, 0 where the loss mask is 0.

        Args:
            model: The trainer's model, wrapped where gradients are wanted.
            batch: The rows.
            teacher: Whether the teacher's prompt stands before the completion.
        """
        mask = loss_mask(batch).bool()
        tokens = batch["completion_ids"][mask]

        def score(model: Any) -> torch.Tensor:
            hidden = self._hidden(model, batch, mask, teacher=teacher)
            return self._at_head(model, lambda head, hidden: head.token_logps(hidden, tokens), hidden)

        return on_mask(self._run(model, score), mask)

    def frozen_logps(self, batch: Batch, *, teacher: bool = False) -> torch.Tensor:
        """`sampled_logps` without gradient or dropout, at most `per_device_train_batch_size` rows at a time."""
        model = self.trainer.model
        with scoring_mode(model):
            pieces = pieces_of(batch, self.args.per_device_train_batch_size)
            return torch.cat([self.sampled_logps(model, piece, teacher=teacher) for piece in pieces])

    def rows_to_score(self, batch: Batch) -> torch.Tensor:
        """The rows of a batch that have to be scored: with feedback and a target, or all where processes go together."""
        has_feedback = batch["has_feedback"]
        if self.trainer.engine.gathers_weights:  # equally many passes on all processes
            return torch.arange(len(has_feedback), device=has_feedback.device)
        return (has_feedback & loss_mask(batch).any(-1)).nonzero().squeeze(-1)

    def student_logps(self, batch: Batch, rows: torch.Tensor) -> torch.Tensor:
        """
        The student's `frozen_logps` (B, T) of some rows, by number (n,); of others what is known, or 0.

        Those that the batch has ("student_logps" where "is_scored") are not computed again. They are of the weights
        that sampled the rollouts.
        """
        rows = rows.to(batch["completion_ids"].device)
        if "student_logps" in batch:
            logps, rows = batch["student_logps"], rows[~batch["is_scored"][rows]]
        else:
            logps = torch.zeros(batch["completion_ids"].shape, device=rows.device)
        if len(rows):
            logps = logps.clone()
            logps[rows] = self.frozen_logps(rows_of(batch, rows)).to(logps.dtype)
        return logps

    def sampling_logps(self, batch: Batch) -> torch.Tensor:
        """
        The student's `frozen_logps` of rollouts that have just been sampled, of those with feedback at least.

        Those that TRL has computed, if it has, unless dropout or positions that padding moves made others of them.
        """
        old_logps, model = batch.get("old_per_token_logps"), self.trainer.model
        if old_logps is not None and positions_are_relative(model) and not has_dropout(model):
            return old_logps
        return self.student_logps(batch, self.rows_to_score(batch))

    def keep_sampling_logps(self, batch: Batch) -> None:
        """Put `sampling_logps` into a batch. Not under TRL's name for them: GRPO's loss would take them too."""
        batch["student_logps"] = self.sampling_logps(batch)
        scored = torch.zeros_like(batch["has_feedback"])
        scored[self.rows_to_score(batch)] = True
        batch["is_scored"] = scored

    def distill(self, model: Any, batch: Batch, mask: torch.Tensor) -> Distillation:
        """The M-step's loss on the n tokens of `mask` (B, T), with its importance weights where it has any."""
        tokens, clip = batch["completion_ids"][mask], self.args.m_step_importance_clip
        teacher_hidden, teacher_head = self._target(batch, mask)

        def compare(head: Head, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
            target = teacher_hidden.to(hidden.dtype)
            weights = None
            if clip is not None:
                # Rounded as those at sampling were: what `distill` finds is closer to the truth, and so not to them
                with torch.no_grad():
                    logps = head.token_logps(hidden, tokens)
                weights = importance_ratio(logps, batch["student_logps"][mask], clip=clip)
            # A plain tuple: engines take apart what a forward pass returns
            return tuple(distill(hidden, target, head, teacher_head or head, tokens, self.compare, weights=weights))

        def score(model: Any) -> tuple[torch.Tensor, ...]:
            return self._at_head(model, compare, self._hidden(model, batch, mask, teacher=False))

        return Distillation(*self._run(model, score))

    def _target(self, batch: Batch, mask: torch.Tensor) -> tuple[torch.Tensor, Head | None]:
        """
        The teacher's hidden states (n, H), and its head if that is not the student's.

        A forward pass of its own: where weights are sharded, other ones can only be put in place between two.
        """
        teacher, model = self.trainer.teacher, self.trainer.model
        own_head: list[Head] = []

        def read(head: Head, hidden: torch.Tensor) -> torch.Tensor:
            own_head.append(head.kept(self.trainer.engine.kept))
            return hidden

        def score(model: Any) -> torch.Tensor:
            hidden = self._hidden(model, batch, mask, teacher=True)
            return self._at_head(model, read, hidden) if teacher.has_own_head else hidden

        with teacher.target_context(), scoring_mode(model):
            hidden = self._run(model, score)
        return hidden, own_head[0] if own_head else None

    def reduce(self, teacher_logps: torch.Tensor, prior_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Log-ratios (B,) of rollouts from log-probabilities (B, T) of their tokens, as `log_ratio_reduction` says."""
        return sequence_log_ratio(teacher_logps, prior_logps, mask, reduction=self.args.log_ratio_reduction)

    def _hidden(self, model: Any, batch: Batch, mask: torch.Tensor, *, teacher: bool) -> torch.Tensor:
        """
        Hidden states (n, H) that predict the n completion tokens of `mask` (B, T).

        Rows of unlike length go through the network apart, where that saves more padding than a pass costs.
        """
        groups = self._groups(batch, mask, teacher=teacher)
        if not groups:
            return self._hidden_together(model, batch, mask, teacher=teacher)
        row = mask.nonzero()[:, 0]  # of each of the n tokens
        found, places = [], []
        for rows in groups:
            found.append(self._hidden_together(model, rows_of(batch, rows), mask[rows], teacher=teacher))
            places.append(torch.isin(row, rows).nonzero()[:, 0])
        return torch.cat(found)[torch.cat(places).argsort()]

    def _groups(self, batch: Batch, mask: torch.Tensor, *, teacher: bool) -> list[torch.Tensor]:
        """Rows that go through the network together, without those that have no target; none if all go together."""
        if len(mask) == 1 or self._keeps_rows_together or "pixel_values" in batch:
            return []
        prompt, completion = batch["teacher_prompt_mask" if teacher else "prompt_mask"], batch["completion_mask"]
        rows = mask.any(1).nonzero()[:, 0]
        lengths = (prompt.sum(1) + up_to_targets(completion, mask).sum(1))[rows]
        cost = CPU_PASS_COST if mask.device.type == "cpu" else GPU_PASS_COST
        return [rows[group] for group in of_like_length(lengths.tolist(), cost)]

    @cached_property
    def _keeps_rows_together(self) -> bool:
        """Whether a forward pass must go through the network once."""
        return self.trainer.engine.gathers_weights or recomputes_reentrantly(self.trainer.model)

    def _hidden_together(self, model: Any, batch: Batch, mask: torch.Tensor, *, teacher: bool) -> torch.Tensor:
        """`_hidden` of rows that are padded to the longest of them."""
        prefix = "teacher_prompt" if teacher else "prompt"
        input_ids = torch.cat([batch[f"{prefix}_ids"], batch["completion_ids"]], dim=1)
        attention_mask = torch.cat([batch[f"{prefix}_mask"], batch["completion_mask"]], dim=1)
        inputs = self._images(batch, input_ids, teacher=teacher)
        targets = torch.cat([torch.zeros_like(attention_mask[:, : -mask.size(1)], dtype=torch.bool), mask], dim=1)
        # A vision-language model wants all of the places that its images go to
        columns, attention_mask, predicts = compact(attention_mask, targets, whole="pixel_values" in inputs)
        inputs |= {name: types.gather(1, columns) for name, types in inputs.items() if name in TOKEN_TYPES}
        with self.trainer.accelerator.autocast():
            return hidden_states(model, input_ids.gather(1, columns), attention_mask, **inputs)[predicts]

    def _images(self, batch: Batch, input_ids: torch.Tensor, *, teacher: bool) -> dict[str, torch.Tensor]:
        """What a vision-language model takes beside token ids (B, P + T): the same images for student and teacher."""
        inputs = {name: batch[name] for name in IMAGES if name in batch}
        if "pixel_values" in inputs and not inputs["pixel_values"].numel():  # no row here has an image
            inputs = {}
        for name in TOKEN_TYPES:
            if name in batch and not teacher:
                inputs[name] = batch[name]
            elif name in batch:
                prompt = batch["teacher_prompt_ids"].size(1)
                inputs[name] = self._token_types(batch, name, input_ids, prompt)
        return inputs

    @staticmethod
    def _token_types(batch: Batch, name: str, input_ids: torch.Tensor, prompt: int) -> torch.Tensor:
        """Token types (B, P + T) of the teacher's input: what the student's prompt shows as an image is one here too."""
        types = torch.zeros_like(input_ids, dtype=batch[name].dtype)
        student_prompt = batch["prompt_ids"].size(1)
        types[:, prompt:] = batch[name][:, student_prompt:]
        for kind in batch[name].unique():
            if kind != 0:
                shown = batch["prompt_ids"][batch[name][:, :student_prompt] == kind]
                types[:, :prompt][torch.isin(input_ids[:, :prompt], shown)] = kind
        return types

    def _run(self, model: Any, function: Callable[[Any], Any]) -> Any:
        """`function(unwrapped model)` as the forward pass of a model."""
        unwrapped = self.trainer.accelerator.unwrap_model(model)
        return self._redirect(model, unwrapped, function, unwrapped)

    def _at_head(self, model: Any, function: Callable[..., Any], hidden: torch.Tensor) -> Any:
        """`function(head, hidden states)` in the head's forward pass, in the precision that it is to have."""
        float32 = self.args.cast_lm_head_to_fp32

        def within(head: Head, hidden: torch.Tensor) -> Any:
            with self._head_autocast():
                return function(head, hidden.float() if float32 else hidden)

        return at_head(model, within, hidden, temperature=self.trainer.temperature, float32=float32)

    def _head_autocast(self) -> AbstractContextManager[Any]:
        """The head runs under autocast like the rest, unless it is to be in float32."""
        return nullcontext() if self.args.cast_lm_head_to_fp32 else self.trainer.accelerator.autocast()


def on_mask(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values (n,) put on the n positions of a boolean mask (B, T), 0 elsewhere."""
    return torch.zeros(mask.shape, device=mask.device, dtype=values.dtype).masked_scatter(mask, values)
