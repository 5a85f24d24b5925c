"""Train language models from language feedback: Variational Policy Distillation as a TRL trainer."""

from .config import VPDConfig
from .feedback import Feedback, FeedbackFn
from .trainer import VPDTrainer


__version__ = "0.1.0"

__all__ = ["Feedback", "FeedbackFn", "VPDConfig", "VPDTrainer", "__version__"]
