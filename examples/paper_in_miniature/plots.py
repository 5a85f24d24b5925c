"""The pictures: curves over training, and accuracy against what was turned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt

from . import experiments
from .experiments import (
    GRPO,
    JOINT,
    SDPO,
    SDPO_EMA,
    SDPO_SHARP,
    SYSTEMS,
    VPD,
    VPD_EMA,
    VPD_LORA,
    VPD_PAPER,
    Tuned,
)
from .finished import Runs, collapsed, held_out, made
from .run import Cell
from .statistics import Estimate, average


COLORS = {
    GRPO: "#6b7280",
    SDPO: "#7f1d1d",
    SDPO_SHARP: "#ea580c",
    SDPO_EMA: "#f59e0b",
    JOINT: "#7c3aed",
    VPD_PAPER: "#93c5fd",
    VPD: "#1d4ed8",
    VPD_EMA: "#0891b2",
    VPD_LORA: "#15803d",
}


def draw_all(runs: Runs, tuned: Tuned, folder: Path) -> dict[str, str | None]:
    """Draw what has runs; the caption of each picture, or `None` where there is nothing to draw yet."""
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "figure.dpi": 130})
    captions: dict[str, str | None] = {}
    for draw in (overview, figure_1, figure_2, density_and_noise, stability_map, warning_signs):
        file = folder / f"{draw.__name__}.png"
        figure = draw(runs, tuned)
        drawn = any(axes.has_data() for axes in figure.axes)
        captions[draw.__name__] = str(draw.__doc__).strip().rstrip(".") if drawn else None
        if drawn:
            figure.savefig(file)
        else:
            file.unlink(missing_ok=True)
    plt.close("all")
    return captions


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
            e = mean_of(experiments.rows_of(system, feedback, tuned), runs, held_out)
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
        for system in (SDPO, SDPO_SHARP, SDPO_EMA, VPD_PAPER, VPD, VPD_LORA):
            cells = list(experiments.rows_of(system, feedback, tuned))
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
    for system in (*experiments.LONG_SYSTEMS, VPD):
        cells = list(experiments.rows_of(system, "environment", tuned, experiments.FEW, steps=experiments.LONG))
        found = made(cells, runs)
        if found:
            steps = [step for step, _ in found[0][1]["curve"]]
            points = [mean_of(cells, runs, lambda run, i=i: run["curve"][i][1]) for i in range(len(steps))]
            line(axes, steps, points, COLORS[system], system.name, 100)
            axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out accuracy, %")
    axes.set_ylim(0, 100)
    return figure


def density_and_noise(runs: Runs, tuned: Tuned) -> Any:
    """Held-out accuracy against the density of rewards, and against the noise of feedback."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained", sharey=True)
    few = experiments.FEW
    for i, (system, lengths) in enumerate(experiments.DENSE_SYSTEMS.items()):
        cells = [list(experiments.dense(system, n, tuned)) for n in lengths]
        if not any(made(c, runs) for c in cells):
            continue
        cells.append(list(experiments.rows_of(system, "environment", tuned, few)))
        points = [mean_of(c, runs, held_out) for c in cells]
        x = [1.05 ** (i - 2) * 8.0**-n for n in (*lengths, 3)]  # beside each other
        y, half = [100 * e.mean for e in points], [100 * e.half for e in points]
        left.errorbar(x, y, half, color=COLORS[system], lw=1.8, marker="o", ms=4, label=system.name, capsize=2)
        left.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
    left.set_xscale("log")
    left.set_xticks([8.0**-n for n in (3, 2, 1)], ["0.2 %", "1.6 %", "12.5 %"])
    left.minorticks_off()
    left.set_xlabel("success rate of the base model: sparse to dense")
    left.set_ylabel("held-out accuracy, %")
    left.set_ylim(0, 100)
    levels = (0.0, *experiments.NOISE)
    for system in experiments.NOISY_SYSTEMS:
        cells = [list(experiments.rows_of(system, "environment", tuned, few, noise=level)) for level in levels]
        if any(made(c, runs) for c in cells[1:]):
            points = [mean_of(c, runs, held_out) for c in cells]
            line(right, levels, points, COLORS[system], system.name, 100)
            right.legend(frameon=False, fontsize=8)
    right.set_xlabel("share of random symbols in feedback")
    return figure


CHANGE_COLORS = {
    "as in the paper": "#c2410c",
    "sharpened target": "#1d4ed8",
    "EMA teacher": "#0891b2",
    "warm-up of 50 steps": "#6b7280",
    "4 of each class per E-step": "#a78bfa",
}


def stability_map(runs: Runs, tuned: Tuned) -> Any:
    """Held-out accuracy and collapsed runs of VPD at rising learning rates."""
    figure, panels = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained", sharex=True)
    for axes_pair, feedback in zip(panels, ("environment", "siblings"), strict=True):
        for axes, measure, label in zip(
            axes_pair, (held_out, collapsed), ("held-out accuracy, %", "collapsed runs, %"), strict=True
        ):
            for i, (name, color) in enumerate(CHANGE_COLORS.items()):
                rates = experiments.CHANGES[name].rates
                estimates = [mean_of(experiments.stable(name, feedback, r), runs, measure) for r in rates]
                shift = 1.02 ** (i - 2)  # beside each other
                shown = [
                    (shift * r, 100 * e.mean, 100 * e.half) for r, e in zip(rates, estimates, strict=True) if e.runs
                ]
                if shown:
                    x, y, half = zip(*shown, strict=True)
                    error = half if measure is held_out else None
                    axes.errorbar(x, y, error, color=color, lw=1.8, marker="o", ms=4, label=name, capsize=2)
            axes.set_xscale("log")
            axes.set_xticks(experiments.STABILITY_RATES, [f"{r:g}" for r in experiments.STABILITY_RATES])
            axes.minorticks_off()
            axes.set_ylim(-3, 103)
            axes.set_title(f"{feedback}: {label}", loc="left", fontsize=10, fontweight="bold")
    for axes in panels[1]:
        axes.set_xlabel("learning rate")
    if panels[0, 0].has_data():
        panels[0, 0].legend(frameon=False, fontsize=8)
    return figure


def warning_signs(runs: Runs, tuned: Tuned) -> Any:
    """What the metrics show around a collapse, and in runs without one."""
    names = ("completions/clipped_ratio", "teacher/log_ratio_end", "teacher/log_ratio_confident")
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    cells = [
        c for name in ("as in the paper", "sharpened target") for c in experiments.stable(name, "environment", 6e-4)
    ]
    for _, run in made(cells, runs):
        color = "#c2410c" if collapsed(run) else "#9ca3af"
        for axes, name in zip(panels, names, strict=True):
            points = [
                (step, value)
                for step, value in zip(run["history"]["step"], run["history"].get(name, []), strict=False)
                if value is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, lw=1.2, alpha=0.8)
    for axes, name in zip(panels, names, strict=True):
        axes.set_xlabel("step")
        axes.set_title(name, loc="left", fontsize=9, fontweight="bold")
    panels[1].set_ylim(-0.1, 0.05)
    panels[2].set_ylim(-0.1, 0.05)
    return figure
