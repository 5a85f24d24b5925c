"""Child processes that compare mathematical answers, and can be killed while they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any


STARTUP_SECONDS = 120.0
# The child's own alarm comes first; this is for systems without one, and for a child that was stopped
GRACE_SECONDS = 1.0
ANSWERS_PER_WORKER = 5000  # SymPy's caches grow

_PROGRAM = str(Path(__file__).with_name("math_worker.py"))
# The child finds modules where its parent does, and not beside its own file, where names such as `code` are taken
_START = "import sys; sys.path[:] = sys.argv[3:]; import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"


class Outcome(Enum):
    """
    What became of a request.

    Attributes:
        YES, NO: The child's reply.
        TIMED_OUT: It took too long, or it killed the child.
        NOT_ASKED: The batch's time was over.
    """

    YES = "yes"
    NO = "no"
    TIMED_OUT = "timed out"
    NOT_ASKED = "not asked"


class Deadline:
    """
    When a batch's time is over.

    Args:
        seconds: Time from the first `start`.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end: float | None = None

    def start(self) -> None:
        """Let the time begin, unless it has."""
        if self._end is None:
            self._end = time.monotonic() + self.seconds

    @property
    def passed(self) -> bool:
        """Whether the time has begun, and is over."""
        return self._end is not None and time.monotonic() > self._end


class WorkerError(RuntimeError):
    """The child processes don't start."""


class _Worker:
    """One child process."""

    def __init__(self, memory_limit: int) -> None:
        if not sys.executable:
            raise WorkerError(
                "This interpreter does not know its own path (sys.executable), so it can't start another."
            )
        paths = [str(path) for path in sys.path]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, _PROGRAM, str(memory_limit), *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.asked = 0

    def wait_until_ready(self) -> None:
        reply = self._read(STARTUP_SECONDS)
        if not reply or "ready" not in reply:
            self.kill()
            reason = reply["error"] if reply else f"it ended with {self.process.returncode}, without a word"
            raise WorkerError(f"A process that compares answers with math-verify did not start: {reason}")

    def ask(self, request: dict[str, str], seconds: float) -> Outcome:
        self.asked += 1
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps({**request, "seconds": seconds}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            reply = None
        else:
            reply = self._read(seconds + GRACE_SECONDS)
        if reply is None:
            self.kill()
            return Outcome.TIMED_OUT
        return Outcome.YES if reply["result"] else Outcome.NO

    def _read(self, seconds: float) -> dict[str, Any] | None:
        """The next reply, or `None` if the child ends, or is ended after so many seconds."""
        assert self.process.stdout is not None
        watchdog = threading.Timer(seconds, self.process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            line = self.process.stdout.readline()
        finally:
            watchdog.cancel()
        return json.loads(line) if line.endswith(b"\n") else None

    @property
    def usable(self) -> bool:
        return self.asked < ANSWERS_PER_WORKER and self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # what was not written any more
                pass


class WorkerPool:
    """
    Child processes, started when they are first needed and kept; those that hang or die are replaced.

    It may be used from several threads at once. A forked process starts children of its own.

    Args:
        size: Most child processes at a time.
        memory_limit: Most memory of each, in MiB, where the system can limit it.
    """

    def __init__(self, size: int, memory_limit: int) -> None:
        self.size = size
        self.memory_limit = memory_limit
        self._reset()

    def _reset(self) -> None:
        self._process_id = os.getpid()
        self._workers: list[_Worker] = []  # all that live, for the end
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(self.size)
        weakref.finalize(self, _kill_all, self._workers, self._process_id)

    def run(self, requests: Sequence[dict[str, str]], seconds: float, deadline: Deadline) -> list[Outcome]:
        """
        Send requests, and wait for what becomes of all of them.

        Args:
            requests: The requests.
            seconds: Most time for one.
            deadline: When no more are sent. It is started when a child process is up.

        Raises:
            WorkerError: If no child process can be started.
        """
        if os.getpid() != self._process_id:
            self._inherited = self._workers  # the parent's; not even to be collected
            self._reset()
        call = _Call(self, requests, seconds, deadline)
        threads = [
            threading.Thread(target=call.work, daemon=True, name="math_reward")
            for _ in range(min(self.size, len(requests)))
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl-C
            call.stop()
            raise
        if call.error is not None and Outcome.NOT_ASKED in call.outcomes and not deadline.passed:
            raise call.error  # else others have done its work
        return call.outcomes

    def _take(self) -> _Worker:
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        if worker is not None and worker.usable:
            return worker
        if worker is not None:
            self._discard(worker)
        worker = _Worker(self.memory_limit)
        with self._lock:
            self._workers.append(worker)
        try:
            worker.wait_until_ready()
        except WorkerError:
            self._discard(worker)
            raise
        return worker

    def _give_back(self, worker: _Worker) -> None:
        if worker.usable:
            with self._lock:
                self._idle.append(worker)
        else:
            self._discard(worker)

    def _discard(self, worker: _Worker) -> None:
        worker.kill()
        with self._lock:
            if worker in self._workers:
                self._workers.remove(worker)


class _Call:
    """One call of a pool: the threads that work on it take its requests in turn."""

    def __init__(
        self, pool: WorkerPool, requests: Sequence[dict[str, str]], seconds: float, deadline: Deadline
    ) -> None:
        self.pool = pool
        self.outcomes = [Outcome.NOT_ASKED] * len(requests)
        self.error: Exception | None = None  # of the last thread that gave up
        self._requests = requests
        self._seconds, self._deadline = seconds, deadline
        self._turn = 0
        self._lock = threading.Lock()
        self._in_use: set[_Worker] = set()
        self._stopped = False

    def work(self) -> None:
        """Work through the requests that are left, with a child process of the pool."""
        with self.pool._free:
            worker: _Worker | None = None
            try:
                while self._is_on:
                    if worker is None or not worker.usable:
                        worker = self._change(worker)
                    index = self._next()  # not before: what can't be sent is left to others
                    if index is not None:
                        self.outcomes[index] = worker.ask(self._requests[index], self._seconds)
            except Exception as error:
                self.error = error
            if worker is not None:
                self._in_use.discard(worker)
                self.pool._give_back(worker)

    @property
    def _is_on(self) -> bool:
        return not self._stopped and not self._deadline.passed and self._turn < len(self._requests)

    def _next(self) -> int | None:
        with self._lock:
            if not self._is_on:
                return None
            self._turn += 1
            return self._turn - 1

    def _change(self, worker: _Worker | None) -> _Worker:
        if worker is not None:
            self._in_use.discard(worker)
            self.pool._discard(worker)
        worker = self.pool._take()
        self._in_use.add(worker)
        self._deadline.start()
        return worker

    def stop(self) -> None:
        """End the call: its threads find that their child processes are gone."""
        self._stopped = True
        for worker in list(self._in_use):
            worker.process.kill()


def _kill_all(workers: list[_Worker], process_id: int) -> None:
    if os.getpid() == process_id:
        for worker in workers:
            worker.kill()
