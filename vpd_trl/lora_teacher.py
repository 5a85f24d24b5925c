"""A teacher with a LoRA adapter of its own on the student's weights (the paper's partially decoupled form)."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer

from .network import causal_lm
from .teacher import TEACHER_FOLDER, SharedTeacher


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
        config: What to adapt and how, as `check_adapter_config` lets it through; `None` is rank 16, α 32 on every
            linear layer.
    """

    trains_student = False

    # Adapters take higher rates than the weights below them
    default_learning_rate_scale = 10.0

    def __init__(self, trainer: VPDTrainer, config: LoraConfig | None = None) -> None:
        super().__init__(trainer)
        self.config = copy.deepcopy(config) if config is not None else LoraConfig(**DEFAULT)  # PEFT writes into it
        self._layers = _inject(causal_lm(trainer.model), self.config, seed=trainer.args.seed)
        head = _name_of(trainer.model.get_output_embeddings(), causal_lm(trainer.model))
        if any(layer.name == head or layer.name.startswith(f"{head}.") for layer in self._layers):
            raise ValueError(
                "teacher_peft_config adapts the output head, whose weight is read without its adapter. Leave it out "
                f"of target_modules ({self.config.target_modules})."
            )
        self.parameters = self._own_parameters(trainer.accelerator.device)
        self.optimizer = self._make_optimizer()

    def _own_parameters(self, device: torch.device) -> dict[str, nn.Parameter]:
        """The adapter's parameters under the names that a PEFT checkpoint gives them, in float32 at least."""
        parameters, students = {}, {id(parameter) for parameter in self.trainer.model.parameters()}
        for layer in self._layers:
            for name, parameter in layer.teacher.named_parameters():
                if id(parameter) not in students:
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
        model, hook = self.trainer.model, None
        self.trainer.engine.settle()  # parameters at rest say whether those that modules run on are trained
        # Now, not at construction: a wrapper may have put others in their place since
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            with self.target_context():
                if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
                    # Reentrant checkpoints have gradients only if their inputs do, and the embeddings are frozen here
                    hook = model.get_input_embeddings().register_forward_hook(
                        lambda module, args, output: output.requires_grad_(True)
                    )
                yield
        finally:
            if hook is not None:
                hook.remove()
            self.trainer.engine.settle()
            for parameter in trained:
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
        accelerator = self.trainer.accelerator
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters.values()]
        if accelerator.num_processes > 1:
            flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
            gradients = list(flat.split([g.numel() for g in gradients]))
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        grad_norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "train", None)):  # schedule-free optimizers have modes
            optimizer.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.trainer.optimizer.param_groups[0]["lr"] * self.learning_rate_scale
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(grad_norm)

    @torch.no_grad()
    def after_rollout_batch(self) -> None:
        """
        Let the adapter fade, whether or not there was an E-step.

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

    def describe(self) -> str:
        where = f"in `{Path(TEACHER_FOLDER).as_posix()}`" if self.saves_adapter else "not part of this model"
        return f"the student's weights and a LoRA adapter of its own, of rank {self.config.r}, {where}"

    @property
    def saves_adapter(self) -> bool:
        return self.trainer.args.save_teacher_adapter

    def save_pretrained(self, folder: str) -> None:
        """Write the adapter in PEFT's format, unless it is to be left out."""
        if not self.saves_adapter:
            return super().save_pretrained(folder)
        os.makedirs(folder, exist_ok=True)
        weights = {name: p.detach().to("cpu").contiguous() for name, p in self.parameters.items()}
        save_file(weights, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
        config = copy.deepcopy(self.config)
        # Where the student is, if that is all that the adapter goes on top of
        if not is_peft_model(self.trainer.model):
            config.base_model_name_or_path = self.trainer.hub_model_id or self.trainer.args.output_dir
        config.inference_mode = True
        config.save_pretrained(folder)


# What a plain LoRA adapter is made of. Other fields of LoraConfig change or copy weights of the student, don't follow
# them, or need calls that a trainer doesn't make
PLAIN_FIELDS = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "ensure_weight_tying", "qalora_group_size", "megatron_core"),
}


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
    plain = LoraConfig()
    for name in sorted({field.name for field in fields(LoraConfig)} - PLAIN_FIELDS - {"init_lora_weights"}):
        value, allowed = getattr(config, name), getattr(plain, name)
        if value != allowed and (value or allowed):
            raise ValueError(
                f"teacher_peft_config.{name} must be {allowed!r}: the teacher's adapter is plain LoRA, which only adds "
                f"to the student's layers and follows the rest of its weights; got {value!r}."
            )


def _name_of(module: nn.Module, model: nn.Module) -> str:
    return next((name for name, other in model.named_modules() if other is module), "")


def _outermost(model: nn.Module, kinds: Any) -> dict[str, Any]:
    """Modules of some kinds that are in no other module of these kinds."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():  # parents come first
        if isinstance(module, kinds) and not any(name.startswith(f"{parent}.") for parent in found):
            found[name] = module
    return found


def _adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Adapter layers that are in no other. Modules that the student trains whole stay its own, with what is in them."""
    found = _outermost(model, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    return {name: module for name, module in found.items() if not isinstance(module, AuxiliaryTrainingWrapper)}


def _inject(model: nn.Module, config: LoraConfig, *, seed: int) -> list[_Layer]:
    """
    Let PEFT make the adapter's layers, and take them out of the network again.

    All processes draw the same weights, and the generator's state is as before.

    Raises:
        ValueError: If the student has an adapter that another can't be put on top of.
    """
    own = _adapter_layers(model)
    for name, module in own.items():
        if not hasattr(module.get_base_layer(), "weight"):
            raise ValueError(
                f"The student's adapter is on the parameters of {name!r} (target_parameters), and the teacher's can't "
                "be put on top of that. Adapt modules that have a weight of their own, or use teacher='shared'."
            )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The student's adapters step aside, so that PEFT makes layers for what is below them instead of adding to them
    for name, module in own.items():
        model.set_submodule(name, module.get_base_layer())
    # PEFT would add to the student's, and the student would save this adapter as one of its own
    peft_config = model.__dict__.pop("peft_config", None)
    try:
        # Layers are made on the devices of what they extend, from numbers that are drawn on the CPU
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        layers = []
        for name, module in _adapter_layers(model).items():
            student = own.get(name, module.get_base_layer())
            _innermost(module).base_layer = student
            parent, _, attribute = name.rpartition(".")
            layers.append(_Layer(name, model.get_submodule(parent), attribute, student, module))
    finally:
        _restore(model, own)
        for parameter in trained:  # PEFT freezes all but what it makes
            parameter.requires_grad_(True)
        model.__dict__.pop("peft_config", None)
        if peft_config is not None:
            model.peft_config = peft_config
    return layers


def _innermost(layer: Any) -> Any:
    """The adapter layer that holds no other: several parameters of a module are adapted by nested layers."""
    while isinstance(layer.base_layer, BaseTunerLayer):
        layer = layer.base_layer
    return layer


def _restore(model: nn.Module, own: dict[str, Any]) -> None:
    """Put the student's modules back where PEFT put layers, also within modules that the student trains whole."""
    for name, module in _outermost(model, BaseTunerLayer).items():
        if ADAPTER in getattr(module, "lora_A", {}) or ADAPTER in getattr(module, "lora_embedding_A", {}):
            model.set_submodule(name, own.get(name, module.get_base_layer()))
    for name, module in own.items():
        model.set_submodule(name, module)
