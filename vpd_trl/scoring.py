"""Student and teacher on a batch: log-probabilities of its tokens, and the divergence between the two."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from trl.models.utils import _ForwardRedirection

from .batch import IMAGES, TOKEN_TYPES, Batch, loss_mask, pieces_of
from .losses import Head, TokenDivergence, fused_divergence, sequence_log_ratio, topk_divergence
from .network import completion_hidden_states, head_of, scoring_mode


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

        def score(model: Any) -> torch.Tensor:
            hidden = self._hidden(model, batch, mask, teacher=teacher)
            with self._head_autocast():
                return self._head(model).token_logps(hidden, batch["completion_ids"][mask])

        unwrapped = self.trainer.accelerator.unwrap_model(model)
        return on_mask(self._redirect(model, unwrapped, score, unwrapped), mask)

    def frozen_logps(self, batch: Batch, *, teacher: bool = False) -> torch.Tensor:
        """`sampled_logps` without gradient or dropout, at most `per_device_train_batch_size` rows at a time."""
        model = self.trainer.model
        with scoring_mode(model):
            pieces = pieces_of(batch, self.args.per_device_train_batch_size)
            return torch.cat([self.sampled_logps(model, piece, teacher=teacher) for piece in pieces])

    def divergence(
        self, model: Any, batch: Batch, mask: torch.Tensor
    ) -> tuple[TokenDivergence, torch.Tensor, torch.Tensor]:
        """
        The M-step's divergence on the n tokens of `mask` (B, T), and log-probabilities without gradient.

        Returns:
            The divergence and the student's entropy at each token (n,); the teacher's and the student's
            log-probabilities of the sampled tokens (n,), the teacher's as it is, not sharpened.
        """
        unwrapped = self.trainer.accelerator.unwrap_model(model)
        return self._redirect(model, unwrapped, self._divergence, unwrapped, batch, mask)

    def _divergence(self, model: Any, batch: Batch, mask: torch.Tensor) -> tuple:
        with self.trainer.teacher.target_context(), scoring_mode(model):
            teacher_hidden = self._hidden(model, batch, mask, teacher=True)
            teacher_head = self._head(model).detach()
        student_hidden, student_head = self._hidden(model, batch, mask, teacher=False), self._head(model)

        target_head = teacher_head.sharpened(self.args.target_temperature)
        pair = (student_hidden, teacher_hidden, student_head, target_head)
        alpha, k = self.args.divergence_alpha, self.args.distillation_top_k
        with self._head_autocast():
            if k is None:
                per_token = fused_divergence(*pair, alpha=alpha)
            else:
                per_token = topk_divergence(*pair, alpha=alpha, k=k, add_tail=self.args.distillation_add_tail)
            with torch.no_grad():
                sampled = batch["completion_ids"][mask]
                student_logps = student_head.token_logps(student_hidden, sampled)
                teacher_logps = teacher_head.token_logps(teacher_hidden, sampled)
        return per_token, teacher_logps, student_logps

    def reduce(self, teacher_logps: torch.Tensor, prior_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Log-ratios (B,) of rollouts from log-probabilities (B, T) of their tokens, as `log_ratio_reduction` says."""
        return sequence_log_ratio(teacher_logps, prior_logps, mask, reduction=self.args.log_ratio_reduction)

    def _hidden(self, model: Any, batch: Batch, mask: torch.Tensor, *, teacher: bool) -> torch.Tensor:
        """Hidden states (n, H) that predict the n completion tokens of `mask` (B, T)."""
        prefix = "teacher_prompt" if teacher else "prompt"
        input_ids = torch.cat([batch[f"{prefix}_ids"], batch["completion_ids"]], dim=1)
        attention_mask = torch.cat([batch[f"{prefix}_mask"], batch["completion_mask"]], dim=1)
        with self.trainer.accelerator.autocast():
            images = self._images(batch, input_ids, teacher=teacher)
            hidden = completion_hidden_states(model, input_ids, attention_mask, mask.size(1), **images)[mask]
        return hidden.float() if self.args.cast_lm_head_to_fp32 else hidden

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

    def _head(self, model: Any) -> Head:
        return head_of(model, temperature=self.trainer.temperature, float32=self.args.cast_lm_head_to_fp32)

    def _head_autocast(self) -> AbstractContextManager[Any]:
        """The head runs under autocast like the rest, unless it is to be in float32."""
        return nullcontext() if self.args.cast_lm_head_to_fp32 else self.trainer.accelerator.autocast()


def on_mask(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values (n,) put on the n positions of a boolean mask (B, T), 0 elsewhere."""
    return torch.zeros(mask.shape, device=mask.device, dtype=values.dtype).masked_scatter(mask, values)
