"""Each measurement: ratios of things that are counted or timed side by side on the same model, data and rollouts."""

from __future__ import annotations

import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import vpd_trl.estimate  # noqa: F401  (counts products that are added in place, too)
from vpd_trl.feedback import EachRollout

from . import setting


ROOT = Path(__file__).parent.parent.parent


def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="vpd-benchmark-"))


# ---- Work: floating-point operations and tokens of training, generation left out


def work(
    kind: str,
    *,
    steps: int = 5,
    coverage: float = 1.0,
    longest: int = 200,
    vocabulary: int = setting.WORDS + 2,
    hidden: int = 256,
    layers: int = 4,
    cheap: bool = False,
    **changes: Any,
) -> dict[str, float]:
    """
    Operations of `steps` optimizer steps, and tokens that enter the network with the share that is no padding.

    `cheap` is `vpd` with the two options that save an E-step its passes.
    """
    network = setting.model(vocabulary=vocabulary, hidden=hidden, layers=layers)
    changes |= {"reward_shift": "running"} if cheap else {}
    made = setting.trainer(
        kind, network, setting.questions(64, coverage=coverage), _folder(), max_steps=steps, **changes
    )
    if cheap:
        setting.without_passes(made)
    setting.with_rollouts(made, setting.rollouts_of_mixed_length(longest))
    entered = real = 0
    forward = network.model.forward

    def counting(*args: Any, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        nonlocal entered, real
        entered += input_ids.numel()
        real += int(attention_mask.sum())
        return forward(*args, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    network.model.forward = counting
    with FlopCounterMode(display=False) as counter:
        made.train()
    return {"flops": counter.get_total_flops(), "tokens": entered, "real": real / entered}


# ---- Memory of a training step


class _PeakMemory:
    """The highest resident memory of this process while it is entered, in bytes above that at its beginning."""

    def __enter__(self) -> _PeakMemory:
        gc.collect()
        self._start = self._peak = self._resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = self._peak - self._start

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._peak = max(self._peak, self._resident())

    @staticmethod
    def _resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def memory(
    kind: str,
    *,
    tokens: int = 1024,
    vocabulary: int = setting.QWEN3_VOCABULARY,
    dtype: str = "float32",
    **changes: Any,
) -> dict[str, float]:
    """Peak extra bytes, and seconds, of one micro-batch forwards and backwards, after a warm-up."""
    rows = 4
    network = setting.model(vocabulary=vocabulary, hidden=128, layers=2, dtype=dtype)
    batch = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, "num_generations": rows}
    data = setting.questions(8)
    made = setting.trainer(kind, network, data, _folder(), **batch, max_steps=3, optim="sgd", **changes)
    length = tokens // rows
    setting.with_rollouts(made, lambda number, n: [[2 + i] * length for i in range(n)])
    found = []
    step = made.training_step

    def measured(*args: Any, **kwargs: Any) -> Any:
        start = time.thread_time()
        with _PeakMemory() as peak:
            loss = step(*args, **kwargs)
        found.append({"bytes": peak.bytes, "seconds": time.thread_time() - start})
        network.zero_grad()
        return loss

    made.training_step = measured
    made.train()
    return min(found[1:], key=lambda entry: entry["bytes"])


# ---- Time of whole runs


PHASES = {"generate": "rollouts", "e_step": "E-step", "m_step": "M-step"}


def run_time(kind: str, *, steps: int = 5, length: int = 64, **changes: Any) -> dict[str, float]:
    """
    Seconds of a run with generation by transformers, of completions of one length for all, and of its phases.

    The processor's, of its one thread, which other work on the machine changes little; the phases' are those that this
    library's trainer logs, by the clock.
    """
    network = setting.model(hidden=256, layers=4)
    network.generation_config.min_new_tokens = length
    made = setting.trainer(
        kind,
        network,
        setting.questions(64),
        _folder(),
        max_steps=steps + 1,
        max_completion_length=length,
        generation_kwargs={"min_new_tokens": length},
        **changes,
    )
    starts: list[float] = []
    phases = dict.fromkeys(PHASES.values(), 0.0)
    record = getattr(made, "_record", None)

    def noted(name: str, value: float) -> None:
        if starts and (phase := PHASES.get(name.removeprefix("time/"))):
            phases[phase] += value
        record(name, value)

    if record is not None:
        made._record = noted
    made.add_callback(_after_first_step(starts))
    made.train()
    total = time.process_time() - starts[0]
    return {"seconds": total} if record is None else {"seconds": total, **phases}


def _after_first_step(starts: list[float]) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                starts.append(time.process_time())

    return Clock()


# ---- Feedback


def waiting(kind: str, *, each: float, steps: int = 3, **changes: Any) -> dict[str, float]:
    """
    Seconds, by the clock, that a batch of 64 rollouts takes for its feedback and its E-step, medians of some batches.

    Args:
        kind: Of trainer.
        each: What the feedback function sleeps for each rollout, in seconds.
        steps: Batches, the first of which is left out.
        **changes: Fields of the configuration.
    """

    def told(privileged_context: str) -> str:
        time.sleep(each)
        return privileged_context

    network = setting.model(hidden=256, layers=4)
    changes |= {"max_steps": steps + 1, "e_step_frequency": 1}
    made = setting.trainer(
        kind, network, setting.questions(64), _folder(), feedback_fn=EachRollout(told) if each else None, **changes
    )
    setting.with_rollouts(made, setting.rollouts_of_mixed_length(200))
    found: dict[str, list[float]] = {}
    record = made._record
    made._record = lambda name, value: (found.setdefault(name, []).append(value), record(name, value))[1]
    made.train()
    return {name: statistics.median(found[f"time/{name}"][1:]) for name in ("feedback", "e_step")}


# ---- Starting up


IMPORTS = {"vpd_trl": "from vpd_trl import VPDTrainer", "trl": "from trl import GRPOTrainer"}


def import_time(name: str) -> float:
    """Seconds of an import in a fresh interpreter, the interpreter's own left out."""
    code = f"import time; s = time.perf_counter(); {IMPORTS[name]}; print(time.perf_counter() - s)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return float(done.stdout.split()[-1])


# ---- In processes of their own


def _start(function: str, arguments: Any, options: Any, **variables: str) -> subprocess.Popen[str]:
    """A measurement in a fresh process on one thread, without a GPU."""
    call = json.dumps({"function": function, "arguments": arguments, "options": options})
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | variables
    command = [sys.executable, "-m", "examples.benchmarks.measures", call]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)


def _result(process: subprocess.Popen[str]) -> Any:
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{list(process.args)[-1]} failed:\n{errors[-3000:]}")
    return json.loads(output.strip().splitlines()[-1])


def apart(function: str, *arguments: Any, **options: Any) -> Any:
    """A measurement in a process of its own, so that none inherits another's memory or caches."""
    return _result(_start(function, arguments, options))


def together(processes: int, function: str, *arguments: Any, **options: Any) -> list[Any]:
    """A measurement in several processes that train together on the CPU, one result of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    size = str(processes)
    common = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    started = [
        _start(function, arguments, options, **common, RANK=r, LOCAL_RANK=r) for r in map(str, range(processes))
    ]
    with ThreadPoolExecutor(processes) as pool:  # read at the same time: one that can't write on stops the others
        return list(pool.map(_result, started))


def side_by_side(repeats: int, function: str, *cases: tuple[Any, dict[str, Any]]) -> list[list[Any]]:
    """Results of each case, measured in turn, `repeats` times over."""
    found: list[list[Any]] = [[] for _ in cases]
    for _ in range(repeats):
        for results, (argument, options) in zip(found, cases, strict=True):
            results.append(apart(function, argument, **options))
    return found


def ratio(first: list[float], second: list[float]) -> dict[str, Any]:
    """The median of the ratios, pair by pair, and all of them."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    return {"ratio": statistics.median(ratios), "ratios": ratios}


if __name__ == "__main__":
    torch.set_num_threads(1)
    call = json.loads(sys.argv[1])
    print(json.dumps(globals()[call["function"]](*call["arguments"], **call["options"])))
