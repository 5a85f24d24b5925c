"""`vpd-trl estimate`: what it says of memory and operations is what training takes."""

from __future__ import annotations

import json
from dataclasses import replace
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
from vpd_trl.estimate.memory import GIB, RESERVE
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
    tolerance = 1e-3 if method in ("vpd", "sdpo") and made.args.steps_per_generation == 2 else 0.17
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
@pytest.mark.parametrize("method", ["sdpo", "joint_loss"])
def test_the_peak_of_a_training_step_is_what_its_tensors_take(tmp_path, method, checkpointing, top_k):
    changes = {"gradient_checkpointing": checkpointing, "distillation_top_k": top_k}
    made = make(tmp_path, method=method, max_steps=1, **changes)
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
    phases = estimate(plan_of(made)).phases
    # The rollouts themselves are small things beside; TRL applies the head to prompts too on a CPU
    expected = max(phases["M-step"], phases["teacher's targets"])
    assert max(peaks) == pytest.approx(expected, rel=0.05 if method == "sdpo" else 0.3)


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
    assert found["fsdp2"]["gradients, whole while they add up"] / n == 2
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
    own = sum(p.numel() for p in made.model.parameters() if p.requires_grad)  # in half precision on quantized weights
    assert whole - small == linear * (4 - 0.5 - 4 / 64) + own * 2


def test_four_bits_are_split_under_fsdp_and_eight_refused(tmp_path):
    made = make(tmp_path, adapter=True)
    made.args.bf16 = True
    one = estimate(plan_of(made, quantized=4)).memory["weights"]
    spread = estimate(plan_of(made, quantized=4, gpus=8, engine="fsdp2")).memory["weights"]
    assert one / 8 <= spread < one / 6, "the adapter is kept in float32"
    with pytest.raises(ValueError, match="can't split a model in 8 bits"):
        plan_of(made, quantized=8, gpus=8, engine="fsdp2")


def test_generation_on_zero3_gathers_the_model_unless_told_otherwise(tmp_path):
    made = make(tmp_path)
    found = [
        estimate(plan_of(made, gpus=8, engine="zero3").with_config(ds3_gather_for_generation=gathers)).phases
        for gathers in (True, False)
    ]
    assert found[0]["rollouts"] - found[1]["rollouts"] == sum(4 * p.numel() for p in made.model.parameters())


def test_the_teachers_prompt_is_as_long_as_it_may_be(tmp_path):
    made = make(tmp_path)
    assert plan_of(made).told == PROMPT + FEEDBACK
    assert plan_of(made).with_config(max_teacher_prompt_length=20).told == 20
    short = plan_of(made).with_config(max_teacher_prompt_length=PROMPT)
    whole, cut = estimate(plan_of(made)).flops, estimate(short).flops
    assert cut["M-step: teacher"] < whole["M-step: teacher"]
    assert cut["M-step: student"] == whole["M-step: student"]


def test_eager_attention_keeps_all_pairs_of_tokens(tmp_path):
    plan = plan_of(make(tmp_path))
    sdpa, eager = (replace(plan, attention=name).rehearsal(None).held(2, 100, 100) for name in ("sdpa", "eager"))
    config = plan.model
    pairs = 2 * config.num_attention_heads * (199 * 199) * 4  # 2 rows of 199 tokens, in float32
    assert eager - sdpa >= 0.75 * config.num_hidden_layers * pairs


def test_a_cache_with_a_sliding_window_does_not_grow_beyond_it():
    from transformers import Gemma3TextConfig

    from vpd_trl.estimate.rehearsal import Rehearsal

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma3TextConfig(vocab_size=50, num_hidden_layers=6, head_dim=16, sliding_window=16, **sizes)
    network = Rehearsal(config)
    each = 2 * 16 * 4  # keys and values of a layer with one head
    assert network.cache_bytes(100) == each * (100 + 5 * 15)  # one layer of six sees everything


def test_a_reference_model_is_counted_whatever_the_method(tmp_path):
    made = make(tmp_path)
    with_reference = estimate(plan_of(made).with_config(beta=0.1))
    assert with_reference.memory["reference model"] == sum(4 * p.numel() for p in made.model.parameters())
    assert with_reference.flops["reference model"] > 0


def test_an_adapter_with_dropout_has_its_prior_scored_although_trl_has_scored_the_rollouts(tmp_path):
    made = make(tmp_path, adapter=True, gradient_accumulation_steps=1, steps_per_generation=4)
    plan = plan_of(made)
    assert "E-step: prior" not in estimate(plan).flops
    plan.adapter.lora_dropout = 0.05
    assert "E-step: prior" in estimate(plan).flops


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


def test_the_number_of_gpus_may_stand_in_the_recipe(config_file, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "gpus: 8\ngeneration_batch_size: 256\nper_device_train_batch_size: 2\nmax_completion_length: 8\n"
    )
    assert main(["estimate", "--config", str(recipe), "--model", config_file]) == 0
    assert "256 rollouts" in capsys.readouterr().out
    assert main(["estimate", "--config", str(recipe), "--model", config_file, "--gpus", "4"]) == 0
    assert "256 rollouts" in capsys.readouterr().out


def test_weights_are_counted_in_the_precision_that_they_are_loaded_in(config_file, capsys):
    def weights(*options: str) -> float:
        assert (
            main(["estimate", "--model", config_file, "--max_completion_length", "8", "--json", "true", *options]) == 0
        )
        return json.loads(capsys.readouterr().out)["memory"]["weights"]

    whole = weights()
    path = Path(config_file)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    assert weights() == whole  # TRL's default is float32, whatever the checkpoint's
    assert weights("--dtype", "auto") == weights("--dtype", "bfloat16") == whole / 2
    assert weights("--model_init_kwargs", '{"dtype": "bfloat16"}') == whole / 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "model is missing"),
        (["--max_completion_length", "null"], "needs to know how long completions can be"),
        (["--load_in_4bit", "true"], "the student must be an adapter"),
        (["--load_in_4bit", "true", "--use_peft", "true", "--use_vllm", "true"], "don't go together"),
        (["--deepspeed", "zero3.json", "--gpus", "2"], "say by --engine"),
        (["--use_vllm", "true", "--gpu_memory", "0.001"], "can't hold its weights"),
        (["--model_init_kwargs", '{"dtype": "float7"}'], "dtype must be"),
        (["--gpus", "0"], "gpus must be at least 1; got 0"),
        (["--gpus", "many"], "invalid int value: 'many'"),
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
