"""Reward functions, as TRL takes them."""

from .choice import ChoiceReward, choice_reward, extract_choice


__all__ = ["ChoiceReward", "choice_reward", "extract_choice"]
