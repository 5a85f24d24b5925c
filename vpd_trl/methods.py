"""What each `method` of `VPDConfig` is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """
    The parts of a training method.

    Attributes:
        distills: The student's loss is the M-step's divergence to the teacher, and feedback is asked for. Otherwise
            it is GRPO's, and the trainer is TRL's.
        refines_teacher: An E-step trains the teacher on every `e_step_frequency`-th rollout batch.
    """

    distills: bool
    refines_teacher: bool


METHODS = {
    "vpd": Method(distills=True, refines_teacher=True),
    "sdpo": Method(distills=True, refines_teacher=False),
    "grpo": Method(distills=False, refines_teacher=False),
}
