"""The pictures: curves over training, and accuracy against what was turned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt

from . import grid
from .finished import Runs, held_out, made
from .grid import GRPO, JOINT, SDPO, SDPO_EMA, SYSTEMS, VPD, VPD_EMA, VPD_LORA, System, Tuned
from .run import Cell
from .statistics import Estimate, average


COLORS = {
    GRPO: "#6b7280",
    SDPO: "#c2410c",
    SDPO_EMA: "#f59e0b",
    JOINT: "#7c3aed",
    VPD: "#1d4ed8",
    VPD_EMA: "#0891b2",
    VPD_LORA: "#15803d",
}


def draw_all(runs: Runs, tuned: Tuned, folder: Path) -> None:
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "figure.dpi": 130})
    overview(runs, tuned).savefig(folder / "overview.png")
    figure_1(runs, tuned).savefig(folder / "figure_1.png")
    figure_2(runs, tuned).savefig(folder / "figure_2.png")
    turned(runs, tuned).savefig(folder / "density_and_noise.png")
    stability(runs, tuned).savefig(folder / "stability.png")
    plt.close("all")


def mean_of(cells: Iterable[Cell], runs: Runs, measure: Callable[[dict[str, Any]], float | None]) -> Estimate:
    """The average over domains of what was measured; runs without a value are left out."""
    groups: dict[str, list[float]] = {}
    for c, run in made(cells, runs):
        if (value := measure(run)) is not None:
            groups.setdefault(c.domain, []).append(value)
    return average(list(groups.values()))


def line(
    axes: Any, x: Sequence[float], estimates: Sequence[Estimate], color: str, label: str, scale: float = 1
) -> None:
    shown = [(a, e) for a, e in zip(x, estimates, strict=True) if e.runs]
    if not shown:
        return
    places = [a for a, _ in shown]
    means = [scale * e.mean for _, e in shown]
    halves = [scale * e.half if math.isfinite(e.half) else 0.0 for _, e in shown]
    low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
    axes.plot(places, means, color=color, label=label, lw=2, marker="o", ms=3)
    axes.fill_between(places, low, high, color=color, alpha=0.15, lw=0)


def overview(runs: Runs, tuned: Tuned) -> Any:
    """Held-out accuracy of every system with both kinds of feedback."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for axes, feedback, title in zip(
        panels, ("environment", "siblings"), ("Environment feedback, sparse rewards", "Siblings"), strict=True
    ):
        for i, system in enumerate(reversed(SYSTEMS)):
            e = mean_of(grid.rows_of(system, feedback, tuned), runs, held_out)
            if e.runs:
                half = 100 * e.half if math.isfinite(e.half) else 0
                axes.barh(i, 100 * e.mean, xerr=half, color=COLORS.get(system, "#a78bfa"), height=0.7, capsize=2)
        axes.set_yticks(range(len(SYSTEMS)), [s.name for s in reversed(SYSTEMS)])
        axes.set_xlabel("held-out accuracy, % (mean and 95 % interval)")
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlim(0, 100)
    return figure


def at(name: str, i: int) -> Callable[[dict[str, Any]], float | None]:
    """The i-th point of a metric's curve."""

    def measure(run: dict[str, Any]) -> float | None:
        curve = run["history"].get(name, [])
        return curve[i] if i < len(curve) else None

    return measure


def figure_1(runs: Runs, tuned: Tuned) -> Any:
    """The margin between successes and failures over training."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axes, feedback in zip(panels, ("environment", "siblings"), strict=True):
        for system in (SDPO, SDPO_EMA, VPD, VPD_LORA):
            cells = list(grid.rows_of(system, feedback, tuned))
            found = made(cells, runs)
            if found:
                steps = found[0][1]["history"]["step"]
                points = [mean_of(cells, runs, at("teacher/log_ratio_margin", i)) for i in range(len(steps))]
                line(axes, steps, points, COLORS[system], system.name)
        axes.axhline(0, color="#9ca3af", lw=0.8)
        axes.set_xlabel("step")
        axes.set_ylabel("log q − log π, successes minus failures, nats")
        axes.set_title(feedback, loc="left", fontsize=10, fontweight="bold")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def figure_2(runs: Runs, tuned: Tuned) -> Any:
    """Held-out accuracy over long runs."""
    figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    for system in (SDPO, SDPO_EMA, VPD, VPD_LORA):
        cells = list(grid.rows_of(system, "environment", tuned, steps=grid.LONG))
        found = made(cells, runs)
        if found:
            steps = [step for step, _ in found[0][1]["curve"]]
            points = [mean_of(cells, runs, lambda run, i=i: run["curve"][i][1]) for i in range(len(steps))]
            line(axes, steps, points, COLORS[system], system.name, 100)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out accuracy, %")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, fontsize=8)
    return figure


def turned(runs: Runs, tuned: Tuned) -> Any:
    """Accuracy against the density of rewards, and against the noise of feedback."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    lengths = (1, 2, 3)
    for system in (GRPO, SDPO, JOINT, VPD, VPD_LORA):
        points = [
            mean_of(
                grid.dense(system, n, tuned) if n < 3 else grid.rows_of(system, "environment", tuned), runs, held_out
            )
            for n in lengths
        ]
        line(left, [8.0**-n for n in lengths], points, COLORS[system], system.name, 100)
    left.set_xscale("log")
    left.set_xlabel("success rate of the base model (dense → sparse: right to left)")
    left.set_ylabel("held-out accuracy, %")
    left.set_ylim(0, 100)
    left.legend(frameon=False, fontsize=8)
    levels = (0.0, *grid.NOISE)
    for system in (SDPO, VPD, VPD_LORA):
        points = [mean_of(grid.rows_of(system, "environment", tuned, noise=level), runs, held_out) for level in levels]
        line(right, levels, points, COLORS[system], system.name, 100)
    right.set_xlabel("share of random symbols in feedback")
    return figure


def stability(runs: Runs, tuned: Tuned) -> Any:
    """Siblings at rising learning rates: accuracy, and how many runs collapsed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    rows: list[tuple[str, System, Any, str, str]] = [
        (s.name, s, (), COLORS[s], "-") for s in (SDPO, SDPO_EMA, VPD_EMA, VPD_LORA)
    ]
    styles = ("-", "--", ":", "-.")
    rows += [
        (f"{VPD.name}: {name}", VPD, overrides, COLORS[VPD], style)
        for (name, overrides), style in zip(grid.REMEDIES.items(), styles, strict=True)
    ]
    for label, system, overrides, color, style in rows:
        per_rate = [list(grid.stable(system, tuned, rate, overrides)) for rate in grid.STABILITY_RATES]
        for axes, measure in ((left, held_out), (right, collapsed)):
            estimates = [mean_of(cells, runs, measure) for cells in per_rate]
            shown = [(r, 100 * e.mean) for r, e in zip(grid.STABILITY_RATES, estimates, strict=True) if e.runs]
            if shown:
                axes.plot(*zip(*shown, strict=True), color=color, ls=style, lw=1.8, marker="o", ms=3, label=label)
    for axes, title in ((left, "held-out accuracy, %"), (right, "collapsed runs, %")):
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel(title)
        axes.set_ylim(-3, 103)
    left.legend(frameon=False, fontsize=7)
    return figure


def collapsed(run: dict[str, Any]) -> float:
    """Whether a run ended at less than half of the accuracy that it had reached, or of the one it began with."""
    return float(held_out(run) < 0.5 * max(accuracy for _, accuracy in run["curve"]))
