"""
The tables as lists of runs, and the command that makes them.

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
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import mean
from typing import Any

from .finished import RESULTS, RUNS, Runs, described, held_out, key, load, made
from .run import Cell
from .task import DOMAINS, RIGID


TUNED = RESULTS / "tuned.json"

SEEDS = (0, 1, 2, 3, 4)  # reported
# Never reported: the first for all candidates of a system, the second for the best two of them
TUNING_SEEDS = (100, 101)
TUNING_DOMAINS = ("cipher", "mirror")
# Symbols of an answer: what an environment says can be used where hardly any rollout succeeds, siblings can't
LENGTHS = {"environment": 3, "siblings": 2, "critique": 2}

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

Overrides = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class System:
    """
    A row of the paper's tables.

    `candidates` are what tuning chooses from: a learning rate and fields of `VPDConfig`. Each system has five.
    """

    name: str
    method: str
    teacher: str = "shared"
    candidates: tuple[tuple[float, Overrides], ...] = ()


def candidates(field: str, *values: Any) -> tuple[tuple[float, Overrides], ...]:
    """Two learning rates times two values of the field that matters most to a method."""
    return tuple((rate, ((field, value),)) for rate in (3e-4, 6e-4) for value in values)


def distilling(divergence: str = "forward_kl") -> tuple[tuple[float, Overrides], ...]:
    """Two learning rates times two divergences, and one of these with a sharpened target."""
    sharp = (6e-4, (("divergence", divergence), ("teacher_temperature", SHARP)))
    return (*candidates("divergence", "jsd", "forward_kl"), sharp)


SHARP = 0.5
MIX = (*candidates("advantage_mix", 0.5, 0.1), (1e-3, (("advantage_mix", 0.1),)))

GRPO = System("GRPO", "grpo", candidates=tuple((rate, ()) for rate in (3e-4, 6e-4, 1e-3, 2e-3, 4e-3)))
SDPO = System("SDPO, live teacher", "sdpo", "shared", distilling())
SDPO_EMA = System("SDPO, EMA teacher", "sdpo", "ema", distilling())
JOINT = System("SDPO+RL, joint loss", "joint_loss", "shared", distilling("jsd"))
RESHAPE = System("SDPO+RL, advantage reshaping", "advantage_reshaping", "shared", MIX)
REWEIGHT = System("SDPO+RL, advantage reweighting", "advantage_reweighting", "shared", MIX)
VPD = System("VPD, shared teacher", "vpd", "shared", distilling())
VPD_EMA = System("VPD, EMA teacher", "vpd", "ema", distilling())
VPD_LORA = System("VPD, LoRA teacher", "vpd", "lora", distilling())
SYSTEMS = (GRPO, SDPO, SDPO_EMA, JOINT, RESHAPE, REWEIGHT, VPD, VPD_EMA, VPD_LORA)

Tuned = dict[str, int]  # the chosen candidate of each system with each feedback


def tuning_name(system: System, feedback: str) -> str:
    return f"{system.name} / {feedback}"


def cell(system: System, feedback: str, domain: str, seed: int, tuned: Tuned, **changes: Any) -> Cell:
    """A run of a system as it was tuned."""
    rate, overrides = system.candidates[tuned[tuning_name(system, feedback)]]
    values: dict[str, Any] = dict(
        method=system.method,
        teacher=system.teacher,
        # GRPO makes no use of feedback
        feedback="environment" if system.method == "grpo" else feedback,
        length=LENGTHS[feedback],
        domain=domain,
        seed=seed,
        learning_rate=rate,
        overrides=(*overrides, *changes.pop("overrides", ())),
    )
    return Cell(**{**values, **changes})


def rows_of(
    system: System, feedback: str, tuned: Tuned, domains: Sequence[str] = DOMAINS, **changes: Any
) -> Iterator[Cell]:
    """The runs behind one row: every domain, every reported seed. Seeds come first, so that rows fill up evenly."""
    for seed in SEEDS:
        for domain in domains:
            yield cell(system, feedback, domain, seed, tuned, **changes)


# ---- Experiments: a name, and what it runs given the tuned learning rates


TUNED_SYSTEMS = [("environment", s) for s in SYSTEMS] + [("siblings", s) for s in SYSTEMS]
TUNED_SYSTEMS += [("critique", SDPO), ("critique", VPD)]


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
    return sorted(range(len(means)), key=means.__getitem__, reverse=True)[:2]


def table_1(tuned: Tuned) -> list[Cell]:
    """Environment feedback."""
    return evenly(*(rows_of(system, "environment", tuned) for system in SYSTEMS))


def table_2(tuned: Tuned) -> list[Cell]:
    """Siblings."""
    return evenly(*(rows_of(system, "siblings", tuned) for system in SYSTEMS))


def table_3(tuned: Tuned) -> list[Cell]:
    """Self-critique; siblings are in table 2."""
    return evenly(*(rows_of(system, "critique", tuned) for system in (SDPO, VPD)))


def table_4(tuned: Tuned) -> list[Cell]:
    """E-steps on every batch and on every tenth; on every fifth is in tables 1 and 2."""
    return evenly(
        *(
            rows_of(VPD, feedback, tuned, overrides=(("e_step_frequency", frequency),))
            for feedback in ("environment", "siblings")
            for frequency in (1, 10)
        )
    )


LONG = 300  # steps
NOISE = (0.3, 0.6, 1.0)
FIXED_PRIOR = (("prior", "fixed"),)
STABILITY_DOMAINS = ("cipher", "facts")
STABILITY_RATES = (3e-4, 1e-3, 3e-3)
# Changes of the shared teacher's runs that may keep it stable without a second copy of the weights
REMEDIES: dict[str, Overrides] = {
    "as it is": (),
    "warm-up of 50 steps": (("warmup_steps", 50),),
    "4 of each class per E-step": (("e_step_min_per_class", 4),),
    "normalised by rollouts with feedback": (("m_step_normalization", "with_feedback"),),
}


def table_5(tuned: Tuned) -> list[Cell]:
    """The two priors, in long runs."""
    return evenly(
        rows_of(VPD, "environment", tuned, steps=LONG),
        rows_of(VPD, "environment", tuned, steps=LONG, overrides=FIXED_PRIOR),
    )


def figure_2(tuned: Tuned) -> list[Cell]:
    """Late degradation: long runs; VPD's are those of table 5."""
    return evenly(*(rows_of(s, "environment", tuned, steps=LONG) for s in (SDPO, SDPO_EMA, VPD_LORA)))


def density(tuned: Tuned) -> list[Cell]:
    """Answers of one and two symbols; three are in table 1."""
    return evenly(
        *(dense(system, length, tuned) for length in (1, 2) for system in (GRPO, SDPO, JOINT, VPD, VPD_LORA))
    )


def dense(system: System, length: int, tuned: Tuned) -> Iterator[Cell]:
    # GRPO was tuned for answers of two symbols with siblings: with three it learns nothing to choose by
    if system is GRPO:
        return rows_of(system, "siblings", tuned, length=length)
    return rows_of(system, "environment", tuned, length=length)


def noise(tuned: Tuned) -> list[Cell]:
    """Symbols of the feedback are random with this probability; none are in table 1."""
    return evenly(*(rows_of(s, "environment", tuned, noise=level) for level in NOISE for s in (SDPO, VPD, VPD_LORA)))


def cold_start(tuned: Tuned) -> list[Cell]:
    """A base model that can't read feedback."""
    rows = [rows_of(s, "environment", tuned, length=2, skill=0.0) for s in (SDPO, SDPO_EMA, VPD, VPD_LORA)]
    return evenly(rows_of(GRPO, "siblings", tuned, skill=0.0), *rows)


def rigid(tuned: Tuned) -> list[Cell]:
    """A chain of steps of which feedback makes up all but the last."""
    return [
        c for seed in (*SEEDS, 5, 6, 7, 8, 9) for system in RIGID_SYSTEMS for c in rigid_runs(system, tuned, (seed,))
    ]


RIGID_SYSTEMS = (GRPO, SDPO, SDPO_EMA, JOINT, VPD, VPD_LORA)


def rigid_runs(system: System, tuned: Tuned, seeds: Sequence[int]) -> list[Cell]:
    feedback = "siblings" if system is GRPO else "environment"
    return [cell(system, feedback, RIGID, seed, tuned, length=2, noise=1.0) for seed in seeds]


# The adapter's learning rate over the student's, and its decay after each rollout batch; the default is 10 and 0.1
ADAPTERS = {"plain": (1, 0.0), "fast": (10, 0.0), "fading": (1, 0.1), "fast, hardly fading": (10, 0.03)}
ADAPTERS |= {"fast and fading (default)": (10, 0.1), "fast, fading quickly": (10, 0.3)}


def lora_teacher(tuned: Tuned) -> list[Cell]:
    """What makes an adapter of the teacher's own work."""
    return evenly(*(adapted(name, f, tuned) for f in ("environment", "siblings") for name in ADAPTERS))


def adapted(name: str, feedback: str, tuned: Tuned) -> Iterator[Cell]:
    scale, decay = ADAPTERS[name]
    rate, _ = VPD_LORA.candidates[tuned[tuning_name(VPD_LORA, feedback)]]
    changed: list[tuple[str, Any]] = []
    if scale != 10:
        changed.append(("e_step_learning_rate", scale * rate))
    if decay != 0.1:
        changed.append(("teacher_adapter_decay", decay))
    return rows_of(VPD_LORA, feedback, tuned, STABILITY_DOMAINS, overrides=tuple(changed))


def stability(tuned: Tuned) -> list[Cell]:
    """Siblings at rising learning rates."""
    systems = [(s, ()) for s in (SDPO, SDPO_EMA, VPD_EMA, VPD_LORA)] + [(VPD, o) for o in REMEDIES.values()]
    return evenly(*(stable(system, tuned, rate, o) for rate in STABILITY_RATES for system, o in systems))


def stable(system: System, tuned: Tuned, rate: float, overrides: Overrides) -> Iterator[Cell]:
    domains = STABILITY_DOMAINS
    return rows_of(system, "siblings", tuned, domains, learning_rate=rate, overrides=overrides)


def evenly(*rows: Iterator[Cell]) -> list[Cell]:
    return [c for group in zip(*rows, strict=True) for c in group]


EXPERIMENTS = {
    experiment.__name__: experiment
    for experiment in (
        table_1,
        table_2,
        table_3,
        table_4,
        cold_start,
        lora_teacher,
        rigid,
        density,
        stability,
        noise,
        table_5,
        figure_2,
    )
}


# ---- Running


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
        chosen[name] = max(best_two(system, feedback, runs), key=lambda i, found=found: mean(found[i]))
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
