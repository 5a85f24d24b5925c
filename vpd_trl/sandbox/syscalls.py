"""
System calls that programs don't get. Runs inside the sandbox: the standard library alone is imported.

Refused are those that take memory which no process is charged with, those that open parts of the kernel which no
program needs here (namespaces, tracing, eBPF, io_uring, keys), and sockets, but for pairs of them with buffers of the
usual size.
"""

from __future__ import annotations

import os


TYPE_CHECKING = False  # `typing` itself would cost every run a few milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable

# Numbers on x86-64 and 64-bit ARM, from the kernel's unistd.h
_REFUSED = {
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "socket": (41, 198),
    "setsockopt": (54, 208),
    "vmsplice": (278, 75),
    "unshare": (272, 97),
    "setns": (308, 268),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CLONE_NEWUSER = 0x10000000
_X32 = 0x40000000  # of the numbers of another interface, in which the same calls have other ones

_ALLOW, _ERROR, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050000, 1, 38
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # where they are in the kernel's record of a call


def call_filter() -> Callable[[], None]:
    """
    A function that refuses the calls to its process and all that come from it; on other processors it does nothing.

    What takes time is done here, once for all processes.
    """
    column, architecture = _ARCHITECTURES.get(os.uname().machine, (-1, 0))
    if column < 0:
        return lambda: None
    import ctypes

    program = b"".join(
        code.to_bytes(2, "little") + bytes((yes, no)) + value.to_bytes(4, "little")
        for code, yes, no, value in _filter(column, architecture)
    )

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    prctl, pointer = ctypes.CDLL(None).prctl, ctypes.byref(Program(len(program) // 8, program))

    def refuse() -> None:
        prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, without which only root may
        prctl(22, 2, pointer, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER

    return refuse


def _filter(column: int, architecture: int) -> list[tuple[int, int, int, int]]:
    """Instructions for the kernel: code, how many to skip if it holds and if not, value."""
    refuse = (_RETURN, 0, 0, _ERROR | _EPERM)
    steps = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), refuse]
    steps += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), refuse]
    for numbers in _REFUSED.values():
        steps += [(_EQUAL, 0, 1, numbers[column]), refuse]
    # Its flags are in memory, where a filter can't look: without it the C library takes `clone`
    steps += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERROR | _ENOSYS)]
    steps += [(_EQUAL, 0, 3, _CLONE[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_ANY_BIT, 0, 1, _CLONE_NEWUSER), refuse]
    return [*steps, (_RETURN, 0, 0, _ALLOW)]
