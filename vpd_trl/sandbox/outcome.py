"""What came of running a program."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Status(str, Enum):
    """How a test, or a program over all its tests, ended."""

    PASSED = "passed"
    WRONG_ANSWER = "wrong answer"
    SYNTAX_ERROR = "syntax error"
    ERROR = "error"  # an exception, an exit status other than 0, a signal, or more processes than allowed
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT_LIMIT = "output limit"
    NO_CODE = "no code"  # the text holds no program
    TRUNCATED = "truncated"  # the text ends within its program
    NOT_RUN = "not run"  # through no fault of the program: the batch's deadline, or a sandbox that could not start


@dataclass(frozen=True)
class CaseResult:
    """
    The result of one test.

    Attributes:
        status: How it ended.
        output: What the program printed, or its value as Python writes it; shortened, and empty where it is right.
        message: The traceback, or the assertion that failed; shortened. Empty where the status says it all.
        seconds: Wall-clock time.
    """

    status: Status
    output: str = ""
    message: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """
    The result of a program.

    Attributes:
        status: `PASSED` if all tests passed, else that of the first test that ended early, else `WRONG_ANSWER`.
        cases: One result per test, in their order. Shorter than the tests after a syntax error or where a test timed
            out, since those after it were not run, and empty without a program or a run.
        total: The number of tests.
        seconds: Wall-clock time of the whole run.
        message: What is to be said of all of it, such as why there was no run.
    """

    status: Status
    cases: tuple[CaseResult, ...] = ()
    total: int = 0
    seconds: float = 0.0
    message: str = ""

    @property
    def passed(self) -> bool:
        """Whether all tests passed."""
        return self.status is Status.PASSED

    @property
    def share(self) -> float:
        """The share of tests that passed; those that were not run count as failed."""
        return sum(case.status is Status.PASSED for case in self.cases) / self.total if self.total else 0.0
