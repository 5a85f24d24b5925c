"""`vpd-trl estimate`: what a run needs, from its recipe and options, without a GPU and without weights."""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from trl import ModelConfig, get_peft_config
from trl.trainer.utils import get_quantization_config

from ..config import VPDConfig
from ..estimate import DEVICES, ENGINES, Estimate, Plan, estimate
from ..estimate.memory import GIB
from .arguments import TaskArguments
from .errors import UsageError, usage_errors
from .parsing import RecipeParser, parse_with
from .train import teacher_peft_config


DESCRIPTION = """What a run needs: bytes on each GPU in each phase, operations and time of a rollout batch. The model's
passes are rehearsed on tensors without data, through the code that training runs: no weights are loaded, no GPU is used. Of a vision-language model the language part
alone is counted; mixtures of experts and recurrent models are refused. Takes the recipe and every field of vpd-trl train.

  vpd-trl estimate --model Qwen/Qwen3-8B --gpus 8 --engine zero3 --bf16 true --max_completion_length 2048"""


@dataclass
class EstimateArguments:
    """
    The machine and the lengths that an estimate is for.

    Raises:
        ValueError: If a value is not allowed.
    """

    # fmt: off
    model: str | None = field(default=None, metadata={"help": "Name or folder of a model, or path of a config.json; the same as model_name_or_path."})
    gpus: int = field(default=1, metadata={"help": "How many GPUs, one process on each."})
    gpu: str = field(default="h100", metadata={"help": f"Which: {', '.join(DEVICES)}."})
    gpu_memory: float | None = field(default=None, metadata={"help": "GiB of a GPU. None: the data sheet's."})
    gpu_tflops: float | None = field(default=None, metadata={"help": "Its dense half-precision peak, 10^12 operations per second. None: the data sheet's."})
    gpu_tflops_float32: float | None = field(default=None, metadata={"help": "Its float32 peak, of runs without half precision. None: the data sheet's; with TF32, which torch leaves off, half of gpu_tflops."})
    gpu_bandwidth: float | None = field(default=None, metadata={"help": "Of its memory, 10^9 bytes per second. None: the data sheet's."})
    efficiency: float = field(default=0.4, metadata={"help": "Share of that peak that training gets, in (0, 1]. An assumption: measure yours."})
    engine: str = field(default="ddp", metadata={"help": f"What holds the model: {', '.join(ENGINES)}."})
    prompt_tokens: int = field(default=512, metadata={"help": "Tokens of a prompt."})
    feedback_tokens: int = field(default=512, metadata={"help": "Tokens that the teacher's prompt has beside those."})
    completion_tokens: int | None = field(default=None, metadata={"help": "Mean tokens of a completion, for time; memory is for max_completion_length. None: the same."})
    coverage: float = field(default=1.0, metadata={"help": "Share of rollouts that there is feedback for, in (0, 1]."})
    json: bool = field(default=False, metadata={"help": "Print numbers as JSON, in bytes, operations and seconds."})
    # fmt: on

    def __post_init__(self) -> None:
        if self.gpu not in DEVICES:
            raise ValueError(
                f"gpu must be one of {', '.join(DEVICES)}; got {self.gpu!r}. For another one, give gpu_memory, "
                "gpu_tflops, gpu_tflops_float32 and gpu_bandwidth."
            )
        if self.gpus < 1:
            raise ValueError(f"gpus must be at least 1; got {self.gpus}.")
        for name in ("gpu_memory", "gpu_tflops", "gpu_tflops_float32", "gpu_bandwidth"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be above 0; got {value}.")


def run(arguments: Sequence[str]) -> None:
    """
    Print what the run that the arguments describe needs.

    Args:
        arguments: What the command line holds after `estimate`.

    Raises:
        UsageError: If an argument is not allowed, or there is no such model.
    """
    with usage_errors(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that TRL and transformers are giving up
        plan, as_json = make_plan(arguments)
        found = estimate(plan)
    print(_json(found) if as_json else table(plan, found))


def make_plan(arguments: Sequence[str]) -> tuple[Plan, bool]:
    """The plan that a command line describes, and whether JSON is wanted."""
    args, task_args, config, model_args = _parse(arguments)
    name = args.model or model_args.model_name_or_path
    if name is None:
        raise UsageError("model is missing: give --model, or a recipe with model_name_or_path.")
    model = AutoConfig.from_pretrained(name, revision=model_args.model_revision)
    quantization = get_quantization_config(model_args)
    options = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    options |= config.model_init_kwargs or {}
    fields = ("memory", "tflops", "tflops_float32", "bandwidth")
    given = {key: value for key in fields if (value := getattr(args, f"gpu_{key}")) is not None}
    plan = Plan(
        model=model,
        config=config,
        gpus=args.gpus,
        device=replace(DEVICES[args.gpu], **given),
        engine=args.engine,
        dtype=_dtype(options["dtype"], model),
        attention=options["attn_implementation"],
        adapter=get_peft_config(model_args),
        teacher_adapter=teacher_peft_config(task_args, config),
        quantized=None if quantization is None else 4 if quantization.load_in_4bit else 8,
        prompt=args.prompt_tokens,
        feedback=args.feedback_tokens,
        completion=args.completion_tokens,
        coverage=args.coverage,
        efficiency=args.efficiency,
    )
    return plan, args.json


def _parse(arguments: Sequence[str]) -> tuple[EstimateArguments, TaskArguments, VPDConfig, ModelConfig]:
    machines: list[EstimateArguments] = []

    class Machine(EstimateArguments):
        """Read first: batch sizes depend on the number of GPUs."""

        def __post_init__(self) -> None:
            super().__post_init__()
            machines.append(self)

    class Planned(VPDConfig):
        """The configuration as it will be on that many processes."""

        @property
        def world_size(self) -> int:
            return machines[-1].gpus

    usage = "vpd-trl estimate --model MODEL --gpus N [--config recipe.yaml] [--FIELD VALUE ...]"
    parser = RecipeParser(Machine, config=Planned, prog="vpd-trl estimate", usage=usage, description=DESCRIPTION)
    # A machine without the GPU that the run is for may estimate it
    parser.set_defaults(output_dir=os.path.join(tempfile.gettempdir(), "vpd-trl-estimate"), use_cpu=True)
    for name in ("deepspeed", "fsdp"):
        if any(argument.split("=")[0] == f"--{name}" for argument in arguments):
            raise UsageError(f"say by --engine ({', '.join(ENGINES)}) what --{name} would set up.")
    args, task_args, config, model_args = parse_with(parser, arguments)
    return args, task_args, config, model_args


def _dtype(name: Any, model: PretrainedConfig) -> torch.dtype:
    """The weights' precision as TRL loads them."""
    if name == "auto":
        name = getattr(model, "dtype", None)
    dtype = getattr(torch, name or "float32", None) if isinstance(name, str) or name is None else name
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"dtype must be auto, float32, bfloat16 or float16; got {name!r}.")
    return dtype


def table(plan: Plan, found: Estimate) -> str:
    """
    An estimate as text.

    Args:
        plan: What it is for.
        found: The estimate.
    """
    config = plan.config
    method = f"{config.method}, teacher={config.teacher}" if config.parts.uses_feedback else config.method
    rollouts = plan.rows * plan.gpus
    trained = "" if found.trained == found.parameters else f" ({found.trained / 1e6:,.1f} M trained)"
    lines = [
        f"{found.parameters / 1e9:.2f} B parameters{trained} · {method} · {plan.engine} on {plan.gpus} GPUs of "
        f"{plan.device.memory:g} GiB",
        f"{rollouts} rollouts of at most {plan.longest} tokens in a batch, {config.per_device_train_batch_size} at a time",
        "",
        "Memory of a GPU",
    ]
    lines += _rows({**found.memory}, gib)
    lines += ["", "and at the peak of"]
    lines += _rows(found.phases, gib)
    verdict = "fits" if found.fits else f"too large by {gib(found.peak - found.limit)}"
    lines += ["", f"At most {gib(found.peak)} of {plan.device.memory:g} GiB: {verdict}", "", "A rollout batch"]
    training = sum(found.flops.values())
    seconds = dict(found.seconds)
    generation = seconds.pop("rollouts, at least")
    lines += [f"  {'rollouts, at least':<44} {'':>12} {generation:>9.1f} s"]
    for name, value in found.flops.items():
        lines.append(f"  {name:<44} {value / 1e15:>8.2f} PFLOP {seconds[name]:>9.1f} s")
    lines.append(f"  {'together':<44} {training / 1e15:>8.2f} PFLOP {generation + sum(seconds.values()):>9.1f} s")
    lines.append(f"  ({plan.efficiency:.0%} of {plan.tflops:g} TFLOP/s; feedback and rewards not counted)")
    return "\n".join(lines)


def gib(value: float) -> str:
    """Bytes as text."""
    amount = value / GIB
    return f"{amount:.1f} GiB" if amount >= 1 else f"{math.ceil(amount * 1024)} MiB"


def _rows(values: dict[str, float], form: Any) -> list[str]:
    return [f"  {name:<44} {form(value):>12}" for name, value in values.items()]


def _json(found: Estimate) -> str:
    numbers = {
        name: getattr(found, name) for name in ("parameters", "trained", "memory", "phases", "flops", "seconds")
    }
    return json.dumps({**numbers, "peak": found.peak, "limit": found.limit, "fits": found.fits}, indent=2)
