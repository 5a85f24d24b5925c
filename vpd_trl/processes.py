"""Several processes acting as one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import gather_object


@contextmanager
def stop_together(accelerator: Any) -> Iterator[None]:
    """
    If the block raises on one process, all processes stop with its error instead of waiting for it for ever.

    The failing process raises its own exception, the others a `RuntimeError` that carries its text.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if accelerator.num_processes > 1:
        failed = None
        if error is not None:
            notes = " ".join(getattr(error, "__notes__", []))
            failed = f"{type(error).__name__}: {error} {notes}".strip()
        failures = gather_object([(accelerator.process_index, failed)])
        if error is None:
            for process, text in failures:
                if text is not None:
                    raise RuntimeError(f"Process {process} failed, so all stop. {text}")
    if error is not None:
        raise error
