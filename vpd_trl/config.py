"""The configuration of `VPDTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from .config_checks import check_fields, check_together, warn_about_fields_without_effect
from .methods import METHODS, Method


@dataclass
class VPDConfig(GRPOConfig):
    r"""
    Configuration of [`VPDTrainer`]: everything in [`~trl.GRPOConfig`], and the fields below.

    Defaults are the paper's where it gives one. A value that is out of range raises a `ValueError` that names the
    field, the value and what is allowed.

    Parameters:
        method (`str`, *optional*, defaults to `"vpd"`):
            `"vpd"` trains the teacher (E-step) and distils it into the student (M-step); `"sdpo"` distils from a
            teacher that is never trained; `"grpo"` is TRL's GRPO, untouched. `"joint_loss"`, `"advantage_reshaping"`
            and `"advantage_reweighting"` combine the last two in one step (appendix B.3).
        success_threshold (`float`, *optional*, defaults to `1.0`):
            A rollout is a success when its reward (the weighted sum over the reward functions) is at least this.

        > Teacher context

        teacher (`str`, *optional*, defaults to `"shared"`):
            Weights that give the M-step its targets. `"shared"`: the student's own. `"ema"`: a moving average of them
            that follows once per rollout batch; the E-step trains the network that it follows. `"lora"`: the student's
            and a LoRA adapter on top of them, which is all that the E-step then trains (`teacher_peft_config` of the
            trainer).
        teacher_temperature (`float` or `None`, *optional*):
            τ above 0: the M-step's target is q^(1/τ), normalised, where q is the teacher; 1 is the paper's. `None`: 0.5
            for a `"shared"` teacher, else 1. A shared teacher moves with every M-step. Where it is a little less sure
            than the student both flatten, ever faster, until answers have no end any more; a sharper target turns that
            around, and costs variety where the teacher is unsure (measured in examples/paper_in_miniature). The E-step
            and the advantage methods see the teacher as it is.
        teacher_update_rate (`float`, *optional*, defaults to `0.05`):
            Rate r in (0, 1] of the `"ema"` teacher: average ← (1 − r) · average + r · student. The paper has 0.05 for
            science and mathematics, 0.01 for code.
        teacher_adapter_decay (`float`, *optional*, defaults to `0.1`):
            Share in [0, 1) of the `"lora"` teacher's adapter that fades after each rollout batch. The M-step moves the
            student to the teacher, which is the student and the adapter: without a decay what the student has taken
            over counts twice, and the teacher runs ahead of it (measured in examples/paper_in_miniature). It fades
            whether or not there was an E-step.
        save_teacher_adapter (`bool`, *optional*, defaults to `True`):
            Whether `save_model` writes the `"lora"` teacher's adapter to `teacher/adapter` beside the model, and a
            push to the Hub takes it along. Checkpoints hold what resuming needs in any case.
        teacher_template (`str`, *optional*):
            The teacher's prompt, with the fields `{prompt}`, `{solution}` and `{critique}` (the two sections are
            empty where there is no such feedback). In a conversation it replaces the text of the last user turn; for
            a string prompt it is the whole prompt. `None`: the question, then the sections and a request to solve it
            for a conversation; for a string, the sections and then the prompt, so that what stands right before the
            completion is the same for teacher and student.
        solution_template (`str`, *optional*, defaults to a short section):
            The section that shows a solution, with the field `{solution}`.
        critique_template (`str`, *optional*, defaults to a short section):
            The section that shows a critique, with the field `{critique}`.
        max_teacher_prompt_length (`int` or `None`, *optional*):
            Longest teacher prompt, in tokens (the paper's code has 10,240). Longer feedback is cut in the middle; the
            question and the chat header never are. `None`: what `max_completion_length` leaves of the model's context.
        strip_thinking (`bool`, *optional*, defaults to `True`):
            Whether `<think>` blocks are removed from the texts that feedback functions and the teacher see.

        > E-step

        e_step_frequency (`int`, *optional*, defaults to `5`):
            An E-step runs on every F-th rollout batch, the first included.
        e_step_epochs (`int`, *optional*, defaults to `1`):
            Passes over the rollout batch in one E-step.
        e_step_batch_size (`int` or `None`, *optional*):
            Completions per optimizer update of the E-step, over all processes; a multiple of
            `per_device_train_batch_size` × processes that divides the rollout batch. `None`: the whole rollout batch.
        e_step_learning_rate (`float` or `None`, *optional*):
            Peak learning rate of the E-step; it follows the student's schedule. `None`: the student's, or ten times
            that for the adapter of a `"lora"` teacher.
        e_step_min_per_class (`int`, *optional*, defaults to `1`):
            Fewest successes, and fewest failures, in an update of the E-step; with fewer it is skipped and counted.
        bco_temperature (`float`, *optional*, defaults to `0.1`):
            β of the implicit reward ρ = β · (log q − log π) (eq. 7).
        reward_shift_momentum (`float`, *optional*, defaults to `0.5`):
            Momentum m in [0, 1) of the reward shift: δ ← m · δ + (1 − m) · batch value (eq. 9).
        reward_shift (`str`, *optional*, defaults to `"batch"`):
            What the reward shift is an average of: `"batch"`, the implicit rewards of each E-step's batch before it
            trains on it, which takes a forward pass; or `"running"`, those that each M-step finds on its batch anyway (only
            the first E-step makes the pass, and with `e_step_epochs` each epoch's own pass counts too). The latter needs the dynamic prior, or `"sampling"`, and a teacher whose targets are of the weights that the
            E-step trains (not `"ema"`).
        log_ratio_reduction (`str`, *optional*, defaults to `"sum"`):
            Log-ratio of a rollout: `"sum"` over its tokens (the paper's), or their `"mean"`.
        prior (`str`, *optional*, defaults to `"dynamic"`):
            π of the implicit reward: `"dynamic"` is the student at the start of the E-step, `"fixed"` the initial model,
            `"sampling"` the student that sampled the rollouts, by vLLM's own numbers, which take no forward pass and
            differ from the student's by the rounding of two engines (`use_vllm`, and the full distribution: no `top_k`
            and the like).

        > M-step

        divergence (`str`, *optional*, defaults to `"jsd"`):
            `"jsd"` (the paper's science), `"reverse_kl"` KL(student ‖ teacher) (code) or `"forward_kl"`
            KL(teacher ‖ student) (mathematics).
        jsd_weight (`float`, *optional*, defaults to `0.5`):
            Weight of the teacher in the mixture of `"jsd"`, in (0, 1).
        distillation_top_k (`int` or `None`, *optional*):
            Compare student and teacher on the student's k likeliest tokens (the paper: 100 for science, 20 for code).
            `None`: on the full vocabulary, without ever holding the logits.
        distillation_add_tail (`bool`, *optional*, defaults to `True`):
            With `distillation_top_k`, add one event for all the other tokens; otherwise the k are renormalised.
        m_step_normalization (`str`, *optional*, defaults to `"all"`):
            The M-step's loss is a sum over the tokens of rollouts with feedback, divided by the number of completion
            tokens of `"all"` rollouts of the batch, or of those `"with_feedback"` only.
        m_step_importance_clip (`float` or `None`, *optional*):
            Weigh each token by the ratio of the student's probability to that at sampling time, cut at this value
            (SDPO's code: 2.0). `None`: no weights, as in the paper.

        > Hybrids

        joint_rl_weight (`float`, *optional*, defaults to `0.5`):
            λ_rl of `"joint_loss"`, λ_rl · GRPO's loss + λ_kl · M-step (eq. B.23). At 0 it is SDPO.
        joint_kl_weight (`float`, *optional*, defaults to `0.5`):
            λ_kl of `"joint_loss"`. At 0 it is GRPO.
        advantage_mix (`float`, *optional*, defaults to `0.5`):
            λ in [0, 1] of the advantage methods (eqs. B.24 and B.28), at the start of training. At 0 they are GRPO.
        advantage_mix_decay (`str` or `None`, *optional*):
            `"constant"`, or `"linear"` to 0 at the end of training. `None`: the paper's, which is `"linear"` for
            `"advantage_reweighting"` and `"constant"` for `"advantage_reshaping"`.
        advantage_weight_clip (`float`, *optional*, defaults to `0.2`):
            ε_w in (0, 1]: `"advantage_reweighting"` keeps its weights within 1 ± ε_w.
    """

    # fmt: off
    method: str = field(default="vpd", metadata={"help": "Training method: 'vpd', 'sdpo', 'grpo', 'joint_loss', 'advantage_reshaping' or 'advantage_reweighting'."})
    success_threshold: float = field(default=1.0, metadata={"help": "A rollout is a success when its reward is at least this (reward units)."})

    # Teacher context
    teacher: str = field(default="shared", metadata={"help": "Weights of the M-step's targets: 'shared' (the student's), 'ema' (their moving average) or 'lora' (the student's and an adapter of the teacher's own)."})
    teacher_temperature: float | None = field(default=None, metadata={"help": "Divides the logits of the M-step's target: below 1 it is sharper than the teacher. None: 0.5 with teacher='shared', else 1. Paper: 1."})
    teacher_update_rate: float = field(default=0.05, metadata={"help": "Rate r in (0, 1] of the 'ema' teacher: average <- (1 - r) * average + r * student, once per rollout batch. Paper: 0.05 (science), 0.01 (code)."})
    teacher_adapter_decay: float = field(default=0.1, metadata={"help": "Share of the 'lora' teacher's adapter that fades after each rollout batch, in [0, 1), as the student takes over what it does."})
    save_teacher_adapter: bool = field(default=True, metadata={"help": "Whether save_model and a push to the Hub take the 'lora' teacher's adapter along (folder teacher/adapter)."})
    teacher_template: str | None = field(default=None, metadata={"help": "The teacher's prompt, with the fields {prompt}, {solution}, {critique}. None: a template that suits the prompt's form."})
    solution_template: str = field(default="\n\nA correct solution:\n\n{solution}", metadata={"help": "Section of the teacher's prompt for a solution, with the field {solution}."})
    critique_template: str = field(default="\n\nFeedback on an earlier attempt:\n\n{critique}", metadata={"help": "Section of the teacher's prompt for a critique, with the field {critique}."})
    max_teacher_prompt_length: int | None = field(default=None, metadata={"help": "Longest teacher prompt in tokens; longer feedback is cut. None: what the model's context leaves. Paper: 10240."})
    strip_thinking: bool = field(default=True, metadata={"help": "Whether <think> blocks are removed from what feedback functions and the teacher see."})

    # E-step
    e_step_frequency: int = field(default=5, metadata={"help": "F: an E-step runs on every F-th rollout batch. Paper: 5."})
    e_step_epochs: int = field(default=1, metadata={"help": "Passes over the rollout batch in one E-step."})
    e_step_batch_size: int | None = field(default=None, metadata={"help": "Completions per E-step update over all processes. None: the whole rollout batch, one update."})
    e_step_learning_rate: float | None = field(default=None, metadata={"help": "Peak learning rate of the E-step, on the student's schedule. None: the student's, or ten times that with teacher='lora'."})
    e_step_min_per_class: int = field(default=1, metadata={"help": "Fewest successes and failures for an E-step update; with fewer it is skipped."})
    bco_temperature: float = field(default=0.1, metadata={"help": "Temperature of the implicit reward (beta of the paper's equation 7). Paper: 0.1."})
    reward_shift_momentum: float = field(default=0.5, metadata={"help": "Momentum in [0, 1) of the moving-average reward shift (equation 9)."})
    reward_shift: str = field(default="batch", metadata={"help": "Average of the implicit rewards of each E-step's 'batch', which takes a forward pass, or 'running', of those that every M-step finds anyway."})
    log_ratio_reduction: str = field(default="sum", metadata={"help": "Log-ratio of a rollout: 'sum' or 'mean' over its tokens. Paper: 'sum'."})
    prior: str = field(default="dynamic", metadata={"help": "Reference of the implicit reward: 'dynamic' (the current student), 'fixed' (the initial model) or 'sampling' (the student that sampled, by vLLM's log-probabilities)."})

    # M-step
    divergence: str = field(default="jsd", metadata={"help": "Divergence of the M-step: 'reverse_kl', 'forward_kl' or 'jsd'. Paper: 'reverse_kl' for code, 'jsd' for science, 'forward_kl' for mathematics."})
    jsd_weight: float = field(default=0.5, metadata={"help": "Weight in (0, 1) of the teacher in the mixture of 'jsd'. Paper: 0.5."})
    distillation_top_k: int | None = field(default=None, metadata={"help": "Compare on the student's k likeliest tokens. None: full vocabulary. Paper: 100 (science), 20 (code)."})
    distillation_add_tail: bool = field(default=True, metadata={"help": "With distillation_top_k, add one event that holds all other tokens."})
    m_step_normalization: str = field(default="all", metadata={"help": "Denominator of the M-step: completion tokens of 'all' rollouts, or of those 'with_feedback'."})
    m_step_importance_clip: float | None = field(default=None, metadata={"help": "Upper bound of the importance ratio that weighs the M-step's tokens. None: no ratio, as in the paper. SDPO's code: 2.0."})

    # Hybrids
    joint_rl_weight: float = field(default=0.5, metadata={"help": "Weight of GRPO's loss in 'joint_loss', at least 0."})
    joint_kl_weight: float = field(default=0.5, metadata={"help": "Weight of the M-step's divergence in 'joint_loss', at least 0."})
    advantage_mix: float = field(default=0.5, metadata={"help": "Mixing coefficient in [0, 1] of the advantage methods at the start of training; 0 is GRPO."})
    advantage_mix_decay: str | None = field(default=None, metadata={"help": "'constant', or 'linear' to 0 over training. None: 'linear' for 'advantage_reweighting', else 'constant'."})
    advantage_weight_clip: float = field(default=0.2, metadata={"help": "'advantage_reweighting' keeps its weights within 1 plus or minus this, in (0, 1]."})
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)
        if self.advantage_mix_decay is None:
            self.advantage_mix_decay = "linear" if self.method == "advantage_reweighting" else "constant"
        try:
            super().__post_init__()
        except ValueError as error:
            if "must be divisible by num_generations" not in str(error):
                raise
            size = self.generation_batch_size
            valid = [n for n in range(2, size + 1) if size % n == 0]
            raise ValueError(
                f"{error} Both count completions, not prompts. Valid values of num_generations here: {valid}."
            ) from None
        check_together(self)
        warn_about_fields_without_effect(self)

    def __getstate__(self) -> dict[str, Any]:
        # Pickled as training_args.bin, which lies beside every model and is pushed with it
        return {**self.__dict__, "hub_token": None}

    @property
    def parts(self) -> Method:
        """What `method` is made of."""
        return METHODS[self.method]

    @property
    def rl_weight(self) -> float:
        """Weight of GRPO's loss in the student's."""
        return self.joint_rl_weight if self.method == "joint_loss" else float(self.parts.policy_gradient)

    @property
    def kl_weight(self) -> float:
        """Weight of the M-step's loss in the student's."""
        return self.joint_kl_weight if self.method == "joint_loss" else float(self.parts.distills)

    @property
    def weighs_importance(self) -> bool:
        """Whether the M-step has importance ratios."""
        return bool(self.kl_weight) and self.m_step_importance_clip is not None

    @property
    def trl_scores_rollouts(self) -> bool:
        """Whether TRL computes log-probabilities of rollouts before training on them, for its loss."""
        if not self.rl_weight:
            return False
        if self.use_vllm and self.vllm_importance_sampling_correction:
            return True
        return self.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations) != 0

    @property
    def target_temperature(self) -> float:
        """`teacher_temperature`, or its default for this teacher."""
        if self.teacher_temperature is not None:
            return self.teacher_temperature
        return 0.5 if self.teacher == "shared" else 1.0

    @property
    def divergence_alpha(self) -> float:
        """`divergence` as one number: 0 is the forward KL, 1 the reverse KL, between them the JSD's weight."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": self.jsd_weight}[self.divergence]
