"""Reward functions, as TRL takes them."""

from typing import TYPE_CHECKING, Any

from .choice import ChoiceReward, choice_reward, extract_choice
from .code import CodeReward, code_reward
from .mathematics import MathReward, extract_math_answer


if TYPE_CHECKING:
    math_reward: MathReward

__all__ = [
    "ChoiceReward",
    "CodeReward",
    "MathReward",
    "choice_reward",
    "code_reward",
    "extract_choice",
    "extract_math_answer",
    "math_reward",
]


def __getattr__(name: str) -> Any:
    # Made when it is imported: it needs math-verify, and says so before a model is loaded
    if name == "math_reward":
        globals()[name] = MathReward()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
