"""An evaluation within training sees the student alone, changes nothing, and reports where the trainer looks."""

import json
import random
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import EarlyStoppingCallback

from tests import test_distributed, tiny
from tests.evaluation_script import SCRIPT
from vpd_trl.evaluation import Evaluation, Sampling, TransformersEngine


SHORT = Sampling(max_new_tokens=6)
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}


def careless_reward(completion_ids, **kwargs):
    """Draws from every random state there is, and what it returns depends on each."""
    drawn = random.getrandbits(1) + np.random.randint(2) + int(torch.randint(2, ()))
    return [float((sum(ids) + drawn) % 2) for ids in completion_ids]


def at_step(scores):
    """A reward that says how good the student is after each step."""
    return lambda completions, trainer_state, **kwargs: [scores[trainer_state.global_step]] * len(completions)


def evaluation(reward=tiny.parity_reward, n=5, **changes):
    return Evaluation(tiny.dataset(n, conversational=True), reward, **{"k": 3, "sampling": SHORT, **changes})


@pytest.mark.parametrize(
    ("sampling", "longest", "expected"),
    [
        (None, 5, 5),
        (None, None, 8192),
        (Sampling(max_new_tokens=6), 5, 6),
        (Sampling(), 5, 8192),
    ],
)
def test_samples_are_as_long_as_the_rollouts_at_most_unless_their_sampling_is_given(
    tmp_path, tokenizer, sampling, longest, expected
):
    mine = evaluation(sampling=sampling)
    trainer = tiny.trainer(
        tmp_path, tok=tokenizer, evaluation={"a": mine}, max_completion_length=longest, **EVERY_STEP
    )
    assert trainer.evaluation.evaluations["a"].sampling == replace(sampling or Sampling(), max_new_tokens=expected)
    assert mine.sampling == (sampling or Sampling()), "a script that uses the same object gets the paper's length"


def test_the_length_that_was_used_is_in_the_saved_settings(tmp_path, tokenizer):
    trainer = tiny.trainer(
        tmp_path,
        tok=tokenizer,
        evaluation=evaluation(sampling=None),
        max_completion_length=5,
        max_steps=1,
        **EVERY_STEP,
    )
    trainer.train()
    assert 0 < logged(trainer, "eval_mean_tokens")[-1] <= 5
    settings = json.loads((tmp_path / "evaluation" / "step-1" / "settings.json").read_text())
    assert settings["sampling"]["max_new_tokens"] == 5


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.3)


RUNS = {
    "plain": {},
    "grpo": {"method": "grpo", "feedback_fn": None},
    "ema teacher": {"teacher": "ema", "prior": "fixed"},
    "lora teacher": {"teacher": "lora", "teacher_peft_config": LORA},
    "lora student": {"peft_config": LORA, "gradient_checkpointing": True},
    "rare logs": {"logging_steps": 2, "steps_per_generation": 4},
}


@pytest.mark.parametrize("kind", RUNS)
def test_training_with_and_without_evaluation_is_the_same_to_the_bit(tmp_path, tokenizer, kind):
    changes, runs = RUNS[kind], []
    for name, extra in (
        ("without", {}),
        ("with", {"evaluation": evaluation(careless_reward), "eval_on_start": True, **EVERY_STEP}),
    ):
        model = tiny.model(tokenizer, attention_dropout=0.2)  # so that training draws in its forward passes too
        extra = {"reward_funcs": careless_reward, "max_steps": 4, **changes, **extra}
        trainer = tiny.trainer(tmp_path / name, tok=tokenizer, mdl=model, **extra)
        trainer.train()
        runs.append(trainer)
    without, with_evaluation = runs
    assert tiny.same(tiny.weights(without), tiny.weights(with_evaluation))
    assert logged(with_evaluation, "eval_avg@3")
    assert len(logged(with_evaluation, "eval_avg@3")) == 5, "at the start and after each step"
    timing = ("_runtime", "_per_second", "time")
    kept = [
        [
            {k: v for k, v in row.items() if not any(t in k for t in timing)}
            for row in t.state.log_history
            if "loss" in row
        ]
        for t in runs
    ]
    assert kept[0] == kept[1], "metrics of training are neither lost nor mixed"


def test_the_student_is_evaluated_as_from_a_script(tmp_path, tokenizer):
    run = evaluation(answer_fn=lambda text: text[:1])
    trainer = tiny.trainer(tmp_path, tok=tokenizer, evaluation=run, max_steps=2, **EVERY_STEP)
    trainer.train()
    result = run.run(TransformersEngine(trainer.model, tokenizer), progress=False)
    last = {name: logged(trainer, f"eval_{name}")[-1] for name in result.metrics}
    assert last == result.metrics
    assert set(last) == {"avg@3", "pass@1", "pass@2", "pass@3", "majority@3"}
    assert logged(trainer, "eval_truncated")[-1] == result.truncated
    assert logged(trainer, "eval_mean_tokens")[-1] == result.mean_tokens
    for step in (1, 2):
        folder = tmp_path / "evaluation" / f"step-{step}"
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["metrics"]["avg@3"]["value"] == logged(trainer, "eval_avg@3")[step - 1]
        assert summary["settings"]["model"]["step"] == step
        assert len((folder / "problems.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("teacher", ["lora", "ema", "shared"])
def test_the_teacher_has_no_part_in_it(tmp_path, tokenizer, teacher):
    trainer = tiny.trainer(tmp_path, tok=tokenizer, teacher=teacher, evaluation=evaluation())
    if teacher == "lora":
        assert trainer.teacher.parameters
        for parameter in trainer.teacher.parameters.values():
            parameter.data = torch.randn(parameter.shape)
    elif teacher == "ema":
        for weight in trainer.teacher.average.weights.values():
            weight.copy_(torch.randn(weight.shape))
    alone = evaluation().run(TransformersEngine(tiny.model(tokenizer), tokenizer), progress=False)
    assert trainer.evaluate()["eval_avg@3"] == alone.metrics["avg@3"]
    saved = (tmp_path / "evaluation" / "step-0" / "problems.jsonl").read_text().splitlines()
    completions = [line["completions"] for line in sorted(map(json.loads, saved), key=lambda line: line["index"])]
    assert completions == [problem.completions for problem in alone.problems]


def test_the_best_checkpoint_is_the_one_with_the_best_metric(tmp_path, tokenizer):
    kept = {}
    trainer = tiny.trainer(
        tmp_path,
        tok=tokenizer,
        evaluation=evaluation(at_step({1: 0.25, 2: 0.75, 3: 0.5})),
        metric_for_best_model="avg@3",
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        **EVERY_STEP,
    )
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *a, **k: (
        kept.update({trainer.state.global_step: tiny.weights(trainer)}),
        evaluate(*a, **k),
    )[1]
    trainer.train()
    assert trainer.state.best_metric == 0.75
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert tiny.same(tiny.weights(trainer), kept[2])
    assert not tiny.same(kept[2], kept[3])


def test_the_best_checkpoint_alone_is_saved_if_asked_for(tmp_path, tokenizer):
    trainer = tiny.trainer(
        tmp_path,
        tok=tokenizer,
        evaluation={"sums": evaluation(at_step({1: 0.0, 2: 1.0, 3: 0.5}))},
        metric_for_best_model="eval_sums_pass@1",
        save_strategy="best",
        max_steps=3,
        **EVERY_STEP,
    )
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_early_stopping_sees_the_metric(tmp_path, tokenizer):
    trainer = tiny.trainer(
        tmp_path,
        tok=tokenizer,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        evaluation=evaluation(at_step({1: 0.5, 2: 0.25, 3: 0.75, 4: 1.0})),
        metric_for_best_model="eval_avg@3",
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
        **EVERY_STEP,
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_several_evaluations_and_trl_s_own_run_side_by_side(tmp_path, tokenizer):
    trainer = tiny.trainer(
        tmp_path,
        tok=tokenizer,
        evaluation={"one": evaluation(), "two": evaluation(n=2, k=2)},
        eval_dataset={"a": tiny.dataset(4), "b": tiny.dataset(4)},
        per_device_eval_batch_size=4,
        max_steps=1,
        **EVERY_STEP,
    )
    trainer.train()
    for name in ("eval_a_loss", "eval_b_reward", "eval_one_avg@3", "eval_two_avg@2", "eval_two_pass@2"):
        assert len(logged(trainer, name)) == 1 or name == "eval_b_reward", name
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_one_avg@3", "eval_two_truncated"} <= metrics.keys()
    assert sorted(path.name for path in (tmp_path / "evaluation" / "step-1").iterdir()) == ["one", "two"]
    alone = trainer.evaluate(tiny.dataset(4))
    assert "eval_loss" in alone
    assert not any("avg@" in name for name in alone), "another data set was asked for"
    assert "test_one_avg@3" in trainer.evaluate(metric_key_prefix="test")


def test_without_an_evaluation_trl_s_own_is_as_before(tmp_path, tokenizer):
    trainer = tiny.trainer(
        tmp_path, tok=tokenizer, eval_dataset=tiny.dataset(4), per_device_eval_batch_size=4, max_steps=1, **EVERY_STEP
    )
    trainer.train()
    assert logged(trainer, "eval_loss")
    assert logged(trainer, "eval_reward")
    assert not (tmp_path / "evaluation").exists()
    with pytest.raises(ValueError, match="didn't pass an `eval_dataset`"):
        tiny.trainer(tmp_path, tok=tokenizer, **EVERY_STEP)


def test_a_metric_that_nothing_measures_is_refused_before_training(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"'avg@16', but the evaluation measures avg@3, pass@1, pass@2, pass@3"):
        tiny.trainer(tmp_path, tok=tokenizer, evaluation=evaluation(), metric_for_best_model="avg@16", **EVERY_STEP)
    with pytest.raises(ValueError, match="'avg@3', but the evaluation measures sums_avg@3"):
        tiny.trainer(
            tmp_path, tok=tokenizer, evaluation={"sums": evaluation()}, metric_for_best_model="avg@3", **EVERY_STEP
        )
    with pytest.raises(TypeError, match="must be an Evaluation, or several by name; got Dataset"):
        tiny.trainer(tmp_path, tok=tokenizer, evaluation=tiny.dataset(2))


def test_tools_are_refused_as_an_evaluation_does_not_run_them(tmp_path, tokenizer):
    trainer = tiny.trainer(tmp_path, tok=tokenizer, method="grpo", feedback_fn=None)
    trainer.tools = [print]
    from vpd_trl.evaluation.training import TrainingEvaluation

    with pytest.raises(ValueError, match="not supported with tools"):
        TrainingEvaluation(trainer, evaluation())


def test_results_of_an_earlier_run_are_overwritten(tmp_path, tokenizer):
    for seed in (0, 1):
        model = tiny.model(tokenizer, seed=seed)
        trainer = tiny.trainer(tmp_path, tok=tokenizer, mdl=model, evaluation=evaluation())
        metrics = trainer.evaluate()
        summary = json.loads((tmp_path / "evaluation" / "step-0" / "summary.json").read_text())
        assert summary["mean_tokens"] == metrics["eval_mean_tokens"]
        assert len((tmp_path / "evaluation" / "step-0" / "problems.jsonl").read_text().splitlines()) == 5


# ---- vLLM


class VLLM:
    """What an evaluation touches of TRL's vLLM, which notes its settings at each call."""

    def __init__(self, trainer, mode):
        self.trainer, self.mode, self.tensor_parallel_size = trainer, mode, 1
        self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty = 1.0, 1.0, 0, None, 1.0
        self.max_completion_length, self.generation_kwargs = 6, {"stop": ["\n"]}
        self.calls, self.synced = [], []

    def sync_weights(self):
        self.synced.append(tiny.weights(self.trainer))

    def generate(self, prompts, images, num_generations, profiler):
        settings = {name: value for name, value in vars(self).items() if name not in ("trainer", "calls", "synced")}
        self.calls.append((prompts, num_generations, settings, torch.rand(1).item()))
        ids = [[20 + i % num_generations, self.trainer.eos_token_ids[0]] for i in range(len(prompts))]
        return prompts, ids, [[[0.0]] * 2 for _ in prompts], None


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_the_trainer_s_vllm_samples_by_the_evaluation_s_settings_with_the_student_s_weights(tmp_path, tokenizer, mode):
    trainer = tiny.trainer(tmp_path, tok=tokenizer, vllm_max_model_length=70)
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    vllm = trainer.vllm_generation = VLLM(trainer, mode)
    before = vars(vllm).copy()
    from vpd_trl.evaluation.training import TrainingEvaluation

    rows = [*tiny.dataset(3, conversational=True), {"prompt": [{"role": "user", "content": "x" * 70}], "answer": ""}]
    run = Evaluation(rows, careless_reward, k=3, sampling=Sampling(top_k=7, max_new_tokens=9))
    metrics = TrainingEvaluation(trainer, run)()
    ((prompts, n, settings, drawn),) = vllm.calls
    assert n == 3
    assert len(prompts) == 12
    assert [prompts[i] == prompts[i + 1] == prompts[i + 2] for i in (0, 3, 6, 9)] == [True] * 4
    assert len(prompts[0]) == 1, "the prompt that does not fit was not sent"
    assert tokenizer.decode(prompts[3]).endswith("assistant\n<think>\n\n</think>\n\n")
    expected = {"temperature": 0.6, "top_p": 0.95, "top_k": 7, "min_p": 0.0, "max_completion_length": 9}
    assert expected.items() <= settings.items()
    seeded = settings["generation_kwargs"]
    if mode == "server":
        assert list(seeded) == ["seed"]
    else:
        assert seeded == {}, "one seed for separate requests would make all samples of a problem the same"
    assert {k: v for k, v in vars(vllm).items() if k not in ("calls", "synced")} == {
        k: v for k, v in before.items() if k not in ("calls", "synced")
    }
    assert tiny.same(vllm.synced[0], tiny.weights(trainer))
    saved = map(json.loads, (tmp_path / "evaluation" / "step-0" / "problems.jsonl").read_text().splitlines())
    by_index = {line["index"]: line for line in saved}
    assert by_index[0]["completions"] == [tokenizer.decode([20 + i]) for i in range(3)]
    assert by_index[0]["finished"] == [True] * 3
    assert by_index[3]["completions"] == [""] * 3
    assert metrics["eval_truncated"] == 0.25
    torch.manual_seed(99)
    TrainingEvaluation(trainer, run)()
    assert vllm.calls[1][2:] == (settings, drawn), "the second time the same samples"


def test_the_most_likely_answer_is_asked_for_once_whatever_k(tmp_path, tokenizer):
    """vLLM's server refuses to find it more than once."""
    trainer = tiny.trainer(tmp_path, tok=tokenizer, vllm_max_model_length=100)
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    vllm = trainer.vllm_generation = VLLM(trainer, "server")
    from vpd_trl.evaluation.training import TrainingEvaluation

    run = Evaluation(tiny.dataset(3, conversational=True), careless_reward, k=3, sampling=Sampling(temperature=0.0))
    TrainingEvaluation(trainer, run)()
    ((prompts, n, _, _),) = vllm.calls
    assert (len(prompts), n) == (3, 1)
    saved = map(json.loads, (tmp_path / "evaluation" / "step-0" / "problems.jsonl").read_text().splitlines())
    assert [len(line["completions"]) for line in saved] == [3] * 3


def test_a_schedule_free_optimizer_evaluates_its_own_weights(tmp_path, tokenizer):
    trainer = tiny.trainer(tmp_path, tok=tokenizer, evaluation=evaluation())
    switched = []
    trainer.optimizer = types.SimpleNamespace(eval=lambda: switched.append(True))
    trainer.evaluate()
    assert switched == [True]


class ScheduleFree(torch.optim.SGD):
    """Its weights for evaluation are others than those for training."""

    shift = 0.0

    def _to(self, shift):
        with torch.no_grad():
            for parameter in (p for group in self.param_groups for p in group["params"]):
                parameter += shift - self.shift
        self.shift = shift

    def train(self):
        self._to(0.0)

    def eval(self):
        self._to(0.5)


def test_rollouts_after_a_schedule_free_optimizer_s_evaluation_are_of_its_training_weights(tmp_path, tokenizer):
    model = tiny.model(tokenizer)
    optimizer = ScheduleFree(model.parameters(), lr=1e-3)
    trainer = tiny.trainer(
        tmp_path,
        tok=tokenizer,
        mdl=model,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        vllm_max_model_length=100,
        **EVERY_STEP,
        evaluation=evaluation(),
    )
    trainer.use_vllm, trainer._last_loaded_step, trainer.vllm_importance_sampling_correction = True, -1, False
    vllm = trainer.vllm_generation = VLLM(trainer, "colocate")
    from vpd_trl.evaluation.training import TrainingEvaluation

    trainer.evaluation = TrainingEvaluation(trainer, evaluation())
    shifts, generate = [], vllm.generate

    def noted(**arguments):
        assert tiny.same(vllm.synced[-1], tiny.weights(trainer))
        shifts.append(optimizer.shift)
        return generate(**arguments)

    vllm.generate = noted
    trainer.train()
    assert shifts == [0.0, 0.5] * 3


# ---- Several processes


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.setattr(test_distributed, "SCRIPT", SCRIPT)
    return test_distributed.launch


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["shared", "one_problem", "collective"])
def test_two_processes_share_the_problems_and_find_what_one_finds(tmp_path, launch, scenario):
    first, second = launch(scenario, tmp_path)
    two = (tmp_path / "run" / "evaluation" / "step-1" / "problems.jsonl").read_text().splitlines()
    (alone,) = launch(scenario, tmp_path, processes=1)
    one = (tmp_path / "run" / "evaluation" / "step-1" / "problems.jsonl").read_text().splitlines()
    assert first["metrics"] == second["metrics"] == alone["metrics"]
    assert len(first["metrics"]) == 2, "after each step"
    assert sorted(two) == sorted(one)
    assert tiny.same(first["weights"], second["weights"])
    n = 1 if scenario == "one_problem" else 5
    asked = [len(result["asked"]) for result in (first, second, alone)]
    fillers = 2 if scenario == "collective" else 0
    assert asked == [2 * ((n + 1) // 2), 2 * (n // 2) + fillers, 2 * n]


@pytest.mark.slow
def test_a_reward_function_that_raises_on_one_process_stops_both(tmp_path, launch):
    first, second = launch("raises_on_one", tmp_path, fails=True)
    assert "Process 1 failed" in first["error"]
    assert "no reward today" in first["error"]
    assert "no reward today" in second["error"]
