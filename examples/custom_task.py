"""
A task of your own: questions about units, with a reward and feedback that know the answer.

`vpd-trl train --task examples/custom_task.py:UnitQuestions ...`, `load_task("examples/custom_task.py:UnitQuestions")`
"""

import random

from datasets import Dataset

from vpd_trl.rewards import choice_reward, extract_choice
from vpd_trl.tasks import Task


UNITS = [("km", "m", 1000), ("m", "cm", 100), ("kg", "g", 1000), ("h", "min", 60), ("min", "s", 60), ("cm", "mm", 10)]


class UnitQuestions(Task):
    """What a length, mass or time is in a smaller unit, of four choices; four fifths of the questions train."""

    name = "units"
    samples = 4  # completions of each question in an evaluation
    feedback_source = "environment"
    reward_funcs = choice_reward  # 1 if the completion settles on the letter in the column `answer`
    answer_fn = staticmethod(extract_choice)  # for majority@k

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def load(self, split: str) -> Dataset:
        self._check_split(split)
        draw = random.Random(self.seed)
        questions = [(number, *unit) for number in range(2, 20) for unit in UNITS]
        draw.shuffle(questions)
        rows = [self.row(draw, *question) for question in questions]
        fifth = len(rows) // 5
        return Dataset.from_list(rows[fifth:] if split == "train" else rows[:fifth])

    def row(self, draw: random.Random, number: int, unit: str, small: str, factor: int) -> dict:
        right = number * factor
        numbers = draw.sample([right, right * 10, right // 10, right + factor], 4)
        options = "\n".join(f"{letter}: {n} {small}" for letter, n in zip("ABCD", numbers, strict=True))
        question = f"How many {small} are {number} {unit}?\n{options}\nAnswer with one letter."
        why = f"1 {unit} is {factor} {small}, so {number} {unit} are {right} {small}"
        answer = "ABCD"[numbers.index(right)]
        return {"prompt": [{"role": "user", "content": question}], "answer": answer, "why": why}

    @property
    def environment_feedback(self):
        return explain


def explain(answer: list[str], why: list[str], successes: list[bool], **columns) -> list[str]:
    """One text for each completion, of successes too: the E-step learns from the difference."""
    return [
        f"{'Right' if ok else 'Wrong'}: the answer is {a}, as {w}."
        for a, w, ok in zip(answer, why, successes, strict=True)
    ]
