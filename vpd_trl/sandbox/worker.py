"""
The processes of the sandbox that run a program, or a test program's checks of it.

Runs inside the sandbox, in a bare interpreter: it imports the standard library alone, and little of it at the start.
"""

from __future__ import annotations

import os
import sys

from .plain import decode, encode


TYPE_CHECKING = False  # `typing` itself would cost every run a few milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any


FILE = "solution.py"
REPORT = 3  # file descriptor for what the program's wrapper has to say
READY = b"go"
MAX_MESSAGE = 4000  # characters

# The program may replace what is in `os`
_read, _write, _exit = os.read, os.write, os._exit


class ProgramFailed(BaseException):
    """The program could not answer a call. No `Exception`, so that no test takes it for one of the program's own."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


# ---- Frames: a length and that many bytes


def send(fd: int, data: bytes) -> None:
    view = memoryview(len(data).to_bytes(8, "big") + data)
    while view:
        view = view[_write(fd, view) :]


def receive(fd: int, limit: int | None = None) -> bytes:
    """
    The bytes of the next frame, and not one beyond it.

    Raises:
        EOFError: If there is none.
        OverflowError: If it is longer than the limit.
    """
    size = int.from_bytes(_exactly(fd, 8), "big")
    if limit is not None and size > limit:
        raise OverflowError(size)
    return _exactly(fd, size)


def _exactly(fd: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = _read(fd, min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


# ---- The program


def run_script(job: dict[str, Any]) -> int:
    """Run the program as a script and return its exit status; an error goes to `REPORT`."""
    _open_streams()
    status: Any = 0
    try:
        _execute(job, "__main__")
    except SystemExit as error:
        status = error.code
        if status is not None and not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException as error:
        send(REPORT, encode(_describe(error, job["program"])))
        status = 1
    _finalize()
    return (status or 0) & 0xFF


def run_call(job: dict[str, Any], args: tuple, kwargs: dict[str, Any]) -> int:
    """Call the program's function once; its value, or the error, goes to `REPORT`."""
    _open_streams()
    answer, _ = _answer(lambda: _function(job)(*args, **kwargs), job["program"])
    send(REPORT, answer)
    return 0


def serve_calls(job: dict[str, Any], calls: int, answers: int) -> int:
    """Answer calls of the program's function until there are no more; the program starts with the first."""
    _open_streams()
    receive(calls)  # READY: only now do the tests stand where the program can't stop them
    function: Any = None
    while True:
        try:
            args, kwargs = decode(receive(calls))
        except EOFError:
            return 0
        if function is None:
            answer, function = _answer(lambda: _function(job), job["program"], plain=False)
            if function is None:
                send(answers, answer)
                return 0
        call: Callable[[], Any] = lambda: function(*args, **kwargs)  # noqa: B023, E731 - called at once
        answer, _ = _answer(call, job["program"])
        send(answers, answer)


def _answer(call: Callable[[], Any], program: str, plain: bool = True) -> tuple[bytes, Any]:
    """What to report of a call, and its value."""
    try:
        value = call()
    except BaseException as error:
        return encode(_describe(error, program)), None
    try:
        return encode(("ok", encode(value) if plain else b"")), value
    except MemoryError:
        return encode(("memory", "")), None
    except BaseException as error:
        return encode(("error", f"The function returned {error}, which is not plain data.")), None


def _function(job: dict[str, Any]) -> Callable[..., Any]:
    """The function to test: a global of the program, or else a method of its class `Solution`."""
    name = job["entry_point"]
    try:
        # Not "__main__": demonstrations under that name stay out
        names = _execute(job, "solution")
    except SystemExit:
        raise ProgramFailed("error", "The program exits before its function can be called.") from None
    if name in names:
        return names[name]
    if hasattr(names.get("Solution"), name):
        return getattr(names["Solution"](), name)
    raise ProgramFailed("error", f"The program defines no function {name!r}.")


def _execute(job: dict[str, Any], name: str) -> dict[str, Any]:
    module = type(sys)(name)
    sys.modules[name] = module
    names = module.__dict__
    if job["preamble"]:
        exec(compile(job["preamble"], "preamble.py", "exec", dont_inherit=True), names)
    try:
        code = compile(job["program"], FILE, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:  # ValueError: a NUL or half a surrogate pair
        raise ProgramFailed("syntax", _describe(error, job["program"])[1]) from None
    exec(code, names)
    return names


def _open_streams() -> None:
    """Give the program streams on its own file descriptors, and what a bare interpreter lacks."""
    import builtins

    options: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "closefd": False}
    for fd, mode, name in ((0, "r", "stdin"), (1, "w", "stdout"), (2, "w", "stderr")):
        stream = open(fd, mode, **options)  # noqa: SIM115 - the program's, to its end
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = [FILE]
    if not hasattr(builtins, "exit"):  # `site` would have added them
        from _sitebuiltins import Quitter

        builtins.exit = Quitter("exit", "Ctrl-D")
        builtins.quit = Quitter("quit", "Ctrl-D")
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)  # long integers are no error here; they cost time, which is limited


def _finalize() -> None:
    """What an interpreter does at its end, but for freeing everything, which can take long."""
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        import atexit

        atexit._run_exitfuncs()
    except BaseException:
        pass
    for stream in (sys.stdout, sys.stderr):
        try:  # noqa: SIM105 - `contextlib` would have to be imported
            stream.flush()
        except BaseException:
            pass


def _describe(error: BaseException, program: str) -> tuple[str, str]:
    """The status that an exception stands for, and a traceback of the program's own lines."""
    if isinstance(error, ProgramFailed):
        return error.status, error.message
    if isinstance(error, MemoryError):
        return "memory", ""
    try:
        import linecache
        import traceback

        linecache.cache[FILE] = (len(program), None, program.splitlines(keepends=True), FILE)
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == FILE]
        text = "".join(traceback.format_exception_only(type(error), error))
        if frames:
            lines = traceback.StackSummary.from_list(frames).format()
            text = "Traceback (most recent call last):\n" + "".join(lines) + text
    except MemoryError:
        return "memory", ""
    except BaseException:
        text = type(error).__name__
    if len(text) > MAX_MESSAGE:
        text = text[: MAX_MESSAGE // 2] + "\n[...]\n" + text[-MAX_MESSAGE // 2 :]
    return "error", text.strip()


# ---- The checks


def run_checks(job: dict[str, Any], control: int, calls: int, answers: int) -> int:
    """
    Run a test program, whose `candidate` is a call to the program in its process, and report to `REPORT`.

    The test program is read here, where the program's process has no part of it.
    """
    test = decode(receive(control))
    os.close(control)
    send(calls, READY)
    last: list[str] = []

    def candidate(*args: Any, **kwargs: Any) -> Any:
        send(calls, encode((args, kwargs)))
        try:
            status, value = decode(receive(answers, job["limits"]["output"]))
            value = decode(value) if status == "ok" else str(value)
        except EOFError:
            raise ProgramFailed("error", "The program ended before it returned a value.") from None
        except OverflowError:
            raise ProgramFailed("output", "") from None
        except (ValueError, TypeError):
            raise ProgramFailed("error", "The program's value could not be read.") from None
        if status != "ok":
            raise ProgramFailed(str(status), value)
        last[:] = [f"{_shown(args, kwargs)} returned {_short(value)}"]
        return value

    try:
        _check(test, job, candidate)
        report: tuple[str, Any] = ("ok", b"")
    except ProgramFailed as error:
        report = (error.status, error.message)
    except MemoryError:
        report = ("memory", "")
    except BaseException as error:
        report = ("wrong", "\n".join([*_failed_line(error, test["code"]), *last]))
    send(REPORT, encode(report))
    return 0


def _check(test: dict[str, str], job: dict[str, Any], candidate: Callable[..., Any]) -> None:
    names: dict[str, Any] = {"__name__": "tests"}
    exec(compile(test["setup"], "setup.py", "exec", dont_inherit=True), names)
    candidate.__name__ = job["entry_point"]
    names[job["entry_point"]] = candidate
    exec(compile(test["code"], "tests.py", "exec", dont_inherit=True), names)
    if "check" in names:
        names["check"](candidate)


def _failed_line(error: BaseException, code: str) -> Iterator[str]:
    """The line of the test program that failed, and how if it was no assertion."""
    lines, trace, found = code.splitlines(), error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "tests.py" and trace.tb_lineno is not None:
            found = trace.tb_lineno
        trace = trace.tb_next
    if found is not None and found <= len(lines):
        yield lines[found - 1].strip()[:MAX_MESSAGE]
    text = str(error)
    if text or not isinstance(error, AssertionError):
        yield f"{type(error).__name__}: {text}"[:MAX_MESSAGE]


def _shown(args: tuple, kwargs: dict[str, Any]) -> str:
    parts = [*map(_short, args), *(f"{key}={_short(value)}" for key, value in kwargs.items())]
    return f"The last call, with arguments ({', '.join(parts)}),"


def _short(value: Any, limit: int = 250) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = hex(value) if isinstance(value, int) else f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[:limit] + "..."
