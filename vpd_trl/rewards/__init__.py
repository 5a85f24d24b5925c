"""Reward functions."""

from .code import CodeReward, code_reward


__all__ = ["CodeReward", "code_reward"]
