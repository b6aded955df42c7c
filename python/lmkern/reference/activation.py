"""Activations, in plain torch operations."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def activation(
    input: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    function: str,
    gated: bool,
    gate_first: bool,
) -> Tensor:
    """f(x), or f(gate) * value, where x, and without ``up`` [gate value], is input + bias."""
    x = input if bias is None else input + bias
    if not gated:
        return ACTIVATIONS[function](x)
    first, second = x.chunk(2, -1) if up is None else (x, up)
    return (
        ACTIVATIONS[function](first) * second
        if gate_first
        else first * ACTIVATIONS[function](second)
    )
