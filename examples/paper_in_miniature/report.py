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
from statistics import median
from typing import Any

from . import experiments, grid, plots
from .experiments import GRPO, SDPO_SHARP, SYSTEMS, VPD, VPD_EMA, VPD_LORA, System, Tuned
from .finished import RESULTS, Runs, collapsed, course, held_out, load, made
from .run import Cell
from .statistics import Estimate, average, estimate
from .task import DOMAINS, RIGID


PAGE = Path(__file__).parent / "README.md"
FRONT_PAGE = Path(__file__).parents[2] / "README.md"


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
    experiment: str = ""  # its runs, if not of the same name

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
        counts = {row.label: sum(collapsed(run) for _, run in made(row.cells, runs)) for row in self.rows}
        return {
            "caption": self.caption,
            "command": f"python -m examples.paper_in_miniature.grid {self.experiment or self.name}",
            "commits": sorted(commits),
            "seeds": sorted({c.seed for row in self.rows for c in row.cells}),
            "measure": "held-out accuracy after training; half: half the width of the 95 % interval",
            "rows": rows,
            "collapsed": counts,
            "differences": differences,
        }


def markdown(summary: dict[str, Any]) -> str:
    columns = list(next(iter(summary["rows"].values())))
    lines = ["| | " + " | ".join([*columns, "collapsed"]) + " |", "|---|" + "---|" * (len(columns) + 1)]
    for label, row in summary["rows"].items():
        if runs := row["average"]["runs"]:
            cells = [str(Estimate(**row[c])) for c in columns]
            cells.append(f"{summary['collapsed'][label]} of {runs}" if label in summary["collapsed"] else "")
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
        running_shift(tuned),
        figure_2(tuned),
        cold_start(tuned),
        rigid(tuned),
        lora_teacher(tuned),
        stability(),
        density(1, tuned),
        density(2, tuned),
        noise(tuned),
    ]


def row(system: System, feedback: str, tuned: Tuned, label: str | None = None, **changes: Any) -> Row:
    return Row(label or system.name, list(experiments.rows_of(system, feedback, tuned, **changes)))


def main_table(name: str, caption: str, feedback: str, tuned: Tuned) -> Table:
    pairs = [(first.name, s.name) for first in (VPD, VPD_LORA) for s in SYSTEMS if s is not first]
    return Table(name, caption, [row(s, feedback, tuned) for s in SYSTEMS], pairs)


def table_3(tuned: Tuned) -> Table:
    rows = [row(s, "siblings", tuned, f"{s.name}, siblings") for s in (SDPO_SHARP, VPD)]
    rows += [row(s, "critique", tuned, f"{s.name}, self-critique") for s in (SDPO_SHARP, VPD)]
    pairs = [(f"{VPD.name}, {f}", f"{SDPO_SHARP.name}, {f}") for f in ("siblings", "self-critique")]
    pairs += [(f"{s.name}, self-critique", f"{s.name}, siblings") for s in (SDPO_SHARP, VPD)]
    return Table("table_3", "Self-critique against siblings", rows, pairs)


def table_4(tuned: Tuned) -> Table:
    rows, pairs = [], []
    for feedback in experiments.BOTH:
        for frequency in (1, 5, 10):
            changes = {} if frequency == 5 else {"overrides": (("e_step_frequency", frequency),)}
            rows.append(row(VPD, feedback, tuned, f"{feedback}, F = {frequency}", **changes))
        pairs += [(f"{feedback}, F = {n}", f"{feedback}, F = 5") for n in (1, 10)]
    return Table("table_4", "How often there is an E-step", rows, pairs)


def table_5(tuned: Tuned) -> Table:
    few, long = experiments.FEW, experiments.LONG
    rows = [
        row(VPD, "environment", tuned, name, domains=few, steps=long, overrides=overrides)
        for name, overrides in experiments.PRIORS.items()
    ]
    variants = (", lagging shift", ", tenfold reward")
    pairs = [(f"dynamic prior{variant}", f"fixed prior{variant}") for variant in ("", *variants)]
    pairs += [(name, f"{name}{variant}") for variant in variants for name in ("dynamic prior", "fixed prior")]
    return Table("table_5", f"The prior, after {long} steps", rows, pairs, few)


def running_shift(tuned: Tuned) -> Table:
    rows, pairs = [], []
    for feedback in experiments.BOTH:
        names = {"batch": f"{feedback}, by E-steps", "running": f"{feedback}, by M-steps"}
        rows += [Row(name, list(experiments.shifted(shift, feedback, tuned))) for shift, name in names.items()]
        pairs.append((names["running"], names["batch"]))
    return Table("running_shift", "Which step measures the reward shift", rows, pairs, experiments.FEW)


def figure_2(tuned: Tuned) -> Table:
    few, long = experiments.FEW, experiments.LONG
    systems = (*experiments.LONG_SYSTEMS, VPD)
    rows = [row(s, "environment", tuned, domains=few, steps=long) for s in systems]
    pairs = [(VPD.name, s.name) for s in experiments.LONG_SYSTEMS]
    return Table("figure_2_table", f"After {long} steps", rows, pairs, few, "figure_2")


def cold_start(tuned: Tuned) -> Table:
    few = experiments.FEW
    rows = [row(GRPO, "siblings", tuned, domains=few, skill=0.0)]
    rows += [row(s, "environment", tuned, domains=few, length=2, skill=0.0) for s in experiments.COLD_SYSTEMS]
    pairs = [(s.name, GRPO.name) for s in experiments.COLD_SYSTEMS] + [(VPD.name, SDPO_SHARP.name)]
    return Table("cold_start", "A base model that can't read feedback", rows, pairs, few)


def lora_teacher(tuned: Tuned) -> Table:
    rows = [Row(name, list(experiments.adapted(name, tuned))) for name in experiments.ADAPTERS]
    default = "fast and fading (default)"
    pairs = [(default, name) for name in experiments.ADAPTERS if name != default]
    return Table("lora_teacher", "The LoRA teacher's adapter, environment feedback", rows, pairs, experiments.FEW)


def rigid(tuned: Tuned) -> Table:
    seeds = sorted({c.seed for c in experiments.rigid(tuned)})
    rows = [Row(s.name, experiments.rigid_runs(s, tuned, seeds)) for s in experiments.RIGID_SYSTEMS]
    pairs = [(s.name, GRPO.name) for s in (SDPO_SHARP, VPD)] + [(VPD.name, SDPO_SHARP.name)]
    return Table("rigid", "A chain of which feedback makes up all but the end", rows, pairs, (RIGID,))


def stability() -> Table:
    rows = [
        Row(f"{feedback}: {name}, {rate:g}", list(experiments.stable(name, feedback, rate)))
        for name, feedback, rate in experiments.STABILITY_ROWS
    ]
    pairs = [
        (f"{feedback}: sharpened target, {rate:g}", f"{feedback}: as in the paper, {rate:g}")
        for feedback in experiments.BOTH
        for rate in experiments.STABILITY_RATES
    ]
    return Table("stability", "Learning rates and remedies", rows, pairs, experiments.FEW)


def density(length: int, tuned: Tuned) -> Table:
    systems = [s for s, lengths in experiments.DENSE_SYSTEMS.items() if length in lengths]
    rows = [Row(s.name, list(experiments.dense(s, length, tuned))) for s in systems]
    tested = [s for s in (VPD, VPD_EMA) if s in systems]
    names = [s.name for s in tested]
    if length == 2:
        slower = {f"{s.name}, half the rate": experiments.slower(s, tuned) for s in experiments.SLOWER_SYSTEMS}
        rows += [Row(name, list(cells)) for name, cells in slower.items()]
        names += slower
    pairs = [(name, other.name) for name in names for other in systems if other not in tested]
    return Table(f"density_{length}", f"Answers of {length} symbols", rows, pairs, experiments.FEW, "density")


def noise(tuned: Tuned) -> Table:
    rows, pairs = [], []
    for level in (0.0, *experiments.NOISE):
        names = [f"{s.name}, {level:g}" for s in experiments.NOISY_SYSTEMS]
        for system, name in zip(experiments.NOISY_SYSTEMS, names, strict=True):
            rows.append(row(system, "environment", tuned, name, domains=experiments.FEW, noise=level))
        pairs.append((names[1], names[0]))
    return Table("noise", "Share of random symbols in feedback", rows, pairs, experiments.FEW)


def warnings(runs: Runs) -> str:
    """What the trainer's warning is worth in the stability runs."""
    lines = [
        "| | runs | fell | warned before | steps ahead, median | warned, did not fall |",
        "|---|---|---|---|---|---|",
    ]
    for name in experiments.CHANGES:
        cells = [c for row in experiments.STABILITY_ROWS if row[0] == name for c in experiments.stable(*row)]
        # Runs of earlier versions lack the metric
        there = [run for _, run in made(cells, runs) if "teacher/log_ratio_end" in run["history"]]
        courses = [course(run) for run in there]
        fell = [c for c in courses if c.fall is not None]
        ahead = [c.fall - c.warning for c in fell if c.warning is not None and c.warning < c.fall]
        false = sum(c.fall is None and c.warning is not None for c in courses)
        lead = f"{median(ahead):.0f}" if ahead else ""
        if courses:
            lines.append(f"| {name} | {len(courses)} | {len(fell)} | {len(ahead)} | {lead} | {false} |")
    return "\n".join(lines) if len(lines) > 2 else "Not run yet."


def comparison(*summaries: dict[str, Any]) -> str:
    """The averages of tables 1 and 2 beside each other, for the project's first page."""
    lines = ["| held-out accuracy, % | environment feedback, sparse rewards | siblings |", "|---|---|---|"]
    for label in ("Base model", *(s.name for s in SYSTEMS)):
        lines.append(
            f"| {label} | " + " | ".join(str(Estimate(**s["rows"][label]["average"])) for s in summaries) + " |"
        )
    return "\n".join(lines)


def write_page(page: Path, parts: dict[str, str]) -> None:
    """Put each part between its markers in the page."""
    text = page.read_text()
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            sys.exit(f"{page} has no place for {name}.")
        text = pattern.sub(lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text)  # type: ignore[misc]
    page.write_text(text)


def main() -> None:
    runs, tuned = load(), grid.read_tuned()
    parts, summaries = {}, {}
    for table in tables(tuned):
        summary = summaries[table.name] = table.summary(runs)
        (RESULTS / f"{table.name}.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        parts[table.name] = markdown(summary)
        print(f"\n{table.caption}\n{parts[table.name]}")
    parts["warnings"] = warnings(runs)
    for name, caption in plots.draw_all(runs, tuned, RESULTS).items():
        parts[name] = f"![{caption}](results/{name}.png)" if caption else "Not run yet."
    write_page(PAGE, parts)
    write_page(FRONT_PAGE, {"miniature-table": comparison(summaries["table_1"], summaries["table_2"])})


if __name__ == "__main__":
    main()
