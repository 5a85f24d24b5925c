"""The trainer: rollout → feedback → E-step → M-step, and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from . import card, checkpoints, checks, hub, state
from .advantages import AdvantageShaper
from .annotate import Annotator
from .batch import Batch
from .callbacks import OptimizerSteps
from .config import VPDConfig
from .e_step import EStep
from .engines import make_engine
from .evaluation.training import Evaluations, TrainingEvaluation
from .feedback import FeedbackFn
from .feedback.collect import FeedbackCollector
from .lengths import by_length_within_steps
from .m_step import MStep
from .prior import make_prior
from .processes import stop_together
from .prompts import check_images, check_prompt
from .scoring import Scorer
from .teacher import make_teacher
from .teacher_inputs import TeacherInputs
from .tracking import CompletionsTable
from .watch import Watch


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


logger = get_logger(__name__)


class VPDTrainer(GRPOTrainer):
    """
    Trainer for Variational Policy Distillation: learning from language feedback by expectation-maximisation.

    For every rollout batch it samples completions from the student, scores them, and asks for feedback. Every
    `e_step_frequency`-th batch an E-step trains the teacher, which is the same network with the feedback in its
    prompt, to tell successes from failures. Then the M-step moves the student towards the teacher on the same
    rollouts. With `method="sdpo"` there is no E-step, with `method="grpo"` this is [`~trl.GRPOTrainer`] to the bit.

    Example:

    ```python
    >>> from vpd_trl import VPDConfig, VPDTrainer
    >>> from vpd_trl.feedback import SiblingFeedback

    >>> trainer = VPDTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     reward_funcs=my_reward,
    ...     feedback_fn=SiblingFeedback(),
    ...     args=VPDConfig(output_dir="qwen3-vpd"),
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student, as in [`~trl.GRPOTrainer`].
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            As in [`~trl.GRPOTrainer`]. May be left out with `method="sdpo"`; every reward is then 0.
        args ([`VPDConfig`], *optional*):
            Configuration. If `None`, a default one is used.
        train_dataset, …, environment_factory:
            As in [`~trl.GRPOTrainer`], in its order.
        feedback_fn ([`FeedbackFn`] or list of them, *optional*):
            Says what the teacher sees of each rollout. Of a list, the first non-blank text of each section wins.
            Needed unless `method="grpo"`, which makes no use of it.
        teacher_peft_config ([`~peft.LoraConfig`], *optional*):
            The teacher's own adapter with `teacher="lora"`. `None`: rank 16, α 32 on every linear layer.
        evaluation ([`~evaluation.Evaluation`] or `dict` of them, *optional*):
            Runs on the student whenever the trainer evaluates, with or without an `eval_dataset`. Its metrics are
            called `eval_avg@16` and so on, with the name of each of several in between: `eval_name_avg@16`.

    Raises:
        ValueError, TypeError:
            At construction, for what can be known to be wrong or is not supported then: no `feedback_fn`, a data set
            without prompts or smaller than one rollout batch, columns that clash with the keywords of feedback
            functions, images for a model of text alone, …
    """

    # Hooks of TRL and transformers that this class overrides; tests/test_trl_contract.py holds them to their form:
    #   _generate, _calculate_rewards,
    #   _generate_and_score_completions                        the rollouts' feedback
    #   get_batch_samples, _prepare_inputs                     when rollouts are collected
    #   _compute_loss, training_step                           the M-step
    #   _get_per_token_logps_and_entropies                     what only a policy gradient needs
    #   evaluate                                               evaluations beside TRL's own
    #   create_model_card, push_to_hub, _push_from_checkpoint  the Hub
    #   train, _get_train_sampler, save_model, _save_checkpoint,
    #   _load_from_checkpoint, _load_optimizer_and_scheduler, _load_best_model   state

    _buffered_inputs: Any

    _name, _tag_names, _paper, *_ = card.METHODS["vpd"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: VPDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Any = None,
        feedback_fn: FeedbackFn | Sequence[FeedbackFn] | None = None,
        teacher_peft_config: PeftConfig | None = None,
        evaluation: Evaluations | None = None,
    ) -> None:
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = VPDConfig(f"{model_id.split('/')[-1]}-VPD")
        checks.check_config(args)
        checkpoints.check_folder(args)
        self.parts = args.parts
        self._name, self._tag_names, self._paper, *_ = card.METHODS[args.method]
        self.feedback = None if feedback_fn is None else FeedbackCollector(feedback_fn)
        reward_funcs = checks.check_rewards(args, reward_funcs, environment_factory)
        checks.check_arguments(
            args,
            model,
            self.feedback,
            train_dataset,
            quantization_config=quantization_config,
            teacher_peft_config=teacher_peft_config,
            environment_factory=environment_factory,
        )
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            # No data sets are not None: transformers evaluates then, and finds nothing to do itself
            eval_dataset={} if eval_dataset is None and evaluation is not None else eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        self.args: VPDConfig
        self._init_state()
        if self.parts.uses_feedback:
            self._init_distillation(teacher_peft_config)
        self.evaluation = None if evaluation is None else TrainingEvaluation(self, evaluation)

    def _init_state(self) -> None:
        # How far training is; all of it is saved in checkpoints
        self.rollout_batches = 0
        self._finished_rollout_batches = 0
        self._collected_step = -1  # value of `_step` for which rollouts have been collected
        self._window: list[Any] = []
        self._pending_e_step: list[Batch] | None = None
        self._train_sampler: Any = None
        self._rollout_start = self._m_step_time = 0.0
        self._watch = Watch(logger)
        self.dataset_name: str | None = None  # on model cards
        self.weights_step: int | None = None  # that of the best checkpoint once it has been loaded
        self.add_callback(hub.TeacherBesideStudent(self))
        self.add_callback(CompletionsTable(self))

    def _init_distillation(self, teacher_peft_config: PeftConfig | None) -> None:
        checks.check_model(self)
        if not self.args.rl_weight:  # it corrects GRPO's loss alone, and takes a forward pass over all rollouts
            self.vllm_importance_sampling_correction = False
        self.engine = make_engine(self)
        self.teacher = make_teacher(self, teacher_peft_config)
        self.prior = make_prior(self)
        self.scorer = Scorer(self)
        self.e_step = EStep(self)
        self.m_step = MStep(self)
        self.shape_advantages = AdvantageShaper(self)
        assert self.feedback is not None
        self.annotator = Annotator(self, self.feedback)
        self.teacher_inputs = TeacherInputs(self, checks.teacher_prompt_length(self))
        self.prompt_builder = self.teacher_inputs.prompt_builder
        self.add_callback(OptimizerSteps(self))

    # ---- When: rollouts are collected, and the E-step runs, before an optimizer step begins

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window = samples
        return samples, num_items

    def _open_optimizer_step(self) -> None:
        start = time.perf_counter()
        self.model_wrapped.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers have modes too
            self.optimizer.train()
        # Rollouts that came inside the last accumulation window (`steps_per_generation` does not fill it) waited
        self._run_pending_e_step()
        if self._step % self._generate_every == 0 or self._buffered_inputs is None:
            self._prepare_inputs(self._window[0])
            self._run_pending_e_step(fresh=True)
        self._current_train_step_time += time.perf_counter() - start

    def _close_optimizer_step(self) -> None:
        finished = self._step // self._generate_every
        if finished > self._finished_rollout_batches:
            self._finished_rollout_batches = finished
            self.teacher.after_rollout_batch()
        self._record("time/m_step", self._m_step_time)
        self._m_step_time = 0.0
        self.m_step.log()

    @property
    def e_step_is_due(self) -> bool:
        """Whether the rollout batch that is collected now is one for an E-step."""
        return self.rollout_batches % self.args.e_step_frequency == 0

    @property
    def _generate_every(self) -> int:
        """Micro-batches that are trained on between two rollout batches."""
        return self.args.steps_per_generation * self.num_iterations

    def _run_pending_e_step(self, *, fresh: bool = False) -> None:
        micro_batches, self._pending_e_step = self._pending_e_step, None
        if micro_batches is not None:
            ran = self.e_step.run(micro_batches, fresh=fresh)
            if ran and self.use_vllm and self.teacher.trains_student:
                self._last_loaded_step = -1  # the weights changed within a step: the next rollouts need them
            successes, failures = self.e_step.last_counts
            self._watch.e_step(ran=ran, successes=successes, failures=failures)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if not (self.parts.uses_feedback and self.model.training):
            return super()._prepare_inputs(generation_batch)
        if self._collected_step != self._step:
            before = self._buffered_inputs
            super()._prepare_inputs(generation_batch)
            if self._buffered_inputs is not before:
                self._collected_step = self._step
                self._buffered_inputs = by_length_within_steps(self, self._buffered_inputs)
                if self.parts.refines_teacher and self.e_step_is_due:
                    self._pending_e_step = self._buffered_inputs
                self.rollout_batches += 1
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    # ---- Rollout and feedback

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        if not (self.parts.uses_feedback and self.model.training):
            return super()._generate_and_score_completions(inputs)
        with stop_together(self.accelerator):
            for row in inputs:
                if "prompt" in row:  # else it comes from the environment
                    check_prompt(row["prompt"])
            check_images(inputs, alone=self.accelerator.num_processes == 1)
        self._rollout_start = time.perf_counter()
        batch = super()._generate_and_score_completions(inputs)
        self.annotator.put_into(batch)
        return batch

    def _generate(self, prompts: list) -> Any:
        training = self.model.training
        generated = super()._generate(prompts)
        if self.model.training != training:  # continuous batching leaves the model in training
            self.model.train(training)
        if self.parts.uses_feedback and training:
            self.annotator.ahead.generated(*generated[:3])
        return generated

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        training = self.model.training
        if self.parts.uses_feedback and training:
            self._record("time/generate", time.perf_counter() - self._rollout_start)
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.parts.uses_feedback and not training:
            # Evaluation asks for no feedback, but the completions table needs its columns to be equally long
            self._log_completion_extra("feedback", [None] * len(prompts))
        elif self.parts.uses_feedback:
            start = time.perf_counter()
            self.annotator(inputs, prompts, completions, completion_ids_list, rewards_per_func)
            self._record("time/feedback", time.perf_counter() - start)
        return rewards_per_func

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        # TRL asks for those of all rollouts where a step may train on older ones, and of its reference model
        if self.parts.uses_feedback and self.model.training and not self.args.rl_weight:
            return None, None, None
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    # ---- M-step

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        start = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._m_step_time += time.perf_counter() - start
        return loss

    def _compute_loss(self, model: Any, inputs: Batch) -> torch.Tensor:
        if not (self.parts.uses_feedback and self.model.training):
            return super()._compute_loss(model, inputs)
        terms = []
        if self.args.rl_weight:
            terms.append(self.args.rl_weight * super()._compute_loss(model, inputs))
        if self.args.kl_weight:
            terms.append(self.args.kl_weight * self.m_step.loss(model, inputs))
        return torch.stack(terms).sum() if len(terms) > 1 else terms[0]

    # ---- Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is None and self.evaluation is not None:  # not for each of several data sets
            metrics |= self.evaluation(metric_key_prefix)
        return metrics

    # ---- Metrics

    def _record(self, name: str, value: float) -> None:
        if value == value:  # not NaN, which says that there was nothing to measure
            self._metrics["train"][name].append(value)

    # ---- The Hub

    def create_model_card(self, model_name: Any = None, dataset_name: Any = None, tags: Any = None) -> None:
        card.write(self, super().create_model_card, model_name, dataset_name, tags)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        return hub.push(self, super().push_to_hub, *args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        hub.push_checkpoint(self, super()._push_from_checkpoint, checkpoint_folder)

    # ---- State

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        checkpoint = checkpoints.to_resume(self, resume_from_checkpoint)
        if checkpoint is not None and checkpoints.is_finished(self, checkpoint):
            return checkpoints.load_finished(self, checkpoint)
        return super().train(checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        hub.save_teacher(self, output_dir or self.args.output_dir)  # first, as the rest may end in a push to the Hub
        super().save_model(output_dir, _internal_call)
        hub.save_card(self, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with state.kept_dtypes(self.model):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with state.kept_dtypes(self.model):
            super()._load_best_model()
        self.weights_step = self.state.best_global_step
        self._last_loaded_step = -1  # what vLLM has is of the last step
        if self.parts.uses_feedback:
            state.load_teacher(self, self.state.best_model_checkpoint)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = os.path.join(self._get_output_dir(trial=trial), folder)
        with checkpoints.writing(self, folder):
            if not self.args.save_only_model:
                # Before the rest: transformers writes trainer_state.json last, and with it the checkpoint is whole
                state.save(self, folder)
            super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state.load(self, checkpoint)
