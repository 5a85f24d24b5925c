"""What `vpd-trl train` asks for beside the fields of `VPDConfig` and TRL's `ModelConfig`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TaskArguments:
    """
    The task, its feedback and evaluation, and the form of a LoRA teacher.

    Raises:
        ValueError: If a value is out of its range, or `task_kwargs` is not a mapping.
    """

    # fmt: off
    task: str | None = field(default=None, metadata={"help": "What to train on: the name of a task, or a class of your own as path/to/file.py:Class or package.module:Class. Required."})
    task_kwargs: dict | str | None = field(default=None, metadata={"help": "Options of the task: a mapping in the recipe, JSON on the command line."})
    feedback: str | None = field(default=None, metadata={"help": "Where feedback comes from: environment, siblings or self_critique. None: as the task says."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir; start anew if there is none. Without it, a folder with checkpoints is refused."})
    evaluate: bool = field(default=False, metadata={"help": "Evaluate on the task's test splits: whenever eval_strategy says so, with eval_on_start before training, and in any case at the end."})
    eval_samples: int | None = field(default=None, metadata={"help": "k: samples per problem in evaluations. None: the paper's number for the task."})
    eval_limit: int | None = field(default=None, metadata={"help": "Evaluate on the first so many problems of each split. None: all."})
    eval_max_new_tokens: int | None = field(default=None, metadata={"help": "Longest completion in evaluations, in tokens. None: as long as the rollouts, max_completion_length."})
    teacher_lora_r: int | None = field(default=None, metadata={"help": "With teacher='lora': rank of the teacher's adapter. None: 16."})
    teacher_lora_alpha: int | None = field(default=None, metadata={"help": "With teacher='lora': alpha of the adapter. None: 32."})
    teacher_lora_dropout: float | None = field(default=None, metadata={"help": "With teacher='lora': dropout of the adapter. None: 0."})
    teacher_lora_target_modules: list[str] | None = field(default=None, metadata={"help": "With teacher='lora': modules that the adapter is on. None: every linear layer."})
    # fmt: on

    def __post_init__(self) -> None:
        self.task_kwargs = mapping("task_kwargs", self.task_kwargs)
        for name in ("eval_samples", "eval_limit", "eval_max_new_tokens", "teacher_lora_r", "teacher_lora_alpha"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1 or None; got {value!r}.")

    @property
    def teacher_lora(self) -> dict[str, Any]:
        """The settings of the teacher's adapter that were given, under the names of `peft.LoraConfig`."""
        names = ("r", "alpha", "dropout", "target_modules")
        given = {name: getattr(self, f"teacher_lora_{name}") for name in names}
        if given["target_modules"] is not None and len(given["target_modules"]) == 1:
            given["target_modules"] = given["target_modules"][0]  # a pattern, or "all-linear"
        renamed = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
        return {renamed.get(name, name): value for name, value in given.items() if value is not None}


def mapping(name: str, value: Any) -> dict[str, Any]:
    """
    A mapping that was given as such, as JSON, or not at all.

    Args:
        name: Of the field, for the message.
        value: A dictionary, a string of JSON or `None`.

    Raises:
        ValueError: If it is neither.
    """
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"""{name} must be JSON, such as '{{"domain": "biology"}}'; got {value!r}.""") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping; got {value!r}.")
    return {str(key): entry for key, entry in value.items()}
