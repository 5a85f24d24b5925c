"""Bytes on each GPU: what lasts, and what lives at the peak of each phase."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..distillation import Comparison
from ..network import causal_lm
from .plan import Plan
from .rehearsal import Rehearsal


GIB = 2**30

# Context, kernels and communication buffers of a process on a GPU: an assumption, in GiB
RESERVE = 1.5

# DeepSpeed's defaults, in elements: a bucket of gradients to reduce, and parameters that ZeRO-3 keeps gathered
BUCKET = 500_000_000
MOST_LIVE = 1_000_000_000

# Bytes of optimizer state for each byte of trained weights; most keep two moments
_STATES = {"sgd": 0.0, "adafactor": 0.0, "lomo": 0.0, "lion": 1.0, "rmsprop": 1.0, "adagrad": 1.0}


def lasting(plan: Plan, student: Rehearsal, teacher: Rehearsal) -> dict[str, float]:
    """
    Bytes of weights, gradients, optimizer state, and of what a teacher, a prior or a reference model adds.

    Args:
        plan: The run.
        student: The network that the M-step trains.
        teacher: The network that the E-step trains.
    """
    config, parts, memory = plan.config, plan.config.parts, {}
    shards = plan.gpus if plan.shards_weights else 1
    split = 1 if plan.engine == "ddp" else plan.gpus  # gradients and optimizer state
    computed, kept = plan.computed.itemsize, plan.kept
    trained = parameters(student, trained=True)

    quantized, frozen = _frozen_bytes(student.model, plan)
    memory["weights"] = (quantized + frozen + trained * kept) / shards
    if plan.shards_weights:
        memory["gathered weights"] = float(computed * _gathered(plan, student))
    memory["gradients"] = trained * kept / split
    if plan.engine == "fsdp2" and _accumulates(plan):
        memory["gradients, whole while they add up"] = float(trained * computed)
    if plan.engine == "ddp" and plan.gpus > 1:
        memory["buckets of gradients"] = float(trained * kept)
    elif plan.deepspeed:
        memory["buckets of gradients"] = float(BUCKET * computed)
    # Beside half-precision weights DeepSpeed's optimizer has a float32 copy, and ZeRO-2 has one beside float32 too
    master = 4 if plan.deepspeed and (computed == 2 or plan.engine == "zero2") else 0
    memory["optimizer"] = trained * (state_bytes(config.optim, 4 if master else kept) + master) / split

    if parts.uses_feedback and config.teacher == "ema":
        memory["teacher: moving average"] = trained * 4 / shards  # in float32, as it takes small steps
    elif parts.refines_teacher and config.teacher == "lora":
        own = parameters(teacher, trained=True)
        memory["teacher: adapter and its optimizer"] = own * (4 + 4 + state_bytes(config.optim, 4))
    if parts.refines_teacher and config.prior == "fixed":
        # Taken before DeepSpeed turns weights to half precision, but for ZeRO-3's, which are split first
        memory["fixed prior"] = trained * _prior_itemsize(plan) / shards
    if config.beta != 0 and plan.adapter is None:
        memory["reference model"] = (
            parameters(student) * (computed if plan.deepspeed else plan.dtype.itemsize) / shards
        )
    memory["reserve"] = RESERVE * GIB
    return memory


def phases(plan: Plan, student: Rehearsal, teacher: Rehearsal) -> dict[str, float]:
    """
    Bytes beside those that last at the peaks of generation, the teacher's targets, the losses and the E-step.

    Args:
        plan, student, teacher: As of `lasting`.
    """
    config, found = plan.config, {}
    rows, prompt, told, longest = config.per_device_train_batch_size, plan.prompt, plan.told, plan.longest
    reserved = _vllm_bytes(plan, student)
    if config.use_vllm:
        found["rollouts (vLLM)"] = reserved
    else:
        found["rollouts"] = float(plan.rows * student.cache_bytes(prompt + longest))
        if plan.engine == "zero3" and config.ds3_gather_for_generation:
            found["rollouts"] += parameters(student) * plan.computed.itemsize
    awake = 0.0 if config.vllm_enable_sleep_mode else reserved

    # With both losses the graph of GRPO's is there while the other's is made
    joint = bool(config.rl_weight and config.kl_weight)
    held = student.held(rows, prompt, longest) if joint else 0
    if config.parts.uses_feedback:
        swapped = _swapped(plan, student, itemsize=4) if config.teacher == "ema" else 0.0
        needed = [teacher.target(rows, told, longest).memory + swapped]
        if config.parts.shapes_advantages:
            needed += [teacher.scores(rows, told, longest).memory + swapped]
            needed += [student.scores(rows, prompt, longest).memory]
        found["teacher's targets"] = max(needed) + held + awake
    if config.kl_weight:
        step = student.m_step(
            *(rows, prompt, longest),
            compare=Comparison.of(config),
            importance=config.m_step_importance_clip is not None,
            policy_gradient=joint,
        )
        # The teacher's hidden states are among them
        found["M-step"] = step.memory + _head_copy(plan, student) + awake
    if config.rl_weight and not joint:
        found["policy gradient"] = student.policy_gradient(rows, prompt, longest).memory + awake
    if config.parts.refines_teacher:
        together = max(rows * (prompt + longest - 1) // (told + longest - 1), 1)
        needed = [teacher.e_step(together, told, longest).memory]
        if config.prior == "fixed":  # scores before; another prior takes no more than the forward pass of these
            swapped = _swapped(plan, student, itemsize=_prior_itemsize(plan))
            needed += [student.scores(together, prompt, longest).memory + swapped]
        found["E-step"] = max(needed) + awake
    return found


def parameters(network: Rehearsal, *, trained: bool = False) -> int:
    """How many weights a network has, or trains."""
    return sum(p.numel() for p in network.model.parameters() if p.requires_grad or not trained)


def state_bytes(optim: Any, itemsize: int) -> float:
    """Bytes of an optimizer's state for each trained weight, which has `itemsize` itself."""
    name = getattr(optim, "value", str(optim)).lower()
    moments = next((number for kind, number in _STATES.items() if kind in name), 2.0)
    return moments * (1.0 if "8bit" in name else 0.5 if "4bit" in name else itemsize)


def _accumulates(plan: Plan) -> bool:
    """Whether gradients of several micro-batches, or pieces of an E-step, add up before a step."""
    in_e_step = plan.config.parts.refines_teacher and plan.config.steps_per_generation > 1
    return plan.config.gradient_accumulation_steps > 1 or in_e_step


def _frozen_bytes(model: nn.Module, plan: Plan) -> tuple[float, float]:
    """Bytes of the weights that are not trained: of those that are quantized, and of the others."""
    linear = set()
    if plan.quantized is not None:  # bitsandbytes takes every linear layer but the head
        head = causal_lm(model).get_output_embeddings()
        layers = (m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
        linear = {id(m.weight) for m in layers if not m.weight.requires_grad}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    small = sum(p.numel() for p in frozen if id(p) in linear)
    whole = sum(p.numel() for p in frozen) - small
    each = {None: 0.0, 4: 0.5 + 4 / 64, 8: 1.0}[plan.quantized]  # with a float32 constant for 64 weights of 4 bits
    return small * each, whole * (plan.computed if plan.deepspeed else plan.dtype).itemsize


def _gathered(plan: Plan, student: Rehearsal) -> int:
    """Most parameters that are whole at one time where weights are sharded."""
    if plan.engine == "zero3":
        return min(parameters(student), max(MOST_LIVE, student.outside_blocks()))
    return min(parameters(student), student.outside_blocks() + 2 * student.largest_block())


def _vllm_bytes(plan: Plan, student: Rehearsal) -> float:
    """What vLLM beside training takes of a GPU."""
    config = plan.config
    if not config.use_vllm or config.vllm_mode != "colocate":
        return 0.0
    reserved = config.vllm_gpu_memory_utilization * plan.device.memory * GIB
    weights = parameters(student) * plan.computed.itemsize / config.vllm_tensor_parallel_size
    if weights >= reserved:
        raise ValueError(
            f"vLLM's share of a GPU ({reserved / GIB:.1f} GiB, vllm_gpu_memory_utilization="
            f"{config.vllm_gpu_memory_utilization:g}) can't hold its weights ({weights / GIB:.1f} GiB). Raise it, or "
            "vllm_tensor_parallel_size."
        )
    return reserved


def _prior_itemsize(plan: Plan) -> int:
    """Bytes of each weight of a fixed prior, which is taken before ZeRO-2 turns weights to half precision."""
    return plan.loaded if plan.engine == "zero2" else plan.kept


def _swapped(plan: Plan, student: Rehearsal, *, itemsize: int) -> float:
    """What is copied while a copy of the student's weights, with `itemsize` bytes for each, stands in for them."""
    trained = parameters(student, trained=True)
    if plan.shards_weights:  # the student's are kept, as they are written over
        return trained * plan.kept / plan.gpus
    return float(trained * plan.kept) if plan.kept != itemsize else 0.0  # the copy in their precision


def _head_copy(plan: Plan, student: Rehearsal) -> float:
    """The head of a moving average, which is kept until the divergence has been computed, if it is trained."""
    head = causal_lm(student.model).get_output_embeddings().weight
    if plan.config.teacher != "ema" or not head.requires_grad:
        return 0.0
    copied = plan.shards_weights or plan.kept < 4
    return float(head.numel() * plan.computed.itemsize) if copied else 0.0
