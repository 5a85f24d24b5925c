"""Train language models from language feedback: Variational Policy Distillation as a TRL trainer."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .config import VPDConfig
    from .feedback import Feedback, FeedbackFn
    from .trainer import VPDTrainer


__version__ = "0.1.0"

__all__ = ["Feedback", "FeedbackFn", "VPDConfig", "VPDTrainer", "__version__"]

_HOMES = {"Feedback": "feedback", "FeedbackFn": "feedback", "VPDConfig": "config", "VPDTrainer": "trainer"}


def __getattr__(name: str) -> Any:
    # Not imported before it is asked for: `vpd-trl --help` shouldn't wait for torch
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
