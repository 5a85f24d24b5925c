"""Reading a causal language model: its hidden states, its head, its mode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .losses import Head


def causal_lm(model: Any) -> Any:
    """The causal language model inside a PEFT wrapper, or the model itself."""
    # Not accelerate's `is_peft_model`: that reads PEFT's package metadata each time
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **images: torch.Tensor
) -> torch.Tensor:
    """
    Hidden states (B, L, H) before the head.

    Args:
        model: The unwrapped model, with or without adapters in it.
        input_ids: (B, L) token ids.
        attention_mask: (B, L).
        **images: What a vision-language model takes beside these.
    """
    # `base_model` of a transformers model is what stands before the head
    network = causal_lm(model).base_model
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **images}
    wrapped = getattr(network, "module", network)  # by FSDP's first version
    if _takes_positions(type(wrapped).forward):  # as generation counts: without them padding would move a row's tokens
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return network(**inputs, use_cache=False).last_hidden_state


@cache
def _takes_positions(forward: Callable[..., Any]) -> bool:
    """Whether positions are numbers in a row; those of vision-language models may be places in images."""
    # Names of inputs that are images stand in the signatures of these models alone
    names = inspect.signature(forward).parameters
    return "position_ids" in names and "pixel_values" not in names


def recomputes_reentrantly(model: nn.Module) -> bool:
    """Whether recomputing activations starts backward passes of its own, in each of which DDP takes gradients to be whole."""
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and checkpoint is not None:
            # torch's own default is True
            return bool(getattr(checkpoint, "keywords", {}).get("use_reentrant", True))
    return False


def positions_are_relative(model: Any) -> bool:
    """Whether moving all tokens of a row by as many places changes nothing, as with rotary positions."""
    config = causal_lm(model).config.get_text_config()
    return any(getattr(config, name, None) is not None for name in ("rope_parameters", "rope_theta", "rope_scaling"))


def head_of(model: Any, *, temperature: float, float32: bool = False) -> Head:
    """
    The head of a model, with what its architecture does to the logits.

    `float32` projects in float32 whatever the weights are (`cast_lm_head_to_fp32`).
    """
    model = causal_lm(model)
    projection = model.get_output_embeddings()
    weight, bias = (_full(tensor, float32) for tensor in (projection.weight, projection.bias))
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere; Muse Glimmer; Falcon-H1
        if getattr(config, name, None) is not None:
            scale = float(getattr(config, name))
            break
    else:
        if getattr(config, "logits_scaling", None) is not None:  # Granite and MiniCPM3 divide, HyperCLOVA X multiplies
            multiplies = config.model_type == "hyperclovax"
            scale = float(config.logits_scaling) if multiplies else 1 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return Head(weight, bias, scale=scale, softcap=softcap, temperature=temperature)


def at_head(
    model: Any, function: Callable[..., Any], *tensors: torch.Tensor, temperature: float, float32: bool = False
) -> Any:
    """
    `function(head, *tensors)` within the forward pass of the head's module.

    Engines that shard weights hold the head's whole one only there, and again for its backward pass.

    Args:
        model: The unwrapped model.
        function: Takes a [`Head`] and the tensors; returns a tensor or a tuple of them.
        tensors: What gradients flow through must be among them.
        temperature, float32: As in `head_of`.
    """
    projection = causal_lm(model).get_output_embeddings()
    weight = projection.weight
    # PEFT may have put the module that has the weight into another
    owner = next((m for m in projection.modules() if m._parameters.get("weight") is weight), projection)
    forward = owner.__dict__.get("forward")

    def redirected(*tensors: torch.Tensor) -> Any:
        return function(head_of(model, temperature=temperature, float32=float32), *tensors)

    owner.forward = redirected
    try:
        return owner(*tensors)
    finally:
        if forward is None:
            del owner.forward
        else:
            owner.forward = forward


def has_dropout(model: nn.Module) -> bool:
    """Whether a forward pass in training mode is random."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()) or any(
        isinstance(rate, float) and rate > 0
        for name, rate in vars(causal_lm(model).config.get_text_config()).items()
        if name.endswith(("dropout", "pdrop")) and not name.startswith("summary_")  # GPT-2's, of another head
    )


def _full(tensor: torch.Tensor | None, float32: bool) -> Any:
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    if tensor is None or not float32:
        return tensor
    cast: Any = tensor.float()
    if hasattr(tensor, "ds_status"):  # of DeepSpeed's ZeRO-3; TRL's losses ask each weight whether it is whole
        cast.ds_status = tensor.ds_status
    return cast


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """
    Evaluation mode (no dropout, no gradient checkpointing) without gradients; every module's mode comes back.

    A teacher that drops out at random would give random targets.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
