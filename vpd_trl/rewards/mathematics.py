"""Rewards of mathematics."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from ..text import strip_thinking
from .inputs import answer_texts, check_reward_arguments, is_missing, reference_answers
from .math_pool import Deadline, Outcome, WorkerPool
from .math_text import contradict, find_answer, normal_form, reference_form, words_of


# Not accelerate's logger: a reward can be asked without a trainer
logger = logging.getLogger(__name__)

MOST_WORKERS = 8
SMALLEST_MEMORY = 256
REMEMBERED_REFERENCES = 100_000


def extract_math_answer(text: str, *, strict: bool = False) -> str | None:
    r"""
    The answer that a text states, as it stands there, or `None`.

    It is the content of the last `\boxed{…}` or `\fbox{…}` that is not empty. A last box that isn't closed is no
    answer: the text was cut off there. Without any box, unless `strict`, it is the last `<answer>…</answer>`, else
    what stands behind the last "the answer is", "Answer:" or "####", up to the first word, else the text itself if
    that is nothing but an expression on one line. Thinking (`<think>…</think>`) is not read.

    Args:
        text (`str`):
            The text of a completion.
        strict (`bool`, *optional*, defaults to `False`):
            Whether only a box counts.
    """
    return find_answer(strip_thinking(text), strict=strict)


class MathReward:
    r"""
    Reward of mathematics: 1 if the completion's answer equals the reference, else 0. `math_reward` is `MathReward()`.

    [`extract_math_answer`] finds the answer; [math-verify](https://github.com/huggingface/Math-Verify) compares it
    with the reference: 1/2 equals 0.5, \frac12 and 50\%, sets have no order, tuples have one. A unit
    or the base of a number may be left out, but not be another. Answers in words ("no solution") are compared as
    texts, case aside. math-verify runs in child processes, which start with the first call, are kept, and end with
    this one. An answer that takes more than `timeout` seconds or too much memory is worth 0, and its process is
    replaced; nothing else is lost. Signals and event loops are left alone, so the reward works in threads and under
    asyncio.

    There is no reward (`None`) where the reference is `None`, where it can't be parsed or worked out (a warning tells
    once), and for answers that the batch's time did not suffice for.

    Adds the found answers to the table of completions as `math_answer`, and logs `rewards/{name}/answered`, the share
    of completions in which one was found, and `rewards/{name}/timed_out`, the share whose comparison had to be ended.

    Args:
        strict (`bool`, *optional*, defaults to `False`):
            Whether only a box counts as an answer.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column of the data set that holds the references: numbers, or texts in LaTeX or plain notation, with or
            without `$` or a box around them.
        timeout (`float`, *optional*, defaults to `5.0`):
            Most time for one comparison, in seconds.
        batch_timeout (`float`, *optional*, defaults to `60.0`):
            Time after which a call begins no more comparisons, in seconds. A call takes at most this, `timeout` and
            the start of the processes.
        memory_limit (`int`, *optional*, defaults to `1024`):
            Most memory of each child process, in MiB, at least 256. Enforced on Linux alone.
        workers (`int` or `None`, *optional*):
            Most child processes. `None`: this process's share of the machine's cores, at most 8.
        opens_thinking (`bool`, *optional*, defaults to `False`):
            Whether the chat template ends the prompt inside a `<think>` block, as those of some thinking models do. A
            completion without `</think>` then has no answer. String prompts that end with `<think>` are recognised.
        name (`str`, *optional*, defaults to `"math_reward"`):
            Name in logs.

    Raises:
        ImportError: If math-verify is not installed.
        ValueError, TypeError: If an argument is not one of these.
    """

    def __init__(
        self,
        strict: bool = False,
        answer_column: str = "answer",
        timeout: float = 5.0,
        batch_timeout: float = 60.0,
        memory_limit: int = 1024,
        workers: int | None = None,
        opens_thinking: bool = False,
        name: str = "math_reward",
    ) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError('math_reward needs math-verify. Install it with: pip install "vpd-trl[tasks]"')
        check_reward_arguments(answer_column, name, strict=strict, opens_thinking=opens_thinking)
        for key, value in (("timeout", timeout), ("batch_timeout", batch_timeout)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"{key} must be a number of seconds above 0; got {value!r}.")
        if isinstance(memory_limit, bool) or not isinstance(memory_limit, int) or memory_limit < SMALLEST_MEMORY:
            raise ValueError(f"memory_limit must be at least {SMALLEST_MEMORY} (MiB); got {memory_limit!r}.")
        if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
            raise ValueError(f"workers must be a whole number of at least 1, or None; got {workers!r}.")
        self.strict = strict
        self.answer_column = answer_column
        self.timeout = timeout
        self.batch_timeout = batch_timeout
        self.memory_limit = memory_limit
        self.workers = workers
        self.opens_thinking = opens_thinking
        self.required_columns = (answer_column,)
        self.__name__ = name
        self._prepare()

    def _prepare(self) -> None:
        self._pool = WorkerPool(self.workers or _share_of_cores(), self.memory_limit)
        self._usable: dict[str, bool] = {}  # of each reference, whether anything can be compared with it
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_pool", "_usable", "_warned")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def __call__(
        self,
        completions: Sequence[Any],
        answer: Sequence[Any] | None = None,
        *,
        prompts: Sequence[Any] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        given = reference_answers(self.__name__, self.answer_column, answer, columns, len(completions))
        golds = [self._reference(row, value) for row, value in enumerate(given)]
        texts = answer_texts(completions, prompts, self.opens_thinking)
        deadline = Deadline(self.batch_timeout)
        found = [find_answer(text, strict=self.strict) for text in texts]
        usable = self._usable_references({gold for gold in golds if gold is not None}, deadline)
        pairs = [(g, text) if g is not None and usable[g] else None for g, text in zip(golds, found, strict=True)]
        outcomes = self._compare(pairs, deadline)
        if log_extra is not None:
            log_extra("math_answer", found)
        if log_metric is not None:
            for text, outcome in zip(found, outcomes, strict=True):
                if outcome is not None:
                    log_metric(f"rewards/{self.__name__}/answered", float(text is not None))
                    log_metric(f"rewards/{self.__name__}/timed_out", float(outcome is Outcome.TIMED_OUT))
        return [None if o in (None, Outcome.NOT_ASKED) else float(o is Outcome.YES) for o in outcomes]

    def _reference(self, row: int, value: Any) -> str | None:
        if is_missing(value):
            return None
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise TypeError(
                f"{self.__name__} needs references that are strings or numbers in the column {self.answer_column!r}; "
                f"row {row} of the batch has {value!r}."
            )
        return reference_form(_in_latex(value) if isinstance(value, float) else str(value))

    def _usable_references(self, golds: set[str], deadline: Deadline) -> dict[str, bool | None]:
        """Of each reference, whether anything can be compared with it; `None` where there was no time to see."""
        if len(self._usable) > REMEMBERED_REFERENCES:
            self._usable.clear()
        new = sorted(gold for gold in golds if gold not in self._usable)
        asked = [gold for gold in new if words_of(gold) is None]
        outcomes = dict(zip(asked, self._ask([{"gold": gold} for gold in asked], deadline), strict=True))
        for gold in new:
            outcome = outcomes.get(gold, Outcome.YES)
            if outcome is not Outcome.NOT_ASKED:
                self._usable[gold] = outcome is Outcome.YES
        bad = [gold for gold in new if self._usable.get(gold) is False]
        if bad and not self._warned:
            self._warned = True
            logger.warning(
                f"{self.__name__}: nothing can be compared with the reference {bad[0]!r} of the column "
                f"{self.answer_column!r}, which math-verify can't parse, or not work out in {self.timeout} s. Its "
                "completions get no reward, and so do those of other such references, of which there is no warning."
            )
        return {gold: self._usable.get(gold) for gold in golds}

    def _compare(self, pairs: list[tuple[str, str | None] | None], deadline: Deadline) -> list[Outcome | None]:
        """What becomes of each pair of reference and answer; `None` where there is no reference to compare with."""
        known: dict[tuple[str, str], Outcome] = {}
        asked: list[tuple[str, str]] = []
        for gold, answer in filter(None, pairs):
            if answer is None or (gold, answer) in known:
                continue
            known[gold, answer] = Outcome.NO
            if normal_form(answer) == gold or words_of(answer) == words_of(gold) is not None:
                known[gold, answer] = Outcome.YES
            elif words_of(gold) is None and not contradict(gold, normal_form(answer)):
                asked.append((gold, answer))
        requests = [{"gold": gold, "answer": normal_form(answer)} for gold, answer in asked]
        known.update(zip(asked, self._ask(requests, deadline), strict=True))
        return [pair and (Outcome.NO if pair[1] is None else known[pair[0], pair[1]]) for pair in pairs]

    def _ask(self, requests: list[dict[str, str]], deadline: Deadline) -> list[Outcome]:
        return self._pool.run(requests, self.timeout, deadline)


def _share_of_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))))


def _in_latex(value: float) -> str:
    digits, _, exponent = repr(value).partition("e")
    return f"{digits} \\times 10^{{{int(exponent)}}}" if exponent else digits
