"""
Which checkpoints a run can go on from.

A run may be killed while it writes one, and a disk may fill up. transformers would resume from the folder with the
highest number, whole or not.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from . import state
from .checkpoint_faults import TRAINER_STATE, find_fault, is_json
from .processes import StoppedTogether, meet


if TYPE_CHECKING:
    from .trainer import VPDTrainer


logger = get_logger(__name__)


def last_whole(folder: str | Path) -> Path | None:
    """
    The checkpoint of the latest step in a folder, of those that are whole.

    All processes have to call it, and agree. Those that are not whole are warned of.
    """
    faults = {step: find_fault(path) for step, path in _numbered(folder).items()}
    whole = [step for step, fault in faults.items() if fault is None]
    damaged = {step: fault for step, fault in faults.items() if fault is not None}
    if PartialState().num_processes > 1:
        # Each looks at its own files too, so that a checkpoint is whole if all say so
        found = gather_object([(whole, damaged)])
        whole = sorted(set.intersection(*(set(numbers) for numbers, _ in found)))
        damaged = {number: fault for _, faults in found for number, fault in faults.items()}
    last = max(whole, default=-1)
    for number, fault in damaged.items():
        if number > last:
            logger.warning(f"{PREFIX_CHECKPOINT_DIR}-{number} is passed over, as it is not whole: {fault}.")
    return Path(folder) / f"{PREFIX_CHECKPOINT_DIR}-{last}" if whole else None


def _numbered(folder: str | Path) -> dict[int, Path]:
    """The checkpoints of a folder by their steps, whole or not."""
    paths = {
        p.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"): p for p in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    }
    return {int(step): path for step, path in paths.items() if step.isdigit() and path.is_dir()}


# ---- Going on


def to_resume(trainer: VPDTrainer, wanted: str | bool | None) -> str | None:
    """
    The folder that `train(resume_from_checkpoint=wanted)` goes on from; `None` to start anew.

    Raises:
        ValueError: If there is no whole checkpoint, or the one that is named is not whole.
    """
    if not wanted:
        return None
    folder = trainer.args.output_dir
    if wanted is True:
        last = last_whole(folder)
        if last is None:
            raise ValueError(f"resume_from_checkpoint=True, but {folder} has no checkpoint that is whole.")
        return str(last)
    # A process that raised alone would be waited for
    faults = meet(trainer.accelerator, "what to go on from", find_fault(wanted))
    fault = next((fault for fault in faults if fault is not None), None)
    if fault is not None:
        others = f"resume_from_checkpoint=True takes the last one that is whole of those in {folder}."
        raise ValueError(f"{wanted} is no checkpoint to go on from: {fault}. {others}")
    return str(wanted)


def is_finished(trainer: VPDTrainer, checkpoint: str) -> bool:
    """Whether a checkpoint is of the last step. From there transformers would train one step too many."""
    step = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE)).global_step
    return 0 < trainer.args.max_steps <= step


def load_finished(trainer: VPDTrainer, checkpoint: str) -> TrainOutput:
    """
    Bring a trainer to the end of a run that was stopped between its last step and its end.

    Raises:
        ValueError: If an engine shards the model, which can't be loaded before training then.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            f"{checkpoint} is of the last step: there is nothing left to train. Its weights are in that folder; where they "
            "are sharded, accelerate merge-weights or DeepSpeed's zero_to_fp32.py makes one model of them."
        )
    trainer.state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE))
    best = trainer.state.best_model_checkpoint
    folder = best if trainer.args.load_best_model_at_end and best is not None else checkpoint
    trainer._load_from_checkpoint(folder)
    if folder == best:
        trainer.weights_step = trainer.state.best_global_step
    if trainer.parts.uses_feedback:
        state.load_teacher(trainer, folder)
    losses = [row["train_loss"] for row in trainer.state.log_history if "train_loss" in row]
    return TrainOutput(trainer.state.global_step, losses[-1] if losses else float("nan"), {})


# ---- Writing


@contextmanager
def writing(trainer: VPDTrainer, folder: str) -> Iterator[None]:
    """
    Around the writing of a checkpoint: what was begun and can't be ended is removed, and earlier ones stay.

    Raises:
        OSError: If this process could not write its part; the message says why, and what there is to go on from.
        StoppedTogether: If another process could not.
    """
    main = trainer.args.should_save
    if main:
        # A run that reuses the folder would leave an earlier run's state beside its own weights if it were killed now
        for name in (TRAINER_STATE, state.STATE_FILE):
            Path(folder, name).unlink(missing_ok=True)
    parts = _Parts(trainer)
    try:
        with parts.waited_for():
            yield
        meet(trainer.accelerator, "the end of a checkpoint")
    except StoppedTogether:
        if main and not is_json(Path(folder, TRAINER_STATE)):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except Exception as error:
        # If what is written last was written, something else failed, such as a push
        whole = is_json(Path(folder, TRAINER_STATE)) if main else parts.are_written
        told = error if whole else OSError(_why_not(trainer, folder, error))
        # Before, others may wait elsewhere, such as for parts of weights, and can't be told. They get no further than the
        # last part: none calls the checkpoint whole, and launchers end them with this process
        if parts.began_last:
            with suppress(Exception):  # this error is the one to raise, also if another process has ended meanwhile
                meet(trainer.accelerator, "the end of a checkpoint", error=told)
        if whole:
            raise
        if main:
            shutil.rmtree(folder, ignore_errors=True)
        raise told from error


class _Parts:
    """What each process writes of a checkpoint for itself, the random states last."""

    def __init__(self, trainer: VPDTrainer) -> None:
        self.trainer = trainer
        self.began_last = self.are_written = False

    @contextmanager
    def waited_for(self) -> Iterator[None]:
        """The main process calls the checkpoint whole, and deletes earlier ones, when all have written their parts."""
        write_last = self.trainer._save_rng_state

        def write_last_and_meet(output_dir: str) -> None:
            self.began_last = True
            write_last(output_dir)
            meet(self.trainer.accelerator, "the end of its part of a checkpoint")
            self.are_written = True

        self.trainer._save_rng_state = write_last_and_meet
        try:
            yield
        finally:
            del self.trainer._save_rng_state


def _why_not(trainer: VPDTrainer, folder: str, error: Exception) -> str:
    parent = Path(folder).parent
    # Not `last_whole`, which all processes have to call
    others = {step: path for step, path in _numbered(parent).items() if path.name != Path(folder).name}
    earlier = {step: path for step, path in others.items() if find_fault(path) is None}
    then = f"Go on from {earlier[max(earlier)]}." if earlier else "No earlier checkpoint is there to go on from."
    # What writers say of a full disk is rarely that it is full
    free = shutil.disk_usage(parent).free / 1e9
    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    accelerator = trainer.accelerator
    who = f" by process {accelerator.process_index}" if accelerator.num_processes > 1 else ""
    left = (
        "What there was of it has been removed." if trainer.args.should_save else "What there is of it is not whole."
    )
    return f"{folder} could not be written{who}, with {free:.2f} GB left on its disk ({reason}). {left} {then}"


def check_folder(args: Any) -> None:
    """
    Check that the output folder can be written to, before any work.

    Raises:
        OSError: If it can't.
    """
    if not args.should_save:
        return
    probe = Path(args.output_dir) / ".vpd_write_test"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink(missing_ok=True)  # another process may have been here
    except OSError as error:
        raise type(error)(
            error.errno, f"output_dir can't be written to ({error.strerror}); choose another folder", args.output_dir
        ) from None
