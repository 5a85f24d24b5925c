"""
The losses of Variational Policy Distillation as pure functions.

Every function takes tensors and returns one value per rollout or per token, in nats and in float32 or better. Nothing
here logs, reduces over processes or keeps state. Equation numbers are those of the VPD paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from trl.kernels import ChunkedLogProbFunction


VOCABULARY_TILE = 32768

# Tokens at one time on a CPU, where TRL's function holds eight tiles of float32 logits: 268 MB
CPU_CHUNK_SIZE = 256


class Head(NamedTuple):
    """
    What turns a hidden state h into logits: z = softcap · tanh(scale · (h Wᵀ + b) / softcap) / temperature.

    `weight` is (V, H), `bias` (V,) or `None`; without `softcap` the tanh is left out.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def shaped(self, product: torch.Tensor) -> torch.Tensor:
        """Logits (N, V), divided by the temperature, from h Wᵀ + b of the same shape."""
        z = product * self.scale if self.scale != 1.0 else product
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature if self.temperature != 1.0 else z

    def kept(self, keep: Callable[[torch.Tensor], torch.Tensor]) -> Head:
        """The head with `keep(tensor)` of its weights."""
        return self._replace(weight=keep(self.weight), bias=None if self.bias is None else keep(self.bias))

    def token_logps(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (N,) of the tokens (N,) that follow hidden states (N, H), on tiles of the vocabulary."""
        options = (self.temperature, VOCABULARY_TILE, self.softcap, self.scale)
        chunks = [
            ChunkedLogProbFunction.apply(h, self.weight, self.bias, t, *options)[0]
            for h, t in zip(_tiles(hidden), _tiles(tokens), strict=True)
        ]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def sequence_log_ratio(
    teacher_logps: torch.Tensor, prior_logps: torch.Tensor, mask: torch.Tensor, *, reduction: str = "sum"
) -> torch.Tensor:
    """
    Per-rollout log-ratio log q(y|x,f) − log π(y|x) (B,), nats, from per-token log-probabilities (B, T). Eq. 7.

    `mask` (B, T) is 1 on the tokens that count. `reduction="sum"` is the equation's; `"mean"` divides by the number
    of tokens (at least 1), which makes long and short rollouts comparable.
    """
    dtype = torch.promote_types(teacher_logps.dtype, torch.float32)  # bfloat16 can't count to 257
    teacher_logps, prior_logps, mask = teacher_logps.to(dtype), prior_logps.to(dtype), mask.to(dtype)
    # `where`, not a product: a masked position may hold an infinity
    total = torch.where(mask > 0, teacher_logps - prior_logps, 0.0).sum(-1)
    return total if reduction == "sum" else total / mask.sum(-1).clamp(min=1.0)


def bco_loss(
    log_ratio: torch.Tensor, success: torch.Tensor, *, temperature: float, shift: float | torch.Tensor
) -> torch.Tensor:
    """
    Per-rollout loss of Binary Classifier Optimization (B,), nats. Eq. 9, Jung et al. (2404.04656).

    −log σ(ρ − δ) for a success and −log σ(δ − ρ) for a failure, where ρ = `temperature` · `log_ratio` (B,) is the
    implicit reward and δ = `shift` the reward shift. `success` (B,) is boolean. It is ln 2 at zero margin; the E-step
    adds the mean over successes and the mean over failures, which makes ln 4.
    """
    margin = temperature * log_ratio - shift
    return F.softplus(torch.where(success, -margin, margin))


def divergence(student_logps: torch.Tensor, teacher_logps: torch.Tensor, *, alpha: float) -> torch.Tensor:
    """
    Divergence between two distributions over the last dimension, (…, V) → (…), nats. Eq. 10.

    `alpha=0` is the forward KL(teacher ‖ student), `alpha=1` the reverse KL(student ‖ teacher); between them, with
    the mixture m = (1 − alpha) · student + alpha · teacher, the generalised Jensen–Shannon divergence
    (1 − alpha) · KL(student ‖ m) + alpha · KL(teacher ‖ m). The teacher is a constant.
    """
    teacher_logps = teacher_logps.detach()
    if alpha == 0.0:
        return _kl(teacher_logps, student_logps)
    if alpha == 1.0:
        return _kl(student_logps, teacher_logps)
    mixture = torch.logaddexp(student_logps + math.log1p(-alpha), teacher_logps + math.log(alpha))
    return (1 - alpha) * _kl(student_logps, mixture) + alpha * _kl(teacher_logps, mixture)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) of log-probabilities over the last dimension; an event of probability 0 under p adds 0."""
    weight = p.exp()
    return (weight * torch.where(weight > 0, p - q, 0.0)).sum(-1)


def top_k_logps(logps: torch.Tensor, indices: torch.Tensor, *, tail: bool) -> torch.Tensor:
    """
    Log-probabilities of the k events at `indices` (N, k) of a distribution `logps` (N, V).

    With `tail`, one more event holds all the others: (N, k + 1), or (N, k) if there are no others. Without, the k are
    a distribution of their own. The tail is summed up, not 1 − Σ: what float32 leaves of that difference is noise once
    the k hold nearly everything.
    """
    chosen = logps.gather(-1, indices)
    if not tail:
        return chosen.log_softmax(-1)
    if indices.size(-1) == logps.size(-1):
        return chosen
    others = logps.scatter(-1, indices, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, others], dim=-1)


def _tiles(rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """Without Triton's kernels, TRL's function holds eight tiles of the logits at one time: make them low."""
    return rows.split(CPU_CHUNK_SIZE) if rows.device.type == "cpu" and len(rows) else [rows]


def sharpened_logps(logps: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    Log-probabilities of q^(1/`temperature`), normalised, from log q of an event, same shape, nats: log σ(logit(q) / `temperature`).

    Exact where all the other mass is on one event; otherwise too low for a temperature below 1 and too high above it.
    """
    if temperature == 1.0:
        return logps
    logits = logps - torch.log(-torch.expm1(logps))  # infinite at q = 1, which stays 1
    return F.logsigmoid(logits / temperature)


def importance_ratio(logps: torch.Tensor, old_logps: torch.Tensor, *, clip: float) -> torch.Tensor:
    """
    Clipped importance ratio min(exp(log π − log π_old), `clip`), same shape as its inputs, without gradient.

    Corrects the M-step for rollouts that an older student sampled. The paper found no need for it (section 3.4).
    """
    return (logps.detach() - old_logps.detach()).clamp(-20.0, 20.0).exp().clamp(max=clip)


def reshaped_advantages(advantages: torch.Tensor, log_ratio: torch.Tensor, *, mix: float) -> torch.Tensor:
    """
    Per-token advantages (1 − λ) · A + λ · Δ, (B, T). Eq. B.24.

    `advantages` A (B,) are GRPO's, one per rollout; `log_ratio` Δ (B, T) is log q − log π of each token, nats; λ =
    `mix` in [0, 1].
    """
    return (1 - mix) * advantages.unsqueeze(-1) + mix * log_ratio


def reweighted_advantages(
    advantages: torch.Tensor, log_ratio: torch.Tensor, *, mix: float, clip: float
) -> torch.Tensor:
    """
    Per-token advantages A · [(1 − λ) + λ · clip(exp(sign(A) · Δ), 1 − ε, 1 + ε)], (B, T). Eqs. B.27 and B.28.

    A success gives more credit to tokens that the teacher favours, a failure more blame to those that it disfavours;
    the sign stays the verifier's. `advantages` A (B,), `log_ratio` Δ (B, T), nats; λ = `mix` in [0, 1], ε = `clip`.
    """
    advantages = advantages.unsqueeze(-1)
    weight = (advantages.sign() * log_ratio).exp().clamp(1 - clip, 1 + clip)
    return advantages * ((1 - mix) + mix * weight)
