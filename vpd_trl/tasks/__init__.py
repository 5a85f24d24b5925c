"""The paper's tasks: rows to prompts, reward, feedback and metric. `load_task` makes one by its name."""

from .base import FEEDBACK_SOURCES, Task
from .registry import load_task, task_names


__all__ = ["FEEDBACK_SOURCES", "Task", "load_task", "task_names"]
