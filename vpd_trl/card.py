"""The model card: what was trained, how, on which feedback, to what result, and how to load it."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_config_model_id

from . import __version__
from .card_results import results
from .config import VPDConfig
from .markdown import code, plain, table
from .teacher import TEACHER_FOLDER


if TYPE_CHECKING:
    from .trainer import VPDTrainer


logger = get_logger(__name__)

FILE = "README.md"

# TRL's card has this heading; from there on it is kept
VERSIONS = "### Framework versions"

PAPER = {
    "title": "Learning from Language Feedback via Variational Policy Distillation",
    "id": "2605.15113",
    "citation": textwrap.dedent("""\
        @article{vpd2026,
            title  = {{Learning from Language Feedback via Variational Policy Distillation}},
            author = {Yang Li and Erik Nijkamp and Semih Yavuz and Shafiq Joty},
            year   = 2026,
            eprint = {arXiv:2605.15113},
        }"""),
}

SDPO_PAPER = {
    "title": "Reinforcement Learning via Self-Distillation",
    "id": "2601.20802",
    "citation": textwrap.dedent("""\
        @article{sdpo2026,
            title  = {{Reinforcement Learning via Self-Distillation}},
            author = {Jonas H{\\"u}botter and Frederike L{\\"u}beck and Lejs Behric and Anton Baumann and
                      Marco Bagatella and Daniel Marta and Ido Hakimi and Idan Shenfeld and
                      Thomas {Kleine Buening} and Carlos Guestrin and Andreas Krause},
            year   = 2026,
            eprint = {arXiv:2601.20802},
        }"""),
}


class Identity(NamedTuple):
    """What TRL's card machinery asks of a trainer's class, for one method, and the method in words."""

    name: str
    tags: list[str]
    paper: dict[str, str]
    long_name: str
    story: str


_TEACHER = "Answers got feedback in words. A teacher, which has that feedback in its prompt,"
_HYBRID = "a hybrid of GRPO and self-distillation that the VPD paper compares with"

METHODS = {
    "vpd": Identity(
        "VPD",
        ["trl", "vpd"],
        PAPER,
        "Variational Policy Distillation",
        f"{_TEACHER} was trained to tell successes from failures, and this model, the student, which has none, was "
        "moved towards it.",
    ),
    "sdpo": Identity(
        "SDPO",
        ["trl", "sdpo"],
        SDPO_PAPER,
        "self-distillation",
        f"{_TEACHER} is what this model, the student, which has none, was moved towards.",
    ),
    "grpo": Identity(
        "GRPO",
        ["trl", "grpo"],
        GRPOTrainer._paper,
        "group-relative policy optimization",
        "Answers were made likelier or rarer by their rewards.",
    ),
    "joint_loss": Identity(
        "SDPO+RL, joint loss",
        ["trl", "grpo", "sdpo"],
        PAPER,
        _HYBRID,
        f"{_TEACHER} is what this model, the student, which has none, was moved towards, while answers were made "
        "likelier or rarer by their rewards.",
    ),
    "advantage_reshaping": Identity(
        "SDPO+RL, advantage reshaping",
        ["trl", "grpo", "sdpo"],
        PAPER,
        _HYBRID,
        f"{_TEACHER} adds to the reward of each token by which this model, the student, which has none, was trained.",
    ),
    "advantage_reweighting": Identity(
        "SDPO+RL, advantage reweighting",
        ["trl", "grpo", "sdpo"],
        PAPER,
        _HYBRID,
        f"{_TEACHER} weighs the reward of each token by which this model, the student, which has none, was trained.",
    ),
}

# Settings of TRL and transformers that shape a result; with the fields that VPDConfig adds, all that a card can tell.
# A list of what is told, not of what isn't: fields that are added one day may hold a token or a path
TOLD = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations"),
    *("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed", "data_seed"),
    *("bf16", "fp16", "gradient_checkpointing", "num_generations", "max_completion_length", "shuffle_dataset"),
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "chat_template_kwargs"),
    *("use_vllm", "vllm_mode", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
    *("beta", "epsilon", "epsilon_high", "delta", "loss_type", "importance_sampling_level", "scale_rewards"),
    *("reward_weights", "multi_objective_aggregation", "mask_truncated_completions", "top_entropy_quantile"),
    *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
)

LONGEST_VALUE = 300  # characters


def write(trainer: VPDTrainer, method: Callable, model_name: Any, dataset_name: Any, tags: Any) -> None:
    """
    Write the card to `output_dir`, on the main process: `method`, which is TRL's `create_model_card`, and more.

    TRL's tags, links to trackers, versions and citations are kept. A card is no reason to lose a run: whatever goes
    wrong is a warning, and TRL's card stays.

    Args:
        trainer: The trainer.
        method: `GRPOTrainer.create_model_card`.
        model_name: The model's name. `None`: its repository's, or its folder's.
        dataset_name: The training data's name, on the Hub or not. `None`: the trainer's, or the data set's own.
        tags: One or several.
    """
    if not trainer.is_world_process_zero():
        return
    default = (trainer.hub_model_id or Path(trainer.args.output_dir).absolute().name).split("/")[-1]
    model_name = " ".join(str(model_name or default).split()) or "model"
    dataset_name = dataset_name or trainer.dataset_name or hub_dataset(trainer.train_dataset)
    method(model_name, dataset_name, tags)
    path = os.path.join(trainer.args.output_dir, FILE)
    try:
        theirs = ModelCard.load(path)
        data, base = theirs.data, base_model(trainer)
        data.base_model, data.datasets, data.model_name = base, hub_name(dataset_name), model_name
        data.library_name = "peft" if is_peft_model(trainer.model) else "transformers"
        data.pipeline_tag = "image-text-to-text" if trainer._is_vlm else "text-generation"
        data.tags = sorted(set(data.tags or []))  # TRL's are in the order of a set
        data.pop("licence")  # a placeholder that names none
        body = "\n\n".join(_sections(trainer, theirs.text, model_name, base, dataset_name))
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n").save(path)
    except Exception as error:
        logger.warning(f"The model card {path} is TRL's, as this run's can't be written: {error!r}")


def saves_adapter(trainer: VPDTrainer) -> bool:
    """Whether an adapter of the teacher's goes with the student."""
    return trainer.parts.uses_feedback and trainer.teacher.saves_adapter


def hub_name(name: str | None) -> str | None:
    """A name if it can be one of the Hub's and isn't a local path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name and not os.path.exists(name) else None


def base_model(trainer: VPDTrainer) -> str | None:
    """The model that training began with, if it has a name on the Hub."""
    return hub_name(get_config_model_id(trainer.model.config))


def hub_dataset(dataset: Any) -> str | None:
    """The name on the Hub of a data set that knows where it was loaded from, which few do."""
    for url in getattr(getattr(dataset, "info", None), "download_checksums", None) or {}:
        if str(url).startswith("hf://datasets/"):
            return hub_name(str(url).removeprefix("hf://datasets/").partition("@")[0])
    return None


def _sections(
    trainer: VPDTrainer, theirs: str, model_name: str, base: str | None, dataset_name: str | None
) -> Iterator[str]:
    method = METHODS[trainer.args.method]
    start = "A local model" if base is None else f"[{base}](https://huggingface.co/{base})"
    yield f"# {plain(model_name)}"
    yield (
        f"{start}, trained with {method.name}, {method.long_name} "
        f"([paper](https://huggingface.co/papers/{method.paper['id']})). {method.story}"
    )
    yield f"## Load\n\n```python\n{_loading(trainer, base)}\n```"
    yield f"## Training\n\n{table(('', ''), _training(trainer, base, dataset_name))}"
    # Badges with a link to the run in a tracker
    if links := [line.strip() for line in theirs.splitlines() if line.startswith("[<img ")]:
        yield "\n".join(links)
    yield f"## Results\n\n{results(trainer)}"
    if rows := list(_settings(trainer.args)):
        yield "## Settings that differ from the defaults\n\n" + table(("setting", "value", "default"), rows)
    _, heading, rest = theirs.partition(VERSIONS)
    if heading:
        yield f"{VERSIONS.removeprefix('#')}\n\n- vpd_trl: {__version__}\n{rest.strip()}"


def _training(trainer: VPDTrainer, base: str | None, dataset_name: str | None) -> Iterator[tuple[str, str]]:
    """What, how, on what and on whose word."""
    args, state, feedback = trainer.args, trainer.state, trainer.parts.uses_feedback
    yield "Method", "; ".join((f"`{args.method}`", *_steps(trainer)))
    yield "Student", ("a local model" if base is None else code(base)) + _student(trainer)
    if feedback:
        assert trainer.feedback is not None
        yield "Teacher", f"{trainer.teacher.describe()} (`teacher={args.teacher!r}`)"
        if trainer.parts.distills:
            yield "Its target", _target(args)
        yield "Feedback from", ", ".join(map(code, trainer.feedback.names))
    names = ", ".join(map(code, filter(None, trainer.reward_func_names))) or "nothing"
    success = f"; a rollout with at least {args.success_threshold:g} is a success" if feedback else ""
    yield "Rewards from", names + success
    if dataset_name is not None:
        known = hub_name(dataset_name)
        link = f"[{known}](https://huggingface.co/datasets/{known})"
        yield "Data", code(os.path.basename(dataset_name)) if known is None else link
    step = trainer.weights_step if trainer.weights_step is not None else state.global_step
    yield "Weights", f"after step {step}" + (f" of {state.max_steps}" if state.max_steps else "")


def _steps(trainer: VPDTrainer) -> Iterator[str]:
    args, parts = trainer.args, trainer.parts
    if parts.refines_teacher:
        yield f"an E-step on one of {args.e_step_frequency} rollout batches"
    if parts.distills:
        k = args.distillation_top_k
        yield f"M-step by `{args.divergence}` over {'the full vocabulary' if k is None else f'{k} tokens'}"


def _student(trainer: VPDTrainer) -> str:
    if not is_peft_model(trainer.model):
        return ", all weights trained"
    adapter = next(iter(trainer.model.peft_config.values()))
    kind = getattr(adapter.peft_type, "value", str(adapter.peft_type))
    rank = f" of rank {adapter.r}" if getattr(adapter, "r", None) else ""
    bits = "4" if getattr(trainer.model, "is_loaded_in_4bit", False) else ""
    bits = "8" if getattr(trainer.model, "is_loaded_in_8bit", False) else bits
    return f" with a {kind} adapter{rank}" + (f", on weights quantized to {bits} bits" if bits else "")


def _target(args: VPDConfig) -> str:
    tau = args.target_temperature
    how = "as it is" if tau == 1 else f"{'sharpened' if tau < 1 else 'flattened'}, q^(1/{tau:g})"
    return f"its distribution q {how} (`teacher_temperature`)"


def _loading(trainer: VPDTrainer, base: str | None) -> str:
    """Code that loads the student, and the teacher where it has weights of its own in the repository."""
    place, student_adapter = trainer.hub_model_id or Path(trainer.args.output_dir).name, is_peft_model(trainer.model)
    with_teacher, vision = saves_adapter(trainer), trainer._is_vlm
    auto, kind = ("AutoModelForImageTextToText", "Processor") if vision else ("AutoModelForCausalLM", "Tokenizer")
    bits = _quantization(trainer.model) if student_adapter else None
    # An adapter was trained on the base's weights as they were in so many bits
    option = "" if bits is None else ", quantization_config=quantization"
    peft, classes, load = [], [auto], [f"student = {auto}.from_pretrained(name)"]
    if student_adapter and vision:  # PEFT has no class that loads both at once
        peft = ["PeftConfig", "PeftModel"]
        load = [f"base = {auto}.from_pretrained(PeftConfig.from_pretrained(name).base_model_name_or_path{option})"]
        load += ["student = PeftModel.from_pretrained(base, name)"]
    elif student_adapter:
        peft, classes = ["AutoPeftModelForCausalLM"], []
        load = [f"student = AutoPeftModelForCausalLM.from_pretrained(name{option})"]
    if bits is not None:
        load = [f"quantization = {bits}", *load]
    merges = with_teacher and not _is_quantized(trainer.model)
    peft += ["PeftModel"] * (merges and "PeftModel" not in peft)
    classes = [*classes, f"Auto{kind}", *["BitsAndBytesConfig"] * (bits is not None)]
    lines = [f"from peft import {', '.join(peft)}"] * bool(peft)
    lines += [
        f"from transformers import {', '.join(classes)}",
        "",
        f"name = {json.dumps(place)}",
        f"{kind.lower()} = Auto{kind}.from_pretrained(name)",
        *load,
    ]
    if with_teacher:
        folder = f'subfolder="{Path(TEACHER_FOLDER).as_posix()}"'
        lines += ["", "# The teacher that the student learned from; its prompts hold feedback"]
        if merges and student_adapter:
            lines += ["student = student.merge_and_unload()"]
        if merges:
            lines += [f"teacher = PeftModel.from_pretrained(student, name, {folder})"]
        else:  # to merge the student's adapter into few bits would round it
            lines += [f'student.load_adapter(name, "teacher", {folder})']
            lines += ['student.base_model.set_adapter(["default", "teacher"])', "teacher = student"]
    return "\n".join(lines)


def _is_quantized(model: Any) -> bool:
    return getattr(model.config, "quantization_config", None) is not None


def _quantization(model: Any) -> str | None:
    """Code for how a model's weights were quantized as they were loaded; `None` if they weren't, or came so."""
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, BitsAndBytesConfig) or getattr(model.hf_quantizer, "pre_quantized", False):
        return None
    values = {name: value for name, value in config.to_diff_dict().items() if not name.startswith("_")}
    shown = (f"    {name}={json.dumps(v) if isinstance(v, str) else repr(v)}," for name, v in sorted(values.items()))
    return "\n".join(("BitsAndBytesConfig(", *shown, ")"))


def _settings(args: VPDConfig) -> Iterator[tuple[str, str, str]]:
    """The settings that shaped this run and are not the defaults, with both values."""
    added = {f.name for f in fields(VPDConfig)} - {f.name for f in fields(GRPOConfig)}
    for f in fields(VPDConfig):
        if f.name not in added and f.name not in TOLD:
            continue
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        value = getattr(args, f.name)
        if value != default and not _computed(args, f.name):
            yield f"`{f.name}`", code(_shown(value)), code(_shown(default))


def _computed(args: VPDConfig, name: str) -> bool:
    """Whether a field has the value that it is given where it is left open."""
    if name == "steps_per_generation":
        return args.steps_per_generation == args.gradient_accumulation_steps
    if name == "advantage_mix_decay":
        return args.advantage_mix_decay == ("linear" if args.method == "advantage_reweighting" else "constant")
    return name == "method"  # told already


def _shown(value: Any) -> str:
    value = _without_paths(value)
    text = value if isinstance(value, str) else repr(getattr(value, "value", value))
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + " …"


def _without_paths(value: Any) -> Any:
    """A value in which paths of this machine are the names of their files alone."""
    if isinstance(value, dict):
        return {_without_paths(key): _without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(item) for item in value]
    if isinstance(value, (str, os.PathLike)) and os.path.isabs(value) and len(Path(value).parts) > 2:
        return Path(value).name
    return value
