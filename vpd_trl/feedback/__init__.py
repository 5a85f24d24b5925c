"""Feedback functions: what they take and give, and those that come with the library."""

from .base import Feedback, FeedbackFn, Rollout
from .judge import JudgeFeedback
from .sibling import SiblingFeedback


__all__ = ["Feedback", "FeedbackFn", "JudgeFeedback", "Rollout", "SiblingFeedback"]
