"""A tokenizer, a model, a data set and a task small enough to train within a test."""

from __future__ import annotations

import random
import warnings
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from vpd_trl import VPDConfig, VPDTrainer


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


# Of a network
SHAPE = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=512,
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Characters as tokens, and the special tokens of ChatML. "he" and "llo" decode to what "hello" is one id for."""
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    characters = [chr(c) for c in range(32, 127)] + ["\n", "é", "ü"]
    words = ["he", "llo", "hello"]
    vocab = {token: i for i, token in enumerate(special + characters + words)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split(__import__("tokenizers").Regex(r"hello|[\s\S]"), "isolated")
    inner.decoder = __import__("tokenizers").decoders.Fuse()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|endoftext|>"],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tok.chat_template = CHAT_TEMPLATE
    return tok


def model(tok: PreTrainedTokenizerFast, *, seed: int = 0, **changes: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = dict(
        vocab_size=len(tok),
        **SHAPE,
        tie_word_embeddings=True,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(Qwen3Config(**{**config, **changes}))


def dataset(n: int = 32, *, conversational: bool = False, **columns: Any) -> Dataset:
    rng = random.Random(0)
    prompts: list[Any] = [f"{rng.randint(0, 9)}+{rng.randint(0, 9)}=" for _ in range(n)]
    answer = [str(eval(p[:-1])) for p in prompts]
    if conversational:
        prompts = [[{"role": "user", "content": p}] for p in prompts]
    return Dataset.from_dict({"prompt": prompts, "answer": answer, **columns})


def parity_reward(completion_ids, **kwargs):
    """About half of an untrained model's rollouts succeed, and which ones depends on their ids alone."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def answer_feedback(answer, **kwargs):
    return [f"The answer is {a}." for a in answer]


def config(output_dir, **changes: Any) -> VPDConfig:
    values = dict(
        output_dir=str(output_dir),
        per_device_train_batch_size=4,
        num_generations=4,
        gradient_accumulation_steps=2,
        max_completion_length=6,
        max_steps=3,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        e_step_frequency=2,
        seed=1,
        disable_tqdm=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return VPDConfig(**{**values, **changes})


def trainer(output_dir, *, tok=None, mdl=None, data=None, **changes: Any) -> VPDTrainer:
    """A trainer on the tiny model; `changes` go to the trainer by name, or else to its config."""
    names = ("feedback_fn", "reward_funcs", "peft_config", "teacher_peft_config", "eval_dataset", "callbacks")
    names += ("optimizers", "tools", "environment_factory", "quantization_config", "evaluation")
    arguments = {name: changes.pop(name) for name in list(changes) if name in names}
    arguments = {"reward_funcs": parity_reward, "feedback_fn": answer_feedback, **arguments}
    tok = tok or tokenizer()
    return VPDTrainer(
        model=mdl if mdl is not None else model(tok),
        args=config(output_dir, **changes),
        train_dataset=dataset() if data is None else data,
        processing_class=tok,
        **arguments,
    )


def weights(trainer_or_model: Any) -> dict[str, torch.Tensor]:
    module = trainer_or_model if isinstance(trainer_or_model, torch.nn.Module) else trainer_or_model.model
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# Fields of GRPOConfig that `config` sets
SET_BY_TESTS = (
    "output_dir",
    "per_device_train_batch_size",
    "num_generations",
    "gradient_accumulation_steps",
    "max_completion_length",
    "learning_rate",
    "logging_steps",
    "save_strategy",
    "report_to",
    "bf16",
    "use_cpu",
    "gradient_checkpointing",
    "seed",
    "disable_tqdm",
)
