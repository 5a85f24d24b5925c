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
from transformers import AutoConfig

from examples.benchmarks import setting
from vpd_trl import distillation
from vpd_trl.cli.estimate import make_plan
from vpd_trl.cli.main import main
from vpd_trl.distillation import Tiles
from vpd_trl.estimate import DEVICES, Plan, estimate, memory, rehearsal
from vpd_trl.estimate.memory import GIB, RESERVE
from vpd_trl.estimate.rehearsal import Meter, Rehearsal


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


def lasting(plan: Plan) -> dict[str, float]:
    """What lasts, without a rehearsal of the passes; not for a teacher with an adapter."""
    student = plan.rehearsal(plan.adapter)
    return memory.lasting(plan, student, student)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("vpd", {}),
        ("vpd", {"gradient_checkpointing": True, "divergence": "jsd"}),
        ("vpd", {"teacher": "ema", "distillation_top_k": 50, "divergence": "forward_kl"}),
        ("vpd", {"teacher": "lora"}),
        ("vpd", {"prior": "fixed", "e_step_epochs": 2}),
        ("vpd", {"gradient_accumulation_steps": 1, "steps_per_generation": 4}),
        ("vpd", {"m_step_importance_clip": 2.0}),
        ("sdpo", {}),
        ("grpo", {}),
        ("joint_loss", {}),
        ("advantage_reshaping", {}),
        ("advantage_reweighting", {"num_iterations": 2}),
    ],
)
def test_operations_are_those_that_training_makes(tmp_path, method, changes):
    batches = 2
    rounds = changes.get("steps_per_generation", 2) * changes.get("num_iterations", 1)
    steps = rounds // changes.get("gradient_accumulation_steps", 2) * batches
    made = make(tmp_path, method=method, **changes, max_steps=steps)
    with FlopCounterMode(display=False) as counter:
        made.train()
    expected = sum(estimate(plan_of(made)).flops.values()) * batches
    # TRL's own passes take the last token too, and on a CPU apply the head to prompts as well
    tolerance = 1e-3 if method in ("vpd", "sdpo") else 0.17
    assert counter.get_total_flops() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(
    "changes", [{}, {"teacher": "ema"}, {"teacher": "lora"}, {"prior": "fixed"}, {"adapter": True}]
)
def test_what_lasts_has_the_bytes_of_the_trainers_own_tensors(tmp_path, changes):
    made = make(tmp_path, optim="adamw_torch", **changes)
    made.train()
    found = estimate(plan_of(made)).memory

    def size(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    def state(optimizer: torch.optim.Optimizer) -> int:
        # Not its step counts
        return size(t for entry in optimizer.state.values() for t in entry.values() if t.dim())

    trained = [p for p in made.model.parameters() if p.requires_grad]
    own = list(made.teacher.parameters.values()) if changes.get("teacher") == "lora" else []
    students = [p for p in made.model.parameters() if not any(p is other for other in own)]
    assert found.pop("weights") == size(students)
    assert found.pop("gradients") == size(trained)
    assert found.pop("optimizer") == state(getattr(made.optimizer, "optimizer", made.optimizer))
    assert found.pop("reserve") == RESERVE * GIB
    if changes.get("teacher") == "ema":
        assert found.pop("teacher: moving average") == size(made.teacher.average.weights.values())
    if changes.get("teacher") == "lora":
        weights_and_gradients = 2 * size(own)
        assert found.pop("teacher: adapter and its optimizer") == weights_and_gradients + state(made.teacher.optimizer)
    if changes.get("prior") == "fixed":
        assert found.pop("fixed prior") == size(made.prior.initial.weights.values())
    assert not found


# Of the 120 tokens of a micro-batch, 40 logits at one time, of which 15 become divergence
SMALL_TILES = Tiles(chunk=40 * 3000, block=15 * 3000)


@pytest.mark.parametrize(
    ("method", "checkpointing", "top_k", "tiles"),
    [
        ("sdpo", False, None, None),
        ("sdpo", True, 20, None),
        ("joint_loss", True, None, None),
        ("joint_loss", False, 20, None),
        ("sdpo", False, None, SMALL_TILES),
        ("sdpo", True, 20, SMALL_TILES),
        ("joint_loss", True, None, SMALL_TILES),
    ],
)
def test_the_peak_of_a_training_step_is_what_its_tensors_take(
    tmp_path, monkeypatch, method, checkpointing, top_k, tiles
):
    if tiles is not None:
        monkeypatch.setattr(distillation, "CPU_TILES", tiles)
        monkeypatch.setattr(rehearsal, "GPU_TILES", tiles)
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
    found = {engine: lasting(plan_of(made, gpus=8, engine=engine)) for engine in ("ddp", "zero2", "zero3", "fsdp2")}
    n = sum(p.numel() for p in made.model.parameters())
    # float32 weights and AdamW; beside half-precision weights DeepSpeed has a master copy of its own
    assert [found["ddp"][name] / n for name in ("weights", "gradients", "optimizer")] == [4, 4, 8]
    assert [found["zero2"][name] / n for name in ("weights", "gradients", "optimizer")] == [2, 2 / 8, 12 / 8]
    assert found["fsdp2"]["gradients, whole while they add up"] / n == 2
    assert [found["zero3"][name] / n for name in ("weights", "gradients", "optimizer")] == [2 / 8, 2 / 8, 12 / 8]
    assert [found["fsdp2"][name] / n for name in ("weights", "gradients", "optimizer")] == [4 / 8, 4 / 8, 8 / 8]
    averages = [each["teacher: moving average"] / n for each in found.values()]
    assert averages == [4, 4, 4 / 8, 4 / 8]
    assert "gathered weights" not in found["zero2"]
    assert found["fsdp2"]["gathered weights"] > 0


def test_four_bits_are_counted_for_linear_layers_below_an_adapter_and_not_for_the_head(tmp_path):
    made = make(tmp_path, adapter=True)
    whole = lasting(plan_of(made))["weights"]
    small = lasting(plan_of(made, quantized=4))["weights"]
    base = made.model.get_base_model()
    linear = sum(m.base_layer.weight.numel() for m in base.model.modules() if hasattr(m, "base_layer"))
    own = sum(p.numel() for p in made.model.parameters() if p.requires_grad)  # in half precision on quantized weights
    assert whole - small == linear * (4 - 0.5 - 4 / 64) + own * 2


def test_four_bits_are_split_under_fsdp_and_eight_refused(tmp_path):
    made = make(tmp_path, adapter=True)
    made.args.bf16 = True
    one = lasting(plan_of(made, quantized=4))["weights"]
    spread = lasting(plan_of(made, quantized=4, gpus=8, engine="fsdp2"))["weights"]
    assert one / 8 <= spread < one / 6, "the adapter is kept in float32"
    with pytest.raises(ValueError, match="can't split a model in 8 bits"):
        plan_of(made, quantized=8, gpus=8, engine="fsdp2")


def test_a_moving_averages_head_is_kept_for_the_m_step_only_where_it_is_trained(tmp_path):
    def added(*, adapter: bool) -> float:
        plan = plan_of(make(tmp_path, method="sdpo", adapter=adapter), dtype=torch.bfloat16, gpus=2, engine="zero2")
        shared, average = (estimate(plan.with_config(teacher=teacher)) for teacher in ("shared", "ema"))
        return average.phases["M-step"] - shared.phases["M-step"]

    assert added(adapter=False) == 3000 * 128 * 2
    assert added(adapter=True) == 0


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(
    ("engine", "dtype", "kept", "copied"),
    [
        ("ddp", torch.bfloat16, 2, 0),  # the copy is of the same precision, and takes the student's place
        ("zero2", torch.float32, 4, 2),  # taken before the student's weights became half precision
        ("zero3", torch.float32, 2 / 8, 2 / 8),  # the student's weights are put aside
        ("fsdp2", torch.float32, 4 / 8, 4 / 8),
    ],
)
def test_a_fixed_prior_is_swapped_in_for_a_part_of_the_e_step(tmp_path, engine, dtype, kept, copied, adapter):
    small = {"per_device_train_batch_size": 1, "num_generations": 2, "gradient_checkpointing": True}
    made = make(tmp_path, adapter=adapter, prior="fixed", **small)
    made.args.bf16, made.args.max_completion_length = True, 1
    plan = plan_of(made, prompt=1, feedback=0, gpus=1 if engine == "ddp" else 8, engine=engine, dtype=dtype)
    student = plan.rehearsal(plan.adapter)
    trained = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    if adapter:  # float32 whatever the weights below are
        kept = {"ddp": 4}.get(engine, kept)
    assert memory.lasting(plan, student, student)["fixed prior"] == trained * kept
    scores = student.scores(1, 1, 1).memory
    e_step = student.e_step(1, 1, 1).memory
    found = memory.phases(plan, student, student)
    assert found["E-step"] == max(e_step, scores + trained * copied)
    assert found["teacher's targets"] == student.target(1, 1, 1).memory, "the prior is not there"


def test_a_moving_average_is_swapped_in_for_targets_and_not_for_the_e_step(tmp_path):
    plan = plan_of(make(tmp_path, teacher="ema"), dtype=torch.bfloat16)
    average, shared = (estimate(plan.with_config(teacher=teacher)).phases for teacher in ("ema", "shared"))
    weights = 2 * sum(p.numel() for p in plan.rehearsal(None).model.parameters())
    assert average["teacher's targets"] - shared["teacher's targets"] == weights
    assert average["E-step"] == shared["E-step"]


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

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma3TextConfig(vocab_size=50, num_hidden_layers=6, head_dim=16, sliding_window=16, **sizes)
    network = Rehearsal(config)
    each = 2 * 16 * 4  # keys and values of a layer with one head
    assert network.cache_bytes(100) == each * (100 + 5 * 15)  # one layer of six sees everything


@pytest.mark.parametrize("method", ["vpd", "sdpo", "grpo", "joint_loss", "advantage_reshaping"])
def test_trl_scores_rollouts_where_its_loss_or_a_late_step_needs_it(tmp_path, method):
    plan = plan_of(make(tmp_path, method=method))
    policy_gradient = method not in ("vpd", "sdpo")
    assert not plan.config.trl_scores_rollouts
    assert plan.with_config(use_vllm=True).config.trl_scores_rollouts == policy_gradient
    assert not plan.with_config(use_vllm=True, vllm_importance_sampling_correction=False).config.trl_scores_rollouts
    for late in ({"steps_per_generation": 4}, {"num_iterations": 2}, {"steps_per_generation": 3}):
        assert plan.with_config(**late).config.trl_scores_rollouts == policy_gradient
        assert plan.with_config(**late, use_vllm=True).config.trl_scores_rollouts == policy_gradient
    if method == "joint_loss":
        assert not plan.with_config(use_vllm=True, joint_rl_weight=0.0).config.trl_scores_rollouts


def test_float32_is_computed_at_its_own_peak(tmp_path):
    made = make(tmp_path, method="grpo")
    plan = plan_of(made, device=DEVICES["h100"], efficiency=0.5)
    found = estimate(plan)
    assert found.seconds["policy gradient"] == pytest.approx(found.flops["policy gradient"] / (0.5 * 67e12))
    found = estimate(replace(plan, dtype=torch.bfloat16))
    assert found.seconds["policy gradient"] == pytest.approx(found.flops["policy gradient"] / (0.5 * 989e12))


# ---- Which models


@pytest.fixture
def config_file(tmp_path):
    setting.model(vocabulary=3000, hidden=128, layers=2).config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model" / "config.json")


SIZES = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LANGUAGE = SIZES | {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gemma2", LANGUAGE),
        ("bloom", SIZES),
        ("mpt", {**SIZES, "d_model": 64, "n_heads": 4, "n_layers": 2}),
        ("gpt_neo", {**SIZES, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
        ("xglm", {**SIZES, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128}),
        ("opt", {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64}),
        ("gpt2", SIZES),
    ],
)
def test_every_form_of_attention_is_rehearsed_and_counted_as_with_data(kind, fields):
    from transformers import AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **fields)
    rows, prompt, completion = 2, 5, 7
    counted = Rehearsal(config).scores(rows, prompt, completion).flops
    ids = torch.ones(rows, prompt + completion - 1, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        real = AutoModelForCausalLM.from_config(config)
        real(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=completion)
    assert counted == counter.get_total_flops()


def vision(kind: str, **options: Any) -> Any:
    sections = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = LANGUAGE | {"rope_parameters": sections} | options
    return AutoConfig.for_model(kind, text_config=text, **options)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("tied", [False, True])
def test_of_a_vision_language_model_the_language_part_is_counted(tmp_path, capsys, kind, tied):
    config = vision(kind, tie_word_embeddings=tied)
    config.save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--max_completion_length", "8", "--json", "true"]
    assert main(["estimate", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    from transformers import AutoModel

    with torch.device("meta"):
        language = sum(p.numel() for p in AutoModel.from_config(config.get_text_config()).parameters())
    assert found["parameters"] == language + (0 if tied else 64 * 100)
    assert main(["estimate", *options, "--use_peft", "true", "--lora_target_modules", "all-linear"]) == 0
    assert json.loads(capsys.readouterr().out)["trained"] < language


def test_transformers_chooses_the_attention_unless_the_user_does(tmp_path):
    AutoConfig.for_model("gemma2", **LANGUAGE).save_pretrained(tmp_path)
    plan, _ = make_plan(["--model", str(tmp_path)])
    chosen = plan.rehearsal(None)
    assert chosen.model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="flash_attention_2 of gemma2 models can't be estimated"):
        make_plan(["--model", str(tmp_path), "--attn_implementation", "flash_attention_2"])[0].rehearsal(None)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("mamba", "models of type mamba can't be estimated: they are recurrent"),
        ("t5", "models of type t5 can't be estimated: they are no causal language models"),
    ],
)
def test_models_that_can_not_be_rehearsed_are_refused_in_a_sentence(tmp_path, capsys, kind, said):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    assert main(["estimate", "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("failure", ["needs_data", "has_no_shape"])
def test_code_that_needs_data_is_refused_in_a_sentence(config_file, capsys, monkeypatch, failure):
    from transformers import Qwen3Model

    def needs_data(self: Any, input_ids: torch.Tensor, **_: Any) -> None:
        input_ids.sum().item()

    def has_no_shape(self: Any, input_ids: torch.Tensor, **_: Any) -> None:
        input_ids.split([1, 1], dim=1)

    monkeypatch.setattr(Qwen3Model, "forward", {"needs_data": needs_data, "has_no_shape": has_no_shape}[failure])
    assert main(["estimate", "--model", config_file]) == 2
    error = capsys.readouterr().err
    assert "models of type qwen3 can't be estimated: their passes don't go through on tensors without data (" in error
    assert error.count("\n") == 1


def test_a_reference_model_takes_memory_whatever_the_method_and_work_for_a_policy_gradient(tmp_path):
    made = make(tmp_path)
    with_reference = estimate(plan_of(made).with_config(beta=0.1))
    assert "reference model" not in with_reference.flops
    assert with_reference.memory["reference model"] == sum(4 * p.numel() for p in made.model.parameters())
    with_reference = estimate(plan_of(make(tmp_path, method="joint_loss")).with_config(beta=0.1))
    assert with_reference.memory["reference model"] == sum(4 * p.numel() for p in made.model.parameters())
    assert with_reference.flops["reference model"] > 0


def test_what_importance_ratios_had_scored_is_the_prior_too(tmp_path):
    plan = plan_of(make(tmp_path))
    assert "E-step: prior" in estimate(plan).flops
    weighed = estimate(plan.with_config(m_step_importance_clip=2.0)).flops
    assert "E-step: prior" not in weighed
    assert weighed["M-step: importance ratios"] > 0
    fixed = plan.with_config(m_step_importance_clip=2.0, prior="fixed")
    assert "E-step: prior" in estimate(fixed).flops


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


def test_weights_are_counted_in_the_precision_that_they_are_loaded_in(config_file):
    def weights(*options: str) -> float:
        plan, _ = make_plan(["--model", config_file, *options])
        return lasting(plan)["weights"]

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
        (["--gpu_tflops_float32", "0"], "gpu_tflops_float32 must be above 0; got 0"),
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
