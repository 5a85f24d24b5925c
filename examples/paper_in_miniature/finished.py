"""The file of finished runs, and what is read from a run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
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
