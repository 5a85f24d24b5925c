"""
One run: a tiny base model learns a hidden rule with one method, from one kind of feedback.

    python -m examples.paper_in_miniature.run --method vpd --domain cipher --seed 100

prints what was measured as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
import typing
import warnings
from dataclasses import asdict, dataclass, fields
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

import torch
import transformers
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

import vpd_trl.feedback
from vpd_trl import VPDConfig, VPDTrainer

from . import base, task


FEEDBACK = ("environment", "siblings", "other_siblings", "critique")
CURVE_POINTS = 8  # of held-out accuracy during training
HISTORY_POINTS = 25  # of the metrics' curves
METRICS = ("reward", "entropy", "teacher/", "m_step/", "e_step/", "feedback/", "completions/", "loss", "grad_norm")
# The paper's evaluation
TEMPERATURE, TOP_P = 0.6, 0.95


@dataclass(frozen=True)
class Cell:
    """
    One run of the grid.

    `overrides` are fields of `VPDConfig` as pairs of name and value; `skill` is the base model's and `base_seed` its
    seed, all other randomness (the hidden rule, the problems, the rollouts) comes from `seed`.
    """

    method: str = "vpd"
    teacher: str = "shared"
    feedback: str = "environment"
    domain: str = "cipher"
    length: int = 2
    symbols: int = 8
    noise: float = 0.0
    coverage: float = 1.0  # share of the rollouts that the environment speaks of
    skill: float = 0.5
    seed: int = 100
    base_seed: int = 0
    steps: int = 120
    learning_rate: float = 5e-4
    prompts: int = 32  # per step
    rollouts: int = 8  # per prompt
    samples: int = 8  # per problem, in evaluation
    overrides: tuple[tuple[str, Any], ...] = ()


def run(cell: Cell, device: str = "cpu") -> dict[str, Any]:
    """Train and measure; all of the result can be written as JSON."""
    torch.set_num_threads(1)
    model, vocabulary = base.load(base_of(cell))
    model.to(device)
    start = time.time()
    train, held_out = task.problems(cell.domain, cell.length, cell.symbols, cell.seed)
    evaluator = Evaluator(cell, vocabulary, held_out)
    seen = train[: len(held_out)]
    before = {"train": evaluator.accuracy(model, seen), "held_out": evaluator.accuracy(model, held_out)}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(cell, model, vocabulary, train, folder, device)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(evaluator)
        trainer.train()
    training = time.time() - start - evaluator.seconds
    # The callback has just measured the held-out problems
    after = {"train": evaluator.accuracy(model, seen), "held_out": evaluator.curve[-1][1]}
    return {
        "cell": asdict(cell),
        "before": before,
        "after": after,
        "curve": [[0, before["held_out"]], *evaluator.curve],
        "history": thinned(trainer.state.log_history),
        "seconds": {"training": round(training, 2), "evaluation": round(evaluator.seconds, 2)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "problems": {"train": len(train), "held_out": len(held_out)},
        "chance": cell.symbols**-cell.length,
    }


def base_of(cell: Cell) -> base.Base:
    return base.Base(length=cell.length, skill=cell.skill, symbols=cell.symbols, seed=cell.base_seed)


def make_trainer(
    cell: Cell, model: Any, vocabulary: Any, train: list[task.Problem], folder: str, device: str
) -> VPDTrainer:
    rows = Dataset.from_list([{"prompt": p.question, "answer": p.answer} for p in train])
    # Only the "lora" teacher takes this argument
    extra = {"teacher_peft_config": lora()} if cell.teacher == "lora" else {}
    return VPDTrainer(
        model=model,
        reward_funcs=task.exact_match,
        args=config(cell, folder, device),
        train_dataset=rows,
        processing_class=vocabulary,
        feedback_fn=feedback_of(cell),
        **extra,
    )


def config(cell: Cell, folder: str, device: str) -> VPDConfig:
    values: dict[str, Any] = dict(
        output_dir=folder,
        method=cell.method,
        teacher=cell.teacher,
        teacher_temperature=1.0,
        per_device_train_batch_size=cell.prompts * cell.rollouts,
        num_generations=cell.rollouts,
        max_completion_length=cell.length + 2,  # an answer, or a critique with its mark, and the end of text
        max_steps=cell.steps,
        learning_rate=cell.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        weight_decay=0.01,
        max_grad_norm=1.0,
        teacher_template=task.TEACHER_TEMPLATE,
        solution_template=task.SOLUTION_TEMPLATE,
        critique_template=task.CRITIQUE_TEMPLATE,
        seed=cell.seed,
        use_cpu=device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if cell.method not in ("vpd", "sdpo"):  # those have no loss of GRPO's. The paper's settings of it:
        values.update(epsilon=0.2, epsilon_high=0.28, beta=0.0, scale_rewards="none")
    return VPDConfig(**{**values, **dict(cell.overrides)})


def feedback_of(cell: Cell) -> Any:
    if cell.feedback == "environment":
        return task.EnvironmentFeedback(cell.domain, cell.symbols, cell.noise, cell.seed, cell.coverage)
    if cell.feedback == "siblings":
        return vpd_trl.feedback.SiblingFeedback()
    if cell.feedback == "other_siblings":
        return task.OtherSiblings()
    if cell.feedback == "critique":
        # By its name, for the other kinds of feedback to work with a version that hasn't got it
        critic = getattr(vpd_trl.feedback, "SelfCritiqueFeedback")  # noqa: B009
        return critic(template=task.CRITIC_TEMPLATE, success_message=task.RIGHT)
    raise ValueError(f"feedback must be one of {FEEDBACK}; got {cell.feedback!r}.")


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


class Evaluator(TrainerCallback):
    """Measures held-out accuracy at a few points of training, with random numbers of its own."""

    def __init__(self, cell: Cell, vocabulary: Any, held_out: list[task.Problem]) -> None:
        self.cell, self.vocabulary, self.held_out = cell, vocabulary, held_out
        self.at = {round(cell.steps * (i + 1) / CURVE_POINTS) for i in range(CURVE_POINTS)}
        self.curve: list[list[float]] = []
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.at:
            self.curve.append([state.global_step, self.accuracy(model, self.held_out)])

    @torch.no_grad()
    def accuracy(self, model: Any, problems: list[task.Problem]) -> float:
        """Share of right answers, over `samples` answers to each problem."""
        start, training = time.time(), model.training
        model.eval()
        # All questions of a domain are equally long: no padding
        ids = torch.tensor(self.vocabulary([p.question for p in problems])["input_ids"], device=model.device)
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(0)
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                top_k=0,
                num_return_sequences=self.cell.samples,
                max_new_tokens=self.cell.length + 1,
            )
        texts = self.vocabulary.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        answers = [p.answer for p in problems for _ in range(self.cell.samples)]
        rewards = task.exact_match(texts, answers)
        model.train(training)
        self.seconds += time.time() - start
        return sum(rewards) / len(rewards)


def thinned(log_history: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The metrics' curves, as means over up to `HISTORY_POINTS` stretches of steps; `None` where there is no value."""
    rows = [row for row in log_history if "reward" in row]
    stretch = max(1, math.ceil(len(rows) / HISTORY_POINTS))
    names = sorted({name for row in rows for name in row if name.startswith(METRICS)} - {"reward_std"})
    parts = [rows[i : i + stretch] for i in range(0, len(rows), stretch)]
    curves = {name: [mean([row.get(name) for row in part]) for part in parts] for name in names}
    return {"step": [part[-1]["step"] for part in parts], **curves}


def mean(values: list[Any]) -> float | None:
    there = [v for v in values if v is not None and math.isfinite(v)]
    return float(f"{sum(there) / len(there):.5g}") if there else None


def parse_args() -> Cell:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    types = typing.get_type_hints(Cell)
    for field in fields(Cell):
        if field.name != "overrides":
            name = "--" + field.name.replace("_", "-")
            parser.add_argument(name, type=types[field.name], default=field.default)
    parser.add_argument("--override", nargs=2, action="append", default=[], metavar=("FIELD", "JSON"))
    values = vars(parser.parse_args())
    overrides = tuple((name, json.loads(value)) for name, value in values.pop("override"))
    return Cell(**values, overrides=overrides)


def main() -> None:
    transformers.logging.set_verbosity_error()
    print(json.dumps(run(parse_args())))


if __name__ == "__main__":
    main()
