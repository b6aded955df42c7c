"""x W^T + b and its gradient, where lmkern's matrix product is the faster one (csrc/ops/matmul.h)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmkern import _C
from lmkern.ops.library import define_op, matmul, reference_backward, use_kernel
from lmkern.ops.memory import fresh

# Products of rows, columns and depth below which the tiles gain less (15 % of 200 us) than a Function
# here costs over torch's node in C++.
_LEAST_PRODUCTS, _LEAST_ROWS = 1 << 26, 96


@torch.compiler.assume_constant_result
def _has_tiles() -> bool:
    return _C.isa() == "amx"


def has_kernel(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel takes this product, and earns its call."""
    return (
        input.dtype == weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and input.device.type == weight.device.type == "cpu"
        and _has_tiles()
        and not torch.is_autocast_enabled("cpu")
        and input.numel() >= _LEAST_ROWS * input.shape[-1]
        and input.numel() * weight.shape[0] >= _LEAST_PRODUCTS
        and use_kernel("linear", input)
    )


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return fresh(x, *x.shape[:-1], weight.shape[0])


def _forward_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = _forward_fake(x, weight, bias)
    matmul(x.flatten(0, -2), weight, bias, out.flatten(0, -2), transpose_b=True)
    return out


def _backward_fake(
    d_out: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    d_x, d_weight, d_bias = (
        fresh(x, shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)
    )
    return d_x, d_weight, d_bias


def _backward_cpu(
    d_out: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    d_x, d_weight, d_bias = _backward_fake(d_out, x, weight, wanted)
    d_rows, rows = d_out.flatten(0, -2), x.flatten(0, -2)
    if wanted[0]:
        matmul(d_rows, weight, out=d_x.view(-1, d_x.shape[-1]))
    if wanted[1]:
        matmul(d_rows, rows, out=d_weight, transpose_a=True)
    if wanted[2]:
        torch.sum(d_rows, 0, out=d_bias)
    return d_x, d_weight, d_bias


define_op(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    cpu=_forward_cpu,
    fake=_forward_fake,
)
define_op(
    "linear_backward(Tensor d_out, Tensor x, Tensor weight, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    cpu=_backward_cpu,
    fake=_backward_fake,
)


class LinearFunction(torch.autograd.Function):
    """(x [..., I], weight [O, I], bias [O] or None) -> [..., O]."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias):  # type: ignore[override]
        ctx.save_for_backward(x, weight, bias)
        return torch.ops.lmkern.linear_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, d_out):  # type: ignore[override]
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return reference_backward(F.linear, (x, weight, bias), (d_out,))
        wanted = list(ctx.needs_input_grad)
        grads = torch.ops.lmkern.linear_backward(d_out, x, weight, wanted)
        return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))
