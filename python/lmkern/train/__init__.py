"""Training of the models in `lmkern.models`, on Hugging Face accelerate."""

from .config import TrainConfig
from .evaluate import Evaluation, evaluate
from .trainer import Trainer, TrainResult
from .updater import Updater

__all__ = ["Evaluation", "TrainConfig", "TrainResult", "Trainer", "Updater", "evaluate"]
