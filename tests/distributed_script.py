"""Started by test_distributed.py under `accelerate launch`: train the tiny model in one of several ways."""

import os
import sys
import traceback
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate import PartialState
from peft import LoraConfig
from transformers import TrainerCallback

from tests import tiny
from vpd_trl.feedback import SelfCritiqueFeedback


torch.set_num_threads(1)


def fixed_rollouts(trainer):
    """Sampling that depends on the prompts and the place in the group alone, not on the number of processes."""
    rank, group = trainer.accelerator.process_index, trainer.num_generations

    def sample(prompt_ids, images, fields, num_generations):
        rows = []
        for i, ids in enumerate(prompt_ids):
            place = (rank * len(prompt_ids) + i) % group
            generator = torch.Generator().manual_seed(sum(ids) * 31 + len(ids) * 7 + place)
            length = 1 + place % 6
            rows.append(torch.randint(4, 90, (length,), generator=generator).tolist())
        return rows, None

    trainer._generate_single_turn = sample


class AtStart(TrainerCallback):
    """What a trainer holds when training begins, after a checkpoint has been loaded."""

    def __init__(self):
        self.trainer = self.found = None

    def on_train_begin(self, *args, **kwargs):
        self.found = progress(self.trainer) | {"rollouts_are_kept": self.trainer._buffered_inputs is not None}


class RecordedCritique(SelfCritiqueFeedback):
    """Keeps, for each batch, the reference answers of failures, and what the student said on them and how it ended."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __call__(self, generate, answer, successes, **kwargs):
        def ask(prompts):
            texts = generate(prompts)
            golds = [a for a, success in zip(answer, successes, strict=True) if not success]
            self.seen.append([(gold, str(t), t.finished) for gold, t in zip(golds, texts, strict=True)])
            return texts

        return super().__call__(generate=ask, answer=answer, successes=successes, **kwargs)


def progress(trainer):
    return {"rollout_batches": trainer.rollout_batches, "shift": trainer.e_step.shift.value}


def build(scenario, folder, rank, world):
    size = {1: 8, 2: 4}[world]
    changes = {"per_device_train_batch_size": size, "max_steps": 3, "e_step_frequency": 1, "optim": "sgd"}
    changes |= {"learning_rate": 0.5, "lr_scheduler_type": "constant", "shuffle_dataset": False}
    # No clipping: it would hide gradients of a wrong scale
    changes |= {"max_grad_norm": 1e3}
    if scenario == "every_other":
        changes |= {"e_step_frequency": 2, "max_steps": 4}
    elif scenario == "no_feedback_on_one":
        changes["feedback_fn"] = lambda prompts, **k: [None if rank else "text"] * len(prompts)
    elif scenario == "no_success_on_one":
        changes["reward_funcs"] = lambda prompts, **k: [float(rank == 0 and i % 2) for i in range(len(prompts))]
    elif scenario == "no_success":
        changes["reward_funcs"] = lambda prompts, **k: [0.0] * len(prompts)
    elif scenario == "raises_on_one":

        def broken(prompts, **kwargs):
            if rank == 1:
                raise KeyError("the judge is out of office")
            return ["text"] * len(prompts)

        changes["feedback_fn"] = broken
    elif scenario in ("raises_before_generate", "generates_more_often_on_one"):

        def apart(prompts, generate, **kwargs):
            if rank == 1 and scenario == "raises_before_generate":
                raise KeyError("the judge is out of office")
            for _ in range(2 - rank):
                generate(prompts)
            return ["text"] * len(prompts)

        changes["feedback_fn"] = apart
    elif scenario == "sampled_self_critique":
        # The first batch has failures on one process alone, the others unequal numbers of them
        def unequal(prompts, trainer_state, **kwargs):
            failures = len(prompts) if rank else min(trainer_state.global_step, 1)
            return [0.0] * failures + [1.0] * (len(prompts) - failures)

        critique = RecordedCritique()
        changes |= {"feedback_fn": critique, "reward_funcs": unequal, "max_completion_length": 64}
        changes |= {"mdl": tiny.model(tiny.tokenizer(), max_position_embeddings=4096), "learning_rate": 1e-3}
        seen = critique.seen
    elif scenario == "siblings":
        seen = []

        def look(siblings, texts, **kwargs):
            seen.extend((text, [s.text for s in others]) for text, others in zip(texts, siblings, strict=True))
            return ["text"] * len(texts)

        changes |= {"feedback_fn": look, "num_generations": 8, "gradient_accumulation_steps": 1}
    elif scenario == "ema_teacher":
        changes |= {"teacher": "ema"}
    elif scenario == "lora_teacher":
        changes |= {"teacher": "lora", "teacher_peft_config": LoraConfig(r=4, target_modules="all-linear")}
    elif scenario in ("joint_loss", "advantage_reshaping"):
        changes |= {"method": scenario, "loss_type": "dapo"}
    elif scenario == "fixed_prior":
        changes |= {"prior": "fixed"}
    elif scenario.startswith(("save", "resume")):
        changes |= {"max_steps": 6, "optim": "adamw_torch", "learning_rate": 1e-3, "shuffle_dataset": True}
        changes |= {"teacher": "ema", "prior": "fixed", "e_step_frequency": 2}
        if scenario.startswith("save"):
            changes |= {"save_strategy": "steps", "save_steps": 3}
        if scenario.endswith("within_a_rollout_batch"):
            changes |= {"num_iterations": 2}
    start = AtStart()
    trainer = start.trainer = tiny.trainer(folder, callbacks=[start], **changes)
    trainer.at_start = start
    if not scenario.startswith(("sampled", "save", "resume")):
        fixed_rollouts(trainer)
    if scenario in ("siblings", "sampled_self_critique"):
        trainer.seen = seen
    return trainer


def main(scenario, folder):
    state = PartialState(cpu=True)
    rank, world = state.process_index, state.num_processes
    result = {"error": None}
    try:
        trainer = build(scenario, f"{folder}/run", rank, world)
        trainer.train(resume_from_checkpoint=f"{folder}/run/checkpoint-3" if scenario.startswith("resume") else None)
        result |= progress(trainer) | {
            "at_start": trainer.at_start.found,
            "weights": tiny.weights(trainer),
            "log": [
                {k: v for k, v in row.items() if isinstance(v, (int, float))} for row in trainer.state.log_history
            ],
            "seen": getattr(trainer, "seen", None),
            "average": dict(trainer.teacher.average.weights) if trainer.args.teacher == "ema" else None,
            "adapter": trainer.teacher.state_dict().get("adapter"),
            "initial": dict(trainer.prior.initial.weights) if trainer.args.prior == "fixed" else None,
        }
    except Exception:
        result["error"] = traceback.format_exc()
        raise
    finally:
        torch.save(result, f"{folder}/world{world}_rank{rank}.pt")
    # Threads of the group that still run when the interpreter ends can abort a process that has done its work
    state.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
