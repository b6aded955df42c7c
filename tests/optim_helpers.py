"""What the tests of lmkern.optim share: gradients in rows, runs, and the rules in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lmkern.optim import SGD, Adagrad, AdamW, SparseAdam

EVERY = [
    (SGD, {"lr": 0.1}),
    (Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
    (SparseAdam, {"lr": 0.01}),
    (AdamW, {"lr": 0.01, "weight_decay": 0.3}),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

Gradient = tuple[Tensor, Tensor]  # rows int64 [N], distinct, in any order; values float64 [N, ...]


def name(case: Any) -> str:
    """Of a parameter of a test: the class, or the options' names."""
    if isinstance(case, type):
        return case.__name__
    return ",".join(case) or "plain" if isinstance(case, dict) else ""


def random_gradients(
    rows: int, width: Sequence[int], touched: int, steps: int = 4, seed: int = 0
) -> list[Gradient]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randperm(rows, generator=generator)[:touched],
            torch.randn(touched, *width, generator=generator, dtype=torch.float64),
        )
        for _ in range(steps)
    ]


def sparse(parameter: Tensor, gradient: Gradient) -> Tensor:
    rows, values = gradient
    return torch.sparse_coo_tensor(
        rows[None], values.to(parameter.dtype), parameter.shape, check_invariants=True
    )


def dense(parameter: Tensor, gradient: Gradient) -> Tensor:
    return sparse(parameter, gradient).to_dense()


def run(
    optimizer: Callable[..., torch.optim.Optimizer],
    start: Tensor,
    gradients: Sequence[Gradient],
    layout: Callable[[Tensor, Gradient], Tensor] = sparse,
    rates: Sequence[float] | None = None,
    **options: Any,
) -> tuple[Tensor, torch.optim.Optimizer]:
    """The parameter and the optimizer after a step with each gradient, from ``start``."""
    parameter = torch.nn.Parameter(start.clone())
    instance = optimizer([parameter], **options)
    continued(instance, gradients, layout, rates)
    return parameter.detach(), instance


def continued(
    optimizer: torch.optim.Optimizer,
    gradients: Sequence[Gradient],
    layout: Callable[[Tensor, Gradient], Tensor] = sparse,
    rates: Sequence[float] | None = None,
) -> None:
    """Steps with each gradient on the one parameter of ``optimizer``; ``rates``: lr of each step."""
    (parameter,) = optimizer.param_groups[0]["params"]
    for i, gradient in enumerate(gradients):
        parameter.grad = layout(parameter, gradient)
        if rates is not None:
            optimizer.param_groups[0]["lr"] = rates[i]
        optimizer.step()
    if hasattr(optimizer, "catch_up"):
        optimizer.catch_up()


def decayed_adam(
    start: Tensor, gradients: Sequence[Gradient], rates: Sequence[float], weight_decay: float
) -> Tensor:
    """In float64: every row decays in every step, moments and weights of touched rows move."""
    w, beta1, beta2, eps = start.double(), 0.9, 0.999, 1e-8
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, ((rows, g), lr) in enumerate(zip(gradients, rates, strict=True), 1):
        w *= 1 - lr * weight_decay
        m[rows] = beta1 * m[rows] + (1 - beta1) * g
        v[rows] = beta2 * v[rows] + (1 - beta2) * g**2
        w[rows] -= lr / (1 - beta1**t) * m[rows] / ((v[rows] / (1 - beta2**t)).sqrt() + eps)
    return w


def rowwise_adagrad(start: Tensor, gradients: Sequence[Gradient], lr: float, eps: float) -> Tensor:
    w = start.double()
    s = torch.zeros(len(w), dtype=torch.float64)
    for rows, g in gradients:
        s[rows] += g.reshape(len(g), -1).square().mean(1)
        w[rows] -= lr * g / (s[rows].sqrt() + eps).view(-1, *[1] * (g.dim() - 1))
    return w
