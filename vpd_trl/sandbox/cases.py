"""What a program is tested against: data classes, and how a column of a data set holds them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal
from functools import cached_property
from typing import Any

from .plain import encode


@dataclass(frozen=True)
class StdinTest:
    """
    The program is run as a script and must print what is expected.

    Attributes:
        stdin: Its input.
        stdout: The expected output, see [`same_text`].
        public: Whether feedback may show it.
    """

    stdin: str
    stdout: str
    public: bool = True

    def __post_init__(self) -> None:
        for name in ("stdin", "stdout"):
            _check_type(self, name, str)


@dataclass(frozen=True)
class CallTest:
    """
    The program's function is called, in a process of its own, and must return what is expected.

    The expected value never gets to where the program runs: its own value, as plain data, comes out to be compared.

    Attributes:
        args: Positional arguments, plain data: `None`, numbers, strings, bytes, lists, tuples, sets, dictionaries.
        expected: The expected value, also plain data, see [`same_value`].
        kwargs: Keyword arguments.
        public: Whether feedback may show it.
    """

    args: Sequence[Any]
    expected: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    public: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.args, (str, bytes)) or not isinstance(self.args, Sequence):
            raise TypeError(f"CallTest.args must be a list or tuple of arguments; got {type(self.args).__name__}.")
        _check_type(self, "kwargs", Mapping)
        for name in ("args", "expected", "kwargs"):
            value = getattr(self, name)
            try:
                encode(dict(value) if name == "kwargs" else list(value) if name == "args" else value)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"CallTest.{name} must be plain data (None, numbers, strings, bytes, lists, tuples, sets, "
                    f"dictionaries); it holds {error}."
                ) from None


@dataclass(frozen=True)
class CheckTest:
    """
    A test program, of which every assertion must hold (HumanEval, MBPP).

    It runs in a process of its own, apart from the program's, where a call of the function under test is sent to the
    program's process and its value comes back as plain data. So the program can't touch the test program, and nothing
    but right values passes it, as long as the test program itself asks for them: one that checks `candidate(x)` by
    calling a method of the value, say, still works on plain data only. Arguments that the function changes in place
    are not seen to change.

    Attributes:
        code: The test program. It calls the function under its name, or defines `check(candidate)`.
        setup: What it needs beforehand, such as the prompt with its imports and helpers; not taken from the program.
        public: Whether feedback may show the failed assertion.
    """

    code: str
    setup: str = ""
    public: bool = True

    def __post_init__(self) -> None:
        for name in ("code", "setup"):
            _check_type(self, name, str)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # "\d" and the like in texts
                    compile(getattr(self, name), name, "exec", dont_inherit=True)
            except (SyntaxError, ValueError) as error:
                raise ValueError(f"CheckTest.{name} is not a Python program: {error}.") from None


AnyTest = StdinTest | CallTest | CheckTest


@dataclass(frozen=True)
class CodeTests:
    """
    All tests of one problem.

    Attributes:
        tests: The tests, in the order in which they run.
        entry_point: Name of the function that [`CallTest`] and [`CheckTest`] call: a global of the program, or else a
            method of its class `Solution`.
        preamble: Code that runs before the program in the same namespace, such as imports that a task takes for given.
    """

    tests: Sequence[AnyTest]
    entry_point: str | None = None
    preamble: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tests", tuple(self.tests))
        if not self.tests:
            raise ValueError("CodeTests.tests is empty; a problem needs at least one test.")
        for test in self.tests:
            if not isinstance(test, (StdinTest, CallTest, CheckTest)):
                raise TypeError(
                    f"CodeTests.tests must hold StdinTest, CallTest or CheckTest; got {type(test).__name__}."
                )
        if self.entry_point is None and not all(isinstance(test, StdinTest) for test in self.tests):
            raise ValueError("Tests that call a function need its name in entry_point.")
        if self.entry_point is not None and not (
            isinstance(self.entry_point, str) and self.entry_point.isidentifier()
        ):
            raise ValueError(f"entry_point must be the name of a function; got {self.entry_point!r}.")
        _check_type(self, "preamble", str)

    @cached_property
    def digest(self) -> str:
        """The same for equal tests, and for no others."""
        plain = [
            [type(test).__name__, *({f.name: getattr(test, f.name) for f in fields(test)}.items())]
            for test in self.tests
        ]
        return hashlib.sha256(encode([plain, self.entry_point, self.preamble])).hexdigest()


_FORMS = (
    '{"stdin": ..., "stdout": ...}, {"args": [...], "expected": ...} (and "kwargs") or {"check": ...} (and "setup"), '
    'each with "public": false to hide it'
)
_KEYS = {"stdin", "stdout", "input", "output", "args", "kwargs", "expected", "check", "setup", "public"}


def parse_tests(value: Any) -> CodeTests:
    """
    The tests in an entry of a data set's column.

    Args:
        value: [`CodeTests`], or a list of tests, or a dictionary with such a list as `tests` and `entry_point` and
            `preamble` beside it, or the JSON of one of the latter. A test is `{"stdin": …, "stdout": …}` (or `input`
            and `output`), `{"args": […], "kwargs": {…}, "expected": …}` or `{"check": …, "setup": …}`; keys whose
            value is `None` count as missing, since a column of dictionaries has all keys in every row. JSON is what
            keeps values of mixed types in a column.

    Raises:
        TypeError, ValueError: If it is something else.
    """
    if isinstance(value, CodeTests):
        return value
    if isinstance(value, str):
        try:
            value = json.loads(value, parse_int=_parse_int)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"The tests are a string, but no JSON: {error}.") from None
    if isinstance(value, Mapping):
        unknown = sorted(set(value) - {"tests", "entry_point", "preamble"})
        if unknown or "tests" not in value:
            raise ValueError(
                'Tests as a dictionary have the keys "tests", "entry_point" and "preamble"; got '
                f"{', '.join(map(repr, value)) or 'none'}."
            )
        options = {key: value[key] for key in ("entry_point", "preamble") if value.get(key) is not None}
        value = value["tests"]
    else:
        options = {}
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"Tests must be a list of {_FORMS}, or the JSON of one; got {type(value).__name__}.")
    return CodeTests(tests=[_parse_test(test) for test in value], **options)


def _parse_test(test: Any) -> AnyTest:
    if isinstance(test, (StdinTest, CallTest, CheckTest)):
        return test
    if not isinstance(test, Mapping):
        raise TypeError(f"A test must be {_FORMS}; got {type(test).__name__}.")
    given = {key: value for key, value in test.items() if value is not None}
    public = given.pop("public", True)
    if not isinstance(public, bool):
        raise TypeError(f'"public" must be true or false; got {public!r}.')
    keys = set(given)
    if not keys - _KEYS:
        if keys == {"stdin", "stdout"}:
            return StdinTest(given["stdin"], given["stdout"], public)
        if keys == {"input", "output"}:
            return StdinTest(given["input"], given["output"], public)
        if "args" in keys and keys <= {"args", "kwargs", "expected"}:
            return CallTest(given["args"], given.get("expected"), given.get("kwargs", {}), public)
        if "check" in keys and keys <= {"check", "setup"}:
            return CheckTest(given["check"], given.get("setup", ""), public)
    raise ValueError(f"A test must be {_FORMS}; got one with {', '.join(map(repr, sorted(test))) or 'no keys'}.")


def _parse_int(text: str) -> int:
    return int(Decimal(text))  # `int` refuses texts of more than 4,300 digits


def _check_type(instance: Any, name: str, kind: type) -> None:
    value = getattr(instance, name)
    if not isinstance(value, kind):
        raise TypeError(
            f"{type(instance).__name__}.{name} must be of type {kind.__name__}; got {type(value).__name__}."
        )
