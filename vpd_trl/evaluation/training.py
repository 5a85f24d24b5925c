"""Evaluations within training: the live student, the trainer's own engine, and metrics where the trainer looks."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import IntervalStrategy, Trainer, set_seed
from trl.models import unwrap_model_for_generation

from ..network import scoring_mode
from ..prompts import Prompt
from .engines import Engine, Sample, Sampling, encode_prompts
from .evaluator import Evaluation
from .transformers_engine import TransformersEngine
from .vllm_engine import sampling_arguments


if TYPE_CHECKING:
    from ..trainer import VPDTrainer


Evaluations = Evaluation | Mapping[str, Evaluation]

# Below the trainer's output_dir
FOLDER = "evaluation"


class TrainingEvaluation:
    """
    Runs evaluations on the student of a trainer.

    Results are saved in `output_dir/evaluation/step-N`. Samples are no longer than rollouts where sampling was left
    open. Training goes on as if there had been no evaluation: its random state and the modes of the model's modules
    come back.

    Args:
        trainer: The trainer.
        evaluations: One evaluation, whose metrics are called `eval_avg@16` and so on, or several by name:
            `eval_name_avg@16`.

    Raises:
        TypeError: If it is something else.
        ValueError: If the trainer can't sample for it, or `metric_for_best_model` is not among its metrics and nothing
            else is evaluated.
    """

    def __init__(self, trainer: VPDTrainer, evaluations: Evaluations) -> None:
        several = dict(evaluations) if isinstance(evaluations, Mapping) else {"": evaluations}
        for evaluation in several.values():
            if not isinstance(evaluation, Evaluation):
                raise TypeError(
                    f"evaluation must be an Evaluation, or several by name; got {type(evaluation).__name__}."
                )
        self.trainer = trainer
        longest = trainer.args.max_completion_length
        self.evaluations = {name: _no_longer_than(longest, evaluation) for name, evaluation in several.items()}
        unsupported = [
            name for name in ("tools", "environment_factories", "rollout_func") if getattr(trainer, name, None)
        ]
        if unsupported:
            raise ValueError(f"evaluation is not supported with {' and '.join(unsupported)}; use eval_dataset alone.")
        self._check_best_metric()
        self.engine: Engine = _VLLM(trainer) if trainer.use_vllm else _Transformers(trainer)

    def __call__(self, prefix: str = "eval") -> dict[str, float]:
        """
        Evaluate the student as it is now. All processes must call this; all get the same metrics.

        The metrics are logged, and callbacks see them in `on_evaluate`.
        """
        trainer = self.trainer
        metrics: dict[str, float] = {}
        # A schedule-free optimizer has weights for evaluation; vLLM needs these now, and those for training afterwards
        # accelerate's wrapper has the method whatever is in it
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        own_weights = callable(getattr(optimizer, "eval", None))
        if own_weights:
            trainer.optimizer.eval()
            trainer._last_loaded_step = -1
        with random_state_kept(trainer.accelerator.device), scoring_mode(trainer.model):
            for name, evaluation in self.evaluations.items():
                self._seed(evaluation.sampling.seed)
                result = evaluation.run(
                    self.engine,
                    os.path.join(trainer.args.output_dir, FOLDER, f"step-{trainer.state.global_step}", name),
                    resume=False,  # results of this step are of an earlier run's weights
                    progress=not trainer.args.disable_tqdm,
                    accelerator=trainer.accelerator,
                    trainer_state=trainer.state,
                )
                start = f"{prefix}_{name}_" if name else f"{prefix}_"
                values = {**result.metrics, "truncated": result.truncated, "mean_tokens": result.mean_tokens}
                metrics |= {start + key: value for key, value in values.items()}
        if own_weights:
            trainer._last_loaded_step = -1
        # Not GRPOTrainer's `log`: it would take along, and forget, what has gathered of the next training step's metrics
        Trainer.log(trainer, dict(metrics))
        trainer.control = trainer.callback_handler.on_evaluate(
            trainer.args, trainer.state, trainer.control, dict(metrics)
        )
        return metrics

    def _seed(self, seed: int) -> None:
        """
        For reward functions that draw, and for vLLM within this process, which samples from its random state.

        Processes that share a vLLM engine must have the same one.
        """
        args = self.trainer.args
        engine = self.trainer.accelerator.process_index // (args.vllm_tensor_parallel_size if args.use_vllm else 1)
        set_seed(int(np.random.SeedSequence([seed, engine]).generate_state(1)[0]))

    def _check_best_metric(self) -> None:
        args = self.trainer.args
        wanted = None if args.eval_strategy == IntervalStrategy.NO else args.metric_for_best_model
        names = [
            f"{name}_{metric}" if name else metric
            for name, evaluation in self.evaluations.items()
            for metric in (*evaluation.metric_names, "truncated", "mean_tokens")
        ]
        if wanted is not None and not self.trainer.eval_dataset and wanted.removeprefix("eval_") not in names:
            raise ValueError(f"metric_for_best_model is {wanted!r}, but the evaluation measures {', '.join(names)}.")


class _Transformers(TransformersEngine):
    """The student through `generate`, whatever wraps it."""

    def __init__(self, trainer: VPDTrainer) -> None:
        super().__init__(trainer.model, trainer._tokenizer, batch_size=trainer.args.per_device_eval_batch_size)
        self.trainer = trainer
        self.chat_template = trainer.chat_template
        # Sharded weights are gathered by all processes together
        self.collective = trainer.is_fsdp_enabled or trainer._dist.is_zero3

    def describe(self) -> dict[str, Any]:
        return _describe(self.trainer, "transformers")

    @contextmanager
    def _live_model(self) -> Iterator[Any]:
        trainer = self.trainer
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ) as model,
            trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
        ):
            yield model


class _VLLM:
    """The student through the trainer's vLLM, which gets its weights first."""

    # A server, and engines spread over devices, work on the prompts of all processes together
    collective = True
    batch_size = 1024

    def __init__(self, trainer: VPDTrainer) -> None:
        self.trainer = trainer

    def describe(self) -> dict[str, Any]:
        return _describe(self.trainer, "vllm")

    def generate(
        self, prompts: Sequence[Prompt], *, k: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Sample]]:
        trainer, tokenizer = self.trainer, self.trainer._tokenizer
        prompt_ids = encode_prompts(tokenizer, prompts, sampling, chat_template=trainer.chat_template)
        fits = [self._room is None or len(ids) < self._room for ids in prompt_ids]
        # Something short in place of what is too long, for the lists of all processes must be equally long
        repeated = [ids if ok else ids[-1:] for ids, ok in zip(prompt_ids, fits, strict=True) for _ in range(k)]
        # The most likely tokens are the same each time, and a server refuses to find them more than once
        n = 1 if sampling.temperature == 0 else k
        with self._settings(sampling, seeds[0]):
            completions, _ = trainer._generate_single_turn(repeated[:: k // n], None, {}, num_generations=n)
        completions = [ids for ids in completions for _ in range(k // n)]
        samples = []
        for ids, ok in zip(completions, [ok for ok in fits for _ in range(k)], strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            done = bool(ids) and ids[-1] in trainer.eos_token_ids
            samples.append(Sample(text, list(ids), done) if ok else Sample("", [], False))
        return [samples[i : i + k] for i in range(0, len(samples), k)]

    @property
    def _room(self) -> int | None:
        return self.trainer.args.vllm_max_model_length

    @contextmanager
    def _settings(self, sampling: Sampling, seed: int) -> Iterator[None]:
        """The evaluation's settings in place of the rollouts'."""
        vllm = self.trainer.vllm_generation
        arguments = sampling_arguments(sampling)
        arguments["max_completion_length"] = arguments.pop("max_tokens")
        if vllm.mode == "server":
            # The server makes seeds of its own for the samples of a prompt out of this one
            arguments["generation_kwargs"] = {"seed": seed}
        else:
            # Here each sample is a request of its own, and the same seed would make all of a prompt the same. Without
            # one, vLLM draws from this process's random state
            arguments["generation_kwargs"] = {}
        before = {name: getattr(vllm, name) for name in arguments}
        try:
            for name, value in arguments.items():
                setattr(vllm, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(vllm, name, value)


def _no_longer_than(longest: int | None, evaluation: Evaluation) -> Evaluation:
    """The evaluation, with samples of at most so many tokens if its sampling was left open."""
    if evaluation.sampling_given or longest is None or evaluation.sampling.max_new_tokens <= longest:
        return evaluation
    shorter = copy.copy(evaluation)
    shorter.sampling = replace(evaluation.sampling, max_new_tokens=longest)
    return shorter


def _describe(trainer: VPDTrainer, engine: str) -> dict[str, Any]:
    return {"engine": engine, "model": trainer.model.config.name_or_path, "step": trainer.state.global_step}


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """The random states of Python, NumPy and torch, on the CPU and all devices of a kind, come back on leaving."""
    python, numpy = random.getstate(), np.random.get_state()
    kind = "cuda" if device.type == "cpu" else device.type
    devices = [] if device.type == "cpu" else range(torch.get_device_module(kind).device_count())
    try:
        with torch.random.fork_rng(devices=devices, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
