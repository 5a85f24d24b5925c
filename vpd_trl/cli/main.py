"""Picks the command, and turns what it raises into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from .. import __version__
from .errors import BAD_USAGE, FAILED, INTERRUPTED, Interrupted, UsageError, one_line, suggestion


COMMANDS = {
    "train": "train a model on a task, from a recipe (a YAML file) and options",
    "evaluate": "measure a model on a task: avg@k, pass@k, majority@k with intervals",
    "estimate": "what a run needs before it starts: memory of each GPU, operations and time",
    "report": "plots and tables of one or more runs, as PNG files and one HTML page",
}

HELP = f"""usage: vpd-trl COMMAND [OPTIONS]

Train language models from language feedback: Variational Policy Distillation.

commands:
{chr(10).join(f"  {name:<10} {text}" for name, text in COMMANDS.items())}

options:
  -h, --help     this text; 'vpd-trl COMMAND --help' has all options of a command
  --version      the version
  --traceback    with any command: show where an error came from (also: VPD_TRL_TRACEBACK=1)

examples:
  vpd-trl train --config recipe.yaml --learning_rate 1e-5
  accelerate launch --num_processes 8 -m vpd_trl.cli train --config recipe.yaml
  vpd-trl evaluate --model runs/vpd --task sciknoweval --task_kwargs '{{"domain": "biology"}}'
  vpd-trl estimate --config recipe.yaml --gpus 8 --gpu h100
  vpd-trl report runs/vpd runs/grpo --output report
"""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv: The arguments; `None`: those of the process.

    Returns:
        The exit code: 0 if all went well, 2 if the arguments or the configuration are wrong, 130 after an interruption,
        1 for any other error. An error is one line on the standard error, unless the traceback is asked for.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = os.environ.get("VPD_TRL_TRACEBACK", "") not in ("", "0")
    if "--traceback" in arguments:
        arguments = [argument for argument in arguments if argument != "--traceback"]
        show_traceback = True
    try:
        return _dispatch(arguments)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except (Exception, KeyboardInterrupt) as error:
        if show_traceback and not isinstance(error, Interrupted):
            traceback.print_exc()
        code, text = _outcome(error, "" if show_traceback else " (--traceback shows where)")
    if text:
        print(f"vpd-trl: {_process()}{text}", file=sys.stderr, flush=True)
    return code


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if arguments else BAD_USAGE
    if arguments[0] in ("--version", "-V"):
        print(f"vpd-trl {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        kind = "option" if command.startswith("-") else "command"
        raise UsageError(
            f"there is no {kind} {command!r}; the commands are {', '.join(COMMANDS)}.{suggestion(command, COMMANDS)}"
        )
    importlib.import_module(f".{command}", __package__).run(rest)
    return 0


def _outcome(error: BaseException, hint: str) -> tuple[int, str]:
    """The exit code and what is said."""
    if isinstance(error, UsageError):
        return BAD_USAGE, f"error: {error}"
    if isinstance(error, Interrupted):
        return INTERRUPTED, str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    return FAILED, f"error: {type(error).__name__}: {one_line(error)}{hint}"


def _process() -> str:
    """Which of several processes speaks."""
    return f"[process {os.environ.get('RANK', '0')}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
