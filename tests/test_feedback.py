"""Feedback functions of every form are called alike, and what they return is checked."""

import asyncio
import functools
import sys
import time

import pytest
from datasets import Dataset

from tests import tiny
from vpd_trl import Feedback, FeedbackFn
from vpd_trl.feedback import ExecutionFeedback, Rollout, SiblingFeedback
from vpd_trl.feedback.base import RESERVED_KEYWORDS
from vpd_trl.feedback.collect import FeedbackCollector, group_siblings


def call(functions, n=2, **kwargs):
    kwargs = {"prompts": ["p"] * n, "completions": ["c"] * n, "rewards": [0.0] * n} | kwargs
    return FeedbackCollector(functions)(n, **kwargs)


def plain(prompts, **kwargs):
    return ["text"] * len(prompts)


async def later(prompts, **kwargs):
    await asyncio.sleep(0.01)
    return ["text"] * len(prompts)


class Callable:
    def __call__(self, prompts, **kwargs):
        return ["text"] * len(prompts)


class AsyncCallable:
    async def __call__(self, prompts, **kwargs):
        return ["text"] * len(prompts)


def with_option(prompts, option, **kwargs):
    return [option] * len(prompts)


FORMS = [
    plain,
    later,
    Callable(),
    AsyncCallable(),
    functools.partial(with_option, option="text"),
    functools.partial(later),
    lambda prompts, **kwargs: ("text",) * len(prompts),
    lambda prompts: ["text"] * len(prompts),
    lambda completions: [Feedback(critique="text") for _ in completions],
]


@pytest.mark.parametrize("function", FORMS)
def test_every_form_of_function_is_called(function):
    assert call(function) == [Feedback(critique="text")] * 2


def test_functions_run_inside_an_event_loop_that_already_runs():
    async def notebook():
        return call([later, plain])

    assert asyncio.run(notebook()) == [Feedback(critique="text")] * 2


def test_async_functions_wait_together():
    async def slow(prompts, **kwargs):
        await asyncio.sleep(0.2)
        return [None] * len(prompts)

    start = time.perf_counter()
    call([slow] * 8)
    assert time.perf_counter() - start < 1.0


def test_what_runs_on_a_thread_works_beside_what_asks_the_model():
    """As programs do beside a critique."""

    class Programs:
        runs_on_a_thread = True

        def __call__(self, prompts, **kwargs):
            time.sleep(0.4)
            return ["ran"] * len(prompts)

    def model(prompts, **kwargs):
        time.sleep(0.4)
        return ["said"] * len(prompts)

    start = time.perf_counter()
    assert call([model, Programs()]) == [Feedback(critique="said")] * 2
    assert time.perf_counter() - start < 0.7

    class Broken(Programs):
        def __call__(self, prompts, **kwargs):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no") as error:
        call([model, Broken()])
    assert getattr(error.value, "__notes__", []).count("(raised by the feedback function 'Broken')") == 1 or (
        sys.version_info < (3, 11)
    )
    assert ExecutionFeedback.runs_on_a_thread


def test_an_async_function_gathers_its_own_requests():
    async def slow(prompts, **kwargs):
        async def ask(prompt):
            await asyncio.sleep(0.2)
            return f"on {prompt}"

        return await asyncio.gather(*map(ask, prompts))

    prompts = [str(i) for i in range(8)]
    start = time.perf_counter()
    assert call(slow, n=8, prompts=prompts) == [Feedback(critique=f"on {p}") for p in prompts]
    assert time.perf_counter() - start < 1.0


def test_the_order_of_a_list_counts_and_not_which_function_ends_first():
    async def late(prompts):
        await asyncio.sleep(0.05)
        return ["late", None]

    def soon(prompts):
        return ["soon", "soon"]

    assert call([late, soon]) == [Feedback(critique="late"), Feedback(critique="soon")]
    assert call([soon, late]) == [Feedback(critique="soon")] * 2


def test_an_async_client_stays_on_one_event_loop():
    loops = []

    async def client(prompts, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [None] * len(prompts)

    collector = FeedbackCollector(client)
    for _ in range(2):
        collector(1, prompts=["p"])
    assert loops[0] is loops[1]
    assert loops[0].is_running()


def test_a_function_gets_the_keywords_that_it_names_and_no_others():
    got = []

    def some(rewards, *, answer, absent="default"):
        got.append((rewards, answer, absent))
        return [None] * len(rewards)

    def every(**kwargs):
        got.append(set(kwargs))
        return [None] * len(kwargs["prompts"])

    call([some, every], answer=["1", "2"], extra=[0, 0])
    assert got == [([0.0, 0.0], ["1", "2"], "default"), {"prompts", "completions", "rewards", "answer", "extra"}]


def test_the_columns_must_have_what_a_function_needs_and_no_reserved_name():
    def graded(prompts, answer, hint=None):
        return [None] * len(prompts)

    collector = FeedbackCollector([plain, graded])
    collector.check_columns(["prompt", "answer"])
    with pytest.raises(ValueError, match=r"'graded' needs \['answer'\]"):
        collector.check_columns(["prompt", "hint"])
    for name in RESERVED_KEYWORDS:
        with pytest.raises(ValueError, match=rf"has columns \['{name}'\]"):
            collector.check_columns(["prompt", "answer", name])


def test_a_list_is_merged_section_by_section_and_the_first_text_wins():
    first = lambda prompts: [Feedback(solution="s1"), None, "  "]  # noqa: E731
    second = lambda prompts: [Feedback("s2", "c2"), "c2", Feedback(solution="s2")]  # noqa: E731
    assert call([first, second], n=3) == [
        Feedback("s1", "c2"),
        Feedback(critique="c2"),
        Feedback(solution="s2"),
    ]


def test_a_wrong_length_names_the_function_and_both_numbers():
    def short(prompts, **kwargs):
        return ["a"]

    with pytest.raises(ValueError, match=r"'short' returned 1 entries for 2 rollouts"):
        call(short)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("text", "returned str"),
        (None, "returned NoneType"),
        (["a", 3], "got int at position 1"),
        ({}, "returned dict"),
    ],
)
def test_a_wrong_type_names_the_function(result, message):
    def odd(prompts, **kwargs):
        return result

    with pytest.raises(TypeError, match=f"'odd'.*{message}"):
        call(odd)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11")
@pytest.mark.parametrize("is_async", [False, True])
def test_an_error_carries_the_functions_name(is_async):
    def broken(prompts, **kwargs):
        raise KeyError("x")

    async def broken_later(prompts, **kwargs):
        raise KeyError("x")

    with pytest.raises(KeyError) as caught:
        call(broken_later if is_async else broken)
    assert "broken" in caught.value.__notes__[0]


def test_a_positional_only_parameter_is_refused():
    def odd(prompts, /):
        return prompts

    with pytest.raises(TypeError, match="'prompts' is positional-only"):
        FeedbackCollector(odd)


def test_feedback_takes_text_alone_and_is_false_without_any():
    with pytest.raises(TypeError, match=r"Feedback.critique must be a string or None; got int"):
        Feedback(critique=3)
    with pytest.raises(TypeError, match=r"Feedback.solution must be a string or None; got list"):
        Feedback(solution=["s"])
    assert not Feedback("", " \n")
    assert Feedback("s")


def test_functions_are_of_the_protocol():
    assert isinstance(plain, FeedbackFn)
    assert isinstance(SiblingFeedback(), FeedbackFn)


def rollout(text, success):
    return Rollout(text, float(success), success)


def test_siblings_show_the_first_success_that_is_not_the_rollout_itself():
    group = [rollout("a", False), rollout("b", True), rollout("  ", True), rollout("c", True)]
    shown = SiblingFeedback()(siblings=group_siblings(group, 4, 0, 4))
    assert [f.solution for f in shown] == ["b", "c", "b", "b"]


def test_a_lone_success_and_a_group_without_one_have_no_sibling_to_show():
    lone = [rollout("a", True), rollout("b", False)]
    none = [rollout("a", False), rollout("b", False)]
    shown = SiblingFeedback()(siblings=group_siblings(lone + none, 2, 0, 4))
    assert shown == [None, Feedback(solution="a"), None, None]


def test_a_process_sees_the_siblings_of_its_own_slice():
    rollouts = [rollout(str(i), True) for i in range(8)]
    assert [[r.text for r in others] for others in group_siblings(rollouts, 4, 2, 6)] == [
        ["0", "1", "3"],
        ["0", "1", "2"],
        ["5", "6", "7"],
        ["4", "6", "7"],
    ]


def test_dataset_columns_reach_the_function_row_by_row(tmp_path):
    rows = [
        {"prompt": f"{i}+0=", "answer": str(i), "tests": [i, i], "meta": {"n": i}, "label": i, "feedback": "col"}
        for i in range(8)
    ]
    seen = []

    def look(prompts, answer, tests, meta, label, siblings, rewards, completions, texts, feedback, **kwargs):
        seen.extend(zip(prompts, answer, tests, meta, label, siblings, feedback, strict=True))
        assert texts == completions
        return ["text"] * len(prompts)

    trainer = tiny.trainer(tmp_path, data=Dataset.from_list(rows), feedback_fn=look, max_steps=2)
    trainer.train()
    assert len(seen) == 16
    for prompt, answer, tests, meta, label, siblings, feedback in seen:
        i = int(answer)
        assert (prompt, tests, meta, label, feedback) == (f"{i}+0=", [i, i], {"n": i}, i, "col")
        assert len(siblings) == 3


@pytest.mark.parametrize("conversational", [False, True])
def test_generate_samples_from_the_current_student(tmp_path, conversational):
    got = []

    def look(prompts, generate, **kwargs):
        got.append((generate(prompts[:3]), generate([])))
        with pytest.raises(TypeError, match="one form"):
            generate(["text", [{"role": "user", "content": "x"}]])
        return ["text"] * len(prompts)

    trainer = tiny.trainer(tmp_path, feedback_fn=look, data=tiny.dataset(conversational=conversational), max_steps=1)
    trainer.train()
    (three, none), *_ = got
    assert len(three) == 3
    assert all(isinstance(text, str) for text in three)
    assert none == []


def test_functions_can_add_columns_and_numbers_to_the_log(tmp_path):
    def look(prompts, log_metric, log_extra, trainer_state, **kwargs):
        log_metric("my/number", 3.0 + trainer_state.global_step)
        log_extra("mine", ["x"] * len(prompts))
        return ["text"] * len(prompts)

    trainer = tiny.trainer(tmp_path, feedback_fn=look, max_steps=2)
    trainer.train()
    assert [row["my/number"] for row in trainer.state.log_history if "my/number" in row] == [3.0, 4.0]
    assert list(trainer._logs["extra"]["mine"]) == ["x"] * 8


def test_a_solved_group_is_distilled_from_its_siblings(tmp_path):
    trainer = tiny.trainer(tmp_path, feedback_fn=SiblingFeedback(), max_steps=3)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "feedback/coverage" in row]
    assert all(0 < row["feedback/coverage"] <= 1 for row in rows)


@pytest.mark.filterwarnings("error")
def test_an_async_function_that_was_begun_is_closed_when_another_raises():
    begun = []

    def first(prompts, **kwargs):
        begun.append(later(prompts))
        return begun[0]

    def broken(prompts, **kwargs):
        raise KeyError("x")

    with pytest.raises(KeyError):
        call([first, broken])
    deadline = time.monotonic() + 5
    while begun[0].cr_frame is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert begun[0].cr_frame is None, "closed"
