"""A batch of rollouts: tensors with one row per rollout, as TRL makes them, and 0-dim tensors."""

from __future__ import annotations

from typing import Any

import torch


Batch = dict[str, Any]


def rows_of(batch: Batch, rows: slice | torch.Tensor) -> Batch:
    """Some rows of a batch; 0-dim tensors stay."""
    return {key: v[rows] if isinstance(v, torch.Tensor) and v.ndim else v for key, v in batch.items()}


def pieces_of(batch: Batch, size: int) -> list[Batch]:
    """A batch in pieces of `size` rows, the last one smaller."""
    return [rows_of(batch, slice(i, i + size)) for i in range(0, len(batch["completion_ids"]), size)]


def loss_mask(batch: Batch) -> torch.Tensor:
    """(B, T): 1 on the tokens that the student sampled itself, 0 on padding and on what tools returned."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask
