"""Looking at and ending the processes of the sandbox. Runs inside it: the standard library alone is imported."""

from __future__ import annotations

import os
import time


SIGKILL = 9


def cpu_seconds(pid: int) -> float:
    """Processor time of a process; 0 if it is gone."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # the clock id that clock_getcpuclockid gives
    except OSError:
        return 0.0


def resident_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def shared_bytes(pids: list[int], enough: int) -> int:
    """
    Memory that these processes may share and that counts as resident in none that has not touched it.

    Args:
        pids: The processes.
        enough: The files that tell exactly are only read if there is more than this at first sight.
    """
    roughly = {pid: _not_private_bytes(pid) for pid in pids}
    if sum(roughly.values()) <= enough:
        return 0
    objects: dict[tuple[str, str], int] = {}
    unknown = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/maps", "rb") as file:
                lines = file.read().decode("utf-8", "replace").splitlines()
        except ProcessLookupError:
            continue
        except OSError:  # it hides itself
            unknown += roughly[pid]
            continue
        for line in lines:
            if line.endswith("/dev/zero (deleted)"):  # what the kernel calls shared memory without a file
                addresses, _, offset, device, inode, *_ = line.split()
                begin, end = (int(part, 16) for part in addresses.split("-"))
                size = int(offset, 16) + end - begin
                objects[device, inode] = max(size, objects.get((device, inode), 0))
    return unknown + sum(objects.values())


def _not_private_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            size, _, _, _, _, data, _ = map(int, file.read().split())
        return (size - data) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def others() -> list[int]:
    """All processes that come from this one."""
    if os.getpid() == 1:
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]
    found, todo = [], [os.getpid()]
    while todo:
        parent = todo.pop()
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", "rb") as file:
                    children = [int(pid) for pid in file.read().split()]
                found += children
                todo += children
        except OSError:  # gone meanwhile
            continue
    return found


def end_all(processes: list[int]) -> None:
    """Kill these processes and all that come from them, which are all of the sandbox but this, and await their end."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if os.getpid() == 1:
            _kill(-1)  # all at once, so that none can start another meanwhile
        else:
            for pid in (*map(int.__neg__, processes), *others()):  # each leads a group of its own
                _kill(pid)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.001)
        except ChildProcessError:
            return


def _kill(pid: int) -> None:
    try:  # noqa: SIM105 - `contextlib` would have to be imported
        os.kill(pid, SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
