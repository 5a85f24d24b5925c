"""Running programs in sandboxes, several at a time."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .cases import AnyTest, CallTest, CodeTests, StdinTest
from .channel import Channel
from .compare import same_text, same_value
from .isolation import Isolation, SandboxUnavailable, cannot_start, find_isolation, package_paths
from .outcome import CaseResult, Outcome, Status
from .plain import decode, encode


logger = logging.getLogger(__name__)

GRACE = 30.0  # seconds beyond a test's time after which its sandbox, supervisor and all, is given up
MAX_SHOWN, MAX_MESSAGE = 500, 1000  # characters of an output and of a message that are kept
MAX_CONTAINERS = 1 << 18  # in a value that a function returned

_STATUS = {
    "wrong": Status.WRONG_ANSWER,
    "syntax": Status.SYNTAX_ERROR,
    "error": Status.ERROR,
    "processes": Status.ERROR,
    "timeout": Status.TIMEOUT,
    "memory": Status.MEMORY,
    "output": Status.OUTPUT_LIMIT,
}
_LAST = (Status.SYNTAX_ERROR, Status.TIMEOUT)  # after these the other tests would be a waste of time


@dataclass(frozen=True)
class Limits:
    """
    What each test of a program may use.

    Attributes:
        cpu_seconds: Processor time. It doesn't run on while a busy machine keeps the program waiting.
        seconds: Wall-clock time, which also ends what sleeps or waits.
        memory: Bytes: the address space of each process, and the resident memory of all together.
        output: Bytes that it may print, or its returned value may take.
        file_size: Bytes of each file that it writes. /tmp holds 64 MiB, /dev/shm 16.
        processes: Processes and threads.
    """

    cpu_seconds: float = 6.0
    seconds: float = 12.0
    memory: int = 1 << 30
    output: int = 4 << 20
    file_size: int = 16 << 20
    processes: int = 32

    def __post_init__(self) -> None:
        least = {"cpu_seconds": 0.0, "seconds": 0.0, "memory": 64 << 20, "output": 1, "file_size": 0, "processes": 1}
        for name, low in least.items():
            value: Any = getattr(self, name)
            whole = isinstance(low, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise TypeError(f"Limits.{name} must be a {'whole ' if whole else ''}number; got {value!r}.")
            if not (value >= low if whole else 0 < value < math.inf):
                raise ValueError(f"Limits.{name} must be {f'at least {low}' if whole else 'above 0'}; got {value!r}.")


@dataclass(frozen=True)
class _Batch:
    """What the programs of one call of `run` have in common."""

    how: Isolation
    deadline: float  # on the monotonic clock
    cancelled: threading.Event
    process_limit: int | None


class Sandbox:
    """
    Runs programs that a model wrote against tests, each program in a sandbox of its own.

    The verdict comes from outside: expected values stay in this process, to which the sandbox sends what the program
    printed or returned, as plain data. Of a [`CheckTest`] the test program runs inside too, but in another process,
    whose memory and files are closed to the program.

    With `isolation="bubblewrap"` a program sees the system and the interpreter, read-only, and a private /tmp; no
    network, no home folder, no environment, no process but its own. It can't outlive its test. Of the kernel it gets what
    programs need: no namespaces, tracing, eBPF, io_uring, keys, or memory that no process is charged with.

    With `isolation="limits"` there are the same limits and refused system calls, and descendants are ended with the
    program, but it can read and change all files that this user can, fill the disk, and end or disturb other
    processes of this user, its own supervisor among them. It must be asked for by name. If this process is root, and
    other users can read the Python interpreter, programs run as a user of their own, to whom much of that is closed.

    Args:
        isolation: "bubblewrap" or "limits".
        limits: What each test may use.
        max_workers: Programs that run at a time, on each process. `None`: as many as there are processors for this
            process (`LOCAL_WORLD_SIZE` shares them), but at least 4, as the time limit counts processor time.
        batch_seconds: Wall-clock seconds for all programs of one call of `run`. What has not ended then is stopped and
            counts as not run. `None`: no limit.
        tolerance: Greatest difference, absolute or relative, where a decimal number is expected.
        site_packages: Whether programs can import the packages installed in this environment, beside the standard
            library; their folder is then seen in the sandbox.

    Raises:
        SandboxUnavailable: If there is no bubblewrap, or it can't set up a sandbox here. Nothing weaker takes its place.
        TypeError, ValueError: If an argument is not one of these.
    """

    def __init__(
        self,
        isolation: Literal["bubblewrap", "limits"] = "bubblewrap",
        limits: Limits | None = None,
        max_workers: int | None = None,
        batch_seconds: float | None = 300.0,
        tolerance: float = 1e-6,
        site_packages: bool = False,
    ) -> None:
        if isolation not in ("bubblewrap", "limits"):
            raise ValueError(f"isolation must be 'bubblewrap' or 'limits'; got {isolation!r}.")
        if limits is not None and not isinstance(limits, Limits):
            raise TypeError(f"limits must be Limits or None; got {type(limits).__name__}.")
        if max_workers is not None and (isinstance(max_workers, bool) or not isinstance(max_workers, int)):
            raise TypeError(f"max_workers must be a whole number or None; got {max_workers!r}.")
        if max_workers is not None and max_workers < 1:
            raise ValueError(f"max_workers must be at least 1; got {max_workers}.")
        if batch_seconds is not None and not batch_seconds > 0:
            raise ValueError(f"batch_seconds must be above 0, or None; got {batch_seconds!r}.")
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance must be at least 0; got {tolerance!r}.")
        self.isolation = isolation
        self.limits = limits or Limits()
        self.max_workers = max_workers or _default_workers()
        self.batch_seconds = batch_seconds
        self.tolerance = tolerance
        self.site_packages = site_packages
        self._how = self._probe()
        if isolation == "limits" and os.geteuid() == 0 and not self._how.change_user:
            logger.warning("Programs will run as root, since other users can't read the files of the interpreter.")

    def run(self, programs: Sequence[tuple[str, CodeTests]]) -> list[Outcome]:
        """
        Run programs, each with its tests.

        Args:
            programs: Pairs of a program and its tests.

        Returns:
            One outcome per program. No program's doing raises an error.
        """
        batch = self._batch(self._how, self.batch_seconds)
        workers = max(1, min(self.max_workers, len(programs)))
        with ThreadPoolExecutor(workers, thread_name_prefix="vpd-trl-sandbox") as pool:
            try:
                running = [pool.submit(self._run, batch, *pair) for pair in programs]
                outcomes = [future.result() for future in running]
            except BaseException:  # such as Ctrl-C: the pool waits for its threads, which must not go on
                batch.cancelled.set()
                raise
        failed = next((o.message for o in outcomes if o.status is Status.NOT_RUN), None)
        if failed is not None:
            count = sum(outcome.status is Status.NOT_RUN for outcome in outcomes)
            logger.warning(f"{count} of {len(outcomes)} programs were not run, or not to their end: {failed}")
        return outcomes

    # ---- One program

    def _batch(self, how: Isolation, seconds: float | None) -> _Batch:
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        return _Batch(how, deadline, threading.Event(), how.process_limit(self.limits.processes))

    def _run(self, batch: _Batch, program: str, tests: CodeTests) -> Outcome:
        how, deadline, cancelled = batch.how, batch.deadline, batch.cancelled
        start, total = time.monotonic(), len(tests.tests)
        if start >= deadline or cancelled.is_set():
            return Outcome(Status.NOT_RUN, (), total, 0.0, self._late())
        user = how.user()
        folder = None
        cases: list[CaseResult] = []
        try:
            if how.name == "limits":
                folder = tempfile.mkdtemp(prefix="vpd-trl-")
                if user is not None:
                    os.chown(folder, user, user)
            with Channel(
                how,
                self._job(batch, user, program, tests),
                self.site_packages,
                folder,
                cancelled,
                longest=self.limits.output + (1 << 20),
            ) as channel:
                ready = channel.receive(min(deadline, start + 60))
                while ready is not None and len(cases) < total:
                    report = channel.receive(min(deadline, time.monotonic() + self.limits.seconds + GRACE))
                    if not _is_report(report):
                        break
                    cases.append(self._judge(tests.tests[len(cases)], report))
                    if cases[-1].status in _LAST:
                        break
            seconds = time.monotonic() - start
            if ready is None and time.monotonic() < deadline:
                return Outcome(Status.NOT_RUN, (), total, seconds, f"the sandbox did not start: {channel.said()}")
            ended_early = len(cases) < total and not (cases and cases[-1].status in _LAST)
            if ended_early and (time.monotonic() >= deadline or cancelled.is_set()):
                return Outcome(Status.NOT_RUN, (), total, seconds, self._late())
            if ended_early and channel.ended:
                cases.append(CaseResult(Status.ERROR, message="The program made its sandbox end."))
            elif ended_early:
                cases.append(CaseResult(Status.TIMEOUT))
            return Outcome(_overall(cases), tuple(cases), total, seconds)
        except OSError as error:
            return Outcome(Status.NOT_RUN, (), total, time.monotonic() - start, f"{type(error).__name__}: {error}")
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def _late(self) -> str:
        return f"the batch's {self.batch_seconds:g} seconds (batch_seconds) were over" if self.batch_seconds else ""

    def _job(self, batch: _Batch, user: int | None, program: str, tests: CodeTests) -> list[bytes]:
        """The frames that are sent: the job, then each test."""
        job = {
            "program": program,
            "preamble": tests.preamble,
            "entry_point": tests.entry_point or "",
            "tests": len(tests.tests),
            "limits": asdict(self.limits),
            "user": user,
            "paths": package_paths(self.site_packages),
            "process_limit": batch.process_limit,
            "stop_at": [word for word, status in _STATUS.items() if status in _LAST],
        }
        frames = [encode(job)]
        for test in tests.tests:
            if isinstance(test, StdinTest):
                stdin = test.stdin.encode("utf-8", "surrogateescape")
                frames.append(encode({"kind": "script", "stdin": stdin}))
            elif isinstance(test, CallTest):
                frames.append(encode({"kind": "call", "args": tuple(test.args), "kwargs": dict(test.kwargs)}))
            else:  # what must not be known to the program comes in a frame of its own
                frames += [encode({"kind": "check"}), encode({"code": test.code, "setup": test.setup})]
        return frames

    def _judge(self, test: AnyTest, report: dict[str, Any]) -> CaseResult:
        status, seconds, output = report["status"], report["seconds"], report["output"]
        message = (
            report["message"].encode("utf-8", "replace").decode()
        )  # an error's text may hold half a surrogate pair
        if status == "processes":
            message = f"The program started more than {self.limits.processes} processes."
        if isinstance(test, CallTest):
            shown, value = "", None
            if status == "ok":
                try:
                    value = decode(output, MAX_CONTAINERS)
                except ValueError:
                    return CaseResult(Status.ERROR, "", "The function's value could not be read.", seconds)
                shown = show(value)
            right = status == "ok" and same_value(value, test.expected, self.tolerance)
        else:
            text = output.decode("utf-8", "replace")
            shown = shorten(text)
            right = status == "ok" and (
                not isinstance(test, StdinTest) or same_text(text, test.stdout, self.tolerance)
            )
        verdict = (Status.PASSED if right else Status.WRONG_ANSWER) if status == "ok" else _STATUS[status]
        return CaseResult(verdict, "" if right else shown, shorten(message, MAX_MESSAGE), seconds)

    # ---- Whether it works at all

    def _probe(self) -> Isolation:
        said = ""
        test = CodeTests([StdinTest("6 7", "42")])
        for how in find_isolation(self.isolation):
            program = "a, b = map(int, input().split())\nprint(a * b)"
            outcome = self._run(self._batch(how, 60.0), program, test)
            if outcome.passed:
                return how
            said += f"\n{outcome.message or outcome.cases}"
        if self.isolation == "bubblewrap":
            raise SandboxUnavailable(cannot_start(said))
        raise SandboxUnavailable(f"A program that is sure to be right did not run here: {said.strip()}")


def _is_report(report: Any) -> bool:
    """Whether this is what a supervisor says; with plain limits a program may have taken its place."""
    kinds = {"status": str, "output": bytes, "message": str, "seconds": float}
    if not isinstance(report, dict) or report.keys() != kinds.keys():
        return False
    return all(isinstance(report[name], kind) for name, kind in kinds.items()) and report["status"] in ("ok", *_STATUS)


def _overall(cases: list[CaseResult]) -> Status:
    statuses = [case.status for case in cases]
    failures = [status for status in statuses if status not in (Status.PASSED, Status.WRONG_ANSWER)]
    if failures:
        return failures[0]
    return Status.WRONG_ANSWER if Status.WRONG_ANSWER in statuses else Status.PASSED


def _default_workers() -> int:
    try:
        processors = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        processors = os.cpu_count() or 1
    return max(4, processors // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)))


def show(value: Any) -> str:
    """A value of plain data as Python writes it, shortened; also an integer of more digits than Python would."""
    try:
        return shorten(repr(value))
    except ValueError:
        return shorten(f"{value:#x}") if isinstance(value, int) else "(a value with a very long integer)"


def shorten(text: str, limit: int = MAX_SHOWN) -> str:
    """Beginning and end of a text that is too long to be kept."""
    return text if len(text) <= limit else text[: limit // 2] + "\n[...]\n" + text[-limit // 2 :]
