"""
Tables and plots from `results/runs.jsonl`.

    python -m examples.paper_in_miniature.report

writes a JSON file for each table, the plots, and the tables in `README.md` between their markers.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from . import grid
from .grid import RESULTS, SDPO, SYSTEMS, VPD, System, Tuned
from .run import Cell
from .task import DOMAINS


PAGE = Path(__file__).parent / "README.md"
LEVEL = 0.95

Runs = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Estimate:
    """A mean of runs and half the width of its 95 % interval, which is infinite for a single run."""

    mean: float
    half: float
    runs: int

    def __str__(self) -> str:
        return (
            f"{100 * self.mean:.1f} ± {100 * self.half:.1f}" if math.isfinite(self.half) else f"{100 * self.mean:.1f}"
        )


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and t-interval."""
    return average([list(values)])


def average(groups: list[list[float]]) -> Estimate:
    """
    The mean of the groups' means, with the interval that the spread within groups gives (Welch–Satterthwaite).

    Groups are domains: their difference is no error of the mean over them.
    """
    groups = [group for group in groups if group]
    if not groups:
        return Estimate(math.nan, math.inf, 0)
    runs = sum(map(len, groups))
    mean = sum(sum(g) / len(g) for g in groups) / len(groups)
    if min(map(len, groups)) < 2:
        return Estimate(mean, math.inf, runs)
    parts = [variance(g) / len(g) / len(groups) ** 2 for g in groups]
    if not any(parts):
        return Estimate(mean, 0.0, runs)
    freedom = sum(parts) ** 2 / sum(p**2 / (len(g) - 1) for p, g in zip(parts, groups, strict=True))
    return Estimate(mean, float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(sum(parts)), runs)


def variance(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / (len(values) - 1)


@dataclass
class Row:
    """A row of a table: its label, and the runs behind it."""

    label: str
    cells: list[Cell]

    def accuracies(self, runs: Runs, measure: Callable[[dict[str, Any]], float]) -> dict[str, dict[int, float]]:
        """By domain and seed."""
        found: dict[str, dict[int, float]] = {}
        for c in self.cells:
            if (run := runs.get(grid.key(c))) is not None:
                found.setdefault(c.domain, {})[c.seed] = measure(run)
        return found


def held_out(run: dict[str, Any]) -> float:
    return run["after"]["held_out"]


def before(run: dict[str, Any]) -> float:
    return run["before"]["held_out"]


def best(run: dict[str, Any]) -> float:
    return max(accuracy for _, accuracy in run["curve"])


@dataclass
class Table:
    """
    A table: rows of accuracies by domain with their average, and differences between rows of the same runs.

    Differences are taken run by run: two systems meet the same hidden rule and the same problems under one seed.
    """

    name: str
    caption: str
    rows: list[Row]
    pairs: list[tuple[str, str]]
    domains: tuple[str, ...] = DOMAINS

    def summary(self, runs: Runs) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        by_row = {row.label: row.accuracies(runs, held_out) for row in self.rows}
        base = by_row["Base model"] = self.rows[0].accuracies(runs, before)
        for label, found in {"Base model": base, **by_row}.items():
            columns = {d: estimate(found.get(d, {}).values()) for d in self.domains}
            columns["average"] = average([list(found.get(d, {}).values()) for d in self.domains])
            rows[label] = {name: vars(e) for name, e in columns.items()}
        differences = {}
        for first, second in self.pairs:
            a, b = by_row[first], by_row[second]
            groups = [
                [a[d][s] - b[d][s] for s in sorted(a.get(d, {}).keys() & b.get(d, {}).keys())] for d in self.domains
            ]
            differences[f"{first} − {second}"] = vars(average(groups))
        commits = {run["commit"] for row in self.rows for c in row.cells if (run := runs.get(grid.key(c)))}
        return {
            "caption": self.caption,
            "command": f"python -m examples.paper_in_miniature.grid {self.name}",
            "commits": sorted(commits),
            "seeds": sorted({c.seed for row in self.rows for c in row.cells}),
            "measure": "held-out accuracy after training; half: half the width of the 95 % interval",
            "rows": rows,
            "differences": differences,
        }


def markdown(summary: dict[str, Any]) -> str:
    columns = list(next(iter(summary["rows"].values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for label, row in summary["rows"].items():
        if row["average"]["runs"]:
            cells = [str(Estimate(**row[c])) for c in columns]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    differences = {n: e for n, e in summary["differences"].items() if e["runs"]}
    if differences:
        lines += ["", "| difference, run by run | average |", "|---|---|"]
        lines += [f"| {name} | {Estimate(**e)} |" for name, e in differences.items()]
    return "\n".join(lines)


def tables(tuned: Tuned) -> list[Table]:
    def row(system: System, feedback: str, label: str | None = None, **changes: Any) -> Row:
        return Row(label or system.name, list(grid.rows_of(system, feedback, tuned, **changes)))

    others = [(VPD.name, s.name) for s in SYSTEMS if s is not VPD]
    made = [
        Table("table_1", "Environment feedback", [row(s, "environment") for s in SYSTEMS], others),
        Table("table_2", "Siblings", [row(s, "siblings") for s in SYSTEMS], others),
    ]
    critique = [row(s, "critique", f"{s.name}, self-critique") for s in (SDPO, VPD)]
    siblings = [row(s, "siblings", f"{s.name}, siblings") for s in (SDPO, VPD)]
    pairs = [(f"{VPD.name}, {f}", f"{SDPO.name}, {f}") for f in ("siblings", "self-critique")]
    pairs += [(f"{s.name}, self-critique", f"{s.name}, siblings") for s in (SDPO, VPD)]
    made.append(Table("table_3", "Self-critique against siblings", [*siblings, *critique], pairs))
    rows = []
    for feedback in ("environment", "siblings"):
        for frequency in (1, 5, 10):
            changes = {} if frequency == 5 else {"overrides": (("e_step_frequency", frequency),)}
            rows.append(row(VPD, feedback, f"{feedback}, F = {frequency}", **changes))
    pairs = [(f"{f}, F = {n}", f"{f}, F = 5") for f in ("environment", "siblings") for n in (1, 10)]
    made.append(Table("table_4", "How often there is an E-step", rows, pairs))
    return made


def write_page(parts: dict[str, str]) -> None:
    """Put each part between its markers in the page."""
    text = PAGE.read_text()
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            sys.exit(f"{PAGE.name} has no place for {name}.")
        text = pattern.sub(lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text)  # type: ignore[misc]
    PAGE.write_text(text)


def main() -> None:
    runs, tuned = grid.load(), grid.read_tuned()
    parts = {}
    for table in tables(tuned):
        summary = table.summary(runs)
        (RESULTS / f"{table.name}.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        parts[table.name] = markdown(summary)
        print(f"\n{table.caption}\n{parts[table.name]}")
    write_page(parts)


if __name__ == "__main__":
    main()
