"""
Which checkpoints a run can go on from.

A run may be killed while it writes one, and a disk may fill up. transformers would resume from the folder with the
highest number, whole or not.
"""

from __future__ import annotations

import json
import os
import pickletools
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from . import state
from .processes import StoppedTogether, meet


if TYPE_CHECKING:
    from .trainer import VPDTrainer


logger = get_logger(__name__)

# The last file of a checkpoint that the main process writes
TRAINER_STATE = "trainer_state.json"

# Under FSDP and DeepSpeed they are in folders
_WEIGHTS = ("*.safetensors", "pytorch_model*", "global_step*")
_OPTIMIZER = ("optimizer*", "global_step*")
_SHARDED = ("pytorch_model*", "optimizer*")

# Other programs call their files ".bin" too
_TORCH_BINS = ("pytorch_model", "optimizer", "adapter_model", "training_args")
# How files began that `torch.save` wrote before it wrote zip files: with this magic number, pickled
_EARLIER_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Such as zero_pp_rank_1_mp_rank_00_optim_states.pt of DeepSpeed and pytorch_model_fsdp_0_rank1.bin of FSDP
_OF_A_PROCESS = re.compile(r"(zero_pp_rank_|_rank)\d+(?=_mp_rank_|\.bin$)")


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

    Files are looked at, not read through: a file that was cut off is found, a flipped bit is not. Nothing is found in a
    torch file of the format before zip files, unless it is empty, as nothing at its end tells that it is whole.

    Args:
        checkpoint: The folder. Of what each process saves for itself, this process's is looked for.
    """
    try:
        return next(_faults(Path(checkpoint)), None)
    except Exception as error:  # raising on one process alone, it would leave the others waiting
        return f"it can't be read ({type(error).__name__}: {error})"


def _faults(folder: Path) -> Iterator[str]:
    if not (folder / TRAINER_STATE).exists():
        yield f"{TRAINER_STATE}, which is written last, is missing"
    if not _is_json(folder / TRAINER_STATE):
        yield f"{TRAINER_STATE} is cut off"
    if not _has_any(folder, _WEIGHTS):
        yield "it has no weights"
    for path in sorted(folder.rglob("*")):
        if not _is_whole(path):
            yield f"{path.relative_to(folder)} is cut off"
        if path.name.endswith(".index.json"):
            yield from (f"{name} is missing" for name in _shards(path) if not (path.parent / name).exists())
    for path in sorted(path for pattern in _SHARDED for path in folder.glob(pattern) if path.is_dir()):
        yield from _faults_of_sharded(path)
    if _has_any(folder, ("global_step*",)):
        yield from _faults_of_deepspeed(folder)
    if (folder / state.STATE_FILE).exists() and not _has_any(folder, _OPTIMIZER):  # else: save_only_model
        yield "optimizer.pt is missing"
    yield from (f"{name} is missing" for name in _expected(folder) if not (folder / name).exists())


def _faults_of_sharded(folder: Path) -> Iterator[str]:
    """Of a state dict in torch's distributed format, of which each process wrote a part and the main one an index."""
    index = folder / ".metadata"
    if not index.exists():
        yield f"{folder.name}/{index.name} is missing"
    try:
        with index.open("rb") as file:
            strings = [value for _, value, _ in pickletools.genops(file) if isinstance(value, str)]
    except ValueError:
        yield f"{folder.name}/{index.name} is cut off"
        return
    # Those that are named alone: a process that has nothing to write leaves an empty file
    parts = {name for name in strings if name.endswith(".distcp")}
    if not parts:
        yield f"{folder.name} has nothing in it"
    for name in sorted(parts):
        if not (folder / name).exists():
            yield f"{folder.name}/{name} is missing"
        if not _ends_as_zip(folder / name):
            yield f"{folder.name}/{name} is cut off"


def _faults_of_deepspeed(folder: Path) -> Iterator[str]:
    if not (folder / "latest").exists():
        yield "latest, which names the folder of DeepSpeed's states, is missing"
    name = _latest(folder)
    if not name:
        yield "latest is cut off"
    if not (folder / name).is_dir():
        yield f"{name} is missing"
    model_states = sorted((folder / name).glob("*_model_states.pt"))
    if not model_states:
        yield f"{name} has no model states"
    if not _has_any(folder / name, ("*_optim_states.pt",)) and not any(map(_has_optimizer, model_states)):
        yield f"{name} has no optimizer states"


def _latest(folder: Path) -> str:
    """The subfolder that DeepSpeed reads its states from."""
    latest = folder / "latest"
    return latest.read_text(encoding="utf-8", errors="replace").strip() if latest.exists() else ""


def _has_optimizer(model_states: Path) -> bool:
    """Whether DeepSpeed wrote the optimizer's state with the model's, as without ZeRO, or `None` in its place."""
    if not zipfile.is_zipfile(model_states):  # of the format before: not told
        return True
    with zipfile.ZipFile(model_states) as archive:
        pickled = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
        content = archive.read(pickled) if pickled is not None else b"."
    # Not unpickled, as that may run code
    steps = [(op.name, value) for op, value, _ in pickletools.genops(content) if "PUT" not in op.name]
    return any(value == "optimizer" and after != "NONE" for (_, value), (after, _) in pairwise(steps))


def _has_any(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _is_whole(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return _is_whole_safetensors(path)
    if path.suffix in (".pt", ".pth") or (path.suffix == ".bin" and path.name.startswith(_TORCH_BINS)):
        return _is_whole_torch(path)
    return True


def _is_whole_torch(path: Path) -> bool:
    """Whether a file is a zip file to its end, or of torch's earlier format, which doesn't show."""
    if zipfile.is_zipfile(path):
        return True
    with path.open("rb") as file:
        return file.read(len(_EARLIER_TORCH)) == _EARLIER_TORCH


def _ends_as_zip(path: Path) -> bool:
    """Whether the last of many zip files in one is whole. `is_zipfile` would find the end of one before it."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - zipfile.sizeEndCentDir))  # type: ignore[attr-defined]
        return file.read(4) == zipfile.stringEndArchive  # type: ignore[attr-defined]


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
        # Where one process has a file of its own, each has
        files = [path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("global_step*/*"))]
        own = {_OF_A_PROCESS.sub(rf"\g<1>{rank}", name) for name in files if _OF_A_PROCESS.search(name)}
        expected += sorted(own)
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
        if main and not _is_json(Path(folder, TRAINER_STATE)):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except Exception as error:
        # If what is written last was written, something else failed, such as a push
        whole = _is_json(Path(folder, TRAINER_STATE)) if main else parts.are_written
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
