"""
The supervisor inside the sandbox: starts a process for each test, watches it, and ends it with all that it started.

It runs in a bare interpreter, to which its code is sent: it imports the standard library alone, and no file of it is in
the program's reach. It never holds an expected result. Where the sandbox has process ids of its own the supervisor is
process 1 there, which can't be killed or stopped from inside.
"""

from __future__ import annotations

import fcntl
import os
import resource
import select
import sys
import time

from .plain import decode, encode
from .processes import cpu_seconds, end_all, others, resident_bytes, shared_bytes
from .syscalls import call_filter
from .worker import receive, run_call, run_checks, run_script, send, serve_calls


TYPE_CHECKING = False  # `typing` itself would cost every run a few milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


TICK = 0.02  # seconds between two looks at the clocks
MESSAGE_BYTES = 16_384


def main(control: int, results: int) -> None:
    """
    Run the tests of a job.

    Args:
        control: File descriptor that the job comes from: a frame with the program, then one per test, and for a test
            program one more. When its other end closes, everything ends.
        results: File descriptor for one frame per test, after an empty one that says that the sandbox stands.
    """
    job = decode(receive(control))
    _lower_privileges(job["user"])
    sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())] + job["paths"]
    supervisor = Supervisor(control, job)
    send(results, b"")
    for _ in range(job["tests"]):
        report = supervisor.run(decode(receive(control)))
        send(results, encode(report))
        if report["status"] in job["stop_at"]:
            break
    os._exit(0)


def _lower_privileges(user: int | None) -> None:
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    set_dumpable(0)  # its memory and files are closed to other processes of the same user
    if os.getpid() != 1:
        _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans come here, as they come to process 1


def set_dumpable(value: int) -> None:
    _prctl(4, value)  # PR_SET_DUMPABLE


def _prctl(option: int, value: int) -> None:
    try:
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
    except (ImportError, AttributeError, OSError):  # not Linux
        pass


class Pipe:
    """
    A pipe from a process, of which no more than a limit is kept.

    Args:
        limit: In bytes.
        tail: Whether the end is kept and the rest let go, instead of the beginning.
    """

    def __init__(self, limit: int, *, tail: bool = False) -> None:
        self.limit = limit
        self.tail = tail
        self.data = bytearray()
        self.overrun = False
        self.read_end, self.write_end = os.pipe()

    def pump(self) -> bool:
        """Take what is there; false at the end."""
        part = os.read(self.read_end, 65_536)
        self.data += part
        if len(self.data) > self.limit:
            self.overrun = not self.tail
            self.data = self.data[-self.limit :] if self.tail else self.data[: self.limit]
        return bool(part)

    def drain(self) -> None:
        """Take what is left without waiting for whoever still holds the other end."""
        os.set_blocking(self.read_end, False)
        try:
            while not self.overrun and self.pump():
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        os.close(self.read_end)
        self.close_write_end()

    def close_write_end(self) -> None:
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1


class Supervisor:
    """
    Runs one test after the other.

    Args:
        control: File descriptor that the tests come from.
        job: The program, its entry point and the limits.
    """

    def __init__(self, control: int, job: dict[str, Any]) -> None:
        self.control = control
        self.job = job
        self.limits = job["limits"]
        self.refuse_calls = call_filter()

    def run(self, test: dict[str, Any]) -> dict[str, Any]:
        """Run a test and return its status, output (bytes), message and seconds."""
        start = time.monotonic()
        out, err, report = Pipe(self.limits["output"]), Pipe(MESSAGE_BYTES, tail=True), Pipe(self._report_limit(test))
        pipes = [out, err, report]
        try:
            processes = self._start(test, *pipes)
            for pipe in pipes:
                pipe.close_write_end()
            stopped, exit_status = self._watch(processes, pipes)
            end_all(processes)
            for pipe in pipes:
                pipe.drain()
        finally:
            for pipe in pipes:
                pipe.close()
        status, output, message = self._judge(test, stopped, exit_status, *pipes)
        return {
            "status": status,
            "output": output,
            "message": message,
            "seconds": time.monotonic() - start,
        }

    def _report_limit(self, test: dict[str, Any]) -> int:
        return self.limits["output"] if test["kind"] == "call" else MESSAGE_BYTES

    # ---- Starting

    def _start(self, test: dict[str, Any], out: Pipe, err: Pipe, report: Pipe) -> list[int]:
        """The ids of the processes that run a test; the one that reports is the first."""
        job, null = self.job, os.open(os.devnull, os.O_RDWR)
        try:
            if test["kind"] == "script":
                stdin = _file_with(test["stdin"])
                files = [stdin, out.write_end, err.write_end, report.write_end]
                processes = [self._fork(files, lambda: run_script(job))]
                os.close(stdin)
            elif test["kind"] == "call":
                files = [null, null, null, report.write_end]
                processes = [self._fork(files, lambda: run_call(job, test["args"], test["kwargs"]))]
            else:
                processes = self._start_checks(null, report)
        finally:
            os.close(null)
        return processes

    def _start_checks(self, null: int, report: Pipe) -> list[int]:
        """The program first: it starts before the checks are read, and holds no way to them."""
        job, control = self.job, self.control
        calls, answers = os.pipe(), os.pipe()
        ends = [null, null, null, calls[0], answers[1]]
        program = self._fork(ends, lambda: serve_calls(job, 3, 4))
        ends = [null, null, null, report.write_end, control, calls[1], answers[0]]
        checks = self._fork(ends, lambda: run_checks(job, 4, 5, 6), secret=True)
        for fd in (*calls, *answers):
            os.close(fd)
        return [checks, program]

    def _fork(self, files: list[int], work: Callable[[], int], *, secret: bool = False) -> int:
        """
        Start a process that has these files, as 0, 1, 2, …, and no others.

        Args:
            files: File descriptors of this process.
            work: What to do; returns the exit status.
            secret: Whether its memory and files stay closed to the other processes. Of the program's own processes
                the supervisor must see how much memory they share.
        """
        pid = os.fork()
        if pid == 0:
            leave = os._exit
            try:
                os.setsid()
                if not secret:
                    set_dumpable(1)
                _take_files(files)
                self._limit()
                self.refuse_calls()
                leave(work())
            except BaseException:
                leave(1)
        return pid

    def _limit(self) -> None:
        def limit(name: str, value: int) -> None:
            try:
                kind = getattr(resource, name)
                hard = resource.getrlimit(kind)[1]
                value = value if hard == resource.RLIM_INFINITY else min(value, hard)
                resource.setrlimit(kind, (value, value))
            except (AttributeError, ValueError, OSError):  # not every system knows every one
                pass

        limits = self.limits
        limit("RLIMIT_AS", limits["memory"])
        limit("RLIMIT_CPU", int(limits["cpu_seconds"]) + 2)  # the supervisor is more exact, and comes first
        limit("RLIMIT_FSIZE", limits["file_size"])
        limit("RLIMIT_NOFILE", 128)
        limit("RLIMIT_STACK", 64 << 20)  # deep recursion is allowed, where Python's own limit is raised
        limit("RLIMIT_CORE", 0)
        limit("RLIMIT_MSGQUEUE", 0)
        if self.job["process_limit"] is not None:
            limit("RLIMIT_NPROC", self.job["process_limit"])

    # ---- Watching

    def _watch(self, processes: list[int], pipes: list[Pipe]) -> tuple[str | None, int | None]:
        """Wait for the first of the processes; returns why it was stopped, if so, and its wait status, if it ended."""
        poll = select.poll()
        poll.register(self.control, 0)  # only whether the other end is closed
        by_fd = {pipe.read_end: pipe for pipe in pipes}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        start = last_look = time.monotonic()
        wait = TICK
        while True:
            for fd, event in poll.poll(wait * 1000):
                if fd == self.control:
                    if event & (select.POLLHUP | select.POLLERR):
                        end_all(processes)
                        os._exit(1)
                elif not by_fd[fd].pump():
                    poll.unregister(by_fd.pop(fd).read_end)
                    wait = 0.001  # all ends closed: it is about to end, or it closed them itself
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:  # orphans too, which would count as running
                if ended[0] == processes[0]:
                    return None, ended[1]
            if any(pipe.overrun for pipe in pipes):
                return "output", None
            now = time.monotonic()
            if now - start > self.limits["seconds"]:
                return "timeout", None
            if now - last_look > TICK:
                last_look, wait = now, TICK if by_fd else min(2 * wait, TICK)
                stopped = self._look(processes)
                if stopped:
                    return stopped, None

    def _look(self, processes: list[int]) -> str | None:
        """The limit that the processes are beyond, if there is one."""
        if sum(map(cpu_seconds, processes)) > self.limits["cpu_seconds"]:
            return "timeout"
        running = others()
        if len(running) > self.limits["processes"]:
            return "processes"
        memory = self.limits["memory"]
        if sum(map(resident_bytes, running)) > memory or shared_bytes(running, memory) > memory:
            return "memory"
        return None

    # ---- Judging

    def _judge(
        self,
        test: dict[str, Any],
        stopped: str | None,
        exit_status: int | None,
        out: Pipe,
        err: Pipe,
        report: Pipe,
    ) -> tuple[str, bytes, str]:
        """Status, output and message. Whether the output is right is not known here."""
        if stopped or out.overrun or report.overrun:
            return stopped or "output", b"", ""
        script = test["kind"] == "script"
        reported = _reported(bytes(report.data))
        if reported is not None and reported[0] in ("syntax", "error", "memory", "output", "wrong"):
            return reported[0], bytes(out.data), str(reported[1])
        ended = None if exit_status is None else os.waitstatus_to_exitcode(exit_status)
        if reported is not None and reported[0] == "ok" and not script and isinstance(reported[1], bytes):
            return "ok", reported[1], ""
        if script and ended == 0:
            return "ok", bytes(out.data), ""
        how = f"was killed by signal {-ended}" if ended is not None and ended < 0 else f"exited with status {ended}"
        missing = "" if script else " before its function returned"
        said = err.data.decode("utf-8", "replace").strip()
        return "error", bytes(out.data), f"The program {how}{missing}." + (f"\n{said}" if said else "")


def _reported(data: bytes) -> tuple[Any, Any] | None:
    """What the process said of itself, if that can be read; the program may have written anything."""
    size, frame = int.from_bytes(data[:8], "big"), data[8:]
    if len(data) < 8 or size > len(frame):
        return None
    try:
        status, value = decode(frame[:size])
    except (ValueError, TypeError):
        return None
    return status, value


# ---- Files


def _file_with(data: bytes) -> int:
    """A file descriptor to read these bytes from, which nobody has to feed."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("stdin")
    else:
        import tempfile

        fd, path = tempfile.mkstemp()
        os.unlink(path)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _take_files(files: list[int]) -> None:
    # First out of the way of each other, then into place
    moved = [os.dup(fd) for fd in files]
    above = max(*moved, len(files)) + 1
    moved = [_dup_above(fd, above) for fd in moved]
    for place, fd in enumerate(moved):
        os.dup2(fd, place)
    os.closerange(len(files), 4096)


def _dup_above(fd: int, least: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD, least)
