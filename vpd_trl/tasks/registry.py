"""Tasks by name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .base import Task


# Module of this package and class; imported when asked for
_TASKS: dict[str, tuple[str, str]] = {
    "humaneval": ("humaneval", "HumanEval"),
    "livecodebench": ("livecodebench", "LiveCodeBench"),
    "math": ("mathematics", "Mathematics"),
    "sciknoweval": ("sciknoweval", "SciKnowEval"),
}


def task_names() -> list[str]:
    """The names of the tasks that come with the library."""
    return sorted(_TASKS)


def load_task(name: str, **options: Any) -> Task:
    """
    A task by its name.

    Args:
        name: One of [`task_names`], or a class of your own as `"path/to/file.py:Class"` or `"package.module:Class"`.
        **options: Passed to the class.

    Raises:
        ValueError: If there is no such task.
        TypeError: If it is no subclass of [`Task`], or doesn't take the options.
    """
    if ":" in name:
        place, _, attribute = name.rpartition(":")
        module = _module(place)
    elif name in _TASKS:
        place, attribute = _TASKS[name]
        module = importlib.import_module(f".{place}", __package__)
    else:
        raise ValueError(
            f"There is no task {name!r}; there are {', '.join(task_names())}. A task of your own is named "
            "'path/to/file.py:Class' or 'package.module:Class'."
        )
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise TypeError(f"{name} must be a subclass of vpd_trl.tasks.Task; got {found!r}.")
    signature = inspect.signature(found)
    try:
        signature.bind(**options)
    except TypeError as error:
        takes = ", ".join(str(parameter) for parameter in signature.parameters.values()) or "no options"
        raise TypeError(f"The task {name} takes {takes}: {error}.") from None
    return found(**options)


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).resolve()
    if not path.is_file():
        raise ValueError(f"There is no file {place} to load a task from.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # so that what it defines can be pickled
    spec.loader.exec_module(module)
    return module
