"""A teacher with a LoRA adapter of its own on the student's weights (the paper's partially decoupled form)."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer

from .network import causal_lm
from .teacher import SharedTeacher


if TYPE_CHECKING:
    from .trainer import VPDTrainer


ADAPTER = "teacher"

DEFAULT = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class _Layer(NamedTuple):
    """A layer of the network that the adapter extends: its place, the student's module there, and the teacher's."""

    name: str
    parent: nn.Module
    attribute: str
    student: nn.Module
    teacher: nn.Module

    def place(self, module: nn.Module) -> None:
        setattr(self.parent, self.attribute, module)


class LoRATeacher(SharedTeacher):
    """
    The teacher is the student's network plus a LoRA adapter of its own, which is all that the E-step trains.

    The adapter's layers wrap the student's modules, and stand in the network only within the teacher's contexts. At
    any other time the network *is* the student's: rollouts, evaluation, saving, weight sync and the wrappers of
    distributed training never meet the adapter. The student may have an adapter of its own, quantized or not; the
    teacher's comes on top of it. Gradients of the adapter are reduced over processes here, not by a wrapper.

    Args:
        trainer: The trainer, with its model.
        config: What to adapt and how; `None` is rank 16, α 32 on every linear layer. See `check_adapter_config`.
    """

    trains_student = False

    # Adapters take higher rates than the weights below them
    default_learning_rate_scale = 10.0

    def __init__(self, trainer: VPDTrainer, config: LoraConfig | None = None) -> None:
        super().__init__(trainer)
        # A copy: PEFT writes into it
        self.config = copy.deepcopy(config) if config is not None else LoraConfig(**DEFAULT)
        check_adapter_config(self.config)
        self._student_parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        self._layers = _inject(causal_lm(trainer.model), self.config, seed=trainer.args.seed)
        for parameter in self._student_parameters:  # PEFT freezes all but what it injects
            parameter.requires_grad_(True)
        head = trainer.model.get_output_embeddings()
        if any(layer.student is head for layer in self._layers):
            raise ValueError(
                "teacher_peft_config adapts the output head, whose weight is read without its adapter. Leave it out "
                f"of target_modules ({self.config.target_modules})."
            )
        self.parameters = self._own_parameters(trainer.accelerator.device)
        self.optimizer = self._make_optimizer()

    def _own_parameters(self, device: torch.device) -> dict[str, nn.Parameter]:
        """The adapter's parameters under the names that a PEFT checkpoint gives them, in float32 at least."""
        parameters = {}
        for layer in self._layers:
            for name, parameter in layer.teacher.named_parameters():
                if f".{ADAPTER}" in name and not name.startswith("base_layer."):
                    dtype = torch.promote_types(parameter.dtype, torch.float32)
                    parameter.data = parameter.data.to(device, dtype)
                    parameters[f"base_model.model.{layer.name}.{name.replace(f'.{ADAPTER}', '')}"] = parameter
        return parameters

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """The student's kind of optimizer, or AdamW where that kind needs the model itself."""
        args = self.trainer.args
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, self.trainer.model)
        if {"params", "model", "optimizer_dict"} & kwargs.keys():
            cls = torch.optim.AdamW
            kwargs = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        # The first E-step sets the learning rate
        return cls(self.parameters.values(), **{**kwargs, "lr": 0.0, "weight_decay": args.weight_decay})

    # ---- Contexts

    @contextmanager
    def target_context(self) -> Iterator[None]:
        for layer in self._layers:
            layer.place(layer.teacher)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.place(layer.student)

    @contextmanager
    def training_context(self) -> Iterator[None]:
        hook = None
        for parameter in self._student_parameters:
            parameter.requires_grad_(False)
        try:
            with self.target_context():
                if any(getattr(module, "gradient_checkpointing", False) for module in self.trainer.model.modules()):
                    # Reentrant checkpoints have gradients only if their inputs do, and the embeddings are frozen here
                    embeddings = self.trainer.model.get_input_embeddings()
                    hook = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
                yield
        finally:
            if hook is not None:
                hook.remove()
            for parameter in self._student_parameters:
                parameter.requires_grad_(True)

    # ---- The E-step's update

    @property
    def trained_model(self) -> nn.Module:
        return self.trainer.model

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        yield

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self) -> float:
        accelerator, args = self.trainer.accelerator, self.trainer.args
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters.values()]
        if accelerator.num_processes > 1:
            flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
            gradients = list(flat.split([g.numel() for g in gradients]))
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        limit = args.max_grad_norm if args.max_grad_norm > 0 else float("inf")
        grad_norm = nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = self.trainer.optimizer.param_groups[0]["lr"] * self.learning_rate_scale
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(grad_norm)

    @torch.no_grad()
    def after_rollout_batch(self) -> None:
        """
        Let the adapter fade.

        The M-steps have moved the student towards student + adapter. What the student took over would count twice.
        """
        for name, parameter in self.parameters.items():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.mul_(1 - self.trainer.args.teacher_adapter_decay)

    # ---- State

    def state_dict(self) -> dict[str, Any]:
        return {
            "adapter": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Restore the adapter and its optimizer.

        Raises:
            ValueError: If the checkpoint's adapter is of another form.
        """
        shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        found = {name: tuple(weight.shape) for name, weight in state["adapter"].items()}
        if shapes != found:
            differing = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
            name = differing[0]
            raise ValueError(
                f"The checkpoint's teacher adapter has another form: {name} is {found.get(name)} there and "
                f"{shapes.get(name)} here. Resume with the same teacher_peft_config."
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["adapter"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def save_pretrained(self, folder: str) -> None:
        """Write the adapter in PEFT's format."""
        os.makedirs(folder, exist_ok=True)
        weights = {name: p.detach().to("cpu").contiguous() for name, p in self.parameters.items()}
        save_file(weights, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
        self.config.save_pretrained(folder)


def check_adapter_config(config: Any) -> None:
    """
    Check that an adapter starts as the student and follows it.

    Raises:
        TypeError: If it is not a `LoraConfig`.
        ValueError: If it would change or copy the student's weights, or not follow them.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"teacher_peft_config must be a peft.LoraConfig; got {type(config).__name__}.")
    if config.init_lora_weights not in (True, "gaussian"):
        raise ValueError(
            "teacher_peft_config.init_lora_weights must be True or 'gaussian', with which the teacher starts as the "
            f"student and the student's weights stay; got {config.init_lora_weights!r}."
        )
    copies = {
        "use_dora": (config.use_dora, False),
        "bias": (config.bias, "none"),
        "modules_to_save": (config.modules_to_save or None, None),
        "trainable_token_indices": (getattr(config, "trainable_token_indices", None), None),
        "target_parameters": (getattr(config, "target_parameters", None) or None, None),
        "layer_replication": (config.layer_replication, None),
    }
    for name, (value, allowed) in copies.items():
        if value != allowed:
            raise ValueError(
                f"teacher_peft_config.{name} must be {allowed!r}: the teacher's adapter only adds to the student's "
                f"layers and follows the rest of its weights; got {value!r}."
            )


def _inject(model: nn.Module, config: LoraConfig, *, seed: int) -> list[_Layer]:
    """
    Let PEFT make the adapter's layers, and take them out of the network again.

    All processes draw the same weights, and the generator's state is as before.
    """
    own = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    # The student's adapters step aside, so that PEFT makes layers for what is below them instead of adding to them
    for name, module in own.items():
        model.set_submodule(name, module.get_base_layer())
    # PEFT would add to the student's, and the student would save this adapter as one of its own
    peft_config = model.__dict__.pop("peft_config", None)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        layers = []
        for name, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                student = own.get(name, module.get_base_layer())
                module.base_layer = student
                parent, _, attribute = name.rpartition(".")
                layers.append(_Layer(name, model.get_submodule(parent), attribute, student, module))
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)
        for name, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer) and name not in own:
                model.set_submodule(name, module.get_base_layer())
        model.__dict__.pop("peft_config", None)
        if peft_config is not None:
            model.peft_config = peft_config
    return layers
