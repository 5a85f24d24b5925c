"""`vpd-trl report`: what the logs of runs say, as plots, a table and a page."""

from __future__ import annotations

import argparse
import csv
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .. import __version__
from . import page, plots
from .errors import UsageError, suggestion, usage_errors
from .guide import Group, arrange
from .runs import Measurement, Run, load, summarize


DESCRIPTION = """Plots and tables of one or more runs. RUN is the output_dir of a training run (of vpd-trl train, or of a
script that uses VPDTrainer and saves checkpoints or calls trainer.save_state()), a checkpoint, or the output_dir of
vpd-trl evaluate. Writes index.html, one page that needs no network, a PNG file per group of metrics, and metrics.csv."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}.")


def make_parser() -> argparse.ArgumentParser:
    """The parser of `vpd-trl report`."""
    parser = _Parser(prog="vpd-trl report", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder, or LABEL=FOLDER to name it in the plots")
    parser.add_argument("--output", default="report", metavar="FOLDER", help="where the files go; default: report")
    parser.add_argument("--title", default="Training report", help="heading of the page")
    return parser


def run(arguments: Sequence[str]) -> None:
    """
    Write the report that the arguments ask for, and print where it is.

    Args:
        arguments: What the command line holds after `report`.

    Raises:
        UsageError: If a run can't be read, holds nothing, or Matplotlib is missing.
    """
    parser = make_parser()
    args, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        near = suggestion(unknown[0].lstrip("-"), ("output", "title"))
        raise UsageError(f"there is no option {unknown[0]}.{near}")
    with usage_errors():
        plots.require_matplotlib()
        runs, measurements = load(args.runs)
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
    written = write(folder, args.title, runs, measurements)
    print(overview(runs))
    print(f"Page: {written}")


def write(folder: Path, title: str, runs: Sequence[Run], measurements: Sequence[Measurement]) -> Path:
    """
    Write the page, the plots and the table.

    Args:
        folder: Where to; it must be there.
        title: The page's heading.
        runs: Training runs.
        measurements: Results of `vpd-trl evaluate`.

    Returns:
        The page's path.
    """
    groups = arrange({metric for run in runs for metric in run.series})
    for group, metrics in groups:
        plots.group_png(folder / f"{group.key}.png", metrics, runs)
    if measurements:
        plots.measurements_png(folder / "evaluations.png", page.measurement_metrics(measurements), measurements)
    write_csv(folder / "metrics.csv", runs, groups)
    counts = {"training run": len(runs), "evaluation": len(measurements)}
    content = " and ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in counts.items() if n)
    date = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    made = f"{content}. Made on {date} by vpd-trl {__version__}."
    path = folder / "index.html"
    path.write_text(page.page(title, runs, measurements, groups, made), encoding="utf-8")
    return path


def write_csv(path: Path, runs: Sequence[Run], groups: Sequence[tuple[Group, list[str]]]) -> None:
    """A line per run and metric: first, last and best value, in full precision."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "metric", "first", "last", "best", "best_step", "values"])
        for _, metrics in groups:
            for metric in metrics:
                for run in runs:
                    if metric in run.series:
                        s = summarize(metric, run.series[metric])
                        writer.writerow([run.label, metric, s.first, s.last, s.best, s.best_step, s.count])


def overview(runs: Sequence[Run]) -> str:
    """The reward and the evaluations of runs as text."""
    rows = [("run", "metric", "first", "last", "best")]
    for run in runs:
        shown = [name for name in sorted(run.series) if name.startswith("eval_") and "@" in name]
        for metric in ["reward", *shown]:
            if metric in run.series:
                s = summarize(metric, run.series[metric])
                at = "" if s.best_step is None else f" (step {s.best_step})"
                rows.append((run.label, metric, page.number(s.first), page.number(s.last), page.number(s.best) + at))
    if len(rows) == 1:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows) + "\n"
