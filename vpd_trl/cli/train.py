"""`vpd-trl train`: a recipe becomes a trainer, which trains, stops when told to, and goes on where it was."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from trl import ModelConfig, get_peft_config, get_quantization_config

from ..checkpoints import find_fault, last_whole
from ..config import VPDConfig
from ..evaluation import Sampling
from ..evaluation.results import json_value
from ..tasks import load_task
from ..trainer import VPDTrainer
from .arguments import TaskArguments
from .errors import Interrupted, UsageError, usage_errors
from .interrupt import StopSignal
from .parsing import parse


ARGUMENTS_FILE = "arguments.json"


def run(arguments: Sequence[str]) -> None:
    """
    Train as the arguments say.

    The model, the trainer's state with all logged metrics, and the arguments that differ from the defaults
    (`arguments.json`) are in `output_dir` at the end.

    Args:
        arguments: What the command line holds after `train`.

    Raises:
        UsageError: If the arguments are wrong.
        Interrupted: If a signal stopped the run; a checkpoint has been saved.
        Exception: Whatever training raises.
    """
    task_args, config, model_args = parse(arguments)
    with usage_errors():
        checkpoint = resume_point(task_args, config)
        trainer = build(task_args, config, model_args)
    stop = StopSignal()
    trainer.add_callback(stop)
    if trainer.accelerator.is_main_process:
        write_arguments(task_args, config, model_args)
    with stop.listening(trainer.accelerator):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    if not stop.stopped:
        _finish(trainer)
    main, step = trainer.accelerator.is_main_process, trainer.state.global_step
    trainer.accelerator.end_training()
    if stop.stopped:
        raise Interrupted(_how_to_resume(arguments, config, step) if main else "")


def build(task_args: TaskArguments, config: VPDConfig, model_args: ModelConfig) -> VPDTrainer:
    """
    The trainer of a task.

    Args:
        task_args: The task, and how it is evaluated.
        config: The trainer's configuration; its `model_init_kwargs` are filled in from `model_args`.
        model_args: The model, its precision, quantization and adapter.

    Raises:
        ValueError, TypeError, OSError, ImportError: If the task, the model or a combination of arguments is impossible.
    """
    assert task_args.task is not None
    assert isinstance(task_args.task_kwargs, dict)
    teacher = teacher_peft_config(task_args, config)
    task = load_task(task_args.task, **task_args.task_kwargs)
    if task.train_split is None:
        raise ValueError(f"the task {task.name} has nothing to train on; it can be evaluated (vpd-trl evaluate).")
    evaluates = config.eval_strategy != "no" or config.eval_on_start
    if evaluates and not task_args.evaluate:
        raise ValueError("eval_strategy or eval_on_start is set, but evaluate is not: add evaluate: true.")
    config.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(config.model_init_kwargs or {}),
    }
    source = None if str(task_args.feedback).lower() == "none" else task_args.feedback
    trainer = VPDTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=task.reward_funcs,
        args=config,
        train_dataset=task.load(task.train_split),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        feedback_fn=task.feedback(source) if config.parts.uses_feedback else None,
        teacher_peft_config=teacher,
        evaluation=_evaluation(task, task_args) if task_args.evaluate else None,
    )
    trainer.dataset_name = task.hub_dataset
    return trainer


def _evaluation(task: Any, task_args: TaskArguments) -> Any:
    length = task_args.eval_max_new_tokens
    sampling = None if length is None else Sampling(max_new_tokens=length)
    return task.evaluation(k=task_args.eval_samples, sampling=sampling, limit=task_args.eval_limit)


def teacher_peft_config(task_args: TaskArguments, config: VPDConfig) -> Any:
    """The adapter of `teacher="lora"` that the arguments ask for; `None` if they leave it to the trainer."""
    given = task_args.teacher_lora
    if not given:
        return None
    if config.teacher != "lora":
        raise ValueError(f"the teacher_lora_ fields are for teacher='lora'; got teacher={config.teacher!r}.")
    try:
        from peft import LoraConfig

        from ..lora_teacher import DEFAULT
    except ImportError as error:
        raise ImportError("teacher='lora' needs PEFT. Install it with: pip install 'vpd-trl[peft]'") from error
    return LoraConfig(**{**DEFAULT, **given})


def resume_point(task_args: TaskArguments, config: VPDConfig) -> str | None:
    """
    The checkpoint that training goes on from; `None` to start anew.

    Args:
        task_args: Says whether to resume.
        config: Has the folder, or names a checkpoint (`resume_from_checkpoint`).

    Raises:
        UsageError: If the folder holds checkpoints that a new run would mix its own with, or the checkpoint that is
            named is not one.
    """
    last = last_whole(config.output_dir)
    named = config.resume_from_checkpoint
    if named is not None and str(named).lower() not in ("true", "false"):
        fault = find_fault(named)
        if fault is not None:
            raise UsageError(f"resume_from_checkpoint is {named}, which can't be gone on from: {fault}.")
        return str(named)
    if task_args.resume or str(named).lower() == "true":
        return None if last is None else str(last)
    if last is not None:
        raise UsageError(
            f"{config.output_dir} holds checkpoints of an earlier run ({last.name}): go on with it by --resume, or "
            "give another --output_dir."
        )
    return None


def _finish(trainer: VPDTrainer) -> None:
    """Save the model first: an evaluation can take long, and be stopped. Push last: it can fail."""
    trainer.save_model(_internal_call=True)  # a push of its own would come before the results
    if trainer.evaluation is not None and not _evaluated(trainer):
        trainer.evaluate()
    trainer.save_state()
    trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.print(f"vpd-trl: done after {trainer.state.global_step} steps; see {trainer.args.output_dir}")


def _evaluated(trainer: VPDTrainer) -> bool:
    """Whether the final model has been evaluated. With `load_best_model_at_end` it may be that of another step."""
    rows = trainer.state.log_history
    last = any(row["step"] == trainer.state.global_step and any(k.startswith("eval_") for k in row) for row in rows)
    return last and not trainer.args.load_best_model_at_end


def _how_to_resume(arguments: Sequence[str], config: VPDConfig, step: int) -> str:
    saved = f"stopped after step {step}, saved {Path(config.output_dir) / f'checkpoint-{step}'}."
    if config.world_size > 1:
        return f"{saved} To go on: the same command with --resume."
    more = [] if "--resume" in arguments else ["--resume"]
    return f"{saved} To go on: {shlex.join(['vpd-trl', 'train', *arguments, *more])}"


def write_arguments(task_args: TaskArguments, config: VPDConfig, model_args: ModelConfig) -> None:
    """Write what differs from the defaults, without secrets, to `arguments.json` in the run's folder."""
    given: dict[str, Any] = {"command": shlex.join(["vpd-trl", *sys.argv[1:]])}
    for group in (task_args, config, model_args):
        for f in fields(group):
            value = getattr(group, f.name)
            default = f.default_factory() if callable(f.default_factory) else f.default
            # `resume` and what a config makes of its own fields is no setting of the run
            if f.init and value != default and f.name not in ("resume", "resume_from_checkpoint"):
                given[f.name] = json_value(_without_secrets(f.name, getattr(value, "value", value)))
    given["method"], given["teacher"] = config.method, config.teacher
    path = Path(config.output_dir) / ARGUMENTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(given, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_secrets(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(str(key), entry) for key, entry in value.items()}
    secret = name.lower().endswith(("token", "key", "secret", "password"))
    return "<hidden>" if secret and isinstance(value, str) else value
