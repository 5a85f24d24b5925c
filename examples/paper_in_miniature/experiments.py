"""The systems, and the tables as lists of runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .run import Cell
from .task import DOMAINS, RIGID


SEEDS = (0, 1, 2, 3, 4)  # reported
# Symbols of an answer: what an environment says can be used where hardly any rollout succeeds, siblings can't
LENGTHS = {"environment": 3, "siblings": 2, "critique": 2}

Overrides = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class System:
    """
    A row of the paper's tables.

    `candidates` are what tuning chooses from: a learning rate and fields of `VPDConfig`. Each system has five, over its
    two rows if there are two.
    """

    name: str
    method: str
    teacher: str = "shared"
    candidates: tuple[tuple[float, Overrides], ...] = ()


def candidates(field: str, *values: Any) -> tuple[tuple[float, Overrides], ...]:
    """Two learning rates times two values of the field that matters most to a method."""
    return tuple((rate, ((field, value),)) for rate in (3e-4, 6e-4) for value in values)


SHARP = 0.5  # the library's default for a teacher that shares the student's weights; 1 is the paper's


def distilling(divergence: str) -> tuple[tuple[float, Overrides], ...]:
    """Two learning rates times two divergences, and one of these with a sharpened target."""
    return (*DIVERGENCE, sharpened(divergence))


def sharpened(divergence: str) -> tuple[float, Overrides]:
    return 6e-4, (("divergence", divergence), ("teacher_temperature", SHARP))


DIVERGENCE = candidates("divergence", "jsd", "forward_kl")
MIX = (*candidates("advantage_mix", 0.5, 0.1), (1e-3, (("advantage_mix", 0.1),)))

GRPO = System("GRPO", "grpo", candidates=tuple((rate, ()) for rate in (3e-4, 6e-4, 1e-3, 2e-3, 4e-3)))
# A teacher with the student's weights has two rows. The sharpened one has no choice of its own
SDPO = System("SDPO, live teacher", "sdpo", "shared", DIVERGENCE)
SDPO_SHARP = System("SDPO, live teacher, sharpened", "sdpo", "shared", (sharpened("forward_kl"),))
SDPO_EMA = System("SDPO, EMA teacher", "sdpo", "ema", distilling("forward_kl"))
JOINT = System("SDPO+RL, joint loss", "joint_loss", "shared", distilling("jsd"))
RESHAPE = System("SDPO+RL, advantage reshaping", "advantage_reshaping", "shared", MIX)
REWEIGHT = System("SDPO+RL, advantage reweighting", "advantage_reweighting", "shared", MIX)
VPD_PAPER = System("VPD, shared teacher, not sharpened", "vpd", "shared", DIVERGENCE)
VPD = System("VPD, shared teacher", "vpd", "shared", (sharpened("forward_kl"),))
VPD_EMA = System("VPD, EMA teacher", "vpd", "ema", distilling("forward_kl"))
VPD_LORA = System("VPD, LoRA teacher", "vpd", "lora", distilling("forward_kl"))
SYSTEMS = (GRPO, SDPO, SDPO_SHARP, SDPO_EMA, JOINT, RESHAPE, REWEIGHT, VPD_PAPER, VPD, VPD_EMA, VPD_LORA)

Tuned = dict[str, int]  # the chosen candidate of each system with each feedback


def tuning_name(system: System, feedback: str) -> str:
    return f"{system.name} / {feedback}"


def cell(system: System, feedback: str, domain: str, seed: int, tuned: Tuned, /, **changes: Any) -> Cell:
    """A run of a system as it was tuned."""
    rate, overrides = system.candidates[tuned[tuning_name(system, feedback)]]
    values: dict[str, Any] = dict(
        method=system.method,
        teacher=system.teacher,
        # GRPO makes no use of feedback
        feedback="environment" if system.method == "grpo" else feedback,
        length=LENGTHS[feedback],
        domain=domain,
        seed=seed,
        learning_rate=rate,
        overrides=(*overrides, *changes.pop("overrides", ())),
    )
    return Cell(**{**values, **changes})


def rows_of(
    system: System, feedback: str, tuned: Tuned, /, domains: Sequence[str] = DOMAINS, **changes: Any
) -> Iterator[Cell]:
    """The runs behind one row: every domain, every reported seed. Seeds come first, so that rows fill up evenly."""
    for seed in SEEDS:
        for domain in domains:
            yield cell(system, feedback, domain, seed, tuned, **changes)


# ---- Experiments: a name, and what it runs given what was tuned


TUNED_SYSTEMS = [("environment", s) for s in SYSTEMS] + [("siblings", s) for s in SYSTEMS]
TUNED_SYSTEMS += [("critique", SDPO_SHARP), ("critique", VPD)]


def table_1(tuned: Tuned) -> list[Cell]:
    """Environment feedback."""
    return evenly(*(rows_of(system, "environment", tuned) for system in SYSTEMS))


def table_2(tuned: Tuned) -> list[Cell]:
    """Siblings."""
    return evenly(*(rows_of(system, "siblings", tuned) for system in SYSTEMS))


def table_3(tuned: Tuned) -> list[Cell]:
    """Self-critique; siblings are in table 2."""
    return evenly(*(rows_of(system, "critique", tuned) for system in (SDPO_SHARP, VPD)))


def table_4(tuned: Tuned) -> list[Cell]:
    """E-steps on every batch and on every tenth; on every fifth is in tables 1 and 2."""
    return evenly(
        *(
            rows_of(VPD, feedback, tuned, overrides=(("e_step_frequency", frequency),))
            for feedback in ("environment", "siblings")
            for frequency in (1, 10)
        )
    )


# Both are run, although "batch" is the default of tables 1 and 2: they are compared on one machine's base model
SHIFTS = ("batch", "running")


def running_shift(tuned: Tuned) -> list[Cell]:
    """A reward shift that E-steps measure, and one that M-steps measure, which saves the E-step a pass."""
    return evenly(*(shifted(shift, feedback, tuned) for shift in SHIFTS for feedback in BOTH))


def shifted(shift: str, feedback: str, tuned: Tuned) -> Iterator[Cell]:
    return rows_of(VPD, feedback, tuned, FEW, overrides=(("reward_shift", shift),))


LONG = 300  # steps
NOISE = (0.3, 0.6, 1.0)
# A shift that lags twenty E-steps behind tells whether the default's, which follows at once, is what a fixed prior needs
LAGGING = ("reward_shift_momentum", 0.95)
# Answers of three symbols have small implicit rewards, on which the sigmoid is nearly straight: then all rollouts weigh
# the same whatever the prior. Ten times the reward is as if answers were ten times as long
TENFOLD = ("bco_temperature", 1.0)
PRIORS: dict[str, tuple[tuple[str, Any], ...]] = {
    "dynamic prior": (),
    "fixed prior": (("prior", "fixed"),),
    "dynamic prior, lagging shift": (LAGGING,),
    "fixed prior, lagging shift": (("prior", "fixed"), LAGGING),
    "dynamic prior, tenfold reward": (TENFOLD,),
    "fixed prior, tenfold reward": (("prior", "fixed"), TENFOLD),
}
FEW = ("cipher", "facts")  # domains of the experiments below


def table_5(tuned: Tuned) -> list[Cell]:
    """The two priors, in long runs."""
    return evenly(*(rows_of(VPD, "environment", tuned, FEW, steps=LONG, overrides=o) for o in PRIORS.values()))


LONG_SYSTEMS = (SDPO, SDPO_SHARP, SDPO_EMA)


def figure_2(tuned: Tuned) -> list[Cell]:
    """Late degradation: long runs; VPD's are those of table 5."""
    return evenly(*(rows_of(s, "environment", tuned, FEW, steps=LONG) for s in LONG_SYSTEMS))


# The lengths that each is run on
DENSE_SYSTEMS = {GRPO: (1, 2), SDPO_SHARP: (1, 2), JOINT: (1, 2), VPD: (1, 2), SDPO_EMA: (2,), VPD_EMA: (2,)}


def density(tuned: Tuned) -> list[Cell]:
    """Answers of one and two symbols; three are in table 1."""
    rows = [dense(system, n, tuned) for system, lengths in DENSE_SYSTEMS.items() for n in lengths]
    return evenly(*rows, *(slower(system, tuned) for system in SLOWER_SYSTEMS))


SLOWER_SYSTEMS = (VPD, VPD_EMA)


def slower(system: System, tuned: Tuned) -> Iterator[Cell]:
    """Answers of two symbols at half the rate that was tuned on three."""
    rate, _ = system.candidates[tuned[tuning_name(system, "environment")]]
    return rows_of(system, "environment", tuned, FEW, length=2, learning_rate=rate / 2)


def dense(system: System, length: int, tuned: Tuned) -> Iterator[Cell]:
    # GRPO was tuned for answers of two symbols with siblings: with three it learns nothing to choose by
    if system is GRPO:
        return rows_of(system, "siblings", tuned, FEW, length=length)
    return rows_of(system, "environment", tuned, FEW, length=length)


NOISY_SYSTEMS = (SDPO_SHARP, VPD)


def noise(tuned: Tuned) -> list[Cell]:
    """Symbols of the feedback are random with this probability; none are in table 1."""
    return evenly(*(rows_of(s, "environment", tuned, FEW, noise=level) for level in NOISE for s in NOISY_SYSTEMS))


COLD_SYSTEMS = (SDPO_SHARP, VPD, VPD_LORA)


def cold_start(tuned: Tuned) -> list[Cell]:
    """A base model that can't read feedback."""
    rows = [rows_of(s, "environment", tuned, FEW, length=2, skill=0.0) for s in COLD_SYSTEMS]
    return evenly(rows_of(GRPO, "siblings", tuned, FEW, skill=0.0), *rows)


def rigid(tuned: Tuned) -> list[Cell]:
    """A chain of steps of which feedback makes up all but the last."""
    return [
        c for seed in (*SEEDS, 5, 6, 7, 8, 9) for system in RIGID_SYSTEMS for c in rigid_runs(system, tuned, (seed,))
    ]


RIGID_SYSTEMS = (GRPO, SDPO_SHARP, JOINT, VPD)


def rigid_runs(system: System, tuned: Tuned, seeds: Sequence[int]) -> list[Cell]:
    feedback = "siblings" if system is GRPO else "environment"
    return [cell(system, feedback, RIGID, seed, tuned, length=2, noise=1.0) for seed in seeds]


# The adapter's learning rate over the student's, and its decay after each rollout batch; the default is 10 and 0.1
ADAPTERS = {"plain": (1, 0.0), "fast": (10, 0.0), "fading": (1, 0.1), "fast, hardly fading": (10, 0.03)}
ADAPTERS |= {"fast and fading (default)": (10, 0.1), "fast, fading quickly": (10, 0.3)}


def lora_teacher(tuned: Tuned) -> list[Cell]:
    """What makes an adapter of the teacher's own work."""
    return evenly(*(adapted(name, tuned) for name in ADAPTERS))


def adapted(name: str, tuned: Tuned) -> Iterator[Cell]:
    scale, decay = ADAPTERS[name]
    rate, _ = VPD_LORA.candidates[tuned[tuning_name(VPD_LORA, "environment")]]
    changed: list[tuple[str, Any]] = []
    if scale != 10:
        changed.append(("e_step_learning_rate", scale * rate))
    if decay != 0.1:
        changed.append(("teacher_adapter_decay", decay))
    return rows_of(VPD_LORA, "environment", tuned, FEW, overrides=tuple(changed))


STABILITY_RATES = (3e-4, 6e-4, 1e-3)
BOTH = ("environment", "siblings")


@dataclass(frozen=True)
class Change:
    """
    What a stability run changes in the paper's shared teacher: a remedy that needs no second copy of the weights, a
    condition that may matter, or, for comparison, an EMA teacher, which is such a copy.
    """

    system: System = VPD_PAPER
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the cells
    rates: tuple[float, ...] = (6e-4,)
    feedback: tuple[str, ...] = BOTH


CHANGES = {
    "as in the paper": Change(rates=STABILITY_RATES),
    "sharpened target": Change(changes={"overrides": (("teacher_temperature", SHARP),)}, rates=STABILITY_RATES),
    "EMA teacher": Change(VPD_EMA, rates=STABILITY_RATES),
    "warm-up of 50 steps": Change(changes={"overrides": (("warmup_steps", 50),)}),
    "4 of each class per E-step": Change(changes={"overrides": (("e_step_min_per_class", 4),)}),
    # Of the environment's feedback every rollout gets some, of siblings those of groups with successes
    "feedback for half of the rollouts": Change(changes={"coverage": 0.5}, feedback=("environment",)),
    "divided by rollouts with feedback": Change(
        changes={"overrides": (("m_step_normalization", "with_feedback"),)}, feedback=("siblings",)
    ),
    "no siblings that are equal": Change(changes={"feedback": "other_siblings"}, feedback=("siblings",)),
}


STABILITY_ROWS = [
    (name, feedback, rate)
    for feedback in BOTH
    for name, change in CHANGES.items()
    if feedback in change.feedback
    for rate in change.rates
]


def stability(tuned: Tuned) -> list[Cell]:
    """Both kinds of feedback at rising learning rates, whatever was tuned."""
    return evenly(*(stable(*row) for row in STABILITY_ROWS))


def stable(name: str, feedback: str, rate: float) -> Iterator[Cell]:
    change = CHANGES[name]
    forward = (("divergence", "forward_kl"),)
    assert change.system.candidates[1] == (3e-4, forward)
    chosen = {tuning_name(change.system, feedback): 1}
    return rows_of(change.system, feedback, chosen, FEW, learning_rate=rate, **change.changes)


def evenly(*rows: Iterator[Cell]) -> list[Cell]:
    return [c for group in zip(*rows, strict=True) for c in group]


EXPERIMENTS = {
    experiment.__name__: experiment
    for experiment in (
        table_1,
        table_2,
        stability,
        table_4,
        table_3,
        lora_teacher,
        cold_start,
        rigid,
        density,
        noise,
        table_5,
        figure_2,
        running_shift,
    )
}
