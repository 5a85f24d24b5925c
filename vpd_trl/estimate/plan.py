"""What a training run needs: bytes on each GPU, phase by phase, and operations and seconds of a rollout batch."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ..config import VPDConfig
from ..network import causal_lm
from .devices import DEVICES, Device
from .rehearsal import Rehearsal


ENGINES = ("ddp", "zero2", "zero3", "fsdp2")

GIB = 2**30

# Context, kernels and communication buffers of a process on a GPU: an assumption, in GiB
RESERVE = 1.5

# DeepSpeed's defaults, in elements: a bucket of gradients to reduce, and parameters that ZeRO-3 keeps gathered
BUCKET = 500_000_000
MOST_LIVE = 1_000_000_000

# Bytes of optimizer state per byte, and per element, of trained weights
_STATE_PER_BYTE = {"adamw": 2.0, "adam": 2.0, "sgd": 0.0, "adafactor": 0.0, "lion": 1.0, "rmsprop": 1.0}


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
        adapter: `peft.LoraConfig` of a student that is an adapter.
        teacher_adapter: That of `teacher="lora"`; `None`: the trainer's default.
        quantized: Bits of the weights below an adapter: 4, 8 or `None`.
        flash: Whether attention needs no mask (FlashAttention).
        prompt: Tokens of the longest prompt.
        feedback: Tokens that the teacher's prompt has beside those.
        completion: Mean tokens of a completion; memory is that of the longest, `max_completion_length`.
        coverage: Share of rollouts with feedback.
        efficiency: Share of the device's peak that matrix products get.

    Raises:
        ValueError: If a number is out of its range, the engine isn't known, or the model is a mixture of experts.
    """

    model: PretrainedConfig
    config: VPDConfig
    gpus: int = 1
    device: Device = DEVICES["h100"]
    engine: str = "ddp"
    dtype: torch.dtype = torch.float32
    adapter: Any = None
    teacher_adapter: Any = None
    quantized: int | None = None
    flash: bool = False
    prompt: int = 512
    feedback: int = 512
    completion: int | None = None
    coverage: float = 1.0
    efficiency: float = 0.4

    def __post_init__(self) -> None:
        experts = ("num_experts", "num_local_experts", "n_routed_experts")
        if any((getattr(self.model, name, None) or 0) > 1 for name in experts):
            raise ValueError(
                f"models with experts ({self.model.model_type}) can't be estimated: which of them a token takes is not "
                "known without data."
            )
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {self.engine!r}.")
        if self.engine != "ddp" and self.gpus < 2:
            raise ValueError(f"engine={self.engine!r} spreads a model over GPUs; gpus is {self.gpus}.")
        for name, least in (("gpus", 1), ("prompt", 1), ("feedback", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}.")
        if self.completion is not None and not 1 <= self.completion <= self.longest:
            raise ValueError(
                f"the mean completion must have 1 to max_completion_length ({self.longest}) tokens; got {self.completion}."
            )
        for name in ("coverage", "efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a number in (0, 1]; got {getattr(self, name)}.")

    @property
    def longest(self) -> int:
        return self.config.max_completion_length

    @property
    def mean(self) -> int:
        return self.completion or self.longest

    @property
    def half(self) -> torch.dtype | None:
        """The half precision that training computes in."""
        return torch.bfloat16 if self.config.bf16 else torch.float16 if self.config.fp16 else None

    @property
    def shards_weights(self) -> bool:
        return self.engine in ("zero3", "fsdp2")

    @property
    def rows(self) -> int:
        """Rollouts of a batch on each GPU."""
        return self.config.per_device_train_batch_size * self.config.steps_per_generation


@dataclass
class Estimate:
    """
    What a run needs.

    Attributes:
        memory: Bytes on each GPU for as long as the run lasts, by what they are for.
        phases: Bytes beside those at the peak of each phase.
        flops: Operations of all GPUs for one rollout batch, by what they are for; an E-step's are its share in one batch.
        seconds: The same as time.
        limit: Bytes of a GPU.
    """

    parameters: int
    trained: int
    memory: dict[str, float] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    limit: float = 0.0

    @property
    def peak(self) -> float:
        """Bytes that a GPU must have."""
        return sum(self.memory.values()) + max(self.phases.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


def estimate(plan: Plan) -> Estimate:
    """
    What a run needs, by rehearsing its passes on tensors without data and adding up what lasts.

    Args:
        plan: The run.

    Returns:
        Bytes, operations and seconds. Operations are those of matrix products and attention, whose whole square counts.
        Time is operations over `efficiency` × peak; generation is bounded from below by the reading of weights and cache.
    """
    student = _rehearsal(plan, plan.adapter)
    trained = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    found = Estimate(sum(p.numel() for p in student.model.parameters()), trained, limit=plan.device.memory * GIB)
    teacher = student
    if plan.config.teacher == "lora":
        teacher = _rehearsal(plan, plan.teacher_adapter or _default_teacher_adapter())
    _add_lasting(found, plan, student, teacher)
    _add_phases(found, plan, student, teacher)
    _add_work(found, plan, student, teacher)
    return found


def _rehearsal(plan: Plan, adapter: Any) -> Rehearsal:
    # DDP computes float32 weights under autocast; the others hold or gather weights in the half precision itself
    cast = plan.half is not None and plan.engine != "ddp"
    return Rehearsal(
        plan.model,
        dtype=plan.half if cast and plan.half is not None else plan.dtype,
        autocast=None if cast else plan.half,
        checkpointing=plan.config.gradient_checkpointing,
        adapter=adapter,
        padding_mask=not plan.flash,
    )


def _default_teacher_adapter() -> Any:
    from peft import LoraConfig

    from ..lora_teacher import DEFAULT

    return LoraConfig(**DEFAULT)


# ---- Memory


def _add_lasting(found: Estimate, plan: Plan, student: Rehearsal, teacher: Rehearsal) -> None:
    """Weights, gradients, optimizer state, and what a teacher or a fixed prior adds."""
    config, gpus, memory = plan.config, plan.gpus, found.memory
    shards = gpus if plan.shards_weights else 1
    computed = _computed_itemsize(plan)
    deepspeed = plan.engine in ("zero2", "zero3")
    kept = _kept_itemsize(plan)
    frozen = _frozen_bytes(student.model, plan, computed if deepspeed else plan.dtype.itemsize)
    trained = found.trained
    memory["weights"] = (frozen + trained * kept) / shards
    if plan.shards_weights:
        memory["gathered weights"] = computed * float(_gathered(plan, student, found.parameters))
    memory["gradients"] = trained * kept / (1 if plan.engine == "ddp" else gpus)
    if gpus > 1 and plan.engine != "fsdp2":
        memory["buckets of gradients"] = trained * kept if plan.engine == "ddp" else min(trained, BUCKET) * computed
    master = 4 if deepspeed and computed == 2 else 0
    split = 1 if plan.engine == "ddp" else gpus
    memory["optimizer"] = trained * (_state_bytes(config.optim, 4 if master else kept) + master) / split

    parts = config.parts
    if parts.uses_feedback and config.teacher == "ema":
        memory["teacher: moving average"] = trained * 4 / shards  # in float32, as it takes small steps
    elif parts.refines_teacher and config.teacher == "lora":
        own = sum(p.numel() for p in teacher.model.parameters() if p.requires_grad)
        memory["teacher: adapter and its optimizer"] = own * (4 + 4 + _state_bytes(config.optim, 4))
    if parts.refines_teacher and config.prior == "fixed":
        memory["fixed prior"] = trained * kept / shards
    if config.beta > 0 and parts.policy_gradient and plan.adapter is None:
        memory["reference model"] = found.parameters * plan.dtype.itemsize / shards
    memory["reserve"] = RESERVE * GIB


def _computed_itemsize(plan: Plan) -> int:
    return (plan.half or plan.dtype).itemsize


def _kept_itemsize(plan: Plan) -> int:
    """Bytes of a trained weight: FSDP keeps them in float32, as PEFT does adapters, DeepSpeed beside its optimizer."""
    if plan.engine in ("zero2", "zero3"):
        return _computed_itemsize(plan)
    return 4 if plan.engine == "fsdp2" or plan.adapter is not None else plan.dtype.itemsize


def _frozen_bytes(model: Any, plan: Plan, itemsize: int) -> float:
    """Bytes of the weights that are not trained."""
    total = 0.0
    linear = set()
    if plan.quantized is not None:  # bitsandbytes takes every linear layer but the head
        head = causal_lm(model).get_output_embeddings()
        layers = (m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
        linear = {id(m.weight) for m in layers if not m.weight.requires_grad}
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        # With a float32 constant for each 64 weights of 4 bits
        bytes_each = {4: 0.5 + 4 / 64, 8: 1.0}[plan.quantized or 8] if id(parameter) in linear else itemsize
        total += parameter.numel() * bytes_each
    return total


def _gathered(plan: Plan, student: Rehearsal, parameters: int) -> int:
    """Most parameters that are whole at one time where weights are sharded."""
    if plan.engine == "zero3":
        return min(parameters, max(MOST_LIVE, student.outside_blocks()))
    return min(parameters, student.outside_blocks() + 2 * student.largest_block())


def _state_bytes(optim: Any, itemsize: int) -> float:
    """Bytes of an optimizer's state for each trained parameter, of which it has `itemsize`."""
    name = getattr(optim, "value", str(optim)).lower()
    if "8bit" in name:
        return 2.0
    return next((per_byte for kind, per_byte in _STATE_PER_BYTE.items() if kind in name), 2.0) * itemsize


def _add_phases(found: Estimate, plan: Plan, student: Rehearsal, teacher: Rehearsal) -> None:
    """What lives at the peaks of generation, E-step and M-step."""
    config, parts = plan.config, plan.config.parts
    rows = config.per_device_train_batch_size
    prompt, longest = plan.prompt, plan.longest
    reserved = plan.config.vllm_gpu_memory_utilization * plan.device.memory * GIB if _colocated(plan) else 0.0
    if config.use_vllm:
        found.phases["rollouts (vLLM)"] = reserved
    else:
        found.phases["rollouts"] = float(plan.rows * (prompt + longest) * student.cache_bytes())
    awake = 0.0 if config.vllm_enable_sleep_mode else reserved
    told = prompt + plan.feedback
    if parts.uses_feedback:
        swapped = 0.0
        if config.teacher == "ema" and plan.shards_weights:  # written over the student's weights, which are kept
            swapped = found.memory["teacher: moving average"] * _kept_itemsize(plan) / 4
        elif config.teacher == "ema" and _kept_itemsize(plan) < 4:  # a copy in the weights' precision
            swapped = found.trained * _kept_itemsize(plan)
        found.phases["teacher's targets"] = teacher.scores(rows, told, longest).memory + swapped + awake
    if parts.distills:
        step = student.m_step(rows, prompt, longest, alpha=config.divergence_alpha, top_k=config.distillation_top_k)
        # The teacher's hidden states are among them
        found.phases["M-step"] = step.memory + awake
    if parts.policy_gradient:
        found.phases["policy gradient"] = student.policy_gradient(rows, prompt, longest).memory + awake
    if parts.refines_teacher:
        together = max(rows * (prompt + longest - 1) // (told + longest - 1), 1)
        found.phases["E-step"] = teacher.e_step(together, told, longest).memory + awake


def _colocated(plan: Plan) -> bool:
    return plan.config.use_vllm and plan.config.vllm_mode == "colocate"


# ---- Operations and time


def _add_work(found: Estimate, plan: Plan, student: Rehearsal, teacher: Rehearsal) -> None:
    config, parts = plan.config, plan.config.parts
    prompt, mean = plan.prompt, plan.mean
    told = prompt + plan.feedback
    rollouts = plan.rows * plan.gpus
    with_feedback = rollouts * plan.coverage
    scores = student.scores(1, prompt, mean).flops
    target = teacher.scores(1, told, mean).flops if parts.uses_feedback else 0
    scored = _trl_scores(config)
    flops = found.flops
    if scored:
        flops["TRL's log-probabilities"] = rollouts * scores
    if parts.shapes_advantages:
        flops["credit of tokens"] = with_feedback * (target + (0 if scored else scores))
    if parts.policy_gradient:
        step = student.policy_gradient(1, prompt, mean)
        flops["policy gradient"] = rollouts * config.num_iterations * step.flops
        if config.beta > 0:
            flops["reference model"] = rollouts * scores
    if parts.distills:
        step = student.m_step(1, prompt, mean, alpha=config.divergence_alpha, top_k=config.distillation_top_k)
        flops["M-step: student"] = with_feedback * config.num_iterations * step.flops
        flops["M-step: teacher"] = with_feedback * config.num_iterations * target
    if parts.refines_teacher:
        share = with_feedback / config.e_step_frequency
        step = teacher.e_step(1, told, mean)
        flops["E-step: teacher"] = share * config.e_step_epochs * step.flops
        flops["E-step: first reward shift"] = share * target
        if not (scored and config.prior == "dynamic"):
            flops["E-step: prior"] = share * scores
    rate = plan.gpus * plan.device.tflops * 1e12 * plan.efficiency
    found.seconds["rollouts, at least"] = _generation_seconds(plan, student, found.parameters)
    found.seconds |= {name: value / rate for name, value in flops.items()}


def _trl_scores(config: VPDConfig) -> bool:
    """Whether TRL computes log-probabilities of rollouts before training on them."""
    if config.use_vllm and config.vllm_importance_sampling_correction:
        return True
    generate_every = config.steps_per_generation * config.num_iterations
    return config.gradient_accumulation_steps % generate_every != 0


def _generation_seconds(plan: Plan, student: Rehearsal, parameters: int) -> float:
    """All rollouts of a GPU at one time: each token reads the weights and the cache once, or computes for longer."""
    device = plan.device
    weights = parameters * (plan.half or plan.dtype).itemsize
    cache = plan.rows * (plan.prompt + plan.mean / 2) * student.cache_bytes()
    reading = (weights + cache) / (device.bandwidth * 1e9)
    computing = 2 * parameters * plan.rows / (device.tflops * 1e12 * plan.efficiency)
    return plan.mean * max(reading, computing)


def with_parts(plan: Plan, **fields: Any) -> Plan:
    """The plan with other fields of its trainer's configuration."""
    config = copy.copy(plan.config)
    for name, value in fields.items():
        setattr(config, name, value)
    return replace(plan, config=config)


def gib(value: float) -> str:
    """Bytes as text."""
    amount = value / GIB
    return f"{amount:.1f} GiB" if amount >= 1 else f"{math.ceil(amount * 1024)} MiB"
