"""The page of arithmetic: what `vpd-trl estimate` says of a model of Qwen3-8B's shape on 8 GPUs of 80 GiB."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from vpd_trl.cli.main import main


HERE = Path(__file__).parent
RESULT = HERE / "results" / "estimate.json"
PAGE = HERE / "README.md"

# The batch of the paper's table D.2, with prompts, feedback and completions of 512, 512 and 2,048 tokens
SETTING = [
    *("--model", str(HERE / "qwen3_8b.json"), "--gpus", "8", "--gpu", "h100", "--bf16", "true"),
    *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "16", "--num_generations", "8"),
    *("--max_completion_length", "2048", "--use_vllm", "true", "--vllm_enable_sleep_mode", "true"),
    *("--vllm_gpu_memory_utilization", "0.4"),
]

LORA = ["--use_peft", "true", "--lora_target_modules", "all-linear", "--lora_r", "16", "--dtype", "bfloat16"]
ENGINES = {
    "DDP": ["--engine", "ddp"],
    "ZeRO-2": ["--engine", "zero2"],
    "ZeRO-3": ["--engine", "zero3"],
    "FSDP2": ["--engine", "fsdp2"],
    "DDP, LoRA student": ["--engine", "ddp", *LORA],
}
TEACHERS = ("shared", "ema", "lora")
DIVERGENCES = {
    "Jensen–Shannon": ["--divergence", "jsd"],
    "forward KL": ["--divergence", "forward_kl"],
    "reverse KL": ["--divergence", "reverse_kl"],
    "reverse KL, top 100": ["--divergence", "reverse_kl", "--distillation_top_k", "100"],
}
METHODS = ("vpd", "sdpo", "grpo", "joint_loss", "advantage_reshaping")


def _ask(*options: str) -> dict[str, Any]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["estimate", *SETTING, *options, "--json", "true"])
    if code:
        raise RuntimeError(f"vpd-trl estimate {' '.join(options)} failed with {code}")
    return json.loads(out.getvalue())


def arithmetic() -> dict[str, Any]:
    zero3 = ENGINES["ZeRO-3"]
    return {
        "setting": " ".join(SETTING).replace(str(HERE), "examples/benchmarks"),
        "engines": {
            name: {teacher: _ask(*options, "--teacher", teacher) for teacher in TEACHERS}
            for name, options in ENGINES.items()
        },
        "divergences": {name: _ask(*zero3, *options) for name, options in DIVERGENCES.items()},
        "methods": {name: _ask(*zero3, "--method", name) for name in METHODS},
    }


def tables(found: dict[str, Any]) -> str:
    gib = 2**30
    lines = [
        "| engine | teacher | lasting | rollouts | targets | E-step | M-step | at most | on 80 GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for engine, teachers in found["engines"].items():
        for teacher, entry in teachers.items():
            lasting, phases = sum(entry["memory"].values()), entry["phases"]
            numbers = [
                lasting,
                *(phases[name] for name in ("rollouts (vLLM)", "teacher's targets", "E-step", "M-step")),
                entry["peak"],
            ]
            cells = " | ".join(f"{number / gib:.0f}" for number in numbers)
            lines.append(f"| {engine} | `{teacher}` | {cells} | {'fits' if entry['fits'] else 'too large'} |")
    lines += [
        "",
        "| divergence | memory of an M-step, GiB | operations of its student's part, 10¹⁵ |",
        "|---|---|---|",
    ]
    for name, entry in found["divergences"].items():
        lines.append(
            f"| {name} | {entry['phases']['M-step'] / gib:.1f} | {entry['flops']['M-step: student'] / 1e15:.1f} |"
        )
    lines += [
        "",
        "| method | operations of a batch, 10¹⁵ | seconds of training | with rollouts, at least |",
        "|---|---|---|---|",
    ]
    for name, entry in found["methods"].items():
        seconds = dict(entry["seconds"])
        rollouts = seconds.pop("rollouts, at least")
        training = sum(seconds.values())
        lines.append(
            f"| `{name}` | {sum(entry['flops'].values()) / 1e15:.1f} | {training:.1f} | {rollouts + training:.1f} |"
        )
    return "\n".join(lines)


def put_between(page: Path, begin: str, end: str, text: str) -> None:
    """Put a text into a page, between its marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def write() -> None:
    """Put the tables into the page."""
    if RESULT.exists():
        put_between(PAGE, "<!-- estimate -->", "<!-- /estimate -->", tables(json.loads(RESULT.read_text())))
