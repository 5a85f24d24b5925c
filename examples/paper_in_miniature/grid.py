"""
Makes the runs of the tables.

    python -m examples.paper_in_miniature.grid tune          # a learning rate and a field for each system
    python -m examples.paper_in_miniature.grid table_1       # one experiment
    python -m examples.paper_in_miniature.grid all           # everything, in the order below

Runs that are in `results/runs.jsonl` are not made again, so a command that was stopped goes on where it was. Each run
takes one core; `--workers` says how many there are at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from statistics import mean
from typing import Any

from .experiments import EXPERIMENTS, TUNED_SYSTEMS, System, Tuned, cell, tuning_name
from .finished import RESULTS, RUNS, Runs, described, held_out, key, load, made
from .run import Cell


TUNED = RESULTS / "tuned.json"

# Never reported: the first for all candidates of a system, the second for the best two of them
TUNING_SEEDS = (100, 101)
TUNING_DOMAINS = ("cipher", "mirror")

KEPT_METRICS = (
    "step",
    "reward",
    "entropy",
    "completions/clipped_ratio",
    "teacher/log_ratio_margin",
    "teacher/log_ratio_confident",
    "teacher/log_ratio_end",
    "m_step/divergence",
    "e_step/reward_margin",
    "e_step/skipped",
    "feedback/coverage",
)


# ---- Tuning


def trials(system: System, feedback: str, candidate: int, seeds: Sequence[int]) -> list[Cell]:
    tuned = {tuning_name(system, feedback): candidate}
    return [cell(system, feedback, d, s, tuned) for s in seeds for d in TUNING_DOMAINS]


def first_trials() -> list[Cell]:
    """Every candidate on the first tuning seed."""
    first = TUNING_SEEDS[:1]
    return [c for f, s in TUNED_SYSTEMS for i in range(len(s.candidates)) for c in trials(s, f, i, first)]


def second_trials(runs: Runs) -> list[Cell]:
    """The best two candidates of each system on the second tuning seed."""
    others = TUNING_SEEDS[1:]
    return [c for f, s in TUNED_SYSTEMS for i in best_two(s, f, runs) for c in trials(s, f, i, others)]


def accuracies(system: System, feedback: str, candidate: int, runs: Runs) -> list[float]:
    cells = trials(system, feedback, candidate, TUNING_SEEDS)
    return [held_out(run) for _, run in made(cells, runs)]


def best_two(system: System, feedback: str, runs: Runs) -> list[int]:
    first = TUNING_SEEDS[:1]
    means = [
        mean(held_out(runs[key(c)]) for c in trials(system, feedback, i, first)) for i in range(len(system.candidates))
    ]
    best = sorted(range(len(means)), key=means.__getitem__, reverse=True)[:2]
    return best if len(means) > 1 else []  # nothing to choose from


def choose(runs: Runs) -> Tuned:
    """For each system, of the best two candidates the one with the higher mean over all tuning seeds."""
    chosen, grid = {}, {}
    for feedback, system in TUNED_SYSTEMS:
        name = tuning_name(system, feedback)
        found = [accuracies(system, feedback, i, runs) for i in range(len(system.candidates))]
        grid[name] = [
            {"learning_rate": rate, **dict(overrides), "accuracies": [round(a, 4) for a in reached]}
            for (rate, overrides), reached in zip(system.candidates, found, strict=True)
        ]
        chosen[name] = max(best_two(system, feedback, runs), key=lambda i, found=found: mean(found[i]), default=0)
    report = {
        "command": "python -m examples.paper_in_miniature.grid tune",
        "commits": sorted({runs[key(c)]["commit"] for c in first_trials() + second_trials(runs)}),
        "seeds": TUNING_SEEDS,
        "domains": TUNING_DOMAINS,
        "chosen": chosen,
        "candidates": grid,
    }
    TUNED.write_text(json.dumps(report, indent=1) + "\n")
    return chosen


def read_tuned() -> Tuned:
    if not TUNED.exists():
        sys.exit("The systems are not tuned yet: run the command with `tune` first.")
    return json.loads(TUNED.read_text())["chosen"]


# ---- Running


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
    kept = {name: result[name] for name in ("before", "after", "curve", "seconds")}
    history = {name: curve for name, curve in result["history"].items() if name in KEPT_METRICS}
    return {"cell": described(c), **kept, "history": history, "commit": version}


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
        make(first_trials(), args.workers)
        make(second_trials(load()), args.workers)
        choose(load())
    for name, cells in EXPERIMENTS.items():
        if args.experiment in (name, "all"):
            make(cells(read_tuned()), args.workers)


if __name__ == "__main__":
    main()
