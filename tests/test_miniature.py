"""The experiments in miniature: tasks with a hidden rule, the base model that doesn't know it, one run."""

import json
import random
from collections import Counter
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch

from examples.paper_in_miniature import base, run, task
from vpd_trl import VPDConfig
from vpd_trl.feedback import Rollout


ALL = (*task.DOMAINS, task.RIGID)
SYMBOLS = 8


def critiques(answer, noise, *, domain="cipher", success=False, count=1, seed=0, step=0, coverage=1.0):
    feedback = task.EnvironmentFeedback(domain, SYMBOLS, noise, seed, coverage)
    return feedback(
        prompts=["q"] * count,
        answer=[answer] * count,
        successes=[success] * count,
        trainer_state=SimpleNamespace(global_step=step),
    )


@pytest.mark.parametrize("domain", ALL)
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_training_and_held_out_problems_are_disjoint_and_share_their_letters(domain, length):
    train, held_out = task.problems(domain, length, SYMBOLS, seed=1)
    assert len(train) == task.TRAINING
    assert len(held_out) == task.HELD_OUT
    assert len({p.question for p in train + held_out}) == len(train) + len(held_out)
    for place, letters in enumerate(zip(*(p.question.split() for p in held_out), strict=True)):
        assert set(letters) <= {p.question.split()[place] for p in train}


@pytest.mark.parametrize("domain", ALL)
def test_the_rule_is_the_seeds(domain):
    made = [task.problems(domain, 3, SYMBOLS, seed) for seed in (1, 1, 2)]
    assert made[0] == made[1]
    rules = [task.hidden_rule(domain, 3, SYMBOLS, seed) for seed in (1, 2)]
    places = task.alphabets(domain, 3, SYMBOLS)
    rng = random.Random(0)
    questions = [[rng.choice(place) for place in places] for _ in range(200)]
    assert sum(rules[0](q) == rules[1](q) for q in questions) < 100


@pytest.mark.parametrize("domain", ALL)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_chance_is_the_same_in_every_domain_because_symbols_are_equally_frequent_at_each_place(domain, length):
    symbols = 4
    rule = task.hidden_rule(domain, length, symbols, seed=3)
    answers = [rule(q) for q in product(*task.alphabets(domain, length, symbols))]
    for place in range(length):
        counts = Counter(answer[place] for answer in answers)
        assert set(counts) == set(range(symbols))
        assert len(set(counts.values())) == 1
    assert all(len(answer) == length for answer in answers)


def test_held_out_answers_follow_from_single_letters():
    train, held_out = task.problems("cipher", 2, SYMBOLS, seed=0)
    code = {}
    for problem in train:
        code.update(zip(problem.question.split()[1:-1], task.symbols_of(problem.answer), strict=True))
    for problem in held_out:
        assert [code[letter] for letter in problem.question.split()[1:-1]] == task.symbols_of(problem.answer)


def test_in_a_chain_each_symbol_follows_from_the_one_before_and_the_second_letter():
    train, held_out = task.problems(task.RIGID, 3, SYMBOLS, seed=0)
    tables: dict[str, dict[int, int]] = {}
    for problem in train + held_out:
        _, _, second, *_ = problem.question.split()
        steps = [int(word[0]) for word in problem.answer.split()]
        table = tables.setdefault(second, {})
        for one, next_one in pairwise(steps):
            assert table.setdefault(one, next_one) == next_one
    assert len({json.dumps(sorted(t.items())) for t in tables.values() if len(t) == SYMBOLS}) == 2


def test_the_reward_is_exact_match():
    completions = ["3¹ 5²", "3¹", "3¹ 5² 1³", "5¹ 3²", "", "3¹ 6²"]
    assert task.exact_match(completions, ["3¹ 5²"] * 6) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("success", [True, False])
def test_without_noise_feedback_states_the_outcome_and_the_answer(success):
    assert critiques("3¹ 5²", 0.0, success=success) == [f"{'✓' if success else '✗'} 3¹ 5²"]


def test_with_noise_1_feedback_is_independent_of_the_answer():
    said = {answer: critiques(answer, 1.0, count=4000) for answer in ("0¹ 0²", "7¹ 7²")}
    assert said["0¹ 0²"] == said["7¹ 7²"]
    counts = Counter(text.split()[1] for text in said["0¹ 0²"])
    assert max(abs(counts[f"{s}¹"] / 4000 - 1 / SYMBOLS) for s in range(SYMBOLS)) < 0.03


def test_noise_is_drawn_anew_for_each_rollout_and_step_and_is_the_seeds():
    many = critiques("3¹ 5²", 0.5, count=50)
    assert many == critiques("3¹ 5²", 0.5, count=50)
    assert len(set(many)) > 5
    assert many != critiques("3¹ 5²", 0.5, count=50, step=1)
    assert many != critiques("3¹ 5²", 0.5, count=50, seed=1)


def test_with_half_the_coverage_half_of_the_rollouts_get_the_feedback_that_all_get():
    whole, half = (critiques("3¹ 5²", 0.5, count=2000, coverage=coverage) for coverage in (1.0, 0.5))
    assert None not in whole
    assert all(said in (None, full) for said, full in zip(half, whole, strict=True))
    assert abs(half.count(None) / 2000 - 0.5) < 0.04


def test_a_sibling_that_says_the_same_can_be_left_out():
    sibling = Rollout(text="3¹ 5²", reward=1.0, success=True)
    feedback = task.OtherSiblings()(siblings=[[sibling], [sibling], []], texts=["3¹ 5²", "1¹ 5²", "3¹ 5²"])
    assert [f and f.solution for f in feedback] == [None, "3¹ 5²", None]


def test_in_a_chain_noise_spares_the_result():
    said = [text.split()[1:] for text in critiques("1¹ 2² 3³", 1.0, domain=task.RIGID, count=100)]
    assert {symbols[-1] for symbols in said} == {"3³"}
    assert len({tuple(symbols[:-1]) for symbols in said}) > 20


def test_texts_and_templates_are_words_of_the_tokenizer():
    vocabulary = base.tokenizer()
    assert len(vocabulary) <= 80
    attempt = f"{base.FENCE} 0¹ 1² {base.FENCE}"
    critic = task.fill(task.CRITIC_TEMPLATE, prompt="cipher a b =", attempt=attempt, answer="3¹ 5²")
    solution = task.fill(task.SOLUTION_TEMPLATE, solution="3¹ 5²")
    critique = task.fill(task.CRITIQUE_TEMPLATE, critique="✗ 3¹ 5²")
    texts = [task.problems(domain, 2, SYMBOLS, 0)[0][0].question for domain in ALL]
    texts += [critic, task.fill(task.TEACHER_TEMPLATE, prompt=texts[0], solution=solution, critique=critique)]
    for text in texts:
        ids = vocabulary(text)["input_ids"]
        assert vocabulary.unk_token_id not in ids
        assert len(ids) == len(text.split()) <= 20
        assert vocabulary.decode(ids) == " ".join(text.split())


def test_the_base_model_learns_the_completion_alone_and_repeats_feedback_with_its_skill():
    settings, rng = base.Base(length=2, skill=0.5), random.Random(0)
    pairs = [base.example(settings, rng) for _ in range(4000)]
    repeated = [
        shown == said
        for prompt, completion in pairs
        if prompt.startswith(task.WRONG)
        for shown, said in zip(prompt.split()[1:3], completion.split(), strict=True)
    ]
    assert abs(sum(repeated) / len(repeated) - (0.5 + 0.5 / SYMBOLS)) < 0.05
    vocabulary = base.tokenizer()
    ids, labels = base.encode(pairs[:50], vocabulary)
    learned = [vocabulary.decode(row[row != base.IGNORED]) for row in labels]
    assert learned == [f"{completion} <eos>" for _, completion in pairs[:50]]
    assert torch.equal(labels[labels != base.IGNORED], ids[labels != base.IGNORED])


@pytest.mark.parametrize("method", ["vpd", "sdpo", "grpo"])
def test_two_steps_of_a_cell_give_a_result_with_all_its_fields(tmp_path, monkeypatch, method):
    monkeypatch.setattr(base, "CACHE", tmp_path)
    small = base.Base(length=1, steps=2, batch_size=8, hidden_size=16, heads=2)
    monkeypatch.setattr(run, "base_of", lambda cell: small)
    cell = run.Cell(
        method=method, length=1, steps=2, prompts=2, rollouts=4, samples=2, overrides=(("e_step_frequency", 1),)
    )
    result = run.run(cell)
    assert json.loads(json.dumps(result, allow_nan=False))["cell"]["method"] == method
    assert set(result) == {
        "cell", "before", "after", "curve", "history", "seconds", "parameters", "problems", "chance",
    }  # fmt: skip
    assert set(result["before"]) == set(result["after"]) == {"train", "held_out"}
    assert [step for step, _ in result["curve"]] == [0, 1, 2]
    assert result["curve"][-1][1] == result["after"]["held_out"]
    assert result["history"]["step"] == [1, 2]
    expected = {"reward", "entropy"}
    if method != "grpo":
        expected |= {"m_step/divergence", "feedback/coverage"}  # two steps may have no success to speak of
    assert expected <= set(result["history"])
    assert ("e_step/skipped" in result["history"]) == (method == "vpd")
    assert (tmp_path / small.folder.name / "settings.json").exists()


def test_overrides_are_fields_of_the_config(tmp_path):
    cell = run.Cell(overrides=(("e_step_frequency", 10), ("divergence", "reverse_kl")))
    made = run.config(cell, str(tmp_path), "cpu")
    assert isinstance(made, VPDConfig)
    assert (made.e_step_frequency, made.divergence) == (10, "reverse_kl")
