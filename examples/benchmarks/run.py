"""
Measures this library against TRL, side by side.

    python -m examples.benchmarks.run            # all; or one of: work, memory, time, feedback, imports, growth, estimate
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
    cheap = apart("work", "vpd", steps=5, cheap=True)
    # Two optimizer steps for each batch of rollouts: TRL scores them first, for a loss that sdpo hasn't got
    twice = {"steps_per_generation": 16, "steps": 4}
    late = {kind: apart("work", kind, **twice) for kind in ("sdpo", "trl sdpo")}
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
        "vpd without passes": cheap | {"over sdpo": cheap["flops"] / vpd["sdpo"]["flops"]},
        "real tokens by rows of a micro-batch": {n: {"ours": a, "trl": b} for n, (a, b) in real.items()},
        "sdpo, two steps": late | {"flops": late["sdpo"]["flops"] / late["trl sdpo"]["flops"]},
    }


def memory() -> dict[str, Any]:
    modes = {
        "full vocabulary": [{}, {"distillation_mode": "full_logits"}],
        "top 100": [
            {"distillation_top_k": 100},
            {"distillation_mode": "topk_logits", "distillation_topk": 100, "distillation_add_tail": True},
        ],
        "Jensen–Shannon": [{"divergence": "jsd"}, {"distillation_mode": "full_logits", "distillation_alpha": 0.5}],
        "half precision": [{"dtype": "bfloat16"}, {"distillation_mode": "full_logits", "dtype": "bfloat16"}],
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
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "vpd": ("vpd", {}),
        "vpd, running shift": ("vpd", {"reward_shift": "running"}),
        "sdpo": ("sdpo", {}),
        "trl grpo": ("trl grpo", {}),
    }
    lengths = {}
    for length, rows in ((64, 64), (256, 32)):
        sizes = {"length": length, "gradient_accumulation_steps": rows // 8}
        results = side_by_side(3, "run_time", *((kind, options | sizes) for kind, options in cases.values()))
        found = dict(zip(cases, results, strict=True))
        seconds = {name: [entry["seconds"] for entry in entries] for name, entries in found.items()}
        lengths[str(length)] = {
            "rollouts": rows,
            "seconds": seconds,
            "seconds of phases, medians": {
                name: {phase: statistics.median(entry[phase] for entry in found[name]) for phase in PHASES.values()}
                for name in ("vpd", "vpd, running shift", "sdpo")
            },
            **{
                f"{name} over {other}": ratio(seconds[name], seconds[other])
                for name in ("vpd", "vpd, running shift")
                for other in ("sdpo", "trl grpo")
            },
        }
    return {
        "conditions": "5 steps with generation by transformers, after a first step; completions of one length for all; 4 layers, "
        "hidden size 256; prompts of 10 to 40 tokens, feedback of 15 to 60; processor time of one thread; 3 repeats in turn",
        "lengths": lengths,
    }


def feedback() -> dict[str, Any]:
    """A function that sleeps for a second for each rollout, and one that answers at once."""
    waits, at_once = side_by_side(3, "waiting", ("vpd", {"each": 1.0}), ("vpd", {"each": 0.0}))
    median = {
        name: {part: statistics.median(entry[part] for entry in entries) for part in ("feedback", "e_step")}
        for name, entries in (("sleeps", waits), ("at once", at_once))
    }
    return {
        "conditions": "64 rollouts of 1 to 200 tokens and an E-step in each batch; a function of one rollout that sleeps for 1 s; "
        "seconds by the clock, medians of 3 batches and of 3 runs",
        "seconds": {"sleeps": waits, "at once": at_once},
        "medians": median,
        "added for each second of sleep": median["sleeps"]["feedback"] - median["at once"]["feedback"],
        "E-step, of that without waiting": median["sleeps"]["e_step"] / median["at once"]["e_step"],
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
    "feedback": feedback,
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
