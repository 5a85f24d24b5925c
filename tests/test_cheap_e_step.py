"""The two options that save an E-step its passes: a running reward shift, and vLLM's log-probabilities as the prior."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from tests.mixed_lengths import build, counted
from vpd_trl import checks, state
from vpd_trl.batch import concatenated, loss_mask
from vpd_trl.lengths import row_lengths
from vpd_trl.prior import make_prior


def needed(trainer):
    """Tokens of the latest rollouts with feedback, as the student and as the teacher reads them."""
    rows = concatenated(trainer._buffered_inputs)
    return [(row_lengths(rows, teacher=teacher) - 1)[rows["has_feedback"]].sum().item() for teacher in (False, True)]


def with_numbers_of_vllm(trainer, *, nan=False):
    """Rollouts come with log-probabilities, as from vLLM: here the student's own, or nothing for some tokens."""
    single, given = trainer._generate_single_turn, []

    def sample(prompt_ids, *args, **kwargs):
        ids, _ = single(prompt_ids, *args, **kwargs)
        found = []
        for prompt, completion in zip(prompt_ids, ids, strict=True):
            ids_of_one = torch.tensor([prompt + completion])
            with torch.no_grad():
                logits = trainer.model(ids_of_one, torch.ones_like(ids_of_one)).logits[0, len(prompt) - 1 : -1]
            logps = (logits / trainer.temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
            found.append([None if nan and i % 3 == 0 else p for i, p in enumerate(logps.tolist())])
        given.extend(found)
        return ids, found

    trainer._generate_single_turn = sample
    return given


def sampling(tmp_path, **changes):
    trainer = build(tmp_path, e_step_frequency=1, **changes)
    trainer.args.prior = "sampling"  # its configuration asks for vLLM, which a CPU hasn't got
    trainer.prior = make_prior(trainer)
    return trainer


@pytest.mark.parametrize("nan", [False, True])
def test_a_sampling_prior_is_a_dynamic_one_without_its_pass(tmp_path, nan):
    trainer = sampling(tmp_path / "sampling", max_steps=1)
    with_numbers_of_vllm(trainer, nan=nan)
    counts = counted(trainer)
    student, teacher = needed(trainer)
    assert counts["e_step"][1] == 2 * teacher + (student if nan else 0)
    dynamic = build(tmp_path / "dynamic", e_step_frequency=1, max_steps=1)
    dynamic.train()
    for name, weight in tiny.weights(dynamic).items():
        torch.testing.assert_close(weight, tiny.weights(trainer)[name], atol=2e-6, rtol=1e-4)
    for a, b in zip(trainer.state.log_history, dynamic.state.log_history, strict=True):
        assert a.get("e_step/reward_margin") == pytest.approx(b.get("e_step/reward_margin"), abs=1e-4)


def test_a_sampling_prior_says_what_vllm_says(tmp_path):
    trainer = sampling(tmp_path, max_steps=1)
    given = with_numbers_of_vllm(trainer)
    trainer.train()
    rows = concatenated(trainer._buffered_inputs)
    (logps,) = trainer.prior.logps([rows], fresh=False)
    mask = loss_mask(rows).bool()
    assert sorted(logps[mask].tolist()) == pytest.approx(sorted(x for row in given for x in row))
    assert not logps[~mask].any()


def test_a_running_shift_takes_no_pass_but_for_the_first(tmp_path):
    trainer = build(tmp_path, e_step_frequency=1, max_steps=1, reward_shift="running")
    counts = counted(trainer)
    student, teacher = needed(trainer)
    assert counts["e_step"][1] == student + 2 * teacher, "the first has nothing to go by"
    before = dict(trainer.e_step.state_dict())
    counts.clear()
    trainer.e_step.run(trainer._buffered_inputs)
    assert counts["e_step"][1] == student + teacher
    assert before == trainer.e_step.state_dict(), "the E-step doesn't move it"


def test_a_running_shift_is_the_average_of_what_the_m_steps_find(tmp_path):
    trainer = build(tmp_path, e_step_frequency=2, max_steps=4, reward_shift="running", reward_shift_momentum=0.5)
    found, shifts = [], []
    measured, update = trainer.e_step.measured, trainer.e_step._update

    def note(*means):
        found.append(means)
        measured(*means)

    def noted(entry):
        update(entry)
        shifts.append(trainer.e_step.shift.value)

    trainer.e_step.measured, trainer.e_step._update = note, noted
    trainer.train()
    assert len(found) == 4
    beta = trainer.args.bco_temperature
    shift = shifts[0]
    for success, failure in found[:2]:
        shift = 0.5 * shift + 0.5 * beta * (success + failure) / 2
    assert shifts[1] == pytest.approx(shift)
    used = [entry["e_step/reward_shift"] for entry in trainer.state.log_history if "e_step/reward_shift" in entry]
    assert used == pytest.approx(shifts)
    margins = [entry["teacher/log_ratio_margin"] for entry in trainer.state.log_history[:4]]
    assert margins == pytest.approx([success - failure for success, failure in found], rel=1e-4)


def test_a_batch_without_a_class_leaves_a_running_shift_where_it_is(tmp_path):
    trainer = build(tmp_path, max_steps=1, reward_shift="running")
    trainer.train()
    before = trainer.e_step.shift.value
    trainer.e_step.measured(math.nan, 1.0)
    trainer.e_step.measured(1.0, math.nan)
    assert trainer.e_step.shift.value == before
    trainer.e_step.measured(1.0, 1.0)
    assert trainer.e_step.shift.value != before


def test_a_shift_of_batches_is_not_moved_by_m_steps(tmp_path):
    trainer = build(tmp_path, max_steps=1)
    trainer.train()
    before = trainer.e_step.shift.value
    trainer.e_step.measured(1.0, 1.0)
    assert trainer.e_step.shift.value == before


def test_further_passes_of_an_e_step_move_a_running_shift_by_what_they_find(tmp_path):
    trainer = build(tmp_path, max_steps=1, reward_shift="running", e_step_epochs=3)
    trainer.train()
    shifts, update = [], trainer.e_step._update
    trainer.e_step._update = lambda entry: (update(entry), shifts.append(trainer.e_step.shift.value))
    trainer.e_step.shift.value = 5.0
    trainer.e_step.run(trainer._buffered_inputs)
    assert shifts[0] == 5.0 > shifts[1] > shifts[2]


def test_a_run_with_a_running_shift_that_was_interrupted_goes_on_as_if_it_were_not(tmp_path):
    changes = {"reward_shift": "running", "e_step_frequency": 2, "save_strategy": "steps", "save_steps": 2}
    whole = build(tmp_path / "whole", max_steps=4, **changes)
    whole.train()
    parts = build(tmp_path / "whole", max_steps=4, **changes)
    parts.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert parts.e_step.shift.value == whole.e_step.shift.value
    assert tiny.same(tiny.weights(whole), tiny.weights(parts))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"prior": "sampling"}, "needs use_vllm=True"),
        ({"prior": "sampling", "use_vllm": True, "top_p": 0.9}, "top_p=0.9"),
        ({"prior": "sampling", "use_vllm": True, "generation_kwargs": {"top_k": 5}}, "'top_k': 5"),
        ({"prior": "sampling", "use_vllm": True, "generation_kwargs": {"temperature": 0.5}}, "'temperature': 0.5"),
        ({"prior": "sampling", "use_vllm": True, "vllm_structured_outputs_regex": "a+"}, "regex='a\\+'"),
        ({"reward_shift": "running", "teacher": "ema"}, "got teacher='ema' and prior='dynamic'"),
        ({"reward_shift": "running", "prior": "fixed"}, "got teacher='shared' and prior='fixed'"),
        ({"reward_shift": "lagging"}, "reward_shift must be one of 'batch', 'running'; got 'lagging'"),
        ({"prior": "sampled"}, "prior must be one of 'dynamic', 'fixed', 'sampling'; got 'sampled'"),
    ],
)
def test_what_can_not_go_together_is_said_at_once(tmp_path, changes, part):
    with pytest.raises(ValueError, match=part):
        tiny.config(tmp_path, **changes)


@pytest.mark.parametrize("neutral", [{"min_p": 0.0}, {"top_k": -1}, {"generation_kwargs": {"seed": 3}}], ids=str)
def test_values_that_leave_the_distribution_whole_are_taken(tmp_path, neutral):
    tiny.config(tmp_path, prior="sampling", use_vllm=True, **neutral)


def test_rollouts_without_log_probabilities_are_refused_before_they_are_used(tmp_path):
    trainer = sampling(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="rollouts came without any"):
        trainer.train()


@pytest.mark.parametrize(
    ("mode", "temperature", "refused"),
    [("raw_logprobs", 0.7, True), ("processed_logprobs", 0.7, False), ("raw_logprobs", 1.0, False)],
)
def test_a_server_must_report_what_it_samples_from(tmp_path, mode, temperature, refused):
    trainer = build(tmp_path, max_steps=1)
    trainer.args.prior, trainer.args.vllm_mode, trainer.args.temperature = "sampling", "server", temperature
    client = SimpleNamespace(get_server_info=lambda: {"model_config": {"logprobs_mode": mode}})
    trainer.vllm_generation = SimpleNamespace(vllm_client=client)
    with pytest.raises(ValueError, match=f"this one has {mode}") if refused else nullcontext():
        checks.check_model(trainer)


def test_a_checkpoint_of_a_dynamic_prior_goes_on_with_a_sampling_one(tmp_path):
    first = build(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    first.train()
    again = sampling(tmp_path, max_steps=2)
    again.e_step.shift.value = None
    state.load(again, str(tmp_path / "checkpoint-1"))
    assert again.e_step.shift.value is not None
    again.args.prior = "fixed"
    with pytest.raises(ValueError, match="was saved with prior='dynamic'"):
        state.load(again, str(tmp_path / "checkpoint-1"))


def test_a_fixed_prior_is_put_in_place_once_for_all_updates_of_an_e_step(tmp_path):
    trainer = build(tmp_path, prior="fixed", max_steps=1, e_step_batch_size=8)
    swaps, swapped_in = [], trainer.prior.initial.swapped_in
    trainer.prior.initial.swapped_in = lambda: (swaps.append(1), swapped_in())[1]
    trainer.train()
    assert len(swaps) == 1 < trainer.args.generation_batch_size // 8


def test_methods_without_an_e_step_take_any_of_it(tmp_path):
    tiny.config(tmp_path, method="sdpo", teacher="ema", reward_shift="running", prior="sampling")
