"""Started by tests/matrix.py: one cell of the matrix of methods and engines, in one or several processes."""

import os
import sys
import traceback
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig

from tests import tiny
from tests.distributed_script import fixed_rollouts


torch.set_num_threads(1)

# The learning rate changes with each step, and the E-step's is another: steps at a wrong rate, or that count as the
# student's, end in other weights. Not AdamW, which would hide gradients of a wrong scale
COMMON = {
    "optim": "sgd",
    "learning_rate": 0.4,
    "lr_scheduler_type": "linear",
    "max_steps": 4,
    "max_grad_norm": 1e3,
    "e_step_frequency": 2,
    "shuffle_dataset": False,
}
METHODS = {
    "vpd": {"e_step_learning_rate": 0.6},
    "vpd-lora-teacher": {"teacher": "lora", "e_step_learning_rate": 0.6, "teacher_peft_config": "lora"},
    "sdpo-ema": {"method": "sdpo", "teacher": "ema", "teacher_update_rate": 0.3},
    "joint-loss": {
        "method": "joint_loss",
        "loss_type": "dapo",
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "vpd-ema-fixed-prior": {"teacher": "ema", "teacher_update_rate": 0.3, "prior": "fixed"},
}
PHASES = ("whole", "saved", "resumed", "no_feedback_on_one", "no_success_on_one")
LORA = {"peft_config": "lora", "learning_rate": 2.0, "gradient_checkpointing": True}
FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.float32,
    bnb_4bit_quant_storage=torch.float32,  # FSDP can split no integers
)
STUDENTS = {
    "full": {},
    "lora": LORA,
    "qlora": {**LORA, "quantization_config": FOUR_BITS},
    "lora-stored": {**LORA, "gradient_checkpointing": False},
}


def pretend_that_cpus_are_accelerators():
    """
    Let accelerate take the paths of several GPUs on CPUs, with gloo.

    It takes those of FSDP and DeepSpeed on accelerators alone, and falls back to DDP elsewhere without a word.
    """
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def full_weights(model):
    """All weights of a model that may be sharded, on every process."""
    weights = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            weights[name] = parameter.full_tensor().detach().clone()
        elif hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().clone()
        else:
            weights[name] = parameter.detach().clone()
    return weights


def build(method, student, model, folder, world, **more):
    changes = {**COMMON, **METHODS[method], **STUDENTS[student], **more}
    for name in ("peft_config", "teacher_peft_config"):
        if changes.get(name) == "lora":
            changes[name] = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
    changes["per_device_train_batch_size"] = 8 // world
    changes["use_cpu"] = os.environ.get("ACCELERATE_TORCH_DEVICE") != "cpu"
    # From a folder, as most users load models: under ZeRO-3 weights are sharded from then on
    trainer = tiny.trainer(folder, mdl=model, **changes)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:  # on 4 bits; too coarse to compare runs by
            parameter.data = parameter.data.float()
    fixed_rollouts(trainer)
    return trainer


def outcome(trainer):
    rows = [{k: v for k, v in row.items() if isinstance(v, (int, float))} for row in trainer.state.log_history]
    return {
        "weights": full_weights(trainer.accelerator.unwrap_model(trainer.model_wrapped)),
        "adapter": {k: v.clone() for k, v in trainer.teacher.state_dict().get("adapter", {}).items()},
        "log": [row for row in rows if "loss" in row],
        "wrapper": type(trainer.model_wrapped).__name__,
        "distributed_type": str(trainer.accelerator.distributed_type),
    }


def changes_of(phase, rank, world):
    """What a phase changes in the cell's configuration."""
    if phase == "whole":
        return {}
    if phase in ("saved", "resumed"):  # an optimizer with a state
        return {
            "optim": "adamw_torch",
            "learning_rate": 1e-3,
            "e_step_learning_rate": None,
            "save_strategy": "steps",
        } | {"save_steps": 2}
    if phase == "no_feedback_on_one":
        return {"max_steps": 1, "feedback_fn": lambda prompts, **k: [None if rank else "text"] * len(prompts)}
    assert phase == "no_success_on_one"
    reward = lambda prompts, **k: [float(rank == 0 and i % 2) for i in range(len(prompts))]  # noqa: E731
    return {"max_steps": 1, "reward_funcs": reward}


def run(method, student, model, folder, rank, world, save):
    results = {}
    for phase in PHASES if world > 1 else PHASES[:1]:
        save(results | {"error": f"ended in phase {phase}"})
        trainer = build(method, student, model, f"{folder}/{phase}", world, **changes_of(phase, rank, world))
        trainer.train(resume_from_checkpoint=f"{folder}/saved/checkpoint-2" if phase == "resumed" else None)
        results[phase] = outcome(trainer)
        trainer.accelerator.free_memory()
        AcceleratorState._reset_state()
    save(results | {"error": None})


def main(engine, cells, folder):
    """`cells` is "method/student,…". Results are written cell by cell, so that a crash loses no more than one."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if engine in ("fsdp2", "zero2", "zero3"):
        pretend_that_cpus_are_accelerators()
    else:
        PartialState(cpu=True)
    for cell in cells.split(","):
        method, student = cell.split("/")
        path, last = f"{folder}/{method}_{student}_{rank}_of_{world}.pt", {}

        def save(results, path=path, last=last):
            last.update(results)
            torch.save(results, path)

        try:
            run(method, student, f"{folder}/model", f"{folder}/{method}_{student}_of_{world}", rank, world, save)
        except BaseException:
            save(last | {"error": traceback.format_exc()})
            raise
    # Threads of the group that still run when the interpreter ends can abort a process that has done its work
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
