"""Linear. Math and layouts: csrc/ops/matmul.h."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmkern.ops.library import needs_grad
from lmkern.ops.linear import LinearFunction, has_kernel


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""The product with a weight matrix: out = input W^T + b.

    Signature and semantics of :func:`torch.nn.functional.linear`. Large float32 products run, forward
    and backward, on lmkern's kernel where the processor has AMX: float32 as bfloat16 tiles, three for
    each operand, with errors like those of float32's own product. Everything else is torch's.

    Args:
        input: [..., I]. weight: [O, I]. bias: [O].

    Returns:
        [..., O].

    Source: Henry, Tang & Heinecke 2019 (csrc/ops/matmul.h).
    """
    if (
        not isinstance(input, Tensor)
        or not isinstance(weight, Tensor)
        or weight.dim() != 2
        or input.dim() < 2
        or input.shape[-1] != weight.shape[1]
        or not has_kernel(input, weight, bias)
    ):
        return F.linear(input, weight, bias)
    if needs_grad(input, weight, bias):
        return LinearFunction.apply(input, weight, bias)
    return torch.ops.lmkern.linear_forward(input, weight, bias)
