"""A tiny model that follows feedback imperfectly learns from it what no one told the student."""

import random

import pytest
import torch
from datasets import Dataset

from tests import tiny
from vpd_trl.e_step import _Update


KEYS = "abcdefghijklmnop"


def secret(key, seed):
    return str(random.Random(f"{seed}{key}").randrange(10))


def dataset(seed):
    rows = [{"prompt": [{"role": "user", "content": k}], "answer": secret(k, seed)} for k in KEYS]
    return Dataset.from_list(rows)


def reward(completions, answer, **kwargs):
    return [float(c[0]["content"] == a) for c, a in zip(completions, answer, strict=True)]


def feedback(answer, **kwargs):
    return [f"say {a}" for a in answer]


def pretrain(model, trainer, seed, steps=700):
    """Without feedback: any digit. With it: the digit that it names, four times in five."""
    rng = random.Random(seed)
    tokenizer = trainer._tokenizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        rows = []
        for _ in range(32):
            prompt, digit = [{"role": "user", "content": rng.choice(KEYS)}], str(rng.randrange(10))
            if rng.random() < 0.5:
                named = digit if rng.random() < 0.8 else str(rng.randrange(10))
                (built,) = trainer.prompt_builder.build([prompt], trainer.feedback(1, answer=[named]))
                ids = built.ids
            else:
                ids = trainer._tokenize_prompts([prompt])[0][0]
            rows.append(torch.tensor([*ids, *tokenizer(digit)["input_ids"], tokenizer.eos_token_id]))
        longest = max(map(len, rows))
        ids = torch.stack([torch.nn.functional.pad(r, (longest - len(r), 0), value=0) for r in rows])
        mask = torch.stack([(torch.arange(longest) >= longest - len(r)).long() for r in rows])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -3:-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, -2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def margin(trainer, batches):
    """Mean implicit reward of successes minus that of failures, the prior frozen as the E-step does it."""
    rewards = []
    for batch in batches:
        prior = batch.setdefault("prior_of_the_test", trainer.scorer.frozen_logps(batch))
        rewards.append(trainer.e_step._reward(batch, trainer.scorer.frozen_logps(batch, teacher=True), prior))
    positive, negative = trainer.e_step._class_means(_Update(batches, 0, 0, rewards=rewards))
    return positive - negative


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_few_dozen_steps_raise_the_success_rate_and_e_steps_raise_the_margin(tmp_path, seed):
    tokenizer = tiny.tokenizer()
    model = tiny.model(tokenizer, seed=seed, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    trainer = tiny.trainer(
        tmp_path,
        tok=tokenizer,
        mdl=model,
        data=dataset(seed),
        reward_funcs=reward,
        feedback_fn=feedback,
        teacher_template="{prompt}{critique}",  # short, for a model that reads characters
        critique_template="{critique}",
        per_device_train_batch_size=128,
        gradient_accumulation_steps=1,
        num_generations=8,
        max_completion_length=2,
        max_steps=60,
        e_step_frequency=5,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        seed=seed,
    )
    pretrain(model, trainer, seed)
    gains = []
    run = trainer.e_step.run

    def measured(batches, **kwargs):
        before = margin(trainer, batches)
        ran = run(batches, **kwargs)
        gains.append(margin(trainer, batches) - before)
        return ran

    trainer.e_step.run = measured
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    start, end = (sum(row["reward"] for row in part) / len(part) for part in (rows[:3], rows[-3:]))
    assert start < 0.3
    assert end > start + 0.25, (start, end)
    assert len(gains) == 12
    assert sum(gain > 0 for gain in gains) >= 9, gains
