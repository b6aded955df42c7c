"""Recurrent layers: one layer, one direction, all steps. Math and layouts: csrc/ops/recurrent.h."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lmkern import reference
from lmkern.ops.library import define_op, needs_grad, reference_backward, register_vmap
from lmkern.ops.recurrent_passes import (
    CELLS,
    DIFFERENTIABLE,
    Inputs,
    Options,
    Saved,
    backward_fake,
    backward_pass,
    forward_fake,
    forward_pass,
)
from lmkern.ops.recurrent_step import plain_step
from lmkern.ops.recurrent_transforms import RecurrenceTransform, vmap_backward, vmap_forward

_INPUT_SCHEMA = ", ".join(
    f"Tensor{'' if name in ('x', 'w_hh') else '?'} {name}" for name in Inputs._fields
)
_SAVED_SCHEMA = ", ".join(f"Tensor {name}" for name in Saved._fields)
_OPTIONS_SCHEMA = (
    "int cell, bool reverse, float eps, float zoneout_h_rate, float zoneout_c_rate, bool recompute"
)
define_op(
    f"recurrent_forward({_INPUT_SCHEMA}, {_OPTIONS_SCHEMA}, bool save, bool want_cells) -> "
    f"(Tensor y, Tensor h_n, Tensor c_n, Tensor c, {_SAVED_SCHEMA})",
    cpu=forward_pass,
    cuda=forward_pass,
    fake=forward_fake,
)
define_op(
    f"recurrent_backward({_INPUT_SCHEMA}, {_OPTIONS_SCHEMA}, Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, "
    f"Tensor? d_c, Tensor y, {_SAVED_SCHEMA}, bool[] need) -> ("
    + ", ".join(f"Tensor d_{name}" for name in Inputs._fields[:DIFFERENTIABLE])
    + ")",
    cpu=backward_pass,
    cuda=backward_pass,
    fake=backward_fake,
)
register_vmap("recurrent_forward", vmap_forward)
register_vmap("recurrent_backward", vmap_backward)


class RecurrenceFunction(torch.autograd.Function):
    """(*Inputs, Options, want_cells) -> (y, h_n[, c_n][, cells]), with gradients."""

    @staticmethod
    def forward(ctx: Any, *args):  # type: ignore[override]
        inputs, options, want_cells = args[:18], args[18], args[19]
        y, h_n, c_n, c, *saved = torch.ops.lmkern.recurrent_forward(
            *inputs, *options, True, want_cells
        )
        ctx.save_for_backward(*inputs, y, *saved)
        ctx.options, ctx.want_cells = options, want_cells
        ctx.set_materialize_grads(False)
        return (y, h_n, *((c_n,) if options[0] == 0 else ()), *((c,) if want_cells else ()))

    @staticmethod
    def backward(ctx: Any, *grad_outputs):  # type: ignore[override]
        saved = ctx.saved_tensors
        inputs, y, kept = saved[:18], saved[18], saved[19:]
        options = ctx.options
        if torch.is_grad_enabled():
            return (*reference_gradient(inputs, options, ctx.want_cells, grad_outputs), None, None)
        d_y, d_h_n, *rest = grad_outputs
        d_c_n = rest.pop(0) if options[0] == 0 else None
        d_c = rest.pop(0) if ctx.want_cells else None
        need = list(ctx.needs_input_grad[:DIFFERENTIABLE])
        grads = torch.ops.lmkern.recurrent_backward(
            *inputs, *options, d_y, d_h_n, d_c_n, d_c, y, *kept, need
        )
        return (*(g if n else None for g, n in zip(grads, need, strict=True)), *(None,) * 7)


def _run_reference(options: Any, want_cells: bool, *inputs: Any) -> tuple[Tensor, ...]:
    i, o = Inputs(*inputs), Options(*options)
    y, h_n, c_n, c = reference.recurrence(
        CELLS[o.cell], *i[:7], w_hr=i.w_hr, peephole=i.peephole, norm_hh=i.norm_hh,
        norm_cell_weight=i.norm_cell_weight, norm_cell_bias=i.norm_cell_bias, eps=o.eps,
        h_mask=i.h_mask, zoneout_h=i.zoneout_h, zoneout_c=i.zoneout_c,
        zoneout_h_rate=o.zoneout_h_rate, zoneout_c_rate=o.zoneout_c_rate, reset_mask=i.reset_mask,
        lengths=i.lengths, batch_sizes=i.batch_sizes, reverse=o.reverse, return_cells=want_cells,
    )  # fmt: skip
    return tuple(t for t in (y, h_n, c_n, c) if t is not None)


def reference_gradient(
    inputs: tuple[Any, ...], options: Any, want_cells: bool, grad_outputs: tuple[Any, ...]
) -> tuple[Tensor | None, ...]:
    """The gradient as a differentiable function: the double backward."""
    return reference_backward(
        functools.partial(_run_reference, options, want_cells), inputs, grad_outputs
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
    *,
    w_hr: Tensor | None = None,
    peephole: Tensor | None = None,
    norm_hh: Tensor | None = None,
    norm_cell_weight: Tensor | None = None,
    norm_cell_bias: Tensor | None = None,
    eps: float = 1e-5,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    zoneout_h_rate: float = 0.0,
    zoneout_c_rate: float = 0.0,
    reset_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    recompute: bool = False,
    return_cells: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """:func:`lmkern.reference.recurrence` on the kernels: same arguments, same results."""
    inputs = (
        x, w_ih, w_hh, b_ih, b_hh, h0, c0, w_hr, peephole, norm_hh, norm_cell_weight, norm_cell_bias,
        h_mask, zoneout_h, zoneout_c, reset_mask, lengths, batch_sizes,
    )  # fmt: skip
    number = CELLS.index(cell)
    if (
        batch_sizes is None
        and x.shape[0] == 1
        and w_ih is not None
        and all(t is None for t in inputs[7:17])
        and not (zoneout_h_rate or zoneout_c_rate or return_cells)
    ):
        after = plain_step(number, x, h0, c0, w_ih, w_hh, b_ih, b_hh, layer=True)
        if after is not None:
            return *after, None
    options = (number, reverse, eps, zoneout_h_rate, zoneout_c_rate, recompute)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        if torch.is_grad_enabled():  # a wrapped tensor does not say whether it needs a gradient
            y, h_n, c_n, c, *_ = RecurrenceTransform.apply(
                _run_reference, options, return_cells, *inputs
            )
            return y, h_n, c_n if cell == "lstm" else None, c if return_cells else None
    elif needs_grad(*inputs[:DIFFERENTIABLE]):
        outputs = RecurrenceFunction.apply(*inputs, options, return_cells)
        y, h_n, *rest = outputs
        c_n = rest.pop(0) if cell == "lstm" else None
        return y, h_n, c_n, rest.pop(0) if return_cells else None
    y, h_n, c_n, c, *_ = torch.ops.lmkern.recurrent_forward(*inputs, *options, False, return_cells)
    return y, h_n, c_n if cell == "lstm" else None, c if return_cells else None
