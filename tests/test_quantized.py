"""Students in 4 or 8 bits with an adapter, 8-bit optimizers, recomputed activations and bf16, each with every teacher."""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests import tiny
from vpd_trl.checks import check_model


pytest.importorskip("bitsandbytes")

QUANTIZED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer, folder = tiny.tokenizer(), tmp_path_factory.mktemp("model")
    tiny.model(tokenizer, hidden_size=64, intermediate_size=128, head_dim=32).save_pretrained(folder)
    return folder


def build(folder, tmp_path, bits, *, rank=4, **changes):
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**QUANTIZED[bits]), dtype=torch.float32
    )
    with torch.no_grad():  # bitsandbytes lays its weights out anew when a CPU first uses them
        model(torch.tensor([[5, 6, 7]]))
    values = {"peft_config": LoraConfig(r=rank, target_modules="all-linear"), "e_step_frequency": 1, "max_steps": 2}
    return tiny.trainer(tmp_path, mdl=model, **(values | changes))


def frozen(trainer):
    """The weights that nothing may change."""
    model = trainer.model
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("bits", QUANTIZED)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"teacher": "ema", "prior": "fixed"},
        {"teacher": "lora"},
        {"teacher": "lora", "gradient_checkpointing": True},
        {"gradient_checkpointing": True, "bf16": True},
        {"method": "joint_loss"},
    ],
    ids=str,
)
def test_adapters_learn_and_the_quantized_weights_stay(folder, tmp_path, bits, changes):
    trainer = build(folder, tmp_path, bits, **changes)
    base, adapter = frozen(trainer), tiny.weights(trainer)
    assert any(weight.dtype in (torch.uint8, torch.int8) for weight in base.values())
    trainer.train()
    assert tiny.same(base, frozen(trainer))
    assert not tiny.same(adapter, tiny.weights(trainer))
    rows = [row for row in trainer.state.log_history if "m_step/divergence" in row]
    assert len(rows) == 2
    assert all(torch.isfinite(torch.tensor([row["loss"], row["grad_norm"]])).all() for row in rows)
    if changes.get("method") != "joint_loss":
        assert all("e_step/loss" in row for row in rows)


@pytest.mark.parametrize("teacher", ["shared", "lora"])
def test_an_8_bit_optimizer_has_8_bit_states_for_student_and_teacher(folder, tmp_path, teacher):
    teacher_config = {"teacher_peft_config": LoraConfig(r=64, target_modules=["q_proj"])} if teacher == "lora" else {}
    # bitsandbytes keeps states of less than 4096 numbers in 32 bits
    trainer = build(folder, tmp_path, "nf4", rank=64, optim="adamw_8bit", teacher=teacher, **teacher_config)
    trainer.train()
    optimizers = [trainer.optimizer] + ([trainer.teacher.optimizer] if teacher == "lora" else [])
    for optimizer in optimizers:
        states = [state["state1"].dtype for state in optimizer.state.values() if "state1" in state]
        assert torch.uint8 in states


def test_the_saved_adapter_is_the_student_on_the_quantized_base(folder, tmp_path):
    trainer = build(folder, tmp_path, "nf4", learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**QUANTIZED["nf4"]), dtype=torch.float32
    )
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = base(ids).logits
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()(ids).logits
        # PEFT loads in float32 what was trained in bfloat16
        torch.testing.assert_close(loaded, trainer.model.eval()(ids).logits, atol=3e-3, rtol=1e-2)
    assert not torch.allclose(plain, loaded, atol=2e-2)


def test_three_and_three_steps_of_a_qlora_run_are_six(folder, tmp_path):
    changes = {"teacher": "lora", "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    whole = build(folder, tmp_path / "whole", "nf4", **changes | {"max_steps": 6})
    whole.train()
    build(folder, tmp_path / "parts", "nf4", **changes | {"max_steps": 3}).train()
    parts = build(folder, tmp_path / "parts", "nf4", **changes | {"max_steps": 6})
    parts.train(resume_from_checkpoint=True)
    assert parts.state.global_step == 6
    assert tiny.same(tiny.weights(whole), tiny.weights(parts))
    assert tiny.same(*({n: p.data for n, p in t.teacher.parameters.items()} for t in (whole, parts)))


def test_the_best_adapter_comes_back_in_the_precision_that_it_was_trained_in(folder, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    changes |= {"eval_dataset": tiny.dataset(4), "per_device_eval_batch_size": 4, "load_best_model_at_end": True}
    trainer = build(folder, tmp_path, "nf4", **changes, metric_for_best_model="eval_reward")
    before = {name: p.dtype for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert {name: p.dtype for name, p in trainer.model.named_parameters()} == before


@pytest.mark.parametrize("bits", QUANTIZED)
@pytest.mark.parametrize("given", ["argument", "dict", "model_init_kwargs", "dict in model_init_kwargs", "model"])
def test_vllm_is_refused_with_a_quantized_student_however_it_is_given(folder, tmp_path, bits, given):
    quantization = QUANTIZED[bits] if "dict" in given else BitsAndBytesConfig(**QUANTIZED[bits])
    changes = {"mdl": str(folder), "use_vllm": True}
    if "model_init_kwargs" in given:
        changes["model_init_kwargs"] = {"quantization_config": quantization}
    elif given == "model":
        changes["mdl"] = tiny.model(tiny.tokenizer())
        changes["mdl"].config.quantization_config = quantization
    else:
        changes["quantization_config"] = quantization
    number = {"nf4": 4, "int8": 8}[bits]
    with pytest.raises(ValueError, match=f"which can't be done with a model in {number} bits"):
        tiny.trainer(tmp_path, **changes)


@pytest.mark.parametrize("bits", QUANTIZED)
def test_vllm_is_refused_with_a_student_that_was_published_in_few_bits_before_it_is_loaded(folder, tmp_path, bits):
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**QUANTIZED[bits]), dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "published")
    number = {"nf4": 4, "int8": 8}[bits]
    with (
        patch.object(AutoModelForCausalLM, "from_pretrained", side_effect=AssertionError("loaded")),
        pytest.raises(ValueError, match=f"which can't be done with a model in {number} bits"),
    ):
        tiny.trainer(tmp_path, mdl=str(tmp_path / "published"), use_vllm=True)


def test_a_model_that_can_t_be_found_is_reported_by_what_loads_it(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        tiny.trainer(tmp_path, mdl=str(tmp_path / "nowhere"), use_vllm=True)


@pytest.mark.parametrize(
    ("bits", "storage", "message"),
    [
        ("int8", None, "can't split a model in 8 bits"),
        ("nf4", torch.uint8, r"stored as torch.uint8.*bnb_4bit_quant_storage"),
        ("nf4", torch.float32, None),
    ],
)
def test_bits_that_fsdp_can_not_split_are_refused(folder, tmp_path, bits, storage, message):
    more = {} if storage is None else {"bnb_4bit_quant_storage": storage}
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**QUANTIZED[bits], **more), dtype=torch.float32
    )
    trainer = tiny.trainer(tmp_path, mdl=model, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    trainer._dist = SimpleNamespace(fsdp_version=2, is_zero3=False)
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        check_model(trainer)


def test_a_student_spread_over_devices_is_refused(tmp_path):
    model = tiny.model(tiny.tokenizer())
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match=r"has put it on 0, 1\..*`accelerate launch`.*CUDA_VISIBLE_DEVICES"):
        tiny.trainer(tmp_path, mdl=model)


@pytest.mark.parametrize("bits", QUANTIZED)
def test_a_quantized_student_without_an_adapter_is_refused(folder, tmp_path, bits):
    with pytest.raises(ValueError, match=r"purely quantized|quantized"):
        build(folder, tmp_path, bits, peft_config=None).train()
