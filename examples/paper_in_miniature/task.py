"""
Tasks with a hidden rule: what the model is to learn, and the feedback that says what it should have said.

A question is a few letters, an answer `length` symbols. The rule between them is drawn from the run's seed, so that no
base model can know it, and is made of tables over letters, so that what was learned on the training problems answers
held-out ones. Texts are words with spaces between them, one token each:

    question          cipher a n =
    answer            3¹ 5²
    feedback          ✗ 3¹ 5²           (✓ after a success)
    teacher's prompt  ✗ 3¹ 5² cipher a n =

A symbol's word says at which place it stands, so that even so small a model doesn't forget the form of an answer when
it learns quickly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from vpd_trl.feedback import Feedback, Rollout, SiblingFeedback


DOMAINS = ("cipher", "shift", "mirror", "facts")
RIGID = "chain"
KNOWN = {domain: f"old-{domain}" for domain in DOMAINS}  # questions whose rules the base model knows
MAX_SYMBOLS = 8  # of the answers' alphabet
MAX_LENGTH = 4  # of an answer
LETTERS = "abcdefghijklmnop"
PLACES = "¹²³⁴"
RIGHT, WRONG = "✓", "✗"

TRAINING, HELD_OUT = 192, 64  # problems

# Fields of VPDConfig. What stands right before the completion is the same for student and teacher: the question
TEACHER_TEMPLATE = "{solution}{critique}{prompt}"
SOLUTION_TEMPLATE = "given {solution} "
CRITIQUE_TEMPLATE = "{critique} "
CRITIC_TEMPLATE = "judge {prompt} {attempt} ; {answer} :"  # of SelfCritiqueFeedback

Rule = Callable[[Sequence[str]], list[int]]


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str


def words(symbols: Sequence[int]) -> str:
    return " ".join(f"{symbol}{place}" for symbol, place in zip(symbols, PLACES, strict=False))


def symbols_of(answer: str) -> list[int]:
    return [int(word[0]) for word in answer.split()]


def question(domain: str, letters: Sequence[str]) -> str:
    return " ".join([domain, *letters, "="])


def alphabets(domain: str, length: int, symbols: int) -> list[str]:
    """
    The letters that may stand at each place of a question.

    As many letters as make balanced tables: a multiple of `symbols`. A question has at least two letters: a single one
    would leave too few questions for a training set and a held-out one.
    """
    places = 2 if domain == "facts" else max(2, length)
    return [LETTERS[: len(LETTERS) // symbols * symbols]] * places


def hidden_rule(domain: str, length: int, symbols: int, seed: int) -> Rule:
    """
    The rule of a run: from a question's letters to the `length` symbols of its answer.

    - `cipher`: symbol i is letter i, substituted.
    - `shift`: symbol i is letter i's number plus a hidden offset of place i, modulo `symbols`.
    - `mirror`: as `cipher`, but of the letters from the last to the first.
    - `facts`: the symbols are taken in turn from a table of the first letter and one of the second.
    - `chain`: the first letter is substituted, then each symbol by a hidden successor, of which there are two tables;
      the second letter says which one holds. Whoever errs once has everything wrong from there on.

    Over all questions every symbol is as frequent as any other at each place, in each domain.
    """
    rng = random.Random(f"{domain} {length} {symbols} {seed}")

    def table(alphabet: str) -> dict[str, int]:
        values = [i % symbols for i in range(len(alphabet))]
        rng.shuffle(values)
        return dict(zip(alphabet, values, strict=True))

    places = alphabets(domain, length, symbols)
    if domain == "cipher":
        code = table(places[0])
        return lambda x: [code[letter] for letter in x[:length]]
    if domain == "shift":
        offsets = [rng.randrange(symbols) for _ in range(length)]
        return lambda x: [(LETTERS.index(a) + k) % symbols for a, k in zip(x, offsets, strict=False)]
    if domain == "mirror":
        code = table(places[0])
        return lambda x: [code[letter] for letter in reversed(x[:length])]
    if domain == "facts":
        tables = [table(places[i % 2]) for i in range(length)]
        return lambda x: [tables[i][x[i % 2]] for i in range(length)]
    if domain == RIGID:
        code, half = table(places[0]), table(places[1])
        successors = [rng.sample(range(symbols), symbols) for _ in range(2)]
        return lambda x: derivation(code[x[0]], successors[half[x[1]] % 2], length)
    raise ValueError(f"domain must be one of {(*DOMAINS, RIGID)}; got {domain!r}.")


def fill(template: str, **values: str) -> str:
    """The template with its fields filled in; no text of these tasks has braces in it."""
    for name, value in values.items():
        template = template.replace(f"{{{name}}}", value)
    return template


def derivation(first: int, successor: Sequence[int], length: int) -> list[int]:
    steps = [first]
    while len(steps) < length:
        steps.append(successor[steps[-1]])
    return steps


def problems(domain: str, length: int, symbols: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """
    Training and held-out problems of a run, without a common question.

    Every letter of a held-out question is seen in training at the same place.
    """
    if not 1 <= length <= MAX_LENGTH or not 2 <= symbols <= MAX_SYMBOLS:
        raise ValueError(f"length must be in 1..{MAX_LENGTH}, symbols in 2..{MAX_SYMBOLS}; got {length}, {symbols}.")
    rule = hidden_rule(domain, length, symbols, seed)
    places = alphabets(domain, length, symbols)
    rng = random.Random(f"questions {domain} {length} {symbols} {seed}")
    count = len(places[0]) ** len(places)
    if count <= 4096:
        drawn = list(product(*places))
        rng.shuffle(drawn)
    else:
        drawn = list(dict.fromkeys(tuple(map(rng.choice, places)) for _ in range(4 * (TRAINING + HELD_OUT))))
    made = [Problem(question(domain, x), words(rule(x))) for x in drawn[: TRAINING + HELD_OUT]]
    held_out = min(HELD_OUT, len(made) // 4)  # few symbols make few questions
    return made[held_out:], made[:held_out]


def exact_match(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """1 if the completion is the answer and nothing else, else 0."""
    return [float(c.split() == a.split()) for c, a in zip(completions, answer, strict=True)]


def blurred(answer: Sequence[int], symbols: int, noise: float, rng: random.Random) -> list[int]:
    """The symbols, each replaced by a random one with probability `noise` (by itself, too)."""
    return [rng.randrange(symbols) if rng.random() < noise else symbol for symbol in answer]


class EnvironmentFeedback:
    """
    What an environment says of each rollout: whether it was right, and what was expected.

    With `noise`, each stated symbol is a random one with that probability, anew for every rollout. In the domain
    `chain` the noise falls on the steps of the derivation, and the last one is always stated as it is: a critic that
    knows the result, and makes up a way to it. With `coverage` below 1 it says nothing of a random share of rollouts.
    """

    def __init__(self, domain: str, symbols: int, noise: float, seed: int, coverage: float = 1.0) -> None:
        self.domain, self.symbols, self.noise, self.seed = domain, symbols, noise, seed
        self.coverage = coverage

    def __call__(
        self, prompts: list[str], answer: list[str], successes: list[bool], trainer_state: Any, **kwargs: Any
    ) -> list[str | None]:
        stated: list[str | None] = []
        for i, (prompt, a, success) in enumerate(zip(prompts, answer, successes, strict=True)):
            rng = random.Random(f"{self.seed} {trainer_state.global_step} {i} {prompt}")
            expected = symbols_of(a)
            shown = blurred(expected, self.symbols, self.noise, rng)
            if self.domain == RIGID:
                shown[-1] = expected[-1]
            spoken_of = self.coverage == 1 or rng.random() < self.coverage
            stated.append(f"{RIGHT if success else WRONG} {words(shown)}" if spoken_of else None)
        return stated


class OtherSiblings(SiblingFeedback):
    """
    Siblings, but none that says what the rollout says itself.

    A question of this task has one right answer, so no success has such a sibling.
    """

    def __call__(self, siblings: list[list[Rollout]], texts: list[str], **kwargs: Any) -> list[Feedback | None]:
        shown = super().__call__(siblings, **kwargs)
        return [
            None if feedback is None or feedback.solution == text else feedback
            for feedback, text in zip(shown, texts, strict=True)
        ]
