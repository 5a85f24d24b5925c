"""What each metric means, in which group it is shown, which way is better, and what is healthy."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Metrics that are shown together: those named, in that order, then all with one of the prefixes."""

    key: str
    title: str
    text: str
    names: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()

    def holds(self, metric: str) -> bool:
        """Whether a metric is shown in this group."""
        return metric in self.names or metric.startswith(self.prefixes)


GROUPS = (
    Group("reward", "Reward", "What the rollouts of training earn.", ("reward", "reward_std"), ("rewards/", "frac_")),
    Group("success", "Success on held-out problems", "Evaluations, with their intervals.", (), ("eval_",)),
    Group(
        "m_step",
        "M-step",
        "The student moves towards the teacher, on its own rollouts.",
        ("m_step/divergence", "entropy", "loss", "grad_norm", "learning_rate", "m_step/tokens"),
        ("m_step/", "policy_", "kl", "clip_ratio/"),
    ),
    Group(
        "e_step",
        "E-step",
        "The teacher learns to tell successes from failures by the feedback that it reads.",
        ("e_step/loss", "e_step/reward_margin", "e_step/reward_shift", "e_step/positives", "e_step/negatives"),
        ("e_step/",),
    ),
    Group(
        "teacher",
        "Teacher",
        "How the teacher's opinion of the rollouts differs from the student's.",
        ("teacher/log_ratio_margin", "teacher/log_ratio_confident", "teacher/log_ratio_end"),
        ("teacher/", "advantages/"),
    ),
    Group(
        "feedback",
        "Feedback",
        "How much of it there is, and whether it arrives.",
        ("feedback/coverage", "feedback/truncated"),
        ("feedback/",),
    ),
    Group(
        "completions",
        "Completions",
        "How long the rollouts are, in tokens, and whether they end.",
        ("completions/clipped_ratio", "completions/mean_length"),
        ("completions/",),
    ),
    Group(
        "time",
        "Time",
        "Seconds.",
        ("step_time", "time/generate", "time/feedback", "time/e_step", "time/m_step"),
        ("time/",),
    ),
)
OTHER = Group("other", "Other", "Everything else that was logged.")


@dataclass(frozen=True)
class Note:
    """
    What a metric should look like.

    Attributes:
        text: In a sentence.
        better: 1 if higher is better, −1 if lower is, 0 if neither is always true.
        line: A value to compare with.
        share: Whether it is a share, from 0 to 1.
    """

    text: str = ""
    better: int = 0
    line: float | None = None
    share: bool = False


NOTES = {
    "reward": Note("Mean reward of the rollouts.", 1),
    "reward_std": Note("Spread of the rewards; 0 everywhere leaves nothing to tell apart."),
    "frac_reward_zero_std": Note("Share of groups whose rollouts all have the same reward.", 0, None, True),
    "m_step/divergence": Note("Nats per token. Falls as the student learns; must not grow for long.", -1),
    "m_step/tokens": Note("Tokens distilled per optimizer step."),
    "entropy": Note("The student's, nats per token. A fall to 0 or a steady rise is a warning."),
    "loss": Note("The student's loss."),
    "grad_norm": Note("Before clipping."),
    "kl": Note("To the reference model of GRPO.", 0),
    "e_step/loss": Note("Starts near ln 4 ≈ 1.39, then below it.", -1, math.log(4)),
    "e_step/reward_margin": Note("Above 0 after the first E-steps.", 1, 0.0),
    "e_step/reward_shift": Note("Any value, moving slowly."),
    "e_step/positives": Note("Successes per E-step; well above e_step_min_per_class."),
    "e_step/negatives": Note("Failures per E-step; well above e_step_min_per_class."),
    "e_step/skipped": Note("Share of updates without both classes: near 0.", -1, None, True),
    "e_step/grad_norm": Note("Not far above the student's for long."),
    "teacher/log_ratio_margin": Note("Successes minus failures, nats per rollout: above 0.", 1, 0.0),
    "teacher/log_ratio_confident": Note(
        "On tokens of successes that the student is sure of: near or above 0.", 1, 0.0
    ),
    "teacher/log_ratio_end": Note("On the ends of successes: not below 0 for long, else answers lose them.", 1, 0.0),
    "advantages/mix": Note("λ of the advantage methods."),
    "advantages/log_ratio": Note("Nats per token; several outweigh an advantage of about 1."),
    "feedback/coverage": Note("Share of rollouts with feedback: near 1 with a verifier.", 1, None, True),
    "feedback/truncated": Note("Share that was cut: near 0.", -1, None, True),
    "feedback/critique_discarded": Note("Share of critiques that were blank or unfinished: near 0.", -1, None, True),
    "feedback/answer_leak_rate": Note("Share of critiques that state the answer.", -1, None, True),
    "feedback/execution_passed": Note("Programs that pass all tests: neither near 0 nor 1.", 0, None, True),
    "feedback/execution_timeout": Note("Share of programs that ran into a time limit.", -1, None, True),
    "feedback/execution_no_code": Note("Completions without a whole program: near 0.", -1, None, True),
    "feedback/execution_not_run": Note("Programs that were not run: 0.", -1, None, True),
    "feedback/execution_seconds": Note("Seconds per program.", -1),
    "feedback/judge_failure_rate": Note("Requests that failed: near 0.", -1, None, True),
    "feedback/judge_retries": Note("Retries per request: near 0.", -1),
    "feedback/judge_latency": Note("Seconds per request.", -1),
    "completions/clipped_ratio": Note("Share of rollouts that did not end: a rise is a warning.", -1, None, True),
    "completions/mean_length": Note("Tokens."),
}


def note(metric: str) -> Note:
    """The note on a metric; a plain one for metrics that are not known here."""
    if metric in NOTES:
        return NOTES[metric]
    if metric.startswith("eval_"):
        if metric.endswith("truncated"):
            return Note("Share of samples that did not end.", -1, None, True)
        at_k = "@" in metric
        return Note("", 1 if at_k or metric.endswith("reward") else 0, None, at_k)
    if metric.startswith("time/") or metric == "step_time":
        return Note("", -1)
    if metric.startswith("rewards/") and metric.endswith("/mean"):
        return Note("Of one reward function.", 1)
    return Note()


def arrange(metrics: set[str]) -> list[tuple[Group, list[str]]]:
    """The groups that have any of the metrics, each with its metrics in order."""
    arranged: list[tuple[Group, list[str]]] = []
    left = set(metrics)
    for group in GROUPS:
        mine = {metric for metric in left if group.holds(metric)}
        left -= mine
        first = [name for name in group.names if name in mine]
        if mine:
            arranged.append((group, first + sorted(mine - set(first))))
    if left:
        arranged.append((OTHER, sorted(left)))
    return arranged
