"""
Running programs that a model wrote.

What was tried against it, and what holds at which level of isolation (`tests/test_sandbox.py` tries each of these):

| attempt                                                           | bubblewrap | limits    |
|-------------------------------------------------------------------|------------|-----------|
| a loop that catches every exception and signal, sleeping threads  | holds      | holds     |
| a fork bomb                                                       | holds      | holds     |
| a grandchild in a session of its own that holds the output pipe   | holds      | holds     |
| raising its own limits                                            | holds      | holds (1) |
| 10 GB at once, in steps, or spread over processes                 | holds      | holds     |
| memory that no process is charged with (memfd, System V, sockets) | holds (2)  | holds (2) |
| shared memory that the process which holds it never touched       | holds      | holds     |
| a flood of output, binary output                                  | holds      | holds     |
| results that take the trainer hours or gigabytes to read          | holds      | holds     |
| one large file                                                    | holds      | holds     |
| many files that fill the disk                                     | holds      | not       |
| reading the environment                                           | holds      | holds (3) |
| reading the home folder and other files                           | holds      | not       |
| connecting to loopback or anywhere                                | holds      | holds (2) |
| exit statuses, printed verdicts, replaced builtins, `==` of own   | holds      | holds     |
| forging the report of the process that runs it                    | holds      | holds     |
| finding expected values or the test program in memory or files    | holds      | not       |
| changing the test program or the interpreter's files              | holds      | not       |
| changing settings of the kernel in /proc                          | holds      | holds (1) |
| ending or stopping the supervisor                                 | holds      | not (4)   |
| deep recursion, integers of 5,000 digits                          | holds      | holds     |

(1) But not where this process is root and other users can't read the interpreter: programs are root then.
(2) On x86-64 and 64-bit ARM; elsewhere only the network is closed, and that by bubblewrap alone.
(3) Its own, which is nearly empty; not that of other processes of the same user.
(4) The test then counts as failed, but what the program started can outlive it.

Not tried, and not claimed: errors of the kernel, and what small things it keeps for a program (names of files, locks,
terminals) while that runs.
"""

from .cases import CallTest, CheckTest, CodeTests, StdinTest, parse_tests
from .compare import same_text, same_value
from .isolation import SandboxUnavailable
from .outcome import CaseResult, Outcome, Status
from .run import Limits, Sandbox
from .runner import CodeRunner


__all__ = [
    "CallTest",
    "CaseResult",
    "CheckTest",
    "CodeRunner",
    "CodeTests",
    "Limits",
    "Outcome",
    "Sandbox",
    "SandboxUnavailable",
    "Status",
    "StdinTest",
    "parse_tests",
    "same_text",
    "same_value",
]
