"""
What the teacher runs on.

It is the student's network in another state. An object here knows that state: the context to run the network in, how
the E-step trains it, what happens after a rollout batch, and what a checkpoint must hold. The trainer never asks which
one it has.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .engines import Engine


if TYPE_CHECKING:
    from .trainer import VPDTrainer


# Below a model's folder, for what its teacher has of its own. Two levels: transformers takes a folder with an adapter
# directly in a checkpoint for one of the student's when it resumes
TEACHER_FOLDER = os.path.join("teacher", "adapter")


class WeightSnapshot:
    """
    A copy of a network's trainable weights that can stand in for them.

    The copy is of the weights alone: the network's code, and its frozen weights, serve both. So an adapter's snapshot
    is as small as the adapter, and patches of the network's methods can't lead back to the original's weights, as they
    do in a deep copy.

    Where weights are sharded, so is the copy.

    Args:
        model: The network. Which of its parameters are trainable must not change afterwards.
        engine: What holds the network's weights. `None`: this process holds them whole.
        float32: Whether the copy of half-precision weights is kept in float32.
    """

    def __init__(self, model: nn.Module, engine: Engine | None = None, *, float32: bool = False) -> None:
        self._model = model
        self._engine = engine
        self._float32 = float32
        self._parameters: dict[str, nn.Parameter] = {}
        self.weights: dict[str, torch.Tensor] = {}
        if engine is None or not engine.shards_weights:
            self.take()

    def take(self) -> None:
        """
        Copy the weights, unless there is a copy already. Called when they are where they stay, and sharded if they are
        to be.
        """
        if self.weights:
            if self._engine is None or not self._engine.shards_weights:
                # DeepSpeed moves the model after the trainer is built
                self.weights = {name: w.to(self._parameters[name].device) for name, w in self.weights.items()}
            return
        if self._engine is not None:
            self._engine.settle()
        self._parameters = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        for name, parameter in self._parameters.items():
            part = self._part(parameter).detach()
            dtype = torch.promote_types(part.dtype, torch.float32) if self._float32 else part.dtype
            self.weights[name] = part.to(dtype, copy=True)

    def _part(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter.data if self._engine is None else self._engine.part(parameter)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run the network on the copy; the student's weights come back on leaving, also by an exception."""
        assert self.weights, "the copy has not been taken"
        if self._engine is not None and self._engine.shards_weights:
            with self._written_over():
                yield
            return
        current = {name: p.data for name, p in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.data = self.weights[name].to(parameter.device, parameter.dtype)
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = current[name]

    @contextmanager
    def _written_over(self) -> Iterator[None]:
        """As `swapped_in`, where the engine gathers whole weights from memory that must stay where it is."""
        assert self._engine is not None
        self._engine.settle()
        current = {name: self._part(p).clone() for name, p in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                self._part(parameter).copy_(self.weights[name])
            yield
        finally:
            self._engine.settle()  # what has been gathered is of the copy
            for name, parameter in self._parameters.items():
                self._part(parameter).copy_(current[name])

    @torch.no_grad()
    def move_towards(self, rate: float) -> None:
        """copy ← (1 − rate) · copy + rate · current weights."""
        if self._engine is not None:
            self._engine.settle()
        for name, parameter in self._parameters.items():
            weight = self.weights[name]
            weight.lerp_(self._part(parameter).detach().to(weight.device, weight.dtype), rate)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole weights, on the CPU where they are sharded; all processes take part."""
        if self._engine is None or not self._engine.shards_weights:
            return dict(self.weights)
        whole = {}
        for name, parameter in self._parameters.items():
            tensor = self._engine.whole(parameter, self.weights[name])
            whole[name] = tensor.cpu() if self._engine.trainer.args.should_save else tensor.new_empty(0)
        return whole

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """
        Copy weights in place.

        Raises:
            ValueError: If the names or shapes are not those of the network.
        """
        if state.keys() != self.weights.keys():
            unknown, missing = sorted(state.keys() - self.weights.keys()), sorted(self.weights.keys() - state.keys())
            raise ValueError(
                f"The checkpoint's copy of the weights is of another network: it lacks {missing[:3]} and has "
                f"{unknown[:3]} too much."
            )
        for name, weight in self.weights.items():
            parameter, whole = self._parameters[name], state[name]
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if whole.shape != shape:
                raise ValueError(f"{name} has shape {tuple(whole.shape)} in the checkpoint, {tuple(shape)} here.")
            weight.copy_(whole if self._engine is None else self._engine.part_of(parameter, whole))


class SharedTeacher:
    """
    The teacher runs on the student's weights; the E-step trains them (the paper's form).

    Args:
        trainer: The trainer, with its model.
    """

    # Whether the E-step trains the student's weights
    trains_student = True

    default_learning_rate_scale = 1.0

    # Whether the M-step's targets come from an output head that is not the student's
    has_own_head = False

    def __init__(self, trainer: VPDTrainer) -> None:
        self.trainer = trainer

    def begin(self) -> None:
        """Called, once or again, when training begins and the weights are where they stay."""

    # ---- Where it runs

    def training_context(self) -> AbstractContextManager[None]:
        """Where the E-step's forward and backward passes run, both within one context."""
        return nullcontext()

    def target_context(self) -> AbstractContextManager[None]:
        """Where the M-step's targets are computed."""
        return nullcontext()

    # ---- The E-step's update: for each micro-batch `backward` within `accumulate`, then `update`

    @property
    def trained_model(self) -> nn.Module:
        """What the E-step's forward passes go through."""
        return self.trainer.model_wrapped

    @property
    def learning_rate_scale(self) -> float:
        """The E-step's learning rate over the student's at the same step of the schedule."""
        args = self.trainer.args
        if args.e_step_learning_rate is None:
            return self.default_learning_rate_scale
        # Of the schedule, where there is one: optimizers that a user passes have rates of their own
        schedule = getattr(self.trainer.lr_scheduler, "scheduler", self.trainer.lr_scheduler)
        peak = getattr(schedule, "base_lrs", [args.learning_rate])[0]
        return args.e_step_learning_rate / peak

    @property
    def max_grad_norm(self) -> float:
        """Where gradients are clipped. Without a limit their norm is measured all the same."""
        limit = self.trainer.args.max_grad_norm
        return limit if limit > 0 else float("inf")

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch: gradients are reduced over processes in the last one only, as transformers does."""
        return self.trainer.engine.accumulate(last=last)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss whose gradients are to be averaged over processes."""
        self.trainer.engine.backward(loss)

    def update(self) -> float:
        """Take a step of the optimizer, leave no gradients, and return their norm before clipping."""
        with self._scaled_learning_rate():
            return self.trainer.engine.step(self.max_grad_norm)

    @contextmanager
    def _scaled_learning_rate(self) -> Iterator[None]:
        groups = self.trainer.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        try:
            if self.learning_rate_scale != 1.0:
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate * self.learning_rate_scale
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    # ---- What remains

    def after_rollout_batch(self) -> None:
        """Called when the last M-step on a rollout batch has been made."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def describe(self) -> str:
        """The weights that the targets come from, in words for a model card."""
        return "the student's own weights"

    @property
    def saves_adapter(self) -> bool:
        """Whether `save_pretrained` writes an adapter."""
        return False

    def save_pretrained(self, folder: str) -> None:
        """
        Write what the teacher has beside the student's weights to a folder.

        If it has nothing for others, the folder of an earlier run goes: it would be taken for this student's.
        """
        shutil.rmtree(folder, ignore_errors=True)


class EMATeacher(SharedTeacher):
    """
    The M-step's targets come from a moving average of the student's weights (SDPO's form).

    The E-step trains the student's weights, which the average follows. The average of half-precision weights is kept
    in float32: rounding would swallow its small steps.

    Args:
        trainer: The trainer, with its model.
        rate: Share of the student in each step of the average.
    """

    def __init__(self, trainer: VPDTrainer, rate: float) -> None:
        super().__init__(trainer)
        self.rate = rate
        self.average = WeightSnapshot(trainer.model, trainer.engine, float32=True)
        self.has_own_head = trainer.model.get_output_embeddings().weight.requires_grad

    def begin(self) -> None:
        self.average.take()

    def target_context(self) -> AbstractContextManager[None]:
        return self.average.swapped_in()

    def after_rollout_batch(self) -> None:
        self.average.move_towards(self.rate)

    def describe(self) -> str:
        return (
            f"a moving average of the student's weights, rate {self.rate:g} per rollout batch, not part of this model"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state["average"])


def make_teacher(trainer: VPDTrainer, adapter_config: Any = None) -> SharedTeacher:
    """The teacher that `VPDConfig.teacher` names."""
    if trainer.args.teacher == "lora":
        from .lora_teacher import LoRATeacher  # PEFT is optional

        return LoRATeacher(trainer, adapter_config)
    if trainer.args.teacher == "ema":
        return EMATeacher(trainer, trainer.args.teacher_update_rate)
    return SharedTeacher(trainer)
