"""What the fields of a `VPDConfig` may be."""

from __future__ import annotations

import warnings
from dataclasses import fields
from numbers import Real
from typing import TYPE_CHECKING, Any

from trl import GRPOConfig

from .methods import METHODS
from .text import check_template


if TYPE_CHECKING:
    from .config import VPDConfig


TEACHERS = ("shared", "ema", "lora")
PRIORS = ("dynamic", "fixed", "sampling")
REWARD_SHIFTS = ("batch", "running")
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")

# GRPOConfig fields that act in GRPO's own loss alone, so not in a method that distils
_GRPO_LOSS_FIELDS = (
    "beta",
    "epsilon",
    "epsilon_high",
    "delta",
    "loss_type",
    "importance_sampling_level",
    "off_policy_mask_threshold",
    "top_entropy_quantile",
    "entropy_coef",
    "use_adaptive_entropy",
    "scale_rewards",
    "multi_objective_aggregation",
    "use_bias_correction_kl",
    "router_aux_loss_coef",
)


def check_fields(config: VPDConfig) -> None:
    """Each of the fields that `VPDConfig` adds, by itself."""
    for name, allowed in (
        ("method", tuple(METHODS)),
        ("teacher", TEACHERS),
        ("prior", PRIORS),
        ("reward_shift", REWARD_SHIFTS),
        ("divergence", DIVERGENCES),
        ("log_ratio_reduction", ("sum", "mean")),
        ("m_step_normalization", ("all", "with_feedback")),
        ("advantage_mix_decay", (None, "constant", "linear")),
    ):
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}.")

    for name, optional in (
        ("e_step_frequency", False),
        ("e_step_epochs", False),
        ("e_step_min_per_class", False),
        ("e_step_batch_size", True),
        ("distillation_top_k", True),
        ("max_teacher_prompt_length", True),
    ):
        value = getattr(config, name)
        if value is None and optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{name} must be an integer of at least 1{' or None' if optional else ''}; got {value!r}."
            )

    if config.teacher == "lora" and not config.parts.refines_teacher:
        raise ValueError(
            f"teacher='lora' has an adapter that only an E-step trains, and method={config.method!r} has none; use "
            "method='vpd', or teacher='shared' or 'ema'."
        )
    _check_numbers(config)
    if config.teacher_template is not None:
        check_template("teacher_template", config.teacher_template, needs=("prompt",), one_of=("solution", "critique"))
    check_template("solution_template", config.solution_template, needs=("solution",))
    check_template("critique_template", config.critique_template, needs=("critique",))


def _check_numbers(config: VPDConfig) -> None:
    _check_number(config, "success_threshold", "a finite number", lambda x: abs(x) != float("inf"))
    _check_number(
        config, "teacher_temperature", "a finite number above 0", lambda x: 0 < x < float("inf"), optional=True
    )
    _check_number(config, "teacher_update_rate", "a number in (0, 1]", lambda x: 0 < x <= 1)
    _check_number(config, "teacher_adapter_decay", "a number in [0, 1)", lambda x: 0 <= x < 1)
    _check_number(config, "bco_temperature", "a finite number above 0", lambda x: 0 < x < float("inf"))
    _check_number(config, "reward_shift_momentum", "a number in [0, 1)", lambda x: 0 <= x < 1)
    _check_number(
        config, "jsd_weight", "a number in (0, 1); the ends are 'forward_kl' and 'reverse_kl'", lambda x: 0 < x < 1
    )
    _check_number(config, "e_step_learning_rate", "a number above 0", lambda x: 0 < x < float("inf"), optional=True)
    _check_number(config, "m_step_importance_clip", "a number above 0", lambda x: x > 0, optional=True)
    for name in ("joint_rl_weight", "joint_kl_weight"):
        _check_number(config, name, "a finite number of at least 0", lambda x: 0 <= x < float("inf"))
    if config.method == "joint_loss" and config.joint_rl_weight == config.joint_kl_weight == 0:
        raise ValueError("joint_rl_weight and joint_kl_weight are both 0, so there would be no loss; one must not be.")
    _check_number(config, "advantage_mix", "a number in [0, 1]", lambda x: 0 <= x <= 1)
    _check_number(config, "advantage_weight_clip", "a number in (0, 1]", lambda x: 0 < x <= 1)


def _check_number(config: VPDConfig, name: str, allowed: str, valid: Any, *, optional: bool = False) -> None:
    value = getattr(config, name)
    if value is None and optional:
        return
    # NaN fails every comparison, so it is refused too
    if isinstance(value, bool) or not isinstance(value, Real) or value != value or not valid(value):
        raise ValueError(f"{name} must be {allowed}{' or None' if optional else ''}; got {value!r}.")


def check_together(config: VPDConfig) -> None:
    """What fields must be to one another, once TRL has worked out the batch sizes."""
    if config.e_step_learning_rate is not None and not config.learning_rate > 0:
        raise ValueError(
            f"e_step_learning_rate ({config.e_step_learning_rate}) follows the student's schedule, so learning_rate "
            f"must be above 0; got {config.learning_rate}."
        )
    _check_batch_sizes(config)
    _check_sources_of_implicit_rewards(config)


def _check_batch_sizes(config: VPDConfig) -> None:
    if config.e_step_batch_size is None or not config.parts.refines_teacher:
        return
    unit = config.per_device_train_batch_size * config.world_size
    total = config.generation_batch_size
    if config.e_step_batch_size % unit or total % config.e_step_batch_size:
        valid = [n for n in range(unit, total + 1, unit) if total % n == 0]
        raise ValueError(
            f"e_step_batch_size ({config.e_step_batch_size}) must be a multiple of per_device_train_batch_size × "
            f"processes ({config.per_device_train_batch_size} × {config.world_size}) and divide the rollout batch "
            f"({total}); it counts completions over all processes. Valid values here: {valid}."
        )


def _check_sources_of_implicit_rewards(config: VPDConfig) -> None:
    if not config.parts.refines_teacher:
        return
    if config.prior == "sampling" and not config.use_vllm:
        raise ValueError("prior='sampling' takes the log-probabilities that vLLM reports, so it needs use_vllm=True.")
    if config.prior == "sampling" and (changed := cut_distribution(config)):
        raise ValueError(
            f"prior='sampling' needs rollouts of the full distribution; got {', '.join(changed)}, with "
            "which vLLM's log-probabilities are of another one. Use prior='dynamic', or leave these at their defaults."
        )
    if config.reward_shift == "running" and (config.teacher == "ema" or config.prior == "fixed"):
        raise ValueError(
            "reward_shift='running' takes its values from M-steps, where the teacher is that of the E-step and the "
            "prior the student: it needs teacher='shared' or 'lora' and prior='dynamic' or 'sampling'; got "
            f"teacher={config.teacher!r} and prior={config.prior!r}."
        )


# What makes rollouts come from another distribution than the student's at its temperature, and values that don't
_SHAPING = {
    "top_p": (1.0,),
    "top_k": (0, -1, None),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
}
_SHAPING_VLLM = (
    *_SHAPING,
    *("temperature", "presence_penalty", "frequency_penalty", "logit_bias", "bad_words", "allowed_token_ids"),
    *("min_tokens", "logits_processors", "structured_outputs", "guided_decoding"),
)


def cut_distribution(config: VPDConfig) -> list[str]:
    """What makes vLLM sample from another distribution than the student's at its temperature."""
    found = [
        f"{name}={getattr(config, name)}" for name, neutral in _SHAPING.items() if getattr(config, name) not in neutral
    ]
    if config.vllm_structured_outputs_regex is not None:
        found.append(f"vllm_structured_outputs_regex={config.vllm_structured_outputs_regex!r}")
    inner = {name: value for name, value in (config.generation_kwargs or {}).items() if name in _SHAPING_VLLM}
    return found + ([f"generation_kwargs={inner}"] if inner else [])


def warn_about_fields_without_effect(config: VPDConfig) -> None:
    """Fields that were set and do nothing with this method."""
    if config.rl_weight and config.use_vllm and config.vllm_importance_sampling_correction:
        changed = cut_distribution(config)
        if changed:
            warnings.warn(
                f"vLLM samples from a cut distribution ({', '.join(changed)}) while the trainer's log-probabilities "
                "are of the full one, so the importance ratio of vllm_importance_sampling_correction is biased. "
                "Sample from the full distribution, or set vllm_importance_sampling_correction=False.",
                stacklevel=4,
            )
    if config.rl_weight:
        return
    defaults = {f.name: f.default for f in fields(GRPOConfig)}
    changed = [name for name in _GRPO_LOSS_FIELDS if getattr(config, name) != defaults[name]]
    if changed:
        warnings.warn(
            f"method={config.method!r} replaces GRPO's loss by the M-step, so these fields have no effect on "
            f"training: {', '.join(changed)}.",
            stacklevel=4,
        )
