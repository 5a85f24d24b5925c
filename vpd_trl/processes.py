"""Several processes acting as one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import gather_object


class StoppedTogether(RuntimeError):
    """Raised on a process because of another one. All processes know of it, so none waits for this one."""


def meet(accelerator: Any, place: str, value: Any = None, *, error: Exception | None = None) -> list[Any]:
    """
    The values of all processes, each of which must come to this place.

    Args:
        accelerator: The accelerator.
        place: What the processes are about to do together, in words.
        value: This process's value.
        error: What this process failed with; it has to raise it itself then.

    Raises:
        StoppedTogether: If another process failed, or came to another place: these two would wait for each other in
            different collectives, for ever or with each other's values.
    """
    if accelerator.num_processes == 1:
        return [value]
    failed = None
    if error is not None:
        notes = " ".join(getattr(error, "__notes__", []))
        failed = f"{type(error).__name__}: {error} {notes}".strip()
    met = gather_object([(accelerator.process_index, place, value, failed)])
    if error is None:
        for process, _, _, text in met:
            if text is not None:
                raise StoppedTogether(f"Process {process} failed, so all stop. {text}")
        if len({other for _, other, _, _ in met}) > 1:
            where = "; ".join(f"process {process} is at {other}" for process, other, _, _ in met)
            raise StoppedTogether(
                f"All processes must call generate() equally often, also with an empty list: {where}."
            )
    return [value for _, _, value, _ in met]


@contextmanager
def stop_together(accelerator: Any) -> Iterator[None]:
    """
    If the block raises on one process, all processes stop with its error instead of waiting for it for ever.

    The failing process raises its own exception, the others a [`StoppedTogether`] that carries its text.
    """
    error: Exception | None = None
    try:
        yield
    except StoppedTogether:
        raise
    except Exception as caught:
        error = caught
    meet(accelerator, "the end of its work", error=error)
    if error is not None:
        raise error
