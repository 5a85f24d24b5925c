"""Bad input gets an error at construction that says what was given and what is allowed."""

import warnings
from dataclasses import fields

import pytest
from datasets import Dataset
from peft import PromptTuningConfig
from trl import GRPOConfig, TrlParser

from tests import tiny
from vpd_trl import VPDConfig, VPDTrainer


@pytest.mark.parametrize(
    "name", ["method", "teacher", "prior", "divergence", "log_ratio_reduction", "m_step_normalization"]
)
def test_an_unknown_choice_is_refused_with_the_known_ones(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name} must be one of '.*'; got 'nonsense'"):
        tiny.config(tmp_path, **{name: "nonsense"})


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
@pytest.mark.parametrize(
    "name",
    [
        "e_step_frequency",
        "e_step_epochs",
        "e_step_min_per_class",
        "e_step_batch_size",
        "distillation_top_k",
        "max_teacher_prompt_length",
    ],
)
def test_a_count_must_be_a_positive_integer(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be an integer of at least 1.*got {value!r}"):
        tiny.config(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("success_threshold", [float("inf"), "1"]),
        ("teacher_temperature", [0, -0.1, float("inf")]),
        ("teacher_update_rate", [0, -0.1, 1.1]),
        ("bco_temperature", [0, -1, float("inf")]),
        ("reward_shift_momentum", [-0.1, 1.0]),
        ("jsd_weight", [0, 1, 2]),
        ("e_step_learning_rate", [0, -1e-5]),
        ("m_step_importance_clip", [0, -1]),
    ],
)
def test_a_number_out_of_range_is_refused(tmp_path, name, values):
    for value in [*values, float("nan"), True]:
        with pytest.raises(ValueError, match=rf"{name} must be .*got {value!r}"):
            tiny.config(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("name", "template", "field"),
    [
        ("teacher_template", "{solution}{critique}", "{prompt}"),
        ("teacher_template", "{prompt}", "{solution} or {critique}"),
        ("solution_template", "see {critique}", "{solution}"),
        ("critique_template", "see", "{critique}"),
    ],
)
def test_a_template_without_its_field_is_refused(tmp_path, name, template, field):
    with pytest.raises(ValueError, match=f"{name} lacks the field {field}"):
        tiny.config(tmp_path, **{name: template})


def test_a_batch_size_of_the_e_step_that_does_not_fit_is_refused_with_those_that_do(tmp_path):
    with pytest.raises(ValueError, match=r"e_step_batch_size \(6\).*Valid values here: \[4, 8\]"):
        tiny.config(tmp_path, e_step_batch_size=6)


def test_generations_that_do_not_divide_the_batch_are_refused_with_those_that_do(tmp_path):
    with pytest.raises(ValueError, match=r"completions, not prompts.*here: \[2, 4, 8\]"):
        tiny.config(tmp_path, num_generations=3)


def test_an_importance_ratio_of_a_cut_distribution_warns(tmp_path):
    with pytest.warns(UserWarning, match=r"cut distribution \(top_p=0.9\)"):
        tiny.config(tmp_path, method="joint_loss", use_vllm=True, top_p=0.9)
    with warnings.catch_warnings():  # without GRPO's loss there is no such ratio
        warnings.simplefilter("error", UserWarning)
        tiny.config(tmp_path, use_vllm=True, top_p=0.9)
        tiny.config(tmp_path, method="joint_loss", joint_rl_weight=0.0, use_vllm=True, top_p=0.9)


def test_fields_of_grpos_loss_warn_where_they_have_no_effect(tmp_path):
    with pytest.warns(UserWarning, match=r"no effect on training: beta, loss_type"):
        tiny.config(tmp_path, beta=0.1, loss_type="grpo")
    with pytest.warns(UserWarning, match=r"no effect on training: beta"):
        tiny.config(tmp_path, method="joint_loss", joint_rl_weight=0.0, beta=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tiny.config(tmp_path, method="grpo", beta=0.1)
        tiny.config(tmp_path)


def test_a_divergence_is_one_number_between_forward_and_reverse(tmp_path):
    alphas = {d: tiny.config(tmp_path, divergence=d, jsd_weight=0.3).divergence_alpha for d in ("forward_kl", "jsd")}
    assert alphas == {"forward_kl": 0.0, "jsd": 0.3}
    assert tiny.config(tmp_path, divergence="reverse_kl").divergence_alpha == 1.0


def test_every_new_field_has_a_help_text():
    inherited = {f.name for f in fields(GRPOConfig)}
    new = [f for f in fields(VPDConfig) if f.name not in inherited]
    assert len(new) > 20
    assert [f.name for f in new if not f.metadata.get("help", "").strip()] == []


@pytest.mark.parametrize("method", ["vpd", "sdpo"])
def test_a_method_that_distils_needs_feedback_and_says_what_there_is(tmp_path, method):
    with pytest.raises(ValueError, match=r"needs feedback_fn: vpd_trl.feedback has SiblingFeedback"):
        tiny.trainer(tmp_path, method=method, feedback_fn=None)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": Dataset.from_dict({"question": ["a"] * 9})}, ValueError, "needs a column 'prompt'; it has question"),
        ({"data": tiny.dataset(1)}, ValueError, r"has 1 prompts, but one rollout batch takes 2"),
        (
            {"data": Dataset.from_dict({"prompt": ["a"] * 9, "texts": ["b"] * 9, "answer": ["c"] * 9})},
            ValueError,
            r"columns \['texts'\]",
        ),
        ({"data": Dataset.from_dict({"prompt": ["a"] * 9})}, ValueError, r"needs \['answer'\]"),
        (
            {"data": Dataset.from_dict({"prompt": [[{"role": "system", "content": "x"}]] * 9, "answer": ["c"] * 9})},
            ValueError,
            r"this conversation has none; its roles are \['system'\]",
        ),
        ({"distillation_top_k": 500}, ValueError, r"distillation_top_k \(500\) is above .* vocabulary \(105\)"),
        ({"max_teacher_prompt_length": 510}, ValueError, r"above the model's context \(512\).*at most 506"),
        ({"reward_funcs": []}, ValueError, "at least one reward function"),
        ({"feedback_fn": "siblings"}, TypeError, "must be a callable or a list of callables; got str"),
        ({"feedback_fn": []}, ValueError, "empty list"),
        (
            {"peft_config": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")},
            ValueError,
            "learn prompts",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_cannot_work_raises_at_construction(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        tiny.trainer(tmp_path, **changes)


def test_a_model_in_four_bits_can_not_be_sent_to_vllm(tmp_path, model):
    model.config.quantization_config = {"load_in_4bit": True}  # as of every model that bitsandbytes has quantized
    with pytest.raises(ValueError, match="model in 4 bits"):
        tiny.trainer(tmp_path, mdl=model, use_vllm=True)


def test_distillation_without_rewards_trains(tmp_path):
    trainer = tiny.trainer(tmp_path, method="sdpo", reward_funcs=[], max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["m_step/tokens"] > 0


def test_feedback_for_a_method_that_uses_none_is_said_not_swallowed(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        tiny.trainer(tmp_path, method="grpo")
    assert "makes no use of feedback_fn ['answer_feedback']" in caplog.text


def test_a_configuration_of_trls_own_is_refused(model):
    with pytest.raises(TypeError, match=r"args must be a VPDConfig.*got dict"):
        VPDTrainer(model, tiny.parity_reward, {}, tiny.dataset(), feedback_fn=tiny.answer_feedback)


def test_the_configuration_parses_from_a_command_line(tmp_path):
    line = f"--output_dir {tmp_path} --method sdpo --distillation_top_k 20 --e_step_learning_rate 1e-5 --bf16 false"
    (parsed,) = TrlParser((VPDConfig,)).parse_args_and_config(
        [*line.split(), "--use_cpu", "--strip_thinking", "false"]
    )
    assert (parsed.method, parsed.distillation_top_k, parsed.e_step_learning_rate) == ("sdpo", 20, 1e-5)
    assert parsed.strip_thinking is False
    assert parsed.e_step_batch_size is None


@pytest.mark.parametrize(("teacher", "expected"), [("shared", 0.5), ("ema", 1.0), ("lora", 1.0)])
def test_only_a_shared_teacher_is_sharpened_unless_asked(tmp_path, teacher, expected):
    assert tiny.config(tmp_path, teacher=teacher).target_temperature == expected
    assert tiny.config(tmp_path, teacher=teacher, teacher_temperature=0.8).target_temperature == 0.8
