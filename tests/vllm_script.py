"""Started by test_vllm.py: train a tiny model with rollouts of a real vLLM in this process, and compare the two."""

import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from trl.generation.vllm_client import VLLMClient
from vllm import SamplingParams

from tests import tiny
from vpd_trl import VPDTrainer
from vpd_trl.batch import concatenated, loss_mask
from vpd_trl.evaluation import Evaluation, Sampling
from vpd_trl.feedback import SelfCritiqueFeedback


SMALL = {"r": 4, "target_modules": "all-linear"}
SCENARIOS = {
    "shared": {"feedback_fn": [SelfCritiqueFeedback(success_message="Right."), tiny.answer_feedback]},
    "lora_teacher": {"teacher": "lora", "teacher_peft_config": LoraConfig(**SMALL)},
    "lora_student_and_teacher": {
        "teacher": "lora",
        "teacher_peft_config": LoraConfig(**SMALL),
        "peft_config": LoraConfig(**SMALL),
    },
    "ema": {"teacher": "ema", "prior": "fixed"},
    # The rollouts of a step come after an E-step of the same step, which TRL's counter of steps doesn't see
    "two_batches_in_a_step": {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
    # At a temperature, of which vLLM must say the samples' log-probabilities
    "sampling_prior": {"prior": "sampling", "reward_shift": "running", "temperature": 0.7},
    "server": {
        "vllm_mode": "server",
        "vllm_server_base_url": os.environ.get("VLLM_URL"),
        "feedback_fn": [SelfCritiqueFeedback(success_message="Right."), tiny.answer_feedback],
    },
}


def save_model(folder):
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(f"{folder}/model")
    # vLLM's attention on a CPU wants heads of a common size
    tiny.model(tokenizer, head_dim=64, max_position_embeddings=4096).save_pretrained(f"{folder}/model")


def send_weights_by_file(folder):
    """In the place of NCCL, which no CPU has: a file that the server's workers read (vllm_worker.py)."""

    def update(client, metadata, named):
        weights = {name: value.detach().clone().contiguous() for name, value in named}
        assert [name for name, _, _ in metadata] == list(weights)
        save_file(weights, f"{folder}/sent.safetensors")
        client._post(
            f"{client.base_url}/collective_rpc", json={"method": "load_file", "args": [f"{folder}/sent.safetensors"]}
        )

    VLLMClient.init_communicator = lambda client, device: None
    VLLMClient.update_named_params = update


def build(scenario, folder):
    save_model(folder)
    send_weights_by_file(folder)
    changes = {
        "max_steps": 3,
        "learning_rate": 3e-2,  # so that the weights before an update can't be taken for those behind it
        "lr_scheduler_type": "constant",
        "e_step_frequency": 1,
        "max_completion_length": 12,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": 2048,
        "vllm_gpu_memory_utilization": 0.1,
        "model_init_kwargs": {"dtype": "float32"},
        "teacher_temperature": 1.0,
        "feedback_fn": tiny.answer_feedback,
        **SCENARIOS[scenario],
    }
    names = ("feedback_fn", "peft_config", "teacher_peft_config")
    arguments = {name: changes.pop(name) for name in names if name in changes}
    evaluation = Evaluation(tiny.dataset(3), tiny.parity_reward, k=2, sampling=Sampling(max_new_tokens=4))
    return VPDTrainer(
        model=f"{folder}/model",
        reward_funcs=tiny.parity_reward,
        args=tiny.config(f"{folder}/run", eval_strategy="steps", eval_steps=3, **changes),
        train_dataset=tiny.dataset(conversational=scenario in ("shared", "server")),
        evaluation=evaluation,
        **arguments,
    )


def distance(sampled, logps, mask):
    return (sampled - logps).abs()[mask].mean().item()  # a rare token alone can be far off in bfloat16


def main(scenario, folder):
    trainer = build(scenario, folder)
    records, seen = [], {}
    initial = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    score = trainer._generate_and_score_completions

    def compared(inputs):
        batch = score(inputs)
        if trainer.model.training:
            mask = batch["completion_mask"].bool()
            sampled = batch["sampling_per_token_logps"]
            plain = {**batch, "teacher_prompt_ids": batch["prompt_ids"], "teacher_prompt_mask": batch["prompt_mask"]}
            with trainer.teacher.target_context():
                teacher = trainer.scorer.frozen_logps(plain, teacher=True)
            record = {"student": distance(sampled, trainer.scorer.frozen_logps(batch), mask)}
            record |= {"teacher": distance(sampled, teacher, mask), "tokens": int(mask.sum())}
            # What was sampled from one update earlier would look like
            for name, weights in seen.items():
                now = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
                trainer.model.load_state_dict(weights, strict=False)
                record[name] = distance(sampled, trainer.scorer.frozen_logps(batch), mask)
                trainer.model.load_state_dict(now, strict=False)
            records.append(record)
        return batch

    run, priors = trainer.e_step.run, []

    def noted(micro_batches, **kwargs):
        if trainer.args.prior == "sampling":
            rows = concatenated(micro_batches)
            (prior,) = trainer.prior.logps([rows], fresh=True)
            priors.append(distance(prior, trainer.scorer.frozen_logps(rows), loss_mask(rows).bool()))
        seen["before_e_step"] = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        return run(micro_batches, **kwargs)

    trainer._generate_and_score_completions = compared
    trainer.e_step.run = noted
    seen["initial"] = initial
    trainer.train()
    log = [{k: v for k, v in row.items() if isinstance(v, (int, float))} for row in trainer.state.log_history]
    final = max(at_the_end(trainer)) if trainer.vllm_mode == "colocate" else None
    torch.save({"records": records, "priors": priors, "final": final, "log": log}, f"{folder}/result.pt")


def at_the_end(trainer):
    """By what the log-probabilities of prompts differ between vLLM and the student."""
    trainer.vllm_generation.sync_weights()
    prompts = trainer._tokenize_prompts([row["prompt"] for row in tiny.dataset(4)])[0]
    greedy = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    outputs = trainer.vllm_generation.llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy)
    trainer.model.eval()
    final = []
    for ids, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            logps = trainer.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        final += [
            abs(entry[token].logprob - logps[i, token].item())
            for i, (token, entry) in enumerate(zip(ids[1:], output.prompt_logprobs[1:], strict=True))
        ]
    return final


if __name__ == "__main__":
    main(*sys.argv[1:])
