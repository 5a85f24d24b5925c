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

from .losses import VOCABULARY_TILE, Head, divergence, top_k_logps


if TYPE_CHECKING:
    from .config import VPDConfig


class Tiles(NamedTuple):
    """
    How much is computed at one time.

    Attributes:
        chunk: Elements of a model's logits; matrix products want many rows.
        block: Of these, elements that become divergence and gradient, which takes up to fifteen tensors of this size.
    """

    chunk: int
    block: int


CPU_TILES = Tiles(2**24, 2**20)
GPU_TILES = Tiles(2**27, 2**22)

# A log-probability, nats, that stands for minus infinity: differences of such numbers stay numbers
LEAST = -1e4

# float16 has no numbers for the smallest gradients; what is multiplied with them is scaled by this
HALF_SCALE = 256.0


class Distillation(NamedTuple):
    """
    The M-step's loss on N tokens, nats.

    Attributes:
        loss: Sum of the divergences, each times its weight, (), with gradient to the student. The rest is without.
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
    """

    alpha: float
    top_k: int | None = None
    add_tail: bool = True
    target_temperature: float = 1.0

    @classmethod
    def of(cls, args: VPDConfig) -> Comparison:
        """What a configuration asks for."""
        return cls(
            alpha=args.divergence_alpha,
            top_k=args.distillation_top_k,
            add_tail=args.distillation_add_tail,
            target_temperature=args.target_temperature,
        )

    def __call__(
        self, student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor | None = None
    ) -> Distillation:
        """
        Distillation on a block of tokens.

        Args:
            student, teacher: Logits (n, V), divided by the temperature.
            tokens: Those that were sampled (n,).
            weights: Of the tokens in the loss (n,); `None`: all 1.
        """
        student = student.log_softmax(-1).clamp(min=LEAST)
        with torch.no_grad():
            teacher = teacher.log_softmax(-1).clamp_(min=LEAST)
            student_logps, teacher_logps = (logps.gather(-1, tokens[:, None])[:, 0] for logps in (student, teacher))
            entropy = torch.special.entr(student.exp()).sum(-1)
            if self.target_temperature != 1.0:
                teacher = (teacher / self.target_temperature).log_softmax(-1).clamp_(min=LEAST)
        if self.top_k is not None:
            indices = student.detach().topk(self.top_k, dim=-1, sorted=False).indices
            student, teacher = (top_k_logps(logps, indices, tail=self.add_tail) for logps in (student, teacher))
        per_token = divergence(student, teacher, alpha=self.alpha)
        loss = per_token if weights is None else per_token * weights
        return Distillation(loss.sum(), per_token.detach(), entropy, student_logps, teacher_logps)


def distill(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student: Head,
    teacher: Head,
    tokens: torch.Tensor,
    compare: Comparison,
    *,
    weights: torch.Tensor | None = None,
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
        weights: Of the tokens in the loss (N,), without gradient; `None`: all 1.
        tiles: How much at one time; `None` is what suits the device.
    """
    inputs = (student_hidden, student.weight, student.bias, teacher_hidden, teacher.weight, teacher.bias)
    if tiles is None:
        tiles = CPU_TILES if student_hidden.device.type == "cpu" else GPU_TILES
    options = (student, teacher, compare, tiles, torch.is_grad_enabled())
    return Distillation(*_Distill.apply(*inputs, tokens, weights, *options))


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
        weights: torch.Tensor | None,
        student: Head,
        teacher: Head,
        compare: Comparison,
        tiles: Tiles,
        gradients: bool,
    ) -> Distillation:
        wanted = [bool(w) and gradients for w in ctx.needs_input_grad[:3]]
        size = len(hidden)
        loss = hidden.new_zeros((), dtype=torch.float32)
        per_token = [hidden.new_empty(size, dtype=torch.float32) for _ in range(4)]
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with maybe_gather_lm_head_ctx(weight, bias), maybe_gather_lm_head_ctx(teacher_weight, teacher_bias):
            sums = _Gradients(hidden, weight, bias, wanted)
            for chunk in _slices(size, max(tiles.chunk // len(weight), 1)):
                h = hidden[chunk].to(dtype)
                logits = _projected(h, weight, bias)
                targets = _projected(teacher_hidden[chunk].to(dtype), teacher_weight, teacher_bias)
                for block in _slices(len(h), max(tiles.block // len(weight), 1)):
                    here = slice(chunk.start + block.start, chunk.start + block.stop)
                    w = None if weights is None else weights[here]
                    found = _compared(
                        compare,
                        student,
                        teacher,
                        logits[block],
                        targets[block],
                        tokens[here],
                        w,
                        differentiate=any(wanted),
                    )
                    loss += found.loss
                    for whole, part in zip(per_token, found[1:], strict=True):
                        whole[here] = part
                if any(wanted):
                    sums.add(chunk, logits, h)
                del logits, targets  # before the next ones are there
        ctx.sums = sums
        ctx.mark_non_differentiable(*per_token)
        return Distillation(loss, *per_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.sums is None:
            raise RuntimeError("The gradients of a distillation are there for one backward pass.")
        sums, ctx.sums = ctx.sums, None
        return *sums.times(grad_loss), *(None,) * 10


class _Gradients:
    """
    Gradients of the loss with respect to hidden states (N, H), weight (V, H) and bias (V,), as they add up.

    In float32, even where the inputs are not: many small numbers are added.
    """

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted: list[bool]
    ) -> None:
        self.weight = weight
        self.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        self.hidden, self.head, self.bias = (
            torch.zeros_like(x, dtype=torch.float32) if x is not None and w else None
            for x, w in zip((hidden, weight, bias), wanted, strict=True)
        )
        self.scale = 1.0

    def add(self, rows: slice, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
        """Add what the gradient (n, V) of the products of hidden states (n, H) with the head makes of these."""
        if self.bias is not None:
            self.bias += gradient.sum(0)
        if hidden.dtype == torch.float16:
            self.scale = HALF_SCALE
            gradient.mul_(self.scale)
        for columns in _slices(len(self.weight), VOCABULARY_TILE):
            part = gradient[:, columns].to(hidden.dtype)
            if self.hidden is not None:
                _addmm_fp32(self.hidden[rows], part, self.weight[columns].to(hidden.dtype))
            if self.head is not None:
                _addmm_fp32(self.head[columns], part.t(), hidden)

    def times(self, factor: torch.Tensor) -> Iterator[torch.Tensor | None]:
        """The gradients times `factor` (), each in its input's precision. Once only: they are written over."""
        scaled = factor / self.scale
        sums = (self.hidden, self.head, self.bias)
        self.hidden = self.head = self.bias = None
        for total, dtype, by in zip(sums, self.dtypes, (scaled, scaled, factor), strict=True):
            yield None if total is None else total.mul_(by).to(dtype)


def _compared(
    compare: Comparison,
    student: Head,
    teacher: Head,
    product: torch.Tensor,
    target: torch.Tensor,
    *the_rest: Any,
    differentiate: bool,
) -> Distillation:
    """The comparison from both products with the heads; the loss's gradient is written over the student's."""
    if not differentiate:
        return compare(student.shaped(product), teacher.shaped(target), *the_rest)
    with torch.enable_grad():
        variable = product.detach().requires_grad_()
        found = compare(student.shaped(variable), teacher.shaped(target), *the_rest)
    (gradient,) = torch.autograd.grad(found.loss, variable)
    product.copy_(gradient)
    return found._replace(loss=found.loss.detach())


def _projected(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The head's matrix product (n, V) in float32, whatever the precision of its factors."""
    product = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
    for c in _slices(len(weight), VOCABULARY_TILE):
        _project(product[:, c], hidden, weight, bias, c.start, c.stop, hidden.dtype)
    return product


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
