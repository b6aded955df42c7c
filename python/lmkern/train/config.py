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
        epochs: passes over the training text; where given, it stands instead of max_steps.
        batch_size: sequences per batch; for the LSTM, parallel readers over the text.
        sequence_length: tokens per sequence of a batch; by default GPT's block_size, 64 for the
            LSTM.
        gradient_accumulation: batches per update; equal to one batch that many times as large.
        optimizer: adamw or sgd.
        loss_per: token: the mean over all tokens of an update is minimised; sequence: the loss is
            summed over the tokens of a sequence (their mean is over sequences only), so gradients
            are sequence_length times as large (Zaremba et al. 2014). Reports are per token always.
        learning_rate: the highest learning rate.
        min_learning_rate: the cosine schedule ends here.
        schedule: after warm-up, cosine from learning_rate to min_learning_rate, constant, or epoch:
            constant for decay_start passes over the training text, then multiplied by lr_decay at
            the start of each.
        lr_decay: factor of the epoch schedule.
        decay_start: passes at the full learning rate in the epoch schedule.
        warmup_steps: updates over which the learning rate rises linearly from 0.
        weight_decay: of matrices only; biases and norms have none.
        momentum: of sgd.
        averaging: average the parameters over the steps, and use the average to evaluate and in
            checkpoints: no; always: from the first step on; nonmonotonic: from the evaluation on
            whose loss is worse than the best of those more than `nonmono` before it (with sgd:
            ASGD and NT-ASGD).
        nonmono: evaluations without a better loss before nonmonotonic averaging begins.
        beta1: AdamW's decay of the mean of gradients.
        beta2: AdamW's decay of the mean of squared gradients.
        grad_clip: gradients with a larger norm are scaled down to it; 0 switches it off.
        mixed_precision: no, bf16 or fp16 (GPU only).
        device: auto takes a GPU where there is one; cpu does not.
        seed: of the parameters, the order of the data and dropout.
        eval_every: updates between two evaluations; 0: one pass over the training text.
        eval_batches: batches per evaluation; 0 reads the whole validation text.
        log_every: updates between two lines on the terminal (log.jsonl has every update).
        save_every: updates between two checkpoints; 0: one pass over the training text.
        keep_last: this many newest checkpoints are kept, and the best one.
        resume: true: go on from the newest checkpoint in out_dir; auto: do so if there is one;
            false: start anew, and refuse an out_dir that holds checkpoints.
        tensorboard: also write a TensorBoard log.
    """

    max_steps: int = 2000
    epochs: int | None = None
    batch_size: int = 12
    sequence_length: int | None = None
    gradient_accumulation: int = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    loss_per: Literal["token", "sequence"] = "token"
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    schedule: Literal["cosine", "constant", "epoch"] = "cosine"
    lr_decay: float = 0.5
    decay_start: int = 4
    warmup_steps: int = 100
    weight_decay: float = 0.1
    momentum: float = 0.0
    averaging: Literal["no", "always", "nonmonotonic"] = "no"
    nonmono: int = 5
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
            "log_every",
            "keep_last",
        )
        at_least_zero = (
            "learning_rate",
            "min_learning_rate",
            "lr_decay",
            "decay_start",
            "warmup_steps",
            "weight_decay",
            "nonmono",
            "grad_clip",
            "seed",
            "eval_every",
            "eval_batches",
            "save_every",
        )
        for names, lowest in ((at_least_one, 1), (at_least_zero, 0)):
            for name in names:
                value = getattr(self, name)
                if not lowest <= value < math.inf:
                    raise ValueError(f"TrainConfig: {name} must be >= {lowest}, got {value}")
        for name in ("momentum", "beta1", "beta2"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ValueError(f"TrainConfig: {name} must be in [0, 1), got {value}")
        for name in ("sequence_length", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"TrainConfig: {name} must be >= 1, got {value}")


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int = 1) -> float:
    """Learning rate of update `step` (from 0): linear warm-up, then the schedule.

    A function of the step alone, so there is no schedule state to save.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "epoch":
        decays = max(0, step // steps_per_epoch + 1 - config.decay_start)
        return float(config.learning_rate * config.lr_decay**decays)
    span = max(1, config.max_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    weight = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_learning_rate + weight * (config.learning_rate - config.min_learning_rate)
