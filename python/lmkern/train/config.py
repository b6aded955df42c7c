"""How to train: one documented dataclass, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        max_steps: number of parameter updates.
        batch_size: sequences per batch; for the LSTM, parallel readers over the text.
        sequence_length: tokens per sequence of a batch; by default GPT's block_size, 64 for the
            LSTM.
        gradient_accumulation: batches per update; equal to one batch that many times as large.
        optimizer: adamw or sgd.
        learning_rate: the highest learning rate.
        min_learning_rate: the cosine schedule ends here.
        schedule: after warm-up, cosine from learning_rate to min_learning_rate, or constant.
        warmup_steps: updates over which the learning rate rises linearly from 0.
        weight_decay: of matrices only; biases and norms have none.
        beta1: AdamW's decay of the mean of gradients; for sgd, the momentum.
        beta2: AdamW's decay of the mean of squared gradients.
        grad_clip: gradients with a larger norm are scaled down to it; 0 switches it off.
        mixed_precision: no, bf16 or fp16 (GPU only).
        device: auto takes a GPU where there is one; cpu does not.
        seed: of the parameters, the order of the data and dropout.
        eval_every: updates between two evaluations.
        eval_batches: batches per evaluation; 0 reads the whole validation text.
        log_every: updates between two lines on the terminal (log.jsonl has every update).
        save_every: updates between two checkpoints.
        keep_last: this many newest checkpoints are kept, and the best one.
        resume: true: go on from the newest checkpoint in out_dir; auto: do so if there is one;
            false: start anew, and refuse an out_dir that holds checkpoints.
        tensorboard: also write a TensorBoard log.
    """

    max_steps: int = 2000
    batch_size: int = 12
    sequence_length: int | None = None
    gradient_accumulation: int = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["auto", "cpu"] = "auto"
    seed: int = 1337
    eval_every: int = 250
    eval_batches: int = 0
    log_every: int = 10
    save_every: int = 250
    keep_last: int = 2
    resume: bool | Literal["auto"] = False
    tensorboard: bool = True

    def __post_init__(self) -> None:
        at_least_one = (
            "max_steps",
            "batch_size",
            "gradient_accumulation",
            "eval_every",
            "log_every",
            "save_every",
            "keep_last",
        )
        at_least_zero = (
            "learning_rate",
            "min_learning_rate",
            "warmup_steps",
            "weight_decay",
            "grad_clip",
            "seed",
            "eval_batches",
        )
        for names, lowest in ((at_least_one, 1), (at_least_zero, 0)):
            for name in names:
                value = getattr(self, name)
                if not lowest <= value < math.inf:
                    raise ValueError(f"TrainConfig: {name} must be >= {lowest}, got {value}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ValueError(f"TrainConfig: {name} must be in [0, 1), got {value}")
        if self.sequence_length is not None and self.sequence_length < 1:
            raise ValueError(
                f"TrainConfig: sequence_length must be >= 1, got {self.sequence_length}"
            )


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of update `step` (from 0): linear warm-up, then cosine or constant.

    A function of the step alone, so there is no schedule state to save.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.learning_rate
    span = max(1, config.max_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    weight = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_learning_rate + weight * (config.learning_rate - config.min_learning_rate)
