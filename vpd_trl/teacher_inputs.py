"""What the teacher reads: its prompts as tensors of the rollout batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from trl.trainer.utils import pad

from .batch import Batch, loss_mask
from .feedback import Feedback
from .metrics import Means
from .prompts import Prompt, TeacherPromptBuilder
from .tools import tools_of


if TYPE_CHECKING:
    from .trainer import VPDTrainer


class TeacherInputs:
    """
    Puts the teacher's prompts, and what the M-step must know of them, into a rollout batch.

    Args:
        trainer: The trainer.
        max_length: The longest prompt in tokens, or `None`.
    """

    def __init__(self, trainer: VPDTrainer, max_length: int | None) -> None:
        self.trainer, args = trainer, trainer.args
        self.prompt_builder = TeacherPromptBuilder(
            trainer._tokenizer,
            self._tokenize,
            teacher_template=args.teacher_template,
            solution_template=args.solution_template,
            critique_template=args.critique_template,
            strip_thinking=args.strip_thinking,
            max_length=max_length,
        )

    def _tokenize(self, prompts: list[Prompt], rows: list[int]) -> list[list[int]]:
        """Token ids of prompts, each different one tokenised once: siblings often have the same."""
        names = self.trainer.environment_factories and self.trainer._batch_environments
        keys = [(repr(prompt), names[row] if names else None) for prompt, row in zip(prompts, rows, strict=True)]
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        places = sorted(first.values())
        with tools_of(self.trainer, [rows[i] for i in places]):
            ids = self.trainer._tokenize_prompts([prompts[i] for i in places])[0]
        found = {keys[i]: row_ids for i, row_ids in zip(places, ids, strict=True)}
        return [list(found[key]) for key in keys]

    def __call__(self, prompts: list, feedback: list[Feedback], batch: Batch) -> Batch:
        """The teacher's prompts, left-padded (N, P), which rows have feedback (N,), and the M-step's denominator ()."""
        accelerator, tokenizer = self.trainer.accelerator, self.trainer._tokenizer
        built = self.prompt_builder.build(prompts, feedback)
        # A row without feedback goes through no teacher; it holds the student's prompt, so that every row is valid
        student_prompts = zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
        rows = [
            torch.tensor(prompt.ids, device=accelerator.device) if prompt else ids[mask]
            for prompt, (ids, mask) in zip(built, student_prompts, strict=True)
        ]
        has_feedback = torch.tensor([prompt is not None for prompt in built], device=accelerator.device)
        tokens = loss_mask(batch).sum(-1)  # (N,)
        counted = tokens if self.trainer.args.m_step_normalization == "all" else tokens * has_feedback
        cut = [bool(f) and (p is None or p.cut) for f, p in zip(feedback, built, strict=True)]
        self._log(has_feedback, torch.tensor(cut, device=accelerator.device))
        return {
            "teacher_prompt_ids": pad(rows, padding_value=tokenizer.pad_token_id, padding_side="left"),
            "teacher_prompt_mask": pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side="left"),
            "has_feedback": has_feedback,
            "m_step_denominator": accelerator.gather(counted.sum()).sum(),
        }

    def _log(self, has_feedback: torch.Tensor, cut: torch.Tensor) -> None:
        means = Means()
        means.add("feedback/coverage", has_feedback)
        means.add("feedback/truncated", cut)
        for name, (value, _) in means.reduce(self.trainer.accelerator).items():
            self.trainer._record(name, value)
            if name == "feedback/coverage":
                self.trainer._watch.coverage(value)
