"""
Compares answers with math-verify: a program of its own, which `math_pool` starts and may kill at any time.

It imports nothing of the library, so that it starts in a moment and holds no memory that it doesn't need. Requests and
replies are lines of JSON: `{"gold": …, "seconds": …}` asks whether a reference can be compared with at all, and with
an `"answer"` beside it whether that is equal to it.
"""

from __future__ import annotations

import json
import os
import signal
import sys


MIB = 2**20


def limit_memory(mib: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_CORE):
        wanted = 0 if kind == resource.RLIMIT_CORE else mib * MIB
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        try:
            resource.setrlimit(kind, (wanted, hard))
        except (OSError, ValueError):  # not every system has every limit
            continue


def set_alarm(seconds: float) -> None:
    # Without a handler the kernel ends the process, also where a computation never lets Python run one
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


class Comparison:
    """What math-verify does here: both sides are read as the content of a box."""

    def __init__(self) -> None:
        from math_verify import parse, verify

        self.parse, self.verify = parse, verify

    def read(self, expression: str) -> list:
        return self.parse(f"\\boxed{{{expression}}}", parsing_timeout=None)

    def can_be_compared(self, gold: str) -> bool:
        read = self.read(gold)
        if not any(not isinstance(value, str) for value in read):
            return False
        # A reference that can't be worked out is found here, and not held against the answers
        self.verify(read, self.read("0"), timeout_seconds=None)
        return True

    def equal(self, gold: str, answer: str) -> bool:
        return bool(self.verify(self.read(gold), self.read(answer), timeout_seconds=None))


def serve(memory_limit: int) -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no reply

    def reply(**fields: object) -> None:
        replies.write(json.dumps(fields) + "\n")
        replies.flush()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer's to handle
    try:
        comparison = Comparison()
        comparison.equal("1", "x+1")  # loads the rest
    except Exception as error:
        reply(error=f"{type(error).__name__}: {error}")
        return
    limit_memory(memory_limit)
    reply(ready=True)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        set_alarm(request["seconds"])
        try:
            if "answer" in request:
                result = comparison.equal(request["gold"], request["answer"])
            else:
                result = comparison.can_be_compared(request["gold"])
        except Exception:  # out of memory, too deep
            result = False
        set_alarm(0)
        reply(result=result)


if __name__ == "__main__":
    serve(memory_limit=int(sys.argv[2]))
