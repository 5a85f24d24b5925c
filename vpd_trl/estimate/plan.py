"""The run that an estimate is for."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from ..config import VPDConfig
from .devices import DEVICES, Device
from .rehearsal import Rehearsal


ENGINES = ("ddp", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class Plan:
    """
    A run that is to be estimated.

    Args:
        model: The model's configuration.
        config: The trainer's, as it will be on `gpus` processes.
        gpus: How many GPUs.
        device: Each of them.
        engine: "ddp", "zero2", "zero3" or "fsdp2".
        dtype: Of the model's weights.
        attention: "sdpa", "eager" or the name of a FlashAttention, which needs no mask; `None` leaves it to transformers.
        adapter: `peft.LoraConfig` of a student that is an adapter.
        teacher_adapter: That of `teacher="lora"`; `None`: the trainer's default.
        quantized: Bits of the weights below an adapter: 4, 8 or `None`.
        prompt: Tokens of the longest prompt.
        feedback: Tokens that the teacher's prompt has beside those.
        completion: Mean tokens of a completion; memory is that of the longest, `max_completion_length`.
        coverage: Share of rollouts with feedback.
        efficiency: Share of the device's peak that matrix products get.

    Raises:
        ValueError: If a number is out of its range, the engine isn't known, the combination is one that training refuses,
            or the model is a mixture of experts.
    """

    model: PretrainedConfig
    config: VPDConfig
    gpus: int = 1
    device: Device = DEVICES["h100"]
    engine: str = "ddp"
    dtype: torch.dtype = torch.float32
    attention: str | None = None
    adapter: Any = None
    teacher_adapter: Any = None
    quantized: int | None = None
    prompt: int = 512
    feedback: int = 512
    completion: int | None = None
    coverage: float = 1.0
    efficiency: float = 0.4

    def __post_init__(self) -> None:
        experts = ("num_experts", "num_local_experts", "n_routed_experts")
        text = self.model.get_text_config()
        if any((getattr(text, name, None) or 0) > 1 for name in experts):
            raise ValueError(
                f"models with experts ({text.model_type}) can't be estimated: which of them a token takes is not "
                "known without data."
            )
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {self.engine!r}.")
        if self.engine != "ddp" and self.gpus < 2:
            raise ValueError(f"engine={self.engine!r} spreads a model over GPUs; gpus is {self.gpus}.")
        for name, least in (("gpus", 1), ("prompt", 1), ("feedback", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}.")
        if self.config.max_completion_length is None:
            raise ValueError("max_completion_length is None; an estimate needs to know how long completions can be.")
        if self.completion is not None and not 1 <= self.completion <= self.longest:
            raise ValueError(
                f"the mean completion must have 1 to max_completion_length ({self.longest}) tokens; got {self.completion}."
            )
        for name in ("coverage", "efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a number in (0, 1]; got {getattr(self, name)}.")
        if self.quantized is not None and self.adapter is None:
            raise ValueError("quantized weights can't be trained: the student must be an adapter (use_peft: true).")
        if self.quantized == 8 and self.engine == "fsdp2":
            raise ValueError("FSDP can't split a model in 8 bits; use 4 bits, or another engine.")
        if self.quantized is not None and self.config.use_vllm:
            raise ValueError("quantized weights and use_vllm don't go together: vLLM can't be given such weights.")

    @property
    def longest(self) -> int:
        """Tokens of the longest completion."""
        assert self.config.max_completion_length is not None
        return self.config.max_completion_length

    @property
    def mean(self) -> int:
        """Mean tokens of a completion."""
        return self.completion or self.longest

    @property
    def told(self) -> int:
        """Tokens of the teacher's prompt, which the configuration or the model's context may cut."""
        limits = [self.prompt + self.feedback, self.config.max_teacher_prompt_length]
        if context := getattr(self.model.get_text_config(), "max_position_embeddings", None):
            limits.append(context - self.longest)
        return max(min(limit for limit in limits if limit is not None), 1)

    @property
    def half(self) -> torch.dtype | None:
        """The half precision that training computes in."""
        return torch.bfloat16 if self.config.bf16 else torch.float16 if self.config.fp16 else None

    @property
    def computed(self) -> torch.dtype:
        """The precision that matrices are multiplied in."""
        return self.half or self.dtype

    @property
    def tflops(self) -> float:
        """The device's peak in that precision, 10¹² operations per second."""
        return self.device.tflops if self.computed.itemsize == 2 else self.device.tflops_float32

    @property
    def loaded(self) -> int:
        """Bytes of a trained weight before an engine has it: PEFT keeps float32 of adapters that aren't on quantized ones."""
        if self.adapter is not None:
            return 4 if self.quantized is None else 2
        return self.dtype.itemsize

    @property
    def kept(self) -> int:
        """Bytes of a trained weight as it lasts: FSDP keeps float32."""
        if self.engine in ("zero2", "zero3"):
            return self.computed.itemsize
        if self.engine == "fsdp2" and self.half is not None:
            return 4
        return self.loaded

    @property
    def deepspeed(self) -> bool:
        return self.engine in ("zero2", "zero3")

    @property
    def shards_weights(self) -> bool:
        return self.engine in ("zero3", "fsdp2")

    @property
    def rows(self) -> int:
        """Rollouts of a batch on each GPU."""
        return self.config.per_device_train_batch_size * self.config.steps_per_generation

    def rehearsal(self, adapter: Any) -> Rehearsal:
        """The network, with or without an adapter, as the engine runs it."""
        # DDP computes float32 weights under autocast; the others hold or gather weights in the half precision itself
        cast = self.half is not None and self.engine != "ddp"
        return Rehearsal(
            self.model,
            dtype=self.computed if cast else self.dtype,
            autocast=None if cast else self.half,
            checkpointing=bool(self.config.gradient_checkpointing),
            adapter=adapter,
            attention=self.attention,
            float32_head=self.config.cast_lm_head_to_fp32,
        )

    def with_config(self, **fields: Any) -> Plan:
        """The plan with other fields of the trainer's configuration."""
        config = copy.copy(self.config)
        for name, value in fields.items():
            setattr(config, name, value)
        return replace(self, config=config)
