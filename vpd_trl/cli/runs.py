"""Runs as they lie on disk: the trainer's log, the evaluations within it, and results of `vpd-trl evaluate`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UsageError
from .guide import note


# Rows of the log are about a step; these say which, or sum up the whole run
_NO_METRICS = ("step", "epoch", "total_flos")


@dataclass
class Run:
    """
    One training run.

    Attributes:
        label: Its name in plots and tables.
        path: Its folder.
        series: (step, value) of each metric, by step; values are finite.
        intervals: (low, high) of metrics that have one, by step.
        arguments: What `vpd-trl train` wrote of its arguments; empty for a run of a script.
        last_step: How far it got.
    """

    label: str
    path: Path
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    intervals: dict[str, dict[int, tuple[float, float]]] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    last_step: int = 0


@dataclass
class Measurement:
    """A result of `vpd-trl evaluate`: (value, low, high) of each metric, the last two `None` without an interval."""

    label: str
    path: Path
    name: str
    problems: int
    metrics: dict[str, tuple[float, float | None, float | None]]


@dataclass(frozen=True)
class Summary:
    """The first and last value of a metric, and its best with the step, where one way is better."""

    first: float
    last: float
    best: float | None
    best_step: int | None
    count: int


def load(names: Sequence[str]) -> tuple[list[Run], list[Measurement]]:
    """
    The runs and measurements of folders.

    Args:
        names: Folders of runs, checkpoints or evaluations, each alone or as LABEL=FOLDER.

    Raises:
        UsageError: If there is nothing to show in one of them.
    """
    runs: list[Run] = []
    measurements: list[Measurement] = []
    for label, path in _labels(names):
        if not path.exists():
            raise UsageError(f"there is no run {path}.")
        found = _measurements(label, path)
        state = _latest_state(path)
        if state is None and not found:
            raise UsageError(
                f"{path} holds no run: no trainer_state.json, no checkpoint, and no summary.json of an evaluation."
            )
        measurements += found
        if state is not None:
            runs.append(_run(label, path, state))
    return runs, measurements


def summarize(metric: str, points: Sequence[tuple[int, float]]) -> Summary:
    """What a table says of a metric."""
    better = note(metric).better
    best = max(points, key=lambda point: better * point[1]) if better else (None, None)
    return Summary(points[0][1], points[-1][1], best[1], best[0], len(points))


def _labels(names: Sequence[str]) -> list[tuple[str, Path]]:
    """Each with a label of its own: what was asked for, or as much of the path as tells it from the others."""
    asked: list[tuple[str | None, Path]] = []
    for name in names:
        label, _, rest = name.partition("=")
        if rest and not Path(name).exists():
            asked.append((label, Path(rest)))
        else:
            asked.append((None, Path(name)))
    parts = [path.resolve().parts for _, path in asked]
    labels: list[tuple[str, Path]] = []
    for i, (wanted, path) in enumerate(asked):
        others = [other for other in parts if other != parts[i]]
        length = 1
        while length < len(parts[i]) and any(other[-length:] == parts[i][-length:] for other in others):
            length += 1
        label = wanted or "/".join(parts[i][-length:])
        taken = [known for known, _ in labels]
        labels.append((label if label not in taken else f"{label} ({taken.count(label) + 1})", path))
    return labels


def _latest_state(path: Path) -> dict[str, Any] | None:
    """The trainer's state that got farthest, of those in a folder and its checkpoints."""
    files = [path] if path.is_file() else [path / "trainer_state.json", *path.glob("checkpoint-*/trainer_state.json")]
    states = [_read(file) for file in files if file.is_file()]
    states = [state for state in states if isinstance(state.get("log_history"), list)]
    # The one beside the checkpoints last: at equal steps it has the final evaluation
    return max(reversed(states), key=lambda s: (s.get("global_step", 0), len(s["log_history"])), default=None)


def _run(label: str, path: Path, state: dict[str, Any]) -> Run:
    folder = path if path.is_dir() else path.parent
    run = Run(label, path, last_step=int(state.get("global_step", 0)))
    found: dict[str, dict[int, float]] = {}
    for row in state["log_history"]:
        step = row.get("step")
        if not isinstance(step, int) or "train_runtime" in row:
            continue
        for metric, value in row.items():
            if metric not in _NO_METRICS and _finite(value):
                found.setdefault(metric, {})[step] = float(value)
    for file in sorted(folder.glob("evaluation/step-*/**/summary.json")):
        _add_evaluation(run, found, file, folder / "evaluation")
    run.series = {metric: sorted(points.items()) for metric, points in found.items()}
    arguments = folder / "arguments.json"
    if arguments.is_file():
        run.arguments = _read(arguments)
    return run


def _add_evaluation(run: Run, found: dict[str, dict[int, float]], file: Path, folder: Path) -> None:
    """Take over the values and intervals of an evaluation within training: `evaluation/step-N[/NAME]/summary.json`."""
    place, *name = file.parent.relative_to(folder).parts
    number = place.removeprefix("step-")
    if not number.isdigit() or int(number) > run.last_step:  # of a run that was in this folder before
        return
    for metric, entry in _read(file).get("metrics", {}).items():
        key = "_".join(["eval", *name, metric])
        if _finite(entry.get("value")):
            found.setdefault(key, {})[int(number)] = entry["value"]
        if _finite(entry.get("low")) and _finite(entry.get("high")):
            run.intervals.setdefault(key, {})[int(number)] = (entry["low"], entry["high"])


def _measurements(label: str, path: Path) -> list[Measurement]:
    """Results of `vpd-trl evaluate`: in the folder, or in one folder per split."""
    files = [path / "summary.json"] if (path / "summary.json").is_file() else sorted(path.glob("*/summary.json"))
    found = []
    for file in files:
        summary = _read(file)
        metrics = {
            name: (entry["value"], entry.get("low"), entry.get("high"))
            for name, entry in summary.get("metrics", {}).items()
            if _finite(entry.get("value"))
        }
        if metrics:
            found.append(Measurement(label, file.parent, summary.get("name", ""), summary.get("problems", 0), metrics))
    return found


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} can't be read: {error}.") from error
    if not isinstance(value, dict):
        raise UsageError(f"{file} holds no mapping.")
    return value
