"""
The M-step's loss from hidden states, without the logits of all tokens ever being there.

Tokens go through in chunks. Each chunk is taken to its end at once: logits of student and teacher, divergence, and the
gradient with respect to the student's hidden states and head, which a scalar loss only scales. So no logits are kept for
the backward pass or computed again in it: of the matrix products with the head there are those of full logits, no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from trl.kernels.chunked_divergence import _project
from trl.kernels.chunked_logprob import _addmm_fp32
from trl.trainer.utils import maybe_gather_lm_head_ctx

from .losses import VOCABULARY_TILE, Head, divergence, importance_ratio, top_k_logps


if TYPE_CHECKING:
    from .config import VPDConfig


class Tiles(NamedTuple):
    """
    How much is computed at one time.

    Attributes:
        chunk: Elements of a model's logits; matrix products want many rows.
        block: Of these, elements that become divergence and gradient, which takes some ten tensors of this size.
    """

    chunk: int
    block: int


CPU_TILES = Tiles(2**24, 2**20)
GPU_TILES = Tiles(2**27, 2**24)


class Distillation(NamedTuple):
    """
    The M-step's loss on N tokens, nats.

    Attributes:
        loss: Sum of the weighted divergences (), with gradient to the student. The rest is without.
        divergence: Per token (N,), not weighted.
        entropy: The student's (N,).
        student_logps: Log-probabilities of the sampled tokens under the student (N,).
        teacher_logps: The same under the teacher (N,), as it is, not sharpened.
    """

    loss: torch.Tensor
    divergence: torch.Tensor
    entropy: torch.Tensor
    student_logps: torch.Tensor
    teacher_logps: torch.Tensor


class Comparison(NamedTuple):
    """
    How two distributions over the vocabulary are compared.

    Attributes:
        alpha: As in [`~losses.divergence`].
        top_k: How many of the student's likeliest tokens; `None` is the full vocabulary. Both distributions are
            normalised over all of it first.
        add_tail: With `top_k`, whether one more event holds the probability of all other tokens; without it the k are
            renormalised to sum to 1.
        target_temperature: The teacher's log-probabilities are divided by this and normalised again: below 1 the target
            is sharper than the teacher.
        importance_clip: Most that the importance ratio of a token may be; `None` is for no such weight.
    """

    alpha: float
    top_k: int | None = None
    add_tail: bool = True
    target_temperature: float = 1.0
    importance_clip: float | None = None

    @classmethod
    def of(cls, args: VPDConfig) -> Comparison:
        """What a configuration asks for."""
        return cls(
            alpha=args.divergence_alpha,
            top_k=args.distillation_top_k,
            add_tail=args.distillation_add_tail,
            target_temperature=args.target_temperature,
            importance_clip=args.m_step_importance_clip,
        )

    def __call__(
        self, student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor, old_logps: torch.Tensor | None
    ) -> Distillation:
        """
        Distillation on a block of tokens.

        Args:
            student, teacher: Logits (n, V), divided by the temperature.
            tokens: Those that were sampled (n,).
            old_logps: Their log-probabilities (n,) at sampling, where there is an importance ratio.
        """
        student = student.log_softmax(-1)
        with torch.no_grad():
            teacher = teacher.log_softmax(-1)
            student_logps, teacher_logps = (logps.gather(-1, tokens[:, None])[:, 0] for logps in (student, teacher))
            entropy = torch.special.entr(student.exp()).sum(-1)
            if self.target_temperature != 1.0:
                teacher = (teacher / self.target_temperature).log_softmax(-1)
        if self.top_k is not None:
            indices = student.detach().topk(self.top_k, dim=-1, sorted=False).indices
            student, teacher = (top_k_logps(logps, indices, tail=self.add_tail) for logps in (student, teacher))
        per_token = divergence(student, teacher, alpha=self.alpha)
        loss = per_token
        if old_logps is not None and self.importance_clip is not None:
            loss = per_token * importance_ratio(student_logps, old_logps, clip=self.importance_clip)
        return Distillation(loss.sum(), per_token.detach(), entropy, student_logps, teacher_logps)


def distill(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student: Head,
    teacher: Head,
    tokens: torch.Tensor,
    compare: Comparison,
    *,
    old_logps: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> Distillation:
    """
    The divergence of a student from its teacher, summed over tokens, from hidden states (N, H) of both. Eq. 10.

    The teacher is a constant. Products with the head are made in the hidden states' precision, or autocast's, and added
    up in float32, as all that follows is. Has a gradient, but no second one.

    Args:
        student_hidden, teacher_hidden: (N, H); the two may differ in H.
        student, teacher: The heads.
        tokens: The sampled tokens (N,).
        compare: How.
        old_logps: Log-probabilities (N,) of `tokens` at sampling, for importance ratios.
        tiles: How much at one time; `None` is what suits the device.
    """
    inputs = (student_hidden, student.weight, student.bias, teacher_hidden, teacher.weight, teacher.bias)
    if tiles is None:
        tiles = CPU_TILES if student_hidden.device.type == "cpu" else GPU_TILES
    options = (student, teacher, compare, tiles, torch.is_grad_enabled())
    return Distillation(*_Distill.apply(*inputs, tokens, old_logps, *options))


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        teacher_hidden: torch.Tensor,
        # No gradient to these. Not detached: an engine that shards weights knows them by who they are
        teacher_weight: torch.Tensor,
        teacher_bias: torch.Tensor | None,
        tokens: torch.Tensor,
        old_logps: torch.Tensor | None,
        student: Head,
        teacher: Head,
        compare: Comparison,
        tiles: Tiles,
        gradients: bool,
    ) -> Distillation:
        def zeros(like: torch.Tensor | None, wanted: bool) -> torch.Tensor | None:
            # In float32, even where the inputs are not: many small ones are added up
            return torch.zeros_like(like, dtype=torch.float32) if like is not None and wanted and gradients else None

        wanted = ctx.needs_input_grad[:3]
        grads = [zeros(x, w) for x, w in zip((hidden, weight, bias), wanted, strict=True)]
        grad_hidden, grad_weight, grad_bias = grads
        size, vocabulary = len(hidden), weight.size(0)
        loss = hidden.new_zeros((), dtype=torch.float32)
        per_token = [hidden.new_empty(size, dtype=torch.float32) for _ in range(4)]
        dtype = _computed_in(hidden)
        with maybe_gather_lm_head_ctx(weight, bias), maybe_gather_lm_head_ctx(teacher_weight, teacher_bias):
            for chunk in _slices(size, max(tiles.chunk // vocabulary, 1)):
                h = hidden[chunk].to(dtype)
                logits = _projected(h, weight, bias)
                targets = _projected(teacher_hidden[chunk].to(dtype), teacher_weight, teacher_bias)
                for block in _slices(len(h), max(tiles.block // vocabulary, 1)):
                    here = slice(chunk.start + block.start, chunk.start + block.stop)
                    old = None if old_logps is None else old_logps[here]
                    the_rest = (teacher.shaped(targets[block]), tokens[here], old)
                    found = _with_gradient(compare, student, logits[block], *the_rest, wanted=gradients)
                    loss += found.loss
                    for whole, part in zip(per_token, found[1:], strict=True):
                        whole[here] = part
                if gradients:
                    _add_products(logits, h, weight, None if grad_hidden is None else grad_hidden[chunk], grad_weight)
                if grad_bias is not None:
                    grad_bias += logits.sum(0)
                del logits, targets  # before the next ones are there
        ctx.grads = grads
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(*per_token)
        return Distillation(loss, *per_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("The gradients of a distillation are there for one backward pass.")
        grads, ctx.grads = ctx.grads, None
        scaled = [
            None if g is None else g.mul_(grad_loss).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return *scaled, *(None,) * 10


def _with_gradient(
    compare: Comparison, head: Head, product: torch.Tensor, *the_rest: Any, wanted: bool
) -> Distillation:
    """The comparison from the student's product with its head, which the loss's gradient takes the place of."""
    if not wanted:
        return compare(head.shaped(product), *the_rest)
    with torch.enable_grad():
        variable = product.detach().requires_grad_()
        found = compare(head.shaped(variable), *the_rest)
    (gradient,) = torch.autograd.grad(found.loss, variable)
    product.copy_(gradient)
    return found._replace(loss=found.loss.detach())


def _add_products(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
) -> None:
    """Add to the gradients of hidden states and head what that of their product (n, V) makes of them."""
    for columns in _slices(len(weight), VOCABULARY_TILE):
        part = gradient[:, columns].to(hidden.dtype)
        if grad_hidden is not None:
            _addmm_fp32(grad_hidden, part, weight[columns].to(hidden.dtype))
        if grad_weight is not None:
            _addmm_fp32(grad_weight[columns], part.t(), hidden)


def _projected(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The head's matrix product (n, V) in float32, whatever the precision of its factors."""
    product = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
    for c in _slices(len(weight), VOCABULARY_TILE):
        _project(product[:, c], hidden, weight, bias, c.start, c.stop, hidden.dtype)
    return product


def _computed_in(hidden: torch.Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
