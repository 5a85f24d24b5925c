"""Feedback that takes its time takes it for all rollouts at once."""

import asyncio
import functools
import threading
import time

import pytest
from datasets import Dataset

from tests import tiny
from vpd_trl import Feedback
from vpd_trl.feedback import EachRollout
from vpd_trl.feedback.collect import FeedbackCollector


def call(functions, n=8, **columns):
    columns = {"texts": [str(i) for i in range(n)], "successes": [i % 2 == 0 for i in range(n)], **columns}
    return FeedbackCollector(functions)(n, prompts=["p"] * n, rewards=[0.5] * n, generate=None, **columns)


def slow(text, success):
    time.sleep(0.2)
    return None if success else f"{text} is wrong"


async def slow_async(text, success):
    await asyncio.sleep(0.2)
    return None if success else f"{text} is wrong"


@pytest.mark.parametrize(
    "function", [slow, slow_async, functools.partial(slow_async)], ids=["plain", "async", "partial"]
)
def test_rollouts_wait_together(function):
    start = time.monotonic()
    feedback = call(EachRollout(function))
    assert time.monotonic() - start < 8 * 0.2 * 0.7
    assert feedback == [Feedback(critique=f"{i} is wrong") if i % 2 else Feedback() for i in range(8)]


@pytest.mark.parametrize("is_async", [False, True])
def test_no_more_than_the_limit_are_asked_at_a_time(is_async):
    active, most, lock = [0], [0], threading.Lock()

    def begin(by):
        with lock:
            active[0] += by
            most[0] = max(most[0], active[0])

    def plain(text):
        begin(1)
        time.sleep(0.02)
        begin(-1)

    async def later(text):
        begin(1)
        await asyncio.sleep(0.02)
        begin(-1)

    call(EachRollout(later if is_async else plain, max_concurrency=3))
    assert most[0] == 3


def test_functions_of_a_list_wait_and_work_at_the_same_time():
    events = []

    async def waits(prompts, **kwargs):
        events.append("waits")
        await asyncio.sleep(0.3)
        events.append("has waited")
        return [Feedback(critique="async")] * len(prompts)

    def works(prompts, **kwargs):
        events.append("works")
        time.sleep(0.1)
        events.append("has worked")
        return [Feedback(solution="sync")] * len(prompts)

    # The one that waits comes second, and begins first
    start = time.monotonic()
    feedback = call([works, waits], n=2)
    assert time.monotonic() - start < 0.4 + 0.3
    assert events.index("has worked") < events.index("has waited")
    assert feedback == [Feedback("sync", "async")] * 2


def test_what_waits_is_given_up_when_another_function_fails():
    cancelled = threading.Event()

    async def waits(prompts, **kwargs):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def fails(prompts, **kwargs):
        time.sleep(0.05)
        raise KeyError("out of office")

    with pytest.raises(KeyError, match="out of office"):
        call([waits, fails])
    assert cancelled.wait(5)


def test_columns_and_what_all_share_reach_the_function_row_by_row(tmp_path):
    seen, state = [], []

    def look(prompt, completion, reward, text, siblings, answer, trainer_state, environment=None, other="default"):
        seen.append((prompt, text == completion, reward, len(siblings), answer, environment, other))
        state.append(trainer_state)
        return f"It is {answer}."

    trainer = tiny.trainer(tmp_path, feedback_fn=EachRollout(look), max_steps=1)
    trainer.train()
    assert len(seen) == 8
    assert all(entry[1:2] + entry[3:4] + entry[5:] == (True, 3, None, "default") for entry in seen)
    assert all(str(eval(prompt[:-1])) == answer for prompt, *_, answer, _, _ in seen)
    assert all(s is trainer.state for s in state)


def test_a_column_that_is_missing_is_named_at_construction(tmp_path):
    data = Dataset.from_dict({"prompt": ["1+1="] * 16})
    with pytest.raises(ValueError, match=r"'look' needs \['answer'\]"):
        tiny.trainer(tmp_path, data=data, feedback_fn=EachRollout(lambda_named_look()))


def lambda_named_look():
    def look(answer):
        return answer

    return look


@pytest.mark.parametrize(
    ("function", "options", "error", "message"),
    [
        ("text", {}, TypeError, "takes a function of one rollout; got str"),
        (lambda **kwargs: None, {}, TypeError, "must name each keyword"),
        (lambda texts: None, {}, ValueError, "can't have texts; it can have prompt, completion"),
        (lambda generate: None, {}, ValueError, "can't have generate"),
        (slow, {"max_concurrency": 0}, ValueError, "whole number of at least 1; got 0"),
    ],
    ids=["no function", "keywords", "plural", "generate", "limit"],
)
def test_what_cannot_be_asked_of_one_rollout_is_refused(function, options, error, message):
    with pytest.raises(error, match=message):
        EachRollout(function, **options)


def test_an_error_in_one_rollout_names_the_function():
    def look(text):
        raise KeyError(text)

    with pytest.raises(KeyError) as caught:
        call(EachRollout(look))
    assert any("look" in note for note in getattr(caught.value, "__notes__", ["look"]))
