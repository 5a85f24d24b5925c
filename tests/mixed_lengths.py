"""A tiny trainer on rollouts of mixed lengths, and a count of what enters its network."""

import torch

from tests import tiny
from vpd_trl.network import causal_lm


def mixed(trainer, longest):
    """Rollouts of mixed lengths, the same for every trainer."""

    def sample(prompt_ids, images, fields, num_generations):
        generator = torch.Generator().manual_seed(trainer._step)
        lengths = torch.randint(1, longest, (len(prompt_ids),), generator=generator).tolist()
        return [torch.randint(4, 90, (n,), generator=generator).tolist() for n in lengths], None

    trainer._generate_single_turn = sample


def half_feedback(answer, completion_ids, **kwargs):
    return ["x" * (1 + sum(ids) % 10) if sum(ids) % 3 else None for ids in completion_ids]


def build(tmp_path, longest=40, **changes):
    values = {"feedback_fn": half_feedback, "max_completion_length": longest, "optim": "sgd", "max_grad_norm": 0.0}
    values |= {"per_device_train_batch_size": 8, "num_generations": 8, "learning_rate": 0.1, "max_steps": 2}
    trainer = tiny.trainer(tmp_path, **(values | changes))
    mixed(trainer, longest)
    return trainer


def counted(trainer):
    """Tokens that enter the network, those of them that are real, and rows, for each phase."""
    counts = {}
    network, phase = causal_lm(trainer.model).base_model, ["m_step"]
    forward, run = network.forward, trainer.e_step.run

    def spy(*args, input_ids=None, attention_mask=None, **kwargs):
        entry = counts.setdefault(phase[0], [0, 0, 0])
        for i, number in enumerate((input_ids.numel(), int(attention_mask.sum()), len(input_ids))):
            entry[i] += number
        return forward(*args, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def e_step(*args, **kwargs):
        phase[0] = "e_step"
        try:
            return run(*args, **kwargs)
        finally:
            phase[0] = "m_step"

    network.forward, trainer.e_step.run = spy, e_step
    trainer.train()
    return counts
