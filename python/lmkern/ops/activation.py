"""Activations with a bias, plain and gated. Math and layouts: csrc/ops/activation.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern import _C, reference
from lmkern.ops.library import define_op, reference_backward
from lmkern.ops.memory import fresh

_PROBLEM = "Tensor input, Tensor? up, Tensor? bias, str function, bool gated, bool gate_first"


def _rows(x: Tensor) -> Tensor:
    """x, or x as [N, D] with contiguous rows: what a kernel takes."""
    if x.is_contiguous() and x.dim() <= 8:
        return x
    x = x.flatten(0, -2) if x.dim() > 1 else x
    return x if x.dim() > 1 and x.stride(-1) == 1 else x.contiguous()


def _forward_fake(
    input: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    function: str,
    gated: bool,
    gate_first: bool,
) -> Tensor:
    if gated and up is None:
        return fresh(input, *input.shape[:-1], input.shape[-1] // 2)
    return fresh(input, input.shape)


def _forward_cpu(
    input: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    function: str,
    gated: bool,
    gate_first: bool,
) -> Tensor:
    out = _forward_fake(input, up, bias, function, gated, gate_first)
    rows = _rows(out)
    _C.activation_forward(
        _rows(input), None if up is None else _rows(up),
        None if bias is None else bias.contiguous(), function, gated, gate_first, rows,
    )  # fmt: skip
    return out


def _backward_fake(
    d_out: Tensor,
    input: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    function: str,
    gated: bool,
    gate_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        fresh(input, input.shape),
        fresh(input, 0 if up is None else up.shape),
        fresh(input, 0 if bias is None else bias.shape),
    )


def _backward_cpu(
    d_out: Tensor,
    input: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    function: str,
    gated: bool,
    gate_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _backward_fake(d_out, input, up, bias, function, gated, gate_first)
    d_input, d_up, d_bias = grads
    _C.activation_backward(
        _rows(d_out), _rows(input), None if up is None else _rows(up),
        None if bias is None else bias.contiguous(), function, gated, gate_first, _rows(d_input),
        None if up is None else _rows(d_up), None if bias is None else d_bias,
    )  # fmt: skip
    return grads


define_op(f"activation_forward({_PROBLEM}) -> Tensor", cpu=_forward_cpu, fake=_forward_fake)
define_op(
    f"activation_backward(Tensor d_out, {_PROBLEM}) -> (Tensor, Tensor, Tensor)",
    cpu=_backward_cpu,
    fake=_backward_fake,
)


class ActivationFunction(torch.autograd.Function):
    """(input, up, bias, function, gated, gate_first) -> out. The input is saved, not input + bias."""

    @staticmethod
    def forward(ctx: Any, input, up, bias, function, gated, gate_first):  # type: ignore[override]
        ctx.save_for_backward(input, up, bias)
        ctx.options = (function, gated, gate_first)
        return torch.ops.lmkern.activation_forward(input, up, bias, *ctx.options)

    @staticmethod
    def backward(ctx: Any, d_out):  # type: ignore[override]
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = reference_backward(
                lambda *tensors: reference.activation(*tensors, *ctx.options), inputs, (d_out,)
            )
        else:
            computed = torch.ops.lmkern.activation_backward(d_out, *inputs, *ctx.options)
            grads = tuple(
                g if x is not None else None for g, x in zip(computed, inputs, strict=True)
            )
        return (*grads, None, None, None)
