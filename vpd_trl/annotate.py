"""Rollouts get their outcome and their feedback."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import gather_object

from .ahead import ScoringAhead
from .batch import Batch
from .checks import context_length
from .feedback.base import Feedback, Generated, Rollout
from .feedback.collect import FeedbackCollector, group_siblings
from .processes import meet, stop_together
from .text import THINK_OPEN, SpecialTokens
from .tools import trajectory_text, without_tools


if TYPE_CHECKING:
    from .trainer import VPDTrainer


class Annotation(NamedTuple):
    """
    What is known of the N rollouts of this process beside their tokens.

    Attributes:
        prompts: Theirs, with what their environments added.
        feedback: One per rollout; empty where there is none.
        outcome: (N,) 1 for a success, 0 for a failure, -1 where no reward function scored the rollout.
    """

    prompts: list
    feedback: list[Feedback]
    outcome: torch.Tensor


class Annotator:
    """
    Asks the feedback functions about rollouts.

    Args:
        trainer: The trainer.
        collector: The feedback functions.
    """

    def __init__(self, trainer: VPDTrainer, collector: FeedbackCollector) -> None:
        self.trainer = trainer
        self.collector = collector
        self.special_tokens = SpecialTokens(trainer._tokenizer)
        self.generating = threading.Lock()  # async feedback functions run on a thread of their own
        self.ahead = ScoringAhead(trainer)
        self._annotation: Annotation | None = None

    def __call__(
        self,
        inputs: list[dict[str, Any]],
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        rewards_per_func: torch.Tensor,
    ) -> None:
        """
        Annotate the N rollouts of this process; `put_into` puts it into their batch.

        Args:
            inputs: The data set's rows, one per rollout.
            prompts: The prompts, one per rollout.
            completions: The completions, as reward functions get them.
            completion_ids: The sampled token ids.
            rewards_per_func: Rewards (rollouts of all processes, reward functions), NaN where not scored.
        """
        trainer, n = self.trainer, len(prompts)
        start = trainer.accelerator.process_index * n
        local = rewards_per_func[start : start + n]
        scores = (local * trainer.reward_weights.to(local.device)).nansum(dim=1)
        scored = ~local.isnan().all(dim=1)
        success = scored & (scores >= trainer.args.success_threshold)

        rewards = [score if ok else None for score, ok in zip(scores.tolist(), scored.tolist(), strict=True)]
        texts = self._answer_texts(prompts, completions)
        rollouts = [Rollout(*values) for values in zip(texts, rewards, success.tolist(), strict=True)]
        siblings = self._siblings(rollouts, start)
        columns = {key: [row[key] for row in inputs] for key in inputs[0] if key != "prompt"}
        with stop_together(trainer.accelerator):
            self.collector.check_columns(list(columns))
            feedback = self.collector(
                n,
                self.ahead,
                prompts=prompts,
                completions=completions,
                rewards=rewards,
                completion_ids=completion_ids,
                texts=texts,
                successes=success.tolist(),
                siblings=siblings,
                generate=self.generate,
                special_tokens=self.special_tokens,
                environments=trainer.environments,
                trainer_state=trainer.state,
                log_extra=trainer._log_completion_extra,
                log_metric=trainer._log_metric,
                **columns,
            )
        table = ["\n\n".join(filter(None, (f.solution, f.critique))) or None for f in feedback]
        trainer._log_completion_extra("feedback", table)
        self._annotation = Annotation(prompts, feedback, torch.where(scored, success.long(), -1))

    def put_into(self, batch: Batch) -> None:
        """Put what the rollouts were annotated with into their batch, and what the method makes of it."""
        trainer, annotation = self.trainer, self._annotation
        assert annotation is not None
        self._annotation = None
        with stop_together(trainer.accelerator):
            trainer.prior.check(batch)
        batch |= trainer.teacher_inputs(annotation.prompts, annotation.feedback, batch)
        batch["outcome"] = annotation.outcome
        self.ahead.put_into(batch)
        if trainer.args.weighs_importance:
            trainer.scorer.keep_sampling_logps(batch)
        if trainer.parts.shapes_advantages:
            batch["advantages"] = trainer.shape_advantages(batch)

    def generate(self, prompts: list) -> list[Generated]:
        """
        Sample one answer to each prompt from the current student, with the trainer's engine and sampling settings.

        With several processes all of them must call this equally often; the list may be empty. Metrics of the
        student's own rollouts don't count these answers. A prompt that leaves no room for an answer of
        `max_completion_length` tokens in the model's context gets an empty, unfinished one.

        Raises:
            TypeError: If some prompts are strings and others conversations.
        """
        if len({isinstance(prompt, str) for prompt in prompts}) > 1:
            raise TypeError("generate() takes prompts of one form: all strings, or all conversations.")
        with self.generating:
            return self._generate(prompts)

    def _generate(self, prompts: list) -> list[Generated]:
        trainer = self.trainer
        counts = meet(trainer.accelerator, "generate()", len(prompts))
        answers = [Generated(finished=False) for _ in prompts]
        if not any(counts):
            return answers
        with without_tools(trainer):
            rows, prompt_ids, images, fields = self._tokenize_fitting(prompts)
        if trainer.use_vllm:
            # A vLLM server takes it that the lists of all processes are equally long, and needs no fields
            fillers = max(counts) - len(prompt_ids)
            prompt_ids = prompt_ids + [[trainer._tokenizer.eos_token_id]] * fillers
            images = None if images is None else images + [None] * fillers
        completion_ids, _ = trainer._generate_single_turn(prompt_ids, images, fields, num_generations=1)
        # As TRL tells truncated completions: after an end of its own a row is padded
        ends = {*trainer.eos_token_ids, trainer._tokenizer.pad_token_id}
        for i, ids in zip(rows, completion_ids[: len(rows)], strict=True):  # fillers come last
            text = trainer._tokenizer.decode(ids, skip_special_tokens=True)
            opened = THINK_OPEN if self._opens_thinking(prompts[i]) else ""
            answers[i] = Generated(opened + text, finished=bool(ids) and ids[-1] in ends)
        return answers

    def _tokenize_fitting(self, prompts: list) -> tuple[list[int], list[list[int]], Any, dict[str, Any]]:
        """Prompts that leave room for an answer: which ones, token ids, images, and what else the model takes."""
        trainer, rows = self.trainer, list(range(len(prompts)))
        # An engine that works on all processes together needs something to do on each
        filler = [trainer._tokenizer.eos_token]
        prompt_ids, images, fields = trainer._tokenize_prompts(list(prompts) or filler)
        room = self._prompt_room()
        if rows and room is not None and any(len(ids) > room for ids in prompt_ids):
            rows = [i for i, ids in enumerate(prompt_ids) if len(ids) <= room]
            prompt_ids, images, fields = trainer._tokenize_prompts([prompts[i] for i in rows] or filler)
        return rows, prompt_ids, images, fields

    def _prompt_room(self) -> int | None:
        """The longest prompt that can be answered, in tokens; `None` if there is no limit."""
        args = self.trainer.args
        limits = [context_length(self.trainer), args.vllm_max_model_length if args.use_vllm else None]
        known = [limit for limit in limits if limit is not None]
        return min(known) - (args.max_completion_length or 0) if known else None

    def _answer_texts(self, prompts: list, completions: list) -> list[str]:
        if not self.trainer.args.strip_thinking:
            return [trajectory_text(completion, thinking=True) for completion in completions]
        opened = [self._opens_thinking(prompt) for prompt in prompts]
        return [trajectory_text(c, thinking=False, opened=o) for c, o in zip(completions, opened, strict=True)]

    def _opens_thinking(self, prompt: Any) -> bool:
        """Whether the prompt, as the model sees it, ends inside a `<think>` block."""
        trainer = self.trainer
        if not isinstance(prompt, str):
            prompt = trainer._tokenizer.apply_chat_template(
                prompt,
                chat_template=trainer.chat_template,
                add_generation_prompt=True,
                tokenize=False,
                **trainer.chat_template_kwargs,
            )
        return prompt.rstrip().endswith(THINK_OPEN)

    def _siblings(self, rollouts: list[Rollout], start: int) -> list[list[Rollout]]:
        n, group_size = len(rollouts), self.trainer.num_generations
        if n % group_size == 0:  # whole groups on each process
            return group_siblings(rollouts, group_size, 0, n)
        return group_siblings(gather_object(rollouts), group_size, start, start + n)
