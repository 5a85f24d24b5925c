"""
Methods × engines × students, each cell with two processes on CPUs.

    python -m tests.matrix               # all cells: writes examples/accelerate/results/cpu.json and the README's table
    python -m tests.matrix --engines zero2 --cells vpd/full

DeepSpeed (`pip install deepspeed`, on a machine without GPUs with DS_BUILD_OPS=0) is needed for its engines. Cells that
are not named keep the results that the file has.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path

import torch

from tests import tiny
from tests.launching import Hangs, accelerate_command, commit, run


ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).parent / "matrix_script.py"
CONFIGS = ROOT / "examples" / "accelerate"
RESULTS = CONFIGS / "results" / "cpu.json"
README = ROOT / "README.md"
MARKERS = "<!-- engines-table -->\n", "\n<!-- /engines-table -->"

ENGINES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
METHODS = {
    "vpd": "`vpd`",
    "vpd-lora-teacher": '`vpd`, `teacher="lora"`',
    "vpd-ema-fixed-prior": '`vpd`, `teacher="ema"`, `prior="fixed"`',
    "sdpo-ema": '`sdpo`, `teacher="ema"`',
    "joint-loss": "`joint_loss`",
}
STUDENTS = {"full": "full", "lora": "LoRA", "qlora": "LoRA on 4 bits"}
CELLS = [f"{method}/{student}" for method in METHODS for student in STUDENTS]
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "bitsandbytes", "deepspeed")
PHASES = ("whole", "saved", "resumed", "no_feedback_on_one", "no_success_on_one")
SECONDS_PER_CELL = 150

# Of weights after four steps of SGD at a rate of 0.4; a step of a wrong rate or scale differs by a thousand times that
TOLERANCE = 2e-6


def missing(engine):
    """Why an engine can't be tried here, or `None`."""
    if engine in ("zero2", "zero3") and util.find_spec("deepspeed") is None:
        return "needs DeepSpeed: pip install deepspeed"
    return None


def launch(engine, cells, folder):
    """Run some cells in one start, on two processes or, with engine "one", alone. Returns what went wrong, or `None`."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}  # 4 bits come in blocks of 64
    tiny.model(tiny.tokenizer(), **shape).save_pretrained(folder / "model")
    arguments = [engine, ",".join(cells), folder]
    env = {"DS_ACCELERATOR": "cpu"}
    if engine == "one":
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    else:
        launcher = ["--config_file", CONFIGS / f"{engine}.yaml", "--num_processes", 2, "--mixed_precision", "no"]
        command = accelerate_command(SCRIPT, arguments, *map(str, launcher))
        env |= {"ACCELERATE_USE_CPU": "true"} if engine == "ddp" else {}
    try:
        status, output = run(command, seconds=120 + SECONDS_PER_CELL * len(cells), **env)
    except Hangs as hang:
        return f"hangs: {hang}"
    return None if status == 0 else output[-6000:]


def results_of(cell, folder, processes):
    """What each process has written of a cell."""
    names = [f"{cell.replace('/', '_')}_{rank}_of_{processes}.pt" for rank in range(processes)]
    return [torch.load(folder / name, weights_only=False) for name in names if (folder / name).exists()]


def distance(a, b):
    """The largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).abs().max().item() for name in a), default=0.0)


def judge(ranks, alone):
    """What is to be known of a cell, from the results of its two processes and of one process alone."""
    errors = [rank["error"] for rank in ranks if rank["error"]] or ([] if len(ranks) == 2 else ["did not start"])
    error = min(errors, key=lambda text: "Connection closed" in text, default=None)  # that is what the other one sees
    if error:
        return {"works": False, "error": error.strip().splitlines()[-1][:300]}
    first, second = ranks
    found = {
        "wrapper": first["whole"]["wrapper"],
        "between_processes": max(distance(first[p][k], second[p][k]) for p in PHASES for k in ("weights", "adapter")),
        "from_one_process": max(distance(first["whole"][k], alone["whole"][k]) for k in ("weights", "adapter")),
        "from_uninterrupted": max(distance(first["resumed"][k], first["saved"][k]) for k in ("weights", "adapter")),
    }
    exact = found["between_processes"] == found["from_uninterrupted"] == 0.0
    return {"works": exact and found["from_one_process"] < TOLERANCE, **found}


def measure(engines, cells, folder):
    """`{cell: {engine: what judge says}}`. A crash or hang ends its cell; the next start goes on with the rest."""
    assert launch("one", cells, folder / "one") is None
    found = {cell: {} for cell in cells}
    for engine in engines:
        left = list(cells)
        while left:
            trouble = launch(engine, left, folder / engine)
            done = [cell for cell in left if results_of(cell, folder / engine, 2)] or left[:1]
            for cell in done:
                (alone,) = results_of(cell, folder / "one", 1)
                found[cell][engine] = judge(results_of(cell, folder / engine, 2), alone)
                print(engine, cell, found[cell][engine], flush=True)
            left = [cell for cell in left if cell not in done]
            if trouble:
                print(trouble, file=sys.stderr, flush=True)
    return found


def table(results):
    """The README's table of the results."""
    rows = ["| method | student | " + " | ".join(ENGINES.values()) + " |", "|---|---|" + "---|" * len(ENGINES)]
    words = {True: "yes", False: "no", None: "untested"}
    for cell in CELLS:
        method, student = cell.split("/")
        marks = [words[results["cells"].get(cell, {}).get(engine, {}).get("works")] for engine in ENGINES]
        rows.append(f"| {METHODS[method]} | {STUDENTS[student]} | " + " | ".join(marks) + " |")
    return "\n".join(rows)


def write(found, command):
    """Put what was found into the results file, beside what it has of other cells, and the table into the README."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cells": {}}
    here = commit()
    about = {
        "command": command,
        "commit": here,
        "seeds": {"model": 0, "training": 1},
        "machine": f"{os.cpu_count()} CPUs, two processes (gloo), {platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in PACKAGES if util.find_spec(name) is not None},
    }
    for cell, engines in found.items():
        engines = {engine: record | {"commit": here} for engine, record in engines.items()}
        results["cells"].setdefault(cell, {}).update(engines)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(about | {"cells": results["cells"]}, indent=1) + "\n")
    start, end = MARKERS
    readme = README.read_text(encoding="utf-8")
    before, after = readme.split(start)[0], readme.split(end)[1]
    README.write_text(before + start + table(results) + end + after, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS)
    options = parser.parse_args()
    for engine in options.engines:
        if missing(engine):
            parser.error(f"{engine} {missing(engine)}")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.engines, options.cells, Path(folder))
    write(found, " ".join(["python -m tests.matrix", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
