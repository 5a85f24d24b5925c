"""The E-step and the M-step compute what their equations say, whatever the padding and the micro-batches."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from vpd_trl import m_step
from vpd_trl.batch import loss_mask, rows_of
from vpd_trl.e_step import RewardShift
from vpd_trl.prior import FixedPrior
from vpd_trl.teacher import EMATeacher, WeightSnapshot


def ready(tmp_path, *, rows=16, feedback=None, **changes):
    """A trainer that has collected one rollout batch of `rows` completions and trained on nothing yet."""

    def uneven(completion_ids, **kwargs):
        return ["x" * (3 + 7 * (sum(ids) % 5)) for ids in completion_ids]

    changes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, "learning_rate": 0.0} | changes
    trainer = tiny.trainer(
        tmp_path, feedback_fn=feedback or uneven, max_steps=1, e_step_frequency=1, weight_decay=0.0, **changes
    )
    trainer.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def batch_of(trainer):
    chunks = trainer._buffered_inputs
    return {k: torch.cat([c[k] for c in chunks]) if v.ndim else v for k, v in chunks[0].items()}


def gradients(trainer):
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return grads


def close(a, b, atol=1e-6):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=atol, rtol=1e-4) for k in a)


def unpadded(batch, i):
    """Row i without a padding token, with everything else as in the batch."""
    row = rows_of(batch, slice(i, i + 1))
    prompt, teacher = row["prompt_mask"].bool()[0], row["teacher_prompt_mask"].bool()[0]
    completion = row["completion_mask"].bool()[0]
    return row | {
        "prompt_ids": row["prompt_ids"][:, prompt],
        "prompt_mask": row["prompt_mask"][:, prompt],
        "teacher_prompt_ids": row["teacher_prompt_ids"][:, teacher],
        "teacher_prompt_mask": row["teacher_prompt_mask"][:, teacher],
        "completion_ids": row["completion_ids"][:, completion],
        "completion_mask": row["completion_mask"][:, completion],
    }


@pytest.mark.parametrize("changes", [{}, {"distillation_top_k": 7}, {"divergence": "reverse_kl"}], ids=str)
def test_a_padded_m_step_equals_a_loop_over_unpadded_rows(tmp_path, changes):
    trainer = ready(tmp_path, **changes)
    batch = batch_of(trainer)
    assert len(set(batch["teacher_prompt_mask"].sum(-1).tolist())) > 1, "the rows must have unequal prompts"
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    batched = gradients(trainer)
    total = 0.0
    for i in range(16):
        row_loss = trainer._compute_loss(trainer.model, unpadded(batch, i))
        row_loss.backward()
        total += row_loss.item()
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert close(batched, gradients(trainer))


@pytest.mark.parametrize("k", [None, 105])
def test_the_m_step_is_the_divergence_of_full_logits_to_the_sharpened_teacher(tmp_path, k):
    trainer = ready(
        tmp_path, temperature=0.5, divergence="jsd", jsd_weight=0.3, teacher_temperature=0.8, distillation_top_k=k
    )
    assert k is None or k >= trainer.model.config.vocab_size
    batch = batch_of(trainer)
    total = 0.0
    for i in range(16):
        row = unpadded(batch, i)
        n = row["completion_ids"].size(1)

        def logps(name, row=row, n=n):
            ids = torch.cat([row[f"{name}_ids"], row["completion_ids"]], 1)
            return (trainer.model(ids).logits[0, -n - 1 : -1].double() / 0.5).log_softmax(-1)

        student, teacher = logps("prompt"), (logps("teacher_prompt") / 0.8).log_softmax(-1)
        m = (0.7 * student.exp() + 0.3 * teacher.exp()).log()
        total += 0.7 * (student.exp() * (student - m)).sum() + 0.3 * (teacher.exp() * (teacher - m)).sum()
    expected = total / batch["completion_mask"].sum()
    assert trainer._compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), rel=1e-4)


def test_log_ratios_are_of_sure_tokens_and_ends_of_successes(tmp_path, monkeypatch):
    sure = -4.5  # a new model is sure of nothing
    monkeypatch.setattr(m_step, "CONFIDENT", sure)
    trainer = ready(tmp_path, temperature=0.5, teacher_temperature=0.8)
    batch, eos = batch_of(trainer), trainer.processing_class.eos_token_id
    batch["outcome"] = torch.arange(16) % 2
    for i in range(0, 16, 3):
        batch["completion_ids"][i, batch["completion_mask"][i].sum() - 1] = eos
    expected = {"confident": [], "end": []}
    for i in range(1, 16, 2):
        row = unpadded(batch, i)
        ids, n = row["completion_ids"][0], row["completion_ids"].size(1)
        with torch.no_grad():
            full = [
                trainer.model(torch.cat([row[f"{name}_ids"], row["completion_ids"]], 1)).logits[0, -n - 1 : -1] / 0.5
                for name in ("prompt", "teacher_prompt")
            ]
        student, teacher = (x.log_softmax(-1).gather(-1, ids[:, None])[:, 0] for x in full)
        ratio = (torch.logit(teacher.exp()) / 0.8).sigmoid().log() - student
        expected["confident"] += ratio[student > sure].tolist()
        expected["end"] += ratio[ids == eos].tolist()
    trainer._compute_loss(trainer.model, batch)
    means = trainer.m_step._means.reduce(trainer.accelerator)
    total = batch["completion_mask"][1::2].sum()
    for name, values in expected.items():
        assert 0 < len(values) < total
        assert means[f"teacher/log_ratio_{name}"] == (
            pytest.approx(sum(values) / len(values), abs=1e-4),
            len(values),
        )


def test_the_m_step_sends_no_gradient_to_the_teacher(tmp_path):
    trainer = ready(tmp_path, divergence="forward_kl")
    batch = batch_of(trainer)
    trainer._compute_loss(trainer.model, batch).backward()
    shared = gradients(trainer)
    frozen = copy.deepcopy(tiny.weights(trainer))
    trainer.teacher = EMATeacher(trainer, 0.5)  # the same weights, but a copy that can get no gradient
    trainer._compute_loss(trainer.model, batch).backward()
    assert close(shared, gradients(trainer), atol=1e-8)
    assert tiny.same(frozen, tiny.weights(trainer))


def some(completion_ids, **kwargs):
    return ["text" if i % 4 == 0 else None for i in range(len(completion_ids))]


@pytest.mark.parametrize("normalization", ["all", "with_feedback"])
def test_what_a_row_without_feedback_contains_changes_nothing(tmp_path, normalization):
    trainer = ready(tmp_path, feedback=some, m_step_normalization=normalization)
    batch = batch_of(trainer)
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    before = gradients(trainer)
    changed = {k: v.clone() for k, v in batch.items()}
    without = ~batch["has_feedback"]
    assert without.sum() == 12
    for name in ("completion_ids", "teacher_prompt_ids", "prompt_ids"):
        changed[name][without] = 7
    changed_loss = trainer._compute_loss(trainer.model, changed)
    changed_loss.backward()
    assert torch.equal(loss, changed_loss)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), gradients(trainer).values(), strict=True))

    tokens = batch["completion_mask"].sum(-1)
    counted = tokens if normalization == "all" else tokens[batch["has_feedback"]]
    found = trainer.scorer.distill(trainer.model, batch, loss_mask(batch).bool() & batch["has_feedback"].unsqueeze(-1))
    assert loss.item() == pytest.approx((found.divergence.sum() / counted.sum()).item(), rel=1e-5)


def test_a_micro_batch_without_feedback_has_zero_gradients_for_every_weight(tmp_path):
    trainer = ready(tmp_path, feedback=lambda prompts, **kwargs: [None] * len(prompts))
    loss = trainer._compute_loss(trainer.model, batch_of(trainer))
    loss.backward()
    grads = gradients(trainer)
    assert loss.item() == 0.0
    assert grads.keys() == dict(trainer.model.named_parameters()).keys(), "other processes wait for all of them"
    assert not any(g.any() for g in grads.values())


def test_lengths_in_different_micro_batches_weigh_as_in_one(tmp_path):
    trainer = ready(tmp_path, rows=2, num_generations=2, max_completion_length=31)
    batch = batch_of(trainer)
    mask = torch.ones_like(batch["completion_mask"])
    mask[0, 1:] = 0
    batch |= {"completion_mask": mask, "m_step_denominator": mask.sum()}
    one = trainer._compute_loss(trainer.model, batch)
    one.backward()
    together = gradients(trainer)
    trainer.args.steps_per_generation = 2
    trainer.current_gradient_accumulation_steps = 2
    losses = []
    for i in range(2):
        loss = trainer._compute_loss(trainer.model, rows_of(batch, slice(i, i + 1)))
        loss.backward()
        losses.append(loss.item())
    assert one.item() == pytest.approx(sum(losses), rel=1e-5)
    assert close(together, gradients(trainer))


def e_step_gradients(trainer, batch, sizes):
    """The gradients of one E-step update on the batch in micro-batches of `sizes`."""
    batches, start = [], 0
    for size in sizes:
        batches.append(rows_of(batch, slice(start, start + size)))
        start += size
    caught = {}
    zero_grad = trainer.model_wrapped.zero_grad

    def catch():
        caught.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
        zero_grad()

    trainer.model_wrapped.zero_grad = catch
    trainer.e_step.shift.value = None
    try:
        ran = trainer.e_step.run(batches)
    finally:
        trainer.model_wrapped.zero_grad = zero_grad
    return ran, caught


def test_e_step_gradients_are_those_of_the_whole_batch_whatever_the_micro_batches(tmp_path):
    trainer = ready(tmp_path, max_grad_norm=0.0)
    batch = batch_of(trainer)
    assert 0 < (batch["outcome"] == 1).sum() < 16
    results = [e_step_gradients(trainer, batch, sizes)[1] for sizes in ([16], [4] * 4, [1] * 16, [5, 11])]
    assert results[0]
    assert all(close(results[0], other, atol=1e-5) for other in results[1:])


def test_the_e_step_is_bco_on_unpadded_rows(tmp_path):
    trainer = ready(tmp_path, max_grad_norm=0.0)
    batch = batch_of(trainer)
    _, caught = e_step_gradients(trainer, batch, [16])

    beta, rows = 0.1, [unpadded(batch, i) for i in range(16)]

    def logp(row, name):
        n = row["completion_ids"].size(1)
        logits = trainer.model(torch.cat([row[f"{name}_ids"], row["completion_ids"]], 1)).logits[0, -n - 1 : -1]
        return logits.log_softmax(-1).gather(-1, row["completion_ids"][0].unsqueeze(-1)).sum()

    rho = torch.stack([beta * (logp(row, "teacher_prompt") - logp(row, "prompt").detach()) for row in rows])
    good = batch["outcome"] == 1
    shift = (rho[good].mean() + rho[~good].mean()).detach() / 2
    loss = -torch.sigmoid(rho[good] - shift).log().mean() - torch.sigmoid(shift - rho[~good]).log().mean()
    loss.backward()
    assert close(caught, gradients(trainer), atol=1e-5)
    logged = trainer._metrics["train"]["e_step/loss"][-1]
    assert logged == pytest.approx(loss.item(), rel=1e-4)
    assert trainer.e_step.shift.value == pytest.approx(shift.item(), abs=1e-5)


@pytest.mark.parametrize(("successes", "runs"), [(0, False), (16, False), (1, True), (15, True)])
def test_an_e_step_needs_both_classes_and_stays_finite(tmp_path, successes, runs):
    trainer = ready(tmp_path, learning_rate=1e-3)
    batch = batch_of(trainer)
    batch["outcome"] = torch.tensor([1] * successes + [0] * (16 - successes))
    trainer.optimizer.param_groups[0]["lr"] = 1e-3
    before = tiny.weights(trainer)
    ran, _ = e_step_gradients(trainer, batch, [4] * 4)
    assert ran is runs
    assert trainer.e_step.last_counts == (successes, 16 - successes)
    assert tiny.same(before, tiny.weights(trainer)) is not runs
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert trainer._metrics["train"]["e_step/skipped"][-1] == (0.0 if runs else 1.0)


def test_an_e_step_asks_for_as_many_of_each_class_as_configured(tmp_path):
    trainer = ready(tmp_path, e_step_min_per_class=3)
    batch = batch_of(trainer)
    batch["outcome"] = torch.tensor([1] * 2 + [0] * 14)
    assert not trainer.e_step.run([batch])
    batch["outcome"] = torch.tensor([1] * 3 + [0] * 13)
    assert trainer.e_step.run([batch])


def test_rows_that_count_for_nothing_do_not_change_an_e_step(tmp_path):
    trainer = ready(tmp_path, max_grad_norm=0.0)
    batch = batch_of(trainer)
    batch["outcome"] = torch.tensor([1, 0] * 8)
    batch["has_feedback"] = torch.arange(16) < 12
    batch["outcome"][10:12] = -1
    _, all_rows = e_step_gradients(trainer, batch, [4] * 4)
    _, counted = e_step_gradients(trainer, rows_of(batch, slice(0, 10)), [10])
    assert close(all_rows, counted, atol=1e-5)


def test_an_e_step_raises_the_reward_margin(tmp_path):
    trainer = ready(tmp_path, learning_rate=1e-3)
    batch = batch_of(trainer)
    trainer.args.e_step_epochs = 8
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e-3
    trainer.e_step.run([batch])
    margins = trainer._metrics["train"]["e_step/reward_margin"][-8:]
    assert margins[-1] > margins[0] + 0.01


def test_the_e_steps_learning_rate_follows_the_schedule_and_comes_back(tmp_path):
    trainer = tiny.trainer(tmp_path, e_step_learning_rate=5e-3, learning_rate=1e-3, e_step_frequency=1, max_steps=4)
    seen = []
    run, step = trainer.e_step.run, None

    def spy(batches, **kwargs):
        optimizer = trainer.optimizer
        plain = [g["lr"] for g in optimizer.param_groups]
        nonlocal step
        step = optimizer.step
        optimizer.step = lambda *a: (seen.append((plain[0], optimizer.param_groups[0]["lr"])), step(*a))[1]
        try:
            return run(batches, **kwargs)
        finally:
            optimizer.step = step
            assert [g["lr"] for g in optimizer.param_groups] == plain

    trainer.e_step.run = spy
    trainer.train()
    assert len(seen) == 4
    assert all(inside == pytest.approx(5 * outside) for outside, inside in seen)
    assert seen[0][1] > seen[-1][1], "linear decay"


def test_the_reward_shift_is_a_moving_average_that_starts_at_the_first_batch():
    shift = RewardShift(0.9)
    assert shift.update(1.0, 3.0) == 2.0
    assert shift.update(10.0, 14.0) == pytest.approx(0.9 * 2.0 + 0.1 * 12.0)


def test_a_snapshot_has_weights_of_its_own_and_runs_on_them(model):
    ids = torch.arange(4, 12).unsqueeze(0)
    snapshot = WeightSnapshot(model)
    at_first = model(ids).logits
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    now = model(ids).logits
    with snapshot.swapped_in():
        assert torch.equal(model(ids).logits, at_first)
    assert torch.equal(model(ids).logits, now)
    assert not torch.allclose(now, at_first)


def test_the_teachers_head_is_the_averages_too(tmp_path):
    trainer = ready(tmp_path, teacher="ema")
    batch = batch_of(trainer)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.mul_(3.0)
    mask = loss_mask(batch).bool()
    moved = trainer.scorer.distill(trainer.model, batch, mask).divergence
    trainer.teacher.average.move_towards(1.0)
    followed = trainer.scorer.distill(trainer.model, batch, mask).divergence
    assert moved.mean() > 2 * followed.mean()


def test_an_average_of_rate_one_tenth_keeps_nine_tenths(model):
    teacher = EMATeacher(SimpleNamespace(model=model, engine=None), 0.1)
    old = {k: v.clone() for k, v in teacher.average.weights.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    teacher.after_rollout_batch()
    for name, p in model.named_parameters():
        assert torch.allclose(teacher.average.weights[name], 0.9 * old[name] + 0.1 * p, atol=1e-6)


def test_an_average_of_half_precision_weights_moves_by_less_than_their_rounding(model):
    model = model.to(torch.bfloat16)
    teacher = EMATeacher(SimpleNamespace(model=model, engine=None), 0.05)
    name, p = next(iter(model.named_parameters()))
    before = teacher.average.weights[name].clone()
    with torch.no_grad():
        p.mul_(1 + 2**-7)  # one step of bfloat16
    teacher.after_rollout_batch()
    assert not torch.equal(before, teacher.average.weights[name])


def test_a_copy_that_was_taken_before_the_model_was_moved_follows_it(model):
    snapshot = WeightSnapshot(model, float32=True)
    name = next(iter(snapshot.weights))
    # As DeepSpeed moves models once the trainer is there
    snapshot._parameters[name] = torch.nn.Parameter(snapshot.weights[name].to("meta"))
    snapshot.take()
    assert {n for n, weight in snapshot.weights.items() if weight.device.type == "meta"} == {name}


@pytest.mark.parametrize("method", ["vpd", "sdpo"])
def test_a_fixed_prior_is_kept_only_where_an_e_step_reads_it(tmp_path, method):
    prior = tiny.trainer(tmp_path, method=method, prior="fixed").prior
    assert isinstance(prior, FixedPrior) == (method == "vpd")


def test_a_fixed_prior_is_the_adapter_that_was_passed_not_the_base_model(tmp_path, tokenizer, model):
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.5)
    trainer = ready(tmp_path, tok=tokenizer, mdl=student, prior="fixed")
    batch = batch_of(trainer)
    (prior,) = trainer.prior.logps([batch], fresh=True)
    assert torch.equal(prior, trainer.scorer.frozen_logps(batch))
    with student.disable_adapter():
        assert not torch.allclose(prior, trainer.scorer.frozen_logps(batch), atol=1e-3)


def test_student_and_teacher_are_on_one_scale_at_any_temperature(tmp_path, tokenizer):
    trainer = ready(tmp_path, tok=tokenizer, temperature=0.5, teacher_temperature=1.0)
    batch = batch_of(trainer)
    batch |= {"teacher_prompt_ids": batch["prompt_ids"], "teacher_prompt_mask": batch["prompt_mask"]}
    ratio = trainer.scorer.frozen_logps(batch, teacher=True) - trainer.scorer.frozen_logps(batch)
    assert not ratio.any()
    assert trainer._compute_loss(trainer.model, batch).item() == pytest.approx(0.0, abs=1e-6)


def test_the_first_e_steps_loss_is_near_ln_4(tmp_path):
    trainer = ready(tmp_path)
    assert trainer.state.log_history[0]["e_step/loss"] == pytest.approx(math.log(4), abs=0.1)


def test_an_e_step_holds_no_more_tokens_at_a_time_than_an_m_step(tmp_path):
    trainer = tiny.trainer(
        tmp_path,
        feedback_fn=lambda prompts, **kwargs: ["long feedback " * 8] * len(prompts),
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        e_step_frequency=1,
        max_completion_length=40,
        max_steps=2,
    )
    held = {"e": [], "m": []}  # tokens that go through the network between two backward passes
    phase = ["m"]
    forward, run = trainer.model.model.forward, trainer.e_step.run
    loss, backward = trainer.m_step.loss, trainer.teacher.backward

    def spy(*args, input_ids=None, **kwargs):
        if torch.is_grad_enabled():
            held[phase[0]][-1] += input_ids.numel()
        return forward(*args, input_ids=input_ids, **kwargs)

    def run_in_phase(batches, **kwargs):
        phase[0] = "e"
        held["e"].append(0)
        try:
            return run(batches, **kwargs)
        finally:
            phase[0] = "m"

    trainer.model.model.forward, trainer.e_step.run = spy, run_in_phase
    trainer.m_step.loss = lambda *args: (held["m"].append(0), loss(*args))[1]
    trainer.teacher.backward = lambda loss: (held["e"].append(0), backward(loss))[1]
    trainer.train()
    assert len(held["e"]) > 2
    assert max(held["e"]) <= max(held["m"])
