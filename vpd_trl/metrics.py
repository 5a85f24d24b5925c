"""Means over tokens or rollouts that are right over micro-batches and processes."""

from __future__ import annotations

import math
from typing import Any

import torch


class Means:
    """
    Accumulates sums and counts under names, and reduces them over processes.

    Every process must add the same names in the same order before it reduces.
    """

    def __init__(self) -> None:
        self._totals: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, name: str, values: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add values, those where `mask` is nonzero if it is given."""
        values = values.float()
        if mask is None:
            mask = torch.ones_like(values)
        mask = mask.to(values.dtype)
        total = torch.stack([torch.where(mask > 0, values, 0.0).sum(), mask.sum()])
        self._totals[name] = self._totals.get(name, 0.0) + total

    def add_by_outcome(self, values: torch.Tensor, outcome: torch.Tensor, mask: torch.Tensor) -> None:
        """Add values of rollouts (B,) under "successes" and "failures", those where the boolean `mask` is true."""
        for name, number in (("successes", 1), ("failures", 0)):
            self.add(name, values, (outcome == number) & mask)

    def reduce(self, accelerator: Any) -> dict[str, tuple[float, float]]:
        """(mean, count) of each name over all processes, the mean NaN where nothing was added; then start anew."""
        if not self._totals:
            return {}
        totals = accelerator.reduce(torch.stack(list(self._totals.values())), reduction="sum").tolist()
        names, self._totals = list(self._totals), {}
        return {
            name: (total / count if count else math.nan, count)
            for name, (total, count) in zip(names, totals, strict=True)
        }
