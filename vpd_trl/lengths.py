"""Rows of unlike length without waste: no padding where it can be helped, and rows of like length together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .batch import Batch, concatenated, rows_of


if TYPE_CHECKING:
    from .trainer import VPDTrainer


# About as many tokens take as long as a pass of the network takes for itself: to read the weights, and to begin at all
CPU_PASS_COST = 16
GPU_PASS_COST = 256


def up_to_targets(attention_mask: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    The tokens (B, L), boolean, of padded rows up to the last target of each; none of a row without a target.

    Args:
        attention_mask: (B, L), 1 on tokens.
        targets: (B, L) boolean, tokens that are predicted from those before them; never the first of a row.
    """
    length = targets.size(1)
    end = length - targets.flip(1).to(torch.uint8).argmax(dim=1)  # one behind the last target
    end = torch.where(targets.any(dim=1), end, 0).unsqueeze(1)
    return attention_mask.bool() & (torch.arange(length, device=targets.device) < end)


def compact(
    attention_mask: torch.Tensor, targets: torch.Tensor, *, whole: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Which tokens of padded rows have to go through a network, so that each target is predicted.

    A row's tokens are moved to its end, behind all of its padding. What comes after its last target is left out, and
    so is the last target itself, which nothing is predicted from. Of a row without a target one token stays.

    Args:
        attention_mask, targets: (B, L), as in `up_to_targets`.
        whole: Leave nothing out.

    Returns:
        The columns (B, W) that the network's input takes its tokens from; its attention mask (B, W); and boolean, where
        in it stands what predicts a target (B, W), in the order of the targets.
    """
    needed = attention_mask.bool() if whole else up_to_targets(attention_mask, targets)
    width = max(int(needed.sum(dim=1).max()), 2)
    # A stable sort keeps the order of what is needed, and puts it last
    order = needed.to(torch.uint8).argsort(dim=1, stable=True)[:, -width:]
    kept = needed.gather(1, order)
    predicts = torch.nn.functional.pad((targets.gather(1, order) & kept)[:, 1:], (0, 1))
    if not whole:  # nothing is predicted from the last one
        order, kept, predicts = order[:, :-1], kept[:, :-1], predicts[:, :-1]
    attended = kept.clone()
    attended[:, -1] |= ~attended.any(dim=1)  # attention to nothing at all is not a number
    return order, attended.to(attention_mask.dtype), predicts


def of_like_length(lengths: Sequence[int], cost: int) -> list[list[int]]:
    """
    Rows in groups, the longest first, that together take the fewest tokens when each is padded to its longest row.

    Args:
        lengths: Of the rows.
        cost: What a group costs beside its tokens, in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    # The least cost of the first n rows, and where their last group begins
    best, begins = [0], [0]
    for end in range(1, len(order) + 1):
        costs = [best[start] + lengths[order[start]] * (end - start) + cost for start in range(end)]
        begins.append(min(range(end), key=costs.__getitem__))
        best.append(costs[begins[-1]])
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[begins[end] : end]))
        end = begins[end]
    return groups[::-1]


def row_lengths(batch: Batch, *, teacher: bool) -> torch.Tensor:
    """Tokens (B,) of each row, prompt and completion, without padding."""
    prompt = batch["teacher_prompt_mask" if teacher else "prompt_mask"]
    return prompt.sum(dim=1) + batch["completion_mask"].sum(dim=1)


def by_length_within_steps(trainer: VPDTrainer, micro_batches: list[Batch]) -> list[Batch]:
    """
    The micro-batches of a rollout batch, dealt anew within each of the student's optimizer steps.

    GRPO's loss is not only a sum over micro-batches, so with it they stay as they are.
    """
    window = trainer.args.gradient_accumulation_steps
    if trainer.args.rl_weight:
        return micro_batches
    if window % len(micro_batches) == 0:
        return by_length(micro_batches)
    if len(micro_batches) % window == 0:
        steps = [micro_batches[i : i + window] for i in range(0, len(micro_batches), window)]
        return [micro_batch for step in steps for micro_batch in by_length(step)]
    return micro_batches


def by_length(micro_batches: Sequence[Batch]) -> list[Batch]:
    """
    The rows of some micro-batches, dealt anew: those with feedback evenly, and those of like length together.

    Each micro-batch has as many rows as before. Where losses add up over the micro-batches their sum is the same.
    """
    if len(micro_batches) < 2:
        return list(micro_batches)
    rows = concatenated(micro_batches)
    length = row_lengths(rows, teacher=True) + row_lengths(rows, teacher=False)
    order = length.argsort(descending=True, stable=True)
    has_feedback = rows["has_feedback"][order]
    with_feedback, without = order[has_feedback], order[~has_feedback]
    dealt = []
    for i, micro_batch in enumerate(micro_batches):
        size, left = len(micro_batch["completion_ids"]), len(micro_batches) - i
        count = min(-(-len(with_feedback) // left), size)
        # The micro-batches behind this one must be able to take the rest
        room = sum(len(other["completion_ids"]) for other in micro_batches[i + 1 :])
        count = max(count, len(with_feedback) - room, size - len(without))
        chosen = torch.cat([with_feedback[:count], without[: size - count]])
        with_feedback, without = with_feedback[count:], without[size - count :]
        dealt.append(rows_of(rows, chosen))
    return dealt


def within_budget(lengths: Sequence[int], budget: int, most: int) -> list[int]:
    """
    How many rows in turn go together, so that each group, padded to its longest row, holds at most `budget` tokens.

    Args:
        lengths: Of the rows, longest first. A row that is longer than the budget goes alone.
        budget: In tokens.
        most: Rows of a group.
    """
    sizes, start = [], 0
    while start < len(lengths):
        size = max(1, budget // max(lengths[start], 1))
        size = min(size, most, len(lengths) - start)
        sizes.append(size)
        start += size
    return sizes
