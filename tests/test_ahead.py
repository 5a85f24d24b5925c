"""While feedback functions wait for others, the network scores the rollouts."""

import asyncio
import threading

import pytest
import torch

from tests import tiny
from vpd_trl.batch import concatenated, loss_mask
from vpd_trl.feedback import EachRollout


WAIT = 2  # seconds until a test that hangs fails


def told(answer, texts, **kwargs):
    """Feedback on two rollouts of three."""
    return [f"It is {a}." if i % 3 else None for i, a in enumerate(answer)]


def build(tmp_path, feedback, **changes):
    values = {"max_steps": 1, "gradient_accumulation_steps": 4, "optim": "sgd", "learning_rate": 0.1}
    return tiny.trainer(tmp_path, feedback_fn=feedback, **(values | changes))


def watched(trainer):
    """Rows that the student's frozen log-probabilities are computed of, and an event for the first of them."""
    rows, first = [], threading.Event()
    score = trainer.scorer.frozen_logps

    def spy(batch, teacher=False):
        logps = score(batch, teacher=teacher)
        if not teacher:
            rows.extend(map(tuple, batch["completion_ids"].tolist()))
            first.set()
        return logps

    trainer.scorer.frozen_logps = spy
    return rows, first


def waiting_for(first, *, for_all=None):
    """Async feedback that comes only once something has been scored, or as many rollouts as there are."""

    async def feedback(answer, texts):
        for _ in range(100 * WAIT):
            if first.is_set() and (for_all is None or len(for_all) >= len(answer)):
                return told(answer, texts)
            await asyncio.sleep(0.01)
        raise TimeoutError("nothing was scored while feedback was awaited")

    return feedback


def started(tmp_path, *, for_all=False, **changes):
    """A trainer whose feedback waits for the scoring of its rollouts, and what is scored."""
    place = {}

    async def feedback(answer, texts):
        return await place["feedback"](answer, texts)

    trainer = build(tmp_path, feedback, **changes)
    rows, first = watched(trainer)
    place["feedback"] = waiting_for(first, for_all=rows if for_all else None)
    return trainer, rows


ASKED = [
    {"e_step_frequency": 1},
    {"method": "sdpo", "m_step_importance_clip": 2.0},
    {"method": "joint_loss", "m_step_importance_clip": 2.0},
    {"method": "advantage_reshaping"},
]


@pytest.mark.parametrize("for_all", [False, True])
@pytest.mark.parametrize("changes", ASKED, ids=str)
def test_rollouts_are_scored_while_feedback_is_awaited_and_training_is_the_same(tmp_path, changes, for_all):
    trainer, rows = started(tmp_path / "ahead", for_all=for_all, **changes)
    trainer.train()
    plain = build(tmp_path / "plain", told, **changes)
    after, _ = watched(plain)
    plain.train()
    assert tiny.weights(plain).keys() == tiny.weights(trainer).keys()
    for name, weight in tiny.weights(plain).items():
        torch.testing.assert_close(weight, tiny.weights(trainer)[name], atol=1e-6, rtol=1e-4)
    batch = concatenated(trainer._buffered_inputs)
    count = len(batch["completion_ids"])
    with_feedback = int(batch["has_feedback"].sum())
    assert len(after) == with_feedback < count
    if for_all:
        assert len(rows) == count, "each once"
    else:
        assert with_feedback <= len(rows) <= with_feedback + trainer.args.per_device_train_batch_size, (
            "once feedback is there, only rollouts with feedback are scored"
        )


def test_what_was_scored_ahead_are_the_rollouts_log_probabilities(tmp_path):
    trainer, _ = started(tmp_path, for_all=True, e_step_frequency=1, learning_rate=0.0, pad_to_multiple_of=8)
    trainer.train()
    batch = concatenated(trainer._buffered_inputs)
    assert batch["completion_ids"].size(1) % 8 == 0
    assert batch["is_scored"].all()
    expected = trainer.scorer.frozen_logps(batch)
    torch.testing.assert_close(batch["student_logps"], expected * loss_mask(batch), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "sdpo"},
        {"prior": "fixed", "e_step_frequency": 1},
        {"gathers": True, "e_step_frequency": 1},
        {"method": "advantage_reshaping", "advantage_mix": 0.0},
        {"method": "advantage_reshaping", "num_iterations": 2},  # TRL has scored them
        {"method": "joint_loss"},
    ],
    ids=str,
)
def test_nothing_is_scored_that_nobody_will_ask_for(tmp_path, changes):
    gathers = changes.get("gathers", False)
    scored = []

    async def feedback(answer, texts):
        await asyncio.sleep(0.3)
        scored.append(len(rows))
        return told(answer, texts)

    trainer = build(tmp_path, feedback, **{k: v for k, v in changes.items() if k != "gathers"})
    trainer.engine.gathers_weights = gathers
    rows, _ = watched(trainer)
    trainer.train()
    assert scored == [0]


def test_only_batches_of_an_e_step_are_scored_for_a_prior(tmp_path):
    scored = []

    async def feedback(answer, texts):
        await asyncio.sleep(0.3)
        scored.append(len(rows))
        return told(answer, texts)

    trainer = build(tmp_path, feedback, e_step_frequency=2, max_steps=3)
    rows, _ = watched(trainer)
    trainer.train()
    first, second, third = scored
    assert 0 < first == second < third


def test_truncated_rollouts_that_do_not_count_are_not_scored(tmp_path):
    trainer, rows = started(
        tmp_path, method="sdpo", m_step_importance_clip=2.0, mask_truncated_completions=True, max_completion_length=4
    )
    ends = trainer._tokenizer.eos_token_id
    trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: (
        [[10, 11, 12, ends if i % 2 else 13] for i, _ in enumerate(prompt_ids)],
        None,
    )
    trainer.train()
    assert rows
    assert all(row[3] == ends for row in rows)


def test_rollouts_are_asked_about_all_at_the_same_time(tmp_path):
    """A function that sleeps for a second a rollout so adds about a second to a batch: here all calls meet."""
    together = threading.Barrier(16, timeout=WAIT)

    def one(answer):
        together.wait()
        return f"It is {answer}."

    trainer = build(tmp_path, EachRollout(one), max_steps=2)
    assert trainer.args.generation_batch_size == 16
    trainer.train()
    assert trainer.state.log_history[0]["feedback/coverage"] == 1.0


def test_a_function_that_asks_the_student_and_scoring_take_turns(tmp_path):
    busy, asked = threading.Lock(), []

    async def feedback(prompts, answer, generate):
        for _ in range(3):
            asked.append(await asyncio.to_thread(generate, list(prompts)))
            await asyncio.sleep(0.05)
        return [f"It is {a}." for a in answer]

    trainer = build(tmp_path, feedback, e_step_frequency=1)
    score, single = trainer.scorer.frozen_logps, trainer._generate_single_turn

    def alone(function):
        def call(*args, **kwargs):
            assert busy.acquire(blocking=False), "two threads are in the network"
            try:
                return function(*args, **kwargs)
            finally:
                busy.release()

        return call

    trainer.scorer.frozen_logps, trainer._generate_single_turn = alone(score), alone(single)
    trainer.train()
    assert [len(answers) for answers in asked] == [16] * 3
