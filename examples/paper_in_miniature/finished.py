"""The file of finished runs, and what is read from a run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .run import Cell


RESULTS = Path(__file__).parent / "results"
RUNS = RESULTS / "runs.jsonl"

Runs = dict[str, dict[str, Any]]  # by their names


def key(c: Cell) -> str:
    """A run's name: what differs from the defaults."""
    return json.dumps(described(c), sort_keys=True)


def described(c: Cell) -> dict[str, Any]:
    defaults = {f.name: f.default for f in fields(Cell)}
    values = {name: value for name, value in asdict(c).items() if value != defaults[name]}
    return json.loads(json.dumps(values))  # tuples as lists, as in the file


def load() -> Runs:
    """The finished runs by their names."""
    if not RUNS.exists():
        return {}
    rows = (json.loads(line) for line in RUNS.read_text().splitlines())
    return {json.dumps(row["cell"], sort_keys=True): row for row in rows}


def made(cells: Iterable[Cell], runs: Runs) -> list[tuple[Cell, dict[str, Any]]]:
    """The cells that have been run, each with its run."""
    return [(c, run) for c in cells if (run := runs.get(key(c))) is not None]


def held_out(run: dict[str, Any]) -> float:
    """Held-out accuracy after training."""
    return run["after"]["held_out"]


def collapsed(run: dict[str, Any]) -> bool:
    """Whether a run ended at less than half of the accuracy that it had reached, or of the one it began with."""
    return held_out(run) < 0.5 * max(accuracy for _, accuracy in run["curve"])


@dataclass(frozen=True)
class Course:
    """
    How a run went, from its metrics' curves: the steps at which its reward fell for good and a warning came.

    Attributes:
        fall: The step after which the mean reward stayed below half of its best, or `None`. Rewards that never reached
            0.1 have nothing to fall from.
        warning: The first step at which `teacher/log_ratio_end` was below the trainer's limit, or `None`.
    """

    fall: int | None
    warning: int | None


def course(run: dict[str, Any], limit: float) -> Course:
    """The course of a run; curves are means over a few steps, as long as the trainer wants to see before it warns."""
    steps, rewards = run["history"]["step"], run["history"]["reward"]
    ends = run["history"].get("teacher/log_ratio_end", [])
    best = max(r for r in rewards if r is not None)
    low = [r is None or r < best / 2 for r in rewards]
    fall = None
    if best >= 0.1 and low[-1]:
        fall = steps[max(i for i, is_low in enumerate(low) if not is_low)]
    below = [step for step, end in zip(steps, ends, strict=False) if end is not None and end < limit]
    return Course(fall, below[0] if below else None)
