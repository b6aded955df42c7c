"""LSTM: one layer, one direction, a whole sequence. Math and layouts: csrc/ops/recurrent.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern import _C, reference
from lmkern.ops.library import (
    accumulate_dtype,
    define_op,
    needs_grad,
    reference_backward,
    without_autocast,
)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _outputs(x: Tensor, w_hh: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    steps, batch, hidden = x.shape[0], x.shape[1], w_hh.shape[1]
    y = x.new_empty(steps, batch, hidden)
    h_n, c_n = x.new_empty(batch, hidden), x.new_empty(batch, hidden)
    shape = (steps, batch, hidden) if save else (0,)
    return y, h_n, c_n, x.new_empty(shape, dtype=accumulate_dtype(x.dtype))


def _forward_cpu(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    steps, batch, _ = x.shape
    # One product for all steps: the part of the work that the library does best.
    gates = x.new_empty(steps, batch, w_ih.shape[0])
    y, h_n, c_n, cells = _outputs(x, w_hh, save)
    for fresh in (gates, y, cells):
        _C.prefer_huge_pages(fresh)
    flat = gates.flatten(0, 1)
    # An exported program calls the op as it is, with parameters that require a gradient.
    with torch.no_grad(), without_autocast():
        if b_ih is None or b_hh is None:
            torch.mm(x.flatten(0, 1), w_ih.t(), out=flat)
        else:
            torch.addmm(b_ih + b_hh, x.flatten(0, 1), w_ih.t(), out=flat)
        if steps == 1 and h0 is not None:  # a single product is not worth packing w_hh for
            flat.addmm_(h0, w_hh.t())
            h0 = None
    _C.lstm_forward(
        gates,
        w_hh.contiguous(),
        _dense(h0),
        _dense(c0),
        y,
        h_n,
        c_n,
        cells if save else None,
        reverse,
    )
    return y, h_n, c_n, gates if save else gates.new_empty(0), cells


def _forward_fake(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    y, h_n, c_n, cells = _outputs(x, w_hh, save)
    gates = x.new_empty((x.shape[0], x.shape[1], w_ih.shape[0]) if save else (0,))
    return y, h_n, c_n, gates, cells


def _backward_cpu(
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    reverse: bool,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    steps = y.shape[0]
    d_gates = torch.empty_like(gates)
    _C.prefer_huge_pages(d_gates)
    d_c0 = y.new_empty(0 if c0 is None else c0.shape)
    _C.lstm_backward(
        _dense(d_y),
        _dense(d_h_n),
        _dense(d_c_n),
        w_hh.contiguous(),
        _dense(c0),
        gates,
        cells,
        d_gates,
        None if c0 is None else d_c0,
        reverse,
    )
    # Outputs that nobody asked for are empty; an op must not return one tensor twice.
    d_x, d_h0, d_w_ih, d_w_hh, d_b = (y.new_empty(0) for _ in range(5))
    flat = d_gates.flatten(0, 1)
    # h_{t-1} is y shifted by one step, and h0 for the first.
    first, rest, before = 0, slice(1, None), slice(0, -1)
    if reverse:
        first, rest, before = steps - 1, before, rest
    with without_autocast():
        if h0 is not None:
            d_h0 = d_gates[first] @ w_hh
        if need_x:
            d_x = (flat @ w_ih).view(x.shape)
        if need_weights:
            d_w_ih = flat.t() @ x.flatten(0, 1)
            d_b = flat.sum(0, dtype=accumulate_dtype(flat.dtype)).to(flat.dtype)
            d_w_hh = d_gates[rest].flatten(0, 1).t() @ y[before].flatten(0, 1)
            if h0 is not None:
                d_w_hh.addmm_(d_gates[first].t(), h0)
    return d_x, d_h0, d_c0, d_w_ih, d_w_hh, d_b


def _backward_fake(
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    reverse: bool,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        y.new_empty(0 if h0 is None else h0.shape),
        y.new_empty(0 if c0 is None else c0.shape),
        y.new_empty(w_ih.shape if need_weights else (0,)),
        y.new_empty(w_hh.shape if need_weights else (0,)),
        y.new_empty(w_ih.shape[0] if need_weights else 0),
    )


define_op(
    "lstm_forward(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? h0, "
    "Tensor? c0, bool reverse, bool save) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, "
    "Tensor cells)",
    cpu=_forward_cpu,
    fake=_forward_fake,
)
define_op(
    "lstm_backward(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor x, Tensor w_ih, Tensor w_hh, "
    "Tensor? h0, Tensor? c0, Tensor y, Tensor gates, Tensor cells, bool reverse, bool need_x, "
    "bool need_weights) -> (Tensor d_x, Tensor d_h0, Tensor d_c0, Tensor d_w_ih, Tensor d_w_hh, "
    "Tensor d_b)",
    cpu=_backward_cpu,
    fake=_backward_fake,
)


class LSTMFunction(torch.autograd.Function):
    """(x, w_ih, w_hh, b_ih, b_hh, h0, c0, reverse) -> (y, h_n, c_n), with gradients."""

    @staticmethod
    def forward(ctx: Any, x, w_ih, w_hh, b_ih, b_hh, h0, c0, reverse):  # type: ignore[override]
        y, h_n, c_n, gates, cells = torch.ops.lmkern.lstm_forward(
            x, w_ih, w_hh, b_ih, b_hh, h0, c0, reverse, True
        )
        ctx.save_for_backward(x, w_ih, w_hh, b_ih, b_hh, h0, c0, y, gates, cells)
        ctx.reverse = reverse
        ctx.set_materialize_grads(False)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, d_y, d_h_n, d_c_n):  # type: ignore[override]
        x, w_ih, w_hh, b_ih, b_hh, h0, c0, y, gates, cells = ctx.saved_tensors
        inputs = (x, w_ih, w_hh, b_ih, b_hh, h0, c0)
        reverse = ctx.reverse
        if torch.is_grad_enabled():
            grads = reference_backward(
                lambda *a: reference.recurrence("lstm", *a, reverse=reverse)[:3],
                inputs,
                (d_y, d_h_n, d_c_n),
            )
            return (*grads, None)
        need = ctx.needs_input_grad
        d_x, d_h0, d_c0, d_w_ih, d_w_hh, d_b = torch.ops.lmkern.lstm_backward(
            d_y, d_h_n, d_c_n, x, w_ih, w_hh, h0, c0, y, gates, cells, reverse,
            need[0], any(need[1:5]),
        )  # fmt: skip
        return (
            d_x if need[0] else None,
            d_w_ih if need[1] else None,
            d_w_hh if need[2] else None,
            d_b if need[3] else None,
            d_b.clone()
            if need[4]
            else None,  # b_ih and b_hh are two parameters: no shared gradient
            d_h0 if need[5] else None,
            d_c0 if need[6] else None,
            None,
        )


def recurrence(
    cell: str,
    x: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Stands in for the kernels of the whole family: only the plain LSTM has one yet."""
    plain = all(v is None or v is False for k, v in options.items() if k != "reverse")
    if cell != "lstm" or x.dtype == torch.float16 or not plain or w_ih is None:
        return reference.recurrence(cell, x, w_ih, w_hh, b_ih, b_hh, h0, c0, **options)
    args = (x, w_ih, w_hh, b_ih, b_hh, h0, c0)
    reverse = options.get("reverse", False)
    if needs_grad(*args):
        y, h_n, c_n = LSTMFunction.apply(*args, reverse)
    else:
        y, h_n, c_n, _, _ = torch.ops.lmkern.lstm_forward(*args, reverse, False)
    return y, h_n, c_n, None
