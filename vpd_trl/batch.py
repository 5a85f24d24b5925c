"""A batch of rollouts: tensors with one row per rollout, as TRL makes them, and 0-dim tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid


Batch = dict[str, Any]


# What a vision-language model takes beside token ids, and what says which rows it belongs to
IMAGES = (
    "pixel_values",
    "image_grid_thw",
    "image_position_ids",
    "image_sizes",
    "pixel_attention_mask",
    "spatial_shapes",
)
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


def rows_of(batch: Batch, rows: slice | torch.Tensor) -> Batch:
    """Some rows of a batch, with their images; 0-dim tensors stay."""
    some: Batch = {}
    for key, value in split_pixel_values_by_grid(batch).items():
        if isinstance(value, torch.Tensor) and value.ndim:
            some[key] = value[rows]
        elif isinstance(value, list):  # one entry per row
            some[key] = value[rows] if isinstance(rows, slice) else [value[i] for i in rows.tolist()]
        else:
            some[key] = value
    return unsplit_pixel_values_by_grid(some)


def concatenated(batches: Sequence[Batch]) -> Batch:
    """The rows of batches that were cut from one, in order; 0-dim tensors are the first one's."""
    joined: Batch = {}
    for key, first in batches[0].items():
        values = [batch[key] for batch in batches]
        if isinstance(first, torch.Tensor) and first.ndim:
            joined[key] = torch.cat(values)
        elif isinstance(first, list):
            joined[key] = [entry for value in values for entry in value]
        else:
            joined[key] = first
    return joined


def pieces_of(batch: Batch, size: int) -> list[Batch]:
    """A batch in pieces of `size` rows, the last one smaller."""
    return [rows_of(batch, slice(i, i + size)) for i in range(0, len(batch["completion_ids"]), size)]


def loss_mask(batch: Batch) -> torch.Tensor:
    """(B, T): 1 on the tokens that the student sampled itself, 0 on padding and on what tools returned."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask
