"""Started by test_kill.py: train the tiny model, say on standard output what is being done, and resume where asked."""

import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers.trainer
from peft import LoraConfig

from tests import tiny


torch.set_num_threads(1)

SCENARIOS = {
    "shared": {},
    "ema_and_fixed_prior": {"teacher": "ema", "prior": "fixed"},
    "lora": {"teacher": "lora", "teacher_peft_config": LoraConfig(r=2, target_modules="all-linear")},
    "within_rollout_batches": {"num_iterations": 2, "steps_per_generation": 2},
}


def announced(function, phase):
    def wrapped(*args, **kwargs):
        print(phase, flush=True)
        return function(*args, **kwargs)

    return wrapped


def main(scenario, folder):
    trainer = tiny.trainer(
        folder,
        max_steps=8,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        e_step_frequency=1,
        lr_scheduler_type="linear",
        **SCENARIOS[scenario],
    )
    trainer._generate = announced(trainer._generate, "generation")
    trainer.e_step.run = announced(trainer.e_step.run, "e_step")
    trainer.training_step = announced(trainer.training_step, "m_step")
    trainer._save_checkpoint = announced(trainer._save_checkpoint, "saving")
    transformers.trainer.rotate_checkpoints = announced(transformers.trainer.rotate_checkpoints, "deleting")
    earlier = any(Path(folder).glob("checkpoint-*/trainer_state.json"))
    print("ready", flush=True)
    try:
        trainer.train(resume_from_checkpoint=earlier)
    except ValueError as error:
        if "no checkpoint that is whole" not in str(error):
            raise
        trainer.train()
    torch.save(
        {"weights": tiny.weights(trainer), "teacher": trainer.teacher.state_dict(), "step": trainer.state.global_step},
        Path(folder) / "end.pt",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
