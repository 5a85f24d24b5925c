"""LiveCodeBench's tests: as they are packed, and as the sandbox takes them."""

from __future__ import annotations

import base64
import binascii
import json
import pickletools
import random
import zlib
from collections.abc import Mapping, Sequence
from typing import Any


MOST_BYTES = 512 << 20  # of one problem's tests, unpacked

# The instructions of a pickle that make a text, and those that stand around it
_TEXT = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_BESIDE_TEXT = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}

# What programs of such contests take for given, the starter code too, which speaks of List and Optional. No star on
# `math`: its `pow` would take the place of the one that takes a modulus
PREAMBLE = """\
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import ceil, comb, factorial, floor, gcd, inf, isqrt, lcm, log, log2, perm, pi, prod, sqrt
from typing import *
sys.setrecursionlimit(50_000)
"""


def unpack_tests(packed: str, most_bytes: int = MOST_BYTES) -> list[dict[str, str]]:
    """
    The tests in a text of LiveCodeBench: JSON, or JSON in a pickle, compressed by zlib, in base64.

    A pickle is a program, and this one is not run: it is read, and must do nothing but hold one text.

    Args:
        packed: The text.
        most_bytes: Most bytes that it may unpack to.

    Raises:
        ValueError: If it is something else, too long, or a pickle of anything but a text.
    """
    text = packed
    if not packed.lstrip().startswith("["):
        try:
            pickled = _decompress(base64.b64decode(packed, validate=True), most_bytes)
        except (binascii.Error, zlib.error) as error:
            raise ValueError(f"The tests are neither JSON nor compressed data in base64: {error}.") from None
        text = _pickled_text(pickled)
    try:
        tests = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The tests are no JSON: {error}.") from None
    if not isinstance(tests, list) or not all(isinstance(test, dict) for test in tests):
        raise ValueError("The tests must be a list of dictionaries with input, output and testtype.")
    return tests


def _pickled_text(pickled: bytes) -> str:
    """The text that a pickle consists of, found without running it."""
    texts: list[str] = []
    try:
        for opcode, value, _ in pickletools.genops(pickled):
            if opcode.name in _TEXT:
                texts.append(str(value))
            elif opcode.name not in _BESIDE_TEXT:
                raise ValueError(f"it has the instruction {opcode.name}")
        if len(texts) != 1:
            raise ValueError(f"it has {len(texts)} texts")
    except ValueError as error:  # also of a pickle that ends too early, or is none
        raise ValueError(f"The tests' pickle is refused, as it is not one plain text: {error}.") from None
    return texts[0]


def _decompress(data: bytes, most_bytes: int) -> bytes:
    stream = zlib.decompressobj()
    plain = stream.decompress(data, most_bytes)
    if stream.unconsumed_tail:
        raise ValueError(f"The tests unpack to more than {most_bytes:,} bytes.")
    if not stream.eof:
        raise zlib.error("it ends too early")
    return plain


def sandbox_tests(
    public: Sequence[Mapping[str, str]], hidden: Sequence[Mapping[str, str]], function: str | None
) -> str:
    """
    Tests in the form of the sandbox, as JSON; see [`~vpd_trl.sandbox.parse_tests`].

    Args:
        public: LiveCodeBench's tests that feedback may show.
        hidden: Those that it may not.
        function: Name of the function that is called: arguments are then lines of JSON. `None`: programs read their
            standard input.

    Raises:
        ValueError: If there is no test, or one is of another form.
    """
    tests = [_sandbox_test(test, True, function) for test in public]
    tests += [_sandbox_test(test, False, function) for test in hidden]
    if not tests:
        raise ValueError("There are no tests.")
    entry = "" if function is None else f', "entry_point": {json.dumps(function)}'
    return f'{{"tests": [{", ".join(tests)}], "preamble": {json.dumps(PREAMBLE)}{entry}}}'


def _sandbox_test(test: Mapping[str, str], public: bool, function: str | None) -> str:
    """A test as JSON."""
    if not isinstance(test.get("input"), str) or not isinstance(test.get("output"), str):
        raise ValueError(f"A test needs input and output, both texts; got {dict(test)!r:.200}.")
    kind = "stdin" if function is None else "functional"
    if test.get("testtype", kind) != kind:
        raise ValueError(
            f"A problem {'without' if function is None else 'with'} a func_name has tests of testtype "
            f"{kind!r}; got {test['testtype']!r}."
        )
    if function is None:
        return json.dumps({"stdin": test["input"], "stdout": test["output"], "public": public})
    arguments = [line for line in test["input"].split("\n") if line.strip()]
    try:
        for line in (*arguments, test["output"]):
            json.loads(line, parse_int=len)  # `int`, which also writes them, refuses those of more than 4,300 digits
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"A call's arguments and its value must be lines of JSON: {error}; got {dict(test)!r:.200}."
        ) from None
    return f'{{"args": [{", ".join(arguments)}], "expected": {test["output"]}, "public": {json.dumps(public)}}}'


def half_of(tests: Sequence[Any], key: str) -> list[Any]:
    """
    Half of the tests, rounded up, in their order; the same half for the same key.

    Args:
        tests: The tests.
        key: Names the problem.
    """
    chosen = random.Random(f"half of {key}").sample(range(len(tests)), (len(tests) + 1) // 2)
    return [tests[i] for i in sorted(chosen)]
