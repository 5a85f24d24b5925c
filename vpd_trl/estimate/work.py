"""Operations and seconds of a rollout batch."""

from __future__ import annotations

from ..distillation import Comparison
from ..network import has_dropout
from .memory import parameters
from .plan import Plan
from .rehearsal import Rehearsal


def operations(plan: Plan, student: Rehearsal, teacher: Rehearsal) -> dict[str, float]:
    """
    Operations of all GPUs for one rollout batch, by what they are for; an E-step's are its share in one batch.

    Args:
        plan: The run.
        student: The network that the M-step trains.
        teacher: The network that the E-step trains.
    """
    config, parts = plan.config, plan.config.parts
    prompt, told, mean = plan.prompt, plan.told, plan.mean
    rollouts = plan.rows * plan.gpus
    with_feedback = rollouts * plan.coverage
    # Where weights are split, all rollouts are scored, as processes take part in equally many passes
    scored = rollouts if plan.shards_weights else with_feedback
    known = config.trl_scores_rollouts and not has_dropout(student.model)
    scores = student.scores(1, prompt, mean).flops
    told_scores = teacher.scores(1, told, mean).flops if parts.shapes_advantages or parts.refines_teacher else 0
    found: dict[str, float] = {}
    if config.trl_scores_rollouts:
        found["TRL's log-probabilities"] = rollouts * scores
    if config.beta != 0 and config.rl_weight:
        found["reference model"] = rollouts * scores
    if parts.shapes_advantages:
        found["credit of tokens"] = scored * (told_scores + (0 if known else scores))
    if config.rl_weight:
        step = student.policy_gradient(1, prompt, mean)
        found["policy gradient"] = rollouts * config.num_iterations * step.flops
    if config.kl_weight:
        importance = config.weighs_importance
        step = student.m_step(1, prompt, mean, compare=Comparison.of(config), importance=importance)
        found["M-step: student"] = with_feedback * config.num_iterations * step.flops
        found["M-step: teacher"] = with_feedback * config.num_iterations * teacher.target(1, told, mean).flops
        if importance and not known:
            found["M-step: importance ratios"] = scored * scores
            known = True
    if parts.refines_teacher:
        share = with_feedback / config.e_step_frequency
        found["E-step: teacher"] = share * config.e_step_epochs * teacher.e_step(1, told, mean).flops
        if config.reward_shift == "batch":
            found["E-step: first reward shift"] = share * told_scores
        if config.prior == "fixed" or (config.prior == "dynamic" and not known):
            found["E-step: prior"] = share * scores
    return found


def seconds(plan: Plan, student: Rehearsal, flops: dict[str, float]) -> dict[str, float]:
    """
    Seconds of a rollout batch.

    Generation takes all rollouts of a GPU at one time: for each token it reads the weights and the cache once, or
    computes for longer. Training takes its operations at `efficiency` × the peak of the precision that it computes in.
    """
    config, device = plan.config, plan.device
    rate = plan.tflops * 1e12 * plan.efficiency
    number = parameters(student)
    weights = number * plan.computed.itemsize / (config.vllm_tensor_parallel_size if config.use_vllm else 1)
    cache = plan.rows * student.cache_bytes(plan.prompt + plan.mean // 2)
    token = max((weights + cache) / (device.bandwidth * 1e9), 2 * number * plan.rows / rate)
    return {"rollouts, at least": plan.mean * token} | {name: n / (plan.gpus * rate) for name, n in flops.items()}
