"""
What an evaluation samples with: the settings, and the form of an engine.

An engine turns prompts into completions. It is all that an evaluation knows of a model, so a test's or a user's own can
be a dozen lines.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..prompts import Prompt


@dataclass(frozen=True)
class Sampling:
    """
    How completions are sampled. The defaults are the paper's evaluation; a model's own generation config has no say.

    Attributes:
        temperature: At least 0; 0 takes the most likely token.
        top_p: Smallest set of tokens with at least this probability is sampled from, in (0, 1].
        top_k: Most likely tokens that are sampled from; 0: all.
        min_p: Least probability of a token, relative to the most likely one's, in [0, 1]; 0: any.
        repetition_penalty: Above 0; 1 is none.
        max_new_tokens: Longest completion in tokens. The paper's length.
        seed: Of the samples. The same seed gives the same samples on the same engine.
        chat_template_kwargs: Passed to the chat template of conversations. By default thinking is off in templates that
            know `enable_thinking`.

    Raises:
        ValueError: If a value is out of its range.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 8192
    seed: int = 0
    chat_template_kwargs: dict[str, Any] = field(default_factory=lambda: {"enable_thinking": False})

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number; got {value!r}.")
        ranges = {
            "temperature": ("a finite number, at least 0", 0 <= self.temperature < math.inf),
            "top_p": ("a number in (0, 1]", 0 < self.top_p <= 1),
            "top_k": ("a whole number, at least 0", self.top_k >= 0 and self.top_k == int(self.top_k)),
            "min_p": ("a number in [0, 1]", 0 <= self.min_p <= 1),
            "repetition_penalty": ("a finite number above 0", 0 < self.repetition_penalty < math.inf),
            "max_new_tokens": (
                "a whole number, at least 1",
                self.max_new_tokens >= 1 and self.max_new_tokens == int(self.max_new_tokens),
            ),
            "seed": ("a whole number, at least 0", self.seed >= 0 and self.seed == int(self.seed)),
        }
        for name, (allowed, ok) in ranges.items():
            if not ok:
                raise ValueError(f"{name} must be {allowed}; got {getattr(self, name)!r}.")

    def problem_seed(self, index: int) -> int:
        """
        The seed of a problem's samples, below 2³².

        It depends on the problem's place in the data set alone: not on which ones were sampled before, nor on how many
        processes share the work.
        """
        return int(np.random.SeedSequence([self.seed, index]).generate_state(1)[0])


class Sample(NamedTuple):
    """
    One completion.

    Attributes:
        text: Its text, without special tokens.
        ids: Its token ids, up to and including the end-of-sequence token.
        finished: Whether the model ended it itself. False where it ran into a limit, and, with an empty text, where the
            prompt leaves no room in the model's context.
    """

    text: str
    ids: list[int]
    finished: bool


class Engine(Protocol):
    """
    What an evaluation samples with.

    Attributes:
        batch_size: Samples that it is best given at a time. An evaluation saves its results after each such portion.
        collective: Whether all processes must call `generate` equally often, with equally many prompts. Only looked at
            when an evaluation runs on several processes.
    """

    batch_size: int
    collective: bool

    def describe(self) -> dict[str, Any]:
        """What identifies the model and the engine, as JSON values: results of others are not resumed."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], *, k: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Sample]]:
        """
        Sample k completions of each prompt.

        Args:
            prompts: Strings or conversations.
            k: Completions per prompt.
            sampling: The settings.
            seeds: One per prompt. The same seed should give the same samples of a prompt, whatever it is asked with.
        """
        ...


def encode_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], sampling: Sampling, *, chat_template: str | None = None
) -> list[list[int]]:
    """
    Token ids of prompts as a trainer makes them: conversations through the chat template, strings as they are.

    Args:
        tokenizer: The tokenizer.
        prompts: Strings or conversations.
        sampling: Has the chat template's keywords.
        chat_template: Instead of the tokenizer's own.

    Raises:
        ValueError: If a conversation comes without a chat template, or a message holds something else than text.
    """
    return [_encode(tokenizer, prompt, sampling.chat_template_kwargs, chat_template) for prompt in prompts]


def _encode(tokenizer: Any, prompt: Prompt, template_kwargs: dict[str, Any], chat_template: str | None) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt)["input_ids"])
    for message in prompt:
        content = message.get("content")
        kinds = {part.get("type") for part in content} if isinstance(content, list) else set()
        if kinds - {"text"}:
            raise ValueError(f"Only text can be evaluated; a message has parts of type {sorted(map(str, kinds))}.")
    if chat_template is None and not tokenizer.chat_template:
        raise ValueError(
            "The prompts are conversations, but the tokenizer has no chat template. Use an instruct model, set "
            "tokenizer.chat_template, or evaluate on prompts that are strings."
        )
    encoded = tokenizer.apply_chat_template(
        prompt,
        chat_template=chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **template_kwargs,
    )
    return list(encoded["input_ids"])


def template_digest(tokenizer: Any) -> str:
    """A short digest of a tokenizer's chat template, which decides what a model is shown."""
    return hashlib.sha256(str(getattr(tokenizer, "chat_template", None)).encode()).hexdigest()[:16]
