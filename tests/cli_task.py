"""A task for tests of the command line, `tests/cli_task.py:Sums`, whose reward can send signals, wait and fail."""

import os
import signal
import time

from tests import tiny
from vpd_trl.tasks import Task


class Sums(Task):
    """`interrupt_at`: the call of the reward, from 1, in which the process of this rank gets a SIGINT, or several."""

    name = "sums"
    feedback_source = "environment"
    samples = 4

    def __init__(self, wait=0.0, interrupt_at=0, rank=0, signals=1, fails=False, splits=1):
        self.wait, self.interrupt_at, self.rank, self.signals, self.fails = wait, interrupt_at, rank, signals, fails
        self.calls = 0
        self.test_splits = ("test", "more")[:splits]

    def load(self, split):
        self._check_split(split)
        return tiny.dataset(32 if split == "train" else 6)

    @property
    def reward_funcs(self):
        return self._parity

    def _parity(self, completion_ids, **kwargs):
        self.calls += 1
        time.sleep(self.wait)
        if self.calls == self.interrupt_at and int(os.environ.get("RANK", "0")) == self.rank:
            for _ in range(self.signals):
                os.kill(os.getpid(), signal.SIGINT)
        if self.fails:
            raise RuntimeError("the reward\nis out of office")
        return tiny.parity_reward(completion_ids)

    @property
    def environment_feedback(self):
        return tiny.answer_feedback


class NothingToTrainOn(Sums):
    train_split = None
