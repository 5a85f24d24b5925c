"""An evaluation: k samples of each problem, scored, saved as they come, and summed up."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import TrainerState
from trl.trainer.utils import get_callable_name

from ..processes import meet, stop_together
from . import estimators
from .engines import Engine, Sample, Sampling
from .grading import Grader
from .results import EvaluationResult, ProblemResult, ResultFolder, json_value


_ALONE = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True)


class Evaluation:
    """
    Avg@k, pass@k and majority@k of a model on a set of problems, by the paper's protocol unless told otherwise.

    ```python
    >>> from vpd_trl.evaluation import Evaluation, TransformersEngine

    >>> evaluation = Evaluation(test_set, my_reward, k=16)
    >>> result = evaluation.run(TransformersEngine("Qwen/Qwen3-1.7B"), "results/qwen3")
    >>> result.metrics["avg@16"], result.intervals["avg@16"]
    ```

    The same object evaluates within training, as `VPDTrainer(evaluation=...)`.

    Args:
        dataset: A [`~datasets.Dataset`] or a list of dictionaries: the column `prompt`, a string or a conversation, and
            whatever else the reward functions need.
        reward_funcs: One reward function in TRL's form, or a list of them. Scores are their weighted sums, in [0, 1].
        k: Samples per problem. Paper: 16 (science), 4 (code, mathematics).
        sampling: How they are sampled. `None`: as in the paper, `Sampling()`, but within training no longer than the
            rollouts (`max_completion_length`), as 8,192 tokens of a model that doesn't end can take hours.
        answer_fn: Finds the answer in a completion's text, `answer_fn(text) -> str | None`. Equal answers must be equal
            strings. It adds majority@k.
        success_threshold: A sample is a success when its score is at least this.
        reward_weights: One per reward function; `None`: 1 each.
        pass_at: The numbers of samples that pass@… is estimated for, each at most k. `None`: k and the powers of two
            below it.
        name: Shown in the progress bar and the summary.
        save_columns: Columns of the data set that are saved beside each problem's samples. `None`: all.
        resamples: Of the bootstrap that the intervals are from.
        confidence: Of the intervals, in (0, 1).

    Raises:
        TypeError, ValueError: If an argument is of a wrong type or out of its range.
    """

    def __init__(
        self,
        dataset: Dataset | Sequence[Mapping[str, Any]],
        reward_funcs: Callable | Sequence[Callable],
        *,
        k: int = 16,
        sampling: Sampling | None = None,
        answer_fn: Callable[[str], str | None] | None = None,
        success_threshold: float = 1.0,
        reward_weights: Sequence[float] | None = None,
        pass_at: Sequence[int] | None = None,
        name: str = "evaluation",
        save_columns: Sequence[str] | None = None,
        resamples: int = 10_000,
        confidence: float = 0.95,
    ) -> None:
        self.rows = _rows(dataset)
        if images := sorted({"image", "images"} & self.rows[0].keys()):
            raise ValueError(
                f"The problems have images ({', '.join(images)}), but evaluations are of text alone, and the model would "
                "not see them. Remove the column; in training, GRPO's own evaluation of an eval_dataset shows images."
            )
        self.grader = Grader(reward_funcs, reward_weights)
        self.grader.check_columns(list(self.rows[0]))
        self.k, self.pass_at = _check_samples(k, pass_at)
        self.sampling = Sampling() if sampling is None else sampling
        self.sampling_given = sampling is not None
        self.answer_fn = answer_fn
        self.success_threshold = success_threshold
        self.name = name
        columns = [column for column in self.rows[0] if column != "prompt"]
        self.save_columns = columns if save_columns is None else list(save_columns)
        if unknown := sorted(set(self.save_columns) - set(columns)):
            raise ValueError(
                f"save_columns has {unknown}; the data set has the columns {', '.join(columns) or 'none'}."
            )
        if resamples < 1 or not 0 < confidence < 1:
            raise ValueError(
                f"resamples must be at least 1 and confidence in (0, 1); got {resamples} and {confidence}."
            )
        self.resamples, self.confidence = resamples, confidence

    @property
    def metric_names(self) -> list[str]:
        """The names of the metrics of a result."""
        majority = [] if self.answer_fn is None else [f"majority@{self.k}"]
        return [f"avg@{self.k}", *(f"pass@{n}" for n in self.pass_at), *majority]

    def run(
        self,
        engine: Engine,
        output_dir: str | os.PathLike[str] | None = None,
        *,
        resume: bool = True,
        progress: bool = True,
        accelerator: Any = None,
        trainer_state: TrainerState | None = None,
    ) -> EvaluationResult:
        """
        Evaluate.

        Args:
            engine: Samples the completions.
            output_dir: Where results are saved: `settings.json`, `problems.jsonl` with a line per finished problem, in
                the order in which they finish, and `summary.json` at the end. `None`: nowhere.
            resume: Whether problems that are finished in `output_dir` are kept and not sampled again. If not, they are
                overwritten.
            progress: Whether a progress bar is shown.
            accelerator: For several processes; make it before the engine, as it picks the process's device. All must
                call this; each takes a share of the problems, the main one writes the files, and all return the same.
            trainer_state: Passed to the reward functions.

        Raises:
            ValueError: If `output_dir` holds results of other settings; the message says what differs.
            Exception: Whatever the engine or a reward function raises.
        """
        accelerator = _ALONE if accelerator is None else accelerator
        settings, folder = {}, None
        with stop_together(accelerator):
            if accelerator.is_main_process:
                settings = self._settings(engine)
                if output_dir is not None:
                    folder = ResultFolder(output_dir, settings, resume=resume)
        known = (settings, {} if folder is None else folder.finished)
        settings, finished = meet(accelerator, "the start of an evaluation", known)[0]
        try:
            problems = self._sample(engine, finished, folder, progress, accelerator, trainer_state)
            result = self._result(problems, settings)
            with stop_together(accelerator):
                if folder is not None:
                    folder.finish(result)
        finally:
            if folder is not None:
                folder.close()
        return result

    def _sample(
        self,
        engine: Engine,
        finished: dict[int, ProblemResult],
        folder: ResultFolder | None,
        progress: bool,
        accelerator: Any,
        trainer_state: TrainerState | None,
    ) -> list[ProblemResult]:
        """The results of all problems, in the data set's order, those in `finished` as they are."""
        done = dict(finished)
        # Prompts of like length together, the longest first, so that memory is short at once or never
        waiting = [i for i in range(len(self.rows)) if i not in done]
        waiting.sort(key=lambda i: len(str(self.rows[i]["prompt"])), reverse=True)
        share = max(1, engine.batch_size // self.k)
        rank, world = accelerator.process_index, accelerator.num_processes
        bar = tqdm(
            total=len(self.rows),
            initial=len(done),
            desc=self.name,
            unit="problem",
            disable=not (progress and accelerator.is_main_process),
        )
        with bar:
            for start in range(0, len(waiting), share * world):
                portion = waiting[start : start + share * world]
                with stop_together(accelerator):
                    mine = portion[rank::world]
                    # The first process has the most. Where all must do equally much, the others do one in vain
                    missing = len(portion[::world]) - len(mine) if engine.collective else 0
                    asked = mine + portion[:missing]
                    solved = self._solve(engine, asked, trainer_state)[: len(mine)]
                parts = meet(accelerator, "the results of an evaluation", solved)
                new = [problem for part in parts for problem in part]
                done |= {problem.index: problem for problem in new}
                with stop_together(accelerator):
                    if folder is not None:
                        folder.add(new)
                bar.update(len(new))
                bar.set_postfix({f"avg@{self.k}": f"{self._scores(list(done.values())).mean():.3f}"})
        return [done[i] for i in range(len(self.rows))]

    def _solve(
        self, engine: Engine, indices: Sequence[int], trainer_state: TrainerState | None
    ) -> list[ProblemResult]:
        """Sample and score some problems."""
        rows = [self.rows[i] for i in indices]
        if not rows:
            return []
        seeds = [self.sampling.problem_seed(i) for i in indices]
        samples = engine.generate([row["prompt"] for row in rows], k=self.k, sampling=self.sampling, seeds=seeds)
        if [len(group) for group in samples] != [self.k] * len(rows):
            raise ValueError(
                f"The engine must return {self.k} samples for each of {len(rows)} prompts; got "
                f"{[len(group) for group in samples]}."
            )
        scores = self.grader(rows, samples, trainer_state)
        return [self._problem(*values) for values in zip(indices, rows, samples, scores, strict=True)]

    def _problem(
        self, index: int, row: dict[str, Any], samples: Sequence[Sample], scores: list[float | None]
    ) -> ProblemResult:
        texts = [sample.text for sample in samples]
        return ProblemResult(
            index=index,
            prompt=json_value(row["prompt"]),
            completions=texts,
            scores=scores,
            answers=None if self.answer_fn is None else [self._answer(text) for text in texts],
            finished=[sample.finished for sample in samples],
            tokens=[len(sample.ids) for sample in samples],
            columns={column: json_value(row[column]) for column in self.save_columns},
        )

    def _answer(self, text: str) -> str | None:
        assert self.answer_fn is not None
        answer = self.answer_fn(text)
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"answer_fn must return a string or None; got {type(answer).__name__}: {answer!r}.")
        return answer

    def _scores(self, problems: Sequence[ProblemResult]) -> np.ndarray:
        """(P, k) scores, 0 where a sample was not scored."""
        return np.array([[0.0 if s is None else s for s in problem.scores] for problem in problems])

    def _result(self, problems: list[ProblemResult], settings: dict[str, Any]) -> EvaluationResult:
        scores = self._scores(problems)
        scored = np.array([[s is not None for s in problem.scores] for problem in problems])
        successes = scored & (scores >= self.success_threshold)
        values = [estimators.avg_at_k(scores), *(estimators.pass_at_k(successes, n) for n in self.pass_at)]
        if self.answer_fn is not None:
            values.append(estimators.majority_at_k([problem.answers or [] for problem in problems], successes))
        table = np.stack(values, axis=1)
        intervals = estimators.bootstrap_intervals(
            table, resamples=self.resamples, confidence=self.confidence, seed=self.sampling.seed
        )
        names = self.metric_names
        return EvaluationResult(
            name=self.name,
            metrics=dict(zip(names, table.mean(axis=0).tolist(), strict=True)),
            intervals=dict(zip(names, intervals, strict=True)),
            counts={"problems": len(problems), "samples": scores.size, "unscored": int((~scored).sum())},
            truncated=1.0 - float(np.mean([problem.finished for problem in problems])),
            mean_tokens=float(np.mean([problem.tokens for problem in problems])),
            settings=settings,
            versions=_versions(settings),
            problems=problems,
        )

    def _settings(self, engine: Engine) -> dict[str, Any]:
        """What the results depend on."""
        return json_value(
            {
                "model": engine.describe(),
                "dataset": {"problems": len(self.rows), "digest": self._digest},
                "k": self.k,
                "sampling": asdict(self.sampling),
                "reward_funcs": self.grader.names,
                "reward_options": self.grader.options,
                "reward_weights": self.grader.weights,
                "success_threshold": self.success_threshold,
                "answer_fn": None if self.answer_fn is None else get_callable_name(self.answer_fn),
            }
        )

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(json_value(row), sort_keys=True).encode())
        return digest.hexdigest()[:16]


def _rows(dataset: Any) -> list[dict[str, Any]]:
    if not isinstance(dataset, (Dataset, list, tuple)):
        raise TypeError(
            f"dataset must be a datasets.Dataset or a list of dictionaries; got {type(dataset).__name__}. Of a stream, "
            "take a list: list(stream.take(500))."
        )
    rows = [dict(row) for row in dataset]
    if not rows:
        raise ValueError("dataset has no rows; there is nothing to evaluate on.")
    for i, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            raise ValueError(f"Row {i} has the columns {sorted(row)}, row 0 {sorted(rows[0])}; they must be the same.")
        if not isinstance(row.get("prompt", ""), (str, list)):
            raise TypeError(f"The prompt of row {i} must be a string or a list of messages; got {row['prompt']!r}.")
    return rows


def _check_samples(k: int, pass_at: Sequence[int] | None) -> tuple[int, list[int]]:
    if k < 1 or k != int(k):
        raise ValueError(f"k must be a whole number, at least 1; got {k}.")
    if pass_at is None:
        pass_at = sorted({2**i for i in range(int(math.log2(k)) + 1)} | {k})
    for number in pass_at:
        if number != int(number) or not 1 <= number <= k:
            raise ValueError(f"pass_at must hold whole numbers from 1 to k ({k}); got {list(pass_at)}.")
    return int(k), [int(number) for number in pass_at]


def _versions(settings: dict[str, Any]) -> dict[str, str]:
    from .. import __version__

    found = {"vpd_trl": __version__}
    for name in ("torch", "transformers", str(settings["model"].get("engine"))):
        if number := getattr(sys.modules.get(name), "__version__", None):
            found[name] = str(number)
    return found
