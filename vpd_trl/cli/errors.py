"""What a command says in one line when it can't go on, and the exit code that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


FAILED, BAD_USAGE, INTERRUPTED = 1, 2, 130


class UsageError(Exception):
    """What was asked for can't be done, as the message says: an argument, a configuration, a file."""


class Interrupted(Exception):
    """A run was stopped by a signal and has saved what it takes to go on; the message says how."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Within this block, errors that are due to arguments become [`UsageError`]s."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UsageError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def suggestion(name: str, known: Iterable[str]) -> str:
    """`" Did you mean …?"` with the name that is most like one that isn't known, or nothing."""
    wanted = name.lower().replace("-", "_")
    close = difflib.get_close_matches(wanted, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""
