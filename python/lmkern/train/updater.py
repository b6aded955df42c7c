"""One parameter update: data, loss, gradient, optimizer, on any number of processes."""

from __future__ import annotations

import dataclasses
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.batches import Batch, RandomWindows, Sampler, Streams
from ..data.corpus import TokenData
from ..models import LanguageModel
from .average import WeightAverage
from .config import TrainConfig, learning_rate
from .evaluate import detached


class Updater:
    """A model, its optimizer and its place in the data.

    Args:
        model: any model of `lmkern.models`; it is moved to the device and trained in place.
        data: training and validation tokens.
        config: how to train.
        accelerator: where and in which precision; by default made from `config`.

    Raises:
        ValueError: the data is too short, or does not fit the model.
    """

    def __init__(
        self,
        model: LanguageModel,
        data: TokenData,
        config: TrainConfig,
        accelerator: Accelerator | None = None,
    ) -> None:
        context = model.context_size
        length = config.sequence_length or context or 64
        if context is not None and length > context:
            raise ValueError(
                f"TrainConfig: sequence_length must be at most the model's block_size = "
                f"{context}, got {length}"
            )
        if accelerator is None:
            accelerator = make_accelerator(config)
        if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            raise ValueError("TrainConfig: mixed_precision fp16 needs a GPU; bf16 does not")
        config = dataclasses.replace(config, sequence_length=length)
        self.sequence_length = length
        self.accelerator = accelerator
        self.sampler = make_sampler(model, data, config, accelerator.num_processes)
        self.config = in_steps(config, self.sampler.steps_per_epoch)
        self.model = model
        self.prepared = accelerator.prepare(model)  # the model behind autocast and DDP
        self.optimizer = accelerator.prepare(make_optimizer(model, config))
        self.step = 0
        # The running mean of the parameters, from where `averaging` begins.
        self.average: WeightAverage | None = None
        if config.averaging == "always":
            self.start_averaging()
        # The recurrent state handed on, one per batch of an update.
        self.states: list[Any] = [None] * config.gradient_accumulation

    def start_averaging(self) -> None:
        """From the next update on, the parameters are averaged."""
        self.average = WeightAverage(dict(self.model.named_parameters()))

    def averaged(self) -> AbstractContextManager[None]:
        """Within it, the model has the averaged parameters, if there are any yet."""
        return nullcontext() if self.average is None else self.average.applied()

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return learning_rate(self.config, self.step, self.sampler.steps_per_epoch)

    def update(self) -> tuple[float, float, int]:
        """One parameter update; returns loss per token, gradient norm and number of tokens.

        The gradient is that of the summed loss of all batches and processes over the number of
        all their tokens (or sequences), so batches of unequal size weigh as in one big batch.

        Raises:
            FloatingPointError: loss or gradient norm is not finite; parameters are unchanged.
        """
        config, accelerator = self.config, self.accelerator
        first = accelerator.process_index * config.gradient_accumulation
        batches = []
        for i in range(config.gradient_accumulation):
            row = (first + i) * config.batch_size
            batches.append(self.sampler.batch(self.step, row, row + config.batch_size))
        num_tokens = int(self.summed(sum(batch.num_tokens for batch in batches)))
        divisor = num_tokens
        if config.loss_per == "sequence":
            divisor = len(batches) * config.batch_size * accelerator.num_processes
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.prepared.train()
        self.optimizer.zero_grad()
        loss = self.summed(self.accumulate_gradient(batches, divisor)) / num_tokens
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss is {loss} at step {self.step + 1}")
        limit = config.grad_clip or math.inf
        norm = float(accelerator.clip_grad_norm_(self.model.parameters(), limit))
        # With fp16, accelerate's scaler skips such a step and lowers its scale.
        if not math.isfinite(norm) and accelerator.scaler is None:
            raise FloatingPointError(f"gradient norm is {norm} at step {self.step + 1}")
        self.optimizer.step()
        if self.average is not None and not self.optimizer.step_was_skipped:
            self.average.update()
        self.step += 1
        return loss, norm, num_tokens

    def accumulate_gradient(self, batches: list[Batch], divisor: int) -> Tensor:
        """Adds d(summed loss / divisor) to the gradients; returns this process's summed loss.

        A model's penalty counts once per token in the gradient, and not in what is returned.
        """
        accelerator = self.accelerator
        device = accelerator.device
        total = torch.zeros((), device=device)
        # DDP averages gradients over processes; the sum over all of them is wanted.
        scale = accelerator.num_processes / divisor
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            with nullcontext() if is_last else accelerator.no_sync(self.prepared):
                state = None if batch.reset else self.states[i]
                penalty: Tensor | float = 0.0
                inputs, targets = batch.inputs.to(device), batch.targets.to(device)
                if self.model.has_penalty:
                    loss, state, penalty = self.prepared(
                        inputs, state, targets=targets, return_penalty=True
                    )
                else:
                    loss, state = self.prepared(inputs, state, targets=targets)
                accelerator.backward((loss + batch.num_tokens * penalty) * scale)
            self.states[i] = detached(state)
            total += loss.detach()
        return total

    def summed(self, value: float | Tensor) -> float:
        """The sum of `value` over all processes."""
        if self.accelerator.num_processes > 1:
            tensor = torch.as_tensor(value, dtype=torch.float64, device=self.accelerator.device)
            value = self.accelerator.reduce(tensor, reduction="sum")
        return float(value)


def in_steps(config: TrainConfig, steps_per_epoch: int) -> TrainConfig:
    """`config` with what it counts in passes over the training text counted in updates."""
    return dataclasses.replace(
        config,
        max_steps=config.epochs * steps_per_epoch if config.epochs else config.max_steps,
        eval_every=config.eval_every or steps_per_epoch,
        save_every=config.save_every or steps_per_epoch,
    )


def make_accelerator(config: TrainConfig, **options: Any) -> Accelerator:
    """The device and precision that `config` asks for; `options` go to accelerate."""
    return Accelerator(
        mixed_precision=config.mixed_precision, cpu=config.device == "cpu", **options
    )


def make_optimizer(model: LanguageModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD (torch's), with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
    )


def make_sampler(
    model: LanguageModel, data: TokenData, config: TrainConfig, num_processes: int
) -> Sampler:
    """Contiguous streams for a model that carries state, random windows for one that does not.

    Raises:
        ValueError: the data is too short, or has more kinds of tokens than the model.
    """
    vocab_size = model.config.vocab_size
    if data.tokenizer is not None and data.tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{data.source}: the tokenizer has {data.tokenizer.vocab_size} tokens, "
            f"the model's vocab_size is {vocab_size}"
        )
    if len(data.val) < 2:
        raise ValueError(
            f"{data.source}: the validation part has {len(data.val)} tokens, at least 2 are needed"
        )
    assert config.sequence_length is not None
    global_batch = config.batch_size * config.gradient_accumulation * num_processes
    try:
        if model.carries_state:
            return Streams(data.train, config.sequence_length, global_batch)
        return RandomWindows(data.train, config.sequence_length, global_batch, config.seed)
    except ValueError as error:
        raise ValueError(f"{data.source}: the training part {error}") from None
