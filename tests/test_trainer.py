"""The trainer does what GRPOTrainer does where it should, and takes what GRPOTrainer takes."""

import asyncio
import logging
import math
import warnings

import pandas as pd
import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig
from transformers import Qwen3Config
from trl import GRPOConfig, GRPOTrainer

from tests import tiny
from vpd_trl.watch import Watch


def metrics(trainer, name):
    return [row[name] for row in trainer.state.log_history if row.get(name) is not None]


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2, "steps_per_generation": 4, "beta": 0.0}])
def test_grpo_is_trl_to_the_bit(tmp_path, tokenizer, changes):
    ours = tiny.trainer(tmp_path / "a", tok=tokenizer, method="grpo", feedback_fn=None, max_steps=5, **changes)
    ours.train()
    values = vars(tiny.config(tmp_path / "b", max_steps=5, **changes))
    names = (*tiny.SET_BY_TESTS, *changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        args = GRPOConfig(**{name: values[name] for name in names}, max_steps=5)
    theirs = GRPOTrainer(
        model=tiny.model(tokenizer),
        reward_funcs=tiny.parity_reward,
        args=args,
        train_dataset=tiny.dataset(),
        processing_class=tokenizer,
    )
    theirs.train()
    assert metrics(ours, "loss") == metrics(theirs, "loss")
    assert metrics(ours, "grad_norm") == metrics(theirs, "grad_norm")
    assert tiny.same(tiny.weights(ours), tiny.weights(theirs))
    assert not tiny.same(tiny.weights(ours), tiny.weights(tiny.model(tokenizer))), "nothing was trained"


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "sdpo"},
        {"teacher": "ema"},
        {"prior": "fixed"},
        {"divergence": "reverse_kl"},
        {"divergence": "forward_kl", "distillation_top_k": 5},
        {"distillation_top_k": 5, "distillation_add_tail": False},
        {"num_iterations": 2, "steps_per_generation": 2},
        {"steps_per_generation": 1},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {"e_step_epochs": 2, "e_step_batch_size": 4, "e_step_learning_rate": 1e-4},
        {"m_step_importance_clip": 2.0, "log_ratio_reduction": "mean"},
        {"m_step_normalization": "with_feedback"},
        {"cast_lm_head_to_fp32": True},
        {"gradient_checkpointing": True},
        {"max_grad_norm": 0.0},
        {"temperature": 0.5},
        {"bf16": True},
        {"bf16": True, "cast_lm_head_to_fp32": True, "distillation_top_k": 5},
    ],
    ids=str,
)
def test_every_option_trains_and_logs_finite_numbers(tmp_path, changes):
    trainer = tiny.trainer(tmp_path, max_steps=4, **changes)
    before = tiny.weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 4, "global_step counts the student's updates"
    assert not tiny.same(before, tiny.weights(trainer))
    for row in trainer.state.log_history:
        assert all(v == v for v in row.values() if isinstance(v, float)), row
    assert metrics(trainer, "m_step/divergence")
    if trainer.args.method == "vpd":
        assert metrics(trainer, "e_step/loss")
    else:
        assert not metrics(trainer, "e_step/loss")


def test_an_e_step_runs_on_every_fth_rollout_batch(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=7, e_step_frequency=3)
    runs = []
    run = trainer.e_step.run
    trainer.e_step.run = lambda batches, **k: (runs.append(trainer.rollout_batches - 1), run(batches, **k))[1]
    trainer.train()
    assert runs == [0, 3, 6]
    assert trainer.rollout_batches == 7


def test_rollouts_within_an_accumulation_window_get_their_e_step_before_the_next(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=2, e_step_frequency=1, steps_per_generation=1)
    grads_around = []
    run = trainer.e_step.run

    def spy(batches, **kwargs):
        grads_around.append(any(p.grad is not None and p.grad.any() for p in trainer.model.parameters()))
        return run(batches, **kwargs)

    trainer.e_step.run = spy
    trainer.train()
    assert len(grads_around) == 3, "batches 0 and 1, then 2; batch 3 ends with the training"
    assert not any(grads_around), "an E-step must not meet or spoil the student's accumulated gradients"


def test_every_row_carries_the_teacher_prompt_made_from_its_own_completion(tmp_path, tokenizer):
    def feedback(completion_ids, **kwargs):
        return ["ids " + " ".join(map(str, ids)) + "." for ids in completion_ids]

    trainer = tiny.trainer(
        tmp_path, tok=tokenizer, feedback_fn=feedback, num_iterations=2, steps_per_generation=2, max_steps=6
    )
    seen = []
    compute_loss = trainer._compute_loss

    def spy(model, inputs):
        for i in range(len(inputs["completion_ids"])):
            ids = inputs["completion_ids"][i][inputs["completion_mask"][i].bool()].tolist()
            text = tokenizer.decode(inputs["teacher_prompt_ids"][i][inputs["teacher_prompt_mask"][i].bool()])
            seen.append("ids " + " ".join(map(str, ids)) + "." in text)
        return compute_loss(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    assert len(seen) == 6 * 8
    assert all(seen)


@pytest.mark.parametrize("method", ["vpd", "sdpo"])
def test_conversations_with_parts_and_system_turns_train(tmp_path, method):
    data = tiny.dataset(8, conversational=True)
    forms = [
        lambda p: p,
        lambda p: [{"role": "system", "content": "Be brief."}, *p],
        lambda p: [{"role": "system", "content": "s"}, *p, {"role": "assistant", "content": "?"}, *p],
    ]
    for form in forms:
        rows = [{"prompt": form(r["prompt"]), "answer": r["answer"]} for r in data]
        trainer = tiny.trainer(tmp_path, method=method, data=data.from_list(rows), max_steps=1)
        trainer.train()
        assert trainer.state.global_step == 1
    parts = [
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "1+1="}]}], "answer": r["answer"]}
        for r in data
    ]
    trainer = tiny.trainer(tmp_path, method=method, data=data.from_list(parts), max_steps=1)
    trainer.train()
    assert metrics(trainer, "feedback/coverage") == [1.0]


def test_several_weighted_rewards_async_and_none_among_them(tmp_path):
    async def sometimes(completion_ids, **kwargs):
        await asyncio.sleep(0)
        return [None if sum(ids) % 3 == 0 else 1.0 for ids in completion_ids]

    def never(prompts, **kwargs):
        return [None] * len(prompts)

    got = []

    def feedback(rewards, successes, **kwargs):
        got.extend(zip(rewards, successes, strict=True))
        return ["text"] * len(rewards)

    trainer = tiny.trainer(
        tmp_path,
        reward_funcs=[tiny.parity_reward, sometimes, never],
        reward_weights=[0.5, 0.5, 1.0],
        feedback_fn=feedback,
        max_steps=3,
    )
    trainer.train()
    assert {r for r, _ in got} <= {0.0, 0.5, 1.0}
    assert all(success == (reward >= 1.0) for reward, success in got)
    assert all(v == v for row in trainer.state.log_history for v in row.values() if isinstance(v, float))


def test_a_rollout_that_nothing_scored_is_distilled_but_takes_no_part_in_the_e_step(tmp_path):
    trainer = tiny.trainer(
        tmp_path, reward_funcs=lambda prompts, **kwargs: [None] * len(prompts), max_steps=2, e_step_frequency=1
    )
    trainer.train()
    assert metrics(trainer, "e_step/positives") == metrics(trainer, "e_step/negatives") == [0.0, 0.0]
    assert metrics(trainer, "e_step/skipped") == [1.0, 1.0]
    assert all(n > 0 for n in metrics(trainer, "m_step/tokens"))


def test_an_iterable_dataset_trains(tmp_path):
    rows = list(tiny.dataset(16))
    trainer = tiny.trainer(tmp_path, data=IterableDataset.from_generator(lambda: iter(rows)), max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_stream_without_max_steps_is_refused(tmp_path):
    rows = list(tiny.dataset(16))
    with pytest.raises(ValueError, match="max_steps"):
        tiny.trainer(tmp_path, data=IterableDataset.from_generator(lambda: iter(rows)), max_steps=-1)


def test_vllm_gets_the_weights_of_an_e_step_within_the_same_step(tmp_path):
    trainer = tiny.trainer(tmp_path, e_step_frequency=1, steps_per_generation=1, max_steps=2)
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    synced = []

    def generate(prompt_ids, *args, **kwargs):
        if trainer.state.global_step != trainer._last_loaded_step:
            synced.append(tiny.weights(trainer))
            trainer._last_loaded_step = trainer.state.global_step
        assert tiny.same(synced[-1], tiny.weights(trainer)), "rollouts of weights that the student no longer has"
        return [[10 + i, 20] for i, _ in enumerate(prompt_ids)], None

    trainer._generate_single_turn = generate
    trainer.vllm_importance_sampling_correction = False
    trainer.train()
    assert len(synced) == 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lora_student_gets_gradients_in_both_steps(tmp_path, checkpointing):
    trainer = tiny.trainer(
        tmp_path,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        gradient_checkpointing=checkpointing,
        max_steps=2,
        e_step_frequency=1,
    )
    norms = []
    step = trainer.e_step._update
    trainer.e_step._update = lambda *a: (norms.append("e"), step(*a))[1]
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert norms
    assert all(n > 0 for n in metrics(trainer, "e_step/grad_norm"))
    assert all(n > 0 for n in metrics(trainer, "grad_norm"))
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in frozen.items())


def test_the_saved_lora_student_is_the_trained_one(tmp_path, tokenizer):
    from peft import AutoPeftModelForCausalLM

    base = tmp_path / "base"
    tiny.model(tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    trainer = tiny.trainer(
        tmp_path / "run", mdl=str(base), tok=tokenizer, peft_config=LoraConfig(r=2, target_modules="all-linear")
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = torch.arange(4, 20).unsqueeze(0)
    trainer.model.eval()
    assert torch.allclose(loaded(ids).logits, trainer.model(ids).logits, atol=1e-6)


def test_log_completions_has_a_feedback_column_of_equal_length(tmp_path):
    trainer = tiny.trainer(
        tmp_path,
        log_completions=True,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        eval_dataset=tiny.dataset(3),
        per_device_eval_batch_size=4,
        num_completions_to_print=0,
    )
    trainer.train()
    files = sorted((tmp_path / "completions").glob("*.parquet"))
    assert files
    tables = [pd.read_parquet(f) for f in files]
    for table in tables:
        assert {"prompt", "completion", "parity_reward", "advantage"} <= set(table.columns)
    # The log of an evaluation takes the place of the training step's, and evaluation asks for no feedback
    training = pd.read_parquet(tmp_path / "completions" / "completions_00003.parquet")
    assert training["feedback"].notna().all()
    assert training["feedback"].str.startswith("The answer is").all()


def test_evaluation_changes_nothing_and_is_prefixed(tmp_path):
    trainer = tiny.trainer(
        tmp_path,
        teacher="ema",
        prior="fixed",
        max_steps=2,
        eval_dataset=tiny.dataset(3),
        per_device_eval_batch_size=4,
        num_generations_eval=1,
    )
    trainer.train()
    modes = [m.training for m in trainer.model.modules()]

    def snapshot():
        return (
            tiny.weights(trainer),
            {k: v.clone() for k, v in trainer.teacher.average.weights.items()},
            {k: v.clone() for k, v in trainer.prior.initial.weights.items()},
            trainer.rollout_batches,
            trainer._step,
            trainer.e_step.shift.value,
        )

    before = snapshot()
    result = trainer.evaluate()
    trainer.evaluate()
    after = snapshot()
    assert all(tiny.same(a, b) for a, b in zip(before[:3], after[:3], strict=True))
    assert before[3:] == after[3:]
    assert "eval_reward" in result
    assert all(key.startswith(("eval_", "epoch")) for key in result)
    assert modes


def test_the_best_model_can_be_chosen_by_its_reward(tmp_path):
    trainer = tiny.trainer(
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        eval_dataset=tiny.dataset(4),
        per_device_eval_batch_size=4,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None


def test_a_dataset_that_runs_inside_a_notebooks_event_loop(tmp_path):
    async def feedback(prompts, **kwargs):
        await asyncio.sleep(0.01)
        return ["text"] * len(prompts)

    async def notebook():
        trainer = tiny.trainer(tmp_path, feedback_fn=feedback, max_steps=1)
        trainer.train()
        return trainer.state.global_step

    assert asyncio.run(notebook()) == 1


def test_several_end_tokens_end_a_completion_in_both_steps(tmp_path, tokenizer):
    model = tiny.model(tokenizer)
    other = tokenizer.convert_tokens_to_ids("a")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    trainer = tiny.trainer(tmp_path, tok=tokenizer, mdl=model, max_steps=2, max_completion_length=40)
    rollouts = []
    run = trainer.e_step.run
    trainer.e_step.run = lambda batches, **k: (rollouts.extend(batches), run(batches, **k))[1]
    trainer.train()
    assert rollouts
    for batch in rollouts:
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True):
            kept = ids[mask.bool()].tolist()
            assert not set(kept[:-1]) & {other, tokenizer.eos_token_id}


def test_dropout_leaves_every_modules_mode_as_it_was(tmp_path, tokenizer):
    model = tiny.model(tokenizer, attention_dropout=0.5)
    trainer = tiny.trainer(tmp_path, tok=tokenizer, mdl=model)
    trainer.train()
    trainer.model.train()
    trainer.model.model.layers[0].eval()
    modes = [m.training for m in trainer.model.modules()]
    batch = rollout_batch(trainer)
    logps = [trainer.scorer.frozen_logps(batch, teacher=True) for _ in range(2)]
    assert torch.equal(*logps), "a teacher that drops out at random gives random targets"
    assert [m.training for m in trainer.model.modules()] == modes
    with pytest.raises(RuntimeError, match="inside"), trainer.teacher.target_context(), _scoring(trainer):
        raise RuntimeError("inside")
    assert [m.training for m in trainer.model.modules()] == modes


def _scoring(trainer):
    from vpd_trl.network import scoring_mode

    return scoring_mode(trainer.model)


def rollout_batch(trainer):
    """The micro-batches of the last rollouts, as one."""
    chunks = trainer._buffered_inputs
    return {k: torch.cat([c[k] for c in chunks]) if v.ndim else v for k, v in chunks[0].items()}


def test_fully_masked_completions_train_nothing_and_log_no_nan(tmp_path):
    trainer = tiny.trainer(
        tmp_path, max_completion_length=1, mask_truncated_completions=True, max_steps=2, weight_decay=0.0
    )
    trainer.generation_config.suppress_tokens = trainer.eos_token_ids  # no completion ends in time
    before = tiny.weights(trainer)
    trainer.train()
    assert tiny.same(before, tiny.weights(trainer))
    assert metrics(trainer, "loss") == [0.0, 0.0]
    assert metrics(trainer, "e_step/skipped") == [1.0]
    for row in trainer.state.log_history:
        assert all(v == v for v in row.values() if isinstance(v, float)), row


def test_the_model_card_names_the_method(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.create_model_card(model_name="m")
    text = (tmp_path / "README.md").read_text()
    assert "VPD" in text
    assert "Variational Policy Distillation" in text


def test_a_log_with_little_feedback_says_how_much(tmp_path):
    def quarter(prompts, **kwargs):
        n = len(prompts)
        return [None] * (n // 2) + ["  "] * (n // 4) + ["text"] * (n - n // 2 - n // 4)

    trainer = tiny.trainer(tmp_path, feedback_fn=quarter, max_steps=2)
    trainer.train()
    assert metrics(trainer, "feedback/coverage") == [0.25, 0.25]


def test_a_run_without_feedback_warns_with_advice(tmp_path, caplog):
    trainer = tiny.trainer(tmp_path, feedback_fn=lambda prompts, **k: [None] * len(prompts), max_steps=3)
    before = tiny.weights(trainer)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert "No rollout had feedback in the last 3 batches" in caplog.text
    assert tiny.same(before, tiny.weights(trainer))


def test_e_steps_that_never_run_warn_with_advice(tmp_path, caplog):
    trainer = tiny.trainer(tmp_path, success_threshold=9.0, max_steps=3, e_step_frequency=1)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert "The last 3 E-steps were skipped" in caplog.text
    assert "0 successes and 8 failures" in caplog.text


@pytest.mark.parametrize(
    ("shares", "warnings_after"),
    [
        ([0.9] * 9, [5]),  # warned of once
        ([0.1, 0.3, 0.5, 0.7, 0.8, 0.9], []),  # more and more answers end
        ([0.1, 0.3, 0.7, 0.7, 0.7, 0.5], [6]),  # then fewer
    ],
)
def test_answers_that_lose_their_end_are_warned_of(caplog, shares, warnings_after):
    watch, warned = Watch(logging.getLogger("vpd_trl.trainer")), []
    with caplog.at_level("WARNING"):
        for step, share in enumerate(shares, start=1):
            before = len(caplog.records)
            watch.ends(-0.02, share)
            warned += [step] * (len(caplog.records) - before)
    assert warned == warnings_after


def test_a_target_that_ends_as_readily_as_the_student_starts_the_count_anew(caplog):
    watch = Watch(logging.getLogger("vpd_trl.trainer"))
    with caplog.at_level("WARNING"):
        for value in (*[-0.02] * 4, 0.0, *[-0.02] * 4):
            watch.ends(value, 0.9)
        assert not caplog.records
        watch.ends(-0.02, 0.9)
        assert "teacher/log_ratio_end, now -0.020 nats), and 90% of the rollouts end" in caplog.text
        for value in (0.0, *[-0.02] * 5):
            watch.ends(value, 0.9)
    assert len(caplog.records) == 2


def test_the_trainer_watches_the_ends_of_successes(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Watch, "ends", lambda self, *values: seen.append(values))
    trainer = tiny.trainer(tmp_path, success_threshold=-1.0, max_steps=2, max_completion_length=64)
    trainer.train()
    logged = [x for x in metrics(trainer, "teacher/log_ratio_end") if not math.isnan(x)]
    assert seen
    assert [log_ratio for log_ratio, _ in seen] == pytest.approx(logged)
    clipped = metrics(trainer, "completions/clipped_ratio")
    assert [ended for _, ended in seen] == pytest.approx([1 - share for share in clipped])


@pytest.mark.parametrize("changes", [{"final_logit_softcapping": 5.0}, {"logit_scale": 0.3}, {"logits_scaling": 4.0}])
def test_our_log_probabilities_are_trls_whatever_the_architecture_does_to_logits(tmp_path, tokenizer, changes):
    model = tiny.model(tokenizer)
    assert isinstance(model.config, Qwen3Config)
    for name, value in changes.items():
        setattr(model.config, name, value)
    trainer = tiny.trainer(tmp_path, tok=tokenizer, mdl=model, temperature=0.7, max_steps=1)
    trainer.train()
    batch = rollout_batch(trainer)
    ours = trainer.scorer.frozen_logps(batch)
    with torch.no_grad():
        theirs, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer,
            trainer.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
            batch["completion_ids"].size(1),
        )
    assert torch.allclose(ours, theirs * batch["completion_mask"], atol=1e-5)


def test_an_engine_that_leaves_the_model_in_training_does_not_make_training_of_an_evaluation(tmp_path):
    """Continuous batching does."""
    trainer = tiny.trainer(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1, eval_dataset=tiny.dataset(8))
    single, modes = trainer._generate_single_turn, []

    def sample(*args, **kwargs):
        modes.append(trainer.model.training)
        found = single(*args, **kwargs)
        trainer.model.train()
        return found

    trainer._generate_single_turn = sample
    trainer.train()
    assert modes[0]
    assert modes[1:]
    assert not any(modes[1:])
    assert any("eval_reward" in entry for entry in trainer.state.log_history)
