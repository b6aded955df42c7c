"""Layer and RMS norm, alone and after a residual connection. Math and layouts: csrc/ops/norm.h."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lmkern import _C, reference
from lmkern.ops.library import accumulate_dtype, define_op, reference_backward
from lmkern.ops.memory import fresh


def _rows(x: Tensor, width: int) -> Tensor:
    """``x`` as the kernels take it: contiguous, or [N, D] with D contiguous."""
    if x.is_contiguous():
        return x
    rows = x.reshape(x.numel() // max(width, 1), width)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return parameter if parameter is None else parameter.contiguous()


def _extents(x: Tensor, dims: int) -> tuple[int, int]:
    """N and D."""
    if dims == 1 and x.dim() == 2:
        return x.shape[0], x.shape[1]
    return math.prod(x.shape[:-dims]), math.prod(x.shape[-dims:])


def _statistics(x: Tensor, rows: int, rms: bool) -> Tensor:
    """[2, N], mean and rstd, or only rstd, [1, N]."""
    return x.new_empty((1 if rms else 2, rows), dtype=accumulate_dtype(x.dtype))


def _forward_fake(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    return fresh(input, input.shape), _statistics(input, _extents(input, dims)[0], rms)


def _forward_cpu(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    rows, width = _extents(input, dims)
    out, statistics = fresh(input, input.shape), _statistics(input, rows, rms)
    _C.norm_forward(
        width, _rows(input, width), None, None, _contiguous(weight), _contiguous(bias), eps, 0.0, 0,
        None, out, statistics,
    )  # fmt: skip
    return out, statistics


def _backward_fake(
    d_out: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None, dims: int,
    need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return fresh(x, x.shape), *_d_parameters(x, statistics, dims, need_weight, need_bias)  # type: ignore[return-value]


def _d_parameters(x: Tensor, statistics: Tensor, dims: int, *need: bool) -> list[Tensor]:
    """Like the parameters, in the dtype of the sums; empty where none is needed."""
    return [statistics.new_empty(x.shape[-dims:] if n else 0) for n in need]


def _wanted(grads: list[Tensor], *need: bool) -> list[Tensor | None]:
    return [g if n else None for g, n in zip(grads, need, strict=True)]


def _backward_cpu(
    d_out: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None, dims: int,
    need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _, width = _extents(x, dims)
    d_x, grads = fresh(x, x.shape), _d_parameters(x, statistics, dims, need_weight, need_bias)
    d_weight, d_bias = _wanted(grads, need_weight, need_bias)
    _C.norm_backward(
        width, _rows(d_out, width), None, _rows(x, width), statistics, _contiguous(weight), 0.0, 0,
        d_x, None, d_weight, d_bias, None,
    )  # fmt: skip
    return d_x, *grads  # type: ignore[return-value]


def _add_forward_fake(
    input: Tensor, residual: Tensor, input_bias: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, seed: Tensor | None, dims: int, eps: float, rms: bool, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, sum = (fresh(input, input.shape) for _ in range(2))
    return out, sum, _statistics(input, _extents(input, dims)[0], rms)


def _add_forward_cpu(
    input: Tensor, residual: Tensor, input_bias: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, seed: Tensor | None, dims: int, eps: float, rms: bool, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, width = _extents(input, dims)
    out, sum, statistics = (
        fresh(input, input.shape),
        fresh(input, input.shape),
        _statistics(input, rows, rms),
    )
    _C.norm_forward(
        width, _rows(input, width), _rows(residual, width), _contiguous(input_bias),
        _contiguous(weight), _contiguous(bias), eps, dropout_p, 0 if seed is None else int(seed),
        sum, out, statistics,
    )  # fmt: skip
    return out, sum, statistics


def _add_backward_fake(
    d_out: Tensor, d_sum: Tensor | None, sum: Tensor, statistics: Tensor, weight: Tensor | None,
    seed: Tensor | None, dims: int, dropout_p: float, need_weight: bool, need_bias: bool,
    need_input_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    need = (need_weight, need_bias, need_input_bias)
    return (  # type: ignore[return-value]
        fresh(sum, sum.shape), fresh(sum, sum.shape if dropout_p > 0 else 0),
        *_d_parameters(sum, statistics, dims, *need),
    )  # fmt: skip


def _add_backward_cpu(
    d_out: Tensor, d_sum: Tensor | None, sum: Tensor, statistics: Tensor, weight: Tensor | None,
    seed: Tensor | None, dims: int, dropout_p: float, need_weight: bool, need_bias: bool,
    need_input_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    need, (_, width) = (need_weight, need_bias, need_input_bias), _extents(sum, dims)
    d_x, grads = fresh(sum, sum.shape), _d_parameters(sum, statistics, dims, *need)
    d_input = fresh(sum, sum.shape) if dropout_p > 0 else fresh(sum, 0)
    _C.norm_backward(
        width, _rows(d_out, width), None if d_sum is None else _rows(d_sum, width),
        sum.contiguous(), statistics,
        _contiguous(weight), dropout_p, 0 if seed is None else int(seed), d_x,
        d_input if dropout_p > 0 else None, *_wanted(grads, *need),
    )  # fmt: skip
    return d_x, d_input, *grads  # type: ignore[return-value]


define_op(
    "norm_forward(Tensor input, Tensor? weight, Tensor? bias, int dims, float eps, bool rms) "
    "-> (Tensor out, Tensor statistics)",
    cpu=_forward_cpu,
    fake=_forward_fake,
)
define_op(
    "norm_backward(Tensor d_out, Tensor x, Tensor statistics, Tensor? weight, int dims, "
    "bool need_weight, bool need_bias) -> (Tensor d_x, Tensor d_weight, Tensor d_bias)",
    cpu=_backward_cpu,
    fake=_backward_fake,
)
define_op(
    "add_norm_forward(Tensor input, Tensor residual, Tensor? input_bias, Tensor? weight, "
    "Tensor? bias, Tensor? seed, int dims, float eps, bool rms, float dropout_p) "
    "-> (Tensor out, Tensor sum, Tensor statistics)",
    cpu=_add_forward_cpu,
    fake=_add_forward_fake,
)
define_op(
    "add_norm_backward(Tensor d_out, Tensor? d_sum, Tensor sum, Tensor statistics, Tensor? weight, "
    "Tensor? seed, int dims, float dropout_p, bool need_weight, bool need_bias, "
    "bool need_input_bias) "
    "-> (Tensor d_x, Tensor d_input, Tensor d_weight, Tensor d_bias, Tensor d_input_bias)",
    cpu=_add_backward_cpu,
    fake=_add_backward_fake,
)


class NormFunction(torch.autograd.Function):
    """(input, weight or None, bias or None, dims, eps, rms) -> the norm over the last ``dims``."""

    @staticmethod
    def forward(ctx: Any, input, weight, bias, dims, eps, rms):  # type: ignore[override]
        out, statistics = torch.ops.lmkern.norm_forward(input, weight, bias, dims, eps, rms)
        ctx.save_for_backward(input, statistics, weight)
        ctx.dims, ctx.eps, ctx.rms = dims, eps, rms
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, d_out):  # type: ignore[override]
        input, statistics, weight = ctx.saved_tensors
        _, need_weight, need_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            grads = differentiable_gradient(ctx, input, weight, need_bias, d_out)
            return (*grads, None, None, None)
        d_input, d_weight, d_bias = torch.ops.lmkern.norm_backward(
            d_out, input, statistics, weight, ctx.dims, need_weight, need_bias
        )
        return (
            d_input,
            as_dtype(d_weight, weight.dtype) if need_weight else None,
            as_dtype(d_bias, ctx.bias_dtype) if need_bias else None,
            None,
            None,
            None,
        )


def as_dtype(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter's gradient, summed in a wider dtype, in its own."""
    return grad if grad.dtype == dtype else grad.to(dtype)


def differentiable_gradient(
    ctx: Any, x: Tensor, weight: Tensor | None, need_bias: bool, d_out: Tensor
) -> tuple[Tensor | None, ...]:
    """d_x, d_weight and d_bias for the double backward; ctx: dims, eps, rms, bias_dtype."""
    bias = None
    if need_bias:  # its value does not matter: the norm is linear in it
        bias = x.new_zeros(x.shape[-ctx.dims :], dtype=ctx.bias_dtype, requires_grad=True)
    return reference_backward(
        lambda x, w, b: reference.norm(x, x.shape[-ctx.dims :], w, b, ctx.eps, ctx.rms),
        (x, weight, bias),
        (d_out,),
    )


class AddNormFunction(torch.autograd.Function):
    """(input, residual, input_bias, weight, bias, seed, dims, eps, rms, dropout_p) -> (norm, sum).

    input_bias, weight, bias and seed may be None; seed is int64 [], for dropout.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, input, residual, input_bias, weight, bias, seed, dims, eps, rms, dropout_p
    ):
        out, sum, statistics = torch.ops.lmkern.add_norm_forward(
            input, residual, input_bias, weight, bias, seed, dims, eps, rms, dropout_p
        )
        ctx.save_for_backward(sum, statistics, weight, seed)
        ctx.dims, ctx.eps, ctx.rms, ctx.dropout_p = dims, eps, rms, dropout_p
        ctx.bias_dtype, ctx.input_bias_dtype = (
            None if p is None else p.dtype for p in (bias, input_bias)
        )
        ctx.set_materialize_grads(False)
        return out, sum

    @staticmethod
    def backward(ctx: Any, d_out, d_sum):  # type: ignore[override]
        sum, statistics, weight, seed = ctx.saved_tensors
        need_input_bias, need_weight, need_bias = ctx.needs_input_grad[2:5]
        rest = (None,) * 5
        if d_out is None:
            d_out = torch.zeros_like(sum)
        if torch.is_grad_enabled():
            # `sum` is an output of this node: what depends on it goes on to input and residual.
            d_x, d_weight, d_bias = differentiable_gradient(ctx, sum, weight, need_bias, d_out)
            d_x = torch.zeros_like(sum) if d_x is None else d_x
            d_x = d_x if d_sum is None else d_x + d_sum
            d_input, d_input_bias = d_x, None
            if ctx.dropout_p > 0:
                d_input = (d_x * dropout_keep(seed, sum, ctx.dropout_p)).to(d_x.dtype)
            if need_input_bias:
                d_input_bias = d_input.sum_to_size(sum.shape[-ctx.dims :])
                d_input_bias = d_input_bias.to(ctx.input_bias_dtype)
            return (d_input, d_x, d_input_bias, d_weight, d_bias, *rest)
        d_x, d_input, d_weight, d_bias, d_input_bias = torch.ops.lmkern.add_norm_backward(
            d_out, d_sum, sum, statistics, weight, seed, ctx.dims, ctx.dropout_p, need_weight,
            need_bias, need_input_bias,
        )  # fmt: skip
        return (
            d_input if ctx.dropout_p > 0 else d_x,
            d_x,
            as_dtype(d_input_bias, ctx.input_bias_dtype) if need_input_bias else None,
            as_dtype(d_weight, weight.dtype) if need_weight else None,
            as_dtype(d_bias, ctx.bias_dtype) if need_bias else None,
            *rest,
        )


def dropout_keep(seed: Tensor, x: Tensor, dropout_p: float) -> Tensor:
    """What dropout multiplied a tensor like ``x`` with: the kernel's lookups of a row of ones."""
    width = x.shape[-1] if x.dim() else 1
    ones = x.new_ones(1, width, dtype=accumulate_dtype(x.dtype))
    rows = x.new_zeros(x.numel() // max(width, 1), dtype=torch.int32)
    keep, _ = torch.ops.lmkern.token_position_forward(
        rows, ones, None, None, 0, rows.numel(), None, None, 1.0, None, None, seed, 0, 0.0,
        dropout_p,
    )  # fmt: skip
    return keep.view(x.shape)
