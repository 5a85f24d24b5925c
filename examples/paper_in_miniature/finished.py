"""The file of finished runs, and what is read from a run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vpd_trl.watch import FADING_END, fading

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
    """Whether a run ended below half of the best accuracy that it had had; less than 0.1 is nothing to fall from."""
    best = max(accuracy for _, accuracy in run["curve"])
    return best >= 0.1 and held_out(run) < best / 2


@dataclass(frozen=True)
class Course:
    """
    How a run went, from its metrics' curves: the steps at which its reward fell for good and a warning came.

    Attributes:
        fall: The step after which the mean reward stayed below half of its best, or `None`. Rewards that never reached
            0.1 have nothing to fall from.
        warning: The first step at which the trainer's watch would have warned of answers that lose their ends, or `None`.
    """

    fall: int | None
    warning: int | None


def course(run: dict[str, Any]) -> Course:
    """The course of a run; its curves are means over as many steps as the watch wants to see before it warns."""
    history = run["history"]
    steps, rewards = history["step"], history["reward"]
    best = max(rewards)
    fall = None
    if best >= 0.1 and rewards[-1] < best / 2:
        fall = steps[max(i for i, reward in enumerate(rewards) if reward >= best / 2)]
    ended: list[float] = []
    for step, log_ratio, clipped in zip(
        steps, history["teacher/log_ratio_end"], history["completions/clipped_ratio"], strict=True
    ):
        ended = [*ended, 1 - clipped] if log_ratio is not None and log_ratio < FADING_END else []
        if ended and fading(ended):
            return Course(fall, step)
    return Course(fall, None)
