"""Several processes acting as one."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
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
    # Nearly always this one tensor says it all: nobody failed, all are here, and the value is a number or nothing
    number = value if type(value) is int else 0
    plain = error is None and (value is None or type(value) is int)
    row = [zlib.crc32(place.encode()), int(plain), int(value is not None), number]
    rows = accelerator.gather(torch.tensor([row], device=accelerator.device)).tolist()
    if all(is_plain and where == row[0] for where, is_plain, _, _ in rows):
        return [number if has_value else None for _, _, has_value, number in rows]
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
