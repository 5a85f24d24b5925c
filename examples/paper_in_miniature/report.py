"""
Tables and plots from `results/runs.jsonl`.

    python -m examples.paper_in_miniature.report

writes a JSON file for each table, the plots, and the tables in `README.md` between their markers.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import grid, plots
from .finished import RESULTS, Runs, held_out, load, made
from .grid import GRPO, SDPO, SDPO_EMA, SYSTEMS, VPD, VPD_LORA, System, Tuned
from .run import Cell
from .statistics import Estimate, average, estimate
from .task import DOMAINS, RIGID


PAGE = Path(__file__).parent / "README.md"


@dataclass
class Row:
    """A row of a table: its label, and the runs behind it."""

    label: str
    cells: list[Cell]

    def accuracies(self, runs: Runs, measure: Callable[[dict[str, Any]], float]) -> dict[str, dict[int, float]]:
        """By domain and seed."""
        found: dict[str, dict[int, float]] = {}
        for c, run in made(self.cells, runs):
            found.setdefault(c.domain, {})[c.seed] = measure(run)
        return found


def before(run: dict[str, Any]) -> float:
    return run["before"]["held_out"]


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
        commits = {run["commit"] for row in self.rows for _, run in made(row.cells, runs)}
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
    if len(lines) == 2:
        return "Not run yet."
    differences = {n: e for n, e in summary["differences"].items() if e["runs"]}
    if differences:
        lines += ["", "| difference, run by run | average |", "|---|---|"]
        lines += [f"| {name} | {Estimate(**e)} |" for name, e in differences.items()]
    return "\n".join(lines)


def tables(tuned: Tuned) -> list[Table]:
    return [
        main_table("table_1", "Environment feedback", "environment", tuned),
        main_table("table_2", "Siblings", "siblings", tuned),
        table_3(tuned),
        table_4(tuned),
        table_5(tuned),
        cold_start(tuned),
        rigid(tuned),
        lora_teacher(tuned),
    ]


def row(system: System, feedback: str, tuned: Tuned, label: str | None = None, **changes: Any) -> Row:
    return Row(label or system.name, list(grid.rows_of(system, feedback, tuned, **changes)))


def main_table(name: str, caption: str, feedback: str, tuned: Tuned) -> Table:
    pairs = [(first.name, s.name) for first in (VPD, VPD_LORA) for s in SYSTEMS if s is not first]
    return Table(name, caption, [row(s, feedback, tuned) for s in SYSTEMS], pairs)


def table_3(tuned: Tuned) -> Table:
    rows = [row(s, "siblings", tuned, f"{s.name}, siblings") for s in (SDPO, VPD)]
    rows += [row(s, "critique", tuned, f"{s.name}, self-critique") for s in (SDPO, VPD)]
    pairs = [(f"{VPD.name}, {f}", f"{SDPO.name}, {f}") for f in ("siblings", "self-critique")]
    pairs += [(f"{s.name}, self-critique", f"{s.name}, siblings") for s in (SDPO, VPD)]
    return Table("table_3", "Self-critique against siblings", rows, pairs)


def table_4(tuned: Tuned) -> Table:
    rows, pairs = [], []
    for feedback in ("environment", "siblings"):
        for frequency in (1, 5, 10):
            changes = {} if frequency == 5 else {"overrides": (("e_step_frequency", frequency),)}
            rows.append(row(VPD, feedback, tuned, f"{feedback}, F = {frequency}", **changes))
        pairs += [(f"{feedback}, F = {n}", f"{feedback}, F = 5") for n in (1, 10)]
    return Table("table_4", "How often there is an E-step", rows, pairs)


def table_5(tuned: Tuned) -> Table:
    rows = [
        row(VPD, "environment", tuned, "dynamic prior", steps=grid.LONG),
        row(VPD, "environment", tuned, "fixed prior", steps=grid.LONG, overrides=grid.FIXED_PRIOR),
    ]
    return Table("table_5", f"The prior, after {grid.LONG} steps", rows, [("dynamic prior", "fixed prior")])


def cold_start(tuned: Tuned) -> Table:
    rows = [row(GRPO, "siblings", tuned, skill=0.0)]
    rows += [row(s, "environment", tuned, length=2, skill=0.0) for s in (SDPO, SDPO_EMA, VPD, VPD_LORA)]
    pairs = [(s.name, GRPO.name) for s in (SDPO, VPD, VPD_LORA)] + [(VPD.name, SDPO.name)]
    return Table("cold_start", "A base model that can't read feedback", rows, pairs)


def lora_teacher(tuned: Tuned) -> Table:
    rows, pairs = [], []
    for feedback in ("environment", "siblings"):
        labels = {name: f"{feedback}: {name}" for name in grid.ADAPTERS}
        rows += [Row(labels[name], list(grid.adapted(name, feedback, tuned))) for name in grid.ADAPTERS]
        default = labels["fast and fading (default)"]
        pairs += [(default, label) for label in labels.values() if label != default]
    return Table("lora_teacher", "The LoRA teacher's adapter", rows, pairs, grid.STABILITY_DOMAINS)


def rigid(tuned: Tuned) -> Table:
    seeds = sorted({c.seed for c in grid.rigid(tuned)})
    rows = [Row(s.name, grid.rigid_runs(s, tuned, seeds)) for s in grid.RIGID_SYSTEMS]
    pairs = [(s.name, GRPO.name) for s in (SDPO, VPD, VPD_LORA)] + [(VPD.name, SDPO.name)]
    return Table("rigid", "A chain of which feedback makes up all but the end", rows, pairs, (RIGID,))


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
    runs, tuned = load(), grid.read_tuned()
    parts = {}
    for table in tables(tuned):
        summary = table.summary(runs)
        (RESULTS / f"{table.name}.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        parts[table.name] = markdown(summary)
        print(f"\n{table.caption}\n{parts[table.name]}")
    write_page(parts)
    plots.draw_all(runs, tuned, RESULTS)


if __name__ == "__main__":
    main()
