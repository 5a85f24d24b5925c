"""A parser of dataclass fields, from a recipe and the command line, whose help and errors a person can read."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

import yaml
from transformers import TrainingArguments
from trl import GRPOConfig, ModelConfig, TrlParser

from ..config import VPDConfig
from .arguments import TaskArguments
from .errors import UsageError, suggestion, usage_errors


USAGE = "vpd-trl train --config recipe.yaml [--FIELD VALUE ...]"

DESCRIPTION = """Train a model on a task.

A recipe is a YAML file with any of the fields below; what the command line says comes before it. A mapping called env in
the recipe holds environment variables. Ctrl-C (or SIGTERM) ends a run after the current step with a checkpoint, which
--resume goes on from; a second one ends it at once. On several devices: accelerate launch [...] -m vpd_trl.cli train
--config recipe.yaml"""


class Formatter(argparse.HelpFormatter):
    """Each field once, under the name that it has in a recipe."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.dest == "help":
            return "-h, --help"
        name = action.option_strings[0]
        kind = getattr(action.type, "__name__", "str")
        kind = {"string_to_bool": "BOOL", "parse": "VALUE", "<lambda>": "CHOICE"}.get(kind, kind.upper())
        if action.choices is not None:
            kind = "{" + ",".join(map(str, action.choices)) + "}"
        return f"{name} [{kind}]" if action.nargs == "?" else f"{name} {kind}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = " ".join((action.help or "").split())
        if action.dest == "help" or (action.default is None and "None: " in text):
            return text
        return f"{text} (default: {repr(action.default).replace('%', '%%')})".strip()


class RecipeParser(TrlParser):
    """
    TRL's parser, with errors as [`UsageError`], near matches of unknown fields, and help by groups.

    It is strict: names are never guessed from their beginnings.

    Args:
        *more: Dataclasses of a command that asks for more than training does.
        config: Of the trainer.
        prog, usage, description: Of the help.
    """

    def __init__(
        self,
        *more: Any,
        config: type[VPDConfig] = VPDConfig,
        prog: str = "vpd-trl train",
        usage: str = USAGE,
        description: str = DESCRIPTION,
    ) -> None:
        self._more = more
        super().__init__(
            [*more, TaskArguments, config, ModelConfig],
            prog=prog,
            usage=usage,
            description=description,
            formatter_class=Formatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}.")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            if not name.startswith("--"):
                raise UsageError(f"{name!r} belongs to no option; options are given as --field value.")
            raise UsageError(f"there is no field {name}.{suggestion(name.lstrip('-'), self.names)}")
        return namespace, unknown

    def set_defaults_with_config(self, **recipe: Any) -> list[str]:
        for name in recipe:
            if name not in self.names:
                raise UsageError(f"the recipe has a field {name!r} that doesn't exist.{suggestion(name, self.names)}")
        return super().set_defaults_with_config(**recipe)

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        for paragraph in (self.description or "").split("\n\n"):
            formatter.add_text(paragraph)
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:  # the first of a name, not its --no_ form
            actions.setdefault(action.dest, action)
        own = [(self.prog.split()[-1], [f.name for kind in self._more for f in fields(kind)])] if self._more else []
        for title, names in [*own, *_groups()]:
            formatter.start_section(title)
            formatter.add_arguments([actions[name] for name in names if name in actions])
            formatter.end_section()
        formatter.add_text("A field that is true by default is switched off with --field false or --no_field.")
        return formatter.format_help()

    @property
    def names(self) -> list[str]:
        """All fields."""
        return [action.dest for action in self._actions if action.dest != "help"]


def parse(arguments: Sequence[str]) -> tuple[TaskArguments, VPDConfig, ModelConfig]:
    """
    The three groups of arguments of `vpd-trl train`.

    Args:
        arguments: What the command line holds after `train`.

    Raises:
        UsageError: If there is no such recipe or field, or a value is not allowed.
    """
    if not any(argument.startswith("--") for argument in arguments):  # before the machine is asked what it can do
        raise UsageError("task and model_name_or_path are missing: give a recipe (--config recipe.yaml), or set them.")
    task, config, model = parse_with(RecipeParser(), arguments)
    for name, value in (("task", task.task), ("model_name_or_path", model.model_name_or_path)):
        if not value:
            raise UsageError(f"{name} is missing: set it in the recipe, or with --{name}.")
    return task, config, model


def parse_with(parser: RecipeParser, arguments: Sequence[str]) -> tuple[Any, ...]:
    """
    The groups of arguments that a parser knows, whatever is missing.

    Args:
        parser: Of the command.
        arguments: What the command line holds after its name.

    Raises:
        UsageError: If there is no such recipe or field, or a value is not allowed.
    """
    with usage_errors():
        try:
            return parser.parse_args_and_config(_recipe_apart(arguments))
        except yaml.YAMLError as error:
            raise ValueError(f"the recipe is not YAML: {error}") from error


def _recipe_apart(arguments: Iterable[str]) -> list[str]:
    """The arguments with `--config=recipe.yaml` as two, after a look whether the recipe is there."""
    split: list[str] = []
    for argument in arguments:
        split += argument.split("=", 1) if argument.startswith("--config=") else [argument]
    if "--config" in split:
        place = split.index("--config") + 1
        if place == len(split) or split[place].startswith("--"):
            raise UsageError("--config needs the path of a recipe.")
        if not os.path.isfile(split[place]):
            raise UsageError(f"there is no recipe {split[place]}.")
        if "--config" in split[place:]:
            raise UsageError("--config was given twice; there can be one recipe.")
    return split


def _groups() -> list[tuple[str, list[str]]]:
    """The fields by what a person looks for, the fewest and newest first."""

    def names(kind: Any, *without: Any) -> list[str]:
        taken = {f.name for base in without for f in fields(base)}
        return [f.name for f in fields(kind) if f.init and f.name not in taken]

    vpd = names(VPDConfig, GRPOConfig)
    starts = [vpd.index(name) for name in ("method", "teacher", "e_step_frequency", "divergence", "joint_rl_weight")]
    parts = [vpd[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
    titles = ("VPD: method", "VPD: teacher", "VPD: E-step", "VPD: M-step", "VPD: hybrids with GRPO")
    return [
        ("help", ["help"]),
        ("task", names(TaskArguments)),
        *zip(titles, parts, strict=True),
        ("model (TRL's ModelConfig)", names(ModelConfig)),
        ("rollouts and GRPO (TRL's GRPOConfig)", names(GRPOConfig, TrainingArguments)),
        ("training (transformers' TrainingArguments)", names(TrainingArguments)),
    ]
