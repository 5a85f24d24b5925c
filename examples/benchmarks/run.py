"""
Measures this library against TRL, side by side.

    python -m examples.benchmarks.run            # all; or one of: work, memory, time, imports, growth, estimate
    python -m examples.benchmarks.run report     # the chart and the README's table from the results, seconds

Results go to `examples/benchmarks/results`, one file for each, with the command, commit and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import eight_billion
from .measures import PHASES, apart, ratio, side_by_side, together


RESULTS = Path(__file__).parent / "results"


def work() -> dict[str, Any]:
    """Counted, so that one run is enough."""
    sdpo = {c: [apart("work", kind, coverage=c) for kind in ("sdpo", "trl sdpo")] for c in (1.0, 0.5)}
    vpd = {"frequency 5": apart("work", "vpd", steps=5), "sdpo": sdpo[1.0][0]}
    # Two optimizer steps for each batch of rollouts, so that TRL scores them first: the prior takes its scores
    twice = {"steps_per_generation": 16, "steps": 10}
    scored = {kind: apart("work", kind, **twice) for kind in ("vpd", "sdpo")}
    rows = {n: {"per_device_train_batch_size": n, "gradient_accumulation_steps": 64 // n} for n in (4, 2)}
    shares = {n: [apart("work", kind, **sizes) for kind in ("sdpo", "trl sdpo")] for n, sizes in rows.items()}
    real = {n: [entry["real"] for entry in pair] for n, pair in {8: sdpo[1.0], **shares}.items()}
    return {
        "conditions": "5 steps of 64 rollouts of 1 to 200 tokens, micro-batches of 8, prompts of 10 to 40 tokens, feedback "
        "of 15 to 60; Qwen3's form, 4 layers, hidden size 256, vocabulary 1,002; full-vocabulary reverse KL",
        "sdpo": {
            f"coverage {c:g}": {"ours": a, "trl": b, "flops": a["flops"] / b["flops"]} for c, (a, b) in sdpo.items()
        },
        "vpd": vpd | {"flops": vpd["frequency 5"]["flops"] / vpd["sdpo"]["flops"]},
        "real tokens by rows of a micro-batch": {n: {"ours": a, "trl": b} for n, (a, b) in real.items()},
        "vpd, scored": scored | {"flops": scored["vpd"]["flops"] / scored["sdpo"]["flops"]},
    }


def memory() -> dict[str, Any]:
    modes = {
        "full vocabulary": [{}, {"distillation_mode": "full_logits"}],
        "top 100": [
            {"distillation_top_k": 100},
            {"distillation_mode": "topk_logits", "distillation_topk": 100, "distillation_add_tail": True},
        ],
    }
    found: dict[str, Any] = {}
    for name, (ours, theirs) in modes.items():
        a, b = side_by_side(3, "memory", ("sdpo", ours), ("trl sdpo", theirs))
        found[name] = {
            "ours": a,
            "trl": b,
            "bytes": ratio([x["bytes"] for x in a], [x["bytes"] for x in b]),
            "seconds": ratio([x["seconds"] for x in a], [x["seconds"] for x in b]),
        }
    conditions = "one micro-batch of 4 × 256 completion tokens at Qwen3's vocabulary (151,936), forwards and backwards; 3 repeats"
    return {"conditions": f"{conditions}, hidden size 128, 2 layers", "modes": found}


def run_time() -> dict[str, Any]:
    kinds = ("vpd", "sdpo", "trl grpo")
    found = dict(zip(kinds, side_by_side(5, "run_time", *((kind, {}) for kind in kinds)), strict=True))
    vpd, sdpo, grpo = ([entry["seconds"] for entry in found[kind]] for kind in kinds)
    phases = {
        kind: {phase: statistics.median(entry[phase] for entry in found[kind]) for phase in PHASES.values()}
        for kind in ("vpd", "sdpo")
    }
    return {
        "conditions": "5 steps of 64 rollouts of 64 tokens with generation by transformers, after a first step; 4 layers, hidden "
        "size 256; processor time of one thread; 5 repeats in turn",
        "seconds": {"vpd": vpd, "sdpo": sdpo, "trl grpo": grpo},
        "seconds of phases, medians": phases,
        "vpd over sdpo": ratio(vpd, sdpo),
        "vpd over trl grpo": ratio(vpd, grpo),
    }


def imports() -> dict[str, Any]:
    ours, theirs = side_by_side(5, "import_time", ("vpd_trl", {}), ("trl", {}))
    return {"conditions": "5 fresh interpreters each, in turn", "seconds": {"vpd_trl": ours, "trl": theirs}} | ratio(
        ours, theirs
    )


def growth() -> dict[str, Any]:
    """Operations of five steps as one thing grows and the rest stays."""
    axes: dict[str, list[tuple[int, dict[str, Any]]]] = {
        # Of 8 prompts, in n micro-batches of 8 rows
        "rollouts per prompt": [(n, {"num_generations": n, "gradient_accumulation_steps": n}) for n in (4, 8, 16)],
        "longest completion": [(n, {"longest": n}) for n in (50, 100, 200, 400)],
        "vocabulary": [(n, {"vocabulary": n, "longest": 50}) for n in (2_000, 8_000, 32_000)],
    }
    small = {"hidden": 64, "layers": 2}
    found = {
        axis: [{"at": at, **apart("work", "vpd", **small, **o)} for at, o in points] for axis, points in axes.items()
    }
    # The same 64 rollouts, spread over processes: all of them together make as many operations as one
    found["processes"] = []
    for n in (1, 2, 4):
        each = together(n, "work", "vpd", **small, gradient_accumulation_steps=8 // n)
        total = sum(entry["flops"] for entry in each)
        found["processes"].append({"at": n, "flops": total, "most of one": max(entry["flops"] for entry in each)})
    return {"conditions": "as in work, vpd, but 2 layers and hidden size 64; all processes' operations", "axes": found}


def estimate() -> dict[str, Any]:
    """Nothing measured: what the calculator says of an 8 B model on 8 GPUs, per engine, teacher and divergence."""
    return eight_billion.arithmetic()


MEASURED: dict[str, Callable[[], dict[str, Any]]] = {
    "work": work,
    "memory": memory,
    "time": run_time,
    "imports": imports,
    "growth": growth,
    "estimate": estimate,
}


def about(name: str) -> dict[str, Any]:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()

    packages = {package: version(package) for package in ("torch", "transformers", "trl")}
    changed = git("status", "--porcelain", "--", "../../vpd_trl", ".", ":!results")
    return {
        "command": f"python -m examples.benchmarks.run {name}",
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
        "machine": f"one thread of {os.cpu_count()}, {platform.machine()}",
        "versions": packages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=(*MEASURED, "all", "report"))
    what = parser.parse_args().what
    RESULTS.mkdir(exist_ok=True)
    for name, measure in MEASURED.items():
        if what in (name, "all"):
            before = about(name)
            result = before | measure()
            if about(name) != before:
                raise SystemExit(f"{name}: the code changed while it was measured, so nothing is written")
            (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}: {RESULTS / name}.json", flush=True)
    from .report import write

    write()


if __name__ == "__main__":
    main()
