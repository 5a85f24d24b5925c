"""
Evaluation: Avg@k, pass@k and majority@k of a model, from a script or within training.

`AvgAtK`, `PassAtK` and `MajorityAtK` need the package `evaluate`, which is imported when one of them is first asked for.
"""

from typing import TYPE_CHECKING, Any

from .engines import Engine, Sample, Sampling
from .evaluator import Evaluation
from .results import EvaluationResult, ProblemResult
from .transformers_engine import TransformersEngine
from .vllm_engine import VLLMEngine


if TYPE_CHECKING:
    from .metrics import AvgAtK as AvgAtK
    from .metrics import MajorityAtK as MajorityAtK
    from .metrics import PassAtK as PassAtK


# Without the metrics of Evaluate: a star import must work where that is not installed
__all__ = [
    "Engine",
    "Evaluation",
    "EvaluationResult",
    "ProblemResult",
    "Sample",
    "Sampling",
    "TransformersEngine",
    "VLLMEngine",
]


def __getattr__(name: str) -> Any:
    if name not in ("AvgAtK", "MajorityAtK", "PassAtK"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import metrics
    except ModuleNotFoundError as error:
        if error.name != "evaluate":
            raise
        raise ModuleNotFoundError(
            f"{name} needs the package evaluate. Install it with: pip install 'vpd-trl[tasks]'", name="evaluate"
        ) from error
    return getattr(metrics, name)
