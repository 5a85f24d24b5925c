"""Tokens that don't count go through no network, and leaving them out changes nothing."""

import pytest
import torch
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel, GPTBigCodeConfig, GPTBigCodeForCausalLM

from tests import tiny
from tests.mixed_lengths import build, counted
from vpd_trl import scoring
from vpd_trl.batch import concatenated, loss_mask, rows_of
from vpd_trl.lengths import by_length, compact, of_like_length, row_lengths, within_budget
from vpd_trl.network import causal_lm, has_dropout


def padded(lengths, prompt=7, completion=9, *, holes=False):
    """Rows as TRL pads them, with (prompt, completion) lengths; `holes` makes every third own token a tool's."""
    generator = torch.Generator().manual_seed(0)
    n = len(lengths)
    batch = {
        "prompt_ids": torch.zeros(n, prompt, dtype=torch.long),
        "prompt_mask": torch.zeros(n, prompt, dtype=torch.long),
        "completion_ids": torch.zeros(n, completion, dtype=torch.long),
        "completion_mask": torch.zeros(n, completion, dtype=torch.long),
    }
    for i, (p, t) in enumerate(lengths):
        batch["prompt_ids"][i, prompt - p :] = torch.randint(4, 90, (p,), generator=generator)
        batch["prompt_mask"][i, prompt - p :] = 1
        batch["completion_ids"][i, :t] = torch.randint(4, 90, (t,), generator=generator)
        batch["completion_mask"][i, :t] = 1
    if holes:
        batch["tool_mask"] = batch["completion_mask"].clone()
        batch["tool_mask"][:, 1::3] = 0
    return batch


LENGTHS = [(7, 2), (3, 9), (1, 1), (5, 5), (2, 0)]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("holes", [False, True])
def test_what_a_network_says_of_the_targets_is_as_without_compacting(tokenizer, holes, whole):
    model = tiny.model(tokenizer).eval()
    batch = padded(LENGTHS, holes=holes)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    targets = torch.cat([torch.zeros_like(batch["prompt_mask"]), loss_mask(batch)], dim=1).bool()
    columns, mask, predicts = compact(attention, targets, whole=whole)
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=attention).logits[:, :-1][targets[:, 1:]]
        short = model(input_ids=ids.gather(1, columns), attention_mask=mask).logits[predicts]
    torch.testing.assert_close(short, plain, atol=1e-5, rtol=1e-4)
    last = [max((i + 1 for i in range(9) if loss_mask(batch)[row, i]), default=0) for row in range(len(LENGTHS))]
    needed = [p + t - 1 if t else 1 for (p, _), t in zip(LENGTHS, last, strict=True)]
    if whole:
        needed = [p + t for p, t in LENGTHS]
    assert columns.size(1) == max(needed)
    assert mask.sum(1).tolist() == needed


def test_rows_without_any_target_cost_one_token_or_stay_whole(tokenizer):
    batch = padded([(7, 0), (3, 0)])
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    targets = torch.zeros_like(attention, dtype=torch.bool)
    columns, mask, predicts = compact(attention, targets)
    assert columns.shape == (2, 1)
    assert mask.tolist() == [[1], [1]]
    assert not predicts.any()
    columns, mask, predicts = compact(attention, targets, whole=True)
    assert mask.sum(1).tolist() == [7, 3]
    assert not predicts.any()


def test_groups_stay_within_their_budget_and_a_long_row_goes_alone():
    assert within_budget([9, 5, 5, 4, 1, 1], 10, 4) == [1, 2, 2, 1]
    assert within_budget([4, 1, 1, 1, 1, 1], 10, 3) == [2, 3, 1]
    assert within_budget([30, 2], 10, 4) == [1, 1]
    assert within_budget([], 10, 4) == []
    assert within_budget([0, 0], 10, 4) == [2]


def test_padding_does_not_move_the_positions_of_a_model_that_learns_them(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2, eos_token_id=1)
    model = GPT2LMHeadModel(config)
    model.transformer.wpe.weight.data.normal_()
    trainer = build(tmp_path, mdl=model, max_completion_length=9, max_steps=1)
    batch = padded(LENGTHS)
    together = trainer.scorer.frozen_logps(batch)
    for i, (prompt, completion) in enumerate(LENGTHS):
        if completion:
            ids = torch.cat([batch["prompt_ids"][i, 7 - prompt :], batch["completion_ids"][i, :completion]])
            alone = model.eval()(ids[None]).logits[0].log_softmax(-1)[prompt - 1 : -1]
            alone = alone.gather(1, ids[prompt:, None])[:, 0]
            torch.testing.assert_close(together[i, :completion], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["joint_loss", "advantage_reshaping"])
def test_log_probabilities_of_trl_are_not_taken_where_padding_moved_its_positions(tmp_path, tokenizer, method):
    """TRL passes no positions, so that a model that learns them has others where a row is padded."""
    torch.manual_seed(0)
    sizes = {"n_positions": 128, "n_embd": 16, "n_layer": 2, "n_head": 2}
    sizes |= {"vocab_size": len(tokenizer), "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPTBigCodeConfig(**sizes, eos_token_id=1)
    model = GPTBigCodeForCausalLM(config)
    model.transformer.wpe.weight.data.normal_()
    assert not has_dropout(model)
    changes = {"method": method, "m_step_importance_clip": 2.0, "num_iterations": 2, "max_steps": 1}
    data = tiny.dataset(8).map(lambda row, i: {"prompt": row["prompt"] * (1 + i % 3)}, with_indices=True)
    trainer = build(tmp_path, mdl=model, data=data, learning_rate=0.0, **changes)
    trainer.train()
    batch = trainer._buffered_inputs[0]
    mask = loss_mask(batch).bool() & batch["has_feedback"].unsqueeze(-1)
    assert not torch.allclose(batch["old_per_token_logps"][mask], trainer.scorer.frozen_logps(batch)[mask], atol=0.1)
    torch.testing.assert_close(trainer.scorer.sampling_logps(batch)[mask], trainer.scorer.frozen_logps(batch)[mask])


def test_gpt_2_without_dropout_has_none():
    sizes = {"n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    assert not has_dropout(
        GPT2LMHeadModel(GPT2Config(vocab_size=9, **sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    )
    assert has_dropout(GPT2LMHeadModel(GPT2Config(vocab_size=9, **sizes)))


def partitions(rows):
    """All ways to put a list into groups that follow each other."""
    if not rows:
        return [[]]
    return [[rows[:n], *rest] for n in range(1, len(rows) + 1) for rest in partitions(rows[n:])]


@pytest.mark.parametrize("cost", [0, 1, 7, 1000])
@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], [1, 9, 2, 8, 3, 7], [40, 1, 1, 0, 39, 20, 21, 1], []])
def test_groups_of_like_length_cost_the_least_that_groups_can(lengths, cost):
    groups = of_like_length(lengths, cost)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(group == sorted(group) for group in groups)
    assert [max(lengths[i] for i in group) for group in groups] == sorted(
        (max(lengths[i] for i in group) for group in groups), reverse=True
    )

    def total(groups):
        return sum(max(lengths[i] for i in group) * len(group) + cost for group in groups)

    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    assert total(groups) == min(map(total, partitions(longest_first)))
    if cost == 1000 and lengths:
        assert len(groups) == 1
    if cost == 0:
        assert total(groups) == sum(lengths)


def dealt_from(lengths, has_feedback, size):
    batch = padded(lengths)
    batch |= {"teacher_prompt_mask": batch["prompt_mask"], "scale": torch.tensor(3.0)}
    batch |= {"has_feedback": torch.tensor(has_feedback), "row": torch.arange(len(lengths))}
    micro_batches = [rows_of(batch, slice(i, i + size)) for i in range(0, len(lengths), size)]
    return by_length(micro_batches)


def test_dealing_keeps_every_row_and_puts_those_of_like_length_together():
    lengths = [(7, 9), (1, 1), (6, 9), (1, 2), (7, 8), (2, 1), (5, 5), (5, 6)]
    dealt = dealt_from(lengths, [True] * 8, 2)
    assert [d["row"].tolist() for d in dealt] == [[0, 2], [4, 7], [6, 3], [5, 1]]
    assert all(d["scale"] == 3.0 for d in dealt)


def test_dealing_spreads_the_rows_with_feedback_evenly():
    for flags in ([True, False] * 4, [True] * 5 + [False] * 3, [False] * 7 + [True], [False] * 8, [True] * 8):
        dealt = dealt_from([(3, i + 1) for i in range(8)], flags, 2)
        counts = [int(d["has_feedback"].sum()) for d in dealt]
        assert sum(counts) == sum(flags)
        assert max(counts) - min(counts) <= 1
        assert sorted(torch.cat([d["row"] for d in dealt]).tolist()) == list(range(8))
        assert all(len(d["row"]) == 2 for d in dealt)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 4},
        {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
        {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 4},
    ],
    ids=str,
)
def test_training_on_dealt_rows_is_training_on_the_rows_as_they_came(tmp_path, monkeypatch, changes):
    dealt = build(tmp_path / "dealt", e_step_frequency=1, **changes)
    dealt.train()
    monkeypatch.setattr("vpd_trl.trainer.by_length_within_steps", lambda trainer, micro_batches: micro_batches)
    plain = build(tmp_path / "plain", e_step_frequency=1, **changes)
    plain.train()
    moved = tiny.weights(tiny.model(tiny.tokenizer()))
    for name, weight in tiny.weights(plain).items():
        torch.testing.assert_close(weight, tiny.weights(dealt)[name], atol=2e-6, rtol=1e-4)
    assert not tiny.same(moved, tiny.weights(plain))
    for a, b in zip(plain.state.log_history, dealt.state.log_history, strict=True):
        for key in ("loss", "m_step/divergence", "e_step/loss", "e_step/reward_margin", "teacher/log_ratio_margin"):
            assert (key in a) == (key in b)
            if a.get(key) is not None:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5)


def test_rows_change_their_micro_batch_within_an_optimizer_step_alone(tmp_path):
    trainer = build(tmp_path, gradient_accumulation_steps=2, steps_per_generation=4, max_steps=1)
    before = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: (before.append(generate(inputs)), before[-1])[1]
    trainer.train()
    # TRL shuffles the batch before it splits it; what it split is what the two steps must still hold
    rows = concatenated(trainer._buffered_inputs)
    assert sorted(map(tuple, rows["completion_ids"].tolist())) == sorted(
        map(tuple, before[0]["completion_ids"].tolist())
    )
    for step in (trainer._buffered_inputs[:2], trainer._buffered_inputs[2:]):
        counts = [int(b["has_feedback"].sum()) for b in step]
        assert max(counts) - min(counts) <= 1


@pytest.fixture
def unlike(tmp_path):
    """A trainer with a micro-batch of rows of which some are much longer than others."""
    trainer = build(tmp_path, max_steps=1, method="sdpo", per_device_train_batch_size=16)
    trainer.train()
    return trainer, trainer._buffered_inputs[0]


def passes(trainer, batch):
    """Rows of each pass of the network that an M-step makes, its loss and its gradients."""
    network, sizes = causal_lm(trainer.model).base_model, []
    forward = type(network).forward
    network.forward = lambda input_ids, *a, **k: (sizes.append(len(input_ids)), forward(network, input_ids, *a, **k))[
        1
    ]
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    loss = trainer.m_step.loss(trainer.model, batch)
    loss.backward()
    del network.forward
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return sizes, loss.item(), gradients


def test_rows_of_unlike_length_go_through_the_network_apart_and_nothing_else_changes(unlike, monkeypatch):
    trainer, batch = unlike
    sizes, loss, gradients = passes(trainer, batch)
    logps = trainer.scorer.frozen_logps(batch, teacher=True)
    monkeypatch.setattr(scoring, "CPU_PASS_COST", 10**6)
    together, expected, of_one = passes(trainer, batch)
    rows = int(batch["has_feedback"].sum())
    assert together == [rows] * 2, "teacher and student"
    assert len(sizes) > 2
    assert sum(sizes) == 2 * rows
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in of_one.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(logps, trainer.scorer.frozen_logps(batch, teacher=True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "together"),
    [
        ("gathers", True),
        ({"use_reentrant": True}, True),
        ({"preserve_rng_state": False}, True),  # torch's default is the reentrant form
        ({"use_reentrant": False}, False),
        (None, False),
    ],
    ids=str,
)
def test_rows_stay_together_where_a_forward_pass_must_go_through_the_network_once(unlike, kwargs, together):
    trainer, batch = unlike
    if kwargs == "gathers":
        trainer.engine.gathers_weights = True
    else:
        trainer.model.gradient_checkpointing_enable(kwargs)
    del trainer.scorer.__dict__["_keeps_rows_together"]
    assert (len(passes(trainer, batch)[0]) == 2) is together


def test_rows_without_a_target_go_through_no_network(unlike):
    trainer, batch = unlike
    batch = {**batch, "completion_mask": batch["completion_mask"].clone()}
    batch["completion_mask"][::2] = 0
    rows = int((batch["has_feedback"] & loss_mask(batch).any(1)).sum())
    assert 0 < rows < batch["has_feedback"].sum()
    assert sum(passes(trainer, batch)[0]) == 2 * rows


@pytest.mark.parametrize("method", ["joint_loss", "advantage_reshaping"])
def test_rows_stay_where_they_are_with_a_loss_that_is_no_plain_sum(tmp_path, monkeypatch, method):
    seen = []
    monkeypatch.setattr("vpd_trl.lengths.by_length", lambda micro_batches: seen.append(1) or micro_batches)
    build(tmp_path, gradient_accumulation_steps=4, method=method).train()
    assert not seen


@pytest.mark.parametrize(("micro_batches", "longest"), [(16, 40), (2, 160)])
def test_nearly_every_token_that_enters_a_forward_pass_counts(tmp_path, micro_batches, longest):
    """Rollouts of mixed length in micro-batches of 8: this is the count that waste would raise."""
    changes = {"gradient_accumulation_steps": micro_batches, "max_steps": 1, "e_step_frequency": 1}
    trainer = build(tmp_path, longest, **changes)
    counts = counted(trainer)
    rows = concatenated(trainer._buffered_inputs)
    feedback = rows["has_feedback"]
    needed = {teacher: (row_lengths(rows, teacher=teacher) - 1)[feedback].sum().item() for teacher in (False, True)}
    both = needed[False] + needed[True]
    entered, real, passed = counts["m_step"]
    assert real == both, "the student's and the teacher's pass, of rows with feedback alone"
    assert passed == 2 * feedback.sum()
    assert real / entered >= 0.95
    entered, real, passed = counts["e_step"]
    assert real == needed[False] + 2 * needed[True], "the prior, the first shift and the update"
    assert passed == 3 * feedback.sum()
    assert real / entered >= 0.95


REFERENCE = {"beta": 0.1, "peft_config": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")}


@pytest.mark.parametrize("method", ["vpd", "sdpo"])
@pytest.mark.parametrize("late", [{"num_iterations": 2}, {"steps_per_generation": 4}, REFERENCE], ids=str)
def test_no_rollout_is_scored_for_a_policy_gradient_that_is_not_there(tmp_path, method, late):
    """TRL scores all rollouts where a step may train on older ones, and with a reference model, for GRPO's loss."""
    trainer = build(tmp_path, gradient_accumulation_steps=2, e_step_frequency=1, max_steps=1, method=method, **late)
    counts = counted(trainer)
    rows = concatenated(trainer._buffered_inputs)
    trained = concatenated(trainer._buffered_inputs[:2])["has_feedback"].sum()
    assert counts["m_step"][2] == 2 * trained < 2 * len(rows["has_feedback"])
    if method == "vpd":
        assert counts["e_step"][2] == 3 * rows["has_feedback"].sum()
    assert not {"old_per_token_logps", "ref_per_token_logps"} & set(rows)


def test_an_evaluation_still_has_grpos_loss_and_reference(tmp_path):
    trainer = build(
        tmp_path, **REFERENCE, max_steps=1, eval_strategy="steps", eval_steps=1, eval_dataset=tiny.dataset(8)
    )
    trainer.train()
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


def test_log_probabilities_for_importance_ratios_are_of_rows_with_feedback_and_the_priors_too(tmp_path):
    changes = {"max_steps": 1, "e_step_frequency": 1, "m_step_importance_clip": 2.0}
    trainer = build(tmp_path, **changes)
    scored, score = [], trainer.scorer.frozen_logps
    trainer.scorer.frozen_logps = lambda batch, teacher=False: (
        scored.append((teacher, len(batch["completion_ids"]))),
        score(batch, teacher=teacher),
    )[1]
    counts = counted(trainer)
    rows = concatenated(trainer._buffered_inputs)
    assert sum(n for teacher, n in scored if not teacher) == rows["has_feedback"].sum() < len(rows["has_feedback"])
    teacher = (row_lengths(rows, teacher=True) - 1)[rows["has_feedback"]].sum().item()
    assert counts["e_step"][1] == 2 * teacher, "no pass of the prior"


@pytest.mark.parametrize("bf16", [False, True])
def test_importance_ratios_of_the_student_s_own_rollouts_are_1(tmp_path, bf16, monkeypatch):
    ratios, ratio = [], scoring.importance_ratio
    monkeypatch.setattr(scoring, "importance_ratio", lambda *a, **k: (ratios.append(ratio(*a, **k)), ratios[-1])[1])
    trainer = build(tmp_path, method="sdpo", m_step_importance_clip=2.0, max_steps=1, bf16=bf16)
    trainer.train()
    with torch.no_grad():  # logits of some size, which half precision rounds
        trainer.model.get_output_embeddings().weight.mul_(30.0)
    rows = trainer._buffered_inputs[0]
    rows["student_logps"] = trainer.scorer.frozen_logps(rows)
    ratios.clear()
    trainer.scorer.distill(trainer.model, rows, loss_mask(rows).bool())
    assert torch.equal(*torch.broadcast_tensors(ratios[0], torch.ones(())))


@pytest.mark.parametrize("changes", [{"prior": "fixed"}, {"late": True}], ids=str)
def test_log_probabilities_of_other_weights_are_not_the_priors(tmp_path, changes):
    values = {"m_step_importance_clip": 2.0, "max_steps": 1, "e_step_frequency": 1}
    late = changes.pop("late", False)
    trainer = build(tmp_path, **values, **changes)
    if late:  # as after an optimizer step in between
        run = trainer._run_pending_e_step
        trainer._run_pending_e_step = lambda fresh=False: run(fresh=False)
    counts = counted(trainer)
    rows = concatenated(trainer._buffered_inputs)
    needed = {
        teacher: (row_lengths(rows, teacher=teacher) - 1)[rows["has_feedback"]].sum().item() for teacher in (0, 1)
    }
    assert counts["e_step"][1] == needed[0] + 2 * needed[1]


def test_prompts_of_the_teacher_that_are_equal_are_tokenised_once(tmp_path):
    trainer = build(tmp_path, feedback_fn=lambda answer, **k: [f"It is {a}." for a in answer], max_steps=1)
    tokenized, tokenize = [], trainer._tokenize_prompts
    trainer._tokenize_prompts = lambda prompts: (tokenized.append(prompts), tokenize(prompts))[1]
    trainer.train()
    student, teacher = tokenized
    assert len(student) == 16
    assert len(teacher) == len(set(teacher)) == len(set(student)) <= 2
    for batch in trainer._buffered_inputs:
        for ids, mask in zip(batch["teacher_prompt_ids"], batch["teacher_prompt_mask"].bool(), strict=True):
            assert trainer._tokenizer.decode(ids[mask]) in teacher
