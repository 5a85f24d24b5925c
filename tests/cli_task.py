"""A task for tests of the command line: `tests/cli_task.py:Sums`. Its reward can wait, so that a signal meets a step."""

import time

from tests import tiny
from vpd_trl.tasks import Task


class Sums(Task):
    name = "sums"
    feedback_source = "environment"
    samples = 4

    def __init__(self, wait: float = 0.0, splits: int = 1) -> None:
        self.wait = wait
        self.test_splits = ("test", "more")[:splits]

    def load(self, split):
        self._check_split(split)
        return tiny.dataset(32 if split == "train" else 6)

    @property
    def reward_funcs(self):
        def parity(completion_ids, **kwargs):
            time.sleep(self.wait)
            return tiny.parity_reward(completion_ids)

        return parity

    @property
    def environment_feedback(self):
        return tiny.answer_feedback


class NothingToTrainOn(Sums):
    train_split = None
