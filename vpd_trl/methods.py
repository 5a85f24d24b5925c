"""What each `method` of `VPDConfig` is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """
    The parts of a training method.

    Attributes:
        distills: The student's loss holds the M-step's divergence to the teacher.
        refines_teacher: An E-step trains the teacher on every `e_step_frequency`-th rollout batch.
        policy_gradient: The student's loss holds GRPO's.
        shapes_advantages: The teacher turns GRPO's advantages, one per rollout, into one per token.
    """

    distills: bool = False
    refines_teacher: bool = False
    policy_gradient: bool = False
    shapes_advantages: bool = False

    @property
    def uses_feedback(self) -> bool:
        """Whether there is a teacher, and feedback is asked for. Otherwise the trainer is TRL's."""
        return self.distills or self.shapes_advantages


METHODS = {
    "vpd": Method(distills=True, refines_teacher=True),
    "sdpo": Method(distills=True),
    "grpo": Method(policy_gradient=True),
    "joint_loss": Method(distills=True, policy_gradient=True),
    "advantage_reshaping": Method(policy_gradient=True, shapes_advantages=True),
    "advantage_reweighting": Method(policy_gradient=True, shapes_advantages=True),
}
