"""
Which checkpoints a run can go on from.

A run may be killed while it writes one, and a disk may fill up. transformers would resume from the folder with the
highest number, whole or not.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from . import state


if TYPE_CHECKING:
    from .trainer import VPDTrainer


logger = get_logger(__name__)

# The last file of a checkpoint that the main process writes
TRAINER_STATE = "trainer_state.json"

# Under FSDP and DeepSpeed they are in folders
_WEIGHTS = ("*.safetensors", "pytorch_model*", "global_step*")
_OPTIMIZER = ("optimizer*", "global_step*")


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


def find_fault(checkpoint: str | Path) -> str | None:
    """
    What shows that a checkpoint was not written to its end, or was partly deleted; `None` if nothing does.

    Files are looked at, not read through: a file that was cut off is found, a flipped bit is not.

    Args:
        checkpoint: The folder. Of what each process saves for itself, this process's is looked for.
    """
    folder = Path(checkpoint)
    if not (folder / TRAINER_STATE).exists():
        return f"{TRAINER_STATE}, which is written last, is missing"
    if not _is_json(folder / TRAINER_STATE):
        return f"{TRAINER_STATE} is cut off"
    if not _has_any(folder, _WEIGHTS):
        return "it has no weights"
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors" and not _is_whole_safetensors(path):
            return f"{path.relative_to(folder)} is cut off"
        if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            return f"{path.relative_to(folder)} is cut off"
        if path.name.endswith(".index.json"):
            missing = [name for name in _shards(path) if not (path.parent / name).exists()]
            if missing:
                return f"{missing[0]} is missing"
    if (folder / state.STATE_FILE).exists() and not _has_any(folder, _OPTIMIZER):  # else: save_only_model
        return "optimizer.pt is missing"
    missing = [name for name in _expected(folder) if not (folder / name).exists()]
    return f"{missing[0]} is missing" if missing else None


def _has_any(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _is_whole_safetensors(path: Path) -> bool:
    """Whether a file is as long as its header says."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, MemoryError, OverflowError, KeyError, AttributeError):
        return False
    return path.stat().st_size == 8 + length + max(ends, default=0)


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError):
        return {f"{index.name} is cut off; what it lists"}


def _expected(folder: Path) -> list[str]:
    """Files that a checkpoint with our state has for this process beside the model and its optimizer."""
    if not (folder / state.STATE_FILE).exists():  # save_only_model, or of another trainer
        return []
    saved = torch.load(folder / state.STATE_FILE, map_location="cpu", weights_only=True, mmap=True)
    processes = saved.get("geometry", {}).get("processes", 1)
    rank = PartialState().process_index
    # A scheduler of DeepSpeed's own is in its folder
    expected = [] if _has_any(folder, ("global_step*",)) else ["scheduler.pt"]
    if rank < processes:
        expected.append("rng_state.pth" if processes == 1 else f"rng_state_{rank}.pth")
        if saved.get("within_rollout_batch", False):
            expected.append(state.ROLLOUTS_FILE.format(rank))
    return expected


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
    fault = find_fault(wanted)
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
        OSError: If it could not be written; the message says why, and what there is to go on from.
    """
    if trainer.args.should_save:
        # A run that reuses the folder would leave an earlier run's state beside its own weights if it were killed now
        for name in (TRAINER_STATE, state.STATE_FILE):
            Path(folder, name).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        if not trainer.args.should_save or _is_json(Path(folder, TRAINER_STATE)):
            raise  # what is written last was written; something else failed, such as a push
        message = _why_not(folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(message) from error


def _why_not(folder: str, error: Exception) -> str:
    parent = Path(folder).parent
    # Not `last_whole`, which all processes have to call
    earlier = {step: path for step, path in _numbered(parent).items() if find_fault(path) is None}
    then = f"Go on from {earlier[max(earlier)]}." if earlier else "No earlier checkpoint is there to go on from."
    # What writers say of a full disk is rarely that it is full
    free = shutil.disk_usage(parent).free / 1e9
    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return (
        f"{folder} could not be written, with {free:.2f} GB left on its disk ({reason}). What there was of it has been "
        f"removed. {then}"
    )


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
