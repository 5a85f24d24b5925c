"""
Avg@k, pass@k and majority@k as metrics of Hugging Face Evaluate.

They are used by class, so nothing is looked up on the network or loaded from a script. They need the package
`evaluate` (`pip install 'vpd-trl[tasks]'`); the rest of `vpd_trl.evaluation` does not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import evaluate  # on a line of its own: evaluate's loader misreads `import a, b`

from . import estimators


_INPUTS = """
Args:
    scores (`list[list[float]]`): One list per problem, the scores of its n samples in [0, 1].
    k (`int` or `list[int]`, optional): From 1 to n. n if left out.
"""

_THRESHOLD = """    threshold (`float`, defaults to 1.0): A sample is a success when its score is at least this.
"""

_ANSWERS = """    answers (`list[list[str | None]]`): One list per problem, what its samples answer. `None` and blank answers don't
        vote.
"""

_CHEN = """\
@article{chen2021evaluating,
    title  = {{Evaluating Large Language Models Trained on Code}},
    author = {Mark Chen and others},
    year   = 2021,
    eprint = {arXiv:2107.03374},
}"""

_WANG = """\
@inproceedings{wang2023selfconsistency,
    title     = {{Self-Consistency Improves Chain of Thought Reasoning in Language Models}},
    author    = {Xuezhi Wang and others},
    year      = 2023,
    booktitle = {The Eleventh International Conference on Learning Representations},
}"""


class _SampleMetric(evaluate.Metric):
    """
    A metric of several samples per problem; its results are called `prefix@k`.

    Takes the arguments of [`~evaluate.Metric`]. Values are kept in memory by default, and then no file or folder is
    made: it works where the home directory can't be written.
    """

    _prefix = ""
    _features: dict[str, str] = {"scores": "float64"}
    _description = ""
    _inputs = _INPUTS
    _citation = ""

    def __init__(self, config_name: str | None = None, keep_in_memory: bool | None = None, **kwargs: Any) -> None:
        if keep_in_memory is None:
            keep_in_memory = kwargs.get("num_process", 1) == 1
        super().__init__(config_name, keep_in_memory, **kwargs)

    def _build_data_dir(self) -> str:
        if self.keep_in_memory:
            return os.path.join(self._data_dir_root, self.name, self.config_name)  # named, but not made
        return super()._build_data_dir()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self._description,
            citation=self._citation,
            inputs_description=self._inputs,
            features=datasets.Features(
                {name: datasets.List(datasets.Value(kind)) for name, kind in self._features.items()}
            ),
        )

    # Each metric takes `threshold` and `answers`, as `evaluate.combine` hands to all what one of them needs
    def _compute(
        self,
        scores: list[list[float]],
        k: int | Sequence[int] | None = None,
        threshold: float = 1.0,
        answers: list[list[str | None]] | None = None,
    ) -> dict[str, float]:
        matrix = estimators.sample_matrix(scores)
        k = matrix.shape[1] if k is None else k
        ks = list(k) if isinstance(k, Iterable) else [k]
        if not ks:
            raise ValueError("k is an empty list; give at least one number of samples.")
        return {f"{self._prefix}@{int(n)}": float(self._values(matrix, n, threshold, answers).mean()) for n in ks}

    def _values(self, scores: Any, k: int, threshold: float, answers: Any) -> Any:
        """The metric's value for each problem."""
        raise NotImplementedError


class AvgAtK(_SampleMetric):
    """
    Avg@k: the mean over problems of the mean score of the first k samples (`estimators.avg_at_k`).

    ```python
    >>> from vpd_trl.evaluation import AvgAtK

    >>> AvgAtK().compute(scores=[[1, 0, 0, 0], [1, 1, 1, 0]])
    {'avg@4': 0.5}
    ```
    """

    _prefix = "avg"
    _description = "The mean over problems of the mean score of k samples."

    def _values(self, scores: Any, k: int, threshold: float, answers: Any) -> Any:
        return estimators.avg_at_k(scores, k)


class PassAtK(_SampleMetric):
    """
    pass@k: the mean over problems of the unbiased chance that one of k samples is a success (`estimators.pass_at_k`).

    ```python
    >>> from vpd_trl.evaluation import PassAtK

    >>> PassAtK().compute(scores=[[1, 0, 0, 0], [1, 1, 1, 0]], k=[1, 2])
    {'pass@1': 0.5, 'pass@2': 0.75}
    ```
    """

    _prefix = "pass"
    _description = "The chance that at least one of k samples is a success, estimated without bias from n samples."
    _inputs = _INPUTS + _THRESHOLD
    _citation = _CHEN

    def _values(self, scores: Any, k: int, threshold: float, answers: Any) -> Any:
        return estimators.pass_at_k(scores >= threshold, k)


class MajorityAtK(_SampleMetric):
    """
    majority@k: the share of problems whose most frequent answer of the first k samples is right.

    Ties and missing answers: `estimators.majority_at_k`.

    ```python
    >>> from vpd_trl.evaluation import MajorityAtK

    >>> MajorityAtK().compute(answers=[["7", "8", "8", None]], scores=[[0, 1, 1, 0]])
    {'majority@4': 1.0}
    ```
    """

    _prefix = "majority"
    _features = {"answers": "string", "scores": "float64"}
    _description = "The share of problems whose most frequent answer is right; ties go to the answer that came first."
    _inputs = _INPUTS + _ANSWERS + _THRESHOLD
    _citation = _WANG

    # Evaluate takes the type of a column from its first entry, which may hold no answer at all: a blank one counts as none
    def add_batch(self, *, answers: Sequence[Sequence[str | None]], **inputs: Any) -> None:
        """Add the answers and scores of some problems."""
        super().add_batch(answers=[_with_blanks(entry) for entry in answers], **inputs)

    def add(self, *, answers: Sequence[str | None], **inputs: Any) -> None:
        """Add those of one problem."""
        super().add(answers=_with_blanks(answers), **inputs)

    def _values(self, scores: Any, k: int, threshold: float, answers: Any) -> Any:
        return estimators.majority_at_k(answers, scores >= threshold, k)


def _with_blanks(answers: Sequence[str | None]) -> list[str]:
    return ["" if answer is None else answer for answer in answers]
