"""
From a prompt and its feedback to the teacher's prompt.

The teacher reads the student's prompt with the feedback filled in, then scores the very token ids that the student
sampled. This module makes the first part: it never sees a completion's ids, so it can't re-encode them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .feedback.base import Feedback
from .text import CUT_MARKER, SpecialTokens, last_user_turn, strip_thinking, text_of, with_text


Prompt = str | list[dict[str, Any]]

CONVERSATION_TEMPLATE = "{prompt}{solution}{critique}\n\nNow solve the original question correctly."
# The context comes first here: what stands right before the completion must be the student's own prompt
STRING_TEMPLATE = "{solution}{critique}\n\n{prompt}"


def check_prompt(prompt: Any) -> None:
    """
    Check that the teacher's prompt can be made from this one.

    Raises:
        TypeError: If it is neither a string nor a list of messages.
        ValueError: If it is a conversation without a user turn, or with something else than text and images in it.
    """
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, (list, tuple)):
        raise TypeError(f"A prompt must be a string or a list of messages; got {type(prompt).__name__}.")
    roles = [message.get("role") for message in prompt]
    if "user" not in roles:
        raise ValueError(
            f"The teacher's prompt puts the feedback into the last user turn, but this conversation has none; its "
            f"roles are {roles}."
        )
    for message in prompt:
        content = message.get("content")
        kinds = {part.get("type") for part in content} if isinstance(content, list) else set()
        if kinds - {"text", "image"}:
            raise ValueError(
                f"Only text and images can be shown to the teacher; a message has parts of type {sorted(map(str, kinds))}."
            )


def check_images(rows: Sequence[Mapping[str, Any]], *, alone: bool) -> None:
    """
    Check that rows of a data set with images have them: processors take no batch of both kinds.

    Args:
        rows: Of a rollout batch.
        alone: Whether this is the only process. If not, others have images while this one waits for them.

    Raises:
        ValueError: If some have none.
    """
    columns = {"image", "images"} & set().union(*rows)
    without = [i for i, row in enumerate(rows) if not any(_shows(row.get(column)) for column in columns)]
    if columns and without and not (alone and len(without) == len(rows)):
        raise ValueError(
            f"{len(without)} of {len(rows)} rows of a rollout batch have nothing in {' or '.join(sorted(columns))}. Rows "
            "with and without images can't be mixed: give each row an image, or train on the two kinds apart."
        )


def _shows(images: Any) -> bool:
    return images is not None and not (isinstance(images, (list, tuple)) and all(i is None for i in images))


@dataclass(frozen=True)
class TeacherPrompt:
    """Token ids of a teacher's prompt, and whether its feedback had to be cut."""

    ids: list[int]
    cut: bool = False


class TeacherPromptBuilder:
    """
    Builds the teacher's prompts (see `VPDConfig` for the fields of the same names).

    Args:
        tokenizer: The tokenizer, for its special tokens and to cut feedback.
        tokenize: Turns prompts into token ids exactly as the student's prompts are tokenised, generation prompt
            included: `tokenize(prompts, rows) -> list of id lists`; `rows` says which rollouts of the batch they are of.
        teacher_template: As in `VPDConfig`; `None` picks one by the prompt's form.
        solution_template: As in `VPDConfig`.
        critique_template: As in `VPDConfig`.
        strip_thinking: As in `VPDConfig`.
        max_length: Longest prompt in tokens, or `None`.
    """

    def __init__(
        self,
        tokenizer: Any,
        tokenize: Callable[[list[Prompt], list[int]], list[list[int]]],
        *,
        teacher_template: str | None = None,
        solution_template: str,
        critique_template: str,
        strip_thinking: bool = True,
        max_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.tokenize = tokenize
        self.teacher_template = teacher_template
        self.solution_template = solution_template
        self.critique_template = critique_template
        self.strip_thinking = strip_thinking
        self.max_length = max_length
        self.special_tokens = SpecialTokens(tokenizer)

    def build(self, prompts: Sequence[Prompt], feedback: Sequence[Feedback | None]) -> list[TeacherPrompt | None]:
        """
        The teacher's prompt of each rollout; `None` where there is no feedback, or no room for any of it.

        The prompts are not changed.
        """
        cleaned = [self.clean(f) for f in feedback]
        rows = [i for i, f in enumerate(cleaned) if f]
        built: list[TeacherPrompt | None] = [None] * len(prompts)
        if not rows:
            return built
        ids = self.tokenize([self.render(prompts[i], cleaned[i]) for i in rows], rows)
        for i, row_ids in zip(rows, ids, strict=True):
            if self.max_length is None or len(row_ids) <= self.max_length:
                built[i] = TeacherPrompt(list(row_ids))
            else:
                built[i] = self._cut_to_length(i, prompts[i], cleaned[i])
        return built

    def clean(self, feedback: Feedback | None) -> Feedback:
        """Feedback without thinking, and with special tokens made harmless; empty if nothing is left."""
        if feedback is None:
            return Feedback()
        return Feedback(solution=self._clean(feedback.solution), critique=self._clean(feedback.critique))

    def _clean(self, text: str | None) -> str | None:
        if text is None:
            return None
        if self.strip_thinking:
            text = strip_thinking(text)
        return self.special_tokens.escape(text).strip() or None

    def render(self, prompt: Prompt, feedback: Feedback) -> Prompt:
        """The prompt with the feedback filled in, in the prompt's own form."""
        fill = self.special_tokens.fill
        solution = fill(self.solution_template, solution=feedback.solution) if feedback.solution else ""
        critique = fill(self.critique_template, critique=feedback.critique) if feedback.critique else ""
        if isinstance(prompt, str):
            template = STRING_TEMPLATE if self.teacher_template is None else self.teacher_template
            text = fill(template, prompt=prompt, solution=solution, critique=critique)
            return text.lstrip("\n") if self.teacher_template is None else text

        template = CONVERSATION_TEMPLATE if self.teacher_template is None else self.teacher_template
        turn = last_user_turn(prompt)
        text = fill(template, prompt=text_of(prompt[turn]["content"]), solution=solution, critique=critique)
        return [*prompt[:turn], with_text(prompt[turn], text), *prompt[turn + 1 :]]

    def _cut_to_length(self, row: int, prompt: Prompt, feedback: Feedback) -> TeacherPrompt | None:
        """The prompt with as much feedback as fits, of both sections or of one alone; `None` if none fits."""
        best = self._longest_cut(row, prompt, feedback)
        if feedback.solution and feedback.critique:
            alone = [replace(feedback, critique=None), replace(feedback, solution=None)]
            single = max((self._longest_cut(row, prompt, one) for one in alone), key=lambda cut: cut[0])
            # The second section costs its header: not worth it where little is left to show
            if best[0] < single[0] / 2:
                best = single
        kept, ids = best
        return TeacherPrompt(ids, cut=True) if kept else None

    def _longest_cut(self, row: int, prompt: Prompt, feedback: Feedback) -> tuple[int, list[int]]:
        """How many tokens of this feedback fit at most, by bisection, and the token ids of the prompt with them."""
        sections = {
            name: self.tokenizer(text, add_special_tokens=False)["input_ids"]
            for name, text in (("solution", feedback.solution), ("critique", feedback.critique))
            if text
        }
        total = sum(map(len, sections.values()))
        best: tuple[int, list[int]] = (0, [])
        low, high = 1, total
        while low <= high:
            kept = (low + high) // 2
            cut = {name: self._keep_ends(ids, kept * len(ids) // total) for name, ids in sections.items()}
            # Decoding can bring back what `_clean` took apart
            shown = self.clean(replace(feedback, **cut))
            # A section whose share is rounded down to nothing: too few tokens for both
            if any(getattr(shown, name) is None for name in sections):
                low = kept + 1
                continue
            ids = self.tokenize([self.render(prompt, shown)], [row])[0]
            if self.max_length is None or len(ids) <= self.max_length:
                best, low = (kept, list(ids)), kept + 1
            else:
                high = kept - 1
        return best

    def _keep_ends(self, ids: list[int], kept: int) -> str | None:
        """The text of the first and last `kept` tokens: errors tend to be named first, answers last."""
        if kept >= len(ids):
            return self.tokenizer.decode(ids)
        if kept <= 0:
            return None
        # A cut can split a character of several bytes
        head = self.tokenizer.decode(ids[: (kept + 1) // 2]).rstrip("\ufffd")
        tail = self.tokenizer.decode(ids[len(ids) - kept // 2 :]).lstrip("\ufffd") if kept > 1 else ""
        return head + CUT_MARKER + tail if (head + tail).strip() else None
