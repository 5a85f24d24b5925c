"""
The tables as lists of runs, and the command that makes them.

    python -m examples.paper_in_miniature.grid tune          # a learning rate for each system
    python -m examples.paper_in_miniature.grid table_1_2     # one experiment
    python -m examples.paper_in_miniature.grid all           # everything, in the order below

Runs that are in `results/runs.jsonl` are not made again, so a command that was stopped goes on where it was. Each run
takes one core; `--workers` says how many there are at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from .run import Cell
from .task import DOMAINS, RIGID


RESULTS = Path(__file__).parent / "results"
RUNS = RESULTS / "runs.jsonl"
TUNED = RESULTS / "tuned.json"

SEEDS = (0, 1, 2, 3, 4)  # reported
TUNING_SEEDS = (100,)  # never reported
LEARNING_RATES = (2.5e-4, 5e-4, 1e-3)  # the budget of every system, whatever its feedback


@dataclass(frozen=True)
class System:
    """A row of the paper's tables."""

    name: str
    method: str
    teacher: str = "shared"
    overrides: tuple[tuple[str, Any], ...] = ()


GRPO = System("GRPO", "grpo")
SDPO = System("SDPO, live teacher", "sdpo")
SDPO_EMA = System("SDPO, EMA teacher", "sdpo", "ema")
JOINT = System("SDPO+RL, joint loss", "joint_loss")
RESHAPE = System("SDPO+RL, advantage reshaping", "advantage_reshaping")
REWEIGHT = System("SDPO+RL, advantage reweighting", "advantage_reweighting")
VPD = System("VPD, shared teacher", "vpd")
VPD_EMA = System("VPD, EMA teacher", "vpd", "ema")
VPD_LORA = System("VPD, LoRA teacher", "vpd", "lora")
SYSTEMS = (GRPO, SDPO, SDPO_EMA, JOINT, RESHAPE, REWEIGHT, VPD, VPD_EMA, VPD_LORA)


def tuning_name(system: System, feedback: str) -> str:
    """Under which a system's learning rate is kept. GRPO makes no use of feedback."""
    return system.name if system.method == "grpo" else f"{system.name} / {feedback}"


def cell(system: System, feedback: str, domain: str, seed: int, tuned: dict[str, float], **changes: Any) -> Cell:
    """A run of a system at its tuned learning rate."""
    overrides = (*system.overrides, *changes.pop("overrides", ()))
    return Cell(
        method=system.method,
        teacher=system.teacher,
        feedback="environment" if system.method == "grpo" else feedback,
        domain=domain,
        seed=seed,
        overrides=overrides,
        **{"learning_rate": tuned[tuning_name(system, feedback)], **changes},
    )


def seeds_of(system: System, feedback: str, tuned: dict[str, float], **changes: Any) -> Iterator[Cell]:
    """The runs behind one row: every domain, every reported seed. Seeds come first, so that rows fill up evenly."""
    for seed in SEEDS:
        for domain in DOMAINS:
            yield cell(system, feedback, domain, seed, tuned, **changes)


# ---- Experiments: a name, and what it runs given the tuned learning rates


def tune() -> list[Cell]:
    cells = []
    for feedback, systems in (("environment", SYSTEMS), ("siblings", SYSTEMS), ("critique", (SDPO, VPD))):
        for system in systems:
            for rate in LEARNING_RATES:
                tuned = {tuning_name(system, feedback): rate}
                cells += [cell(system, feedback, d, s, tuned) for s in TUNING_SEEDS for d in DOMAINS]
    return cells


def table_1_2(tuned: dict[str, float]) -> list[Cell]:
    rows = [seeds_of(s, f, tuned) for f in ("environment", "siblings") for s in SYSTEMS]
    return [c for group in zip(*rows, strict=True) for c in group]


def table_3(tuned: dict[str, float]) -> list[Cell]:
    return [c for s in (SDPO, VPD) for c in seeds_of(s, "critique", tuned)]


def table_4(tuned: dict[str, float]) -> list[Cell]:
    return [
        c
        for feedback in ("environment", "siblings")
        for frequency in (1, 10)  # 5 is in table_1_2
        for c in seeds_of(VPD, feedback, tuned, overrides=(("e_step_frequency", frequency),))
    ]


EXPERIMENTS = {"table_1_2": table_1_2, "table_3": table_3, "table_4": table_4}


# ---- Running


def key(c: Cell) -> str:
    """A run's name: what differs from the defaults."""
    return json.dumps(described(c), sort_keys=True)


def described(c: Cell) -> dict[str, Any]:
    defaults = {f.name: f.default for f in fields(Cell)}
    values = {name: value for name, value in asdict(c).items() if value != defaults[name]}
    return json.loads(json.dumps(values))  # tuples as lists, as in the file


def load() -> dict[str, dict[str, Any]]:
    """The finished runs by their names."""
    if not RUNS.exists():
        return {}
    rows = (json.loads(line) for line in RUNS.read_text().splitlines())
    return {json.dumps(row["cell"], sort_keys=True): row for row in rows}


def choose_learning_rates() -> dict[str, float]:
    """For each system the learning rate with the highest mean held-out accuracy on the tuning seeds."""
    runs, scores = load(), {}
    for c in tune():
        system = next(s for s in SYSTEMS if (s.method, s.teacher) == (c.method, c.teacher))
        if (row := runs.get(key(c))) is not None:
            for feedback in ("environment", "siblings") if c.method == "grpo" else (c.feedback,):
                name = tuning_name(system, feedback)
                scores.setdefault(name, {}).setdefault(c.learning_rate, []).append(row["after"]["held_out"])
    means = {n: {rate: sum(v) / len(v) for rate, v in rates.items()} for n, rates in scores.items()}
    chosen = {name: max(rates, key=rates.__getitem__) for name, rates in means.items()}
    report = {
        "command": "python -m examples.paper_in_miniature.grid tune",
        "seeds": TUNING_SEEDS,
        "grid": LEARNING_RATES,
        "mean held-out accuracy": {n: {f"{r:g}": round(m, 4) for r, m in rates.items()} for n, rates in means.items()},
        "chosen": chosen,
    }
    TUNED.write_text(json.dumps(report, indent=1) + "\n")
    return chosen


def tuned_learning_rates() -> dict[str, float]:
    if not TUNED.exists():
        sys.exit("Learning rates are not tuned yet: run the command with `tune` first.")
    return json.loads(TUNED.read_text())["chosen"]


def _quiet() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()


def _run(c: Cell) -> dict[str, Any]:
    from .run import run

    return run(c)


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()

    changed = git("status", "--porcelain", "--", "../../vpd_trl", "*.py")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def record(result: dict[str, Any], c: Cell, version: str) -> dict[str, Any]:
    """What is kept of a run."""
    kept = {name: result[name] for name in ("before", "after", "curve", "history", "seconds")}
    return {"cell": described(c), **kept, "commit": version}


def make(cells: list[Cell], workers: int) -> None:
    """Make the runs that are not there yet."""
    RESULTS.mkdir(exist_ok=True)
    done = load()
    waiting = list({key(c): c for c in cells if key(c) not in done}.values())
    print(f"{len(cells)} runs, {len(waiting)} to make, {workers} at a time", flush=True)
    version, finished = commit(), 0
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_quiet)
    running: dict[Future, Cell] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                c = waiting.pop(0)
                running[pool.submit(_run, c)] = c
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                c = running.pop(future)
                row = record(future.result(), c, version)
                with RUNS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                finished += 1
                left = len(waiting) + len(running)
                accuracy = f"{row['before']['held_out']:.3f} → {row['after']['held_out']:.3f}"
                print(f"{finished} made, {left} left: {accuracy} {key(c)}", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("tune", *EXPERIMENTS, "all"))
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    args = parser.parse_args()
    if args.experiment in ("tune", "all"):
        make(tune(), args.workers)
        choose_learning_rates()
    for name, cells in EXPERIMENTS.items():
        if args.experiment in (name, "all"):
            make(cells(tuned_learning_rates()), args.workers)


if __name__ == "__main__":
    main()
