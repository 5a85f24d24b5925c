"""A resumed run is the same run, and evaluation or a foreign checkpoint spoils nothing."""

import pytest
import torch
from peft import LoraConfig

from tests import tiny


RUNS = [
    {},
    {"method": "sdpo"},
    {"method": "grpo", "feedback_fn": None},
    {"method": "joint_loss"},
    {"method": "advantage_reweighting", "advantage_mix_decay": "constant", "teacher": "ema"},
    {"teacher": "ema"},
    {"teacher": "lora", "e_step_frequency": 1},
    {"teacher": "lora", "e_step_frequency": 1, "peft_config": LoraConfig(r=2, target_modules="all-linear")},
    {"prior": "fixed", "e_step_frequency": 1},
    {"num_iterations": 2, "steps_per_generation": 2},
    {"steps_per_generation": 4, "gradient_accumulation_steps": 1},
    {"data_size": 4},
]


def run(folder, *, resume=None, max_steps=6, data_size=32, **changes):
    trainer = tiny.trainer(
        folder,
        data=tiny.dataset(data_size),
        save_strategy="steps",
        save_steps=3,
        max_steps=max_steps,
        lr_scheduler_type="constant",
        **changes,
    )
    prompts = []
    generate = trainer._generate
    trainer._generate = lambda p: (prompts.append(p), generate(p))[1]
    trainer.train(resume_from_checkpoint=resume)
    return trainer, prompts


@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_three_and_three_steps_are_six_steps_to_the_bit(tmp_path, changes):
    whole, whole_prompts = run(tmp_path / "whole", **changes)
    _, first_prompts = run(tmp_path / "parts", max_steps=3, **changes)
    parts, rest_prompts = run(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-3"), **changes)
    if changes.get("method") != "grpo" or "steps_per_generation" not in changes:
        assert first_prompts + rest_prompts == whole_prompts
    assert tiny.same(tiny.weights(whole), tiny.weights(parts))
    if whole.parts.uses_feedback:
        assert whole.rollout_batches == parts.rollout_batches
        assert whole.e_step.shift.value == parts.e_step.shift.value
    if changes.get("teacher") == "lora":
        assert tiny.same(*({n: p.data for n, p in t.teacher.parameters.items()} for t in (whole, parts)))
    if changes.get("teacher") == "ema":
        assert tiny.same(whole.teacher.average.weights, parts.teacher.average.weights)
        assert not tiny.same(whole.teacher.average.weights, tiny.weights(parts))
    if changes.get("prior") == "fixed":
        assert tiny.same(whole.prior.initial.weights, parts.prior.initial.weights)
        assert tiny.same(parts.prior.initial.weights, tiny.weights(tiny.model(tiny.tokenizer())))


def test_a_checkpoint_of_another_teacher_is_refused(tmp_path):
    run(tmp_path, max_steps=3, teacher="ema")
    with pytest.raises(ValueError, match=r"teacher='ema'.*teacher='shared'"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_without_our_state_warns_and_goes_on(tmp_path, caplog):
    run(tmp_path, max_steps=3)
    (tmp_path / "checkpoint-3" / "vpd_state.pt").unlink()
    with caplog.at_level("WARNING"):
        trainer, _ = run(tmp_path, resume=str(tmp_path / "checkpoint-3"), max_steps=4)
    assert "has no vpd_state.pt" in caplog.text
    assert trainer.state.global_step == 4


def test_the_state_file_holds_tensors_and_plain_values_alone(tmp_path):
    run(tmp_path, max_steps=3, teacher="ema", prior="fixed")
    state = torch.load(tmp_path / "checkpoint-3" / "vpd_state.pt", weights_only=True)
    assert state["rollout_batches"] == 3
    assert not list((tmp_path / "checkpoint-3").glob("*.tmp"))


def test_rollouts_that_are_split_otherwise_are_refused_and_others_are_not(tmp_path):
    changes = {"steps_per_generation": 4, "gradient_accumulation_steps": 1}
    run(tmp_path, **changes)
    for other in ({"per_device_train_batch_size": 8}, {"steps_per_generation": 2}):
        with pytest.raises(ValueError, match=r"middle of a rollout batch.*'per_device_train_batch_size': 4"):
            run(tmp_path, resume=str(tmp_path / "checkpoint-3"), **(changes | other))
    folder = tmp_path / "aligned"
    run(folder, max_steps=3)
    trainer, _ = run(folder, resume=str(folder / "checkpoint-3"), max_steps=5, per_device_train_batch_size=8)
    assert trainer.rollout_batches == 5


def test_importance_ratios_can_not_begin_within_a_rollout_batch(tmp_path):
    changes = {"steps_per_generation": 4, "gradient_accumulation_steps": 1, "method": "sdpo"}
    run(tmp_path, **changes)
    with pytest.raises(ValueError, match="holds no log-probabilities for m_step_importance_clip"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-3"), m_step_importance_clip=2.0, **changes)
    run(tmp_path / "with", m_step_importance_clip=2.0, **changes)
    run(tmp_path / "with", resume=str(tmp_path / "with" / "checkpoint-3"), m_step_importance_clip=2.0, **changes)


def test_rollouts_that_an_earlier_run_left_in_the_folder_are_not_taken(tmp_path):
    run(tmp_path, max_steps=3, steps_per_generation=4, gradient_accumulation_steps=1)
    assert (tmp_path / "checkpoint-3" / "vpd_rollouts_0.pt").exists()
    run(tmp_path, max_steps=3)
    _, prompts = run(tmp_path, resume=str(tmp_path / "checkpoint-3"), max_steps=4)
    assert len(prompts) == 1, "the fourth batch is sampled, not found"
