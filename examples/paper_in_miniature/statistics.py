"""Means and their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from scipy import stats


LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean of runs and half the width of its 95 % interval, which is infinite for a single run."""

    mean: float
    half: float
    runs: int

    def __str__(self) -> str:
        return (
            f"{100 * self.mean:.1f} ± {100 * self.half:.1f}" if math.isfinite(self.half) else f"{100 * self.mean:.1f}"
        )


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and t-interval."""
    return average([list(values)])


def average(groups: list[list[float]]) -> Estimate:
    """
    The mean of the groups' means, with the interval that the spread within groups gives (Welch–Satterthwaite).

    Groups are domains: their difference is no error of the mean over them.
    """
    groups = [group for group in groups if group]
    if not groups:
        return Estimate(math.nan, math.inf, 0)
    runs = sum(map(len, groups))
    mean = sum(sum(g) / len(g) for g in groups) / len(groups)
    if min(map(len, groups)) < 2:
        return Estimate(mean, math.inf, runs)
    parts = [variance(g) / len(g) / len(groups) ** 2 for g in groups]
    if not any(parts):
        return Estimate(mean, 0.0, runs)
    freedom = sum(parts) ** 2 / sum(p**2 / (len(g) - 1) for p, g in zip(parts, groups, strict=True))
    return Estimate(mean, float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(sum(parts)), runs)


def variance(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / (len(values) - 1)
