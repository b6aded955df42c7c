"""Averaged SGD: the mean of the parameters over the steps, and when to begin with it.

Source: Polyak & Juditsky 1992; Merity et al. 2018, algorithm 1 (NT-ASGD).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightAverage:
    """ā_k = (p_1 + ... + p_k) / k, updated as ā += (p - ā) / k.

    With plain SGD this is `torch.optim.ASGD(lambd=0, t0=0)`; the optimizer itself does not know of
    it, so that learning rate schedules and checkpoints are as ever.

    Args:
        parameters: by name; the same tensors the optimizer steps.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = dict(parameters)
        self.tensors = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.count = 0

    @torch.no_grad()
    def update(self) -> None:
        """Takes the parameters as they are into the mean."""
        self.count += 1
        for name, parameter in self.parameters.items():
            self.tensors[name].lerp_(parameter, 1.0 / self.count)

    @torch.no_grad()
    def load(self, iterate: Mapping[str, Tensor], count: int) -> None:
        """Resumes: the parameters hold the mean of `count` steps, `iterate` their last values.

        Raises:
            ValueError: `iterate` is of another model.
        """
        shapes = {name: list(p.shape) for name, p in self.parameters.items()}
        if {name: list(value.shape) for name, value in iterate.items()} != shapes:
            raise ValueError("the checkpoint's parameters beside the averages are of another model")
        self.count = count
        for name, parameter in self.parameters.items():
            self.tensors[name].copy_(parameter)
            parameter.copy_(iterate[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the parameters have the values of their means (before the first: their own)."""
        if self.count == 0:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            value = parameter.clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(value)


def is_stuck(losses: Sequence[float], patience: int) -> bool:
    """Whether the last loss is worse than the best of those at least `patience` + 1 before it."""
    return len(losses) > patience + 1 and losses[-1] > min(losses[: -patience - 1])
