"""The demo's task: sums of two one-digit numbers from reasoning-gym's `chain_sum`, asked in plain words."""

from __future__ import annotations

import re
from typing import Any

import reasoning_gym
from datasets import Dataset


HELD_OUT = 24  # problems
END = 2  # the id of SmolLM2's <|im_end|>


def load() -> tuple[Dataset, Dataset]:
    """
    Training and held-out problems, with columns `prompt` (conversation), `problem` and `answer`.

    A problem and its mirror image (4 + 7, 7 + 4) are on the same side of the split.
    """
    generator = reasoning_gym.create_dataset(
        "chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1, allow_negation=False, size=2000, seed=0
    )
    sums: dict[frozenset, dict[str, str]] = {}
    for item in generator:
        problem = re.search(r"\d+ \+ \d+", item["question"])
        if problem:
            pair = frozenset(problem[0].split(" + "))
            sums.setdefault(pair, {})[problem[0]] = item["answer"]
    # reasoning-gym draws at random with its seed, so the order of first appearance is a fixed random order
    pairs = list(sums.values())
    held_out: list[dict[str, Any]] = []
    train: list[dict[str, Any]] = []
    for pair in pairs:
        rows = held_out if len(held_out) < HELD_OUT else train
        rows += [{"prompt": prompt(p), "problem": p, "answer": a} for p, a in pair.items()]
    return Dataset.from_list(train), Dataset.from_list(held_out)


def prompt(problem: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": f"What is {problem}?"},
    ]


def extract(text: str) -> str | None:
    """The number after the first "=" or "is"; without either, the only number of the text; else no answer."""
    said = re.search(r"(?:=|\bis)\s*:?\s*(-?\d+)", text)
    if said:
        return said[1]
    numbers = re.findall(r"-?\d+", text)
    return numbers[0] if len(numbers) == 1 else None


def sum_reward(completions: list, answer: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """1 if the right number can be read from a completion that has come to its end, else 0."""
    return [
        float(extract(c[0]["content"]) == a and ids[-1] == END)
        for c, a, ids in zip(completions, answer, completion_ids, strict=True)
    ]


def sum_feedback(answer: list[str], problem: list[str], successes: list[bool], **kwargs: Any) -> list[str]:
    """
    Whether each answer was right, and what to say.

    A wrong result is not repeated: so small a model copies any number that it is shown.
    """
    return [
        f'Your answer was {"right" if success else "wrong or too long"}. Say only "{p} = {a}."'
        for a, p, success in zip(answer, problem, successes, strict=True)
    ]
