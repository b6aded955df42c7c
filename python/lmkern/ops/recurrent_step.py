"""One step of a plain cell: the short way to csrc's recurrent_step.

At one or two rows the arithmetic of a cell takes a microsecond, and the usual way to a kernel (checks in
Python, dispatcher, autograd) takes ten. Here the checks of torch and of the kernel are the only ones.
Whatever does not fit (dtype, device, transform, ...) takes the usual way, which also words the errors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lmkern.ops.backend import kernels_of, takes_cuda
from lmkern.ops.library import (
    KERNEL_DTYPES,
    accumulate_dtype,
    declare_cuda,
    is_plain_eager,
    matmul,
    missing_kernel,
)
from lmkern.ops.recurrent_passes import GATES, reads_weights_directly

_PLAIN = (Tensor, Parameter)
declare_cuda("recurrent_step")
_TILE_BATCH = 96  # from here on lmkern's product may beat torch's


class _DoesNotFitError(Exception):
    """An argument that the short way does not take; the usual way takes it or says what is wrong."""


def _check_products(
    cell: int,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> None:
    """What torch's products would broadcast or word in their own way."""
    batch, (wide, width) = x.shape[0], w_hh.shape
    if wide != GATES[cell] * width or w_ih.shape != (wide, x.shape[1]):
        raise _DoesNotFitError
    for tensor, shape in (
        (b_ih, (wide,)),
        (b_hh, (wide,)),
        (h, (batch, width)),
        (c, (batch, width)),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype):
            raise _DoesNotFitError
    if not x.dtype == w_ih.dtype == w_hh.dtype:
        raise _DoesNotFitError


def _product(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b; x W for a transposed view of W."""
    if x.shape[0] >= _TILE_BATCH:
        return matmul(x, w, bias, transpose_b=True)
    return torch.mm(x, w.t()) if bias is None else torch.addmm(bias, x, w.t())


def _run(
    cell: int,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    y: Tensor | None,
    gates: Tensor | None,
    hidden: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """h' and c'; fills ``y`` with h', and ``gates`` and ``hidden`` for the backward pass, on request."""
    batch, width = x.shape[0], w_hh.shape[1]
    h_next = x.new_empty(batch, width)
    c_next = x.new_empty(batch, width) if cell == 0 else None
    kernels = kernels_of(x)
    if not takes_cuda(x) and reads_weights_directly(batch, x.dtype):
        try:
            kernels.recurrent_step(
                cell, None, None, x, w_ih, w_hh, b_ih, b_hh, h, c, h_next, y, c_next, gates, None,
                hidden,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise _DoesNotFitError from error
        return h_next, c_next
    _check_products(cell, x, h, c, w_ih, w_hh, b_ih, b_hh)
    h = None if h is None else h.contiguous()
    c = None if c is None else c.contiguous()
    from_x = _product(x, w_ih, b_ih)
    if h is not None:
        from_h: Tensor | None = _product(h, w_hh, b_hh)
    else:
        from_h = None if b_hh is None else b_hh.expand(from_x.shape).contiguous()
    kernels.recurrent_step(
        cell, from_x, from_h, None, None, None, None, None, h, c, h_next, y, c_next, gates, None,
        hidden,
    )  # fmt: skip
    return h_next, c_next


class StepFunction(torch.autograd.Function):
    """(cell, layer, x, h, c, w_ih, w_hh, b_ih, b_hh) -> ([y,] h'[, c']), with gradients.

    As a ``layer``, x and y are sequences of one step, [1, B, *].
    """

    @staticmethod
    def forward(ctx: Any, cell, layer, x, h, c, w_ih, w_hh, b_ih, b_hh):  # type: ignore[override]
        x = x[0] if layer else x
        h = None if h is None else h.contiguous()
        c = None if c is None else c.contiguous()
        batch, width = x.shape[0], w_hh.shape[1]
        y = x.new_empty(batch, width) if layer else None
        gates = x.new_empty(batch, GATES[cell] * width)
        hidden = x.new_empty(batch, width, dtype=accumulate_dtype(x.dtype)) if cell == 1 else None
        h_next, c_next = _run(cell, x, h, c, w_ih, w_hh, b_ih, b_hh, y, gates, hidden)
        ctx.save_for_backward(x, h, c, w_ih, w_hh, b_ih, b_hh, gates, hidden)
        ctx.cell, ctx.layer = cell, layer
        ctx.set_materialize_grads(False)
        if y is not None:
            return y.unsqueeze(0), h_next, c_next
        return h_next if c_next is None else (h_next, c_next)

    @staticmethod
    def backward(ctx: Any, *grad_outputs):  # type: ignore[override]
        cell, layer = ctx.cell, ctx.layer
        x, h, c, w_ih, w_hh, b_ih, b_hh, gates, hidden = ctx.saved_tensors
        _, _, need_x, need_h, need_c, need_w_ih, need_w_hh, need_b_ih, need_b_hh = (
            ctx.needs_input_grad
        )
        d_y, d_h, d_c = grad_outputs if layer else (None, *grad_outputs, None)[:3]
        if torch.is_grad_enabled():
            return _reference_gradient(
                cell, layer, (x, w_ih, w_hh, b_ih, b_hh, h, c), d_y, d_h, d_c
            )
        gru = cell == 1
        d_gates = torch.empty_like(gates)
        d_hh = torch.empty_like(gates) if gru else d_gates
        d_h0 = x.new_empty(x.shape[0], w_hh.shape[1]) if gru else None
        d_c0 = x.new_empty(x.shape[0], w_hh.shape[1]) if cell == 0 else None
        on_gpu = takes_cuda(x)  # where biases' gradients are a sum of torch's
        d_b_ih = torch.empty_like(b_ih) if need_b_ih and not on_gpu else None
        d_b_hh = torch.empty_like(b_hh) if need_b_hh and not on_gpu else None
        kernels_of(x).recurrent_step_backward(
            cell, None if d_h is None else d_h.contiguous(),
            None if d_y is None else d_y[0].contiguous(),
            None if d_c is None else d_c.contiguous(), gates, hidden, h, c, d_gates,
            d_hh if gru else None, d_h0, d_c0, d_b_ih, d_b_hh,
        )  # fmt: skip
        if on_gpu:
            d_b_ih = d_gates.sum(0) if need_b_ih else None
            d_b_hh = d_hh.sum(0) if need_b_hh else None
        if need_h:
            d_h0 = torch.mm(d_hh, w_hh) if d_h0 is None else torch.addmm(d_h0, d_hh, w_hh)
        d_x = torch.mm(d_gates, w_ih) if need_x else None
        d_w_ih = torch.mm(d_gates.t(), x) if need_w_ih else None
        d_w_hh = None
        if need_w_hh:
            d_w_hh = torch.zeros_like(w_hh) if h is None else torch.mm(d_hh.t(), h)
        return (
            None, None, d_x.unsqueeze(0) if layer and d_x is not None else d_x,
            d_h0 if need_h else None, d_c0 if need_c else None, d_w_ih, d_w_hh, d_b_ih, d_b_hh,
        )  # fmt: skip


def _reference_gradient(
    cell: int,
    layer: bool,
    inputs: tuple[Any, ...],
    d_y: Tensor | None,
    d_h: Tensor | None,
    d_c: Tensor | None,
) -> tuple[Any, ...]:
    from lmkern.ops.recurrent import reference_gradient

    x, *others = inputs
    d_x, d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_h0, d_c0 = reference_gradient(
        (x.unsqueeze(0), *others, *(None,) * 11), (cell, False, 1e-5, 0.0, 0.0, False), False,
        (d_y, d_h, d_c) if cell == 0 else (d_y, d_h),
    )[:7]  # fmt: skip
    if d_x is not None and not layer:
        d_x = d_x[0]
    return None, None, d_x, d_h0, d_c0, d_w_ih, d_w_hh, d_b_ih, d_b_hh


def plain_step(
    cell: int,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    layer: bool = False,
) -> Any:
    """(h', c') for the LSTM, h' for others; None where the usual way must be taken.

    As a ``layer``, x [1, B, I] is a sequence of one step; the result is (y [1, B, H], h', c' or None).
    """
    if (
        x.__class__ not in _PLAIN
        or w_ih.__class__ not in _PLAIN
        or w_hh.__class__ not in _PLAIN
        or x.dim() != (3 if layer else 2)
        or w_hh.dim() != 2
        or (b_ih is None) != (b_hh is None)
        or x.dtype not in KERNEL_DTYPES
        or x.numel() == 0
        or not is_plain_eager()
        or not (x.is_cpu or (x.is_cuda and not missing_kernel("recurrent_step", x.device)))
        or x.is_neg()
        or (h is not None and h.is_neg())
        or (c is not None and c.is_neg())
    ):
        return None
    try:
        if torch.is_grad_enabled() and (
            w_hh.requires_grad
            or w_ih.requires_grad
            or x.requires_grad
            or (h is not None and h.requires_grad)
            or (c is not None and c.requires_grad)
            or (b_ih is not None and b_ih.requires_grad)
            or (b_hh is not None and b_hh.requires_grad)
        ):
            return StepFunction.apply(cell, layer, x, h, c, w_ih, w_hh, b_ih, b_hh)
        x = x[0] if layer else x
        y = x.new_empty(x.shape[0], w_hh.shape[1]) if layer else None
        h_next, c_next = _run(cell, x, h, c, w_ih, w_hh, b_ih, b_hh, y, None, None)
    except _DoesNotFitError:
        return None
    if y is not None:
        return y.unsqueeze(0), h_next, c_next
    return h_next if c_next is None else (h_next, c_next)
