"""What an evaluation found, and the folder that it is written to while it runs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..prompts import Prompt


SETTINGS, PROBLEMS, SUMMARY = "settings.json", "problems.jsonl", "summary.json"


@dataclass(frozen=True)
class ProblemResult:
    """
    The k samples of one problem; a line of `problems.jsonl`.

    Attributes:
        index: The problem's place in the data set.
        prompt: Its prompt.
        completions: (k,) texts.
        scores: (k,) scores; `None` where no reward function scored a sample.
        answers: (k,) what each sample answers, `None` where it has no answer; `None` as a whole without `answer_fn`.
        finished: (k,) whether the model ended each completion itself.
        tokens: (k,) lengths in tokens.
        columns: The data set's other columns.
    """

    index: int
    prompt: Prompt
    completions: list[str]
    scores: list[float | None]
    answers: list[str | None] | None
    finished: list[bool]
    tokens: list[int]
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationResult:
    """
    What an evaluation found; `summary.json` holds all of it but the problems.

    Attributes:
        name: The evaluation's name.
        metrics: Values by name: `avg@k`, `pass@…`, and `majority@k` where there is an `answer_fn`.
        intervals: The bootstrap interval (low, high) of each metric, `None` for fewer than 2 problems.
        counts: Numbers of `problems`, `samples`, and `unscored` samples, which count as failures with score 0.
        truncated: Share of the samples that the model did not end itself.
        mean_tokens: Mean length of the samples in tokens.
        settings: What the results depend on.
        versions: Of the packages that were used.
        problems: Each problem's samples, in the data set's order.
    """

    name: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float] | None]
    counts: dict[str, int]
    truncated: float
    mean_tokens: float
    settings: dict[str, Any]
    versions: dict[str, str]
    problems: list[ProblemResult] = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """Everything but the problems, as JSON values."""
        metrics = {}
        for name, value in self.metrics.items():
            low, high = self.intervals[name] or (None, None)
            metrics[name] = {"value": value, "low": low, "high": high}
        return {
            "name": self.name,
            "metrics": metrics,
            **self.counts,
            "truncated": self.truncated,
            "mean_tokens": self.mean_tokens,
            "settings": self.settings,
            "versions": self.versions,
        }

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.counts['problems']} problems, {self.counts['samples']} samples"]
        for name, value in self.metrics.items():
            interval = self.intervals[name]
            spread = "" if interval is None else f"  [{interval[0]:.3f}, {interval[1]:.3f}]"
            lines.append(f"  {name:<12} {value:.3f}{spread}")
        return "\n".join(lines)


class ResultFolder:
    """
    The folder of one evaluation: its settings, a line per finished problem, and a summary at the end.

    Args:
        path: The folder.
        settings: What the results depend on, as JSON values.
        resume: Whether results that are there already are kept. They are overwritten otherwise.

    Raises:
        ValueError: If the folder holds results of other settings, or lines that can't be read.
    """

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any], *, resume: bool = True) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.finished: dict[int, ProblemResult] = {}
        if resume and (self.path / PROBLEMS).exists():
            self._check_settings(settings)
            self.finished = {problem.index: problem for problem in self._read()}
        else:
            for name in (PROBLEMS, SUMMARY):
                (self.path / name).unlink(missing_ok=True)
            _write_json(self.path / SETTINGS, settings)
        # A lone surrogate, which UTF-8 can't hold, becomes the escape that JSON has for it
        self._file = (self.path / PROBLEMS).open("a", encoding="utf-8", errors="backslashreplace")

    def add(self, problems: Iterable[ProblemResult]) -> None:
        """Write finished problems."""
        for problem in problems:
            self._file.write(json.dumps(asdict(problem), ensure_ascii=False) + "\n")
        self._file.flush()

    def finish(self, result: EvaluationResult) -> None:
        """Write the summary."""
        _write_json(self.path / SUMMARY, result.summary())

    def close(self) -> None:
        """Close the file of the problems."""
        self._file.close()

    def _check_settings(self, settings: dict[str, Any]) -> None:
        try:
            theirs = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{self.path} holds results without readable settings ({SETTINGS}), so they can't be resumed. Use "
                "another folder, or overwrite them with resume=False."
            ) from error
        differences = _differences(theirs, json.loads(json.dumps(settings)))
        if differences:
            raise ValueError(
                f"{self.path} holds results of other settings: {'; '.join(differences)}. Use another folder, or "
                "overwrite them with resume=False."
            )

    def _read(self) -> list[ProblemResult]:
        """The finished problems. A last line that was not written to its end is cut off."""
        path = self.path / PROBLEMS
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
        problems = []
        for number, line in enumerate(content[:whole].decode("utf-8").split("\n")[:-1], start=1):
            try:
                problems.append(ProblemResult(**json.loads(line)))
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(
                    f"Line {number} of {path} is not a result: {error}. Remove the line, or overwrite the results with "
                    "resume=False."
                ) from error
        return problems


def _differences(theirs: Any, ours: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, in words."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys: Sequence[str] = sorted({*theirs, *ours})
        return [
            text
            for key in keys
            for text in _differences(theirs.get(key), ours.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if theirs == ours else [f"{name} is {json.dumps(theirs)} there and {json.dumps(ours)} here"]


def _write_json(path: Path, value: Any) -> None:
    """Write a file that is whole or not there."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def json_value(value: Any) -> Any:
    """A value of a data set's column as JSON has it: what it can't hold becomes its text, or its type's name."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): json_value(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(entry) for entry in value]
    if hasattr(value, "tolist"):  # an array
        return json_value(value.tolist())
    if hasattr(value, "isoformat"):  # a date or time
        return value.isoformat()
    return f"<{type(value).__name__}>"
