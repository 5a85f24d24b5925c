"""Feedback functions: what they take and give, and those that come with the library."""

from .base import Feedback, FeedbackFn, Generated, Rollout
from .critique import SelfCritiqueFeedback
from .each import EachRollout
from .execution import ExecutionFeedback
from .judge import JudgeFeedback
from .leak import contains_answer, redact_answer
from .sibling import SiblingFeedback


__all__ = [
    "EachRollout",
    "ExecutionFeedback",
    "Feedback",
    "FeedbackFn",
    "Generated",
    "JudgeFeedback",
    "Rollout",
    "SelfCritiqueFeedback",
    "SiblingFeedback",
    "contains_answer",
    "redact_answer",
]
