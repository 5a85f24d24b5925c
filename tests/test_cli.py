"""`vpd-trl train` and `vpd-trl evaluate`: recipes, errors, signals, resuming."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from trl import ModelConfig

from tests import tiny
from vpd_trl import VPDConfig, __version__
from vpd_trl.checkpoints import last_whole
from vpd_trl.cli import interrupt, main
from vpd_trl.cli.arguments import TaskArguments
from vpd_trl.cli.evaluate import make_parser
from vpd_trl.cli.main import HELP
from vpd_trl.cli.parsing import RecipeParser, parse
from vpd_trl.tasks import load_task


ROOT = Path(__file__).parent.parent
TASK = f"{ROOT / 'tests' / 'cli_task.py'}:Sums"

RECIPE = dict(
    task=TASK,
    per_device_train_batch_size=4,
    num_generations=4,
    gradient_accumulation_steps=2,
    max_completion_length=6,
    max_steps=4,
    learning_rate="1e-3",
    logging_steps=1,
    save_steps=100,
    report_to="none",
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    e_step_frequency=2,
    disable_tqdm=True,
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(folder)
    tiny.model(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, model_folder):
    path = tmp_path / "recipe.yaml"

    def write(**changes):
        values = RECIPE | {"model_name_or_path": str(model_folder), "output_dir": str(tmp_path / "run")} | changes
        path.write_text(yaml.safe_dump(values))
        return str(path)

    write()
    write.path = str(path)
    return write


def vpd_trl(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return main([str(argument) for argument in arguments])


def last_line(capsys):
    return capsys.readouterr().err.strip().split("\n")[-1]


def state(folder):
    return json.loads((Path(folder) / "trainer_state.json").read_text())


# ---- The command


def test_help_and_version_come_without_torch():
    code = "import sys; from vpd_trl.cli import main; main(['--help']); main(['--version']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "vpd-trl COMMAND" in done.stdout
    assert f"vpd-trl {__version__}" in done.stdout


def test_the_evaluation_in_the_help_has_all_that_its_task_needs():
    example = next(line for line in HELP.splitlines() if line.startswith("  vpd-trl evaluate"))
    given = make_parser().parse_args(shlex.split(example)[2:])
    assert load_task(given.task, **json.loads(given.task_kwargs)).name


def test_training_without_arguments_says_what_it_needs_before_anything_about_the_machine(capsys):
    assert vpd_trl("train") == 2
    assert "give a recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "Did you mean train?"),
        (["--versoin"], "there is no option"),
        (["evaluate", "--model", "m", "--tsk", "t"], "--task"),
        (["evaluate", "--model", "m", "--task", "t", "--max_token", "3"], "Did you mean max_new_tokens?"),
        (["evaluate", "--model", "m", "--task", "nothing"], "There is no task 'nothing'"),
        (["evaluate", "--model", "m", "--task", TASK, "--temperature", "-1"], "temperature must be"),
        (["report"], "RUN"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(capsys, arguments, said):
    assert vpd_trl(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("vpd-trl: error: ")
    assert error.count("\n") == 1
    assert said in error


# ---- Recipes


def test_the_command_line_comes_before_the_recipe_which_comes_before_defaults(recipe):
    recipe(task_kwargs={"wait": 0.5}, seed=3, env={"VPD_TRL_TEST": "1"})
    task, config, model = parse([f"--config={recipe.path}", "--seed", "4", "--feedback=siblings", "--dtype", "auto"])
    assert (config.seed, config.learning_rate, config.e_step_frequency, config.jsd_weight) == (4, 1e-3, 2, 0.5)
    assert (task.task_kwargs, task.feedback, model.dtype) == ({"wait": 0.5}, "siblings", "auto")
    assert os.environ.pop("VPD_TRL_TEST") == "1"
    task, config, _ = parse(
        [
            "--task",
            "a",
            "--model_name_or_path",
            "b",
            "--task_kwargs",
            '{"k": [1]}',
            "--no_strip_thinking",
            "--bf16",
            "false",
        ]
    )
    assert (task.task_kwargs, config.strip_thinking) == ({"k": [1]}, False)


def test_no_field_has_two_meanings_and_the_help_has_each_once():
    groups = [{f.name for f in fields(kind) if f.init} for kind in (TaskArguments, VPDConfig, ModelConfig)]
    names = set().union(*groups)
    assert len(names) == sum(map(len, groups))
    text = RecipeParser().format_help()
    shown = re.findall(r"^  --(\w+)", text, flags=re.MULTILINE)
    assert sorted(shown) == sorted(names)
    assert (
        text.index("--task ")
        < text.index("--e_step_frequency")
        < text.index("--lora_r")
        < text.index("--weight_decay")
    )


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({"learnin_rate": 1}, [], "'learnin_rate' that doesn't exist. Did you mean learning_rate?"),
        ({}, ["--e-step-frequncy", "3"], "Did you mean e_step_frequency?"),
        ({}, ["--e_step_freq", "3"], "no field --e_step_freq"),
        ({}, ["--max_steps", "many"], "invalid int value: 'many'"),
        ({"method": "vdp"}, [], "method must be one of"),
        ({"task": None}, [], "task is missing"),
        ({}, ["--task", "nothing"], "There is no task 'nothing'"),
        ({}, ["--task_kwargs", "{wait: 1}"], "task_kwargs must be JSON"),
        ({"task_kwargs": {"unknown": 1}}, [], "unexpected keyword argument 'unknown'"),
        ({}, ["--task", TASK.replace("Sums", "NothingToTrainOn")], "nothing to train on"),
        ({"feedback": "self_criticism"}, [], "feedback must be one of"),
        ({"eval_strategy": "steps", "eval_steps": 1}, [], "add evaluate: true"),
        ({"eval_samples": 0}, [], "eval_samples must be an integer of at least 1"),
        ({"teacher_lora_r": 4}, [], "teacher='lora'"),
        ({}, ["stray"], "'stray' belongs to no option"),
        ({}, ["--config"], "--config needs the path"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_exit_code_2(recipe, capsys, changes, arguments, said):
    path = recipe(**changes)
    given = [] if arguments == ["--config"] else ["--config", path]
    assert vpd_trl("train", *given, *arguments) == 2
    line = last_line(capsys)
    assert line.startswith("vpd-trl: error: ")
    assert said in line


def test_a_recipe_that_is_missing_or_no_yaml_is_a_usage_error(tmp_path, capsys):
    assert vpd_trl("train", "--config", tmp_path / "none.yaml") == 2
    assert "there is no recipe" in last_line(capsys)
    (tmp_path / "bad.yaml").write_text("a: [1\nb: 2")
    assert vpd_trl("train", "--config", tmp_path / "bad.yaml") == 2
    assert "the recipe is not YAML" in last_line(capsys)
    (tmp_path / "list.yaml").write_text("- 1")
    assert vpd_trl("train", "--config", tmp_path / "list.yaml") == 2
    assert "YAML mapping" in last_line(capsys)


# ---- Training


def test_a_run_leaves_model_metrics_arguments_and_a_final_evaluation(recipe, tmp_path):
    path = recipe(evaluate=True, eval_samples=2, eval_limit=3, eval_max_new_tokens=4, hub_token="hf_secret")
    assert vpd_trl("train", "--config", path, "--max_steps", 2, "--save_strategy", "no") == 0
    run = tmp_path / "run"
    assert (run / "model.safetensors").is_file()
    log = state(run)["log_history"]
    assert state(run)["global_step"] == 2
    assert [row["step"] for row in log if "m_step/divergence" in row] == [1, 2]
    assert [row["step"] for row in log if "eval_avg@2" in row] == [2]
    summary = json.loads((run / "evaluation" / "step-2" / "summary.json").read_text())
    assert summary["problems"] == 3
    assert summary["settings"]["sampling"]["max_new_tokens"] == 4
    text = (run / "arguments.json").read_text()
    arguments = json.loads(text)
    assert (arguments["task"], arguments["method"], arguments["learning_rate"]) == (TASK, "vpd", 1e-3)
    assert "hf_secret" not in text


def test_a_run_that_a_signal_stopped_goes_on_as_if_nothing_had_been(recipe, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert vpd_trl("train", "--config", recipe.path, "--output_dir", whole) == 0
    arguments = ["train", "--config", recipe.path, "--output_dir", parts]
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert vpd_trl(*arguments, "--task_kwargs", '{"interrupt_at": 2}') == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert last_line(capsys).endswith("--resume")
    assert last_whole(parts).name == "checkpoint-2"
    assert state(parts)["global_step"] == 2
    assert not (parts / "model.safetensors").exists()
    assert vpd_trl(*arguments) == 2
    assert "go on with it by --resume" in last_line(capsys)
    assert vpd_trl(*arguments, "--resume") == 0
    assert [row["step"] for row in state(parts)["log_history"] if "reward" in row] == [1, 2, 3, 4]
    assert tiny.same(load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors"))
    assert not tiny.same(
        load_file(parts / "checkpoint-2" / "model.safetensors"), load_file(whole / "model.safetensors")
    )
    (parts / "model.safetensors").unlink()
    assert vpd_trl(*arguments, "--resume") == 0  # no step is left, so none is trained
    assert state(parts)["global_step"] == 4
    assert tiny.same(load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors"))


def test_a_second_signal_stops_at_once(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(interrupt, "SAME_SIGNAL_SECONDS", -1.0)
    assert vpd_trl("train", "--config", recipe.path, "--task_kwargs", '{"interrupt_at": 2, "signals": 2}') == 130
    assert last_line(capsys) == "vpd-trl: interrupted"
    assert last_whole(tmp_path / "run") is None


def test_one_signal_that_arrives_twice_is_one(recipe, tmp_path):
    assert vpd_trl("train", "--config", recipe.path, "--task_kwargs", '{"interrupt_at": 1, "signals": 2}') == 130
    assert last_whole(tmp_path / "run").name == "checkpoint-1"


def test_an_error_of_training_is_one_line_and_exit_code_1_unless_the_traceback_is_asked_for(recipe, capsys):
    arguments = ["train", "--config", recipe.path, "--task_kwargs", '{"fails": true}']
    assert vpd_trl(*arguments) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    said = "vpd-trl: error: RuntimeError: the reward is out of office (--traceback shows where)"
    assert error.strip().split("\n")[-1] == said
    assert vpd_trl(*arguments, "--traceback") == 1
    assert "in _parity" in capsys.readouterr().err


def test_adapters_of_student_and_teacher_have_their_own_form_and_the_student_can_be_evaluated(
    recipe, tmp_path, capsys
):
    changes = dict(teacher="lora", teacher_lora_r=3, use_peft=True, lora_r=5, lora_target_modules=["all-linear"])
    assert vpd_trl("train", "--config", recipe(**changes), "--max_steps", 1, "--save_strategy", "no") == 0
    run = tmp_path / "run"
    student, teacher = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (run, run / "teacher" / "adapter")
    )
    assert (student["r"], teacher["r"], teacher["lora_alpha"]) == (5, 3, 32)
    (run / "tokenizer_config.json").unlink()  # that of the base model will do
    evaluate = [
        "evaluate",
        "--model",
        run,
        "--task",
        TASK,
        "--max_new_tokens",
        4,
        "--output_dir",
        tmp_path / "results",
    ]
    assert vpd_trl(*evaluate, "--k", 1, "--limit", 2) == 0
    assert "avg@1" in capsys.readouterr().out


# ---- Evaluating


def test_an_evaluation_prints_a_table_goes_on_where_it_was_and_refuses_results_of_other_settings(
    model_folder, tmp_path, capsys
):
    arguments = ["evaluate", "--model", model_folder, "--task", TASK, "--output_dir", tmp_path / "results", "--k", 2]
    assert vpd_trl(*arguments, "--max-new-tokens", 4) == 0
    output = capsys.readouterr().out
    assert re.search(r"avg@2 +\d+\.\d% +\d+\.\d% – \d+\.\d%", output)
    problems = tmp_path / "results" / "problems.jsonl"
    lines = problems.read_text().splitlines()
    assert len(lines) == 6
    problems.write_text("\n".join(lines[:5]) + "\n")
    assert vpd_trl(*arguments, "--max_new_tokens", 4) == 0
    assert sorted(problems.read_text().splitlines()) == sorted(lines)
    assert capsys.readouterr().out == output
    assert vpd_trl(*arguments, "--max_new_tokens", 5) == 2
    assert "--no_resume" in last_line(capsys)
    assert vpd_trl(*arguments, "--max_new_tokens", 5, "--no_resume") == 0


def test_each_of_several_splits_has_its_folder(model_folder, tmp_path, capsys):
    arguments = ["evaluate", "--model", model_folder, "--task", TASK, "--output_dir", tmp_path / "results", "--k", 1]
    arguments += ["--max_new_tokens", 2, "--limit", 2, "--task_kwargs", '{"splits": 2}']
    assert vpd_trl(*arguments, "--splits", "tset") == 2
    assert "has the splits" in last_line(capsys)
    assert vpd_trl(*arguments) == 0
    assert {path.parent.name for path in (tmp_path / "results").glob("*/summary.json")} == {"test", "more"}
    assert "more" in capsys.readouterr().out


# ---- Processes of their own


TWO_PROCESSES = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
TWO_PROCESSES += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def start(recipe, *arguments, launcher=()):
    return start_command("train", "--config", recipe.path, *arguments, launcher=launcher)


def start_command(*arguments, launcher=()):
    command = [sys.executable, *launcher, "-m", "vpd_trl.cli", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    try:
        return process.communicate(timeout=240)[0]
    finally:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_from_outside_leaves_a_checkpoint_and_exit_code_130(recipe, tmp_path, number):
    process = start(recipe, "--task_kwargs", '{"wait": 0.3}', "--max_steps", 1000)
    for line in process.stdout:
        if "'loss'" in line:
            break
    process.send_signal(number)
    output = finish(process)
    assert process.returncode == 130, output[-3000:]
    step = state(last_whole(tmp_path / "run"))["global_step"]
    assert step < 1000
    assert f"stopped after step {step}, saved" in output.strip().split("\n")[-1]


@pytest.mark.slow
def test_two_processes_agree_on_a_signal_that_one_of_them_got_and_go_on_together(recipe, tmp_path):
    launcher = TWO_PROCESSES
    whole = ["--output_dir", tmp_path / "whole"]
    process = start(recipe, *whole, launcher=launcher)
    output = finish(process)
    assert process.returncode == 0, output[-3000:]
    process = start(recipe, "--task_kwargs", '{"interrupt_at": 2, "rank": 1}', launcher=launcher)
    output = finish(process)
    assert process.returncode != 0
    assert "stopped after step 2, saved" in output
    assert last_whole(tmp_path / "run").name == "checkpoint-2"
    process = start(recipe, "--resume", launcher=launcher)
    output = finish(process)
    assert process.returncode == 0, output[-3000:]
    assert state(tmp_path / "run")["global_step"] == 4
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert tiny.same(one, two)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does_and_print_one_table(model_folder, tmp_path, capsys):
    arguments = ["evaluate", "--model", model_folder, "--task", TASK, "--k", 2, "--max_new_tokens", 4]
    assert vpd_trl(*arguments, "--output_dir", tmp_path / "one") == 0
    expected = capsys.readouterr().out.split("\n\nResults")[0]
    process = start_command(*arguments, "--output_dir", tmp_path / "two", launcher=TWO_PROCESSES)
    output = finish(process)
    assert process.returncode == 0, output[-3000:]
    assert output.count(expected) == 1, output[-3000:]
    one, two = (sorted((tmp_path / name / "problems.jsonl").read_text().splitlines()) for name in ("one", "two"))
    assert one == two
