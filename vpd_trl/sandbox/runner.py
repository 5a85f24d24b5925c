"""Completions to outcomes: what the reward and the feedback have in common."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..text import answer_text
from .cases import CodeTests, parse_tests
from .extract import extract_code
from .outcome import Outcome, Status
from .run import Sandbox


if TYPE_CHECKING:
    from transformers import TrainerState


_OF_A_PROCESS = ("_lock", "_kept", "_batch")


@dataclass
class _Batch:
    """The programs of a batch, by their keys, the trainer's state and step, and the outcomes of what was not run."""

    trainer_state: TrainerState | None = None
    step: int | None = None
    keys: frozenset[tuple[str, str]] = frozenset()
    not_run: dict[tuple[str, str], Outcome] = field(default_factory=dict)

    def has(self, keys: Iterable[tuple[str, str]], trainer_state: TrainerState | None) -> bool:
        """Whether a call with these programs is one of this batch."""
        same_step = self.trainer_state is trainer_state and self.step == getattr(trainer_state, "global_step", None)
        return same_step and self.keys.issuperset(keys)


class CodeRunner:
    """
    Finds the programs in completions and runs them against the tests of their rows, each program once.

    Outcomes are kept: the reward function runs a batch, and a feedback function that holds the same runner gets the
    same outcomes a moment later. Equal programs with equal tests, of a group or of a later step, share one run too.
    What was not run is not tried again in the same batch, so that its deadline is waited for once: while the trainer's
    step stays and no call brings a program that is not of the batch. Each process of a run has outcomes of its own.

    Args:
        sandbox ([`Sandbox`], *optional*):
            Where programs run. `None`: one with the defaults.
        tests_column (`str`, *optional*, defaults to `"tests"`):
            Column of the data set that holds the tests, see [`parse_tests`]. A row with `None` there has no outcome.
        opens_thinking (`bool`, *optional*, defaults to `False`):
            Whether the chat template ends the prompt inside a `<think>` block, which a reward function can't see: a
            completion that doesn't close it then holds no program. Of prompts that are strings it is known.
        cache_size (`int`, *optional*, defaults to `4096`):
            Most outcomes that are kept; more than the completions of a batch on one process.

    Raises:
        SandboxUnavailable: If there is no bubblewrap here and no sandbox was passed.
        TypeError, ValueError: If an argument is not one of these.
    """

    def __init__(
        self,
        sandbox: Sandbox | None = None,
        tests_column: str = "tests",
        opens_thinking: bool = False,
        cache_size: int = 4096,
    ) -> None:
        if sandbox is not None and not callable(getattr(sandbox, "run", None)):
            raise TypeError(f"sandbox must be a Sandbox or None; got {type(sandbox).__name__}.")
        if not isinstance(tests_column, str) or not tests_column or tests_column == "prompt":
            raise ValueError(f"tests_column must name the data set's column of tests; got {tests_column!r}.")
        if not isinstance(opens_thinking, bool):
            raise TypeError(f"opens_thinking must be True or False; got {opens_thinking!r}.")
        if isinstance(cache_size, bool) or not isinstance(cache_size, int) or cache_size < 1:
            raise ValueError(f"cache_size must be a whole number of at least 1; got {cache_size!r}.")
        self.sandbox = Sandbox() if sandbox is None else sandbox
        self.tests_column = tests_column
        self.opens_thinking = opens_thinking
        self.cache_size = cache_size
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], Outcome] = OrderedDict()
        self._batch = _Batch()

    def tests(self, columns: Mapping[str, Sequence[Any]]) -> list[CodeTests | None]:
        """
        The tests of each rollout.

        Args:
            columns: The data set's columns.

        Raises:
            ValueError, TypeError: If the column is missing, or an entry is no tests.
        """
        if self.tests_column not in columns:
            raise ValueError(
                f"The tests of programs are in column {self.tests_column!r} (tests_column), which the data set lacks; "
                f"it has {', '.join(sorted(columns)) or 'none'}."
            )
        return [None if value is None else _parsed(value) for value in columns[self.tests_column]]

    def outcomes(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        tests: Sequence[CodeTests | None],
        trainer_state: TrainerState | None = None,
    ) -> list[Outcome | None]:
        """
        The outcome of each of N completions; `None` for one without tests.

        Args:
            prompts: The N prompts, strings or conversations.
            completions: The N completions, strings or conversations.
            tests: The tests of each.
            trainer_state: The trainer's state, by whose step the calls of a batch are known.
        """
        found = [
            None if test is None else extract_code(self._text(prompt, completion), test.entry_point)
            for prompt, completion, test in zip(prompts, completions, tests, strict=True)
        ]
        programs: list[tuple[str, CodeTests] | None] = [
            None if extraction is None or test is None or extraction.code is None else (extraction.code, test)
            for extraction, test in zip(found, tests, strict=True)
        ]
        ran = self._run(programs, trainer_state)
        outcomes: list[Outcome | None] = []
        for extraction, test, outcome in zip(found, tests, ran, strict=True):
            if extraction is None or test is None:
                outcomes.append(None)
            elif outcome is None:
                outcomes.append(Outcome(extraction.otherwise or Status.NO_CODE, total=len(test.tests)))
            elif outcome.status is Status.SYNTAX_ERROR and extraction.otherwise is not None:
                outcomes.append(replace(outcome, status=extraction.otherwise, cases=()))
            else:
                outcomes.append(outcome)
        return outcomes

    def _text(self, prompt: Any, completion: Any) -> str:
        return answer_text(prompt, completion, opens_thinking=self.opens_thinking)

    def _run(
        self, programs: list[tuple[str, CodeTests] | None], trainer_state: TrainerState | None
    ) -> list[Outcome | None]:
        keys = [None if pair is None else _key(*pair) for pair in programs]
        with self._lock:  # a second call with the same programs waits for the outcomes of the first
            todo = {key: pair for key, pair in zip(keys, programs, strict=True) if key and pair}
            if not self._batch.has(todo, trainer_state):
                self._batch = _Batch(trainer_state, getattr(trainer_state, "global_step", None), frozenset(todo))
            known = {**self._batch.not_run, **self._kept}
            done = {key: known[key] for key in todo if key in known}
            missing = {key: pair for key, pair in todo.items() if key not in done}
            if missing:
                done.update(zip(missing, self.sandbox.run(list(missing.values())), strict=True))
            for key, outcome in done.items():
                if outcome.status is Status.NOT_RUN:
                    self._batch.not_run[key] = outcome
                else:
                    self._kept[key] = outcome
                    self._kept.move_to_end(key)
            while len(self._kept) > self.cache_size:
                self._kept.popitem(last=False)
        return [None if key is None else done[key] for key in keys]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _OF_A_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


def _key(program: str, tests: CodeTests) -> tuple[str, str]:
    return hashlib.sha256(program.encode("utf-8", "surrogatepass")).hexdigest(), tests.digest


@lru_cache(maxsize=1024)
def _parsed_text(text: str) -> CodeTests:
    return parse_tests(text)


def _parsed(value: Any) -> CodeTests:
    return _parsed_text(value) if isinstance(value, str) else parse_tests(value)


@lru_cache(maxsize=1)
def default_runner() -> CodeRunner:
    """The runner of all that is not given one, so that the reward and the feedback share it."""
    return CodeRunner()
