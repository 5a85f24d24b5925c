"""What the benchmarks have in common: models with random weights, questions, and four trainers on the same rollouts."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from vpd_trl import VPDConfig, VPDTrainer
from vpd_trl.prior import make_prior


QWEN3_VOCABULARY = 151_936
WORDS = 1000


def tokenizer() -> PreTrainedTokenizerFast:
    """Numbers as words, so that the lengths of texts are known."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *map(str, range(WORDS))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", padding_side="left", model_max_length=100_000
    )


def model(
    *, vocabulary: int = WORDS + 2, hidden: int = 256, layers: int = 4, seed: int = 0, dtype: str = "float32"
) -> Qwen3ForCausalLM:
    """A model of Qwen3's form with random weights."""
    torch.manual_seed(seed)
    heads = max(hidden // 64, 1)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 2, 1),
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).to(getattr(torch, dtype))


def questions(n: int, *, coverage: float = 1.0, prompt: int = 40, feedback: int = 60, seed: int = 0) -> Dataset:
    """
    Questions of random words.

    Args:
        n: How many.
        coverage: Share of them that there is feedback for.
        prompt: Longest prompt in words; the shortest has a quarter of that.
        feedback: Longest feedback in words.
        seed: Of the draw.
    """
    draw = random.Random(seed)

    def words(longest: int) -> str:
        return " ".join(str(draw.randrange(WORDS)) for _ in range(draw.randint(max(longest // 4, 1), longest)))

    contexts = [words(feedback) if i < coverage * n else None for i in range(n)]
    draw.shuffle(contexts)
    return Dataset.from_dict({"prompt": [words(prompt) for _ in range(n)], "privileged_context": contexts})


def told(privileged_context: list[str | None], **kwargs: Any) -> list[str | None]:
    return privileged_context


def half(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """About half of the rollouts succeed, and which ones depends on their tokens alone."""
    return [float(sum(ids) % 2) for ids in completion_ids]


# The same teacher's prompts for both: the question, and then what was fed back
_OURS = {"teacher_template": "{prompt}{solution}{critique}", "critique_template": " {critique}"}
_THEIRS = {
    "reprompt_template": "{prompt}{solution}{feedback}",
    "feedback_template": " {feedback_raw}",
    "include_environment_feedback": True,
    "use_successful_as_teacher": False,
}


def trainer(kind: str, network: Any, data: Dataset, folder: Path, *, feedback_fn: Any = None, **changes: Any) -> Any:
    """
    A trainer on the CPU in float32.

    Args:
        kind: "vpd", "sdpo" (ours), "trl sdpo" or "trl grpo".
        network: The model.
        data: The questions.
        folder: For what it writes.
        feedback_fn: `None`: tells what the questions hold.
        **changes: Fields of its configuration.
    """
    fields: dict[str, Any] = dict(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=8,
        num_generations=8,
        learning_rate=1e-6,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    fields |= changes
    common = {"model": network, "train_dataset": data, "processing_class": tokenizer(), "reward_funcs": half}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "trl sdpo":
            fields = {"distillation_mode": "full_logits", "teacher_model_kind": "live", **_THEIRS, **fields}
            return SDPOTrainer(args=SDPOConfig(**fields), **common)
        if kind == "trl grpo":
            return GRPOTrainer(args=GRPOConfig(**fields), **common)
        fields = {"method": kind, "divergence": "reverse_kl", "teacher_temperature": 1.0, **_OURS, **fields}
        return VPDTrainer(args=VPDConfig(**fields), feedback_fn=feedback_fn or told, **common)


def rollouts_of_mixed_length(longest: int, seed: int = 0) -> Callable[[int, int], list[list[int]]]:
    """Completions of 1 to `longest` tokens: the same for each trainer, given the batch's number and size."""

    def draw(batch: int, n: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed + batch)
        lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
        return [torch.randint(2, WORDS, (length,), generator=generator).tolist() for length in lengths]

    return draw


def without_passes(made: Any) -> Any:
    """
    The trainer of `vpd` as after its first E-step, with a running reward shift and with vLLM's numbers as the prior.

    Its configuration asks for vLLM then, which isn't needed to count operations.
    """
    made.args.prior = "sampling"
    made.prior = make_prior(made)
    made.e_step.shift.value = 0.0
    return made


def with_rollouts(made: Any, completions: Callable[[int, int], list[list[int]]]) -> Any:
    """The trainer, with given completions instead of sampled ones."""
    batches = iter(range(10**9))
    if isinstance(made, VPDTrainer) and made.args.prior == "sampling":

        def sampled(prompt_ids: list, *args: Any, **kwargs: Any) -> tuple[list, list]:
            drawn = completions(next(batches), len(prompt_ids))
            return drawn, [[0.0] * len(ids) for ids in drawn]

        made._generate_single_turn = sampled
        return made
    if isinstance(made, SDPOTrainer):
        made._generate = lambda prompt_ids: (prompt_ids, completions(next(batches), len(prompt_ids)))
    else:
        made._generate_single_turn = lambda prompt_ids, *args, **kwargs: (
            completions(next(batches), len(prompt_ids)),
            None,
        )
    return made
