"""
The base model: it knows the form of answers and follows feedback imperfectly, and knows no rule.

A Qwen3 of about 0.1 M parameters is pre-trained on random answers without feedback, on answers that repeat each symbol
of the feedback with probability `skill`, and on critiques that name each symbol of a reference answer with the same
probability. `skill=0` is a model that can't read feedback at all.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from . import task
from .task import fill


CACHE = Path(__file__).parent / "cache"
IGNORED = -100
FENCE = "```"  # around the attempt, as SelfCritiqueFeedback shows it


@dataclass(frozen=True)
class Base:
    """Settings of a base model; they name its folder in the cache."""

    length: int = 2
    skill: float = 0.5
    symbols: int = 8
    known: float = 0.5
    seed: int = 0
    steps: int = 900
    batch_size: int = 128
    learning_rate: float = 3e-3
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4

    @property
    def folder(self) -> Path:
        # The texts too, so that a cached model never outlives a change of the task
        texts = [example(self, random.Random(i)) for i in range(200)]
        key = hashlib.sha256(json.dumps([asdict(self), texts], sort_keys=True).encode()).hexdigest()[:10]
        return CACHE / f"base-length{self.length}-skill{self.skill:g}-seed{self.seed}-{key}"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    special = ["<pad>", "<eos>", "<unk>"]
    marks = ["=", ";", ":", task.RIGHT, task.WRONG, "given", "judge", FENCE]
    symbols = [f"{symbol}{place}" for place in task.PLACES for symbol in range(task.MAX_SYMBOLS)]
    vocabulary = [*special, *marks, *task.DOMAINS, task.RIGID, *task.KNOWN.values(), *task.LETTERS, *symbols]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def new_model(settings: Base, vocabulary: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(settings.seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(vocabulary),
            hidden_size=settings.hidden_size,
            intermediate_size=4 * settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            head_dim=settings.hidden_size // settings.heads,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            eos_token_id=vocabulary.eos_token_id,
            pad_token_id=vocabulary.pad_token_id,
            bos_token_id=None,
        )
    )


def example(settings: Base, rng: random.Random) -> tuple[str, str]:
    """A prompt and its completion, as text: without feedback, with one of its forms, or a critique to write."""
    length, known = settings.length, rng.random() < settings.known
    domain = rng.choice(task.DOMAINS if known else (*task.DOMAINS, task.RIGID))
    letters = [rng.choice(place) for place in task.alphabets(domain, length, settings.symbols)]
    question = task.question(task.KNOWN[domain] if known else domain, letters)
    shown = random_answer(settings, length, rng)
    believed = known_rule(settings, domain)(letters) if known else random_answer(settings, length, rng)
    said = task.words([a if rng.random() < settings.skill else b for a, b in zip(shown, believed, strict=True)])
    kind = rng.choice(("alone", "alone", "critique", "solution", "critic"))
    if kind == "alone":
        return question, task.words(believed)
    if kind == "critic":
        attempt = f"{FENCE} {task.words(random_answer(settings, length, rng))} {FENCE}"
        asked = fill(task.CRITIC_TEMPLATE, prompt=question, attempt=attempt, answer=task.words(shown))
        return asked, f"{task.WRONG} {said}"  # only failures are criticised
    feedback = {"solution": "", "critique": ""}
    if kind == "critique" and rng.random() < 0.2:  # self-critique says no more than this of a success
        feedback["critique"] = fill(task.CRITIQUE_TEMPLATE, critique=task.RIGHT)
        said = task.words(believed)
    elif kind == "critique":
        mark = rng.choice((task.RIGHT, task.WRONG))
        feedback["critique"] = fill(task.CRITIQUE_TEMPLATE, critique=f"{mark} {task.words(shown)}")
    else:
        feedback["solution"] = fill(task.SOLUTION_TEMPLATE, solution=task.words(shown))
    return fill(task.TEACHER_TEMPLATE, prompt=question, **feedback), said


@functools.cache
def known_rule(settings: Base, domain: str) -> task.Rule:
    """What the base model knows of the world: a rule of each kind, for questions of another name."""
    return task.hidden_rule(domain, settings.length, settings.symbols, -1 - settings.seed)


def random_answer(settings: Base, length: int, rng: random.Random) -> list[int]:
    return [rng.randrange(settings.symbols) for _ in range(length)]


def pretrain(settings: Base) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    vocabulary = tokenizer()
    model = new_model(settings, vocabulary).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    # At a high rate nearly to the end: after a long decay, small updates make the model forget how answers end
    warm, cool = 30, settings.steps / 7
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm, (settings.steps - step) / cool)
    )
    rng = random.Random(settings.seed)
    for step in range(settings.steps):
        # Copying is learned much faster from faithful examples; how far to trust it, in the last third
        skilful = replace(settings, skill=1.0) if settings.skill > 0 and step < settings.steps * 2 / 3 else settings
        ids, labels = encode([example(skilful, rng) for _ in range(settings.batch_size)], vocabulary)
        logits = model(input_ids=ids, attention_mask=(ids != vocabulary.pad_token_id).long()).logits  # (B, T, V)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval(), vocabulary


def encode(pairs: list[tuple[str, str]], vocabulary: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (B, T), left-padded; only the completion and the end of text are learned."""
    prompts = vocabulary([prompt for prompt, _ in pairs])["input_ids"]
    completions = [[*ids, vocabulary.eos_token_id] for ids in vocabulary([c for _, c in pairs])["input_ids"]]
    longest = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids = torch.full((len(pairs), longest), vocabulary.pad_token_id)
    labels = torch.full((len(pairs), longest), IGNORED)
    for i, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        ids[i, longest - len(p) - len(c) :] = torch.tensor(p + c)
        labels[i, longest - len(c) :] = torch.tensor(c)
    return ids, labels


def load(settings: Base, attention: str = "sdpa") -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """The base model and its tokenizer from the cache, where it is put when it is first asked for."""
    folder = settings.folder
    if not folder.exists():
        model, vocabulary = pretrain(settings)
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        model.save_pretrained(unfinished)
        vocabulary.save_pretrained(unfinished)
        (unfinished / "settings.json").write_text(json.dumps(asdict(settings), indent=1) + "\n")
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster, with the same result
            shutil.rmtree(unfinished)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    return model, PreTrainedTokenizerFast.from_pretrained(folder)
