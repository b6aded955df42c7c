"""One step of a plain cell and a small batch: the short way to csrc's recurrent_step.

At one or two rows the arithmetic of a cell takes a microsecond, and the usual way to a kernel (checks in
Python, dispatcher, autograd) takes ten. Here the kernel's own checks are the only ones. Whatever does
not fit (another batch, dtype, device, transform, ...) takes the usual way, which also words the errors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lmkern import _C
from lmkern.ops.library import KERNEL_DTYPES, accumulate_dtype, is_plain_eager
from lmkern.ops.recurrent_cpu import GATES, SMALL_BATCH

_PLAIN = (Tensor, Parameter)


class StepFunction(torch.autograd.Function):
    """(cell, x, h, c, w_ih, w_hh, b_ih, b_hh) -> (h', c') or h', with gradients."""

    @staticmethod
    def forward(ctx: Any, cell, x, h, c, w_ih, w_hh, b_ih, b_hh):  # type: ignore[override]
        batch, hidden = x.shape[0], w_hh.shape[1]
        h_next = x.new_empty(batch, hidden)
        gates = x.new_empty(batch, GATES[cell] * hidden)
        c_next = x.new_empty(batch, hidden) if cell == 0 else None
        wider = accumulate_dtype(x.dtype)
        kept = x.new_empty(batch, hidden, dtype=wider) if cell < 2 else None
        _C.recurrent_step(
            cell, x, w_ih, w_hh, b_ih, b_hh, h, c, h_next, None, c_next, gates,
            kept if cell == 0 else None, kept if cell == 1 else None,
        )  # fmt: skip
        ctx.save_for_backward(x, h, c, w_ih, w_hh, b_ih, b_hh, h_next, gates, kept)
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        return (h_next, c_next) if cell == 0 else h_next

    @staticmethod
    def backward(ctx: Any, d_h, d_c=None):  # type: ignore[override]
        from lmkern.ops.recurrent import reference_gradient

        cell = ctx.cell
        x, h, c, w_ih, w_hh, b_ih, b_hh, h_next, gates, kept = ctx.saved_tensors
        need = ctx.needs_input_grad
        options = (cell, False, 1e-5, 0.0, 0.0, False)
        inputs = (x.unsqueeze(0), w_ih, w_hh, b_ih, b_hh, h, c, *(None,) * 11)
        if torch.is_grad_enabled():
            grads = reference_gradient(inputs, options, False, (None, d_h, d_c)[: 3 if cell == 0 else 2])
        else:
            none = x.new_empty(0)
            wanted = [need[1], need[4], need[5], need[6], need[7], need[2], need[3], *(False,) * 5]
            grads = torch.ops.lmkern.recurrent_backward(
                *inputs, *options, None, d_h, d_c, None, h_next.unsqueeze(0), gates,
                kept if cell == 0 else none, kept if cell == 1 else none, none, none, wanted,
            )  # fmt: skip
        d_x, d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_h0, d_c0 = grads[:7]
        return (
            None,
            d_x.squeeze(0) if need[1] else None,
            d_h0 if need[2] else None,
            d_c0 if need[3] else None,
            d_w_ih if need[4] else None,
            d_w_hh if need[5] else None,
            d_b_ih if need[6] else None,
            d_b_hh if need[7] else None,
        )


def small_step(
    cell: int,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> Any:
    """(h', c') for the LSTM, h' for others; None where the usual way must be taken."""
    if (
        x.__class__ not in _PLAIN
        or w_ih.__class__ not in _PLAIN
        or w_hh.__class__ not in _PLAIN
        or x.dim() != 2
        or not 0 < x.shape[0] <= SMALL_BATCH
        or not x.is_cpu
        or x.dtype not in KERNEL_DTYPES
        or not is_plain_eager()
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
            return StepFunction.apply(cell, x, h, c, w_ih, w_hh, b_ih, b_hh)
        h_next = x.new_empty(x.shape[0], w_hh.shape[1])
        c_next = x.new_empty(h_next.shape) if cell == 0 else None
        _C.recurrent_step(
            cell, x, w_ih, w_hh, b_ih, b_hh, h, c, h_next, None, c_next, None, None, None
        )
    except (ValueError, TypeError, IndexError):  # say it in the caller's words, or do it after all
        return None
    return h_next if c_next is None else (h_next, c_next)
