"""What a checkpoint must hold beside weights, optimizer and random states, so that a resumed run is the same run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import send_to_device


if TYPE_CHECKING:
    from .trainer import VPDTrainer


logger = get_logger(__name__)

STATE_FILE = "vpd_state.pt"
ROLLOUTS_FILE = "vpd_rollouts_{}.pt"  # of each process


def save(trainer: VPDTrainer, folder: str) -> None:
    """Write counters, reward shift, copies of weights and rollouts that are still in use to a checkpoint folder."""
    os.makedirs(folder, exist_ok=True)
    state = _state_dict(trainer)  # on all processes: weights may be gathered
    if trainer.args.should_save:
        _write(state, os.path.join(folder, STATE_FILE))
    if trainer.parts.uses_feedback and trainer._step % trainer._generate_every:
        # In the middle of a rollout batch: the same rollouts must be trained on after resuming
        rollouts = {
            "batches": trainer._buffered_inputs,
            "e_step_is_pending": trainer._pending_e_step is not None,
        }
        _write(rollouts, os.path.join(folder, ROLLOUTS_FILE.format(trainer.accelerator.process_index)))


def _write(value: Any, path: str) -> None:
    # Renamed when whole, so that a file of this name is never half a file
    torch.save(value, path + ".tmp")
    os.replace(path + ".tmp", path)


def _geometry(trainer: VPDTrainer) -> dict[str, int]:
    """What the rollouts of a batch are split over."""
    return {
        "processes": trainer.accelerator.num_processes,
        "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
        "steps_per_generation": trainer.args.steps_per_generation,
        "num_iterations": trainer.num_iterations,
    }


def _state_dict(trainer: VPDTrainer) -> dict[str, Any]:
    state: dict[str, Any] = {
        "step": trainer._step,
        "epoch": trainer.state.epoch or 0.0,
        "geometry": _geometry(trainer),
    }
    if trainer.parts.uses_feedback:
        state |= {
            "teacher_kind": trainer.args.teacher,
            "prior_kind": trainer.args.prior,
            "rollout_batches": trainer.rollout_batches,
            "within_rollout_batch": trainer._step % trainer._generate_every != 0,
            "teacher": trainer.teacher.state_dict(),
            "prior": trainer.prior.state_dict(),
            "e_step": trainer.e_step.state_dict(),
        }
    return state


def begin(trainer: VPDTrainer) -> None:
    """Called, once or again, when the model has been prepared for training, so that weights are where they stay."""
    trainer.teacher.begin()
    trainer.prior.begin()


@contextmanager
def kept_dtypes(model: Any) -> Iterator[None]:
    """While weights are loaded: PEFT would turn a half-precision adapter, such as that of a QLoRA student, to float32."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes.get(name, parameter.dtype):
            parameter.data = parameter.data.to(dtypes[name])


def load(trainer: VPDTrainer, folder: str) -> None:
    """
    Restore what `save` wrote.

    Raises:
        ValueError: If the checkpoint is of another teacher or prior, or holds rollouts that are split otherwise, so
            that its state can't be used.
    """
    path = os.path.join(folder, STATE_FILE)
    if not trainer.parts.uses_feedback:
        return
    if not os.path.exists(path):
        logger.warning(
            f"{folder} has no {STATE_FILE}, so it was not written by a VPDTrainer with its state: the rollout counter, "
            "the reward shift and copies of weights start anew."
        )
        return
    state = torch.load(path, map_location="cpu", weights_only=True)
    for field in ("teacher", "prior"):
        here = getattr(trainer.args, field)
        if {state.get(f"{field}_kind", here), here} == {"dynamic", "sampling"}:
            continue  # neither of these priors has a state
        if state.get(f"{field}_kind", getattr(trainer.args, field)) != getattr(trainer.args, field):
            raise ValueError(
                f"{folder} was saved with {field}={state[f'{field}_kind']!r}, but this run has "
                f"{field}={getattr(trainer.args, field)!r}. Resume with the same value, or start from the "
                "checkpoint's weights (model=...) instead of resuming."
            )
    # From the file that all processes read, so that all decide alike
    if state.get("within_rollout_batch", False) and state["geometry"] != _geometry(trainer):
        raise ValueError(
            f"{folder} was saved in the middle of a rollout batch that is split over {state['geometry']}, but this run "
            f"has {_geometry(trainer)}. Resume with the same numbers, or from a checkpoint between rollout batches "
            "(every steps_per_generation × num_iterations micro-batches)."
        )
    trainer._step = state["step"]
    _advance_sampler(trainer, epochs=int(state["epoch"]))
    if "rollout_batches" not in state:  # saved with method="grpo"
        return
    trainer._finished_rollout_batches = trainer._step // trainer._generate_every
    trainer.rollout_batches = state["rollout_batches"]
    begin(trainer)
    trainer.teacher.load_state_dict(state["teacher"])
    trainer.prior.load_state_dict(state["prior"])
    trainer.e_step.load_state_dict(state["e_step"])

    # Not "if the file exists": a run that reuses the folder may have left one
    if state["within_rollout_batch"]:
        rollouts = os.path.join(folder, ROLLOUTS_FILE.format(trainer.accelerator.process_index))
        # Not `map_location`: torch can't load to the "cpu:0" that accelerate names with several CPU processes
        saved = torch.load(rollouts, map_location="cpu", weights_only=True)
        if trainer.args.weighs_importance and "student_logps" not in saved["batches"][0]:
            raise ValueError(
                f"{folder} was saved in the middle of a rollout batch, of which it holds no log-probabilities for "
                "m_step_importance_clip. Resume without it, or from a checkpoint between rollout batches (every "
                "steps_per_generation × num_iterations micro-batches)."
            )
        trainer._buffered_inputs = send_to_device(saved["batches"], trainer.accelerator.device)
        trainer._pending_e_step = trainer._buffered_inputs if saved["e_step_is_pending"] else None


def load_teacher(trainer: VPDTrainer, folder: str) -> None:
    """The teacher that goes with the student of a checkpoint, if the checkpoint has one."""
    path = os.path.join(folder, STATE_FILE)
    if os.path.exists(path):
        trainer.teacher.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["teacher"])
    else:
        logger.warning(f"{folder} has no {STATE_FILE}, so the teacher stays the last one of the run.")


def _advance_sampler(trainer: VPDTrainer, *, epochs: int) -> None:
    """
    Bring the order of prompts to the epoch that is resumed.

    TRL's sampler draws a new order from its own generator each epoch, so the earlier epochs' orders are drawn first.
    """
    sampler = trainer._train_sampler
    generator = getattr(sampler, "generator", None)
    for _ in range(epochs if generator is not None else 0):
        torch.randperm(sampler.num_samples, generator=generator)
