"""One sandbox seen from outside: it is sent its job, what it says is read, and it is ended."""

from __future__ import annotations

import os
import selectors
import subprocess
import threading
import time
from typing import Any

from .isolation import ENVIRONMENT, Isolation, supervisor_code
from .plain import decode


MESSAGE_BYTES = 4096
POLL_SECONDS = 0.1  # between two looks at whether the run was cancelled


class Channel:
    """
    Starts a sandbox, and ends it with everything in it when left.

    Args:
        how: How it is isolated.
        frames: What is sent to it, at once.
        packages: Whether installed packages are shown.
        folder: Its working directory, where it has no files of its own.
        cancelled: Ends `receive` when set.
        longest: Most bytes of what it may say at once.
    """

    def __init__(
        self,
        how: Isolation,
        frames: list[bytes],
        packages: bool,
        folder: str | None,
        cancelled: threading.Event,
        longest: int,
    ) -> None:
        self._how = how
        self._packages = packages
        self._folder = folder
        self._cancelled = cancelled
        self._longest = longest
        self._code = supervisor_code()
        parts = [self._code]
        for frame in frames:
            parts += [len(frame).to_bytes(8, "big"), frame]
        self._to_send = memoryview(b"".join(parts))
        self._received = bytearray()
        self._said = bytearray()
        self.ended = False  # by itself

    def __enter__(self) -> Channel:
        control, self._control = os.pipe()
        self._results, results = os.pipe()
        try:
            self._process = subprocess.Popen(
                self._how.command(control, results, len(self._code), self._packages),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(control, results),
                env=ENVIRONMENT | ({} if self._folder is None else {"HOME": self._folder, "TMPDIR": self._folder}),
                cwd=self._folder or "/",
                start_new_session=True,
            )
        except BaseException:
            os.close(self._control)
            os.close(self._results)
            raise
        finally:
            os.close(control)
            os.close(results)
        assert self._process.stderr is not None
        self._errors = self._process.stderr.fileno()
        self._selector = selectors.DefaultSelector()
        for fd in (self._results, self._errors, self._control):
            os.set_blocking(fd, False)
        self._selector.register(self._results, selectors.EVENT_READ)
        self._selector.register(self._errors, selectors.EVENT_READ)
        self._selector.register(self._control, selectors.EVENT_WRITE)
        return self

    def __exit__(self, *_: Any) -> None:
        self._selector.close()
        # The supervisor sees that nobody is there any more, and ends all processes before itself. Only where it can't
        # does the kill below count, which reaches what is in a namespace of processes, and no more than itself elsewhere
        os.close(self._control)
        os.close(self._results)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        try:
            while part := os.read(self._errors, 65_536):
                self._hear(part)
        except BlockingIOError:
            pass
        if self._process.stderr is not None:
            self._process.stderr.close()

    def receive(self, deadline: float) -> Any:
        """
        What the sandbox says next; `None` if it ends, or says nothing that can be read, or nothing in time.

        Args:
            deadline: On the monotonic clock.
        """
        while True:
            size = int.from_bytes(self._received[:8], "big")
            if size > self._longest:
                return None
            if len(self._received) >= 8 and len(self._received) >= 8 + size:
                frame = bytes(self._received[8 : 8 + size])
                del self._received[: 8 + size]
                if not frame:
                    return True
                try:
                    return decode(frame)
                except ValueError:
                    return None
            left = deadline - time.monotonic()
            if left <= 0 or self._cancelled.is_set() or not self._turn(min(left, POLL_SECONDS)):
                return None

    def _turn(self, seconds: float) -> bool:
        """Send and read what can be; false at the end."""
        for key, _ in self._selector.select(seconds):
            if key.fd == self._control:
                self._send()
            elif key.fd == self._errors:
                part = os.read(self._errors, 65_536)
                self._hear(part)
                if not part:
                    self._selector.unregister(self._errors)
            else:
                part = os.read(self._results, 65_536)
                self._received += part
                if not part:
                    self.ended = True
                    return False
        return True

    def _send(self) -> None:
        try:
            self._to_send = self._to_send[os.write(self._control, self._to_send[: 1 << 20]) :]
        except BrokenPipeError:
            self._to_send = self._to_send[:0]
        if not self._to_send:
            self._selector.unregister(self._control)

    def _hear(self, part: bytes) -> None:
        self._said = (self._said + part)[-MESSAGE_BYTES:]

    def said(self) -> str:
        """What it wrote as errors; after its end."""
        return self._said.decode("utf-8", "replace").strip() or "it said nothing"
