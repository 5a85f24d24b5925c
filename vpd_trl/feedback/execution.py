"""Feedback from running a program against tests."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..sandbox.cases import AnyTest, CallTest, CodeTests, StdinTest
from ..sandbox.outcome import CaseResult, Outcome, Status
from ..sandbox.run import show
from ..sandbox.runner import CodeRunner, default_runner
from .base import Feedback


MAX_INPUT_LINES, MAX_LINE, MAX_OUTPUT, MAX_TRACEBACK = 8, 250, 250, 1000
SHORTEST_LIMIT = 100

_EARLY = {
    Status.SYNTAX_ERROR: "The program is not valid Python.",
    Status.ERROR: "The program ends with an error.",
    Status.TIMEOUT: "The program takes too long: the time limit was exceeded.",
    Status.MEMORY: "The program needs too much memory: the memory limit was exceeded.",
    Status.OUTPUT_LIMIT: "The program prints or returns too much: the output limit was exceeded.",
}
_NO_PROGRAM = {
    Status.NO_CODE: "The answer has no complete code block with a Python program.",
    Status.TRUNCATED: "The answer ends inside its program: there is no complete code block. A shorter answer is needed.",
}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ExecutionFeedback:
    """
    Execution feedback: how the program in a completion fared in the tests of its row.

    As in SDPO's code, of a failure the first error or time-out is told, with its input, or else at most two wrong
    answers, those with the shortest inputs, with input, expected and actual output. Of a success a fixed confirmation
    is told, since the E-step needs feedback on both classes. An answer without a program, or that ends inside it, is
    told that. Only public tests are shown; of hidden ones no more than that one failed, and how. No feedback gets a
    row without tests, or a program that was not run.

    The program runs once: with the runner of the reward function, which runs before, the outcome is already there.

    Logs, as means over all programs that were run, `feedback/execution_passed`, `feedback/execution_timeout` and
    `feedback/execution_seconds` (wall-clock time of a program in all its tests); as mean over all completions,
    `feedback/execution_no_code` (no program, or an incomplete one); and over all that hold a program,
    `feedback/execution_not_run`.

    Args:
        runner ([`~vpd_trl.sandbox.CodeRunner`], *optional*):
            Runs the programs. `None`: the one that `code_reward` uses.
        success_message (`str` or `None`, *optional*):
            Critique of a program that passes all tests; `None` for none.
        show_hidden (`bool`, *optional*, defaults to `False`):
            Whether tests with `public=False` are shown as others are: their expected values then reach the teacher.
        max_tests (`int`, *optional*, defaults to `2`):
            Most wrong answers that are shown.
        max_length (`int`, *optional*, defaults to `2000`):
            Longest feedback in characters. Of an input 8 lines of 250 characters are shown, of an output 250.

    Raises:
        SandboxUnavailable: If there is no bubblewrap here and no runner was passed.
        TypeError, ValueError: If an argument is not one of these.
    """

    # Programs run in processes of their own, beside what asks the model
    runs_on_a_thread = True

    def __init__(
        self,
        runner: CodeRunner | None = None,
        success_message: str | None = "The program passed all tests.",
        show_hidden: bool = False,
        max_tests: int = 2,
        max_length: int = 2000,
    ) -> None:
        if runner is not None and not isinstance(runner, CodeRunner):
            raise TypeError(f"runner must be a CodeRunner or None; got {type(runner).__name__}.")
        if success_message is not None and not (isinstance(success_message, str) and success_message.strip()):
            raise ValueError(f"success_message must be a text that is not blank, or None; got {success_message!r}.")
        if not isinstance(show_hidden, bool):
            raise TypeError(f"show_hidden must be True or False; got {show_hidden!r}.")
        for name, value, least in (("max_tests", max_tests, 1), ("max_length", max_length, SHORTEST_LIMIT)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}.")
        self.runner = default_runner() if runner is None else runner
        self.success_message = success_message
        self.show_hidden = show_hidden
        self.max_tests = max_tests
        self.max_length = max_length
        self.required_columns = (self.runner.tests_column,)

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[Feedback | None]:
        tests = self.runner.tests(columns)
        outcomes = self.runner.outcomes(prompts, completions, tests, columns.get("trainer_state"))
        feedback: list[Feedback | None] = []
        for test, outcome in zip(tests, outcomes, strict=True):
            text = None
            if test is not None and outcome is not None:
                if log_metric is not None:
                    _log(outcome, log_metric)
                text = self.describe(test, outcome)
            feedback.append(None if text is None else Feedback(critique=text))
        return feedback

    def describe(self, tests: CodeTests, outcome: Outcome) -> str | None:
        """
        What is said of a program; `None` for nothing.

        Args:
            tests: Its tests.
            outcome: How it fared in them.
        """
        if outcome.status is Status.NOT_RUN:
            return None
        if outcome.passed:
            return self.success_message
        if outcome.status in _NO_PROGRAM:
            return _NO_PROGRAM[outcome.status]
        pairs = list(zip(tests.tests, outcome.cases, strict=False))  # tests after a time-out were not run
        shown = [(test, case) for test, case in pairs if test.public or self.show_hidden]
        early = next(((test, case) for test, case in shown if case.status in _EARLY), None)
        wrong = [(test, case) for test, case in shown if case.status is Status.WRONG_ANSWER]
        if outcome.status is Status.SYNTAX_ERROR:  # it tells nothing of the test
            text = f"{_EARLY[outcome.status]}\n{_end_of(pairs[0][1].message)}"
        elif early is not None:
            text = _early_text(*early, tests.entry_point)
        elif wrong:
            shortest = sorted(wrong, key=lambda pair: len(_input_of(pair[0], tests.entry_point)))[: self.max_tests]
            parts = [_wrong_text(test, case, tests.entry_point) for test, case in shortest]
            text = f"The program gives a wrong answer in {len(wrong)} of {len(shown)} tests.\n\n" + "\n\n".join(parts)
        else:
            all_run = len(shown) == sum(test.public for test in tests.tests)
            text = _hidden_text([case for _, case in pairs], bool(shown) and all_run)
        text = _printable(text)
        return text if len(text) <= self.max_length else text[: self.max_length - 1].rstrip() + "…"


def _early_text(test: AnyTest, case: CaseResult, entry_point: str | None) -> str:
    parts = [_EARLY[case.status]]
    if case.message:
        parts[0] += f"\n{_end_of(case.message)}"
    shown = _input_of(test, entry_point)
    if shown:
        parts.append(f"{_input_title(test)}:\n{_lines_of(shown)}")
    return "\n\n".join(parts)


def _wrong_text(test: AnyTest, case: CaseResult, entry_point: str | None) -> str:
    if not isinstance(test, (StdinTest, CallTest)):
        return f"What failed:\n{_end_of(case.message)}"
    expected = test.stdout if isinstance(test, StdinTest) else show(test.expected)
    kind = "output" if isinstance(test, StdinTest) else "value"
    return (
        f"{_input_title(test)}:\n{_lines_of(_input_of(test, entry_point)) or '(empty)'}\n"
        f"Expected {kind}:\n{_cut(expected, MAX_OUTPUT)}\n"
        f"Actual {kind}:\n{_cut(case.output, MAX_OUTPUT) or '(empty)'}"
    )


def _hidden_text(cases: list[CaseResult], public_passed: bool) -> str:
    """What may be known of hidden tests: how one failed, not in what."""
    case = next(case for case in cases if case.status is not Status.PASSED)
    how = _EARLY.get(case.status, "The program gives a wrong answer.")
    passed = "The program passes the tests that are public. " if public_passed else ""
    return f"{passed}In a hidden test it fails: {how[0].lower()}{how[1:]}"


def _input_of(test: AnyTest, entry_point: str | None) -> str:
    if isinstance(test, StdinTest):
        return test.stdin.strip("\n")
    if isinstance(test, CallTest):
        arguments = [*map(show, test.args), *(f"{name}={show(value)}" for name, value in test.kwargs.items())]
        return f"{entry_point}({', '.join(arguments)})"
    return ""


def _input_title(test: AnyTest) -> str:
    return "Input" if isinstance(test, StdinTest) else "Call"


def _lines_of(text: str) -> str:
    lines = text.split("\n")
    shown = [_cut(line, MAX_LINE) for line in lines[:MAX_INPUT_LINES]]
    return "\n".join(shown + (["..."] if len(lines) > MAX_INPUT_LINES else []))


def _cut(text: str, limit: int) -> str:
    text = text.strip("\n")
    return text if len(text) <= limit else text[:limit] + "..."


def _end_of(text: str) -> str:
    """The end of a traceback, which tells most."""
    return text if len(text) <= MAX_TRACEBACK else "..." + text[-MAX_TRACEBACK:]


def _printable(text: str) -> str:
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text).encode("utf-8", "replace").decode()


def _log(outcome: Outcome, log_metric: Callable[[str, float], None]) -> None:
    # One value per program: the trainer averages over all of all processes, so that each counts the same
    no_code = outcome.status in _NO_PROGRAM
    log_metric("feedback/execution_no_code", float(no_code))
    if no_code:
        return
    not_run = outcome.status is Status.NOT_RUN
    log_metric("feedback/execution_not_run", float(not_run))
    if not not_run:
        log_metric("feedback/execution_passed", float(outcome.passed))
        log_metric("feedback/execution_timeout", float(outcome.status is Status.TIMEOUT))
        log_metric("feedback/execution_seconds", outcome.seconds)
