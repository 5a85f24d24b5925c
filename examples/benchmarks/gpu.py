"""
The E-step and the M-step on a GPU: tokens a second, share of the card's own peak, and memory.

Operations are those that are made, recomputed activations included; tokens are those of prompts and completions.

    python -m examples.benchmarks.gpu              # Qwen3-1.7B's shape in bf16, random weights; a GPU of 40 GiB or more
    python -m examples.benchmarks.gpu --tiny       # a small shape, on a CPU too: that it runs, no numbers worth telling

Results go to `examples/benchmarks/results/gpu.json`, of the small shape to the screen alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import vpd_trl.estimate  # noqa: F401  (counts products that are added in place, too)
from vpd_trl import distillation, scoring

from . import setting
from .measures import _folder
from .run import RESULTS, about


QWEN3_1_7B = {"vocabulary": setting.QWEN3_VOCABULARY, "hidden": 2048, "layers": 28}
TINY = {"vocabulary": setting.WORDS + 2, "hidden": 64, "layers": 2}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronized() -> float:
    """The clock, once the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_peak(size: int, repeats: int = 20) -> float:
    """Operations a second of a product of square bf16 matrices, the best of some."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    found = []
    for _ in range(repeats):
        start = synchronized()
        a @ b
        found.append(2 * size**3 / (synchronized() - start))
    return max(found)


def with_full_logits(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student: Any,
    teacher: Any,
    tokens: torch.Tensor,
    compare: distillation.Comparison,
    *,
    weights: torch.Tensor | None = None,
) -> distillation.Distillation:
    """What `vpd_trl.distillation.distill` computes, with the logits of all tokens there at one time."""
    logits = student.shaped(F.linear(student_hidden, student.weight, student.bias).float())
    with torch.no_grad():
        targets = teacher.shaped(F.linear(teacher_hidden, teacher.weight, teacher.bias).float())
    return compare(logits, targets, tokens, weights)


def measure(shape: dict[str, int], *, length: int, rollouts: int, rows: int, fused: bool, steps: int = 3) -> Any:
    """
    One form of `vpd` with an E-step on every batch.

    Args:
        shape: Of the network.
        length: Tokens of the longest completion; prompts have up to a quarter of that, feedback too.
        rollouts: Of a batch.
        rows: Of a micro-batch.
        fused: Whether the divergence is the library's.
        steps: Batches that are timed, after one that is not.
    """
    torch.manual_seed(0)
    network = setting.model(**shape, dtype="bfloat16").to(DEVICE)
    made = setting.trainer(
        "vpd",
        network,
        setting.questions(rollouts // 8, prompt=length // 4, feedback=length // 4),
        _folder(),
        max_steps=steps + 2,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=rollouts // rows,
        max_completion_length=length,
        e_step_frequency=1,
        gradient_checkpointing=True,
        optim="sgd",  # of which nothing is kept: what is compared is the steps' own memory
        use_cpu=DEVICE.type == "cpu",
        bf16=True,
    )
    drawn = setting.rollouts_of_mixed_length(length)
    setting.with_rollouts(made, lambda batch, n: drawn(0, n))  # the same in each batch
    parts: dict[str, list[tuple[float, float]]] = {"e_step": [], "m_step": []}  # seconds and GiB of each call
    tokens: list[int] = []

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = synchronized()
            result = function(*args, **kwargs)
            seconds = synchronized() - start
            peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0
            parts[part].append((seconds, peak))
            return result

        return call

    e_step, m_step, count = made.e_step.run, made.training_step, rollouts // rows
    made.e_step.run = timed(
        "e_step", lambda batches, **kwargs: (tokens.append(_tokens(batches)), e_step(batches, **kwargs))[1]
    )
    made.training_step = timed("m_step", m_step)
    original = scoring.distill
    scoring.distill = original if fused else with_full_logits
    # The last batch is counted and not timed: counting takes time itself
    operations: dict[str, float] = {}
    made.add_callback(_counts_after(made, operations, steps + 1))
    try:
        made.train()
    finally:
        scoring.distill = original
    m_steps = [parts["m_step"][i : i + count] for i in range(0, len(parts["m_step"]), count)]
    seconds = {
        "e_step": [s for s, _ in parts["e_step"][1 : steps + 1]],
        "m_step": [sum(s for s, _ in batch) for batch in m_steps[1 : steps + 1]],
    }
    peaks = {"e_step": parts["e_step"][1:], "m_step": parts["m_step"][count:]}
    return {
        part: {
            "seconds": statistics.median(found),
            "tokens a second": tokens[0] / statistics.median(found),
            "operations a second": operations[part] / statistics.median(found),
            "peak GiB": max(peak for _, peak in peaks[part]) if DEVICE.type == "cuda" else None,
        }
        for part, found in seconds.items()
    }


def _tokens(micro_batches: list[Any]) -> int:
    """Of prompts and completions, without padding."""
    return sum(int(b["prompt_mask"].sum() + b["completion_mask"].sum()) for b in micro_batches)


def _counts_after(made: Any, operations: dict[str, float], steps: int) -> Any:
    """A callback that has the operations of E-step and M-step counted after so many steps."""
    from transformers import TrainerCallback

    def counted(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = function(*args, **kwargs)
            operations[part] = operations.get(part, 0.0) + counter.get_total_flops()
            return result

        return call

    class Counter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == steps:
                made.e_step.run = counted("e_step", made.e_step.run)
                made.training_step = counted("m_step", made.training_step)

    return Counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small shape, on a CPU too")
    tiny = parser.parse_args().tiny
    if not (tiny or DEVICE.type == "cuda"):
        raise SystemExit("There is no GPU here. --tiny shows on a CPU that the measurement runs.")
    sizes = {"length": 64, "rollouts": 8, "rows": 2} if tiny else {"length": 1024, "rollouts": 32, "rows": 4}
    shape = TINY if tiny else QWEN3_1_7B
    peak = matrix_peak(256 if tiny else 8192)
    result: dict[str, Any] = {"card": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU", "shape": shape}
    result |= {"sizes": sizes, "matrix peak, operations a second": peak}
    for name, fused in (("fused", True), ("full logits", False)):
        result[name] = measure(shape, **sizes, fused=fused)
        for part in result[name].values():
            part["of the peak"] = part["operations a second"] / peak
    text = json.dumps(about("gpu") | {"command": "python -m examples.benchmarks.gpu"} | result, indent=1)
    print(text)
    if not tiny:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "gpu.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
