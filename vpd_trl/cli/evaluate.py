"""`vpd-trl evaluate`: a model on a task."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .arguments import mapping
from .errors import UsageError, suggestion, usage_errors


if TYPE_CHECKING:
    from ..evaluation import Engine, Evaluation, EvaluationResult


DESCRIPTION = """Measure a model on a task by the paper's protocol: avg@k, pass@k, and majority@k where answers are short,
with bootstrap intervals over problems. Results are written while it runs; the same command goes on where it was
stopped. On several devices: accelerate launch [...] -m vpd_trl.cli evaluate [...]"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}.")


def make_parser() -> argparse.ArgumentParser:
    """The parser of `vpd-trl evaluate`."""
    parser = _Parser(prog="vpd-trl evaluate", description=DESCRIPTION, allow_abbrev=False)

    def add(group: Any, name: str, text: str, **options: Any) -> None:
        both = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
        if "type" in options:
            options["metavar"] = options["type"].__name__.upper()
        group.add_argument(*both, help=text, **options)

    what = parser.add_argument_group("what")
    add(what, "model", "name or folder of a model, or folder of an adapter", required=True, type=str)
    add(what, "task", "name of a task, or path/to/file.py:Class, or package.module:Class", required=True, type=str)
    add(what, "task_kwargs", "options of the task, as JSON", type=str)
    add(what, "splits", "test splits; default: all of the task", nargs="+", type=str)
    add(what, "limit", "the first so many problems of each split; default: all", type=int)
    how = parser.add_argument_group("how (defaults: the paper's)")
    add(how, "k", "samples per problem; default: the paper's number for the task", type=int)
    add(how, "temperature", "default: 0.6; 0 takes the most likely token", type=float)
    add(how, "top_p", "default: 0.95", type=float)
    add(how, "top_k", "default: 0, which is all tokens", type=int)
    add(how, "max_new_tokens", "longest completion in tokens; default: 8192", type=int)
    add(how, "seed", "of the samples and the bootstrap; default: 0", type=int)
    where = parser.add_argument_group("with what")
    where.add_argument(
        "--engine", choices=("transformers", "vllm"), default="transformers", help="default: transformers"
    )
    add(where, "batch_size", "completions at once; default: 64 with transformers, 4096 with vllm", type=int)
    add(where, "engine_kwargs", 'options for loading the model, as JSON: \'{"dtype": "bfloat16"}\'', type=str)
    out = parser.add_argument_group("results")
    add(out, "output_dir", "default: evaluation/MODEL/TASK; a folder per split if there are several", type=str)
    add(out, "no_resume", "overwrite results that are there instead of going on with them", action="store_true")
    return parser


def run(arguments: Sequence[str]) -> None:
    """
    Evaluate as the arguments say, print a table and write the results.

    Args:
        arguments: What the command line holds after `evaluate`.

    Raises:
        UsageError: If the arguments are wrong, or the folder holds results of other settings.
        Exception: Whatever sampling or scoring raises.
    """
    args = _parse(arguments)
    from ..tasks import load_task

    with usage_errors():
        task = load_task(args.task, **mapping("task_kwargs", args.task_kwargs))
        found = task.evaluation(k=args.k, sampling=_sampling(args), splits=args.splits, limit=args.limit)
        accelerator = _accelerator(args)
        engine = _engine(args, accelerator)
    evaluations: Mapping[str, Evaluation] = found if isinstance(found, Mapping) else {"": found}
    folder = Path(args.output_dir or Path("evaluation") / _folder_name(args.model) / _folder_name(task.name))
    results = {}
    for name, evaluation in evaluations.items():
        results[name] = _run_one(evaluation, engine, folder / name, args, accelerator)
    if accelerator is None or accelerator.is_main_process:
        print(table(results))
        print(f"\nResults: {folder}")
    if accelerator is not None:
        accelerator.end_training()


def _run_one(evaluation: Any, engine: Engine, folder: Path, args: Any, accelerator: Any) -> EvaluationResult:
    try:
        return evaluation.run(engine, folder, resume=not args.no_resume, accelerator=accelerator)
    except ValueError as error:
        if "results of other settings" in str(error):
            raise UsageError(f"{str(error).replace('resume=False', '--no_resume')}") from error
        raise


def table(results: Mapping[str, EvaluationResult]) -> str:
    """
    The metrics of evaluations, with their intervals, as text.

    Args:
        results: By the name of the split; one result may have a blank name.
    """
    rows = [("", "problems", "metric", "value", "interval")]
    for name, result in results.items():
        label = name or result.name
        for metric, value in result.metrics.items():
            interval = result.intervals[metric]
            spread = "–" if interval is None else f"{interval[0]:.1%} – {interval[1]:.1%}"
            rows.append((label, str(result.counts["problems"]), metric, f"{value:.1%}", spread))
            label = ""
        rows.append((label, "", "not ended", f"{result.truncated:.1%}", ""))
        rows.append((label, "", "mean tokens", f"{result.mean_tokens:.0f}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "─" * (sum(widths) + 8), *lines[1:]])


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = make_parser()
    args, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        names = [action.dest for action in parser._actions]
        name = unknown[0].split("=")[0]
        raise UsageError(f"there is no option {name}.{suggestion(name.lstrip('-'), names)}")
    return args


def _sampling(args: Any) -> Any:
    from ..evaluation import Sampling

    names = ("temperature", "top_p", "top_k", "max_new_tokens", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return Sampling(**given) if given else None


def _accelerator(args: Any) -> Any:
    """For several processes; vLLM spreads over devices by itself."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    if args.engine == "vllm":
        raise UsageError("vllm runs in one process; use --engine_kwargs '{\"tensor_parallel_size\": 2}'.")
    from accelerate import Accelerator

    return Accelerator()


def _engine(args: Any, accelerator: Any) -> Engine:
    from ..evaluation import TransformersEngine, VLLMEngine

    options = mapping("engine_kwargs", args.engine_kwargs)
    if args.batch_size is not None:
        options["batch_size"] = args.batch_size
    if args.engine == "vllm":
        return VLLMEngine(args.model, **options)
    if accelerator is not None:
        options["device"] = accelerator.device
    adapter = Path(args.model) / "adapter_config.json"
    if adapter.is_file() and not (Path(args.model) / "tokenizer_config.json").is_file():
        options["tokenizer"] = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return TransformersEngine(args.model, **options)


def _folder_name(name: str) -> str:
    """The last part of a path or of a name on the Hub, as a folder's name."""
    last = re.sub(r"[^\w.-]+", "-", Path(name).resolve().name if Path(name).exists() else name.split("/")[-1])
    return last.strip(".-") or "model"
