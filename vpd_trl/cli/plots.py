"""Plots of metrics over steps, as PNG files for papers and as SVG whose colors follow the page's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .guide import note
from .runs import Measurement, Run


# Told apart by people with any kind of color vision (Okabe and Ito), black left to the text
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5cc4", "#8c8c46")
INK, MUTED, GRID = "#1f2328", "#59636e", "#d8dee4"
DASHES = ("-", "--", ":", "-.")
MAX_POINTS = 300


def require_matplotlib() -> None:
    """
    See that there is Matplotlib.

    Raises:
        ImportError: With what to install, if there is none.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError as error:
        raise ImportError("vpd-trl report needs Matplotlib. Install it with: pip install 'vpd-trl[report]'") from error


def metric_svg(metric: str, runs: Sequence[Run]) -> str:
    """A plot of one metric of all runs, as an SVG element for a page."""
    with _style() as plt:
        figure, axes = plt.subplots(figsize=(4.4, 2.5), layout="constrained")
        draw(axes, metric, runs)
        return _svg(plt, figure, metric)


def group_png(path: Path, metrics: Sequence[str], runs: Sequence[Run]) -> None:
    """A PNG file with a plot per metric and a legend of the runs."""
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    with _style() as plt:
        figure, grid = plt.subplots(rows, columns, figsize=(4.2 * columns, 2.6 * rows + 0.5), squeeze=False)
        figure.set_layout_engine("constrained")
        for axes, metric in zip(grid.flat, metrics, strict=False):
            draw(axes, metric, runs)
            axes.set_title(metric, fontsize=9, loc="left", color=INK)
        for axes in grid.flat[len(metrics) :]:
            axes.axis("off")
        handles = [plt.Line2D([], [], color=_color(i), ls=_dash(i), lw=2) for i in range(len(runs))]
        # A label that begins with an underscore would be left out
        labels = [f" {run.label}" for run in runs]
        figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(runs)), frameon=False, fontsize=9)
        figure.savefig(path, dpi=130, facecolor="white")
        plt.close(figure)


def measurements_svg(metric: str, measurements: Sequence[Measurement]) -> str:
    """One metric of several evaluations with their intervals, as an SVG element for a page."""
    with _style() as plt:
        figure, axes = plt.subplots(figsize=(4.4, 0.55 + 0.3 * len(measurements)), layout="constrained")
        draw_measurements(axes, metric, measurements)
        return _svg(plt, figure, metric)


def measurements_png(path: Path, metrics: Sequence[str], measurements: Sequence[Measurement]) -> None:
    """A PNG file of evaluations with their intervals."""
    with _style() as plt:
        height = 0.7 + 0.3 * len(measurements)
        figure, grid = plt.subplots(len(metrics), 1, figsize=(6.5, height * len(metrics)), squeeze=False)
        figure.set_layout_engine("constrained")
        for axes, metric in zip(grid.flat, metrics, strict=True):
            draw_measurements(axes, metric, measurements)
            axes.set_title(metric, fontsize=9, loc="left", color=INK)
        figure.savefig(path, dpi=130, facecolor="white")
        plt.close(figure)


def draw(axes: Any, metric: str, runs: Sequence[Run]) -> None:
    """
    Draw a metric of all runs that have it.

    Few values are dots on a line; of many there is a running mean in front of them, or of their range.
    """
    hint = note(metric)
    if hint.line is not None:
        axes.axhline(hint.line, color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=1)
    for i, run in enumerate(runs):
        points = run.series.get(metric)
        if points:
            _draw_series(axes, points, run.intervals.get(metric, {}), color=_color(i), dash=_dash(i))
    axes.set_xlabel("step")
    axes.margins(x=0.03, y=0.12)
    _fit_height(axes, [v for run in runs for _, v in run.series.get(metric, [])], share=hint.share)
    axes.locator_params(axis="x", integer=True, nbins=6)
    axes.locator_params(axis="y", nbins=5)


def _draw_series(axes: Any, points: Sequence[tuple[int, float]], intervals: Any, *, color: str, dash: str) -> None:
    steps = np.array([step for step, _ in points], dtype=float)
    values = np.array([value for _, value in points])
    if intervals:
        known = [(step, value, *intervals[step]) for step, value in points if step in intervals]
        at, middle, low, high = (np.array(column) for column in zip(*known, strict=True))
        below, above = np.maximum(middle - low, 0), np.maximum(high - middle, 0)
        axes.errorbar(at, middle, yerr=[below, above], fmt="none", ecolor=color, capsize=3, lw=1, alpha=0.7)
    if len(values) <= 30:
        axes.plot(steps, values, color=color, ls=dash, marker="o", ms=3.2, lw=1.5)
        return
    window = max(3, len(values) // 20) | 1
    smooth = running_mean(values, window)
    if len(values) > MAX_POINTS:
        at, _, low, high = binned(steps, values, MAX_POINTS // 2)
        axes.fill_between(at, low, high, color=color, alpha=0.14, lw=0)
        steps, smooth, _, _ = binned(steps, smooth, MAX_POINTS)
    else:
        axes.plot(steps, values, color=color, lw=0.8, alpha=0.3)
    axes.plot(steps, smooth, color=color, ls=dash, lw=1.8)


def binned(steps: np.ndarray, values: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean step, and mean, least and greatest value, of as many equal portions (bins,) of a series."""
    parts = list(zip(np.array_split(steps, bins), np.array_split(values, bins), strict=True))
    return (
        np.array([at.mean() for at, _ in parts]),
        np.array([part.mean() for _, part in parts]),
        np.array([part.min() for _, part in parts]),
        np.array([part.max() for _, part in parts]),
    )


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean (N,) of the values within half a window on both sides of each, as far as there are any."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    start, end = np.maximum(place - window // 2, 0), np.minimum(place + window // 2 + 1, len(values))
    return (sums[end] - sums[start]) / (end - start)


def _fit_height(axes: Any, values: Sequence[float], *, share: bool) -> None:
    """Room for the values, and no zoom into the rounding errors of a constant."""
    low, high = axes.get_ylim()
    if max(values) - min(values) <= 1e-6 * max(map(abs, values)):
        middle, room = values[0], 0.05 if share else 0.1 * abs(values[0]) or 0.1
        low, high = middle - room, middle + room
    if share:
        low, high = max(-0.03, low), min(1.03, max(high, 0.1))
    axes.set_ylim(low, high)


def draw_measurements(axes: Any, metric: str, measurements: Sequence[Measurement]) -> None:
    """Draw a metric of evaluations, one below the other."""
    shown = [m for m in measurements if metric in m.metrics]
    for row, measurement in enumerate(shown):
        value, low, high = measurement.metrics[metric]
        if low is not None and high is not None:
            axes.plot([low, high], [row, row], color=_color(0), lw=2, alpha=0.45, solid_capstyle="round")
        axes.plot([value], [row], "o", color=_color(0), ms=5)
    axes.set_yticks(range(len(shown)), [measurement_label(m) for m in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)


def measurement_label(measurement: Measurement) -> str:
    """An evaluation's label, with the name of what was evaluated on."""
    if measurement.name in ("", measurement.label):
        return measurement.label
    return f"{measurement.label}, {measurement.name}"


def _color(i: int) -> str:
    return SERIES[i % len(SERIES)]


def _dash(i: int) -> str:
    return DASHES[i // len(SERIES) % len(DASHES)]


@contextmanager
def _style() -> Iterator[Any]:
    import matplotlib.pyplot as plt

    settings: Any = {
        "axes.edgecolor": GRID,
        "axes.grid": True,
        "axes.labelcolor": MUTED,
        "axes.labelsize": 8,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "axes.formatter.limits": (-3, 4),
        "font.size": 8,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "svg.fonttype": "none",
        "text.color": INK,
        "text.parse_math": False,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
    }
    with plt.rc_context(settings):
        yield plt


def _svg(plt: Any, figure: Any, title: str) -> str:
    """A figure as an SVG element: no fixed size, and the theme's colors in place of ours."""
    buffer = io.StringIO()
    # What is hashed into its names keeps the parts of one plot from those of another on the same page
    with plt.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 aria-hidden="true"', text, count=1)
    for i, color in enumerate(SERIES):
        text = text.replace(color, f"var(--series-{i})")
    for name, color in (("ink", INK), ("muted", MUTED), ("grid", GRID)):
        text = text.replace(color, f"var(--{name})")
    return text
