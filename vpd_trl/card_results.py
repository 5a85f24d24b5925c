"""The model card's table of results, from the run's log."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .markdown import code, table


if TYPE_CHECKING:
    from .trainer import VPDTrainer


def results(trainer: VPDTrainer) -> str:
    """
    A table of rewards and evaluation metrics with their first, last and highest values, or that there are none yet.

    Args:
        trainer: The trainer; `state.log_history` holds what has been logged, also before it was resumed.
    """
    history = trainer.state.log_history
    rows = []
    for name in names(trainer):
        values = [(row["step"], row[name]) for row in history if _is_number(row.get(name))]
        if values:
            best = max(values, key=lambda entry: entry[1])
            rows.append((code(name), *map(_entry, (values[0], values[-1], best))))
    if not rows:
        return "Nothing has been logged yet."
    note = "Values with their steps in brackets."
    if any(not row[0].startswith("`eval_") for row in rows):
        note += (
            " Rewards without `eval_` are means over the rollouts of one entry of the log "
            f"({_batch(trainer)}): they vary from batch to batch, and a high one may be chance."
        )
    return f"{table(('metric', 'first', 'last', 'highest'), rows)}\n\n{note}"


def names(trainer: VPDTrainer) -> Iterator[str]:
    """The metrics that say how good answers are, in the order in which they are told."""
    several = len(trainer.reward_func_names) > 1
    rewards = ["reward", *(f"rewards/{name}/mean" for name in dict.fromkeys(trainer.reward_func_names) if several)]
    yield from rewards
    data = trainer.eval_dataset
    for prefix in [f"eval_{name}_" for name in data] if isinstance(data, dict) else ["eval_"]:
        yield from (prefix + name for name in rewards)
    for name, evaluation in trainer.evaluation.evaluations.items() if trainer.evaluation is not None else ():
        yield from (f"eval_{name}_{metric}" if name else f"eval_{metric}" for metric in evaluation.metric_names)


def _batch(trainer: VPDTrainer) -> str:
    args = trainer.args
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.logging_steps if args.logging_steps >= 1 else 1
    return f"{int(size * steps)} rollouts" if str(args.logging_strategy.value) == "steps" else "an epoch"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _entry(entry: tuple[int, float]) -> str:
    step, value = entry
    return f"{value:.4g} ({step})"
