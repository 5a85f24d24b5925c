"""
Avg@k, pass@k and majority@k per problem, and how sure their means are.

P problems with n samples each. Everything here is arrays in, arrays out; a metric is the mean over problems.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np


def avg_at_k(scores: Any, k: int | None = None) -> np.ndarray:
    """
    Mean score (P,) of the first k samples of each problem.

    Args:
        scores: (P, n) scores in [0, 1].
        k: Samples that count, at most n; `None`: all n.

    Raises:
        ValueError: If the problems have unequally many samples, or fewer than k.
    """
    scores = sample_matrix(scores)
    return scores[:, : _samples("k", k, scores.shape[1])].mean(axis=1)


def pass_at_k(successes: Any, k: int) -> np.ndarray:
    """
    Probability (P,) that at least one of k samples drawn without replacement from the n of a problem is a success.

    1 − C(n − c, k) / C(n, k) with c successes, as a product of factors in [0, 1]: an unbiased estimate of the chance
    that one of k new samples is a success. Chen et al., "Evaluating Large Language Models Trained on Code"
    (2107.03374), equation 1.

    Args:
        successes: (P, n) 1 or `True` for a success, else 0.
        k: Samples drawn, from 1 to n.

    Raises:
        ValueError: If a value is neither 0 nor 1, the problems have unequally many samples, or fewer than k.
    """
    successes = _success_matrix(successes)
    n = successes.shape[1]
    drawn = np.arange(_samples("k", k, n))
    failures = n - successes.sum(axis=1, keepdims=True)
    return 1.0 - (np.maximum(failures - drawn, 0) / (n - drawn)).prod(axis=1)


def majority_at_k(answers: Sequence[Sequence[str | None]], successes: Any, k: int | None = None) -> np.ndarray:
    """
    1 for each problem (P,) whose most frequent answer among the first k samples is right, else 0.

    Each sample votes for the answer that it gives, compared as strings. `None` and blank answers don't vote; a problem
    without any vote counts 0. Of answers with equally many votes the one that came first wins. The winner is right if
    the first sample that gave it is a success: what a user would have who is shown that sample.

    Args:
        answers: (P, n) the answers.
        successes: (P, n) 1 or `True` where a sample is a success, else 0.
        k: Samples that vote, at most n; `None`: all n.

    Raises:
        ValueError: If answers and successes differ in shape, the problems have unequally many samples, or fewer than k.
        TypeError: If an answer is neither a string nor `None`.
    """
    successes = _success_matrix(successes)
    _check_answers(answers, successes.shape)
    k = _samples("k", k, successes.shape[1])
    right = []
    for row, outcome in zip(answers, successes, strict=True):
        votes = Counter(answer for answer in row[:k] if answer is not None and answer.strip())
        # `most_common` keeps the order of first appearance among equals
        winner = votes.most_common(1)[0][0] if votes else None
        right.append(0.0 if winner is None else outcome[list(row).index(winner)])
    return np.array(right, dtype=np.float64)


def bootstrap_intervals(
    values: Any, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> list[tuple[float, float] | None]:
    """
    Percentile bootstrap intervals of the means of M metrics over P problems.

    Problems are drawn with replacement, the same ones for each metric, so the intervals cover both the choice of the
    problems and the samples that were drawn for them. Efron, "Bootstrap methods" (1979).

    Args:
        values: (P, M) each metric's value for each problem.
        resamples: How often P problems are drawn.
        confidence: Share of the resampled means that lies inside, in (0, 1).
        seed: Of the draws.

    Returns:
        (low, high) of each metric; `None` for fewer than 2 problems, which say nothing about the spread.
    """
    values = np.asarray(values, dtype=np.float64)
    problems, metrics = values.shape
    if problems < 2:
        return [None] * metrics
    rng, uniform = np.random.default_rng(seed), np.full(problems, 1 / problems)
    means = []
    # In blocks: with thousands of problems all draws at once would take gigabytes
    for start in range(0, resamples, 500):
        counts = rng.multinomial(problems, uniform, size=min(500, resamples - start))
        means.append(counts @ values / problems)
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def sample_matrix(values: Any) -> np.ndarray:
    """
    Values (P, n) as floats.

    Raises:
        ValueError: If there are none, the problems have unequally many samples, or a value is not a finite number.
    """
    rows = list(values)
    if any(np.ndim(row) != 1 for row in rows):
        raise ValueError("Expected one list of numbers per problem, one number per sample.")
    sizes = [len(row) for row in rows]
    if not rows or not sizes[0]:
        raise ValueError("There are no samples: at least one problem with at least one sample is needed.")
    for i, size in enumerate(sizes):
        if size != sizes[0]:
            raise ValueError(
                f"All problems need equally many samples, but problem {i} has {size} and problem 0 has {sizes[0]}."
            )
    matrix = np.array(rows, dtype=np.float64)
    if not np.isfinite(matrix).all():
        i, j = np.argwhere(~np.isfinite(matrix))[0]
        raise ValueError(f"Sample {j} of problem {i} has the value {matrix[i, j]}; finite numbers are needed.")
    return matrix


def _success_matrix(successes: Any) -> np.ndarray:
    matrix = sample_matrix(successes)
    if not np.isin(matrix, (0.0, 1.0)).all():
        raise ValueError("Successes must be 0 or 1; compare scores with a threshold first.")
    return matrix


def _samples(name: str, k: int | None, n: int) -> int:
    k = n if k is None else k
    if k != int(k) or not 1 <= k <= n:
        raise ValueError(f"{name} must be a whole number from 1 to the number of samples per problem ({n}); got {k}.")
    return int(k)


def _check_answers(answers: Sequence[Sequence[str | None]], shape: tuple[int, ...]) -> None:
    sizes = [len(row) for row in answers]
    if sizes != [shape[1]] * shape[0]:
        raise ValueError(
            f"There must be one answer, or None, per sample: {shape[0]} problems with {shape[1]} samples each; got "
            f"{len(sizes)} problems with {sorted(set(sizes))} answers."
        )
    for row in answers:
        for answer in row:
            if answer is not None and not isinstance(answer, str):
                raise TypeError(f"An answer must be a string or None; got {type(answer).__name__}: {answer!r}.")
