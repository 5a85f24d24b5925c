"""What a training run needs, from its plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import memory, work
from .plan import Plan


@dataclass(frozen=True)
class Estimate:
    """
    What a run needs.

    Attributes:
        parameters: Of the student, its adapter included.
        trained: How many of them are trained.
        memory: Bytes on each GPU for as long as the run lasts, by what they are for.
        phases: Bytes beside those at the peak of each phase.
        flops: Operations of all GPUs for one rollout batch, by what they are for; an E-step's are its share in one batch.
        seconds: The same as time.
        limit: Bytes of a GPU.
    """

    parameters: int
    trained: int
    memory: dict[str, float]
    phases: dict[str, float]
    flops: dict[str, float]
    seconds: dict[str, float]
    limit: float

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

    Operations are those of matrix products and attention, whose whole square counts.

    Args:
        plan: The run.

    Raises:
        ValueError: If vLLM's share of a GPU can't hold its weights.
    """
    student = plan.rehearsal(plan.adapter)
    lora = plan.config.parts.refines_teacher and plan.config.teacher == "lora"
    teacher = plan.rehearsal(plan.teacher_adapter or _default_adapter()) if lora else student
    phases = memory.phases(plan, student, teacher)
    flops = work.operations(plan, student, teacher)
    return Estimate(
        parameters=memory.parameters(student),
        trained=memory.parameters(student, trained=True),
        memory=memory.lasting(plan, student, teacher),
        phases=phases,
        flops=flops,
        seconds=work.seconds(plan, student, flops),
        limit=plan.device.memory * memory.GIB,
    )


def _default_adapter() -> Any:
    from peft import LoraConfig

    from ..lora_teacher import DEFAULT

    return LoraConfig(**DEFAULT)
