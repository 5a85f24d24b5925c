"""What a vLLM beside training is given, awake or in sleep mode, where it forgets its weights while training goes on."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from trl.generation import vllm_generation

from tests import tiny
from vpd_trl import Feedback
from vpd_trl.evaluation import Evaluation


class SleepingLLM:
    """Holds what `vllm.LLM` would: weights and a cache, each there or not."""

    made: list

    def __init__(self, **options):
        self.options, self.awake, self.weights, self.calls = options, {"weights", "kv_cache"}, {}, []
        model = SimpleNamespace(load_weights=self._load)
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=model))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
        self.made.append(self)

    def _load(self, named):
        assert "weights" in self.awake, "written into memory that is not there"
        self.weights |= {name: value.detach().clone() for name, value in named}

    def sleep(self, level):
        assert level == 2
        self.awake, self.weights = set(), {}

    def wake_up(self, tags):
        self.awake |= set(tags)

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, sampling_params, **options):
        assert self.awake == {"weights", "kv_cache"}
        self.calls.append(dict(self.weights))
        logprobs = [{20: SimpleNamespace(rank=1, logprob=-1.0)}]
        n = getattr(sampling_params, "n", 1)
        return [
            SimpleNamespace(
                prompt_token_ids=prompt["prompt_token_ids"],
                outputs=[SimpleNamespace(token_ids=[20], logprobs=logprobs) for _ in range(n)],
            )
            for prompt in prompts
        ]


class WakefulLLM(SleepingLLM):
    """Without sleep mode, it samples from the weights that it was last given."""

    def wake_up(self, tags):
        raise AssertionError("not asleep")


@pytest.fixture
def llm(monkeypatch):
    """In the place of vLLM, which gives no CPU a sleep mode."""
    made = []
    monkeypatch.setattr(SleepingLLM, "made", made, raising=False)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", SleepingLLM, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", lambda **k: SimpleNamespace(**k), raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # TRL sets them for vLLM
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    return made


def student(trainer):
    """The student's weights by the names that vLLM knows, an adapter of its own merged into them."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    own = hasattr(model, "merge_adapter")
    if own:
        model.merge_adapter()
    names = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value.detach().clone()
        for name, value in model.named_parameters()
        if "lora_" not in name
    }
    if own:
        model.unmerge_adapter()
    return names


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("teacher", ["shared", "ema", "lora"])
def test_whatever_samples_finds_the_student_s_weights_and_vllm_sleeps_in_between(tmp_path, llm, teacher, peft):
    tokenizer, expected = tiny.tokenizer(), []

    def critic(prompts, generate, **kwargs):
        expected.append(student(trainer))
        generate([[{"role": "user", "content": "Why?"}]] * len(prompts))
        return [Feedback(critique="Count again.")] * len(prompts)

    trainer = tiny.trainer(
        tmp_path,
        tok=tokenizer,
        feedback_fn=critic,
        teacher=teacher,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if peft else None,
        e_step_frequency=1,
        learning_rate=1e-2,
        max_steps=2,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_enable_sleep_mode=True,
        vllm_max_model_length=100,
        eval_strategy="steps",
        eval_steps=2,
        evaluation=Evaluation(tiny.dataset(2), tiny.parity_reward, k=2),
    )
    (engine,) = llm
    assert engine.options["enable_sleep_mode"] is True
    assert not engine.awake
    sample = trainer._generate_single_turn

    def noted(*args, **kwargs):
        expected.append(student(trainer))
        found = sample(*args, **kwargs)
        assert not engine.awake
        return found

    trainer._generate_single_turn = noted
    trainer.train()
    assert len(engine.calls) == 5, "two batches of rollouts, two of critiques, one evaluation"
    expected.append(student(trainer))
    for call in engine.calls:
        assert any(
            call.keys() == weights.keys() and all(torch.allclose(call[n], weights[n], atol=1e-6) for n in call)
            for weights in expected
        )
    first, last = engine.calls[0], engine.calls[-1]
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert not engine.awake


@pytest.mark.parametrize(
    ("changes", "scores"),
    [({}, False), ({"method": "sdpo"}, False), ({"method": "joint_loss"}, True), ({"method": "grpo"}, True)],
    ids=str,
)
def test_trl_scores_rollouts_only_for_a_loss_that_reads_it(tmp_path, llm, changes, scores):
    trainer = tiny.trainer(
        tmp_path, use_vllm=True, vllm_mode="colocate", vllm_max_model_length=100, max_steps=1, **changes
    )
    generate, calls = trainer._generate_and_score_completions, []
    score = trainer._get_per_token_logps_and_entropies

    def generating(inputs):
        trainer._get_per_token_logps_and_entropies = lambda *a, **k: (calls.append(True), score(*a, **k))[1]
        found = generate(inputs)
        trainer._get_per_token_logps_and_entropies = score
        return found

    trainer._generate_and_score_completions = generating
    trainer.train()
    assert bool(calls) is scores


def test_after_the_best_checkpoint_was_loaded_vllm_samples_from_its_weights(tmp_path, llm, monkeypatch):
    monkeypatch.setattr(vllm_generation, "LLM", WakefulLLM)
    trainer = tiny.trainer(
        tmp_path,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=100,
        learning_rate=1e-2,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        evaluation=Evaluation(
            tiny.dataset(2),
            lambda completions, trainer_state, **k: [1.0 - trainer_state.global_step] * len(completions),
            k=1,
        ),
        metric_for_best_model="avg@1",
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.best_global_step == 1
    trainer.evaluate()
    best, (engine,) = student(trainer), llm
    assert all(torch.equal(engine.calls[-1][name], value) for name, value in best.items())
    assert not all(torch.equal(engine.calls[-2][name], value) for name, value in best.items())
