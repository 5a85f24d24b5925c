"""`vpd-trl estimate`: what it says of memory and operations is what training takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from examples.benchmarks import setting
from vpd_trl.cli.main import main
from vpd_trl.estimate import DEVICES, Plan, estimate
from vpd_trl.estimate.plan import GIB, RESERVE
from vpd_trl.estimate.rehearsal import Meter


PROMPT, FEEDBACK, COMPLETION = 12, 20, 30
ADAPTER = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def words(n: int, start: int = 0) -> str:
    return " ".join(str(start + i) for i in range(n))


def make(folder: Path, *, method: str = "vpd", adapter: bool = False, **changes: Any) -> Any:
    """A trainer whose prompts, feedback and completions all have one length."""
    told = [words(FEEDBACK, start=i) for i in range(8)]
    data = Dataset.from_dict({"prompt": [words(PROMPT, start=50 + i) for i in range(8)], "privileged_context": told})
    fields = {"max_completion_length": COMPLETION, "max_steps": 2, "e_step_frequency": 2, "logging_steps": 1} | changes
    fields = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4} | fields
    network = setting.model(vocabulary=3000, hidden=128, layers=3)
    if adapter:
        from peft import get_peft_model

        network = get_peft_model(network, LoraConfig(**ADAPTER))
    made = setting.trainer(method, network, data, folder, **fields)
    rows = [[2 + i] * (COMPLETION - 1) + [1] for i in range(64)]
    return setting.with_rollouts(made, lambda batch, n: rows[:n])


def plan_of(made: Any, **changes: Any) -> Plan:
    adapter = made.model.peft_config["default"] if hasattr(made.model, "peft_config") else None
    lengths = {"prompt": PROMPT, "feedback": FEEDBACK}
    return Plan(model=made.model.config, config=made.args, adapter=adapter, **lengths | changes)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("vpd", {}),
        ("vpd", {"gradient_checkpointing": True, "divergence": "jsd"}),
        ("vpd", {"teacher": "ema", "distillation_top_k": 50, "divergence": "forward_kl"}),
        ("vpd", {"teacher": "lora"}),
        ("vpd", {"prior": "fixed", "e_step_epochs": 2}),
        ("vpd", {"gradient_accumulation_steps": 1, "steps_per_generation": 4}),
        ("sdpo", {}),
        ("grpo", {}),
        ("joint_loss", {}),
        ("advantage_reshaping", {}),
    ],
)
def test_operations_are_those_that_training_makes(tmp_path, method, changes):
    batches = 2
    steps = changes.get("steps_per_generation", 2) // changes.get("gradient_accumulation_steps", 2) * batches
    made = make(tmp_path, method=method, **changes, max_steps=steps)
    with FlopCounterMode(display=False) as counter:
        made.train()
    expected = sum(estimate(plan_of(made)).flops.values()) * batches
    # TRL's own passes take the last token too, and on a CPU apply the head to prompts as well
    tolerance = 1e-3 if method in ("vpd", "sdpo") and made.args.steps_per_generation == 2 else 0.12
    assert counter.get_total_flops() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(
    "changes", [{}, {"teacher": "ema"}, {"teacher": "lora"}, {"prior": "fixed"}, {"adapter": True}]
)
def test_what_lasts_has_the_bytes_of_the_trainers_own_tensors(tmp_path, changes):
    made = make(tmp_path, optim="adamw_torch", **changes)
    made.train()
    memory = estimate(plan_of(made)).memory

    def size(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    def state(optimizer: torch.optim.Optimizer) -> int:
        # Not its step counts
        return size(t for entry in optimizer.state.values() for t in entry.values() if t.dim())

    trained = [p for p in made.model.parameters() if p.requires_grad]
    own = list(made.teacher.parameters.values()) if changes.get("teacher") == "lora" else []
    students = [p for p in made.model.parameters() if not any(p is other for other in own)]
    assert memory.pop("weights") == size(students)
    assert memory.pop("gradients") == size(trained)
    assert memory.pop("optimizer") == state(getattr(made.optimizer, "optimizer", made.optimizer))
    assert memory.pop("reserve") == RESERVE * GIB
    if changes.get("teacher") == "ema":
        assert memory.pop("teacher: moving average") == size(made.teacher.average.weights.values())
    if changes.get("teacher") == "lora":
        weights_and_gradients = 2 * size(own)
        assert memory.pop("teacher: adapter and its optimizer") == weights_and_gradients + state(
            made.teacher.optimizer
        )
    if changes.get("prior") == "fixed":
        assert memory.pop("fixed prior") == size(made.prior.initial.weights.values())
    assert not memory


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("top_k", [None, 20])
def test_the_peak_of_an_m_step_is_what_its_tensors_take(tmp_path, checkpointing, top_k):
    made = make(tmp_path, method="sdpo", max_steps=1, gradient_checkpointing=checkpointing, distillation_top_k=top_k)
    peaks = []
    step = made.training_step

    def measured(*args: Any, **kwargs: Any) -> Any:
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in made.model.parameters()
        ]
        with Meter([*made.model.parameters(), *made.model.buffers()]) as meter:
            loss = step(*args, **kwargs)
        peaks.append(meter.peak)
        for hook in hooks:
            hook.remove()
        return loss

    made.training_step = measured
    made.train()
    # The rollouts themselves, and masks, are small things beside
    assert max(peaks) == pytest.approx(estimate(plan_of(made)).phases["M-step"], rel=0.05)


def test_sharding_divides_what_each_engine_divides(tmp_path):
    made = make(tmp_path, teacher="ema")
    made.args.bf16 = True
    found = {
        engine: estimate(plan_of(made, gpus=8, engine=engine)).memory for engine in ("ddp", "zero2", "zero3", "fsdp2")
    }
    n = sum(p.numel() for p in made.model.parameters())
    # float32 weights and AdamW; beside half-precision weights DeepSpeed has a master copy of its own
    assert [found["ddp"][name] / n for name in ("weights", "gradients", "optimizer")] == [4, 4, 8]
    assert [found["zero2"][name] / n for name in ("weights", "gradients", "optimizer")] == [2, 2 / 8, 12 / 8]
    assert [found["zero3"][name] / n for name in ("weights", "gradients", "optimizer")] == [2 / 8, 2 / 8, 12 / 8]
    assert [found["fsdp2"][name] / n for name in ("weights", "gradients", "optimizer")] == [4 / 8, 4 / 8, 8 / 8]
    averages = [memory["teacher: moving average"] / n for memory in found.values()]
    assert averages == [4, 4, 4 / 8, 4 / 8]
    assert "gathered weights" not in found["zero2"]
    assert found["fsdp2"]["gathered weights"] > 0


def test_four_bits_are_counted_for_linear_layers_below_an_adapter_and_not_for_the_head(tmp_path):
    made = make(tmp_path, adapter=True)
    whole = estimate(plan_of(made)).memory["weights"]
    small = estimate(plan_of(made, quantized=4)).memory["weights"]
    base = made.model.get_base_model()
    linear = sum(m.base_layer.weight.numel() for m in base.model.modules() if hasattr(m, "base_layer"))
    assert whole - small == linear * (4 - 0.5 - 4 / 64)


def test_a_smaller_share_of_feedback_costs_less_and_generation_nothing_less(tmp_path):
    made = make(tmp_path)
    whole, half = estimate(plan_of(made)), estimate(plan_of(made, coverage=0.5))
    assert all(half.flops[name] == flops / 2 for name, flops in whole.flops.items())
    assert half.seconds["rollouts, at least"] == whole.seconds["rollouts, at least"]


def test_generation_reads_weights_and_cache_once_for_each_token(tmp_path):
    made = make(tmp_path)
    seconds = estimate(plan_of(made, device=DEVICES["t4"])).seconds["rollouts, at least"]
    config = made.model.config
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    weights = 4 * sum(p.numel() for p in made.model.parameters())
    rows = 8
    assert seconds == pytest.approx(COMPLETION * (weights + rows * (PROMPT + COMPLETION / 2) * cache) / 320e9)


# ---- The command


@pytest.fixture
def config_file(tmp_path):
    setting.model(vocabulary=3000, hidden=128, layers=2).config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model" / "config.json")


def test_the_command_says_whether_a_recipe_fits(config_file, capsys):
    recipe = ["--config", "examples/recipes/sciknoweval.yaml", "--model", config_file, "--max_completion_length", "64"]
    assert main(["estimate", *recipe, "--gpus", "8", "--engine", "zero2"]) == 0
    told = capsys.readouterr().out
    assert "256 rollouts of at most 64 tokens" in told
    assert "zero2 on 8 GPUs of 80 GiB" in told
    assert "fits" in told
    assert "E-step" in told
    assert "rollouts (vLLM)" in told
    assert main(["estimate", *recipe, "--gpus", "8", "--gpu_memory", "2"]) == 0
    assert "too large by" in capsys.readouterr().out


def test_json_holds_the_numbers_of_the_table(config_file, capsys):
    options = ["--model", config_file, "--max_completion_length", "16", "--num_generations", "8"]
    assert main(["estimate", *options, "--json", "true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak"] == sum(found["memory"].values()) + max(found["phases"].values())
    assert found["fits"]
    assert set(found["flops"]) < set(found["seconds"])


def test_batch_sizes_are_checked_as_they_will_be_on_that_many_gpus(config_file, capsys):
    options = ["--model", config_file, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"]
    assert main(["estimate", *options, "--num_generations", "8", "--gpus", "8", "--max_completion_length", "8"]) == 0
    capsys.readouterr()
    assert main(["estimate", *options, "--num_generations", "8", "--gpus", "4"]) == 2
    assert "divisible by num_generations" in capsys.readouterr().err


def test_a_mixture_of_experts_is_refused_instead_of_counted_wrongly(tmp_path, capsys):
    from transformers import Qwen3MoeConfig

    Qwen3MoeConfig(num_experts=8).save_pretrained(tmp_path)
    assert main(["estimate", "--model", str(tmp_path)]) == 2
    assert "models with experts (qwen3_moe) can't be estimated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "model is missing"),
        (["--gpus", "0"], "gpus must be an integer of at least 1; got '0'"),
        (["--gpus", "many"], "gpus must be an integer of at least 1; got 'many'"),
        (["--gpu", "h1000"], "gpu must be one of t4, l4"),
        (["--engine", "zero9", "--gpus", "2"], "engine must be one of ddp, zero2, zero3, fsdp2; got 'zero9'"),
        (["--engine", "zero3"], "spreads a model over GPUs; gpus is 1"),
        (["--efficiency", "1.5"], "efficiency must be a number in (0, 1]; got 1.5"),
        (["--completion_tokens", "9999"], "must have 1 to max_completion_length (512) tokens; got 9999"),
        (["--gpu_memry", "2"], "Did you mean gpu_memory?"),
    ],
)
def test_a_wrong_argument_of_the_estimate_is_one_line(config_file, capsys, arguments, said):
    model = ["--model", config_file] if arguments else []
    assert main(["estimate", *model, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
