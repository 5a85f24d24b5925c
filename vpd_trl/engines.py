"""
What runs the network on several devices: how a step outside the student's is taken there, and where weights are.

transformers' loop drives the student's steps. The E-step takes some of its own between them, and the teacher's copies
of weights must be put where the network reads them. An object here knows how that is done on one engine; the rest of
the package never asks which one it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


if TYPE_CHECKING:
    from .trainer import VPDTrainer


class Engine:
    """
    One process, or several that each hold the whole network (DDP).

    Args:
        trainer: The trainer, with its model and accelerator, maybe before they are prepared for training.
    """

    # Whether copies of weights are made of what this process holds of each, from the start of training
    shards_weights = False

    # Whether a forward pass waits for all other processes, so that they must make equally many
    gathers_weights = False

    def __init__(self, trainer: VPDTrainer) -> None:
        self.trainer = trainer

    # ---- A step of the student's optimizer: for each micro-batch `backward` within `accumulate`, then `step`

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """Around a micro-batch: gradients are reduced over processes in the last one only, as transformers does."""
        accelerator = self.trainer.accelerator
        every = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        with (
            self._sync_gradients(last),
            nullcontext() if last or every else accelerator.no_sync(self.trainer.model_wrapped),
        ):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss whose gradients are to be averaged over processes."""
        self.trainer.accelerator.backward(loss)

    def step(self, max_grad_norm: float) -> float:
        """Take a step with the optimizer's current rates, leave no gradients, and return their norm before clipping."""
        trainer = self.trainer
        with self._sync_gradients(True):
            grad_norm = trainer.accelerator.clip_grad_norm_(trainer.model_wrapped.parameters(), max_grad_norm)
            trainer.optimizer.step()
            trainer.model_wrapped.zero_grad()
        return float(grad_norm) if grad_norm is not None else float("nan")

    @contextmanager
    def _sync_gradients(self, value: bool) -> Iterator[None]:
        """Whether an accumulation window ends here; the student's flag comes back afterwards."""
        state = self.trainer.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(value)
        try:
            yield
        finally:
            state._set_sync_gradients(before)

    # ---- Weights

    def settle(self) -> None:
        """Put each weight where it is at rest: `part` is valid, and the next forward pass reads it."""

    def part(self, parameter: torch.Tensor) -> torch.Tensor:
        """What this process holds of a weight, sharing its memory."""
        return parameter.data

    def whole(self, parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """The whole of a tensor that is split as a weight is, from what each process holds; all take part."""
        return part

    def part_of(self, parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """What this process holds of a whole tensor that is to be split as a weight is."""
        return whole

    def kept(self, weight: torch.Tensor) -> torch.Tensor:
        """The value of a weight within its module's forward pass, without gradient, for when that is over."""
        return weight.detach()


class FSDP1Engine(Engine):
    """FSDP's first version: weights are split, but no copies are made of them."""

    gathers_weights = True


class FSDP2Engine(Engine):
    """PyTorch's `fully_shard`: weights are distributed tensors, and whole only while their modules run."""

    shards_weights = gathers_weights = True

    def __init__(self, trainer: VPDTrainer) -> None:
        super().__init__(trainer)
        plugin = trainer.accelerator.state.fsdp_plugin
        # accelerate has the outputs of modules cast to half precision, which log-probabilities do not stand: modules
        # compute in it all the same, and so hidden states stay in it without a cast
        if getattr(plugin.mixed_precision_policy, "output_dtype", None) is not None:
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)

    def kept(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.detach().clone()

    def settle(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in self.trainer.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def part(self, parameter: torch.Tensor) -> torch.Tensor:
        data = parameter.data
        return data.to_local() if isinstance(data, DTensor) else data

    def whole(self, parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        if not isinstance(parameter, DTensor):
            return part
        mesh, size = parameter.device_mesh, parameter.size()
        part = part.to(mesh.device_type)  # its collectives can't reach weights that are kept on CPUs
        split = DTensor.from_local(part, mesh, parameter.placements, shape=size, stride=parameter.stride())
        return split.full_tensor()

    def part_of(self, parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        if not isinstance(parameter, DTensor):
            return whole
        mesh = parameter.device_mesh
        # Each process takes its own part of what all have
        return distribute_tensor(whole.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None).to_local()


class DeepSpeedEngine(Engine):
    """
    DeepSpeed up to ZeRO-2.

    Its backward pass divides by the student's accumulation steps unless told otherwise, and accelerate takes the step
    within it, before the E-step could set its rate.
    """

    @property
    def engine(self) -> Any:
        return self.trainer.model_wrapped

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        with self._sync_gradients(last):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, max_grad_norm: float) -> float:
        """Clips as the engine's configuration says, to which transformers gives `max_grad_norm`."""
        engine = self.engine
        # The schedule, and what names checkpoints, count the student's steps
        kept = {
            name: getattr(engine, name) for name in ("lr_scheduler", "global_steps", "global_samples", "micro_steps")
        }
        engine.lr_scheduler = None
        try:
            engine.step()
        finally:
            for name, value in kept.items():
                setattr(engine, name, value)
        grad_norm = engine.get_global_grad_norm()
        return float(grad_norm) if grad_norm is not None else float("nan")


class ZeRO3Engine(DeepSpeedEngine):
    """DeepSpeed ZeRO-3: weights are empty but while their modules run; each process holds a slice of them, flat."""

    shards_weights = gathers_weights = True

    def kept(self, weight: Any) -> torch.Tensor:
        copy: Any = weight.detach().clone()
        copy.ds_status = weight.ds_status  # TRL's losses ask each weight whether it is whole
        return copy

    def settle(self) -> None:
        self.engine.optimizer.parameter_offload.partition_all_parameters()

    def part(self, parameter: Any) -> torch.Tensor:
        return parameter.ds_tensor.data

    def whole(self, parameter: Any, part: torch.Tensor) -> torch.Tensor:
        group = parameter.ds_process_group
        device = self.trainer.accelerator.device
        parts = torch.empty(part.numel() * torch.distributed.get_world_size(group), dtype=part.dtype, device=device)
        torch.distributed.all_gather_into_tensor(parts, part.to(device).contiguous(), group=group)
        return parts[: parameter.ds_numel].view(parameter.ds_shape)

    def part_of(self, parameter: Any, whole: torch.Tensor) -> torch.Tensor:
        size = parameter.ds_tensor.numel()
        rank = torch.distributed.get_rank(parameter.ds_process_group)
        part = whole.flatten()[rank * size : (rank + 1) * size]
        return nn.functional.pad(part, (0, size - part.numel()))  # the last ones may go beyond the end


def make_engine(trainer: VPDTrainer) -> Engine:
    """The engine that `accelerate` was configured for."""
    if trainer.is_deepspeed_enabled:
        return ZeRO3Engine(trainer) if trainer._dist.is_zero3 else DeepSpeedEngine(trainer)
    if trainer._dist.fsdp_version == 2:
        return FSDP2Engine(trainer)
    return FSDP1Engine(trainer) if trainer._dist.fsdp_version == 1 else Engine(trainer)
