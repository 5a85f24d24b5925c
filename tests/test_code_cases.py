"""What programs are tested against as data, and when a result is right."""

import contextlib
import math
import random
import time
import tracemalloc

import pytest

from vpd_trl.sandbox import CallTest, CheckTest, CodeTests, StdinTest, parse_tests, same_text, same_value
from vpd_trl.sandbox.plain import decode, encode


# ---- Comparison


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ("3\n", "3", True),
        ("3  \n\n", "3\n", True),
        ("\n3", "3", True),
        ("1 2\r\n3", "1 2\n3", True),
        ("1 2 3", "1  2 3 ", True),
        ("1 2 3", "1 2\n3", False),
        ("3", "4", False),
        ("", "3", False),
        ("3\n4", "3", False),
        ("yes", "YES", False),
        ("0.3333333", "0.33333333333", True),
        ("0.334", "0.33333333333", False),
        ("1e-3", "0.001", True),
        ("5.0", "5", True),
        ("4.9999999", "5", False),  # a whole number is expected
        ("5", "5.0000001", True),
        ("12345678901234567890", "12345678901234567890", True),
        ("12345678901234567891", "12345678901234567890", False),
        ("1.2345678901234567e19", "12345678901234567890", False),
        ("1" + "0" * 5000, "1" + "0" * 5000, True),
        ("1" + "0" * 4999 + "1", "1" + "0" * 5000, False),
        ("1e999999", "1", False),
        ("nan", "0.5", False),
        ("Case 1: 0.50000001", "Case 1: 0.5", True),
        ("Case 1:  0.5", "Case 1: 0.5", False),
        ("  *", "*", False),  # a drawing
        ("  *\n ***", "  *\n ***  ", True),
        ("٣", "3.0", False),  # digits of another script
        ("1_000", "1000", False),
        ("3\x0b", "3", True),
    ],
)
def test_printed_text_is_compared_as_numbers_and_lines(actual, expected, same):
    assert same_text(actual, expected) is same


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        (3, 3, True),
        (3, 4, False),
        (3.0, 3, True),
        (0.1 + 0.2, 0.3, True),
        (0.31, 0.3, False),
        (1, 1.0, True),
        (2**64 + 1, 2**64, False),
        (float(2**64 + 1), 2**64 + 1, False),  # rounded
        (10**400, 1e300, False),
        (math.nan, math.nan, True),
        (math.nan, 1.0, False),
        (math.inf, math.inf, True),
        ("3", 3, False),
        (3, "3", False),
        (None, 0, False),
        ((1, 2), [1, 2], True),
        ([1, [2.0000000001]], [1, [2.0]], True),
        ([1, 2], [1, 2, 3], False),
        ([1, 2], [2, 1], False),
        ({"a": 1.0000000001}, {"a": 1.0}, True),
        ({"a": 1}, {"b": 1}, False),
        ({1, 2}, {2, 1}, True),
        ([1], {1}, False),
        ("ab", ["a", "b"], False),
        (True, True, True),
        (False, True, False),
    ],
)
def test_values_are_compared_by_what_was_expected(actual, expected, same):
    assert same_value(actual, expected) is same


def test_a_long_output_that_is_almost_a_number_is_compared_at_once():
    start = time.process_time()
    for text in ("1" * 4_000_000 + "x", "-" + "1." * 2_000_000, "1" * 2_000_000 + "e" + "1" * 2_000_000):
        assert not same_text(text, "3")
        assert not same_text(text, "3.5")
    assert time.process_time() - start < 5


def test_the_tolerance_can_be_chosen():
    assert not same_text("0.33333", "0.3333333333")
    assert same_text("0.33333", "0.3333333333", tolerance=1e-4)
    assert not same_value(0.1 + 0.2, 0.3, tolerance=0.0)


# ---- Plain data


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -(2**70), 10**5000, 1.5, -0.0, math.inf, 1 + 2j, "", "grüße\ud800", b"\x00\xff", [], [1, [2, ()]],
        {1, 2}, frozenset({"a"}), {"a": [1], 2: None, (1, 2): b""},
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_plain_data_comes_back_as_it_was(value):
    back = decode(encode(value))
    assert back == value
    assert type(back) is type(value)


def test_subclasses_come_back_as_their_base():
    class Number(int):
        def __eq__(self, other):
            return True

        def __format__(self, spec):
            return "3"

        __hash__ = int.__hash__

    class Names(dict):
        def __getitem__(self, key):
            return 3

        def __iter__(self):
            return iter(["x"])

    class Items(list):
        def __iter__(self):
            return iter([3])

    back = decode(encode([Number(4), Names(a=4), Items([4])]))
    assert back == [4, {"a": 4}, [4]]
    assert [type(item) for item in back] == [int, dict, list]


@pytest.mark.parametrize("kind", ["set", "frozenset", "dict", "in a tuple"])
def test_a_set_of_items_with_one_hash_is_refused_at_once(kind):
    # A set of n such items takes n² steps, in which no other thread of the trainer runs
    numbers = [b"i%x;" % (i * (2**61 - 1)) for i in range(200_000)]
    items = [b"t1:" + number for number in numbers] if kind == "in a tuple" else numbers
    tag = {"set": b"S", "frozenset": b"Z", "dict": b"d", "in a tuple": b"S"}[kind]
    data = tag + b"%d:" % len(items) + b"".join(item + b"N" * (kind == "dict") for item in items)
    start = time.process_time()
    with pytest.raises(ValueError, match="the same hash"):
        decode(data)
    assert time.process_time() - start < 5


def test_sets_of_ordinary_items_come_back_however_many_they_are():
    value = {(x, -y, str(x)) for x in range(99) for y in range(99)}
    assert decode(encode(value)) == value
    assert decode(encode(dict.fromkeys(range(-9_000, 9_000)))) == dict.fromkeys(range(-9_000, 9_000))


def test_a_value_of_too_many_containers_is_refused_before_it_is_built():
    data = b"l1000000:" + b"S0:" * 1_000_000
    tracemalloc.start()
    with pytest.raises(ValueError, match="too many containers"):
        decode(data, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert decode(encode([[1]] * 999), 1000) == [[1]] * 999


def test_bytes_that_are_no_data_raise_nothing_but_a_value_error():
    source = random.Random(0)
    good = encode({"a": [1, 2.5, "x", (None, True)], "b": {1, 2}, "c": b"xyz"})
    for _ in range(5000):
        data = bytearray(good)
        for _ in range(source.randint(1, 4)):
            data[source.randrange(len(data))] = source.randrange(256)
        with contextlib.suppress(ValueError):
            decode(bytes(data[: source.randint(0, len(data))]))
    for data in (b"l1:" * 100_000, b"l99999999999:", b"s-1:", b"i" + b"f" * 10, b"", b"d1:l0:N", b"S1:l0:"):
        with pytest.raises(ValueError):  # noqa: PT011 - whatever it says
            decode(data)


# ---- Tests as data


def test_tests_are_read_from_json_lists_and_dictionaries():
    scripts = CodeTests([StdinTest("1", "2"), StdinTest("3", "4", public=False)])
    rows = [{"stdin": "1", "stdout": "2"}, {"input": "3", "output": "4", "public": False, "args": None}]
    assert parse_tests(rows) == parse_tests({"tests": rows, "entry_point": None}) == scripts
    calls = parse_tests('{"entry_point": "f", "tests": [{"args": [1, null], "expected": null}]}')
    assert calls == CodeTests([CallTest([1, None], None)], entry_point="f")
    checks = parse_tests({"entry_point": "f", "preamble": "import os", "tests": [{"check": "x", "setup": "y"}]})
    assert checks == CodeTests([CheckTest("x", "y")], entry_point="f", preamble="import os")
    assert parse_tests(scripts) is scripts


def test_long_integers_are_read_from_json():
    tests = parse_tests(f'{{"entry_point": "f", "tests": [{{"args": [], "expected": 1{"0" * 5000}}}]}}')
    assert tests.tests[0].expected == 10**5000


def test_equal_tests_have_equal_digests_and_others_have_not():
    variants = [
        CodeTests([CallTest([1], 2)], "f"),
        CodeTests([CallTest([1], 3)], "f"),
        CodeTests([CallTest([1], 2)], "g"),
        CodeTests([CallTest([1], 2, {"a": 1})], "f"),
        CodeTests([CallTest([1], 2)], "f", preamble="x"),
        CodeTests([StdinTest("1", "2")]),
        CodeTests([StdinTest("1", "2"), StdinTest("1", "2")]),
    ]
    assert len({tests.digest for tests in variants}) == len(variants)
    assert variants[0].digest == CodeTests([CallTest([1], 2)], "f").digest


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "a problem needs at least one test"),
        ("nonsense", "no JSON"),
        (3, "must be a list of .* got int"),
        ([3], "A test must be .* got int"),
        ({"inputs": []}, '"tests", "entry_point" and "preamble"; got \'inputs\''),
        ([{"stdin": "1"}], "got one with 'stdin'"),
        ([{"stdin": "1", "stdout": "2", "name": "x"}], "got one with 'name', 'stdin', 'stdout'"),
        ([{"stdin": 1, "stdout": "2"}], "StdinTest.stdin must be of type str; got int"),
        ([{"stdin": "1", "stdout": "2", "public": "no"}], '"public" must be true or false'),
        ([{"args": [1], "expected": 2}], "need its name in entry_point"),
        ({"tests": [{"args": "ab", "expected": 2}], "entry_point": "f"}, "args must be a list or tuple"),
        ({"tests": [{"args": [1], "expected": object()}], "entry_point": "f"}, "CallTest.expected must be plain data"),
        ({"tests": [{"args": [1], "expected": 2}], "entry_point": "f("}, "must be the name of a function"),
        ({"tests": [{"check": "def check(:"}], "entry_point": "f"}, "CheckTest.code is not a Python program"),
    ],
)
def test_what_is_no_tests_is_refused(value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        parse_tests(value)
