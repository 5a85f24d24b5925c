"""What is wrong with a run is said at its start, before any work is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_available, is_peft_model
from datasets import Dataset
from transformers import AutoConfig

from .config import VPDConfig
from .feedback.collect import FeedbackCollector
from .processes import stop_together
from .prompts import check_prompt


if TYPE_CHECKING:
    from .trainer import VPDTrainer


logger = get_logger(__name__)

_SHIPPED = "vpd_trl.feedback has SiblingFeedback(), SelfCritiqueFeedback() and JudgeFeedback(...)"


def no_reward(prompts: list, **kwargs: Any) -> list[float]:
    """The reward of a run without reward functions: 0 for every rollout."""
    return [0.0] * len(prompts)


def check_config(args: Any) -> None:
    """
    Check the type of the configuration.

    Raises:
        TypeError: If it is not a `VPDConfig`.
    """
    if not isinstance(args, VPDConfig):
        raise TypeError(
            f"args must be a VPDConfig, which takes all that GRPOConfig takes; got {type(args).__name__}. For plain GRPO "
            "use VPDConfig(method='grpo', ...)."
        )


def check_rewards(args: VPDConfig, reward_funcs: Any, environment_factory: Any = None) -> Any:
    """
    The reward functions, or one that is always 0 where none are needed.

    Raises:
        ValueError: If the method needs rewards and there are none.
    """
    if reward_funcs is not None and reward_funcs != []:
        return list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else reward_funcs
    if environment_factory is not None:  # it may own the reward; TRL looks
        return []
    if args.parts.refines_teacher or (args.parts.uses_feedback and args.parts.policy_gradient):
        raise ValueError(
            f"method={args.method!r} learns from successes and failures, so it needs at least one reward function. To "
            "distil from feedback without rewards, use method='sdpo'."
        )
    return [no_reward] if args.parts.uses_feedback else reward_funcs


def check_arguments(
    args: VPDConfig,
    model: Any,
    feedback: FeedbackCollector | None,
    dataset: Any,
    *,
    quantization_config: Any,
    teacher_peft_config: Any,
    environment_factory: Any,
) -> None:
    """
    Check what is known before the model is loaded.

    Raises:
        ValueError: If something is missing, too small or not supported; the message says what to do.
        TypeError: If prompts have a wrong type.
    """
    _check_dataset_size(args, dataset)
    _check_teacher(args, teacher_peft_config)
    if not args.parts.uses_feedback:
        if feedback is not None:
            logger.warning(f"method={args.method!r} makes no use of feedback_fn {feedback.names}.")
        return
    if feedback is None:
        raise ValueError(
            f"method={args.method!r} learns from feedback, so it needs feedback_fn: {_SHIPPED}, or write a function "
            "that returns one str, Feedback or None per rollout. Without feedback, use method='grpo'."
        )
    bits = _bits(args, model, quantization_config) if args.use_vllm else None
    if bits is not None:
        raise ValueError(
            f"use_vllm=True sends merged weights to vLLM, which can't be done with a model in {bits} bits. Load the "
            "model in 16 bits, or generate with transformers (use_vllm=False)."
        )
    columns = getattr(dataset, "column_names", None)
    if columns is not None:  # a stream may not know
        _check_columns(columns, feedback, environment_factory)
    if isinstance(dataset, Dataset) and "prompt" in dataset.column_names:
        check_prompt(dataset[0]["prompt"])


def _bits(args: VPDConfig, model: Any, quantization_config: Any) -> int | None:
    """The bits that bitsandbytes has put the model's weights into, or will, or `None`."""
    options = args.model_init_kwargs or {}
    config = _published_config(model, options) if isinstance(model, str) else getattr(model, "config", None)
    configs = (
        quantization_config,
        options.get("quantization_config"),
        getattr(config, "quantization_config", None),
    )
    for bits in (4, 8):
        name = f"load_in_{bits}bit"
        if any(c.get(name) if isinstance(c, dict) else getattr(c, name, False) for c in configs):
            return bits
    return None


def _published_config(model: str, options: dict[str, Any]) -> Any:
    """The configuration that a model was published with, or `None`; what loads the model says why there is none."""
    where = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "trust_remote_code")
    try:
        return AutoConfig.from_pretrained(model, **{name: options[name] for name in where if name in options})
    except (OSError, ValueError):
        return None


def _check_dataset_size(args: VPDConfig, dataset: Any) -> None:
    if not isinstance(dataset, Dataset):
        return
    needed = args.generation_batch_size // args.num_generations
    if len(dataset) < needed:
        raise ValueError(
            f"The data set has {len(dataset)} prompts, but one rollout batch takes {needed}: generation_batch_size "
            f"({args.generation_batch_size} completions) / num_generations ({args.num_generations}). Training would "
            "end without a step. Use more prompts, or lower per_device_train_batch_size or steps_per_generation "
            "(gradient_accumulation_steps)."
        )


def _check_teacher(args: VPDConfig, teacher_peft_config: Any) -> None:
    if args.teacher != "lora":
        if teacher_peft_config is not None:
            raise ValueError(f"teacher_peft_config is for teacher='lora'; got teacher={args.teacher!r}.")
        return
    if not is_peft_available():
        raise ImportError("teacher='lora' needs PEFT. Install it with: pip install 'vpd-trl[peft]'")
    from .lora_teacher import check_adapter_config

    if teacher_peft_config is not None:
        check_adapter_config(teacher_peft_config)


def _check_columns(columns: Sequence[str], feedback: FeedbackCollector, environment_factory: Any) -> None:
    if "prompt" not in columns and environment_factory is None:
        raise ValueError(f"The data set needs a column 'prompt'; it has {', '.join(columns) or 'none'}.")
    feedback.check_columns(columns)


def check_model(trainer: VPDTrainer) -> None:
    """
    Check the model against a method that uses feedback.

    Raises:
        ValueError: If it is not supported.
    """
    args, model = trainer.args, trainer.model
    images = {"image", "images"} & _columns_of(trainer.train_dataset, trainer.eval_dataset)
    if images and not trainer._is_vlm:
        raise ValueError(
            f"The data set has images ({', '.join(sorted(images))}), but the model is shown text alone: "
            f"{type(trainer.processing_class).__name__} is no processor of a vision-language model. Remove the column, or "
            "use such a model with its own processor."
        )
    if is_peft_model(model):
        from peft import PromptLearningConfig

        learned_prompts = [n for n, c in model.peft_config.items() if isinstance(c, PromptLearningConfig)]
        if learned_prompts:
            raise ValueError(
                f"The adapters {learned_prompts} learn prompts, which lie outside the network that the M-step reads. "
                "Use an adapter of weights, such as LoRA."
            )
    _check_engine(trainer)
    vocabulary = trainer.model.get_output_embeddings().weight.shape[0]
    if args.distillation_top_k is not None and args.distillation_top_k > vocabulary:
        raise ValueError(
            f"distillation_top_k ({args.distillation_top_k}) is above the size of the vocabulary ({vocabulary}); "
            "use None for the full vocabulary."
        )
    if args.prior == "sampling" and trainer.parts.refines_teacher:
        with stop_together(trainer.accelerator):
            _check_server(trainer)
    if trainer.aux_loss_enabled and not trainer.args.rl_weight:
        logger.warning(
            f"method={args.method!r} does not add the load-balancing loss of this mixture-of-experts model "
            "(router_aux_loss_coef) to its steps."
        )


def _columns_of(*datasets: Any) -> set[str]:
    """The columns of data sets, of several by name too; a stream that doesn't know tells them by its first row."""
    found: set[str] = set()
    for data in datasets:
        if isinstance(data, Mapping):
            found |= _columns_of(*data.values())
        elif data is not None:
            names = getattr(data, "column_names", None)
            found |= set(next(iter(data), {}) if names is None else names)
    return found


def _check_server(trainer: VPDTrainer) -> None:
    """That a vLLM server reports log-probabilities of the distribution that it samples from."""
    args = trainer.args
    if args.vllm_mode != "server" or args.temperature == 1.0 or not trainer.accelerator.is_main_process:
        return
    mode = trainer.vllm_generation.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
    if mode != "processed_logprobs":
        raise ValueError(
            f"prior='sampling' with temperature={args.temperature} needs a vLLM server with --logprobs-mode "
            f"processed_logprobs; this one has {mode}. Restart it so, or use prior='dynamic'."
        )


def _check_engine(trainer: VPDTrainer) -> None:
    """What the way that the model is spread over devices allows."""
    args = trainer.args
    own_weights = [
        f"{name}={value!r}"
        for name, value in (("teacher", args.teacher), ("prior", args.prior))
        if value in ("ema", "lora", "fixed")
    ]
    if own_weights and trainer._dist.fsdp_version == 1:
        raise ValueError(
            f"{' and '.join(own_weights)} needs weights beside the student's, which is not supported where the first "
            "version of FSDP shards those. Set fsdp_version: 2 in accelerate's configuration, or use teacher='shared' "
            "and prior='dynamic'."
        )
    elsewhere = _shards_elsewhere(trainer)
    if own_weights and elsewhere:
        raise ValueError(
            f"{' and '.join(own_weights)} needs weights beside the student's, which is not supported where DeepSpeed "
            f"keeps shards elsewhere ({elsewhere}). Leave that out of its configuration, or use teacher='shared' and "
            "prior='dynamic'."
        )
    if trainer._dist.fsdp_version is not None:
        _check_bits_on_fsdp(trainer.model)
    devices = set((getattr(trainer.model, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise ValueError(
            f"method={args.method!r} needs the model on one device, and device_map has put it on "
            f"{', '.join(sorted(map(str, devices)))}. Load it with device_map=None in model_init_kwargs; on "
            "several GPUs, start the script with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one of them."
        )
    if args.teacher == "lora" and args.fp16:
        raise ValueError("teacher='lora' is not supported with fp16=True; use bf16=True or float32.")
    # Without keywords transformers takes the other form; with some, torch takes this one
    kwargs = args.gradient_checkpointing_kwargs
    reentrant = args.gradient_checkpointing and bool(kwargs) and kwargs.get("use_reentrant", True)
    if args.method == "joint_loss" and reentrant and trainer.accelerator.num_processes > 1:
        raise ValueError(
            "method='joint_loss' runs the model twice before each backward pass, which reentrant checkpointing does "
            "not allow on several processes. Set gradient_checkpointing_kwargs={'use_reentrant': False}; with an adapter "
            "on ZeRO-3, where TRL overrides that, use gradient_checkpointing=False, ZeRO-2 or FSDP2."
        )


def _check_bits_on_fsdp(model: Any) -> None:
    """Which of bitsandbytes' weights FSDP can split: told by the class, as bitsandbytes may not be installed."""
    kinds = {type(parameter).__name__: parameter for parameter in model.parameters()}
    if "Int8Params" in kinds:
        raise ValueError(
            "FSDP can't split a model in 8 bits. Use 4 bits with bnb_4bit_quant_storage set to the dtype of the other "
            "weights, or DDP."
        )
    if "Params4bit" in kinds and not kinds["Params4bit"].is_floating_point():
        raise ValueError(
            f"FSDP can't split a model in 4 bits that is stored as {kinds['Params4bit'].dtype}, nor load its "
            "checkpoints again. Set bnb_4bit_quant_storage of BitsAndBytesConfig to the dtype of the other weights, such "
            "as torch.bfloat16, or use DDP or DeepSpeed."
        )


def _shards_elsewhere(trainer: VPDTrainer) -> str | None:
    """What in DeepSpeed's configuration lets the network read weights from other memory than each process's shard."""
    if not trainer._dist.is_zero3:
        return None
    zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        return "offload_param.device=nvme"
    for name, least in (("zero_hpz_partition_size", 2), ("mics_shard_size", 1)):
        if isinstance(zero.get(name), int) and zero[name] >= least:
            return f"{name}={zero[name]}"
    return None


def context_length(trainer: VPDTrainer) -> int | None:
    """The model's context in tokens, or `None` if it has no limit."""
    return getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)


def teacher_prompt_length(trainer: VPDTrainer) -> int | None:
    """
    The longest teacher prompt in tokens, or `None` if neither the user nor the model sets a limit.

    Raises:
        ValueError: If the user's limit and a completion don't fit into the model's context together.
    """
    args, context = trainer.args, context_length(trainer)
    if context is None or args.max_completion_length is None:
        return args.max_teacher_prompt_length
    room = context - args.max_completion_length
    if args.max_teacher_prompt_length is not None and args.max_teacher_prompt_length > room:
        raise ValueError(
            f"max_teacher_prompt_length ({args.max_teacher_prompt_length}) + max_completion_length "
            f"({args.max_completion_length}) is above the model's context ({context}). Lower one of them; "
            f"max_teacher_prompt_length can be at most {room}."
        )
    if room < 1:
        raise ValueError(
            f"max_completion_length ({args.max_completion_length}) leaves no room for a prompt in the model's "
            f"context ({context})."
        )
    return args.max_teacher_prompt_length or room
