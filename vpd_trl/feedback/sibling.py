"""Feedback from the other rollouts of the group."""

from __future__ import annotations

from typing import Any

from .base import Feedback, Rollout


class SiblingFeedback:
    """
    Contrastive siblings: every rollout, success or failure, is shown one successful rollout of the same prompt.

    It is never the rollout itself, so a lone success gets none, and a group without any success gets none at all
    (section 4.1 and appendix D.2 of the paper). The first success of the group is taken, as in SDPO's code.
    """

    def __call__(self, siblings: list[list[Rollout]], **kwargs: Any) -> list[Feedback | None]:
        return [self._solution(others) for others in siblings]

    @staticmethod
    def _solution(others: list[Rollout]) -> Feedback | None:
        texts = (rollout.text for rollout in others if rollout.success and rollout.text.strip())
        text = next(texts, None)
        return None if text is None else Feedback(solution=text)
