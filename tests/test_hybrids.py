"""The three hybrids are GRPO or SDPO where their mixing weight is neutral, and their equations where it is not."""

import math
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer

from tests import tiny
from vpd_trl import checks
from vpd_trl.losses import reshaped_advantages, reweighted_advantages


ADVANTAGE_METHODS = ["advantage_reshaping", "advantage_reweighting"]
HYBRIDS = ["joint_loss", *ADVANTAGE_METHODS]


def trained(folder, **changes):
    trainer = tiny.trainer(folder, max_steps=4, **changes)
    trainer.train()
    return trainer


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def trl_grpo(folder, **changes):
    tokenizer = tiny.tokenizer()
    trainer = GRPOTrainer(
        model=tiny.model(tokenizer),
        reward_funcs=tiny.parity_reward,
        args=tiny.config(folder, method="grpo", max_steps=4, **changes),
        train_dataset=tiny.dataset(),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


GEOMETRY = [{}, {"steps_per_generation": 4}, {"loss_type": "grpo", "num_iterations": 2}]


@pytest.mark.parametrize("changes", GEOMETRY, ids=str)
@pytest.mark.parametrize(
    "neutral",
    [{"method": "joint_loss", "joint_rl_weight": 1.0, "joint_kl_weight": 0.0}]
    + [{"method": method, "advantage_mix": 0.0} for method in ADVANTAGE_METHODS],
    ids=lambda neutral: neutral["method"],
)
def test_a_hybrid_without_its_teacher_is_grpo_to_the_bit(tmp_path, neutral, changes):
    ours, theirs = trained(tmp_path / "a", **neutral, **changes), trl_grpo(tmp_path / "b", **changes)
    assert len(losses(ours)) == 4
    assert losses(ours) == losses(theirs)
    assert tiny.same(tiny.weights(ours), tiny.weights(theirs))


@pytest.mark.parametrize("changes", [{}, {"steps_per_generation": 4}, {"teacher": "ema"}], ids=str)
def test_a_joint_loss_without_rewards_in_it_is_sdpo_to_the_bit(tmp_path, changes):
    weights = {"joint_rl_weight": 0.0, "joint_kl_weight": 1.0}
    joint = trained(tmp_path / "a", method="joint_loss", **weights, **changes)
    sdpo = trained(tmp_path / "b", method="sdpo", **changes)
    assert losses(joint) == losses(sdpo)
    assert tiny.same(tiny.weights(joint), tiny.weights(sdpo))


@pytest.mark.parametrize("method", HYBRIDS)
def test_a_hybrid_is_neither_grpo_nor_sdpo(tmp_path, method):
    hybrid = tiny.weights(trained(tmp_path / "a", method=method))
    assert not tiny.same(hybrid, tiny.weights(trl_grpo(tmp_path / "b")))
    assert not tiny.same(hybrid, tiny.weights(trained(tmp_path / "c", method="sdpo")))


def every_other(completion_ids, **kwargs):
    return [float(i % 2) for i in range(len(completion_ids))]


def first_gradient(folder, **changes):
    """The gradient of the first micro-batch."""
    changes |= {"reward_funcs": every_other, "gradient_accumulation_steps": 1}
    trainer = tiny.trainer(folder, max_steps=1, **changes)
    kept = {}
    step = trainer.training_step

    def training_step(model, inputs, num_items_in_batch=None):
        loss = step(model, inputs, num_items_in_batch)
        kept.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return loss

    trainer.training_step = training_step
    trainer.train()
    return kept


def test_the_joint_loss_is_the_weighted_sum_of_both(tmp_path):
    joint = first_gradient(tmp_path / "a", method="joint_loss", joint_rl_weight=0.3, joint_kl_weight=2.0)
    grpo = first_gradient(tmp_path / "b", method="joint_loss", joint_rl_weight=1.0, joint_kl_weight=0.0)
    sdpo = first_gradient(tmp_path / "c", method="sdpo")
    assert any(g.abs().max() > 1e-3 for g in grpo.values())
    for name, gradient in joint.items():
        expected = 0.3 * grpo[name] + 2.0 * sdpo[name]
        assert torch.allclose(gradient, expected, atol=1e-6, rtol=1e-4), name


def test_reshaped_advantages_mix_those_of_the_verifier_with_the_log_ratio():
    advantages, log_ratio = torch.tensor([1.0, -2.0]), torch.tensor([[0.5, 0.0], [-3.0, 4.0]])
    expected = [[0.75 * 1 + 0.25 * 0.5, 0.75], [-0.75 * 2 - 0.25 * 3, -0.75 * 2 + 0.25 * 4]]
    assert torch.allclose(reshaped_advantages(advantages, log_ratio, mix=0.25), torch.tensor(expected))
    assert torch.equal(reshaped_advantages(advantages, log_ratio, mix=1.0), log_ratio)


def test_reweighted_advantages_keep_the_sign_of_the_verifier_and_stay_within_the_clip():
    advantages, log_ratio = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([[0.1, 9.0], [0.1, 9.0], [5.0, -5.0]])
    got = reweighted_advantages(advantages, log_ratio, mix=0.5, clip=0.2)
    # A token that the teacher favours: more credit in a success, less blame in a failure
    expected = [[0.5 + 0.5 * math.exp(0.1), 0.5 + 0.5 * 1.2], [-1 - math.exp(-0.1), -1 - 0.8], [0.0, 0.0]]
    assert torch.allclose(got, torch.tensor(expected))


@pytest.mark.parametrize("method", ADVANTAGE_METHODS)
def test_advantages_are_those_of_the_equation_on_the_rows_with_feedback_alone(tmp_path, method):
    def half(prompts, **kwargs):
        return ["a hint" if i % 2 else None for i in range(len(prompts))]

    trainer = tiny.trainer(tmp_path, method=method, max_steps=1, feedback_fn=half, gradient_accumulation_steps=1)
    shape = trainer.shape_advantages
    seen = {}

    class Shape:
        def __call__(self, batch):
            scorer = trainer.scorer
            seen["log_ratio"] = scorer.frozen_logps(batch, teacher=True) - scorer.frozen_logps(batch)
            seen["before"], seen["has"] = batch["advantages"].clone(), batch["has_feedback"].clone()
            seen["after"] = shape(batch)
            seen["shape"] = batch["completion_ids"].shape
            return seen["after"]

    trainer.shape_advantages = Shape()
    trainer.train()
    before, after, has = seen["before"].unsqueeze(-1), seen["after"], seen["has"]
    assert after.shape == seen["shape"]
    assert has.tolist() == [False, True, False, True]
    log_ratio = seen["log_ratio"]
    assert log_ratio[has].abs().max() > 0.01
    if method == "advantage_reshaping":
        with_feedback, without = 0.5 * before + 0.5 * log_ratio, 0.5 * before.expand_as(after)
    else:
        weight = (before.sign() * log_ratio).exp().clamp(0.8, 1.2)
        with_feedback, without = before * (0.5 + 0.5 * weight), before.expand_as(after)
    assert torch.allclose(after[has], with_feedback[has])
    assert torch.allclose(after[~has], without[~has])


def test_the_mix_decays_to_grpo_over_training_and_goes_on_where_it_was_after_a_resume(tmp_path):
    def mixes(trainer):
        return [row["advantages/mix"] for row in trainer.state.log_history if "advantages/mix" in row]

    changes = {"method": "advantage_reweighting", "advantage_mix": 0.8, "save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path, **changes)
    assert mixes(whole) == pytest.approx([0.8, 0.6, 0.4, 0.2])
    resumed = tiny.trainer(tmp_path, max_steps=4, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert mixes(resumed)[-2:] == pytest.approx([0.4, 0.2])
    assert tiny.same(tiny.weights(whole), tiny.weights(resumed))


def test_the_paper_lets_reweighting_decay_and_reshaping_stay(tmp_path):
    assert tiny.config(tmp_path, method="advantage_reweighting").advantage_mix_decay == "linear"
    assert tiny.config(tmp_path, method="advantage_reshaping").advantage_mix_decay == "constant"
    constant = tiny.config(tmp_path, method="advantage_reweighting", advantage_mix_decay="constant")
    assert constant.advantage_mix_decay == "constant"


def test_the_log_ratios_are_of_the_average_where_the_teacher_is_one(tmp_path):
    trainer = tiny.trainer(tmp_path, method="advantage_reshaping", advantage_mix=1.0, teacher="ema", max_steps=1)
    for weight in trainer.teacher.average.weights.values():
        weight.mul_(1.5)
    shape, seen = trainer.shape_advantages, {}

    def spy(batch):
        with trainer.teacher.average.swapped_in():
            of_average = trainer.scorer.frozen_logps(batch, teacher=True)
        of_student = trainer.scorer.frozen_logps(batch)
        got = shape(batch)
        seen["right"] = torch.allclose(got, of_average - of_student, atol=1e-6)
        of_shared = trainer.scorer.frozen_logps(batch, teacher=True) - of_student
        seen["shared"] = torch.allclose(got, of_shared, atol=1e-3)
        return got

    trainer.shape_advantages = spy
    trainer.train()
    assert seen == {"right": True, "shared": False}


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo"])
def test_the_gradient_is_the_policy_gradient_with_an_advantage_for_each_token(tmp_path, loss_type):
    """On-policy every loss of GRPO has the gradient of −Σ A_t · log π(y_t), up to its normaliser."""
    trainer = tiny.trainer(
        tmp_path,
        method="advantage_reshaping",
        advantage_mix=0.7,
        loss_type=loss_type,
        epsilon_high=5.0,  # cispo takes it for the largest ratio
        reward_funcs=every_other,
        max_steps=1,
        gradient_accumulation_steps=1,
        feedback_fn=lambda completion_ids, **k: ["x" * (3 + 9 * i) for i in range(len(completion_ids))],
    )
    found = {}
    step = trainer.training_step

    def training_step(model, inputs, num_items_in_batch=None):
        loss = step(model, inputs, num_items_in_batch)
        (batch,) = trainer._buffered_inputs
        found["gradient"] = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        mask = batch["completion_mask"]
        logps = trainer.scorer.sampled_logps(model, batch, teacher=False)
        per_token = -batch["advantages"] * logps * mask
        normalizer = {
            "grpo": mask.sum(-1, keepdim=True) * len(mask),
            "dr_grpo": len(mask) * trainer.max_completion_length,
        }.get(loss_type, mask.sum())
        (per_token / normalizer).sum().backward()
        found["expected"] = torch.cat([p.grad.flatten() for p in model.parameters()])
        return loss

    trainer.training_step = training_step
    trainer.train()
    assert found["expected"].abs().max() > 1e-4
    assert torch.allclose(found["gradient"], found["expected"], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("method", ADVANTAGE_METHODS)
def test_advantages_take_the_log_probabilities_that_trl_has_computed(tmp_path, method):
    def passes(trainer):
        asked, score = [], trainer.scorer.sampled_logps

        def noted(model, batch, *, teacher):
            asked.append(teacher)
            return score(model, batch, teacher=teacher)

        trainer.scorer.sampled_logps = noted
        trainer.train()
        return asked

    changes = {"method": method, "max_steps": 1, "gradient_accumulation_steps": 1}
    assert set(passes(tiny.trainer(tmp_path, **changes))) == {True, False}
    again = tiny.trainer(tmp_path, **changes, num_iterations=2)
    assert set(passes(again)) == {True}
    assert "old_per_token_logps" in again._buffered_inputs[0]


def test_the_importance_clip_of_the_m_step_leaves_grpos_loss_alone(tmp_path):
    plain = {"method": "joint_loss", "joint_rl_weight": 1.0, "joint_kl_weight": 1e-9}
    without = trained(tmp_path / "a", **plain)
    with_clip = trained(tmp_path / "b", m_step_importance_clip=2.0, **plain)
    for a, b in zip(tiny.weights(without).values(), tiny.weights(with_clip).values(), strict=True):
        assert torch.equal(a, b)
    assert "old_per_token_logps" not in with_clip._buffered_inputs[0]


@pytest.mark.parametrize("rl_weight", [0.0, 0.5])
def test_the_entropy_is_logged_once_whatever_the_weights(tmp_path, rl_weight):
    trainer = tiny.trainer(tmp_path, method="joint_loss", joint_rl_weight=rl_weight, max_steps=1)
    recorded = []
    log = trainer.log

    def spy(logs, *args, **kwargs):
        recorded.append(len(trainer._metrics["train"].get("entropy", [])))
        return log(logs, *args, **kwargs)

    trainer.log = spy
    trainer.train()
    # GRPO's loss records it for each of the two micro-batches, the M-step once a step
    assert recorded[0] == (2 if rl_weight else 1)


def test_joint_loss_with_reentrant_checkpoints_is_refused_on_several_processes(tmp_path):
    trainer = tiny.trainer(
        tmp_path,
        method="joint_loss",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    checks.check_model(trainer)
    trainer.accelerator = SimpleNamespace(num_processes=2)
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        checks.check_model(trainer)


def test_a_hybrid_needs_rewards_and_feedback(tmp_path):
    with pytest.raises(ValueError, match="needs at least one reward function"):
        tiny.trainer(tmp_path, method="joint_loss", reward_funcs=None)
    with pytest.raises(ValueError, match="needs feedback_fn"):
        tiny.trainer(tmp_path, method="advantage_reshaping", feedback_fn=None)


@pytest.mark.parametrize("method", HYBRIDS)
def test_evaluation_asks_for_no_feedback_and_changes_nothing(tmp_path, method):
    trainer = tiny.trainer(tmp_path, method=method, eval_dataset=tiny.dataset(4), per_device_eval_batch_size=4)
    asked = []
    trainer.annotator.collector.functions = [lambda **kwargs: asked.append(1)]
    before = tiny.weights(trainer)
    assert "eval_reward" in trainer.evaluate()
    assert not asked
    assert tiny.same(before, tiny.weights(trainer))
